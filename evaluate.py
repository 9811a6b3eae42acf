"""Score a run on every test split of its data, before and after fine-tuning.

    python evaluate.py --run runs/NAME                                        # all test splits of the run's data root
    python evaluate.py --run runs/NAME --splits face_hq/test,object/val      # some of them
    python evaluate.py --run runs/NAME --data other/data --device cuda
    python evaluate.py --model tf_efficientnet_lite0 --weights FILE           # an untouched backbone, without a run
    torchrun --nproc-per-node 8 -- evaluate.py --run runs/NAME                # eight GPUs embed, the first scores
    python evaluate.py --run runs/NAME --humans anna.csv --humans ben.csv     # beside people, on the same trials
    python evaluate.py --run runs/NAME --watch                                # every --keep checkpoint as it appears
    python evaluate.py compare runs/A-s0 runs/A-s1 runs/B-s0                 # paired differences; seeds are averaged
    python evaluate.py compare runs/B --experts runs/face runs/body          # non-inferiority to your own experts
    python evaluate.py leaks --run runs/NAME --threshold 0.95                # test images that training nearly repeats
    python evaluate.py bench --cases reid --json bench.json                  # large cases beside numpy and scikit-learn
    python evaluate.py embed photos/ --run runs/NAME --domain face_hq         # embeddings of your own pictures

The protocol in a split's index.json decides the metrics. RUN/eval/ then holds results.json and results.csv (one row a
figure), report.md and report.html (the same, in one file), figures, and the embeddings, which are computed once.

--humans adds, for each set of weights, rows with a protocol that begins with "human trials": of each split that people
rated; of a domain of which they rated several (its "all splits": their mean); and of domain "all" (the mean over the
domains: multi-tasking), where they rated several:
    AUC on human trials           the model's, on the trials of each rater, mean over raters
    human AUC (mean of raters)
    AUC of rater NAME
    model minus human AUC         paired; its low above 0: above humans, its high below 0: below them, else undecided
    share of raters beaten        of the raters, those whose AUC is below the model's on their own trials
Their intervals resample the people and things on the pictures, not the raters.
"""

import csv
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import click
import numpy as np
import torch

import backbones
import train
from backbones import Backbone
from data_prep import DOMAIN_COLOURS, DOMAINS, InputError, Number, progress, run_command
from data_prep.folders import image_suffixes
from data_prep.shards import BadImage, Split, fit_image, lock_folder, named_splits, open_root
from data_prep.trials import read_ratings
from evaluate_classes import Readouts, nearest_rows, read_prompts
from evaluate_compare import (
    Scored,
    compare_experts,
    compare_groups,
    draw_comparison,
    draw_experts,
    read_scored,
    refuse_unshared,
    show_comparison,
    show_experts,
)
from evaluate_embed import Embedder, make_embedder
from evaluate_figures import MISS, Tile, draw_figures, draw_sheet, draw_split
from evaluate_humans import human_rows, human_verdict, make_human_rows, score_humans, show_humans
from evaluate_report import (
    beside,
    datasets_of,
    draw_stages,
    read_published,
    read_stages,
    save_figure,
    show_published,
    show_stages,
    write_report,
)
from evaluate_results import (
    FEW_NOTE,
    HEADLINE,
    Row,
    check_references,
    clean_of,
    headlines,
    make_report,
    make_rows,
    make_unified_rows,
    mark,
    read_rows,
    score,
    show_value,
    write_csv,
    write_draws,
    write_rows,
)
from evaluate_search import choose_crowd, make_members, score_unified
from run_folder import (
    Run,
    describe_sources,
    hash_file,
    kept_steps,
    load_foundation,
    load_run,
    load_tuned,
    make_folder,
    read_json,
    write_atomically,
)
from train_options import LOADERS, refuse_options
from train_ranks import Ranks, join_ranks, pick_device

PATIENCE = 5.0  # seconds between looks at a run that trains (--watch)

# ---------------------------------------------------------------- leaks

LEAK = ("split", "row", "key", "identity", "cosine", "train_split", "train_key", "train_identity")  # leaks.csv


