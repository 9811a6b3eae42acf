"""The shard format "imic-shards/1": writing, reading and checking a split folder DATA/<domain>/<split>.

    shard-000000.tar, ...   plain tar: <key>.jpg and <key>.json side by side, readable by any WebDataset reader
    index.json              what the split is: sizes, classes, shard table with hashes, protocol, provenance
    index/*.npy             columns, one row a sample: where its JPEG lies, its label, camera, role, ..., and `hash`,
                            the first 8 bytes of the SHA-256 of the image file that it was made from; and the lists of
                            a protocol (TABLES), one row a pair or template
"""

import csv
import json
import os
import re
import resource
import tarfile
import tempfile
import unicodedata
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path

import numpy as np

from data_prep import DOMAINS, InputError

FORMAT = "imic-shards/1"
VERSION = "0.2"  # of data_prep, recorded with every split
ROLES = ("probe", "gallery", "distractor")  # numbered in the column `role`; a re-identification query is a probe
# columns that only some sources have: integers, but for the quality that a detector gave to a face; -1: none
OPTIONAL = ("camera", "clothes", "role", "template", "media", "quality")
TABLES = {
    "pairs": "left row, right row, same, fold",  # verification
    "template_pairs": "template, template, same",  # templates, 1:1
    "template_gallery": "template, gallery (from 0)",  # templates, 1:N: each gallery is searched for itself
    "template_probes": "template",
}
FITS = ("crop", "squash", "pad")
# raster formats alone: Pillow would hand PostScript to an interpreter, whatever a file is called
READABLE = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_SIZE = 4096  # pixels
OPEN_SHARDS = 256  # files that the splits of a process keep open at once; at most a quarter of its limit


class Skipped(Counter):
    """Files that are left out, counted by reason. `add` also names them, in a nameless file, for `skipped.csv`."""

    file = None

    def add(self, name: str, reason: str) -> None:
        self[reason] += 1
        if self.file is None:
            self.file = tempfile.TemporaryFile(  # noqa: SIM115
                "w+", newline="", encoding="utf-8", errors="surrogateescape")
        csv.writer(self.file, lineterminator="\n").writerow((name, reason))


def as_text(name: str) -> str:
    """A name in composed form (NFC), which people type and macOS does not store; what is no UTF-8 in it as \\udcff."""
    return name if name.isascii() else unicodedata.normalize("NFC", name.encode(errors="backslashreplace").decode())


class BadImage(Exception):
    """One image cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a source, before it is read."""

    # the encoded image, or it and more fields for the sample's JSON; picklable: it runs in a worker process
    read: Callable[[], bytes | tuple[bytes, dict]]
    name: str  # where it comes from, for messages
    identity: str | None  # class or person; None: unlabelled
    person: str | None = None  # an identity that the source proves across domains
    camera: int | None = None
    clothes: int | None = None
    role: int | None = None  # index into ROLES
    template: int | None = None
    media: int | None = None  # the video or photograph that images of a template come from
    quality: float | None = None  # >= 0


@dataclass
class Source:
    """What a source function returns: its images in source order, and how they are to be scored.

    The other fields are read after the records, so a generator may fill `skipped`, `names` and `blocks` as it goes.
    """

    records: Iterable[Record]  # a list, or, for sets that are no list in memory, anything that yields them once
    protocol: dict | None = None  # {"name": ..., options}; None: a training split
    pairs: list[tuple[int, int, int, int]] = field(default_factory=list)  # left, right (places in records), same, fold
    skipped: Skipped = field(default_factory=Skipped)  # files left out, before reading
    names: dict[str, str] = field(default_factory=dict)  # identity -> a name for people and prompts
    blocks: list[int] = field(default_factory=list)  # first places of runs of records that are cheap to read together
    tables: dict[str, np.ndarray] = field(default_factory=dict)  # TABLES without rows: written as they are
    # what is dealt among the images that could be read: the roles, of (labels [M], class names), or, where there are
    # pairs, their folds, of (same [P]); None: roles and folds stand in the data set
    deal: Callable[..., np.ndarray] | None = None
    listed: bool = False  # a list of the protocol names the images: one that cannot be read stays there, as a miss


# ---------------------------------------------------------------- one image


