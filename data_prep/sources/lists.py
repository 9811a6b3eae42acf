"""Helpers of sources: where a data set begins below --src, patterns of file names, and lists in text, CSV and JSON.

A name in a list is looked up among the members of the source and never becomes a path on disk.
"""

import csv
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep import InputError
from data_prep.format import BadImage, Record, Skipped, as_text
from data_prep.sources.archives import Member, absent, members
from data_prep.sources.folders import is_image


def place_of(src: Path, layout: str, *landmarks: str) -> tuple[str, str]:
    """Where a data set begins below src: the prefix of its names, and the landmark (file or folder) found there.

    Data sets are unpacked with or without their outer folders, so a landmark may lie at any depth. The first of the
    landmarks that occurs counts, where it is highest. InputError, with the expected `layout`, if none occurs.
    """
    tops = {landmark: set() for landmark in landmarks}
    for file in members(src):
        for landmark, places in tops.items():
            if (start := f"/{file.name}/".find(f"/{landmark}/")) >= 0:
                places.add(file.name[:start])
    for landmark, places in tops.items():
        if places:
            return min(places, key=lambda name: (name.count("/"), name)), landmark
    raise InputError(f"--src {src}: no {landmarks[0]} in it; {layout}")


class Files(dict[str, Member]):
    """The members of a source by their names below the prefix `top`; `skipped`: see `members`."""

    def __init__(self, src: Path, top: str = "") -> None:
        self.skipped = Skipped()
        files = members(src, self.skipped)
        super().__init__((file.name[len(top):], file) for file in files if file.name.startswith(top))


def below(src: Path, layout: str, *landmarks: str) -> Files:
    """The files of the data set that contains a landmark; see `place_of`."""
    return Files(src, place_of(src, layout, *landmarks)[0])


def match_images(files: Iterable[tuple[str, Member]], pattern: re.Pattern, kind: str, skipped: Skipped,
                 folders: tuple[str, ...] = ("",)) -> Iterator[tuple[re.Match, Member]]:
    """The images in these folders whose full name matches the pattern; records others in `skipped`."""
    for name, member in files:
        if not name.startswith(folders) or not is_image(member, skipped):
            continue
        if match := pattern.fullmatch(name):
            yield match, member
        else:
            skipped.add(member.name, f"name is not {kind}'s")


def images_of(files: Files, pattern: re.Pattern, kind: str, folders: tuple[str, ...] = ("",)
              ) -> tuple[list[tuple[re.Match, Member]], Skipped]:
    """`match_images` as a list, and the skipped files."""
    return list(match_images(files.items(), pattern, kind, files.skipped, folders)), files.skipped


def read_text(src: Path, files: dict[str, Member], name: str) -> str:
    """A list file as text (UTF-8, with or without a byte order mark)."""
    if name not in files:
        raise InputError(f"--src {src}: no {name} in it")
    try:
        return files[name].read().decode("utf-8-sig")
    except (BadImage, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{src}/{name}: cannot be read as text ({error})") from error


def read_json(src: Path, files: dict[str, Member], name: str) -> dict[str, object]:
    """A JSON file that holds an object."""
    try:
        value = json.loads(read_text(src, files, name))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{src}/{name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{src}/{name}: want a JSON object, found {type(value).__name__}")
    return value


def read_lines(src: Path, files: dict[str, Member], name: str) -> Iterator[tuple[str, str]]:
    """The non-blank lines of a list file, each after its position for messages."""
    for number, line in enumerate(read_text(src, files, name).splitlines(), 1):
        if line.strip():
            yield f"{src}/{name}, line {number}", line.strip()


def read_table(src: Path, files: dict[str, Member], name: str, columns: tuple[str, ...]
               ) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV whose header has at least `columns`, each after its position for messages."""
    reader = csv.DictReader(read_text(src, files, name).splitlines(), strict=True)
    try:
        header = [column.strip() for column in reader.fieldnames or []]
        if missing := [column for column in columns if column not in header]:
            raise InputError(f"{src}/{name}, line 1: no column {missing[0]!r}; want {','.join(columns)}, "
                             f"found {','.join(header)[:60]!r}")
        reader.fieldnames = header
        for row in reader:
            where = f"{src}/{name}, line {reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{where}: want {len(header)} values, one per column")
            yield where, {column: value.strip() for column, value in row.items()}
    except csv.Error as error:
        raise InputError(f"{src}/{name}, line {reader.line_num}: not CSV ({error})") from error


def find(files: dict[str, Member], name: str, where: str) -> Member:
    """The member that a list names, in any Unicode form; if the source lacks it, one that cannot be read (a miss).

    InputError if the name leads out of the source; `where`: position in the list, for the message.
    """
    name = as_text(posixpath.normpath(name.replace("\\", "/")))
    if name.startswith(("/", "../")):
        raise InputError(f"{where}: names {name[:80]!r}, which is not in the source: do the list and the images belong "
                         "together?")
    return files.get(name) or Member(name, absent)


def check_found(listed: Iterable[tuple[Record, ...]], where: str) -> None:
    """InputError if the source lacks images of more than half of a list's entries (images, or pairs of them)."""
    count, missing = 0, []
    for count, records in enumerate(listed, 1):  # noqa: B007
        missing += [record.name for record in records if record.read is absent][:1]
    if 2 * len(missing) > count:
        raise InputError(f"{where}: {len(missing):,} of {count:,} entries name images that the source lacks, such as "
                         f"{missing[0][:80]!r}: do the list and the images belong together?")