def find_leaks(embed: Embedder, splits: list[Split], training: list[Split],
               threshold: float) -> tuple[list[dict], list[tuple[Tile, Tile]]]:
    """The images of test splits whose nearest training image, of any domain, is as near as the threshold.

    Returns:
        A row for each, the nearest first, and the two images of each, to draw.
    """
    nearest: dict = {}  # by test split, row: cosine, training split, its row
    for source in training:
        y = embed(source)
        for split in splits:
            rows, cosines = (found[:, 0] for found in nearest_rows(embed(split), y, device=embed.device))
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
    """The rows of the splits that leaks touch, of all images and without the leaked ones.

    Touched is also a shifted split of whose clean images some leaked, for its gaps.

    Args:
        splits: test splits.
        without: leaked rows by "domain/split".
        how: the leaks were found, for the protocol.
    """
    def count(split: Split | None, left_out: dict) -> int:
        return len(left_out.get(f"{split.domain}/{split.name}", [])) if split else 0

    by_name, tables = {f"{split.domain}/{split.name}": split for split in splits}, ([], [])
    clean = {name: clean_of(split, splits) for name, split in by_name.items()}
    touched = [split for name, split in by_name.items() if count(split, without) + count(clean[name], without)]
    for table, left_out in zip(tables, ({}, without), strict=True):
        figures, _ = score(embed, touched, root, run, draws, seed, Readouts({}, 0, run.config, []), left_out, splits)
        for row, _ in make_rows(run.folder.name, touched, {"tuned": figures}, flip):
            name = f"{row.domain}/{row.split}"
            own = count(by_name[name], left_out)
            others = count(clean[name], left_out) if row.metric.startswith(("gap of ", "clean ")) else 0
            if own or others:
                row.protocol += f", without {own} leaked" + f" and {others} of the clean" * (others > 0) + f" {how}"
            if own or others or table is tables[0]:  # what lacks nothing is told once
                table.append(row)
    return tables


# ---------------------------------------------------------------- a user's own pictures


@dataclass
class Pictures:
    """Image files that are read as a split is, so that `embed_rows` takes either: each becomes what its shard held."""

    paths: list[Path]
    size: int  # pixels
    fit: str  # see `fit_image`, as is quality
    quality: int

    def image(self, row: int) -> torch.Tensor:
        """uint8 [3, size, size], RGB; BadImage where the file is none or is damaged."""
        from torchvision.io import ImageReadMode, decode_jpeg

        try:
            data = fit_image(self.paths[row].read_bytes(), self.size, self.fit, self.quality)
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except (OSError, RuntimeError) as error:
            raise BadImage(f"{self.paths[row]}: unreadable") from error


def find_pictures(places: tuple[Path, ...]) -> list[Path]:
    """The files named, and every image (by its name) below the folders named; each once."""
    found, endings = [], image_suffixes()
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: no such file or folder; name pictures, or a folder that holds some")
        inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in endings and p.is_file())
        if place.is_dir() and not inside:
            raise InputError(f"{place}: holds no images (looked for names that end in .jpg, .png and the like)")
        found += inside if place.is_dir() else [place]
    return list(dict.fromkeys(found))


def find_fitting(run: Run, domain: str | None) -> dict:
    """Size, fit and JPEG quality of the shards that a domain of a run was trained on."""
    domain = domain or run.config["domains"][0]
    if domain not in run.config["domains"]:
        raise InputError(f"--domain {domain}: the run was trained on {', '.join(run.config['domains'])}: take the one "
                         "whose images are prepared like yours")
    known = run.config.get("sources") or describe_sources(train.open_splits(run.config))
    print(f"fitted as {domain}: {known[domain]['size']} px, {known[domain]['fit']}")
    return {key: known[domain][key] for key in ("size", "fit", "quality")}


def write_embeddings(path: Path, names: list[str], x: np.ndarray) -> None:
    """`files` [M] and `embeddings` [M, D] as .npz, or a .csv with a line a file."""
    if path.suffix == ".csv":
        write_csv(path, [{"file": name} | {f"e{i}": f"{value:.9g}" for i, value in enumerate(row)}
                         for name, row in zip(names, x, strict=True)])
        return

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # given a name, savez would add .npz
            np.savez(file, files=np.array(names), embeddings=x)

    write_atomically(path, write)


