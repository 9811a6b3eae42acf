"""Helpers of sources: where a data set begins below --src, patterns of file names, and lists in text, CSV and JSON.

A name in a list is looked up among the members of the source and never becomes a path on disk.
"""

import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep import InputError
from data_prep.format import Record, Skipped, as_text
from data_prep.records import read_lines, read_text, reading
from data_prep.sources.archives import Member, absent, members
from data_prep.sources.folders import is_image


def place_of(src: Path, layout: str, *landmarks: str) -> tuple[str, str]:
    """Where a data set begins below src: the prefix of its names, and the landmark (file or folder) found there.

    Data sets are unpacked with or without their outer folders, so a landmark may lie at any depth. The first of the
    landmarks that occurs counts, where it is highest. InputError, with the expected `layout`, if none occurs.
    """
    for landmark in landmarks:
        starts = ((file.name, f"/{file.name}/".find(f"/{landmark}/")) for file in members(src))
        if places := {name[:start] for name, start in starts if start >= 0}:
            top, *others = sorted(places, key=lambda name: (name.count("/"), name))
            if others and others[0].count("/") == top.count("/"):
                raise InputError(f"--src {src}: {top}{landmark} and {others[0]}{landmark} are both in it: give the "
                                 "folder of one data set")
            return top, landmark
    raise InputError(f"--src {src}: no {landmarks[0]} in it; {layout}")


class Files(dict[str, Member]):
    """The members of a source by their names below the prefix `top`; InputError for a name that it lacks.

    Attributes: src; skipped, see `members`.
    """

    def __init__(self, src: Path, top: str = "") -> None:
        self.src, self.skipped = src, Skipped()
        files = members(src, self.skipped)
        super().__init__((file.name[len(top):], file) for file in files if file.name.startswith(top))

    def __missing__(self, name: str) -> Member:
        raise InputError(f"--src {self.src}: no {name} in it")

    def find(self, name: str, where: str) -> Member:
        """The member that a list names, in any Unicode form; if the source lacks it, one that cannot be read (a miss).

        InputError if the name leads out of the source; `where`: position in the list, for the message.
        """
        name = as_text(posixpath.normpath(name.replace("\\", "/")))
        if name.startswith(("/", "../")):
            raise InputError(f"{where}: names {name[:80]!r}, which is not in the source: is it the right list?")
        return self.get(name) or Member(name, absent)

    def images(self, pattern: re.Pattern, kind: str, folders: str | tuple[str, ...] = ""
               ) -> list[tuple[re.Match, Member]]:
        """`match_images` of all files."""
        return list(match_images(self.items(), pattern, kind, self.skipped, folders))

    def read_lines(self, name: str) -> Iterator[tuple[str, str]]:
        """The lines of a list in the source, see `records.read_lines`."""
        return read_lines(self[name].read, f"{self.src}/{name}")

    def read_json(self, name: str) -> dict[str, object]:
        """A JSON file that holds an object."""
        where = f"{self.src}/{name}"
        with reading(f"{where}: not JSON"):
            value = json.loads(read_text(self[name].read, where))
        if not isinstance(value, dict):
            raise InputError(f"{where}: want a JSON object, found {type(value).__name__}")
        return value


def below(src: Path, layout: str, *landmarks: str) -> Files:
    """The files of the data set that contains a landmark; see `place_of`."""
    return Files(src, place_of(src, layout, *landmarks)[0])


def match_images(files: Iterable[tuple[str, Member]], pattern: re.Pattern, kind: str, skipped: Skipped,
                 folders: str | tuple[str, ...] = "") -> Iterator[tuple[re.Match, Member]]:
    """The images in these folders whose full name matches the pattern; records others in `skipped`."""
    for name, member in files:
        if not name.startswith(folders) or not is_image(member, skipped):
            continue
        if match := pattern.fullmatch(name):
            yield match, member
        else:
            skipped.add(member.name, f"name is not {kind}'s")


def check_found(listed: Iterable[tuple[Record, ...]], where: str) -> None:
    """InputError if the source lacks images of more than half of a list's entries (images, or pairs of them)."""
    missing = [next((record.name for record in records if record.read is absent), None) for records in listed]
    names = list(filter(None, missing))
    if 2 * len(names) > len(missing):
        raise InputError(f"{where}: {len(names):,} of {len(missing):,} entries name images that the source lacks, such "
                         f"as {names[0][:80]!r}: do the list and the images belong together?")
