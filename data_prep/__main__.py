"""Command line: `python -m data_prep SOURCE --src PATH --out DATA/<domain>/<split>`, `demo`, `verify`, `show`."""

import os
from functools import partial
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw

from data_prep import DOMAINS, InputError, bodies, faces, folders, insightface, objects, run_command
from data_prep.demo import SIZE, demo_splits
from data_prep.shards import FITS, BadImage, Source, Split, open_image, read_index, verify_split, write_split

CPUS = os.cpu_count() or 1
FOLDER = click.Path(path_type=Path)
FIT = {"object": "crop", "face_hq": "squash", "face_lq": "squash", "body": "pad"}


@click.group(context_settings={"show_default": True, "max_content_width": 120}, help=__doc__)
def cli() -> None:
    pass


def debug_option(command):
    """--debug, which `run_command` reads."""
    option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
    return option(command)


def source_options(command, src: click.ParamType | type = FOLDER):
    """The options that every source shares; `src`: the type of --src."""
    for option in reversed([
        click.option("--src", type=src, required=True,
                     help="Folder, zip or plain tar of the data set (SET.zip/inner: a folder inside)."),
        click.option("--out", type=click.Path(path_type=Path), required=True,
                     help="Split folder to write, DATA/<domain>/<split>; the domain is taken from it."),
        click.option("--part", type=click.Choice(["train", "test"]),
                     help="Training or test images (default: train where <split> is 'train')."),
        click.option("--size", type=click.IntRange(8, 4096),
                     help="Side of the images in pixels (default: 256; faces keep theirs, else 112)."),
        click.option("--fit", type=click.Choice(FITS),
                     help="How images become square (default: objects crop, faces squash, bodies pad)."),
        click.option("--quality", type=click.IntRange(1, 100), default=95, help="Of JPEGs that are written anew."),
        click.option("--seed", type=click.IntRange(0), default=0, help="Of the order of a training split."),
        click.option("--shard-size", type=click.IntRange(1), default=2048, help="Images a shard."),
        click.option("--workers", type=click.IntRange(1), default=CPUS, help="Processes."),
        debug_option,
    ]):
        command = option(command)
    return command


def own_size(source: Source) -> int:
    """The side that a sample of aligned faces shares, else 112 pixels."""
    sides = set()
    for i in np.linspace(0, len(source.records) - 1, min(len(source.records), 16), dtype=int):
        try:
            sides.update(open_image(source.records[i].read())[0].size)
        except (OSError, BadImage):
            continue
    return sides.pop() if len(sides) == 1 else 112


def report(folder: Path, index: dict, found: int) -> None:
    """The closing table of a preparation, with identities that another split of the same source holds too."""
    skipped = index["skipped"]
    print(f"{folder}: {found:,} images in, {index['samples']:,} of {len(index['classes']):,} classes written, "
          f"{sum(skipped.values()):,} skipped" + "".join(f"\n  {n:,}: {reason}" for reason, n in skipped.items()))
    if lost := (index["protocol"] or {}).get("pairs_lost"):
        print(f"  {lost:,} pairs left out: one of their images was skipped")
    for path in folder.parent.glob("*/index.json"):
        other = read_index(path.parent)
        if index["domain"] == "object" or other["provenance"]["source"] != index["provenance"]["source"]:
            continue  # object classes are meant to be the same, and equal names of two sources prove nothing
        shared = set(index["classes"]) & set(other["classes"])
        if shared and (other["protocol"] is None) != (index["protocol"] is None):
            print(f"  WARNING: train and test overlap, {len(shared):,} identities are in {path.parent.name} too: "
                  f"{min(shared)}")