def jpeg_sides(data: bytes | bytearray) -> tuple[int, int] | None:
    """Width and height that the header of a JPEG declares; None if it is damaged or the file too short for them.

    Call it before decoding: a decoder allocates what the header declares and fills in what is missing, so that 600
    damaged bytes could cost gigabytes and a minute. A file with a marker without length, a stray byte or a fill byte
    (0xFF) before the frame header counts as damaged: libjpeg skips them and might read a different header.
    """
    try:
        at = 2
        while data[at] == 0xFF and 0xC0 <= (marker := data[at + 1]) < 0xFF and not 0xD0 <= marker <= 0xDA:
            if marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC):
                width, height = data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6]
                return (width, height) if width * height <= 512 * len(data) else None  # a block of 64 takes a bit
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    except IndexError:
        pass
    return None


# ---------------------------------------------------------------- writing


def column_type(name: str) -> np.dtype:
    """What the numbers of a column are."""
    return np.dtype({"hash": np.uint64, "quality": np.float64}.get(name, np.int64))


# ---------------------------------------------------------------- reading


def read_index(folder: Path) -> dict:
    """index.json of a split folder, with the fields that every reader relies on."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder}: no index.json: not a split, or its preparation did not finish "
                         "(run the same command again)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); prepare the split again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise InputError(f"{path}: format is {str(found)[:60]!r}, not {FORMAT!r}; prepare the split with this version")
    if missing := {*INDEX, "protocol"} - set(index):
        raise InputError(f"{path}: lacks {sorted(missing)[0]!r}; prepare the split again")
    wrong = [key for key, kind in INDEX.items() if not fits(index[key], kind)]
    wrong += ["merged"] * (not fits(index.get("merged", []), [{"split": str}]))
    wrong += ["unreadable_classes"] * (not fits(index.get("unreadable_classes", []), [str]))
    wrong += ["protocol"] * (not (index["protocol"] is None or fits_protocol(index["protocol"])))
    wrong += ["provenance"] * ("provenance" not in wrong and not fits(index["provenance"].get("data_set", []), [str]))
    if not wrong:
        sound = {"domain": index["domain"] in DOMAINS, "size": 0 < index["size"] <= MAX_SIZE,
                 "names": len(index["names"]) == len(index["classes"]),
                 "columns": {*index["columns"]} <= {"shard", "offset", "length", "label", "hash", *OPTIONAL, *TABLES}}
        wrong = [key for key, good in sound.items() if not good]
    if wrong:
        raise InputError(f"{path}: {wrong[0]!r} is not what it should be; prepare the split again")
    index["provenance"].setdefault("data_set", [index["provenance"]["source"]])  # splits of older versions
    return index


# what readers rely on: a type, a list of such things, or an object with at least these fields
INDEX = {
    "domain": str, "split": str, "size": int, "samples": int, "classes": [str], "names": [str], "columns": [str],
    "shards": [{"file": str, "bytes": int, "samples": int, "sha256": str}], "provenance": {"source": str, "plan": str},
}


def fits(value: object, kind: type | list | dict) -> bool:
    """Whether a value from a JSON file is of a kind; a number also has to be one that an array can hold."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], kind[key]) for key in kind)
    if kind == [str]:  # there may be millions of classes
        return isinstance(value, list) and set(map(type, value)) <= {str}
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(one, kind[0]) for one in value)
    return type(value) is kind and (kind is not int or 0 <= value < 1 << 62)


def fits_protocol(protocol: object) -> bool:
    """Whether a protocol has a name, and the fields that an evaluation by it reads are of their kinds."""
    if not fits(protocol, {"name": str}):
        return False
    needed = {"verification": {"folds": int}, "classification": {"reference": str},
              "choice": {"reference": str, "choices": [str]}}.get(protocol["name"], {})
    optional = {"ood": bool, "groups": {}, "variants": [str], "draws": int, "misses": int, "unreadable": int,
                "pairs_lost": int, "open_set": float}
    kinds = needed | {key: kind for key, kind in optional.items() if key in protocol}
    return (fits(protocol, kinds) and protocol.get("variants") != [] and 1 <= protocol.get("draws", 1) <= 10_000
            and all(fits(group, [str]) for group in protocol.get("groups", {}).values()))


SHARD = re.compile(r"(\.\./(?!\.)[^/\0]+/)?shard-\d{6}\.tar")  # a split's own, or, where it is merged, a neighbour's
OPEN_FILES: OrderedDict[tuple[object, int], int] = OrderedDict()  # (split's key, shard) -> descriptor, last used last