# ---------------------------------------------------------------- the job


def choose_splits(root: dict[str, dict[str, Split]], names: str | None, where: str) -> list[Split]:
    """The test splits to score: all that have a protocol, or those named as domain/split."""
    found = named_splits(root, names, where) if names else [s for splits in root.values() for s in splits.values()]
    scored = {f"{split.domain}/{split.name}": split for split in found if split.protocol}
    for name, split in list(scored.items()):
        if split.protocol["name"] not in HEADLINE:
            print(f"  {name}: protocol {split.protocol['name']!r} is not scored yet: left out")
            del scored[name]
    if not scored:
        raise InputError(f"{where}: no test split to score: prepare one, `python -m data_prep SOURCE ... --part test`")
    check_references(list(scored.values()), root)
    return sorted(scored.values(), key=lambda s: (DOMAINS.index(s.domain), bool(s.protocol.get("ood")), s.name))


def training_split(run: Run | None, root: dict[str, dict[str, Split]]) -> Split | None:
    """The split of objects that a run was trained on, where the data root holds it."""
    split = root.get("object", {}).get("train")
    known = run is not None and split is not None and run.config["shards"].get("object")
    return split if known and split.index["provenance"]["plan"] == known else None


def add_references(splits: list[Split], root: dict[str, dict[str, Split]]) -> list[Split]:
    """Test splits and the splits that class means and neighbours of them come from, each once."""
    references = [root[split.domain].get(split.protocol.get("reference")) for split in splits]
    return list({split.folder: split for split in [*references, *splits] if split is not None}.values())


def leave(ranks: Ranks) -> None:
    """End a process of several at once: gloo's threads now and then abort an interpreter that is torn down."""
    if ranks.world > 1:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


def open_models(options: dict, given: set[str]
                ) -> tuple[str, Path, Run | None, dict[str, Callable[[], Backbone]], str, dict]:
    """Name, output folder, run (if any), loaders of the foundation and the tuned backbone, data root, its options.

    Args:
        options: all of them.
        given: names of those on the command line.
    """
    if options["run"]:
        for key in ("backbone", "size", "model", "weights", "image_size", "out"):
            if key in given:
                raise InputError(f"--{key.replace('_', '-')} describes an untouched backbone: leave it out with --run")
        if options["watch"]:
            watch(Path(options["run"]), options)  # then the run is complete
        run = load_run(Path(options["run"]), options["allow_partial"])
        models = {"foundation": lambda: load_foundation(run), "tuned": lambda: load_tuned(run)}
        if not options["foundation"]:
            del models["foundation"]
        return run.folder.name, run.folder, run, models, options["data"] or run.config["data"], run.config
    if not options["model"] and not options["backbone"]:
        raise InputError("what is to be scored? give --run RUN, or --model NAME for an untouched backbone")
    for name, used in (("--no-foundation", not options["foundation"]), ("--allow-partial", options["allow_partial"])):
        if used:
            raise InputError(f"{name} describes how a run is scored: give --run RUN, or leave it out")
    config = {key: options[key] for key in ("backbone", "size", "model", "weights", "image_size")}
    config |= {"embed_dim": 0, "seed": options["seed"]}
    backbones.resolve_backbone(config)  # refuses an unknown name before anything is read
    name = (options["model"] or f"{options['backbone']}-{options['size']}").replace("/", "_") + "-foundation"
    folder = Path(options["out"] or f"runs/{name}")
    models = {"foundation": lambda: backbones.load_backbone(config).eval()}
    return name, folder, None, models, options["data"] or "data", config


