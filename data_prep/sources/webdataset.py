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
from data_prep.sources.archives import is_leftover, members, one_line, read_part, walk_tar
from data_prep.sources.folders import OOD, REFERENCE, labelled
from data_prep.sources.imagenet import imagenet_classes
from data_prep.sources.parquet import WNIDS, class_of

MOST_TARS = 100_000
LARGEST_FIELD = 2**20  # bytes


def expand(pattern: str) -> list[str]:
    """Replace braces: a-{00..02}.tar is a-00.tar, a-01.tar, a-02.tar; {x,y}.tar is x.tar, y.tar."""
    brace = re.search(r"\{(\d{1,9})\.\.(\d{1,9})\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not brace:
        return [pattern]
    if brace[3] is not None:
        values = iter(brace[3].split(","))
    elif int(brace[1]) <= int(brace[2]):
        values = (f"{i:0{len(brace[1])}d}" for i in range(int(brace[1]), int(brace[2]) + 1))
    else:
        raise InputError(f"--src {pattern[:80]}: {brace[0]} counts backwards")
    expanded: list[str] = []
    for value in values:
        expanded += expand(pattern[: brace.start()] + value + pattern[brace.end() :])
        if len(expanded) > MOST_TARS:
            raise InputError(f"--src {pattern[:80]}: more than {MOST_TARS:,} files")
    return expanded


def open_tar(url: str) -> BinaryIO:
    """A tar on disk or behind a URL, seekable."""
    import fsspec

    try:
        # fsspec would expand brackets and stars in a local path
        file = fsspec.open(url, "rb").open() if "://" in url else open(url, "rb")  # noqa: SIM115
        if not file.seekable():
            raise OSError("not seekable: download it first")
        return file
    except Exception as error:  # every file system behind fsspec raises its own
        raise InputError(f"{url}: cannot be opened ({one_line(error)})") from error


def read_at(file: BinaryIO, where: str, offset: int, size: int) -> bytes:
    """A part of an open file; fewer bytes at its end."""
    try:
        file.seek(offset)
        return file.read(size)
    except Exception as error:  # as above
        raise InputError(f"{where}: cannot be read ({one_line(error)})") from error


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
        raise InputError(f"--src {src}: no tar found; give a folder, a tar, a pattern like 'a-{{000..146}}.tar' or "
                         "a URL")
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
    skipped, endings = Skipped(), image_suffixes()
    urls = list_tars(src, skipped)

    def records() -> Iterator[Record]:
        for url in urls:
            with open_tar(url) as file:
                for key, fields in tar_samples(walk_tar(file, url), endings, skipped):
                    image = next((field for field in fields if f".{field}" in endings), None)
                    if image is None:
                        skipped.add(f"{url}: {key}", "sample without an image")
                        continue
                    label = field_label(file, url, fields, label_key)
                    if (identity := class_of(label, wnids, f"{url}: {key}")) is None:
                        skipped.add(f"{url}: {key}", "no label")
                    else:
                        yield Record(partial(read_part, url, *fields[image]), f"{url}: {key}", identity)

    names = imagenet_classes() if wnids else {}
    return labelled(records(), domain, train, skipped, names, reference, ood)


def field_label(file: BinaryIO, where: str, fields: dict[str, tuple[int, int]], key: str) -> object:
    """The label of a sample, from its .cls or its .json; None if neither has a readable one."""
    for field in ("cls", "json"):
        if field not in fields or fields[field][1] > LARGEST_FIELD:
            continue
        data = read_at(file, where, *fields[field])
        try:
            text = data.decode().strip()
            if field == "cls":
                return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text
            return json.loads(text)[key]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    return None


def tar_samples(files: Iterable[tuple[str, tuple[int, int]]], endings: frozenset[str], skipped: Skipped
                ) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Key and fields (extension -> offset, size) of every sample: consecutive files whose names agree up to a dot.

    In the format, that is the first dot, so that `7.seg.png` is a field of `7.jpg`. But keys may contain dots, as in
    `img.v1.7.jpg` and `img.v1.7.cls`, and a repeated field begins another sample of the same key.
    """
    parts = ((PurePosixPath(name), place) for name, place in files if not is_leftover(name, skipped))

    def has_image(repeats: list[dict]) -> bool:
        return any(f".{ending}" in endings for fields in repeats for ending in fields)

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