class Split:
    """A split folder, for reading in any order.

    Attributes: folder, index (index.json), domain, name, size (pixels), classes and names (one of each per label),
    labels (int64 [M], -1: unlabelled), protocol (dict or None).

    Raises:
        InputError: the folder is no split, or its parts disagree (the contents are checked by `verify_split`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = Path(folder), read_index(Path(folder))
        self.key = object()  # its own in OPEN_FILES: a split at the same path may be another one
        self.domain, self.name, self.size = self.index["domain"], self.index["split"], self.index["size"]
        self.classes, self.names, self.protocol = (self.index[key] for key in ("classes", "names", "protocol"))
        self.shard, self.offset, self.length, self.labels = (
            np.asarray(self.column(name)) for name in ("shard", "offset", "length", "label")
        )  # still mapped, but plain arrays: to look one number up in a memmap takes a microsecond
        again = "prepare the split again, or find what differs with `python -m data_prep verify`"
        sizes = np.array([shard["bytes"] for shard in self.index["shards"]], dtype=np.int64)
        parts = {part["split"] for part in self.index.get("merged", [])}
        for shard in self.index["shards"]:
            if not SHARD.fullmatch(shard["file"]):
                raise InputError(f"{self.folder}/index.json: {shard['file'][:80]!r} is no name of a shard; {again}")
            path = self.folder / shard["file"]
            if path.is_symlink() or (shard["file"].startswith("../") and shard["file"].split("/")[1] not in parts):
                raise InputError(f"{path}: a link, or another split's shard: refused; put the file itself there, or "
                                 f"{again}")
            if not path.is_file():
                raise InputError(f"{path}: missing; {again}")
            if path.stat().st_size != shard["bytes"]:
                raise InputError(f"{path}: {path.stat().st_size} bytes, its index says {shard['bytes']}: truncated or "
                                 f"replaced; {again}")
        if sum(shard["samples"] for shard in self.index["shards"]) != len(self):
            raise InputError(f"{self.folder}/index.json: its shards do not add up to {len(self)} samples; {again}")
        # in this form no sum can overflow
        if len(self) and (not 0 <= self.shard.min() <= self.shard.max() < len(sizes) or self.offset.min() < 512
                          or self.length.min() < 1 or (self.length > sizes[self.shard] - self.offset).any()):
            raise InputError(f"{self.folder}/index: rows that lie outside the shards; {again}")
        if len(self) and not -1 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise InputError(f"{self.folder}/index/label.npy: labels outside -1..{len(self.classes) - 1}; {again}")
        # readers allocate memory for the size in the index; some images of the sample may be damaged
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), 4), dtype=int)).tolist()
        sides = Counter(jpeg_sides(self.jpeg(row)[1]) for row in rows)
        for place in [place for place in OPEN_FILES if place[0] is self.key]:  # most splits are only looked at
            os.close(OPEN_FILES.pop(place))
        damaged = sides.pop(None, 0)
        if rows and 2 * sides[self.size, self.size] <= sides.total():
            found = "x".join(map(str, max(sides, key=sides.get))) if damaged < len(rows) else "no readable"
            raise InputError(f"{self.folder}/index.json: size is {self.size}, its images have {found} pixels; {again}")

    def __len__(self) -> int:
        return self.index["samples"]

    def __reduce__(self):  # a loader process opens the folder itself instead of receiving copies of the columns
        return Split, (self.folder,)

    def column(self, name: str) -> np.ndarray:
        """One row a sample (those of TABLES: one row a pair or template), memory-mapped."""
        path = self.folder / "index" / f"{name}.npy"
        try:
            column = np.load(path, mmap_mode="r", allow_pickle=False)
            found = f"{column.dtype} {list(column.shape)}"
        except Exception as error:  # NumPy raises OSError, ValueError, EOFError, SyntaxError, TokenError, ... by damage
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: column {name!r} cannot be read ({reason}); prepare the split again") from error
        kind = column_type(name)
        width = TABLES[name].count(",") + 1 if name in TABLES else None
        if column.dtype != kind or column.shape != ((*column.shape[:1], width) if width else (len(self),)):
            wanted = f"[rows, {width}]: {TABLES[name]}" if width else f"[{len(self)}], one a sample"
            raise InputError(f"{path}: holds {found}, want {kind} {wanted}; prepare the split again")
        if name == "quality" and not np.isfinite(column).all():
            raise InputError(f"{path}: numbers that are no quality; prepare the split again")
        if name == "pairs" and len(column) and not 0 <= column[:, :2].min() <= column[:, :2].max() < len(self):
            raise InputError(f"{path}: pairs name rows outside 0..{len(self) - 1}; prepare the split again")
        return column

    @property
    def hashed(self) -> bool:
        """Whether it has the column `hash`, which splits of older versions lack."""
        return "hash" in self.index["columns"]

    @cached_property
    def copies(self) -> int:
        """How many images come before in the split; those that could not be read (hash 0) are none."""
        hashes = self.column("hash") if self.hashed else np.empty(0)
        return int((hashes != 0).sum()) - len(np.setdiff1d(hashes, 0))

    @cached_property
    def missing(self) -> np.ndarray:
        """Listed images that could not be read when the split was prepared, bool [M]: they count as misses."""
        return self.column("hash") == 0 if (self.protocol or {}).get("misses") else np.zeros(len(self), dtype=bool)

    def optional(self, name: str) -> np.ndarray:
        """As `column`, but -1 for every sample where the source had no such column."""
        return self.column(name) if name in self.index["columns"] else np.full(len(self), -1)

    @cached_property
    def counts(self) -> np.ndarray:
        """Images of each class, int64 [C]."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes))

    def open_shard(self, shard: int) -> int:
        """The file descriptor of a shard; those of all splits that were not used for longest are closed for it."""
        if (place := (self.key, shard)) in OPEN_FILES:
            OPEN_FILES.move_to_end(place)
        else:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # -1: none
            most = OPEN_SHARDS if limit < 0 else min(OPEN_SHARDS, limit // 4)
            while len(OPEN_FILES) >= max(most, 1):
                os.close(OPEN_FILES.popitem(last=False)[1])
            OPEN_FILES[place] = os.open(self.folder / self.index["shards"][shard]["file"], os.O_RDONLY)
        return OPEN_FILES[place]

    def jpeg(self, row: int) -> tuple[str, bytes]:
        """Key and JPEG bytes of a sample."""
        file, offset = self.open_shard(int(self.shard[row])), int(self.offset[row])
        block = os.pread(file, tarfile.BLOCKSIZE + int(self.length[row]), offset - tarfile.BLOCKSIZE)
        return block[:100].split(b".")[0].decode("ascii", "replace"), block[tarfile.BLOCKSIZE :]

    def fields(self, row: int) -> dict:
        """The JSON of a sample, which lies behind its JPEG; InputError where there is none."""
        file, end = self.open_shard(int(self.shard[row])), int(self.offset[row] + self.length[row])
        head = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        block = os.pread(file, 16 * tarfile.BLOCKSIZE, head)  # more than any of ours takes
        try:
            info = tarfile.TarInfo.frombuf(block[: tarfile.BLOCKSIZE], "utf-8", "strict")
            return dict(json.loads(block[tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + info.size]))
        except (tarfile.HeaderError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{self.folder}: row {row} has no readable JSON; find what is damaged with `python -m "
                             "data_prep verify`") from error

    def image(self, row: int):
        """A sample as a uint8 tensor [3, size, size], RGB; in memory its channels are last, as the decoder leaves them.

        Raises:
            BadImage: it cannot be decoded or has another size.
        """
        if self.protocol and self.protocol.get("misses") and self.missing[row]:
            raise BadImage(f"{self.jpeg(row)[0]}: could not be read when the split was prepared")
        data = bytearray(int(self.length[row]))
        read = os.preadv(self.open_shard(int(self.shard[row])), (data,), int(self.offset[row]))
        sides = jpeg_sides(data) if read == len(data) else None
        if sides not in (None, (self.size, self.size)):
            raise BadImage(f"{self.jpeg(row)[0]}: {sides[0]}x{sides[1]} pixels, not {self.size}x{self.size}")
        try:
            image = decoder()(data) if sides else None
        except (RuntimeError, ValueError):
            image = None
        if image is None:
            raise BadImage(f"{self.jpeg(row)[0]}: not a readable JPEG")
        return image


@cache
def decoder() -> Callable:
    """The function from JPEG bytes to a uint8 tensor [3, H, W], RGB."""
    import torch  # here, because it takes seconds, and sources are listed and read without it
    from torchvision.io import ImageReadMode, decode_jpeg

    return lambda data: decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB)


def siblings(folder: Path) -> list[Split]:
    """The other finished splits of the domain."""
    return [Split(path.parent) for path in sorted(folder.parent.glob("*/index.json")) if path.parent != folder]


def open_root(root: Path, domains: Iterable[str] = DOMAINS, name: str = "*") -> dict[str, dict[str, Split]]:
    """The splits of a data root, by domain (in the house order) and name.

    `name`: of the split wanted, or * for all; what is not wanted is not opened. InputError where there are none, or one
    is damaged or lies in another's place.
    """
    paths = {domain: sorted(root.glob(f"{domain}/{name}/index.json")) for domain in domains}
    found = {domain: {path.parent.name: Split(path.parent) for path in paths[domain]} for domain in domains}
    for domain, splits in found.items():
        for folder_name, split in splits.items():
            if (split.domain, split.name) != (domain, folder_name):
                raise InputError(f"{split.folder} holds the split {split.domain}/{split.name}: move it back to its "
                                 "place, or prepare the images again with this --out")
    if not any(found.values()):
        raise InputError(f"{root}: no shards there; draw the demo corpus with `python -m data_prep demo --out {root}`, "
                         f"or prepare images: `python -m data_prep SOURCE --src PATH --out {root}/<domain>/<split>`")
    return {domain: splits for domain, splits in found.items() if splits}


def ordered_tests(splits: Iterable[Split], ood: bool = False) -> list[Split]:
    """The test splits of a domain in the order in which one of them stands for all; a training split is none of them.

    First those whose classes are the training split's own (reference `train`, or none), then by name. `ood`: those out
    of distribution instead of those in distribution.
    """
    tests = [split for split in splits if split.protocol and bool(split.protocol.get("ood")) == ood]
    return sorted(tests, key=lambda split: (split.protocol.get("reference", "train") != "train", split.name))


def named_splits(root: dict[str, dict[str, Split]], names: str, where: str) -> list[Split]:
    """The test splits that --splits names as `domain/split,...`; `where` is the name of the data root."""
    everything = {f"{domain}/{name}": split for domain in root for name, split in root[domain].items()}
    for name in names.split(","):
        if name not in everything:
            raise InputError(f"--splits: {where} has no split {name!r}; it has {', '.join(everything)}")
        if not everything[name].protocol:
            raise InputError(f"--splits: {name} is a training split: it has no protocol to be scored by")
    return [everything[name] for name in dict.fromkeys(names.split(","))]


# ---------------------------------------------------------------- checking


open_split = lru_cache(maxsize=1)(Split)  # once a worker: with millions of classes reading the index takes seconds


def fingerprint(split: Split) -> str:
    """What was prepared and how, in a few letters: the source and the hash of its plan."""
    provenance = split.index["provenance"]
    return f"{provenance['source']} {provenance['plan'][:8]}"


def matched_pairs(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` pairs of one identity and as many of two, [2 count, 2] rows, drawn at random (labels -1 left out)."""
    rng = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    ids, start, size = np.unique(labels[order], return_index=True, return_counts=True)
    several = np.flatnonzero(size > 1)
    if len(ids) < 2 or not len(several):
        return np.empty((0, 2), dtype=np.int64)
    i = rng.choice(several, count, p=size[several] / size[several].sum())
    a = (rng.random(count) * size[i]).astype(int)
    b = (a + 1 + (rng.random(count) * (size[i] - 1)).astype(int)) % size[i]
    same = np.stack([order[start[i] + a], order[start[i] + b]], 1)
    left, right = rng.integers(len(order), size=(2, 4 * count))
    apart = labels[order[left]] != labels[order[right]]
    different = np.stack([order[left], order[right]], 1)[apart][:count]
    return np.concatenate([same[: len(different)], different])


def open_training(data: str, domains: list[str]) -> list[Split]:
    """The training split of each domain of a data root; InputError where it is missing or lacks labels."""
    root, splits = open_root(Path(data), domains, "train"), []
    for domain in domains:
        if "train" not in root.get(domain, {}):
            folder = f"{data}/{domain}/train"
            raise InputError(f"{folder}: no shards; make them: `python -m data_prep SOURCE --src PATH --out {folder}`, "
                             f"or leave {domain} out with --domains")
        split = root[domain]["train"]
        if not len(split) or (split.labels < 0).any():
            raise InputError(f"{split.folder}: a training split needs images with labels; prepare it with --part train")
        if len(split.classes) < 2:
            raise InputError(f"{split.folder}: one class, {split.classes[0][:60]!r}, has nothing to be told from: "
                             "prepare it again with --src the folder that holds the class folders")
        splits.append(split)
    return splits
