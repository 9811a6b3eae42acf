"""Command line: `python -m data_prep SOURCE --src PATH --out DATA/<domain>/<split>`; `sources` lists the sources.

Of finished splits: `verify`, `show`, `stats`, `merge`, `degrade`, `trials`. Besides: `demo`, `bench`.
"""

import csv
import inspect
import io
import json
import os
import re
import textwrap
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageDraw

from data_prep import DOMAINS, InputError, Number, lock_folder, run_command
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
SMALL = 64  # pixels: up to this side compression shows in embeddings, and files are small in any case
FIT = {"object": "crop", "face_hq": "squash", "face_lq": "squash", "body": "pad"}


@click.group(context_settings={"show_default": True, "max_content_width": 120}, help=__doc__)
def cli() -> None:
    pass


def apply_options(options: list, command):
    """The command with these options, in this order, before those that it has."""
    for option in reversed(options):
        command = option(command)
    return command


DEBUG = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
WORKERS = click.option("--workers", type=click.IntRange(1, 1024), default=os.cpu_count() or 1, help="Processes.")
WRITING = [
    click.option("--quality", type=click.IntRange(1, 100),
                 help=f"Of JPEGs that are written anew (default: 95; up to {SMALL} pixels 100, without chroma "
                      "subsampling)."),
    click.option("--seed", type=click.IntRange(0), default=0,
                 help="Of the order of a training split, and of every draw (--holdout, --max-classes, degradations)."),
    click.option("--shard-size", type=click.IntRange(1), default=2048, help="Images a shard."), WORKERS, DEBUG,
]
SHARED = [  # by every source
    click.option("--out", type=FOLDER, required=True,
                 help="Split folder to write, DATA/<domain>/<split>; the domain is taken from it."),
    click.option("--source-name", "data_set", metavar="NAME",
                 help="Of the data set, for results that tell data sets apart (default: --src's folder)."),
    click.option("--part", type=click.Choice(["train", "test"]),
                 help="Training or test images (default: train where <split> is 'train')."),
    click.option("--size", type=click.IntRange(8, MAX_SIZE),
                 help="Side of the images in pixels (default: 256; faces keep theirs, else 112)."),
    click.option("--fit", type=click.Choice(FITS),
                 help="How images become square (default: objects crop, faces squash, bodies pad)."),
    click.option("--list", "listed", type=FOLDER, metavar="FILE",
                 help="Take only these identities or image names, one a line."),
    click.option("--classes", type=FOLDER, metavar="FILE",
                 help="Objects: folder,class lines (CSV or tabs) that gather class folders in coarser classes; other "
                      "folders are left out."),
    click.option("--holdout", type=Number(0, 1, min_open=True, max_open=True), metavar="SHARE",
                 help="People: share of the identities that training splits leave to test splits. A function of "
                      "--seed and the identity: the same two options give splits that share none."),
    click.option("--min-images", type=click.IntRange(2), metavar="N", help="Leave out identities with fewer."),
    click.option("--max-classes", type=click.IntRange(1), metavar="N", help="Take so many identities, by --seed."),
    click.option("--max-images", type=click.IntRange(1), metavar="N",
                 help="Take so many readable images of an identity, the first (test: of its probes, its gallery)."),
    click.option("--drop-duplicates", is_flag=True,
                 help="Leave out copies of an image and, in a training split, images of the domain's test splits "
                      "(prepare those first). Reads every image twice."),
    *WRITING,
]


def choose_quality(quality: int | None, size: int) -> int:
    """--quality, or its default: at 24 pixels JPEG 95 moves an embedding to a cosine of .97, JPEG 100 to .998."""
    if quality is None and size <= SMALL:
        print(f"  {size} pixels: what is written anew becomes JPEG of quality 100, not 95 (--quality chooses)")
    return quality or (100 if size <= SMALL else 95)


