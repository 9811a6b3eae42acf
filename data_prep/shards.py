"""The shard format "imic-shards/1": writing, reading and checking a split folder DATA/<domain>/<split>.

    shard-000000.tar, ...   plain tar: <key>.jpg and <key>.json side by side, readable by any WebDataset reader
    index.json              what the split is: sizes, classes, shard table with hashes, protocol, provenance
    index/*.npy             columns, one row a sample: where its JPEG lies, its label, camera, role, ...; and the lists
                            of a protocol (TABLES), one row a pair or template
"""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tarfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from data_prep import DOMAINS, InputError

FORMAT = "imic-shards/1"
VERSION = "0.1"  # of data_prep, recorded with every split
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
READABLE = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
OPEN_SHARDS = 64  # files that a split keeps open at once: far below the usual limit of 1024 a process
# fork where it is safe and quick; named, because the default differs between systems and Python versions
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


class BadImage(Exception):
    """One image cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a source, before it is read."""

    read: Callable[[], bytes]  # the encoded image; picklable: it runs in a worker process
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
    """What a source function returns: its images in source order, and how they are to be scored."""

    records: list[Record]
    protocol: dict | None = None  # {"name": ..., options}; None: a training split
    pairs: list[tuple[int, int, int, int]] = field(default_factory=list)  # left, right (places in records), same, fold
    skipped: Counter = field(default_factory=Counter)  # files left out by reason, before reading
    names: dict[str, str] = field(default_factory=dict)  # identity -> a name for people and prompts
    blocks: list[int] = field(default_factory=list)  # first places of runs of records that are cheap to read together
    tables: dict[str, np.ndarray] = field(default_factory=dict)  # TABLES without rows: written as they are


# ---------------------------------------------------------------- one image


