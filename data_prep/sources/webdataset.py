"""Source of WebDataset tars: consecutive files with the same key are one sample."""

import glob
import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import click

from data_prep import InputError
from data_prep.format import Record, Skipped, Source, image_suffixes
from data_prep.records import reading
from data_prep.sources.archives import is_leftover, members, read_part, walk_tar
from data_prep.sources.folders import OOD, REFERENCE, labelled
from data_prep.sources.imagenet import imagenet_classes
from data_prep.sources.parquet import WNIDS, class_of

MOST_TARS = 100_000
LARGEST_FIELD = 2**20  # bytes
Place = tuple[int, int]  # offset and size of a file in a tar


def expand(pattern: str) -> list[str]:
    """Replace braces: a-{00..02}.tar is a-00.tar, a-01.tar, a-02.tar; {x,y}.tar is x.tar, y.tar."""
    brace = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not brace:
        return [pattern]
    first, last, words = brace.groups()
    expanded: list[str] = []
    for value in words.split(",") if words else (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)):
        expanded += expand(pattern[: brace.start()] + value + pattern[brace.end() :])
        if len(expanded) > MOST_TARS:
            raise InputError(f"--src {pattern[:80]}: more than {MOST_TARS:,} files")
    return expanded


def open_tar(url: str) -> BinaryIO:
    """A tar on disk or behind a URL, seekable."""
    import fsspec

    with reading(f"{url}: cannot be opened"):
        # fsspec would expand brackets and stars in a local path
        file = fsspec.open(url, "rb").open() if "://" in url else open(url, "rb")  # noqa: SIM115
        if not file.seekable():
            raise OSError("not seekable: download it first")
        return file


def list_tars(src: str, skipped: Skipped) -> list[str]:
    """The tars of --src: those in a folder, or a path or URL with braces, * and ?."""
    if "://" in src:
        tars = expand(src)
    elif Path(src).is_dir():
        tars = [file.path for file in members(Path(src), skipped) if file.name.endswith(".tar")]
    else:  # the part of a path that exists is no pattern, even with special characters
        top = next(path for path in (Path(src), *Path(src).parents) if path.exists())
        tars = [str(top / name) for pattern in expand(str(Path(src).relative_to(top)))
                for name in (sorted(glob.glob(pattern, root_dir=top)) if glob.has_magic(pattern) else [pattern])]
    if not tars:
        raise InputError(f"--src {src}: no tar found; give a folder, a tar, a URL or a pattern like 'a-{{00..46}}.tar'")
    return tars


@click.option("--label-key", metavar="NAME", default="label", help="Key of the label in .json, if there is no .cls.")
@WNIDS
@OOD
@REFERENCE
def webdataset(src: str, domain: str, train: bool, label_key: str, wnids: bool, reference: str | None,
               ood: bool) -> Source:
    """WebDataset tars: `<key>.jpg` (or .png, .webp, ...) with the label in `<key>.cls` or `<key>.json`.

    --src is a folder of tars, one tar, a pattern like `train-{000..146}.tar` or `train-*.tar`, or a URL for fsspec
    (read twice: once for the labels, then image by image). A label is a number (negative: none) or a word. Source: the
    format of the webdataset library.
    """
    skipped = Skipped()
    urls = list_tars(src, skipped)

    def records() -> Iterator[Record]:
        for url in urls:
            with open_tar(url) as file:
                for key, fields in tar_samples(walk_tar(file, url), skipped):
                    name, image = f"{url}: {key}", next((f for f in fields if f".{f}" in image_suffixes()), None)
                    identity = class_of(field_label(file, url, fields, label_key), wnids, name)
                    if image is None or identity is None:
                        skipped.add(name, "no label" if image else "sample without an image")
                    else:
                        yield Record(partial(read_part, url, *fields[image]), name, identity)

    return labelled(records(), domain, train, skipped, imagenet_classes() if wnids else {}, reference, ood)


def field_label(file: BinaryIO, where: str, fields: dict[str, Place], key: str) -> object:
    """The label of a sample, from its .cls or its .json; None if neither has a readable one."""
    for field in ("cls", "json"):
        if field not in fields or fields[field][1] > LARGEST_FIELD:
            continue
        with reading(f"{where}: cannot be read"):
            file.seek(fields[field][0])
            data = file.read(fields[field][1])
        try:
            text = data.decode().strip()
            if field == "cls":
                return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text
            return json.loads(text)[key]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    return None


def tar_samples(files: Iterable[tuple[str, Place]], skipped: Skipped) -> Iterator[tuple[str, dict[str, Place]]]:
    """Key and fields (extension -> offset, size) of every sample: consecutive files whose names agree up to a dot.

    In the format, that is the first dot, so that `7.seg.png` is a field of `7.jpg`. But keys may contain dots, as in
    `img.v1.7.jpg` and `img.v1.7.cls`, and a repeated field begins another sample of the same key.
    """
    parts = ((PurePosixPath(name), place) for name, place in files if not is_leftover(name, skipped))

    def has_image(repeats: list[dict]) -> bool:
        return any(f".{ending}" in image_suffixes() for fields in repeats for ending in fields)

    for (folder, _), group in groupby(parts, lambda part: (part[0].parent, part[0].name.partition(".")[0])):
        samples: dict[str, list[dict]] = {}  # by the name up to its last dot
        for path, place in group:
            repeats, ending = samples.setdefault(path.stem, [{}]), path.suffix[1:].lower()
            if ending in repeats[-1]:
                repeats.append({})
            repeats[-1][ending] = place
        for stem, repeats in samples.items():
            part_of = any(has_image(samples.get(stem[:n], [])) for n, sign in enumerate(stem) if sign == ".")
            for fields in repeats:
                if not part_of or (has_image([fields]) and {"cls", "json"} & fields.keys()):
                    yield str(folder / stem), fields
