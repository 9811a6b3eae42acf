"""Command line: `python -m data_prep SOURCE --src PATH --out DATA/<domain>/<split>`; `sources` lists the sources.

On finished splits: `verify`, `show`, `stats`, `merge`, `degrade`, `trials`. Without a source: `demo`, `bench`.
"""

import csv
import inspect
import io
import json
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageDraw

from data_prep import ANOTHER, DOMAINS, InputError, Number, lock_folder, make_folder, run_command, write_json, writing
from data_prep.degrade import choose_changes, degraded_split, draw_ladder
from data_prep.demo import SIZE, demo_splits, draw_face
from data_prep.format import FITS, MAX_SIZE, ROLES, BadImage, Split, as_text, siblings
from data_prep.merge import merge_splits
from data_prep.records import Records, group_classes, report_unknown, select
from data_prep.sources import bodies, faces, folders, imagenet, insightface, parquet, stimuli, webdataset
from data_prep.stats import draw_stats, split_stats
from data_prep.verify import verify_split
from data_prep.write import open_image, read_image, write_split

FOLDER = click.Path(path_type=Path)
SMALL = 64  # pixels: up to this side JPEG compression changes embeddings, and files are small anyway
FIT = {"object": "crop", "face_hq": "squash", "face_lq": "squash", "body": "pad"}


@click.group(context_settings={"show_default": True, "max_content_width": 120}, help=__doc__)
def cli() -> None:
    pass


def apply_options(options: list, command):
    """Prepend options, in this order, to those of the command."""
    for option in reversed(options):
        command = option(command)
    return command


DEBUG = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
WORKERS = click.option("--workers", type=click.IntRange(1, 1024), default=os.cpu_count() or 1, help="Worker processes.")
WRITING = [
    click.option("--quality", type=click.IntRange(1, 100),
                 help=f"JPEG quality of images that are re-encoded (default: 95; up to {SMALL} pixels 100, without "
                      "chroma subsampling)."),
    click.option("--seed", type=click.IntRange(0), default=0,
                 help="Random seed of a training split's order and of --holdout, --max-classes and degradations."),
    click.option("--shard-size", type=click.IntRange(1), default=2048, help="Images per shard."), WORKERS, DEBUG,
]
SHARED = [  # options of every source
    click.option("--out", type=FOLDER, required=True,
                 help="Split folder to write, DATA/<domain>/<split>; this path sets the domain."),
    click.option("--source-name", "data_set", metavar="NAME", help="Data set's name in results (default: from --src)."),
    click.option("--part", type=click.Choice(["train", "test"]),
                 help="Training or test images (default: train if <split> is 'train', else test)."),
    click.option("--size", type=click.IntRange(8, MAX_SIZE),
                 help="Side of the images in pixels (default: 256; faces: their common side, else 112)."),
    click.option("--fit", type=click.Choice(FITS),
                 help="How images become square (default: crop objects, squash faces, pad bodies)."),
    click.option("--list", "listed", type=FOLDER, metavar="FILE",
                 help="File of the identities or image names to keep, one per line."),
    click.option("--classes", cls=folders.Only, only="splits of objects", type=FOLDER, metavar="FILE",
                 help="Objects: folder,class lines (CSV or tabs) that merge class folders into coarser classes; "
                      "folders without a line are left out."),
    click.option("--holdout", cls=folders.Only, only="splits of people", metavar="SHARE",
                 type=Number(0, 1, min_open=True, max_open=True),
                 help="People: share of the identities reserved for test splits, chosen by identity and --seed: "
                      "training and test splits with equal values share no identity."),
    click.option("--min-images", type=click.IntRange(2), metavar="N", help="Leave out identities with fewer images."),
    click.option("--max-classes", type=click.IntRange(1), metavar="N", help="Keep N identities, drawn by --seed."),
    click.option("--max-images", type=click.IntRange(1), metavar="N",
                 help="Keep the first N readable images of each identity (test: N probes and N gallery images)."),
    click.option("--drop-duplicates", is_flag=True,
                 help="Leave out copies of images and, from a training split, images of the domain's test splits "
                      "(prepare those first). Reads every image twice."),
    *WRITING,
]


def choose_quality(quality: int | None, size: int) -> int:
    """--quality or its default: a 24-pixel image and its JPEG 95 have embeddings of cosine 0.97; JPEG 100: 0.998."""
    if quality is None and size <= SMALL:
        print(f"  {size} pixels: images are re-encoded as JPEG of quality 100, not 95 (--quality chooses)")
    return quality or (100 if size <= SMALL else 95)


