"""The images of a source before they are read: stored compactly, and selected by identity, list and content."""

import csv
import hashlib
import os
import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep import InputError, progress, writing
from data_prep.format import Record, Source, as_text

GO_ON = "finished shards are kept, and the same command continues"


@contextmanager
def reading(what: str, then: str = "") -> Iterator[None]:
    """Turn whatever damaged input makes a library raise in the block into an InputError: `what` (the error) `then`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} ({one_line(error)}){then}") from error


def one_line(error: Exception) -> str:
    """A library's error message in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


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
        self.identities = list(numbers)[1:]

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, place: int) -> Record:
        # safe to unpickle: only this process can write to the file
        return pickle.loads(os.pread(self.file.fileno(), int(self.length[place]), int(self.start[place])))

    def take(self, keep: np.ndarray) -> "Records":
        """The records at these places (or where this mask is true); shares the file."""
        part = copy(self)
        part.start, part.length, part.identity, part.role = (
            column[keep] for column in (self.start, self.length, self.identity, self.role))
        return part

    def labels(self) -> tuple[list[str], np.ndarray]:
        """The identities that occur, sorted, and the place of each record's among them, int32 [N], -1: none."""
        present = np.unique(self.identity[self.identity >= 0])
        by_name = np.array(sorted(present, key=self.identities.__getitem__), dtype=int)
        label = np.full(len(self.identities) + 1, -1, dtype=np.int32)  # the last entry serves identity -1
        label[by_name] = np.arange(len(by_name))
        return [self.identities[i] for i in by_name], label[self.identity]


def restrict(source: Source, keep: np.ndarray, reason: str | None, named: bool = False) -> Source:
    """The source without the records where `keep` is false.

    These are counted (with `named`, also named) as skipped for this reason, if there is one. Pairs keep their order; a
    removed end becomes -1, and the writer leaves such pairs out and counts them.
    """
    if keep.all():
        return source
    before = np.cumsum(keep) - keep  # number of kept records before each place
    pairs = np.array(source.pairs, dtype=np.int64).reshape(-1, 4)
    ends = pairs[:, :2]
    pairs[:, :2] = np.where((ends >= 0) & keep[ends], before[ends], -1)
    blocks = np.unique(before[np.array(source.blocks, dtype=np.int64)])
    if named:
        for place in np.flatnonzero(~keep):
            source.skipped.add(source.records[place].name, reason)
    elif reason:
        source.skipped[reason] += int((~keep).sum())
    return replace(source, records=source.records.take(keep), pairs=pairs.tolist(),
                   blocks=blocks[blocks < keep.sum()].tolist())


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


def read_text(read: Callable[[], bytes], where: str) -> str:
    """A list as text, UTF-8 with or without a byte order mark; its names are composed as those of a source."""
    with reading(f"{where}: cannot be read as text"):
        return as_text(read().decode("utf-8-sig"))


def read_lines(read: Callable[[], bytes], where: str) -> Iterator[tuple[str, str]]:
    """The non-blank lines of a list, each after its position for messages."""
    for number, line in enumerate(read_text(read, where).splitlines(), 1):
        if line.strip():
            yield f"{where}, line {number}", line.strip()


def read_rows(path: Path, option: str) -> list[tuple[str, list[str]]]:
    """The fields of each line of the list that an option names, after its position for messages.

    They are separated by tabs, by commas (as in CSV) or by white space: the first of these in lines 1 and 2.
    """
    lines, rows = list(read_lines(path.read_bytes, f"{option} {path}")), []
    first = "".join(line for _, line in lines[:2])
    mark = next((mark for mark in "\t," if mark in first), None)
    for where, line in lines:
        with reading(f"{where}: cannot be read as CSV"):
            fields = next(csv.reader([line], strict=True)) if mark == "," else line.split(mark)
        rows.append((where, [field.strip() for field in fields]))
    return rows


def read_table(read: Callable[[], bytes], where: str, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV whose header has at least `columns`, each after its position for messages."""
    reader = csv.DictReader(read_text(read, where).splitlines(), strict=True)
    try:
        header = reader.fieldnames = [column.strip() for column in reader.fieldnames or []]
        if missing := [column for column in columns if column not in header]:
            raise InputError(f"{where}, line 1: no column {missing[0]!r}; want {','.join(columns)}, "
                             f"found {','.join(header)[:60]!r}")
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{where}, line {reader.line_num}: want {len(header)} values, one per column")
            yield f"{where}, line {reader.line_num}", {column: value.strip() for column, value in row.items()}
    except csv.Error as error:
        raise InputError(f"{where}, line {reader.line_num}: not CSV ({error})") from error


def read_map(path: Path, option: str) -> dict[str, str]:
    """The class (--classes) or readable name (--names) of each folder."""
    values: dict[str, str] = {}
    for where, row in read_rows(path, option):
        if len(row) != 2 or not all(row):
            raise InputError(f"{where}: want folder,class (--names: folder<TAB>name), found {' '.join(row)[:60]!r}")
        if values.setdefault(*row) != row[1]:
            raise InputError(f"{where}: {row[0][:60]!r} is {values[row[0]][:60]!r} above")
    return values


def in_list(records: Records, path: Path) -> np.ndarray:
    """Which records a list names, by their identity or their name, bool [N]."""
    listed = {line: where for where, line in read_lines(path.read_bytes, f"--list {path}")}
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
    if name := next((name for name in listed if name in unknown), None):
        raise InputError(f"{listed[name]}: {name[:80]!r} is neither an identity nor an image of the source")
    return by_identity[records.identity] | by_name


def report_unknown(option: str, path: Path, named: Iterable[str], known: set[str]) -> None:
    """Print the folders in an option's list that are not among those of the source; InputError if none of them is."""
    unknown = set(named) - known
    if known and unknown == set(named):
        raise InputError(f"{option} {path}: names none of the {len(known):,} class folders of the source, such as "
                         f"{min(known)[:60]!r}")
    if unknown:
        print(f"  {option} {path}: {len(unknown):,} of its folders are not in the source: "
              + ", ".join(sorted(unknown)[:10]) + ", ..." * (len(unknown) > 10))


def group_classes(source: Source, path: Path, folder: Path) -> Source:
    """The source with the coarser classes of --classes, its `Records` stored on the disk of `folder`.

    Folders that the file does not name are left out.
    """
    classes, known = read_map(path, "--classes"), set()

    def grouped(records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            known.add(name := as_text(record.identity))
            yield replace(record, identity=classes.get(name))

    protocol = source.protocol and {key: value for key, value in source.protocol.items() if key != "groups"}
    source = replace(source, records=Records(grouped(source.records), folder), names={}, protocol=protocol)
    report_unknown("--classes", path, classes, known)
    return restrict(source, source.records.identity >= 0, "folder not in --classes")


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
    """The part of a source (with `Records`) that the options of these names select, one after the other.

    Records without an identity (distractors) are only subject to the list. InputError if nothing is left. An identity's
    side of `holdout` and its rank for `max_classes` depend on its name and the seed alone, so that training and test
    splits share none, whatever their other filters, and a larger `max_classes` keeps the same ones and more.
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
