"""What a source says of its images: where the set begins below --src, file names, and lists in text, CSV and JSON.

A name in a list is looked up among the members of the source and is never made a path: what climbs out of the source or
is absolute is simply not there.
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
    """Where a data set begins below src: what comes before its names, and the landmark that tells.

    Data sets are unpacked with and without the folders they were packed in, so a landmark (a file or a folder) may lie
    at any depth; the first landmark that there is counts, at its highest place. InputError where there is none;
    `layout` says what should be.
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
    """The members of a source, by their names in the data set, which begins below `top`; `skipped`: see `members`."""

    def __init__(self, src: Path, top: str = "") -> None:
        self.skipped = Skipped()
        files = members(src, self.skipped)
        super().__init__((file.name[len(top):], file) for file in files if file.name.startswith(top))


def below(src: Path, layout: str, *landmarks: str) -> Files:
    """The files of the data set that a landmark tells; see `place_of`."""
    return Files(src, place_of(src, layout, *landmarks)[0])


def match_images(files: Iterable[tuple[str, Member]], pattern: re.Pattern, kind: str, skipped: Skipped,
                 folders: tuple[str, ...] = ("",)) -> Iterator[tuple[re.Match, Member]]:
    """The images in these folders whose whole name fits the pattern; others go to `skipped`."""
    for name, member in files:
        if not name.startswith(folders) or not is_image(member, skipped):
            continue
        if match := pattern.fullmatch(name):
            yield match, member
        else:
            skipped.add(member.name, f"name is not {kind}'s")


def images_of(files: Files, pattern: re.Pattern, kind: str, folders: tuple[str, ...] = ("",)
              ) -> tuple[list[tuple[re.Match, Member]], Skipped]:
    """As `match_images`, all at once, and what was left out."""
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
    """The lines of a list file that are not blank, each with where it stands, for messages."""
    for number, line in enumerate(read_text(src, files, name).splitlines(), 1):
        if line.strip():
            yield f"{src}/{name}, line {number}", line.strip()


def read_table(src: Path, files: dict[str, Member], name: str, columns: tuple[str, ...]
               ) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV with a header that has at least `columns`, each with where it stands."""
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
                raise InputError(f"{where}: want {len(header)} values, one a column")
            yield where, {column: value.strip() for column, value in row.items()}
    except csv.Error as error:
        raise InputError(f"{src}/{name}, line {reader.line_num}: not CSV ({error})") from error


def find(files: dict[str, Member], name: str, where: str) -> Member:
    """The member that a list names, in any spelling; where there is none, one that cannot be read: a miss.

    InputError where the name leads out of the source; `where` the list says it.
    """
    name = as_text(posixpath.normpath(name.replace("\\", "/")))
    if name.startswith(("/", "../")):
        raise InputError(f"{where}: names {name[:80]!r}, which is not in the source: do the list and the images belong "
                         "together?")
    return files.get(name) or Member(name, absent)


def check_found(listed: Iterable[tuple[Record, ...]], where: str) -> None:
    """InputError where more than half of what a list names (images, or pairs of them) lacks an image in the source."""
    count, missing = 0, []
    for count, records in enumerate(listed, 1):  # noqa: B007
        missing += [record.name for record in records if record.read is absent][:1]
    if 2 * len(missing) > count:
        raise InputError(f"{where}: of {len(missing):,} of {count:,} entries the images are not in the source, such as "
                         f"{missing[0][:80]!r}: do the list and the images belong together?")
