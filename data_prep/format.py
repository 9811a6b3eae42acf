"""The shard format "imic-shards/1": writing, reading and checking a split folder DATA/<domain>/<split>.

    shard-000000.tar, ...   plain tar: <key>.jpg and <key>.json side by side, readable by any WebDataset reader
    index.json              what the split is: sizes, classes, shard table with hashes, protocol, provenance
    index/*.npy             columns, one row per sample: position of its JPEG, label, camera, role, ..., and `hash`, the
                            first 8 bytes of the SHA-256 of the original image file; and the lists of a protocol
                            (TABLES), one row per pair or template
"""

import csv
import io
import json
import os
import re
import resource
import tarfile
import tempfile
import unicodedata
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from data_prep import DOMAINS, InputError, read_json

FORMAT = "imic-shards/1"
VERSION = "0.2"  # of data_prep, recorded with every split
ROLES = ("probe", "gallery", "distractor")  # the column `role` holds indices; re-identification calls a probe a query
# columns that only some sources have: integers, except `quality`, a face detector's score; -1: no value
OPTIONAL = ("camera", "clothes", "role", "template", "media", "quality")
TABLES = {
    "pairs": "left row, right row, same, fold",  # verification
    "template_pairs": "template, template, same",  # templates, 1:1
    "template_gallery": "template, gallery (from 0)",  # templates, 1:N: each gallery is searched separately
    "template_probes": "template",
}
FITS = ("crop", "squash", "pad")
# raster formats only: Pillow would pass a PostScript file, under any name, to an interpreter
READABLE = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_SIZE = 4096  # pixels
OPEN_SHARDS = 256  # files that a process keeps open for all splits; at most a quarter of its limit


class Skipped(Counter):
    """Numbers of skipped files by reason. `add` also records their names, in a temporary file, for `skipped.csv`."""

    file = None

    def add(self, name: str, reason: str) -> None:
        self[reason] += 1
        if self.file is None:
            self.file = tempfile.TemporaryFile(  # noqa: SIM115
                "w+", newline="", encoding="utf-8", errors="surrogateescape")
        csv.writer(self.file, lineterminator="\n").writerow((name, reason))


def as_text(name: str) -> str:
    """A name in composed form (NFC), as people type it but macOS does not store it; invalid UTF-8 as \\udcff."""
    return name if name.isascii() else unicodedata.normalize("NFC", name.encode(errors="backslashreplace").decode())


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case file extensions of the readable formats, with the dot."""
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in READABLE)


def stimulus_of(image: str) -> str:
    """The key of a stimulus in trials and files: the last part of its name, lower case, no folder or extension.

    `0001_edg_s01_0_oven_00_oven10.png` is `oven10`: the parts before it depend on trial and observer. A picture of
    ImageNet keeps its class (`n04111531_14126`).
    """
    path = PurePosixPath(image.strip().replace("\\", "/").casefold())
    parts = (path.stem if path.suffix in image_suffixes() else path.name).split("_")
    return "_".join(parts[-2:] if re.fullmatch(r"n\d{8}", parts[-2:][0]) else parts[-1:])


class BadImage(Exception):
    """One image cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a source, before it is read."""

    # the encoded image, or a pair of it and further fields for the sample's JSON; picklable: called in a worker process
    read: Callable[[], bytes | tuple[bytes, dict]]
    name: str  # its origin, for messages
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
    """What a source function returns: its images in source order and the protocol that scores them.

    The other fields are read after the records, so that a generator may fill `skipped`, `names` and `blocks`.
    """

    records: Iterable[Record]  # a list or, for sets too large for one, anything that yields them once
    protocol: dict | None = None  # {"name": ..., options}; None: a training split
    pairs: list[tuple[int, int, int, int]] = field(default_factory=list)  # left, right (places in records), same, fold
    skipped: Skipped = field(default_factory=Skipped)  # files left out without being read
    names: dict[str, str] = field(default_factory=dict)  # identity -> readable name, also for prompts
    blocks: list[int] = field(default_factory=list)  # where each run of records that are read together cheaply begins
    tables: dict[str, np.ndarray] = field(default_factory=dict)  # TABLES that name no rows: written unchanged
    # assigns roles among the readable images, from (labels [M], class names), or, if there are pairs, their folds, from
    # (same [P]); None: the data set defines roles and folds
    deal: Callable[..., np.ndarray] | None = None
    listed: bool = False  # a list of the protocol names the images: an unreadable one stays in the split, as a miss


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


def encode(image: Image.Image, kind: str, **options) -> bytes:
    """An image as a file of this format; `options` of Pillow's `save`."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


# ---------------------------------------------------------------- the index


def column_type(name: str) -> np.dtype:
    """The dtype of a column."""
    return np.dtype({"hash": np.uint64, "quality": np.float64}.get(name, np.int64))


