"""What a source is made of: the files below a folder, by their relative names."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_prep import InputError


@dataclass(frozen=True)
class Member:
    """One file of a source."""

    name: str  # relative to the source, with /
    read: Callable[[], bytes]  # its bytes; picklable: it runs in a worker process


def members(src: Path) -> list[Member]:
    """Every file below src, sorted by name."""
    if not src.is_dir():
        raise InputError(f"--src {src}: no such folder")
    files = ((p.relative_to(src).as_posix(), p) for p in src.rglob("*") if p.is_file())
    return [Member(name, partial(Path.read_bytes, path)) for name, path in sorted(files)]
