"""The images of a source before they are read: stored compactly, and selected by identity, list and content."""

import csv
import hashlib
import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep import InputError, progress, writing
from data_prep.format import Record, Source, as_text

GO_ON = "finished shards are kept, and the same command continues"


@contextmanager
def continuing(parts: Path) -> Iterator[None]:
    """In the block a preparation may continue from files in `parts`; InputError if these are damaged."""
    continued = parts.exists()
    try:
        yield
    except (AttributeError, EOFError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        if not continued:
            raise
        raise InputError(f"{parts}: damaged ({type(error).__name__}: {error}): remove it, and the same command starts "
                         "anew") from error


class Records(Sequence):
    """A sequence of records of any length, filled once from an iterable; indexing unpickles a record.

    The pickles lie in a temporary file on the disk of the shards; memory holds 20 bytes per record and every identity
    once. Forty million Record objects would take tens of gigabytes.

    Attributes: identities (each once, in order of appearance), identity (int32 [N], place in `identities`, -1: none),
    role (int8 [N], -1: none).
    """

    def __init__(self, records: Iterable[Record], folder: Path) -> None:
        """Store the records, in source order, in a file on the disk of `folder` or of its nearest existing parent."""
        place = next((place for place in (folder, *folder.parents) if place.is_dir()), None)
        start, identity, role, numbers = array("q", [0]), array("i"), array("b"), {None: -1}
        with writing(folder, GO_ON, "--out"):
            # without a name, so that it vanishes with this object, however the process ends
            self.file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115
        for record in progress(records, desc="list the source", unit="img"):
            if record.identity is not None and (name := as_text(record.identity)) != record.identity:
                record = replace(record, identity=name)
            with writing(folder, GO_ON, "--out"):
                start.append(start[-1] + self.file.write(pickle.dumps(record, pickle.HIGHEST_PROTOCOL)))
            identity.append(numbers.setdefault(record.identity, len(numbers) - 1))
            role.append(-1 if record.role is None else record.role)
        with writing(folder, GO_ON, "--out"):
            self.file.flush()
        ends = np.frombuffer(start, dtype=np.int64)
        self.start, self.length = ends[:-1], np.diff(ends).astype(np.int32)
        self.identity, self.role = np.frombuffer(identity, dtype=np.int32), np.frombuffer(role, dtype=np.int8)
        self.identities, self.names = list(numbers)[1:], {}

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, place: int) -> Record:
        # safe to unpickle: only this process can write to the file
        record = pickle.loads(os.pread(self.file.fileno(), int(self.length[place]), int(self.start[place])))
        return replace(record, identity=self.names.get(record.identity)) if self.names else record

    def take(self, keep: np.ndarray) -> "Records":
        """The records at these places (or where this mask is true); shares the file."""
        part = object.__new__(Records)
        part.file, part.identities, part.names = self.file, self.identities, self.names
        part.start, part.length, part.identity, part.role = (
            column[keep] for column in (self.start, self.length, self.identity, self.role)
        )
        return part

    def rename(self, names: dict[str, str]) -> "Records":
        """The same records under other identities; `names` maps every identity that occurs."""
        part = self.take(slice(None))
        part.names = names
        part.identities = list(dict.fromkeys(names[name] for name in self.identities if name in names))
        place = {name: i for i, name in enumerate(part.identities)}
        number = [place.get(names.get(name), -1) for name in self.identities]
        part.identity = np.array([*number, -1], dtype=np.int32)[self.identity]
        return part

    def labels(self) -> tuple[list[str], np.ndarray]:
        """The identities that occur, sorted, and the place of each record's among them, int32 [N], -1: none."""
        present = np.unique(self.identity[self.identity >= 0])
        classes = sorted(self.identities[i] for i in present)
        place = {name: i for i, name in enumerate(classes)}
        label = np.full(len(self.identities) + 1, -1, dtype=np.int32)  # the last entry serves identity -1
        label[present] = [place[self.identities[i]] for i in present]
        return classes, label[self.identity]


