"""The images of a source before they are read: held compactly, and chosen by identity, by list and by content."""

import hashlib
import os
import pickle
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep import InputError, progress

if TYPE_CHECKING:
    from data_prep.shards import Record, Source


class Records(Sequence):
    """A sequence of records of any length, read once from an iterable; each is made anew whenever it is asked for.

    They lie pickled in a nameless file on the disk that the shards go to; 20 bytes of each stay in memory, and every
    identity once. Forty million Record objects would take tens of gigabytes.

    Attributes: identities (each once, in order of appearance), identity (int32 [N], place in `identities`, -1: none),
    role (int8 [N], -1: none).
    """

    def __init__(self, records: Iterable["Record"], folder: Path) -> None:
        """Take the records, in source order; the file lies on the disk of `folder`, or of its nearest parent."""
        there = next((place for place in (folder, *folder.parents) if place.is_dir()), None)
        # no name: nothing is left behind, however the process ends; it lives as long as this object
        self.file = tempfile.TemporaryFile(dir=there)  # noqa: SIM115
        start, identity, role, numbers = array("q", [0]), array("i"), array("b"), {None: -1}
        for record in progress(records, desc="list the source", unit="img"):
            start.append(start[-1] + self.file.write(pickle.dumps(record, pickle.HIGHEST_PROTOCOL)))
            identity.append(numbers.setdefault(record.identity, len(numbers) - 1))
            role.append(-1 if record.role is None else record.role)
        self.file.flush()
        ends = np.frombuffer(start, dtype=np.int64)
        self.start, self.length = ends[:-1], np.diff(ends).astype(np.int32)
        self.identity, self.role = np.frombuffer(identity, dtype=np.int32), np.frombuffer(role, dtype=np.int8)
        self.identities = list(numbers)[1:]

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, place: int) -> "Record":
        # our own file, which nobody else can reach: no pickle of a stranger is ever loaded here
        return pickle.loads(os.pread(self.file.fileno(), int(self.length[place]), int(self.start[place])))

    def take(self, keep: np.ndarray) -> "Records":
        """The records at these places (or where this mask is true), of the same file."""
        part = object.__new__(Records)
        part.file, part.identities = self.file, self.identities
        part.start, part.length, part.identity, part.role = (
            column[keep] for column in (self.start, self.length, self.identity, self.role)
        )
        return part

    def labels(self) -> tuple[list[str], np.ndarray]:
        """The identities that are left, sorted, and for every record its place among them, int32 [N], -1: none."""
        there = np.unique(self.identity[self.identity >= 0])
        classes = sorted(self.identities[i] for i in there)
        place = {name: i for i, name in enumerate(classes)}
        label = np.full(len(self.identities) + 1, -1, dtype=np.int32)  # the last entry serves identity -1
        label[there] = [place[self.identities[i]] for i in there]
        return classes, label[self.identity]


def restrict(source: "Source", keep: np.ndarray, reason: str) -> "Source":
    """The source without the records where `keep` is false, which count as skipped for this reason.

    Pairs keep their order: an end that is gone becomes -1, and the writer leaves such pairs out and counts them.
    """
    if keep.all():
        return source
    before = np.cumsum(keep) - keep  # records that are kept before each place
    pairs = source.pairs
    if len(pairs):
        pairs = np.array(pairs)
        ends = pairs[:, :2]
        pairs[:, :2] = np.where((ends >= 0) & keep[ends], before[ends], -1)
        pairs = pairs.tolist()
    blocks = np.unique(before[source.blocks]) if source.blocks else np.array([], dtype=int)
    return replace(source, records=source.records.take(keep), pairs=pairs,
                   blocks=blocks[blocks < keep.sum()].tolist(),
                   skipped=source.skipped + Counter({reason: int((~keep).sum())}))


def draw(seed: int, identity: str) -> float:
    """A number 0..1 that belongs to an identity, whatever else its set holds and however it was filtered."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{identity}".encode()).digest()[:8]) / 2**64


def read_list(path: Path) -> dict[str, int]:
    """The lines of a list that are not blank, each with its number."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--list {path}: cannot be read as text ({error})") from error
    listed = {line.strip(): number for number, line in enumerate(lines, 1) if line.strip()}
    if not listed:
        raise InputError(f"--list {path}: no names in it; want one identity or image name a line")
    return listed