def prepare(read, src: Path | str, out: Path, part: str | None, size: int | None, fit: str | None, **options) -> None:
    """Run one source function and write its split."""
    if len(out.resolve().parts) < 3 or out.resolve().parts[-2] not in DOMAINS:
        raise InputError(f"--out {out}: want DATA/<domain>/<split> with one of {', '.join(DOMAINS)}, "
                         f"e.g. data/{DOMAINS[1]}/train")
    out = out.resolve()
    domain, train = out.parts[-2], (part or ("train" if out.name == "train" else "test")) == "train"
    settings = {key: options.pop(key) for key in ("quality", "seed", "shard_size", "workers")}
    source = read(src, domain, train, **options)
    if size is None:
        size = own_size(source) if domain.startswith("face") and source.records else 256
    name = read.__name__.replace("_", "-")  # as on the command line
    index = write_split(out, source, source_name=name, size=size, fit=fit or FIT[domain], train=train,
                        options={key: str(value) for key, value in options.items() if value is not None}, **settings)
    report(out, index, len(source.records) + sum(source.skipped.values()))


def summary(source) -> str:
    """The help of a source: its docstring without the expected counts and the reference."""
    return source.__doc__.split("Expected:")[0].split("Source:")[0]


@cli.command(help="Class folders: src/<class or person>/**/image. " + folders.folder.__doc__.split("\n\n")[1])
@source_options
@click.option("--names", type=click.Path(path_type=Path), help="File of folder<TAB>name lines: names for prompts.")
@click.option("--reference", metavar="SPLIT",
              help="Objects: split whose images classify this one, by class means and neighbours (default: train).")
@click.option("--ood", is_flag=True, help="Objects: mark a test split as out of distribution, for its retention.")
def folder(**options) -> None:
    prepare(folders.folder, **options)


@cli.command(help=summary(faces.lfw))
@source_options
@click.option("--pairs", type=click.Path(path_type=Path), help="pairs.txt in the format of LFW.")
def lfw(**options) -> None:
    prepare(faces.lfw, **options)


@cli.command(help=summary(faces.pairs))
@source_options
@click.option("--pairs", type=click.Path(path_type=Path), required=True, metavar="FILE|FP|FF", help="List of pairs.")
def pairs(**options) -> None:
    prepare(faces.pairs, **options)


@cli.command(help=summary(faces.ijb))
@source_options
def ijb(**options) -> None:
    prepare(faces.ijb, **options)


@cli.command(help=summary(faces.tinyface))
@source_options
def tinyface(**options) -> None:
    prepare(faces.tinyface, **options)


@cli.command(help=summary(insightface.recordio))
@source_options
def recordio(**options) -> None:
    prepare(insightface.recordio, **options)


@cli.command("bin", help=summary(insightface.bin))
@source_options
def bin_(**options) -> None:
    prepare(insightface.bin, **options)


@cli.command(help=summary(bodies.market))
@source_options
def market(**options) -> None:
    prepare(bodies.market, **options)


@cli.command(help=bodies.msmt17.__doc__)
@source_options
@click.option("--with-val", is_flag=True, help="Add list_val.txt to the training images.")
def msmt17(**options) -> None:
    prepare(bodies.msmt17, **options)


@cli.command(help=bodies.prcc.__doc__)
@source_options
@click.option("--variant", type=click.Choice(["cross-clothes", "same-clothes"]), default="cross-clothes",
              help="Probes of a test split: camera C or camera B.")
def prcc(**options) -> None:
    prepare(bodies.prcc, **options)


@cli.command(help=bodies.ltcc.__doc__)
@source_options
def ltcc(**options) -> None:
    prepare(bodies.ltcc, **options)


@cli.command(help=bodies.deepchange.__doc__)
@source_options
def deepchange(**options) -> None:
    prepare(bodies.deepchange, **options)


@cli.command(help=bodies.persons.__doc__)
@source_options
@click.option("--table", metavar="NAME", default="persons.csv", help="Of the CSV, inside the source.")
def persons(**options) -> None:
    prepare(bodies.persons, **options)


def reference_option(command):
    """--reference of the test sets of objects."""
    option = click.option("--reference", metavar="SPLIT",
                          help="Split whose images classify a test split, by class means and neighbours "
                               "(default: train).")
    return option(command)


@cli.command(help=objects.imagenet.__doc__)
@source_options
@reference_option
def imagenet(**options) -> None:
    prepare(objects.imagenet, **options)