def watch(folder: Path, options: dict) -> None:
    """--watch: score every checkpoint that --keep leaves, once, as it appears, until the run is complete.

    RUN/eval/watch.csv gets their rows, each with its step (0: the untouched backbone), watch.png the headlines.
    """
    if not (folder / "config.json").is_file() or not (config := read_json(folder / "config.json")).get("keep"):
        raise InputError(f"--watch: {folder} is no run that keeps checkpoints: train it with --keep N")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: one line, and what is written stays
    out, data = folder / "eval", options["data"] or config["data"]
    root, prompts, table = open_root(Path(data)), read_prompts(options["prompts"]), []
    splits = choose_splits(root, options["splits"], data)
    click.get_current_context().with_resource(lock_folder(out, "--run"))
    if (out / "watch.csv").exists():  # stopped before: goes on
        with open(out / "watch.csv", newline="") as file:
            table = list(csv.DictReader(file))
    complete = False
    while not complete:
        complete = (folder / "done.json").exists()  # asked first: what came before it is still scored
        known = {int(row["step"]) for row in table}
        there = {step: place for step, place in kept_steps(folder).items() if step not in known}
        if options["foundation"] and there and 0 not in known:
            there = {0: next(iter(there.values())), **there}
        for step, place in there.items():
            try:
                run = load_run(place)
                model = load_tuned(run) if step else load_foundation(run)
            except InputError:
                if not place.exists():  # older than --keep allows by now
                    continue
                raise
            name = "watched" if step else "foundation"
            embed = make_embedder(lambda model=model: model, name, out, options)
            readouts = Readouts(prompts, options["probe"], run.config, run.classes.get("object", []),
                                training_split(run, root))
            figures, _ = score(embed, splits, root, run if step else None, options["bootstrap"], options["seed"],
                               readouts)
            rows = [row for row, _ in make_rows(folder.name, splits, {"tuned" if step else "foundation": figures},
                                                options["flip"])]
            table += [{"step": step} | asdict(row) for row in rows]
            write_csv(out / "watch.csv", table)
            draw_watch(out / "watch.png", table)
            print(f"step {step}: " + "   ".join(f"{'/'.join(key)} {show_value(next(iter(pair.values())))}"
                                                for key, pair in headlines(rows).items()), flush=True)
        if not complete:
            time.sleep(PATIENCE)