def open_image(data: bytes) -> tuple[Image.Image, bool]:
    """A decoded image, and whether its EXIF data say that it is to be turned; BadImage where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=READABLE)
        image.load()  # a truncated file ends here, not in training
        return image, image.getexif().get(0x0112, 1) != 1
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(f"more than {Image.MAX_IMAGE_PIXELS // 1_000_000} million pixels") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... by format
        raise BadImage("unreadable image") from error


def fit_image(data: bytes, size: int, fit: str, quality: int) -> bytes:
    """An encoded image as a JPEG of size x size pixels; a baseline JPEG that already fits is returned as it is.

    Args:
        data: an image in one of the formats READABLE.
        size: side in pixels.
        fit: "crop" (short side to `size`, centre crop), "squash" (ignore the aspect ratio) or "pad" (keep it, fill
            with the mean colour).
        quality: of the JPEG, 1..100, where it has to be written anew.

    Raises:
        BadImage: not an image, or a damaged one.
    """
    image, turned = open_image(data)
    plain = image.format == "JPEG" and image.mode in ("RGB", "L") and not image.info.get("progressive") and not turned
    if plain and image.size == (size, size):
        return data
    image = ImageOps.exif_transpose(image) if turned else image
    if image.mode.startswith("I"):  # 16 bits a channel: Pillow's own conversion would cut instead of scale
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    image = image.convert("RGB")
    if fit == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    elif fit == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        mean = tuple(round(c) for c in np.asarray(image).reshape(-1, 3).mean(0))
        image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=mean)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


# ---------------------------------------------------------------- writing


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it, rename it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_shard(folder: Path, number: int, first: int, records: list[Record], labels: list[int],
                settings: dict) -> dict:
    """Write shard `number`, atomically, then its part of the index under .parts/; returns that part."""
    name, rows, skipped = f"shard-{number:06d}.tar", [], Counter()
    temporary = folder / f"{name}.{os.getpid()}.tmp"
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:

        def add(member: str, data: bytes) -> int:
            info = tarfile.TarInfo(member)  # owner, time and mode keep their constant defaults: same input, same bytes
            info.size = len(data)
            offset = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(info, io.BytesIO(data))
            return offset

        for place, (record, label) in enumerate(zip(records, labels, strict=True), first):
            try:
                data = fit_image(record.read(), settings["size"], settings["fit"], settings["quality"])
            except (BadImage, OSError) as error:
                reason = str(error) if isinstance(error, BadImage) else "unreadable file"
                skipped[reason] += 1
                continue
            key = f"{place:09d}"  # the place in the source's order: a skipped image leaves a gap
            meta = {"key": key, "domain": settings["domain"], "label": label, "identity": record.identity,
                    "source": settings["source"]}
            optional = {c: getattr(record, c) for c in ("person", *OPTIONAL) if getattr(record, c) is not None}
            offset = add(f"{key}.jpg", data)
            add(f"{key}.json", json.dumps(meta | optional).encode())
            rows.append([place, offset, len(data), label, *(optional.get(c, -1) for c in OPTIONAL)])
    with open(temporary, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    size = temporary.stat().st_size
    os.replace(temporary, folder / name)
    part = {"file": name, "samples": len(rows), "bytes": size, "sha256": digest, "rows": rows, "skipped": skipped}
    write_bytes(folder / ".parts" / f"{name}.json", json.dumps(part).encode())
    return part


def start_worker(parent: int) -> None:
    """One thread a worker, which ends with its parent: a killed preparation must leave nobody who still writes."""
    import torch

    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def random_order(n: int, blocks: list[int], seed: int) -> np.ndarray:
    """The places 0..n-1 in a seeded random order; blocks, where there are any, stay whole and move as such.

    The reader shuffles within a window of several shards, so the order inside a block does not matter.
    """
    if not blocks:
        return np.random.default_rng(seed).permutation(n)
    runs = np.split(np.arange(n), blocks[1:])
    return np.concatenate([runs[i] for i in np.random.default_rng(seed).permutation(len(runs))])


def write_split(folder: Path, source: Source, *, source_name: str, size: int, fit: str, quality: int, train: bool,
                seed: int = 0, shard_size: int = 2048, workers: int = 1, options: dict | None = None) -> dict:
    """Write a split folder; continues an unfinished one and leaves a complete one with the same plan as it is.

    Args:
        folder: DATA/<domain>/<split>.
        source: records, protocol and pairs.
        source_name: of the source, as on the command line.
        size, fit, quality: see `fit_image`.
        train: write in a seeded random order (else in source order).
        seed: of that order.
        shard_size: records a shard.
        workers: processes.
        options: recorded as provenance.

    Returns:
        The index.

    Raises:
        InputError: nothing to write, or a folder that holds something else.
    """
    domain, split = folder.parts[-2:]
    records = source.records
    if not records:
        raise InputError(f"{folder}: the source holds no images"
                         + "".join(f"; {n} left out: {reason}" for reason, n in source.skipped.items()))
    order = random_order(len(records), source.blocks, seed) if train else np.arange(len(records))
    classes = sorted({record.identity for record in records if record.identity is not None})
    number_of = {name: i for i, name in enumerate(classes)}
    labels = [number_of.get(record.identity, -1) for record in records]
    settings = {"domain": domain, "source": source_name, "size": size, "fit": fit, "quality": quality}

    plan = hashlib.sha256(json.dumps([FORMAT, VERSION, settings, train, seed, shard_size, source.protocol, source.pairs,
                                      sorted(source.names.items())]).encode())
    for record in records:
        optional = (getattr(record, name) for name in OPTIONAL)
        plan.update(repr((record.name, record.identity, record.person, *optional)).encode())
    for name, table in source.tables.items():
        plan.update(name.encode() + table.tobytes())
    plan = plan.hexdigest()
    if (folder / "index.json").exists():
        index = read_index(folder)
        if index["provenance"]["plan"] == plan:
            print(f"{folder}: complete")
            return index
        raise InputError(f"{folder} already holds another split: remove it or choose another --out")
    parts = folder / ".parts"
    if (parts / "plan").exists() and (parts / "plan").read_text() != plan:
        raise InputError(f"{folder} holds an unfinished preparation with other options: finish that one or remove it")
    parts.mkdir(parents=True, exist_ok=True)
    write_bytes(parts / "plan", plan.encode())
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()

    tasks = []
    for number, first in enumerate(range(0, len(records), shard_size)):
        places = order[first : first + shard_size]
        tasks.append((folder, number, first, [records[i] for i in places], [labels[i] for i in places], settings))
    written = run_tasks(tasks, workers, f"{domain}/{split}", len(records))

    found = np.array([row for part in written for row in part["rows"]], dtype=np.float64).reshape(-1, 4 + len(OPTIONAL))
    rows = found.astype(np.int64)
    if not len(rows):
        raise InputError(f"{folder}: none of the {len(records)} images can be read")
    columns = {"shard": np.repeat(np.arange(len(written)), [part["samples"] for part in written])}
    columns |= {"offset": rows[:, 1], "length": rows[:, 2], "label": rows[:, 3]}
    columns |= {name: (found if name == "quality" else rows)[:, 4 + i] for i, name in enumerate(OPTIONAL)
                if (found[:, 4 + i] >= 0).any()}
    columns |= source.tables
    protocol = source.protocol
    if source.pairs:
        row_of = np.full(len(records), -1)
        row_of[order[rows[:, 0]]] = np.arange(len(rows))
        pairs = np.array(source.pairs)
        pairs[:, :2] = row_of[pairs[:, :2]]
        lost = (pairs[:, :2] < 0).any(1)
        columns["pairs"] = pairs[~lost]
        protocol = protocol | {"pairs": int((~lost).sum()), "pairs_lost": int(lost.sum())}
    (folder / "index").mkdir(exist_ok=True)
    for name, column in columns.items():
        np.save(folder / "index" / f"{name}.npy", column)
    skipped = Counter(source.skipped)
    for part in written:
        skipped.update(part["skipped"])
    index = {
        "format": FORMAT, "domain": domain, "split": split, "size": size, "fit": fit, "quality": quality,
        "samples": len(rows), "classes": classes, "names": [source.names.get(name, name) for name in classes],
        "shards": [{key: part[key] for key in ("file", "samples", "bytes", "sha256")} for part in written],
        "columns": sorted(columns), "protocol": protocol, "skipped": dict(skipped),
        "provenance": {"source": source_name, "options": options or {}, "version": VERSION, "seed": seed,
                       "order": "random" if train else "source", "plan": plan},
    }
    write_bytes(folder / "index.json", (json.dumps(index, indent=1) + "\n").encode())
    shutil.rmtree(parts)
    return index


def run_tasks(tasks: list[tuple], workers: int, title: str, total: int) -> list[dict]:
    """The parts of all shards in order: those that a former run finished are read, the others are written."""
    parts: list[dict | None] = [None] * len(tasks)
    with tqdm(total=total, desc=title, unit="img", disable=None) as bar:
        todo = []
        for task in tasks:
            done = task[0] / ".parts" / f"shard-{task[1]:06d}.tar.json"
            if done.exists():
                parts[task[1]] = json.loads(done.read_text())
                bar.update(len(task[3]))
            else:
                todo.append(task)
        if workers <= 1 or len(todo) <= 1:
            for task in todo:
                parts[task[1]] = write_shard(*task)
                bar.update(len(task[3]))
            return parts
        with ProcessPoolExecutor(min(workers, len(todo)), PROCESSES, start_worker, (os.getpid(),)) as pool:
            running = {pool.submit(write_shard, *task): task for task in todo}
            try:
                for future in as_completed(running):
                    parts[running[future][1]] = future.result()
                    bar.update(len(running[future][3]))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return parts


# ---------------------------------------------------------------- reading


def read_index(folder: Path) -> dict:
    """index.json of a split folder, with the fields that every reader relies on."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder}: no index.json: not a split, or its preparation did not finish "
                         "(run the same command again)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); prepare the split again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise InputError(f"{path}: format is {found!r}, not {FORMAT!r}; prepare the split with this version")
    wanted = {"domain", "split", "size", "samples", "classes", "names", "shards", "protocol", "provenance"}
    if missing := wanted - set(index):
        raise InputError(f"{path}: lacks {sorted(missing)[0]!r}; prepare the split again")
    return index


