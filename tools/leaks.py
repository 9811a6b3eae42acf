"""Test images with near-duplicates among the training images, and the figures without them."""

from dataclasses import asdict
from itertools import chain

import numpy as np

from data_prep import InputError, write_csv, write_json
from data_prep.format import Split
from models.runs import Run, load_foundation, load_tuned
from protocols.classify import Readouts, nearest_rows
from protocols.embed import Embedder, make_embedder
from protocols.results import Row
from reports.plots import MISS, Tile, draw_sheet
from reports.rows import ScoreOptions, clean_of, headlines, make_rows, score, show_value

LEAK = ("split", "row", "key", "identity", "cosine", "train_split", "train_key", "train_identity")  # leaks.csv


def find_leaks(embed: Embedder, splits: list[Split], training: list[Split],
               threshold: float) -> tuple[list[dict], list[tuple[Tile, Tile]]]:
    """The test images whose cosine to the nearest training image, of any domain, reaches the threshold.

    Returns:
        One row per leak, nearest first, and the pair of images of each, to draw.
    """
    nearest: dict = {}  # (test split, row) -> cosine, training split, its row
    for source in training:
        y = embed(source)
        for split in splits:
            rows, cosines = (ranked[:, 0] for ranked in nearest_rows(embed(split), y, device=embed.device))
            for row in np.flatnonzero(cosines >= threshold):
                key = (f"{split.domain}/{split.name}", int(row))
                if key not in nearest or cosines[row] > nearest[key][0]:
                    nearest[key] = (float(cosines[row]), source, int(rows[row]))

    def describe(split: Split, row: int) -> tuple[str, str]:
        return split.jpeg(row)[0], split.classes[split.labels[row]] if split.labels[row] >= 0 else ""

    by_name, table, images = {f"{split.domain}/{split.name}": split for split in splits}, [], []
    for (name, row), (cosine, source, other) in sorted(nearest.items(), key=lambda leak: -leak[1][0]):
        (key, identity), (train_key, train_identity) = describe(by_name[name], row), describe(source, other)
        values = name, row, key, identity, cosine, f"{source.domain}/{source.name}", train_key, train_identity
        table.append(dict(zip(LEAK, values, strict=True)))
        images.append(((by_name[name], row, MISS, f"{cosine:.3f}  {key}\n{identity}"),
                       (source, other, "#000000", f"{train_key}\n{train_identity}")))
    return table, images


def score_without(embed: Embedder, splits: list[Split], root: dict, run: Run, draws: int, seed: int, flip: bool,
                  without: dict[str, list[int]], how: str) -> tuple[list[Row], list[Row]]:
    """The rows of the affected splits, for all images and without the leaked ones.

    A shifted split is also affected, in its gaps, if some of its clean images leaked.

    Args:
        splits: test splits.
        without: leaked rows by "domain/split".
        how: threshold and backbone by which leaks were found, for the protocol.
    """
    def count(split: Split | None, left_out: dict) -> int:
        return len(left_out.get(f"{split.domain}/{split.name}", [])) if split else 0

    by_name, tables = {f"{split.domain}/{split.name}": split for split in splits}, ([], [])
    clean = {name: clean_of(split, splits) for name, split in by_name.items()}
    affected = [split for name, split in by_name.items() if count(split, without) + count(clean[name], without)]
    for table, left_out in zip(tables, ({}, without), strict=True):
        figures, _ = score(embed, affected, root, run, draws, seed, Readouts({}, 0, []), left_out, splits)
        for row, _ in make_rows(run.folder.name, affected, {"tuned": figures}, flip):
            name = f"{row.domain}/{row.split}"
            leaked = count(by_name[name], left_out)
            clean_leaked = count(clean[name], left_out) if row.kind in ("gap", "clean") else 0
            if leaked or clean_leaked:
                note = f"without {leaked} leaked" + f" and {clean_leaked} of the clean" * (clean_leaked > 0) + f" {how}"
                row.protocol, row.lacks = f"{row.protocol}, {note}", ", ".join(filter(None, [row.lacks, note]))
            if leaked or clean_leaked or table is tables[0]:  # unaffected rows are listed once
                table.append(row)
    return tables


def write_leaks(run: Run, splits: list[Split], root: dict, data: str, options: ScoreOptions,
                threshold: float, by: str) -> None:
    """`evaluate.py leaks`: RUN/eval/leaks.csv, leaks.json and, by --sheet, leaks-sheet.png.

    `splits`: test splits of the data root `root`, whose folder is `data`.
    """
    out = run.folder / "eval"
    training = [root[domain]["train"] for domain in run.config["domains"] if "train" in root.get(domain, {})]
    if not training:
        raise InputError(f"{data}: none of the run's training splits is in it: pass the data root that holds them")

    def embedder(weights: str) -> Embedder:
        load = load_foundation if weights == "foundation" else load_tuned
        return make_embedder(lambda: load(run), weights, out, options)

    leaks, images = find_leaks(embedder(by), splits, training, threshold)
    for name in ("leaks.json", "leaks-sheet.png"):  # from an earlier search
        (out / name).unlink(missing_ok=True)
    write_csv(out / "leaks.csv", leaks, LEAK)
    if not leaks:
        print(f"no test image has a training image at a cosine of {threshold:g} or more")
        return
    without: dict[str, list[int]] = {}
    for leak in leaks:
        without.setdefault(leak["split"], []).append(leak["row"])
    if options.sheet:  # the nearest 96, four pairs per line
        draw_sheet(out / "leaks-sheet.png", [[tile for pair in images[i : i + 4] for tile in (*pair, None)]
                                             for i in range(0, min(len(images), 96), 4)],
                   [f"The nearest pairs, by the {by} backbone: red: test image, with its cosine; black: "
                    "its nearest training image"])
    tables = score_without(embedder("tuned"), splits, root, run, options.bootstrap, options.seed,
                           options.flip, without, f"at {threshold:g} by {by}")
    write_json(out / "leaks.json", [asdict(row) for row in chain(*tables)])
    heads = [headlines(table) for table in tables]
    for name, rows in without.items():
        key = tuple(name.split("/"))
        pair = [show_value(of[key]["tuned"]) for of in heads if key in of]
        print(f"{name:22s} {len(rows):,} leaked"
              + ("; all {}   without them {}".format(*pair) if len(pair) == 2 else ""))
    print(f"written: {out}/leaks.csv, leaks.json")