def in_list(records: Records, path: Path) -> np.ndarray:
    """Which records a list names, by their own name or their identity, bool [N]."""
    listed = read_list(path)
    by_identity = np.array([name in listed for name in records.identities] + [False])
    by_name = np.zeros(len(records), dtype=bool)
    unknown = listed.keys() - set(records.identities)
    if unknown:
        found = set()
        for place, record in enumerate(records):
            if record.name in listed:
                by_name[place] = True
                found.add(record.name)
        unknown -= found
    if unknown:
        name = min(unknown, key=listed.__getitem__)
        raise InputError(f"--list {path}, line {listed[name]}: {name[:80]!r} is neither an identity nor an image of "
                         "the source: do the list and --src belong together?")
    return by_identity[records.identity] | by_name


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """For every record, how many of the same group come before it, int64 [N]."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return rank


def select(source: "Source", train: bool, seed: int, *, listed: Path | None = None, holdout: float | None = None,
           min_images: int | None = None, max_classes: int | None = None, max_images: int | None = None) -> "Source":
    """The part of a source that the sharing options ask for; they act in the order of the arguments.

    Records without an identity (distractors) pass all of them but the list.

    Args:
        source: its records are a `Records`.
        train: which side of `holdout` is wanted.
        seed: of `holdout` and `max_classes`.
        listed: file of identities or image names, one a line.
        holdout: share 0..1 of the identities that belong to the test split. Each identity's side is a function of its
            name and the seed alone, so that two commands never share one, whatever their other filters.
        min_images: identities with fewer are left out.
        max_classes: so many identities are kept; of a larger number these are among the kept ones.
        max_images: of an identity (in a test split: in each of its roles), the first ones in source order.

    Raises:
        InputError: nothing is left, or the list names what is not there.
    """
    def keep(chosen: np.ndarray, reason: str, option: str) -> None:
        nonlocal source
        left = chosen & (source.records.identity >= 0)
        if not left.any():
            raise InputError(f"{option}: none of the {len(source.records):,} images is left; ease it")
        source = restrict(source, chosen, reason)

    def of_identity(chosen: Iterator[bool]) -> np.ndarray:
        return np.array([*chosen, True])[source.records.identity]  # the last entry serves records without identity

    if listed is not None:
        keep(in_list(source.records, listed), "not in --list", f"--list {listed}")
    if holdout is not None:
        sides = ((draw(seed, name) >= holdout) == train for name in source.records.identities)
        keep(of_identity(sides), "identity on the other side of --holdout",
             f"--holdout {holdout} with --seed {seed}, {'train' if train else 'test'} part")
    if min_images is not None:
        identity = source.records.identity
        counts = np.bincount(identity[identity >= 0], minlength=len(source.records.identities))
        keep(of_identity(counts >= min_images), f"identity with fewer than {min_images} images",
             f"--min-images {min_images}")
    if max_classes is not None:
        records = source.records
        there = [records.identities[i] for i in np.unique(records.identity[records.identity >= 0])]
        kept = set(sorted(there, key=lambda name: (draw(seed, name), name))[:max_classes])
        keep(of_identity(name in kept for name in records.identities), "identity beyond --max-classes",
             f"--max-classes {max_classes}")
    if max_images is not None:
        records = source.records
        rank = rank_in_group(records.identity.astype(np.int64) * 8 + records.role)
        keep((rank < max_images) | (records.identity < 0), "image beyond --max-images", f"--max-images {max_images}")
    return source


def first_copies(hashes: np.ndarray, elsewhere: np.ndarray | None = None) -> np.ndarray:
    """Which images come first with their content and are not among those elsewhere; hash 0 (unread) always stays.

    Args:
        hashes: of the images in source order, uint64 [N].
        elsewhere: of images that must not appear here, uint64 [M].
    """
    first = np.zeros(len(hashes), dtype=bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    if elsewhere is not None:
        first &= ~np.isin(hashes, elsewhere)
    return first | (hashes == 0)