def draw_watch(path: Path, table: list[dict]) -> None:
    """The headline of every split over the steps of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for line in sorted(table, key=lambda line: int(line["step"])):
        row = Row(**{key: value for key, value in line.items() if key != "step"})
        if row.headline:
            label = f"{row.domain}/{row.split}", row.metric
            points.setdefault(label, []).append((int(line["step"]), 100 * float(row.value)))
    figure, ax = plt.subplots(figsize=(7, 4))
    drawn: list[str] = []  # a domain's second split is dashed, its third dotted
    for (name, metric), values in points.items():
        domain = name.split("/")[0]
        ax.plot(*zip(*dict(reversed(values)).items(), strict=True), marker=".", label=f"{name}, {metric}",
                color=DOMAIN_COLOURS[domain], ls=("-", "--", ":")[drawn.count(domain) % 3])
        drawn.append(domain)
    ax.set(xlabel="step", ylabel="percent")
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(path, figure)


def model_options(command):
    """The options that evaluate.py and analyze.py share."""
    for option in reversed([
        click.option("--run", metavar="RUN", help="Folder of a finished run."),
        click.option("--data", metavar="DIR", help="Data root (default: the run's own)."),
        click.option("--allow-partial", is_flag=True, help="Accept a run that has not finished."),
        click.option("--flip/--no-flip", default=True, help="Add the embedding of the mirrored image."),
        click.option("--batch", type=click.IntRange(1), default=64, help="Images per forward pass."),
        click.option("--workers", type=click.IntRange(0), default=LOADERS, help="Loader processes."),
        click.option("--cache", metavar="DIR",
                     help="Keep the embeddings of untouched backbones here, for all runs that share one (default: "
                          ".foundation beside the run)."),
        click.option("--device", default="auto",
                     help="auto, cpu or cuda; evaluate.py under torchrun: each process takes its own."),
        click.option("--seed", type=click.IntRange(0), default=0, help="Of every random draw."),
        click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error."),
    ]):
        command = option(command)
    return command


@click.group(invoke_without_command=True, context_settings={"show_default": True, "max_content_width": 120},
             help=__doc__.split("\n\n")[0])
@model_options
@click.option("--splits", metavar="NAMES",
              help="Comma-separated domain/split: the results then hold these alone (default: all).")
@click.option("--foundation/--no-foundation", default=True, help="Score the untouched backbone too.")
@click.option("--watch", is_flag=True,
              help="Score the checkpoints of train.py --keep as they appear (watch.csv, watch.png), then the run.")
@click.option("--backbone", type=click.Choice(list(backbones.BACKBONES)), help="Without --run: an untouched backbone.")
@click.option("--size", type=click.Choice(backbones.SIZES), default="large", help="Its size.")
@click.option("--model", metavar="NAME", help="Any timm or open_clip model instead of --backbone.")
@click.option("--weights", default="pretrained", metavar="WHICH", help="'pretrained', 'none' or a FILE.")
@click.option("--image-size", type=click.IntRange(16), help="Input side in pixels.")
@click.option("--out", metavar="DIR", help="Without --run: folder for the results (default: runs/NAME-foundation).")
@click.option("--bootstrap", type=click.IntRange(2), default=500, help="Resamplings for the intervals.")
@click.option("--prompts", default="1,7,80", metavar="SETS",
              help="Zero-shot classification by CLIP: shipped sets of prompts, by number, or files with a template a "
                   "line, {} for the class name; '' for none.")
@click.option("--probe", type=click.IntRange(0), default=50_000, metavar="N",
              help="Fit the linear probe to at most N images of a reference split (0: no probe).")
@click.option("--sheet", is_flag=True,
              help="Draw what is scored: probes of each split with the ten images nearest to them, of verification the "
                   "hardest pairs: sheet-DOMAIN-SPLIT.png.")
@click.option("--crowd", type=click.IntRange(0), default=5000,
              help="Probes of a domain that are searched among all domains at once (0: none).")
@click.option("--humans", type=click.Path(path_type=Path), multiple=True, metavar="FILE.csv",
              help="Ratings of people (split,left_key,right_key,rater,rating), e.g. from the page of `data_prep "
                   "trials`; may be given again.")
@click.option("--published", multiple=True, metavar="SPLIT=DATASET",
              help="Data set of a split whose name is not the set's, e.g. object/val=imagenet: its published figures "
                   "stand beside the run's (SPLIT= for none); may be given again.")
@click.pass_context
def main(context: click.Context, **options) -> int | None:
    if context.invoked_subcommand:
        refuse_options(context)
        return None
    if options["watch"] and not options["run"]:
        raise InputError("--watch follows a run: give --run RUN")
    given = {key for key in options if context.get_parameter_source(key) == click.core.ParameterSource.COMMANDLINE}
    name, folder, run, models, data, config = open_models(options, given)
    prompts, trained = read_prompts(options["prompts"]), run.classes.get("object", []) if run else []
    root = open_root(Path(data))
    readouts = Readouts(prompts, options["probe"], config, trained, training_split(run, root))
    splits = choose_splits(root, options["splits"], data)
    by_name = {f"{split.domain}/{split.name}": split for split in splits}
    published = read_published()
    datasets = datasets_of(list(by_name), options["published"], published)
    ratings = read_ratings(list(options["humans"]), by_name) if options["humans"] else []
    ranks, out = join_ranks(options), folder / "eval"
    if ranks.rank == 0:
        context.with_resource(lock_folder(out, "--run" if run else "--out"))
    embedders = {weights: make_embedder(load, weights, out, options, ranks) for weights, load in models.items()}
    for embed in embedders.values():  # all of it first, by all ranks: what follows is the first one's alone
        for split in add_references(splits, root):
            embed.prepare(split)
        embed.ranks = Ranks()
    if ranks.rank:
        leave(ranks)
    figures, curves, unified, people = {}, {}, {}, {}
    if crowd := choose_crowd(splits) if options["crowd"] else []:
        print(f"  everything: {', '.join(f'{split.domain}/{split.name}' for split in crowd)} (--splits chooses)")
    for weights, embed in embedders.items():
        found = score(embed, splits, root, run if weights == "tuned" else None, options["bootstrap"], options["seed"],
                      readouts)
        figures[weights], curves[weights] = found
        if crowd:
            members = make_members(crowd, [embed(split) for split in crowd], options["crowd"], options["seed"])
            crowd = [member.split for member in members]
        if crowd:
            unified[weights] = score_unified(members, options["bootstrap"], options["seed"], embed.device)
        if ratings:
            rated = {name: embed(by_name[name]) for name in {rating.split for rating in ratings}}
            people[weights] = score_humans(ratings, by_name, rated, options["bootstrap"], options["seed"])
    results = make_rows(name, splits, figures, options["flip"])
    results += make_unified_rows(name, crowd, unified, options["flip"], options["crowd"], options["seed"])
    results += make_human_rows(name, ratings, by_name, people, options["flip"])
    rows = [row for row, _ in results]
    write_rows(out, rows)
    write_draws(out, results, options["seed"], hash_file(folder / "model.safetensors"))
    for path in [*(out / f"{name}.png" for name in ("roc", "cmc", "scores", "stages")), *out.glob("sheet-*.png")]:
        path.unlink(missing_ok=True)  # of an evaluation of other splits; a sheet shows people
    others = beside(rows, datasets, published)
    middle = [line for title, file in draw_figures(out, rows, curves, splits, others)
              for line in ("", f"![{title}]({file})")]
    middle += show_humans(rows) + show_published(others)
    if run and run.config["schedule"] == "sequential":
        stages = read_stages(folder, run.config)
        middle += show_stages(stages, run.config)
        if stages:
            draw_stages(out / "stages.png", stages)
            middle += ["", "![AUC after each stage](stages.png)"]
    write_report(out, make_report(rows, splits, options["flip"], middle))
    for split in splits if options["sheet"] else []:
        if f"{split.domain}/{split.name}" in curves[embed.name]:
            draw_split(out, split, embed, root, options["seed"])
    for (domain, split), pair in headlines(rows).items():
        print(f"{domain + '/' + split:22s} {next(iter(pair.values())).metric:20s} "
              + "   ".join(f"{weights} {show_value(row)}" for weights, row in pair.items()))
    for row in rows:
        if row.domain == "all":
            print(f"{'everything':22s} {row.metric:30s} {row.weights} {show_value(row)}")
    for (domain, split), by_weights in human_rows(rows).items():
        for weights, found in by_weights.items():
            lead = found["model minus human AUC"]
            name = "everything" if domain == "all" else f"{domain}/{split}"
            print(f"{name:22s} {lead.metric:30s} {weights} {show_value(lead)}: "
                  f"{human_verdict(lead)}")
    if any(mark(row.identities) for row in rows):
        print(FEW_NOTE)
    print(f"written: {out}/report.html, report.md, results.json, results.csv and figures"
          + (f"; next: python analyze.py --run {folder}" if run else ""))
    if "foundation" in embedders:
        print(f"embeddings of the untouched backbone, for all runs that share it: {embedders['foundation'].folder}")
    leave(ranks)
    return 0


@main.command(help="Differences between evaluated runs, paired by person; runs that differ in the seed alone are "
                   "averaged. The first run, with its seeds, is what the others are compared with; one RUN alone: with "
                   "its own untouched backbone; --experts: whether it is non-inferior to the others.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--weights", type=click.Choice(["tuned", "foundation"]),
              help="Whose figures (default: tuned where a run has them).")
@click.option("--splits", metavar="NAMES", help="Comma-separated domain/split (default: all that the runs share).")
@click.option("--experts", is_flag=True,
              help="The runs after the first (and its seeds) are its experts: the same backbone and number of images, "
                   "one domain each.")
@click.option("--delta", type=Number(0, 1, min_open=True), default=0.01,
              help="With --experts: a difference that does not matter; of an expert above 0.9 at most a tenth of its "
                   "error.")
@click.option("--out", type=click.Path(path_type=Path), default="comparison", metavar="DIR",
              help="Folder for comparison.md, .csv, .json and .png.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
@click.pass_context
def compare(context: click.Context, runs: tuple[Path, ...], weights: str | None, splits: str | None, experts: bool,
            delta: float, out: Path) -> int:
    if context.get_parameter_source("delta") == click.core.ParameterSource.COMMANDLINE and not experts:
        raise InputError("--delta is the margin of non-inferiority to experts: give --experts too")
    if experts and weights == "foundation":
        raise InputError("--weights foundation: with --experts the tuned weights are compared; leave it out")
    folders = list(dict.fromkeys(folder.resolve() for folder in runs))
    if len(folders) < len(runs):
        raise InputError("a run is named twice: name each once")
    if experts:
        scored = [read_scored(folder, "tuned") for folder in runs]
    elif len(runs) == 1:
        if weights:
            raise InputError("--weights chooses between the figures of several runs: leave it out with one run")
        scored = [read_scored(runs[0], which) for which in ("foundation", "tuned")]
    else:
        scored = [read_scored(folder, weights) for folder in runs]
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.recipe, []).append(one)
    first, *others = groups.values()
    chosen = set(splits.split(",")) if splits else set()
    if experts and not others:
        raise InputError("--experts: want RUN and at least one expert of its domains")
    refuse_unshared(chosen, [first, *others], experts)
    table = compare_experts(first, others, chosen, delta) if experts else compare_groups([first, *others], chosen)
    make_folder(out, "--out")
    text = show_experts(table, first[0].config["domains"]) if experts else show_comparison(table)
    if experts:
        draw_experts(out / "comparison.png", table)
    else:
        shown = [row.weights for row, _ in first[0].found.values()]
        untouched = [row for row in read_rows(first[0].folder / "eval") if row.weights == "foundation"]
        draw_comparison(out / "comparison.png", table, untouched if "foundation" not in shown else [])
    write_atomically(out / "comparison.json", lambda path: path.write_text(json.dumps(table, indent=1) + "\n"))
    write_csv(out / "comparison.csv", table)
    write_atomically(out / "comparison.md", lambda path: path.write_text(text))
    if not experts:  # every figure is in the files; a terminal gets those that stand for their protocols
        text = show_comparison([row for row in table if row["headline"]] or table)
    print(text + f"written: {out}/comparison.md, .csv, .json and .png")
    return 0


@main.command(help="Test images that training images nearly repeat, and the figures without them: RUN/eval/leaks.csv "
                   "and leaks.json.")
@model_options
@click.option("--splits", metavar="NAMES", help="Comma-separated domain/split (default: all test splits).")
@click.option("--threshold", type=Number(-1, 1), default=0.95,
              help="Cosine to the nearest training image from which on a test image counts as leaked.")
@click.option("--by", type=click.Choice(["foundation", "tuned"]), default="foundation",
              help="Whose embeddings find the leaks: fine-tuning draws together what is merely alike.")
@click.option("--bootstrap", type=click.IntRange(2), default=500, help="Resamplings for the intervals.")
@click.option("--sheet", is_flag=True, help="Draw the nearest pairs, test image and training image: leaks-sheet.png.")
def leaks(**options) -> int:
    if not options["run"]:
        raise InputError("whose training images? give --run RUN")
    run = load_run(Path(options["run"]), options["allow_partial"])
    data, out = options["data"] or run.config["data"], run.folder / "eval"
    root = open_root(Path(data))
    splits = choose_splits(root, options["splits"], data)
    click.get_current_context().with_resource(lock_folder(out, "--run"))
    training = [root[domain]["train"] for domain in run.config["domains"] if "train" in root.get(domain, {})]
    if not training:
        raise InputError(f"{data}: none of the run's training splits is there: name the data root that holds them")

    def embedder(weights: str) -> Embedder:
        load = load_foundation if weights == "foundation" else load_tuned
        return make_embedder(lambda: load(run), weights, out, options)

    found, images = find_leaks(embedder(options["by"]), splits, training, options["threshold"])
    for name in ("leaks.json", "leaks-sheet.png"):  # of other leaks than leaks.csv will list
        (out / name).unlink(missing_ok=True)
    write_csv(out / "leaks.csv", found, LEAK)
    if not found:
        print(f"no test image has a training image at a cosine of {options['threshold']:g} or more")
        return 0
    without: dict[str, list[int]] = {}
    for leak in found:
        without.setdefault(leak["split"], []).append(leak["row"])
    if options["sheet"]:  # the nearest 96, four pairs a line
        draw_sheet(out / "leaks-sheet.png", [[tile for pair in images[i : i + 4] for tile in (*pair, None)]
                                             for i in range(0, min(len(images), 96), 4)],
                   [f"The nearest pairs, by the {options['by']} backbone: red: test image, with its cosine; black: "
                    "the training image that it repeats"])
    tables = score_without(embedder("tuned"), splits, root, run, options["bootstrap"], options["seed"],
                           options["flip"], without, f"at {options['threshold']:g} by {options['by']}")
    write_atomically(out / "leaks.json", lambda path: path.write_text(
        json.dumps([asdict(row) for row in chain(*tables)], indent=1) + "\n"))
    heads = [headlines(table) for table in tables]
    for name, rows in without.items():
        key = tuple(name.split("/"))
        pair = [show_value(of[key]["tuned"]) for of in heads if key in of]
        print(f"{name:22s} {len(rows):,} leaked"
              + ("; all {}   without them {}".format(*pair) if len(pair) == 2 else ""))
    print(f"written: {out}/leaks.csv, leaks.json")
    return 0


@main.command(help="Time and memory of the largest cases beside plain numpy and scikit-learn, on generated embeddings.")
@click.option("--cases", default="reid,pairs,curve,search,million", metavar="NAMES",
              help="Which: re-identification, listed pairs of templates, ROC, and 1:N in 100,000 or 1,000,000.")
@click.option("--scale", type=Number(0.001, 1), default=1.0, help="Of all sizes.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Turns that the ways of a case take; of the median.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the result there, too.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
def bench(cases: str, scale: float, rounds: int, path: Path | None) -> int:
    import evaluate_bench  # here, because it builds on this module

    names = cases.split(",")
    if unknown := [name for name in names if name not in evaluate_bench.CASES]:
        raise InputError(f"--cases {unknown[0]}: there are {', '.join(evaluate_bench.CASES)}")
    return evaluate_bench.bench(names, scale, rounds, path)


@main.command(help="Write unit embeddings of your own pictures, prepared and embedded as evaluation does it.")
@click.argument("pictures", nargs=-1, required=True, metavar="IMAGE...|FOLDER", type=click.Path(path_type=Path))
@click.option("--run", metavar="RUN", required=True, help="Folder of a finished run.")
@click.option("--domain", type=click.Choice(DOMAINS),
              help="Fit pictures as this domain's training images were (default: the run's first).")
@click.option("--out", type=click.Path(path_type=Path), default="embeddings.npz", metavar="FILE",
              help="A .npz (arrays files and embeddings) or .csv to write.")
@click.option("--allow-partial", is_flag=True, help="Accept a run that has not finished.")
@click.option("--flip/--no-flip", default=True, help="Add the embedding of the mirrored image.")
@click.option("--batch", type=click.IntRange(1), default=64, help="Images per forward pass.")
@click.option("--workers", type=click.IntRange(0), default=LOADERS, help="Loader processes.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
def embed(pictures: tuple[Path, ...], run: str, domain: str | None, out: Path, allow_partial: bool, flip: bool,
          batch: int, workers: int, device: str) -> int:
    if out.suffix not in (".npz", ".csv"):
        raise InputError(f"--out {out}: want a file that ends in .npz or .csv")
    if out.exists():
        raise InputError(f"{out} exists: remove it, or choose another --out")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: {out.parent}: no such folder; make it, or choose another --out")
    paths, opened, where = find_pictures(pictures), load_run(Path(run), allow_partial), pick_device(device)
    files = Pictures(paths, **find_fitting(opened, domain))
    model = load_tuned(opened).to(where)
    rows, parts = [], []
    with progress(total=len(paths), desc="embed", unit="img") as bar:
        for good, x in train.embed_rows(model, files, np.arange(len(paths)), where, batch, workers, flip):
            rows += good.tolist()
            parts.append(torch.nn.functional.normalize(x, dim=1).cpu().numpy())
            bar.update(len(good))
    for row in sorted(set(range(len(paths))) - set(rows)):
        print(f"skipped, not a readable image: {paths[row]}", file=sys.stderr)
    if not rows:
        raise InputError(f"none of the {len(paths)} files can be read as an image: nothing written")
    write_embeddings(out, [str(paths[row]) for row in rows], np.concatenate(parts))
    print(f"{out}: {len(rows)} embeddings of {model.dim} dimensions"
          + (f"; {len(paths) - len(rows)} files skipped" if len(rows) < len(paths) else ""))
    return 0


if __name__ == "__main__":
    run_command(main)