def restrict(source: Source, keep: np.ndarray, reason: str | None, named: bool = False) -> Source:
    """The source without the records where `keep` is false.

    These are counted (with `named`, also named) as skipped for this reason, if there is one. Pairs keep their order; a
    removed end becomes -1, and the writer leaves such pairs out and counts them.
    """
    if keep.all():
        return source
    before = np.cumsum(keep) - keep  # number of kept records before each place
    pairs = source.pairs
    if len(pairs):
        pairs = np.array(pairs)
        ends = pairs[:, :2]
        pairs[:, :2] = np.where((ends >= 0) & keep[ends], before[ends], -1)
        pairs = pairs.tolist()
    blocks = np.unique(before[source.blocks]) if source.blocks else np.array([], dtype=int)
    if named:
        for place in np.flatnonzero(~keep):
            source.skipped.add(source.records[place].name, reason)
    elif reason:
        source.skipped[reason] += int((~keep).sum())
    return replace(source, records=source.records.take(keep), pairs=pairs, blocks=blocks[blocks < keep.sum()].tolist())


def random_order(n: int, blocks: list[int], seed: int) -> np.ndarray:
    """The places 0..n-1 in a seeded random order; if there are blocks, only the order of the blocks is random.

    Readers shuffle within a window of several shards, so the order inside a block does not matter.
    """
    if not blocks:
        return np.random.default_rng(seed).permutation(n)
    runs = np.split(np.arange(n), blocks[1:])
    return np.concatenate([runs[i] for i in np.random.default_rng(seed).permutation(len(runs))])


def draw(seed: int, identity: str) -> float:
    """A random number in 0..1 that depends on the seed and the identity alone, not on the other identities."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{identity}".encode(errors="surrogateescape")).digest()[:8]) / 2**64


def listed_lines(path: Path, option: str) -> list[tuple[int, str]]:
    """(number, line) of the non-blank lines of a list that an option names, UTF-8 with or without a byte order mark.

    Names are composed as those of a source are, see `as_text`.
    """
    try:
        lines = as_text(path.read_bytes().decode("utf-8-sig")).splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{option} {path}: cannot be read as text ({error})") from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def split_lines(lines: list[tuple[int, str]], where: str, mark: str | None) -> list[tuple[int, list[str]]]:
    """The stripped fields of every line, separated by `mark`: a comma (as in CSV), a tab, or None for white space."""
    try:
        rows = [(number, next(csv.reader([line], strict=True)) if mark == "," else line.split(mark))
                for number, line in lines]
    except csv.Error as error:
        raise InputError(f"{where}: cannot be read as CSV ({error})") from error
    return [(number, [field.strip() for field in row]) for number, row in rows]


def in_list(records: Records, path: Path) -> np.ndarray:
    """Which records a list names, by their identity or their name, bool [N]."""
    listed = {line.strip(): number for number, line in listed_lines(path, "--list")}
    if not listed:
        raise InputError(f"--list {path}: is empty; want one identity or image name per line")
    by_identity = np.array([*(name in listed for name in records.identities), False])
    by_name = np.zeros(len(records), dtype=bool)
    unknown = listed.keys() - set(records.identities)
    if unknown:
        for place, record in enumerate(records):
            if record.name in listed:
                by_name[place] = True
                unknown.discard(record.name)
    if unknown:
        name = min(unknown, key=listed.__getitem__)
        raise InputError(f"--list {path}, line {listed[name]}: {name[:80]!r} is neither an identity nor an image of "
                         "the source: do the list and --src belong together?")
    return by_identity[records.identity] | by_name


def report_unknown(option: str, path: Path, unknown: set[str]) -> None:
    """Print the folders in an option's list that the source lacks."""
    if unknown:
        print(f"  {option} {path}: {len(unknown):,} of its folders are not in the source: "
              + ", ".join(sorted(unknown)[:10]) + ", ..." * (len(unknown) > 10))