def face_size(records: Records) -> int:
    """The side in pixels if a sample of aligned faces has only one, else 112."""
    sides = set()
    for i in np.linspace(0, len(records) - 1, min(len(records), 16), dtype=int):
        with suppress(BadImage):
            sides.update(open_image(read_image(records[i])[0])[0].size)
    return sides.pop() if len(sides) == 1 else 112


def describe_missing(split: Split) -> Iterator[str]:
    """What a split lacks compared with its source: unusable files, listed images that became misses, empty classes."""
    named = split.folder / "skipped.csv"
    if named.exists():
        with open(named, encoding="utf-8", errors="surrogateescape", newline="") as file:
            _, first, *others = csv.reader(file)
        yield f"{named} names {1 + len(others):,} files that could not be used, first {first[0]}: {first[1]}"
    if misses := int(split.missing.sum()):
        yield f"{misses:,} listed images could not be read; each counts as a miss"
    if empty := split.index.get("unreadable_classes"):
        yield (f"{len(empty):,} classes have no readable image and are left out: {', '.join(empty[:10])}"
               + ", ..." * (len(empty) > 10))


def describe_mates(split: Split) -> Iterator[str]:
    """Warnings on probes that re-identification cannot score and on a gallery without any mate."""
    if (split.protocol or {}).get("name") not in ("reid", "identification"):
        return
    roles, labels = split.optional("role"), np.array(split.labels)
    probes, gallery = np.flatnonzero(roles == ROLES.index("probe")), np.flatnonzero((roles > 0) & (labels >= 0))
    enrolled = np.isin(labels[probes], labels[gallery])
    if not enrolled.any():
        yield "WARNING: no probe has a mate in the gallery: there is nothing to score"
    if split.protocol["name"] == "reid":
        camera = split.optional("camera") + 1
        width = int(camera.max(initial=0)) + 1
        seen = np.unique(labels[gallery] * width + camera[gallery])  # the cameras of each identity in the gallery
        cameras = np.bincount(seen // width, minlength=len(split.classes))
        unscored = ((cameras[labels[probes]] == 1) & np.isin(labels[probes] * width + camera[probes], seen)).sum()
        if unscored:
            yield (f"WARNING: all mates of {unscored:,} of {len(probes):,} probes are from the probe's camera, which "
                   "re-identification ignores: these probes are not scored"
                   + "; there is nothing to score" * bool(unscored == enrolled.sum()))


def report(folder: Path, index: dict, images: int) -> None:
    """Print the closing table of a preparation and warn of identities and images that other splits hold, too."""
    skipped = index["skipped"]
    print(f"{folder}: {images:,} images in, {index['samples']:,} of {len(index['classes']):,} classes written, "
          f"{sum(skipped.values()):,} skipped" + "".join(f"\n  {n:,}: {reason}" for reason, n in skipped.items()))
    if lost := (index["protocol"] or {}).get("pairs_lost"):
        print(f"  {lost:,} pairs left out: one of their images was skipped")
    split = Split(folder)
    if split.protocol is None and len(split.classes) == 1:
        print(f"  WARNING: only one class, {split.classes[0]}, which is too few for training: --src should be the "
              "folder that holds the class folders")
    for line in chain(describe_missing(split), describe_mates(split)):
        print(f"  {line}")
    if split.copies:
        order = np.argsort(split.column("hash"))
        image, label = split.column("hash")[order], split.labels[order]
        several = len(np.unique(image[1:][(image[1:] == image[:-1]) & (label[1:] != label[:-1]) & (image[1:] != 0)]))
        print(f"  {split.copies:,} images are copies of others in the split (--drop-duplicates)"
              + f"; {several:,} of the copied images have several labels" * (several > 0))
    others = {other.name: other for other in siblings(folder)}
    if reference := (split.protocol or {}).get("reference"):
        base = {**others, split.name: split}.get(reference)
        if base is None:
            print(f"  WARNING: --reference {reference}: {split.domain}/{reference}, whose images classify this split, "
                  "does not exist: prepare it before evaluating, or prepare this one again with another --reference")
        elif not {*split.classes, *chain(*split.protocol.get("groups", {}).values())} & set(base.classes):
            print(f"  WARNING: --reference {reference}: {split.domain}/{reference} has none of the classes, such as "
                  f"{split.classes[0]}")
    hashes = np.setdiff1d(split.column("hash"), 0)
    for other in others.values():
        if (other.protocol is None) == (split.protocol is None):
            continue
        # classes of objects should be the same in both; equal names of people from two data sets prove nothing
        data_sets = [one.index["provenance"]["data_set"] for one in (split, other)]
        shared = set(split.classes) & set(other.classes)
        if shared and split.domain != "object" and set(data_sets[0]) & set(data_sets[1]):
            print(f"  WARNING: train and test overlap, {len(shared):,} identities are in {other.name} too: "
                  f"{min(shared)}")
        if other.hashed and (copies := len(np.intersect1d(hashes, other.column("hash")))):
            train, test = (split.name, other.name) if split.protocol is None else (other.name, split.name)
            print(f"  WARNING: train and test overlap, {copies:,} images are in {other.name} too: prepare {train} "
                  f"again, after {test}, with --drop-duplicates")


def split_folder(out: Path) -> Path:
    """--out as an absolute path, locked until the command ends; InputError if it is not DATA/<domain>/<split>."""
    path = Path(os.path.abspath(out))  # links stay: a domain's folder may be a link to a larger disk
    if len(path.parts) < 3 or path.parts[-2] not in DOMAINS:
        raise InputError(f"--out {out}: want DATA/<domain>/<split>; the domains are {', '.join(DOMAINS)}")
    if as_text(path.name) != path.name:
        raise InputError(f"--out {out}: want a name in UTF-8, in composed form (NFC)")
    click.get_current_context().with_resource(lock_folder(path, "--out"))
    return path


# parts of a path that name no data set: train, images, data-00000-of-00010, ...
GENERIC = re.compile(r"(?:(?:train|val|valid|validation|test|data|images?|of)(?:ing)?|[-_.\d*?{}\[\]])+", re.IGNORECASE)


def data_set_name(src: Path | str) -> str:
    """Name of the data set from --src: the last part of its path that is not GENERIC."""
    parts = str(src).split("/") if "://" in str(src) else Path(os.path.abspath(src)).parts[1:]
    for part in reversed(parts):
        name = re.sub(r"\.(zip|tar|rec|bin|parquet)$", "", part)
        if name and not GENERIC.fullmatch(name):
            return re.sub(r"[-_. ](train|val|test)(ing)?$", "", name)
    return "unnamed"


def prepare(read, only: str, src: Path | str, out: Path, part: str | None, size: int | None, fit: str | None,
            drop_duplicates: bool, max_images: int | None, data_set: str | None, **options) -> None:
    """Run a source function, select among its images and write the split."""
    out, name = split_folder(out), read.__name__.replace("_", "-")
    domain, train = out.parts[-2], (part or ("train" if out.name == "train" else "test")) == "train"
    folders.check_scope(name, only, domain, train, options)
    classes = options.pop("classes")
    if classes and options.get("real"):
        raise InputError("--real labels are ImageNet's own classes: leave out --classes")
    settings = {key: options.pop(key) for key in ("quality", "seed", "shard_size", "workers")}
    selection = {key: options.pop(key) for key in ("listed", "holdout", "min_images", "max_classes")}
    takes = inspect.signature(read).parameters
    given = options | {"seed": settings["seed"], "classes": classes}
    source = read(src, domain, train, **{key: value for key, value in given.items() if key in takes})
    if classes and "classes" not in takes:
        source = group_classes(source, classes, out)
    else:
        source = replace(source, records=Records(source.records, out))
    if options.get("names") and not classes:
        report_unknown("--names", options["names"], source.names, set(source.records.identities))
    if source.records:
        if read is folders.folder and not (classes or selection["listed"]):
            folders.check_classes(source.records, src)
        source = select(source, train, settings["seed"], **selection)
    if size is None:
        size = face_size(source.records) if domain.startswith("face") and source.records else 256
    settings["quality"] = choose_quality(settings["quality"], size)
    images = len(source.records) + sum(source.skipped.values())
    chosen = options | selection | {"max_images": max_images, "classes": classes,
                                    "drop_duplicates": drop_duplicates or None}
    index = write_split(out, source, source_name=name, size=size, fit=fit or FIT[domain], train=train,
                        options={key: str(value) for key, value in chosen.items() if value is not None},
                        drop_duplicates=drop_duplicates, max_images=max_images,
                        data_set=[data_set or data_set_name(src)], **settings)
    report(out, index, images)


def add_source(read, only: str = "splits"):
    """Turn a source function into a command with its name, its docstring as help and its click options.

    Args:
        read: (src, domain, train, **options of the source) -> Source; it may also take `seed` and `classes`.
        only: the splits that it is for: "splits" of any kind, "test splits of objects" or the like.
    """
    kind = str if inspect.signature(read).parameters["src"].annotation is str else FOLDER
    where = click.option("--src", type=kind, required=True,
                         help="Data set: a folder, zip or plain tar (SET.zip/inner: a folder inside).")

    def command(**options) -> None:
        prepare(read, only, **options)

    command.__click_params__ = list(getattr(read, "__click_params__", ()))
    cli.command(read.__name__.replace("_", "-"), help=read.__doc__)(apply_options([where, *SHARED], command))
    return read


for splits, *readers in (
    ("splits", folders.folder, faces.lfw, faces.tinyface, insightface.recordio),
    ("test splits", faces.pairs, faces.ijb, insightface.bin),
    ("splits", bodies.market, bodies.msmt17, bodies.prcc, bodies.ltcc, bodies.deepchange, bodies.persons),
    ("splits of objects", imagenet.imagenet),
    ("test splits of objects", imagenet.imagenet_v2, imagenet.imagenet_a, imagenet.imagenet_r,
     imagenet.imagenet_sketch, imagenet.objectnet, stimuli.stimuli),
    ("splits", parquet.parquet, webdataset.webdataset),
):
    for reader in readers:
        add_source(reader, splits)


@cli.command(help="Draw the demo corpus: synthetic faces, degraded faces, bodies and objects.")
@click.option("--out", type=FOLDER, default="data", help="Data root to write.")
@click.option("--scale", type=Number(0, min_open=True), default=1.0,
              help="Factor on the number of people and classes.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Random seed of all pictures.")
@WORKERS
@DEBUG
def demo(out: Path, scale: float, seed: int, workers: int) -> None:
    for name, (source, train) in demo_splits(seed, scale).items():
        path = split_folder(out / name)
        index = write_split(path, source, source_name="demo", size=SIZE, fit=FIT[path.parts[-2]], quality=92,
                            train=train, seed=seed, shard_size=512, workers=workers, options={"scale": scale})
        report(path, index, len(source.records))


@cli.command(help="Check all of a split: hashes, members, JPEGs, labels, protocol; exit code 2 if anything is wrong.")
@click.argument("directory", type=FOLDER)
@WORKERS
@DEBUG
def verify(directory: Path, workers: int) -> None:
    problems = verify_split(directory, workers)
    for problem in problems[:20]:
        print(problem)
    if problems:
        raise InputError(f"{directory}: {len(problems)} problems; prepare the split again")
    split = Split(directory)
    print(f"{directory}: no problems: {len(split):,} images of {len(split.classes):,} classes in "
          f"{len(split.index['shards'])} shards")
    for line in describe_missing(split):
        print(f"  {line}")


@cli.command(help="Draw a contact sheet: one row per class, with its first images.")
@click.argument("directory", type=FOLDER)
@click.option("--out", type=FOLDER, help="PNG to write (default: DIRECTORY/contact-sheet.png).")
@click.option("--rows", type=click.IntRange(1), default=8, help="Classes to show, evenly spaced in the list.")
@click.option("--columns", type=click.IntRange(1), default=8, help="Images per class.")
@DEBUG
def show(directory: Path, out: Path | None, rows: int, columns: int) -> None:
    split = Split(directory)
    if not len(split.classes):
        raise InputError(f"{directory}: no classes to show")
    side, text = min(split.size, 128), 14
    chosen = np.unique(np.linspace(0, len(split.classes) - 1, min(rows, len(split.classes)), dtype=int))
    sheet = Image.new("RGB", (columns * (side + 2), len(chosen) * (side + text + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, label in enumerate(chosen):
        top = r * (side + text + 4)
        draw.text((2, top), f"{split.names[label]}  ({split.counts[label]} images)", fill="black")
        for c, row in enumerate(np.flatnonzero(split.labels == label)[:columns]):
            try:
                tile = Image.fromarray(split.image(row).permute(1, 2, 0).numpy()).resize((side, side))
            except BadImage:
                tile = Image.new("RGB", (side, side), "red")
            sheet.paste(tile, (c * (side + 2), top + text))
    out = out or directory / "contact-sheet.png"
    with writing(out, ANOTHER, "--out", (OSError, ValueError)):
        sheet.save(out)
    print(f"{out}: {len(chosen)} of {len(split.classes):,} classes")


@cli.command(help="Statistics of a split: images per class, file sizes, JPEG quality, sharpness; writes stats.json "
                  "and stats.png.")
@click.argument("directory", type=FOLDER)
@click.option("--out", type=FOLDER, help="Folder to write to (default: DIRECTORY).")
@click.option("--sample", type=click.IntRange(1), default=2000, help="Images to decode for JPEG quality and sharpness.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Random seed of --sample.")
@DEBUG
def stats(directory: Path, out: Path | None, sample: int, seed: int) -> None:
    split, out = Split(directory), out or directory
    summary, values = split_stats(split, sample, seed)
    make_folder(out, "--out")
    write_json(out / "stats.json", summary, 1)
    title = f"{len(split):,} images of {len(split.classes):,} classes"
    draw_stats(out / "stats.png", f"{summary['split']}: {title}", values)
    print(f"{directory}: {title}, {split.size} x {split.size} pixels")
    for name, line in summary.items():
        if isinstance(line, dict) and "median" in line:
            print(f"  {name:20s} median {line['median']:,.6g}, quartiles {line['p25']:,.6g} to {line['p75']:,.6g}, "
                  f"{line['min']:,.6g} to {line['max']:,.6g}")
    print(f"  {out}/stats.json, stats.png")


@cli.command(help="Merge training splits of a domain into one label space: an index over their shards, no copy. People "
                  "become one class only if their sources prove the identity (`person`), never by name.")
@click.argument("splits", type=FOLDER, nargs=-1, required=True)
@click.option("--out", type=FOLDER, required=True, help="Split folder to write, beside the merged ones.")
@click.option("--same-names", is_flag=True, help="Objects: merge classes with equal names (such as wnids).")
@DEBUG
def merge(splits: tuple[Path, ...], out: Path, same_names: bool) -> None:
    parts = merge_splits(out, list(splits), same_names)
    split = Split(out)
    print(f"{out}: {len(split):,} images of {len(split.classes):,} classes in the shards of "
          + ", ".join(part.name for part in parts))
    if joined := sum(len(part.classes) for part in parts) - len(split.classes):
        print(f"  {joined:,} classes were merged into others: several splits have them")
    seen = Counter(name for part in parts for name in part.classes)
    if apart := {name for name, n in seen.items() if n > 1} - set(split.classes):
        print(f"  {len(apart):,} names occur in several splits and stay separate classes, <split>/<name>"
              + " (--same-names merges them)" * (split.domain == "object"))
    if split.copies:
        print(f"  {split.copies:,} images are copies of others")


@cli.command(name="degrade", help="Write degraded copies of a split as a new split with the same identities and "
                                  "protocol, draws recorded in each sample's JSON; or draw the severities.")
@click.option("--src", type=FOLDER, metavar="SPLIT", help="Split folder of sharp images.")
@click.option("--out", type=FOLDER, help="Split folder to write, DATA/face_lq/<split>.")
@click.option("--shift", "shifts", metavar="all|KIND[-SEVERITY],...", help="For a test split of objects: write "
              "one out-of-distribution split OUT-KIND-SEVERITY per kind of shift and severity 1 to 5 instead.")
@click.option("--severity", type=Number(0, 1), default=1.0, help="Largest severity, 0 (no degradation) to 1.")
@click.option("--min-severity", type=Number(0, 1), default=0.0,
              help="Smallest severity; each image's is drawn uniformly up to --severity.")
@click.option("--ladder", type=FOLDER, metavar="FILE.png",
              help="Draw severities 0 to 1 side by side, for images of --src or, without it, of the demo.")
@partial(apply_options, WRITING)
def degrade_command(src: Path | None, out: Path | None, shifts: str | None, severity: float, min_severity: float,
                    ladder: Path | None, quality: int | None, seed: int, shard_size: int, workers: int) -> None:
    if (out is None and ladder is None) or (out is not None and src is None):
        raise InputError("want --src SPLIT --out DATA/face_lq/<split>, or --ladder FILE.png, or both")
    if min_severity > severity:
        raise InputError(f"--min-severity {min_severity} is above --severity {severity}")
    split = Split(Path(os.path.abspath(src))) if src else None
    if ladder is not None:
        if split:
            rows = np.unique(np.linspace(0, len(split) - 1, 4, dtype=int)).tolist()
            faces = [split.image(row) for row in rows]
        else:
            drawn = [np.array(Image.open(io.BytesIO(draw_face(seed, person, 0)))) for person in range(4)]
            faces = [torch.from_numpy(face).permute(2, 0, 1) for face in drawn]
        with writing(ladder, ANOTHER, "--ladder", (OSError, ValueError)):
            draw_ladder(ladder, faces, seed)
        print(f"{ladder}: severities 0 to 1")
    if out is None:
        return
    if shifts and ((split.protocol or {}).get("name") != "classification" or out.absolute().parent.name != "object"):
        raise InputError("--shift makes test splits of objects: --src must be such a split and --out DATA/object/NAME")
    quality = choose_quality(quality, split.size)
    for ending, (change, how) in choose_changes(shifts, min_severity, severity).items():
        path = split_folder(out.with_name(out.name + ending))
        if split.folder == path:
            raise InputError(f"--out {out} is the same split as --src: choose another")
        options = {"src": f"{split.domain}/{split.name}", "src_plan": split.index["provenance"].get("plan")} | how
        index = write_split(path, degraded_split(split, change, seed), source_name="degrade", size=split.size,
                            fit=split.index.get("fit"), quality=quality, train=split.protocol is None, seed=seed,
                            shard_size=shard_size, workers=workers, options=options,
                            data_set=split.index["provenance"]["data_set"])
        report(path, index, len(split))


@cli.command(help="Write same/different trials for human raters: balanced pairs of test images and an offline page, "
                  "OUT/index.html, to rate them. `evaluate.py --humans` reads the file that it saves.")
@click.option("--src", type=FOLDER, multiple=True, required=True, metavar="ROOT|SPLIT",
              help="Data root (the first test split of each domain) or test split; may be given several times.")
@click.option("--out", type=FOLDER, default="trials", help="Folder to write.")
@click.option("--pairs", type=click.IntRange(2), default=48, help="Pairs per split, half of them of the same identity.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Random seed of the pairs and their order.")
@DEBUG
def trials(src: tuple[Path, ...], out: Path, pairs: int, seed: int) -> None:
    from tools.trials import find_test_splits, write_trials

    splits = find_test_splits(list(src))
    counts = write_trials(splits, out, pairs, seed)
    for name, count in counts.items():
        print(f"  {name}: {count} pairs" + f" (its images give no more than {count})" * (count < pairs // 2 * 2))
    print(f"{out}/index.html: {sum(counts.values())} trials, one file that works offline and keeps progress")
    if any(split.domain != "object" for split in splits):
        print("note: the page contains pictures of people, which are personal data: give it only to raters who may "
              "see them, do not publish it, and delete it afterwards")


@cli.command(help="Measure images per second of writing and reading, compared with decoding alone, decoding plus "
                  "encoding, and the webdataset library with the same decoder. Use an idle machine.")
@click.option("--size", "sizes", type=click.IntRange(16, 1024), multiple=True, default=(112, 224),
              help="Side of the images in pixels; may be given several times.")
@click.option("--images", type=click.IntRange(1), default=8192, help="Images to read.")
@click.option("--prepared", type=click.IntRange(1), default=4096, help="Images to write, of 1.5 times the size.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Turns of a writer; readers get four times as many.")
@click.option("--seconds", type=Number(0, min_open=True), default=0.5, help="Duration of a reader's turn.")
@WORKERS
@click.option("--scratch", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Folder for shards, on the disk to measure (default: the system's).")
@click.option("--json", "file", type=FOLDER, metavar="FILE", help="File for all measurements.")
@DEBUG
def bench(file: Path | None, **options) -> None:
    from tools.bench_data import run_bench  # imported late: no other command needs the reader

    if file is not None and not file.resolve().parent.is_dir():
        raise InputError(f"--json {file}: no folder {file.resolve().parent}")
    result = run_bench(**options)
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")


@cli.command(help="List the sources: expected layout, expected counts and options.")
@DEBUG
def sources() -> None:
    shared = {option.name for option in click.command()(apply_options(SHARED, lambda: None)).params} | {"src"}
    for name, command in sorted(cli.commands.items()):
        if any(option.name == "part" for option in command.params):  # only sources have it
            print(name)
            print(textwrap.fill(" ".join(command.help.split()), 118, initial_indent="    ", subsequent_indent="    "))
            if special := [option.opts[0] for option in command.params if option.name not in shared]:
                print("    options: " + ", ".join(special))


if __name__ == "__main__":
    run_command(cli)