def own_size(records: Records) -> int:
    """The side that a sample of aligned faces shares, else 112 pixels."""
    sides = set()
    for i in np.linspace(0, len(records) - 1, min(len(records), 16), dtype=int):
        try:
            sides.update(open_image(read_image(records[i])[0])[0].size)
        except (OSError, BadImage):
            continue
    return sides.pop() if len(sides) == 1 else 112


def describe_missing(split: Split) -> list[str]:
    """What a split lacks of its source: files that are not in it, listed images that became misses, empty classes."""
    lines, named = [], split.folder / "skipped.csv"
    if named.exists():
        with open(named, encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = [row for row in csv.reader(file)][1:]
        lines.append(f"{named} names {len(rows):,} files that could not be used, first {rows[0][0]}: {rows[0][1]}")
    if misses := int(split.missing.sum()):
        lines.append(f"{misses:,} listed images could not be read; each counts as a miss")
    if empty := split.index.get("unreadable_classes"):
        lines.append(f"{len(empty):,} classes have no readable image and are left out: {', '.join(empty[:10])}"
                     + ", ..." * (len(empty) > 10))
    return lines


def describe_mates(split: Split) -> list[str]:
    """Probes that the rule of re-identification cannot score, and a gallery that enrols nobody."""
    if (split.protocol or {}).get("name") not in ("reid", "identification"):
        return []
    roles, labels = split.optional("role"), np.array(split.labels)
    probes, gallery = np.flatnonzero(roles == ROLES.index("probe")), np.flatnonzero((roles > 0) & (labels >= 0))
    enrolled = np.isin(labels[probes], labels[gallery])
    lines = [] if enrolled.any() else ["WARNING: no probe has a mate in the gallery: there is nothing to score"]
    if split.protocol["name"] == "reid":
        camera = split.optional("camera") + 1
        width = int(camera.max(initial=0)) + 1
        seen = np.unique(labels[gallery] * width + camera[gallery])  # the cameras of each identity in the gallery
        cameras = np.bincount(seen // width, minlength=len(split.classes))
        own = ((cameras[labels[probes]] == 1) & np.isin(labels[probes] * width + camera[probes], seen)).sum()
        if own:
            lines.append(f"WARNING: every mate of {own:,} of {len(probes):,} probes is of the probe's own camera, "
                         "which re-identification does not count: these probes are not scored"
                         + "; there is nothing to score" * bool(own == enrolled.sum()))
    return lines


def report(folder: Path, index: dict, found: int) -> None:
    """The closing table of a preparation, with identities that another split of the same source holds too."""
    skipped = index["skipped"]
    print(f"{folder}: {found:,} images in, {index['samples']:,} of {len(index['classes']):,} classes written, "
          f"{sum(skipped.values()):,} skipped" + "".join(f"\n  {n:,}: {reason}" for reason, n in skipped.items()))
    if lost := (index["protocol"] or {}).get("pairs_lost"):
        print(f"  {lost:,} pairs left out: one of their images was skipped")
    split = Split(folder)
    if split.protocol is None and len(split.classes) == 1:
        print(f"  WARNING: one class, {split.classes[0]}, which cannot be trained on alone: --src should be the folder "
              "that holds the class folders")
    for line in describe_missing(split) + describe_mates(split):
        print(f"  {line}")
    if split.copies:
        read = split.column("hash") != 0
        label, labels = np.full(read.sum(), -1), split.labels[read]  # one of each image, and all
        image = np.unique(split.column("hash")[read], return_inverse=True)[1]
        label[image] = labels
        several = len(np.unique(image[label[image] != labels]))
        print(f"  {split.copies:,} images are copies of others in the split (--drop-duplicates)"
              + f"; {several:,} of the copied images have several labels" * (several > 0))
    others = {other.name: other for other in siblings(folder)}
    if reference := (split.protocol or {}).get("reference"):
        if reference not in {**others, split.name: split}:
            print(f"  WARNING: --reference {reference}: there is no {split.domain}/{reference} yet, whose images are "
                  "to classify this split: prepare it before evaluating, or prepare this one again with another")
        elif not ({*split.classes, *chain(*split.protocol.get("groups", {}).values())}
                  & set(others.get(reference, split).classes)):
            print(f"  WARNING: --reference {reference}: {split.domain}/{reference} has none of the classes, such as "
                  f"{split.classes[0]}")
    hashes = np.setdiff1d(split.column("hash"), 0)
    for other in others.values():
        if (other.protocol is None) == (split.protocol is None):
            continue
        # object classes are meant to be the same, and equal names of two sources prove nothing
        data_sets = [one.index["provenance"]["data_set"] for one in (split, other)]
        shared = set(split.classes) & set(other.classes)
        if shared and split.domain != "object" and set(data_sets[0]) & set(data_sets[1]):
            print(f"  WARNING: train and test overlap, {len(shared):,} identities are in {other.name} too: "
                  f"{min(shared)}")
        if other.hashed and (images := len(np.intersect1d(hashes, other.column("hash")))):
            train, test = (split.name, other.name) if split.protocol is None else (other.name, split.name)
            print(f"  WARNING: train and test overlap, {images:,} images are in {other.name} too: prepare {train} "
                  f"again, after {test}, with --drop-duplicates")


def split_folder(out: Path) -> Path:
    """--out as an absolute path, held until the command ends; InputError where it is no DATA/<domain>/<split>."""
    path = Path(os.path.abspath(out))  # as it was typed: a domain's folder may be a link to a larger disk
    if len(path.parts) < 3 or path.parts[-2] not in DOMAINS:
        raise InputError(f"--out {out}: want DATA/<domain>/<split> with one of {', '.join(DOMAINS)}, "
                         f"e.g. data/{DOMAINS[1]}/train")
    if as_text(path.name) != path.name:
        raise InputError(f"--out {out}: want a name in UTF-8 and in composed form (NFC)")
    click.get_current_context().with_resource(lock_folder(path, "--out"))
    return path


# parts of a path that name what all data sets have, with the numbers or patterns of their files
GENERIC = re.compile(r"(?:(?:train|val|valid|validation|test|data|images?|of)(?:ing)?|[-_.\d*?{}\[\]])+", re.IGNORECASE)


def data_set_name(src: Path | str) -> str:
    """The data set that --src is called after: its last part that tells one set from another."""
    parts = str(src).split("/") if "://" in str(src) else Path(os.path.abspath(src)).parts[1:]
    for part in reversed(parts):
        name = re.sub(r"\.(zip|tar|rec|bin|parquet)$", "", part)
        if name and not GENERIC.fullmatch(name):
            return re.sub(r"[-_. ](train|val|test)(ing)?$", "", name)
    return "unnamed"


def prepare(read, src: Path | str, out: Path, part: str | None, size: int | None, fit: str | None,
            drop_duplicates: bool, max_images: int | None, data_set: str | None, **options) -> None:
    """Run one source function, choose from its images and write its split."""
    out = split_folder(out)
    domain, train = out.parts[-2], (part or ("train" if out.name == "train" else "test")) == "train"
    settings = {key: options.pop(key) for key in ("quality", "seed", "shard_size", "workers")}
    classes, selection = options.pop("classes"), {key: options.pop(key) for key in SELECTION}
    if classes and (domain != "object" or options.get("real")):
        raise InputError("--classes gathers classes of objects: leave it out for people" if domain != "object" else
                         "--real labels are ImageNet's own classes: leave out --classes")
    if selection["holdout"] and domain == "object":
        raise InputError("--holdout keeps people of training and test splits apart; a test split of objects has the "
                         "classes of its training split: leave it out")
    takes = inspect.signature(read).parameters
    shared = {"seed": settings["seed"], "classes": classes}
    source = read(src, domain, train, **options, **{key: value for key, value in shared.items() if key in takes})
    source = replace(source, records=Records(source.records, out))
    if options.get("names"):
        report_unknown("--names", options["names"], set(source.names) - set(source.records.identities))
    if source.records:
        if read is folders.folder and not (classes or selection["listed"]):
            folders.check_classes(source.records, src)
        if classes and "classes" not in takes:
            source = group_classes(source, classes)
        source = select(source, train, settings["seed"], **selection)
    if size is None:
        size = own_size(source.records) if domain.startswith("face") and source.records else 256
    settings["quality"] = choose_quality(settings["quality"], size)
    images = len(source.records) + sum(source.skipped.values())
    chosen = options | selection | {"max_images": max_images, "classes": classes,
                                    "drop_duplicates": drop_duplicates or None}
    index = write_split(out, source, source_name=read.__name__.replace("_", "-"), size=size, fit=fit or FIT[domain],
                        train=train, options={key: str(value) for key, value in chosen.items() if value is not None},
                        drop_duplicates=drop_duplicates, max_images=max_images,
                        data_set=[data_set or data_set_name(src)], **settings)
    report(out, index, images)


SELECTION = ("listed", "holdout", "min_images", "max_classes")  # the arguments of `select`

def add_source(read, src: click.ParamType | type = FOLDER):
    """Make a source function a command: of its name, with its docstring as help and its own click options.

    Args:
        read: (src, domain, train, **own options) -> Source; it may take `seed` and `classes` of the shared options.
        src: the type of --src.
    """
    where = click.option("--src", type=src, required=True,
                         help="Folder, zip or plain tar of the data set (SET.zip/inner: a folder inside).")

    def command(**options) -> None:
        prepare(read, **options)

    command.__click_params__ = list(getattr(read, "__click_params__", ()))
    cli.command(read.__name__.replace("_", "-"), help=read.__doc__)(apply_options([where, *SHARED], command))
    return read


for source in (folders.folder, faces.lfw, faces.pairs, faces.ijb, faces.tinyface, insightface.recordio, insightface.bin,
               bodies.market, bodies.msmt17, bodies.prcc, bodies.ltcc, bodies.deepchange, bodies.persons,
               imagenet.imagenet, imagenet.imagenet_v2, imagenet.imagenet_a, imagenet.imagenet_r,
               imagenet.imagenet_sketch, imagenet.objectnet, parquet.parquet, stimuli.stimuli):
    add_source(source)
add_source(webdataset.webdataset, src=str)


@cli.command(help="Draw the demo corpus: faces, degraded faces, bodies and objects, all of our own making.")
@click.option("--out", type=click.Path(path_type=Path), default="data", help="Data root to write.")
@click.option("--scale", type=Number(0, min_open=True), default=1.0,
              help="Factor on the number of people and classes.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of every picture.")
@WORKERS
@DEBUG
def demo(out: Path, scale: float, seed: int, workers: int) -> None:
    for name, (source, train) in demo_splits(seed, scale).items():
        path = split_folder(out / name)
        index = write_split(path, source, source_name="demo", size=SIZE, fit=FIT[path.parts[-2]], quality=92,
                            train=train, seed=seed, shard_size=512, workers=workers, options={"scale": scale})
        report(path, index, len(source.records))


@cli.command(help="Re-read everything of a split: hashes, members, JPEGs, labels, protocol; exit code 2 on a problem.")
@click.argument("directory", type=click.Path(path_type=Path))
@WORKERS
@DEBUG
def verify(directory: Path, workers: int) -> None:
    problems = verify_split(directory, workers)
    for problem in problems[:20]:
        print(problem)
    if problems:
        raise InputError(f"{directory}: {len(problems)} problems; prepare the split again")
    split = Split(directory)
    print(f"{directory}: all good: {len(split):,} images of {len(split.classes):,} classes in "
          f"{len(split.index['shards'])} shards")
    for line in describe_missing(split):
        print(f"  {line}")


@cli.command(help="Write a contact sheet: one row a class, its first images.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="PNG to write (default: DIRECTORY/contact-sheet.png).")
@click.option("--rows", type=click.IntRange(1), default=8, help="Classes, spread evenly over all.")
@click.option("--columns", type=click.IntRange(1), default=8, help="Images of each.")
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
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {out}: cannot be written ({error})") from error
    print(f"{out}: {len(chosen)} of {len(split.classes):,} classes")


@cli.command(help="Count what a split holds: images per class, file sizes, JPEG quality, sharpness; stats.json and "
                  "stats.png in DIRECTORY.")
@click.argument("directory", type=FOLDER)
@click.option("--out", type=FOLDER, help="Folder to write to (default: DIRECTORY).")
@click.option("--sample", type=click.IntRange(1), default=2000, help="Images to decode for quality and sharpness.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of that sample.")
@DEBUG
def stats(directory: Path, out: Path | None, sample: int, seed: int) -> None:
    split, out = Split(directory), out or directory
    found, values = split_stats(split, sample, seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "stats.json").write_text(json.dumps(found, indent=1) + "\n")
        draw_stats(out / "stats.png", f"{found['split']}: {len(split):,} images of {len(split.classes):,} classes",
                   values)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error
    print(f"{directory}: {len(split):,} images of {len(split.classes):,} classes, {split.size} x {split.size} pixels")
    for name, line in found.items():
        if isinstance(line, dict) and "median" in line:
            print(f"  {name:20s} median {line['median']:,.6g}, quartiles {line['p25']:,.6g} to {line['p75']:,.6g}, "
                  f"{line['min']:,.6g} to {line['max']:,.6g}")
    print(f"  {out}/stats.json, stats.png")


@cli.command(help="Join training splits of a domain into one label space: an index over their shards, no copy. People "
                  "are joined only where their sources prove them the same (`person`), never by name.")
@click.argument("splits", type=FOLDER, nargs=-1, required=True)
@click.option("--out", type=FOLDER, required=True, help="Split folder to write, beside its parts.")
@click.option("--same-names", is_flag=True, help="Objects: classes of equal names (such as wnids) are one class.")
@DEBUG
def merge(splits: tuple[Path, ...], out: Path, same_names: bool) -> None:
    parts = merge_splits(out, list(splits), same_names)
    split = Split(out)
    print(f"{out}: {len(split):,} images of {len(split.classes):,} classes in the shards of "
          + ", ".join(part.name for part in parts))
    if joined := sum(len(part.classes) for part in parts) - len(split.classes):
        print(f"  {joined:,} classes are in several of them and became one")
    seen = Counter(name for part in parts for name in part.classes)
    if apart := {name for name, n in seen.items() if n > 1} - set(split.classes):
        print(f"  {len(apart):,} names are in several of them and stay apart, as <split>/<name>"
              + " (--same-names joins them)" * (split.domain == "object"))
    if split.copies:
        print(f"  {split.copies:,} images are copies of others")


@cli.command(name="degrade", help="Write degraded copies of a split's images as a split of their own, identities and "
                                  "protocol kept, each draw in the sample's JSON; and a picture of the severities.")
@click.option("--src", type=FOLDER, metavar="SPLIT", help="Split folder of sharp images.")
@click.option("--out", type=FOLDER, help="Split folder to write, DATA/face_lq/<split>.")
@click.option("--shift", "shifts", metavar="all|KIND[-SEVERITY],...", help="Instead, of a test split of objects: "
              "shifts of one kind each, at severities 1 to 5, as out-of-distribution splits OUT-KIND-SEVERITY.")
@click.option("--severity", type=Number(0, 1), default=1.0, help="Largest severity, 0 (none) to 1.")
@click.option("--min-severity", type=Number(0, 1), default=0.0,
              help="Least severity; each image's is drawn evenly between the two.")
@click.option("--ladder", type=FOLDER, metavar="FILE.png",
              help="Draw severities 0 to 1 side by side, for images of --src, or, without it, for faces of the demo.")
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
        try:
            draw_ladder(ladder, faces, seed)
        except (OSError, ValueError) as error:
            raise InputError(f"--ladder {ladder}: cannot be written ({error})") from error
        print(f"{ladder}: severities 0 to 1")
    if out is None:
        return
    if shifts and ((split.protocol or {}).get("name") != "classification" or out.absolute().parent.name != "object"):
        raise InputError("--shift makes test splits of objects: want such a --src, and --out DATA/object/NAME")
    quality = choose_quality(quality, split.size)
    for ending, (change, how) in choose_changes(shifts, min_severity, severity).items():
        path = split_folder(out.with_name(out.name + ending))
        if split.folder == path:
            raise InputError(f"--out {out} is --src itself: the sharp images stay where they are")
        options = {"src": f"{split.domain}/{split.name}", "src_plan": split.index["provenance"].get("plan")} | how
        index = write_split(path, degraded_split(split, change, seed), source_name="degrade", size=split.size,
                            fit=split.index.get("fit"), quality=quality, train=split.protocol is None, seed=seed,
                            shard_size=shard_size, workers=workers, options=options,
                            data_set=split.index["provenance"]["data_set"])
        report(path, index, len(split))


@cli.command(help="Write same/different trials for people: balanced pairs of test images and an offline page to rate "
                  "them on, OUT/index.html. `evaluate.py --humans` reads what it saves.")
@click.option("--src", type=FOLDER, multiple=True, required=True, metavar="ROOT|SPLIT",
              help="A data root (the first test split of each domain), or a test split; may be given again.")
@click.option("--out", type=FOLDER, default="trials", help="Folder to write.")
@click.option("--pairs", type=click.IntRange(2), default=48, help="Pairs a split, half of them of one identity.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the draw and of the order in trials.csv.")
@DEBUG
def trials(src: tuple[Path, ...], out: Path, pairs: int, seed: int) -> None:
    from tools.trials import find_test_splits, write_trials

    splits = find_test_splits(list(src))
    counts = write_trials(splits, out, pairs, seed)
    for name, found in counts.items():
        print(f"  {name}: {found} pairs" + f" (its images give no more than {found})" * (found < pairs // 2 * 2))
    print(f"{out}/index.html: {sum(counts.values())} trials, one file that needs no network; it keeps its progress")
    if any(split.domain != "object" for split in splits):
        print("note: the page contains pictures of people, which are personal data: give it to raters who may see "
              "them, publish it nowhere, and delete it afterwards")


@cli.command(help="Measure images a second, writing and reading, beside decoding alone, decoding and encoding alone, "
                  "and the webdataset library with the same decoder. Use a quiet machine.")
@click.option("--size", "sizes", type=click.IntRange(16, 1024), multiple=True, default=(112, 224),
              help="Side of the images in pixels; may be given again.")
@click.option("--images", type=click.IntRange(1), default=8192, help="Images to read.")
@click.option("--prepared", type=click.IntRange(1), default=4096, help="Images to prepare, of 1.5 times the size.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="Of writers' turns; four times for readers.")
@click.option("--seconds", type=Number(0, min_open=True), default=0.5, help="Of a reader's turn.")
@WORKERS
@click.option("--scratch", type=FOLDER, help="Folder for the shards, on the disk that matters (default: the system's).")
@click.option("--json", "file", type=FOLDER, metavar="FILE", help="Write every measurement.")
@DEBUG
def bench(file: Path | None, scratch: Path | None, **options) -> None:
    from tools.bench_data import run_bench  # here, because it imports the reader, which no other command needs

    if scratch is not None and not scratch.is_dir():
        raise InputError(f"--scratch {scratch}: no such folder")
    if file is not None and not file.resolve().parent.is_dir():
        raise InputError(f"--json {file}: no folder {file.resolve().parent}")
    result = run_bench(scratch=scratch, **options)
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")


@cli.command(help="List every source: the layout that it expects and the counts that it should find.")
@DEBUG
def sources() -> None:
    shared = {option.name for option in click.command()(apply_options(SHARED, lambda: None)).params} | {"src"}
    for name, command in sorted(cli.commands.items()):
        if any(option.name == "part" for option in command.params):  # which sources alone have
            print(name)
            for line in textwrap.wrap(" ".join(command.help.split()), 114):
                print(f"    {line}")
            if own := [option.opts[0] for option in command.params if option.name not in shared]:
                print("    options: " + ", ".join(own))


if __name__ == "__main__":
    run_command(cli)