def read_classes(path: Path) -> dict[str, str]:
    """The class of each folder, from `folder,class` lines, CSV or with tabs."""
    lines = listed_lines(path, "--classes")
    rows = split_lines(lines, f"--classes {path}", "\t" if lines and "\t" in lines[0][1] else ",")
    classes: dict[str, str] = {}
    for number, row in rows:
        if len(row) != 2 or not all(row):
            raise InputError(f"--classes {path}, line {number}: want folder,class, found {','.join(row)[:60]!r}")
        if classes.setdefault(row[0], row[1]) != row[1]:
            raise InputError(f"--classes {path}, line {number}: {row[0][:60]!r} is {classes[row[0]][:60]!r} above")
    return classes


def group_classes(source: Source, path: Path) -> Source:
    """The source with the coarser classes of --classes; folders that the file does not name are left out."""
    classes = read_classes(path)
    known = set(source.records.identities)
    if (first := next(iter(classes), "")) not in known and list(classes.values()).count(classes.get(first)) == 1:
        classes.pop(first, None)  # a header
    if not known & set(classes):
        raise InputError(f"--classes {path}: names none of the {len(known):,} class folders of the source, such as "
                         f"{min(known, default='')[:60]!r}")
    report_unknown("--classes", path, set(classes) - known)
    keep = np.array([*(name in classes for name in source.records.identities), False])[source.records.identity]
    source = restrict(source, keep, "folder not in --classes")
    protocol = source.protocol and {key: value for key, value in source.protocol.items() if key != "groups"}
    return replace(source, records=source.records.rename(classes), names={}, protocol=protocol)


def rank_in_group(group: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """For every record, the number of earlier ones of its group, int64 [N]; `counted`: which ones count."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    number = np.arange(len(group)) if counted is None else np.cumsum(counted[order]) - counted[order]
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = number - number[np.searchsorted(ordered, ordered)]
    return rank


def select(source: Source, train: bool, seed: int, *, listed: Path | None = None, holdout: float | None = None,
           min_images: int | None = None, max_classes: int | None = None) -> Source:
    """The part of a source (with `Records`) that the options select; they act in the order of the arguments.

    Records without an identity (distractors) are only subject to the list. InputError if nothing is left.

    Args:
        train: the side of `holdout` to keep.
        seed: of `holdout` and `max_classes`.
        listed: file of identities or image names, one per line.
        holdout: share 0..1 of the identities that belong to test splits. An identity's side depends on its name and the
            seed alone, so that training and test splits share none, whatever their other filters.
        min_images: leave out identities with fewer images.
        max_classes: number of identities to keep; a larger number keeps the same ones and more.
    """

    def keep(chosen: np.ndarray, reason: str, option: str) -> None:
        nonlocal source
        left = chosen & (source.records.identity >= 0)
        if not left.any():
            raise InputError(f"{option}: none of the {len(source.records):,} images is left; relax it")
        source = restrict(source, chosen, reason)

    def of_identity(chosen: Iterator[bool]) -> np.ndarray:
        return np.array([*chosen, True])[source.records.identity]  # the last entry serves records without an identity

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
        kept = set(sorted(source.records.labels()[0], key=lambda name: (draw(seed, name), name))[:max_classes])
        keep(of_identity(name in kept for name in source.records.identities), "identity beyond --max-classes",
             f"--max-classes {max_classes}")
    return source


def first_copies(hashes: np.ndarray, elsewhere: np.ndarray | None = None) -> np.ndarray:
    """Which images are the first with their content and not among `elsewhere`, bool [N]; hash 0 is always kept.

    `hashes`: of the images in source order, uint64 [N]; `elsewhere`: of images that must not appear here, uint64 [M].
    """
    first = np.zeros(len(hashes), dtype=bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    if elsewhere is not None:
        first &= ~np.isin(hashes, elsewhere)
    return first | (hashes == 0)