def fits(value: object, kind: type | list | dict | Callable[[Any], bool]) -> bool:
    """Whether a value from a JSON file is of a kind: a type, [kind of items], {field: kind} or a function that tells.

    An object may lack fields that are given with a "?" and have others. An int must also fit an array of int64.
    """
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(
            fits(value[name], of) if (name := key.rstrip("?")) in value else key != name for key, of in kind.items())
    if kind == [str]:  # there may be millions of classes
        return isinstance(value, list) and set(map(type, value)) <= {str}
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(one, kind[0]) for one in value)
    if isinstance(kind, type):
        return type(value) is kind and (kind is not int or 0 <= value < 1 << 62)
    return kind(value)


# what readers rely on, as `fits` takes it
PROTOCOL = {
    "name": str, "ood?": bool, "misses?": int, "unreadable?": int, "pairs_lost?": int, "open_set?": float,
    "groups?": lambda groups: fits(groups, {}) and all(fits(group, [str]) for group in groups.values()),
    "variants?": lambda names: fits(names, [str]) and names != [],
    "draws?": lambda n: fits(n, int) and 1 <= n <= 10_000,
}
NEEDED = {"verification": {"folds": int}, "classification": {"reference": str},
          "choice": {"reference": str, "choices": [str]}}  # further fields of a protocol, by its name
INDEX = {
    "domain": lambda name: name in DOMAINS, "split": str, "size": lambda n: fits(n, int) and 0 < n <= MAX_SIZE,
    "samples": int, "classes": [str], "names": [str],
    "columns": lambda names: fits(names, [str]) and {*names} <= {
        "shard", "offset", "length", "label", "hash", *OPTIONAL, *TABLES},
    "shards": [{"file": str, "bytes": int, "samples": int, "sha256": str}],
    "provenance": {"source": str, "plan": str, "data_set?": [str]},
    "merged?": [{"split": str}], "unreadable_classes?": [str],
    "protocol": lambda protocol: protocol is None or (
        fits(protocol, PROTOCOL) and fits(protocol, NEEDED.get(protocol["name"], {}))),
}


def read_index(folder: Path) -> dict:
    """index.json of a split folder, checked for the fields that readers rely on."""
    path = folder / "index.json"
    if not os.path.exists(path):
        raise InputError(f"{folder}: no index.json: this is not a split, or its preparation did not finish "
                         "(run the same command again)")
    index = read_json(path)
    if (form := index.get("format")) != FORMAT:
        raise InputError(f"{path}: format is {str(form)[:60]!r}, not {FORMAT!r}; prepare the split with this version")
    wrong = [key.rstrip("?") for key, kind in INDEX.items() if not fits(index, {key: kind})]
    if wrong or len(index["names"]) != len(index["classes"]):
        raise InputError(f"{path}: {[*wrong, 'names'][0]!r} is missing or not valid; prepare the split again")
    index["provenance"].setdefault("data_set", [index["provenance"]["source"]])  # splits of older versions
    return index


# ---------------------------------------------------------------- reading

SHARD = re.compile(r"(\.\./(?!\.)[^/\0]+/)?shard-\d{6}\.tar")  # its own or, if the split is merged, a neighbour's
OPEN_FILES: OrderedDict[tuple[object, int], int] = OrderedDict()  # (Split.key, shard) -> descriptor, last used last