class Split:
    """A split folder, for reading in any order.

    Attributes: folder, index (index.json), domain, name, size (pixels), classes and names (one of each per label),
    labels (int64 [M], -1: unlabelled), protocol (dict or None).

    Raises:
        InputError: the folder is no split, or its parts disagree (the contents are checked by `verify_split`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = Path(folder), read_index(Path(folder))
        self.domain, self.name, self.size = self.index["domain"], self.index["split"], self.index["size"]
        self.classes, self.names, self.protocol = (self.index[key] for key in ("classes", "names", "protocol"))
        self.shard, self.offset, self.length, self.labels = (
            self.column(name) for name in ("shard", "offset", "length", "label")
        )
        self.files: dict[int, int] = {}  # shard -> file descriptor
        again = "prepare the split again, or find what differs with `python -m data_prep verify`"
        sizes = np.array([shard["bytes"] for shard in self.index["shards"]])
        for shard in self.index["shards"]:
            path = self.folder / Path(shard["file"]).name
            if not path.is_file():
                raise InputError(f"{path}: missing; {again}")
            if path.stat().st_size != shard["bytes"]:
                raise InputError(f"{path}: {path.stat().st_size} bytes, its index says {shard['bytes']}: truncated or "
                                 f"replaced; {again}")
        if len(self) and (not 0 <= self.shard.min() <= self.shard.max() < len(sizes) or self.offset.min() < 512
                          or (self.offset + self.length > sizes[self.shard]).any()):
            raise InputError(f"{self.folder}/index: rows that lie outside the shards; {again}")
        if len(self) and not -1 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise InputError(f"{self.folder}/index/label.npy: labels outside -1..{len(self.classes) - 1}; {again}")

    def __len__(self) -> int:
        return self.index["samples"]

    def __reduce__(self):  # a loader process opens the folder itself instead of receiving copies of the columns
        return Split, (self.folder,)

    def column(self, name: str) -> np.ndarray:
        """One row a sample (those of TABLES: one row a pair or template), memory-mapped."""
        path = self.folder / "index" / f"{name}.npy"
        try:
            column = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: column {name!r} cannot be read ({error}); prepare the split again") from error
        if name not in TABLES and column.shape != (len(self),):
            raise InputError(f"{path}: {column.shape} rows for {len(self)} samples; prepare the split again")
        return column

    def optional(self, name: str) -> np.ndarray:
        """As `column`, but -1 for every sample where the source had no such column."""
        return self.column(name) if name in self.index["columns"] else np.full(len(self), -1)

    @cached_property
    def counts(self) -> np.ndarray:
        """Images of each class, int64 [C]."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes))

    def jpeg(self, row: int) -> tuple[str, bytes]:
        """Key and JPEG bytes of a sample."""
        shard, offset = int(self.shard[row]), int(self.offset[row])
        if shard not in self.files:
            if len(self.files) >= OPEN_SHARDS:
                os.close(self.files.pop(next(iter(self.files))))
            self.files[shard] = os.open(self.folder / f"shard-{shard:06d}.tar", os.O_RDONLY)
        block = os.pread(self.files[shard], tarfile.BLOCKSIZE + int(self.length[row]), offset - tarfile.BLOCKSIZE)
        return block[:100].split(b".")[0].decode("ascii", "replace"), block[tarfile.BLOCKSIZE :]

    def meta(self, row: int) -> dict:
        """What its shard says about a sample: the JSON member that follows the JPEG."""
        self.jpeg(row)  # opens the shard
        block, end = tarfile.BLOCKSIZE, int(self.offset[row]) + int(self.length[row])
        place, file = -(-end // block) * block, self.files[int(self.shard[row])]
        try:
            size = tarfile.TarInfo.frombuf(os.pread(file, block, place), "ascii", "strict").size
            return json.loads(os.pread(file, size, place + block))
        except (tarfile.TarError, ValueError) as error:
            raise InputError(f"{self.folder}: no metadata beside sample {row} ({error}); prepare the split again, or "
                             "find what differs with `python -m data_prep verify`") from error

    def image(self, row: int):
        """A sample as a uint8 tensor [3, size, size], RGB.

        Raises:
            BadImage: it cannot be decoded or has another size.
        """
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        key, data = self.jpeg(row)
        try:
            image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except (RuntimeError, ValueError) as error:
            raise BadImage(f"{key}: not a readable JPEG") from error
        if image.shape[1:] != (self.size, self.size):
            raise BadImage(f"{key}: {image.shape[2]}x{image.shape[1]} pixels, not {self.size}x{self.size}")
        return image


def open_root(root: Path, domains: Iterable[str] = DOMAINS, name: str = "*") -> dict[str, dict[str, Split]]:
    """The splits of a data root, by domain (in the house order) and name.

    Args:
        root: the data root.
        domains: those wanted.
        name: the split wanted, or * for all; what is not wanted is not opened.

    Raises:
        InputError: there are none, or one is damaged or lies in another's place.
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


# ---------------------------------------------------------------- checking


def verify_shard(folder: Path, number: int) -> list[str]:
    """What is wrong with one shard: hash, members, metadata, JPEGs."""
    split = Split(folder)
    shard = split.index["shards"][number]
    path, problems = folder / shard["file"], []
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
            problems.append(f"{path}: sha256 differs from the index")
    rows = np.flatnonzero(split.shard == number)
    columns = {name: split.column(name) for name in OPTIONAL if name in split.index["columns"]}
    try:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            if len(members) != 2 * len(rows):
                return [*problems, f"{path}: {len(members)} members for {len(rows)} samples"]
            for row, image, meta in zip(rows, members[::2], members[1::2], strict=True):
                key = image.name.removesuffix(".jpg")
                if image.name != f"{key}.jpg" or meta.name != f"{key}.json" or not key.isdigit():
                    problems.append(f"{path}: members {image.name!r}, {meta.name!r}: want <key>.jpg, <key>.json")
                    continue
                if (image.offset_data, image.size) != (split.offset[row], split.length[row]):
                    problems.append(f"{path}: {image.name} is not where the index says")
                    continue
                fields = json.loads(tar.extractfile(meta).read())
                label = int(split.labels[row])
                expected = {"key": key, "domain": split.domain, "label": label,
                            "identity": split.classes[label] if label >= 0 else None}
                expected |= {name: column[row].item() for name, column in columns.items() if column[row] >= 0}
                problems += [f"{path}: {meta.name}: {name} is {fields.get(name)!r}, the index says {value!r}"
                             for name, value in expected.items() if fields.get(name) != value]
                try:
                    split.image(row)
                except BadImage as error:
                    problems.append(f"{path}: {error}")
    except (tarfile.TarError, ValueError, OSError) as error:
        problems.append(f"{path}: not a readable tar ({error})")
    return problems


def verify_protocol(split: Split) -> list[str]:
    """What is wrong with the rows that a protocol names."""
    name = (split.protocol or {}).get("name")
    problems = []
    if name == "verification":
        pairs = split.column("pairs")
        if pairs.ndim != 2 or pairs.shape[1] != 4 or not len(pairs):
            return [f"{split.folder}: verification needs pairs [P, 4], found {pairs.shape}"]
        if pairs[:, :2].min() < 0 or pairs[:, :2].max() >= len(split):
            return [f"{split.folder}: pairs name rows outside 0..{len(split) - 1}"]
        a, b = split.labels[pairs[:, 0]], split.labels[pairs[:, 1]]
        wrong = int(((a == b) != (pairs[:, 2] == 1)).sum())
        problems += [f"{split.folder}: {wrong} pairs contradict the labels"] * (wrong > 0)
    if name == "templates":
        problems += verify_templates(split)
    if name in ("reid", "identification"):
        roles = split.optional("role")
        problems += [f"{split.folder}: {name} needs samples of role {role}" for i, role in enumerate(ROLES[:2])
                     if not (roles == i).any()]
    return problems


def verify_templates(split: Split) -> list[str]:
    """What is wrong with the templates of a split and the lists that name them.

    A listed template without images is no error: it failed to enrol, which an evaluation has to count against it.
    """
    templates, problems = split.optional("template"), []
    ids, first = np.unique(templates, return_index=True)
    if (split.labels != split.labels[first][np.searchsorted(ids, templates)]).any():
        problems.append(f"{split.folder}: images of one template have several labels")
    for name in ("template_pairs", "template_gallery", "template_probes"):
        if name in split.index["columns"]:
            table, width = split.column(name), TABLES[name].count(",") + 1
            if table.ndim != 2 or table.shape[1] != width or not len(table):
                problems.append(f"{split.folder}: {name} is {table.shape}, want [rows, {width}]: {TABLES[name]}")
                continue
            place = np.searchsorted(ids, table[:, :2]).clip(max=len(ids) - 1)
            known = (ids[place] == table[:, :2]).all(1)
            if name == "template_pairs":
                a, b = split.labels[first[place[known]]].T
                wrong = int(((a == b) != (table[known, 2] == 1)).sum())
                problems += [f"{split.folder}: {wrong} template pairs contradict the labels"] * (wrong > 0)
            elif not (ids[place[:, 0]] == table[:, 0]).any():
                problems.append(f"{split.folder}: {name} names no template of the split")
    return problems


def verify_split(folder: Path, workers: int = 1) -> list[str]:
    """Re-read everything of a split; returns what is wrong, one line each (empty: nothing)."""
    split = Split(folder)
    numbers = range(len(split.index["shards"]))
    problems = verify_protocol(split)
    if sum(shard["samples"] for shard in split.index["shards"]) != len(split):
        problems.append(f"{folder}: the shard table does not add up to {len(split)} samples")
    with ProcessPoolExecutor(max(min(workers, len(numbers)), 1), PROCESSES, start_worker, (os.getpid(),)) as pool:
        results = pool.map(verify_shard, [folder] * len(numbers), numbers)
        for found in tqdm(results, desc=f"verify {folder}", total=len(numbers), unit="shard", disable=None):
            problems += found
    return problems