@cli.command(help=objects.imagenet_v2.__doc__)
@source_options
@reference_option
def imagenet_v2(**options) -> None:
    prepare(objects.imagenet_v2, **options)


@cli.command(help=objects.imagenet_a.__doc__)
@source_options
@reference_option
def imagenet_a(**options) -> None:
    prepare(objects.imagenet_a, **options)


@cli.command(help=objects.imagenet_r.__doc__)
@source_options
@reference_option
def imagenet_r(**options) -> None:
    prepare(objects.imagenet_r, **options)


@cli.command(help=objects.imagenet_sketch.__doc__)
@source_options
@reference_option
def imagenet_sketch(**options) -> None:
    prepare(objects.imagenet_sketch, **options)


@cli.command(help=objects.objectnet.__doc__)
@source_options
@reference_option
def objectnet(**options) -> None:
    prepare(objects.objectnet, **options)


def label_options(command):
    """The options of sources whose labels are fields."""
    for option in reversed([
        click.option("--wnids", is_flag=True, help="Labels are the numbers 0..999 of ImageNet's classes: write wnids."),
        click.option("--ood", is_flag=True, help="Objects: mark a test split as out of distribution."),
        reference_option,
    ]):
        command = option(command)
    return command


@cli.command(help=objects.parquet.__doc__)
@source_options
@click.option("--files", metavar="PATTERN", help="Of the files' names (default: *train*; for a test split *val*, else "
                                                 "*test*).")
@click.option("--image-column", metavar="NAME", default="image", help="Column of the images.")
@click.option("--label-column", metavar="NAME", default="label", help="Column of the labels.")
@label_options
def parquet(**options) -> None:
    prepare(objects.parquet, **options)


@cli.command(help=objects.webdataset.__doc__)
@partial(source_options, src=str)
@click.option("--label-key", metavar="NAME", default="label", help="Of the label in .json, where there is no .cls.")
@label_options
def webdataset(**options) -> None:
    prepare(objects.webdataset, **options)


@cli.command(help="Draw the demo corpus: faces, degraded faces, bodies and objects, all of our own making.")
@click.option("--out", type=click.Path(path_type=Path), default="data", help="Data root to write.")
@click.option("--scale", type=click.FloatRange(0, min_open=True), default=1.0,
              help="Factor on the number of people and classes.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of every picture.")
@click.option("--workers", type=click.IntRange(1), default=CPUS, help="Processes.")
@debug_option
def demo(out: Path, scale: float, seed: int, workers: int) -> None:
    for name, (source, train) in demo_splits(seed, scale).items():
        path = out.resolve() / name
        index = write_split(path, source, source_name="demo", size=SIZE, fit=FIT[path.parts[-2]], quality=92,
                            train=train, seed=seed, shard_size=512, workers=workers, options={"scale": scale})
        report(path, index, len(source.records))


@cli.command(help="Re-read everything of a split: hashes, members, JPEGs, labels, protocol; exit code 2 on a problem.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(1), default=CPUS, help="Processes.")
@debug_option
def verify(directory: Path, workers: int) -> None:
    problems = verify_split(directory, workers)
    for problem in problems[:20]:
        print(problem)
    if problems:
        raise InputError(f"{directory}: {len(problems)} problems; prepare the split again")
    split = Split(directory)
    print(f"{directory}: all good: {len(split):,} images of {len(split.classes):,} classes in "
          f"{len(split.index['shards'])} shards")


@cli.command(help="Write a contact sheet: one row a class, its first images.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="PNG to write (default: DIRECTORY/contact-sheet.png).")
@click.option("--rows", type=click.IntRange(1), default=8, help="Classes, spread evenly over all.")
@click.option("--columns", type=click.IntRange(1), default=8, help="Images of each.")
@debug_option
def show(directory: Path, out: Path | None, rows: int, columns: int) -> None:
    split = Split(directory)
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
    sheet.save(out)
    print(f"{out}: {len(chosen)} of {len(split.classes):,} classes")


if __name__ == "__main__":
    run_command(cli)