class Split:
    """A split folder, readable in any order.

    Attributes: folder, index (index.json), domain, name, size (pixels), classes and names (by label), labels (int64
    [M], -1: unlabelled), protocol (dict or None for training). InputError if the folder is not a split, or its files
    disagree (`verify_split` checks their contents).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = Path(folder), read_index(Path(folder))
        self.key = object()  # unique in OPEN_FILES: another split may take the same path later
        self.domain, self.name, self.size = self.index["domain"], self.index["split"], self.index["size"]
        self.classes, self.names, self.protocol = (self.index[key] for key in ("classes", "names", "protocol"))
        self.shard, self.offset, self.length, self.labels = (
            np.asarray(self.column(name)) for name in ("shard", "offset", "length", "label")
        )  # views of the maps as plain arrays: one lookup in a memmap takes a microsecond
        again = "prepare the split again, or find the difference with `python -m data_prep verify`"
        sizes = np.array([shard["bytes"] for shard in self.index["shards"]], dtype=np.int64)
        parts = {part["split"] for part in self.index.get("merged", [])}
        for shard in self.index["shards"]:
            if not SHARD.fullmatch(shard["file"]):
                raise InputError(f"{self.folder}/index.json: {shard['file'][:80]!r} is not a shard's name; {again}")
            path = self.folder / shard["file"]
            if path.is_symlink() or (shard["file"].startswith("../") and shard["file"].split("/")[1] not in parts):
                raise InputError(f"{path}: a link, or another split's shard: refused; replace it by the file itself, "
                                 f"or {again}")
            if not path.is_file():
                raise InputError(f"{path}: missing; {again}")
            if path.stat().st_size != shard["bytes"]:
                raise InputError(f"{path}: {path.stat().st_size} bytes, but the index says {shard['bytes']}: truncated "
                                 f"or replaced; {again}")
        if sum(shard["samples"] for shard in self.index["shards"]) != len(self):
            raise InputError(f"{self.folder}/index.json: its shards do not add up to {len(self)} samples; {again}")
        # written without a sum, which could overflow
        if len(self) and (not 0 <= self.shard.min() <= self.shard.max() < len(sizes) or self.offset.min() < 512
                          or self.length.min() < 1 or (self.length > sizes[self.shard] - self.offset).any()):
            raise InputError(f"{self.folder}/index: has rows outside the shards; {again}")
        if len(self) and not -1 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise InputError(f"{self.folder}/index/label.npy: labels outside -1..{len(self.classes) - 1}; {again}")
        # readers allocate memory for the size in the index; some images of the sample may be damaged
        rows = np.unique(np.linspace(0, len(self) - 1, min(len(self), 4), dtype=int)).tolist()
        sides = Counter(jpeg_sides(self.jpeg(row)[1]) for row in rows)
        for place in [place for place in OPEN_FILES if place[0] is self.key]:  # most splits are only looked at
            os.close(OPEN_FILES.pop(place))
        sides.pop(None, None)
        if rows and 2 * sides[self.size, self.size] <= sides.total():
            shown = "x".join(map(str, max(sides, key=sides.get))) + " pixels" if sides.total() else "no readable size"
            raise InputError(f"{self.folder}/index.json: size is {self.size}, its images have {shown}; {again}")

    def __len__(self) -> int:
        return self.index["samples"]

    def __reduce__(self):  # a loader process opens the folder instead of receiving copies of the columns
        return Split, (self.folder,)

    def column(self, name: str) -> np.ndarray:
        """A column, memory-mapped: one row per sample (of TABLES: per pair or template)."""
        path = self.folder / "index" / f"{name}.npy"
        try:
            column = np.load(path, mmap_mode="r", allow_pickle=False)
            content = f"{column.dtype} {list(column.shape)}"
        except Exception as error:  # by damage: OSError, ValueError, EOFError, SyntaxError, TokenError, ...
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: column {name!r} cannot be read ({reason}); prepare the split again") from error
        kind = column_type(name)
        width = TABLES[name].count(",") + 1 if name in TABLES else None
        if column.dtype != kind or column.shape != ((*column.shape[:1], width) if width else (len(self),)):
            wanted = f"[rows, {width}]: {TABLES[name]}" if width else f"[{len(self)}], one per sample"
            raise InputError(f"{path}: holds {content}, want {kind} {wanted}; prepare the split again")
        if name == "quality" and not np.isfinite(column).all():
            raise InputError(f"{path}: not all numbers are finite; prepare the split again")
        if name == "pairs" and len(column) and not 0 <= column[:, :2].min() <= column[:, :2].max() < len(self):
            raise InputError(f"{path}: pairs name rows outside 0..{len(self) - 1}; prepare the split again")
        return column

    @property
    def hashed(self) -> bool:
        """Whether the split has the column `hash`, which older versions did not write."""
        return "hash" in self.index["columns"]

    @cached_property
    def copies(self) -> int:
        """Number of images that repeat an earlier one of the split; unreadable images (hash 0) do not count."""
        hashes = self.column("hash") if self.hashed else np.empty(0)
        return int((hashes != 0).sum()) - len(np.setdiff1d(hashes, 0))

    @cached_property
    def missing(self) -> np.ndarray:
        """Which listed images could not be read when the split was prepared, bool [M]; they count as misses."""
        return self.column("hash") == 0 if (self.protocol or {}).get("misses") else np.zeros(len(self), dtype=bool)

    def optional(self, name: str) -> np.ndarray:
        """As `column`, but -1 for every sample if the source had no such column."""
        return self.column(name) if name in self.index["columns"] else np.full(len(self), -1)

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of images of each class, int64 [C]."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes))

    def open_shard(self, shard: int) -> int:
        """The file descriptor of a shard; too many open ones are closed, least recently used first."""
        if (place := (self.key, shard)) in OPEN_FILES:
            OPEN_FILES.move_to_end(place)
        else:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # -1: unlimited
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
        """The JSON of a sample, which follows its JPEG in the tar; InputError if it cannot be read."""
        file, end = self.open_shard(int(self.shard[row])), int(self.offset[row] + self.length[row])
        head = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        block = os.pread(file, 16 * tarfile.BLOCKSIZE, head)  # more than our JSON takes
        try:
            info = tarfile.TarInfo.frombuf(block[: tarfile.BLOCKSIZE], "utf-8", "strict")
            return dict(json.loads(block[tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + info.size]))
        except (tarfile.HeaderError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{self.folder}: row {row} has no readable JSON; find the damage with `python -m "
                             "data_prep verify`") from error

    def image(self, row: int):
        """A sample as a uint8 tensor [3, size, size], RGB, with channels last in memory, as the decoder returns it.

        BadImage if it cannot be decoded, or its header declares another size (checked before decoding).
        """
        data, reason = bytearray(int(self.length[row])), "not a readable JPEG"
        read = os.preadv(self.open_shard(int(self.shard[row])), (data,), int(self.offset[row]))
        sides = jpeg_sides(data) if read == len(data) else None
        if self.missing[row]:
            reason = "could not be read when the split was prepared"
        elif sides == (self.size, self.size):
            with suppress(RuntimeError, ValueError):
                return decoder()(data)
        elif sides:
            reason = f"{sides[0]}x{sides[1]} pixels, not {self.size}x{self.size}"
        raise BadImage(f"{self.jpeg(row)[0]}: {reason}")


@cache
def decoder() -> Callable:
    """The function from JPEG bytes to a uint8 tensor [3, H, W], RGB."""
    import torch  # imported late: it takes seconds, and listing and reading sources does without
    from torchvision.io import ImageReadMode, decode_jpeg

    return lambda data: decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB)


def siblings(folder: Path) -> list[Split]:
    """The other finished splits of the domain."""
    return [Split(path.parent) for path in sorted(folder.parent.glob("*/index.json")) if path.parent != folder]


def open_root(root: Path, domains: Iterable[str] = DOMAINS, name: str = "*") -> dict[str, dict[str, Split]]:
    """The splits of a data root, by domain (in the order of DOMAINS) and name; only matching ones are opened.

    `name`: of a split, or * for all. InputError if there is none, or one is damaged or lies in another's folder.
    """
    splits: dict[str, dict[str, Split]] = {}
    for domain in domains:
        for path in sorted(root.glob(f"{domain}/{name}/index.json")):
            split = Split(path.parent)
            if (split.domain, split.name) != (domain, path.parent.name):
                raise InputError(f"{split.folder} holds the split {split.domain}/{split.name}: move it back, "
                                 "or prepare the images again with this --out")
            splits.setdefault(domain, {})[split.name] = split
    if not splits:
        raise InputError(f"{root}: no shards; give the data root with --data, draw the demo corpus with `python -m "
                         f"data_prep demo --out {root}`, or prepare images: `python -m data_prep SOURCE --src PATH "
                         f"--out {root}/<domain>/<split>`")
    return splits


def ordered_tests(splits: Iterable[Split], ood: bool = False) -> list[Split]:
    """The test splits among the splits of a domain; where one is to stand for all, it is the first.

    Those with the classes of the training split (reference `train` or none) come first, then the order is by name.
    `ood`: return the splits out of distribution instead of those in distribution.
    """
    tests = [split for split in splits if split.protocol and bool(split.protocol.get("ood")) == ood]
    return sorted(tests, key=lambda split: (split.protocol.get("reference", "train") != "train", split.name))


def named_splits(root: dict[str, dict[str, Split]], names: str, where: str) -> list[Split]:
    """The test splits that --splits names as `domain/split,...`; `where`: the data root, for messages."""
    everything = {f"{domain}/{name}": split for domain in root for name, split in root[domain].items()}
    for name in names.split(","):
        if name not in everything:
            raise InputError(f"--splits: {where} has no split {name!r}; it has {', '.join(everything)}")
        if not everything[name].protocol:
            raise InputError(f"--splits: {name} is a training split: no protocol scores it")
    return [everything[name] for name in dict.fromkeys(names.split(","))]


open_split = lru_cache(maxsize=1)(Split)  # cached per worker: an index with millions of classes takes seconds


def fingerprint(split: Split) -> str:
    """A short identifier of a split: its source and the first letters of the hash of its plan."""
    provenance = split.index["provenance"]
    return f"{provenance['source']} {provenance['plan'][:8]}"


def matched_pairs(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` random pairs of the same identity, then as many of different ones, rows [2 count, 2]; no label -1."""
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
    """The training split of each domain of a data root; InputError if one is missing or lacks labels."""
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
            raise InputError(f"{split.folder}: only one class, {split.classes[0][:60]!r}: prepare it again with --src "
                             "the folder that holds the class folders")
        splits.append(split)
    return splits
