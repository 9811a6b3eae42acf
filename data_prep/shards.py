"""The shard format "imic-shards/1": writing, reading and checking a split folder DATA/<domain>/<split>.

    shard-000000.tar, ...   plain tar: <key>.jpg and <key>.json side by side, readable by any WebDataset reader
    index.json              what the split is: sizes, classes, shard table with hashes, protocol, provenance
    index/*.npy             columns, one row a sample: where its JPEG lies, its label, camera, role, ..., and `hash`,
                            the first 8 bytes of the SHA-256 of the image file that it was made from; and the lists of
                            a protocol (TABLES), one row a pair or template
"""

import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tarfile
import threading
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache, wraps
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_prep import DOMAINS, InputError, progress
from data_prep.records import Records, Skipped, disk_error, first_copies, restrict

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
# fork where it is safe and quick; named, because the default differs between systems and Python versions
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


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


def open_image(data: bytes) -> tuple[Image.Image, bool]:
    """A decoded image, and whether its EXIF data say that it is to be turned; BadImage where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged tags
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=READABLE)
            image.load()  # a truncated file ends here, not in training
            return image, image.getexif().get(0x0112, 1) != 1
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(f"more than {Image.MAX_IMAGE_PIXELS // 1_000_000} million pixels") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... by format
        raise BadImage("unreadable image") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, 8 bits a channel, on white where it is transparent.

    Pillow's own conversion would cut deep pixels instead of scaling them, and show what lies under transparency.
    """
    if image.mode.startswith(("I", "F")):
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        top = pixels.max()
        # floating-point pixels are in 0..1, or numbers as of 8 or 16 bits
        white = 65535 if image.mode.startswith("I") or top > 255 else 255 if top > 1 else 1
        image = Image.fromarray(np.rint(pixels.clip(0, white) * (255 / white)).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def jpeg_sides(data: bytes | bytearray) -> tuple[int, int] | None:
    """Width and height as the header of a JPEG announces them; None where it is damaged.

    To be asked before anything is decoded: a decoder allocates what the header says, and fills up what is missing, so
    that 600 damaged bytes would cost gigabytes and a minute. Segments that have no length, and stray bytes, do not
    come before the frame header; libjpeg would pass over them and might read another header than this function.
    """
    try:
        at = 2
        while data[at] == 0xFF and (marker := data[at + 1]) != 0x01 and not 0xD0 <= marker <= 0xDA and marker >= 0xC0:
            if marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC):
                return data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6]
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    except IndexError:
        pass
    return None


def fit_image(data: bytes, size: int, fit: str, quality: int) -> bytes:
    """An encoded image as a JPEG of size x size pixels; a baseline JPEG that already fits is returned as it is.

    Args:
        data: an image in one of the formats READABLE.
        size: side in pixels.
        fit: "crop" (short side to `size`, centre crop), "squash" (ignore the aspect ratio) or "pad" (keep it, fill
            with the mean colour).
        quality: of the JPEG, 1..100, where it has to be written anew; 100 keeps the chroma of every pixel, too.

    Raises:
        BadImage: not an image, or a damaged one.
    """
    image, turned = open_image(data)
    plain = image.format == "JPEG" and image.mode in ("RGB", "L") and not image.info.get("progressive") and not turned
    if plain and jpeg_sides(data) == image.size == (size, size):  # the first is what readers of the shard go by
        return data
    image = as_rgb(ImageOps.exif_transpose(image) if turned else image)
    if fit == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    elif fit == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        mean = tuple(round(c) for c in np.asarray(image).reshape(-1, 3).mean(0))
        image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=mean)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling=0 if quality == 100 else -1)  # -1: the encoder's own, 4:2:0
    return out.getvalue()


# ---------------------------------------------------------------- writing


@contextmanager
def lock_folder(folder: Path, option: str) -> Iterator[None]:
    """Hold a folder that one process writes at a time; it is made where it is not there, and removed if it stays empty.

    The lock is POSIX's (`lockf`, not `flock`): it ends with this very process, however that ends, while children that
    were forked from it do not hold it; network file systems carry it to other nodes. Where a file system has no locks,
    there is none. A process can hold a folder once.

    Args:
        folder: to be held, in its file `.lock`, which is removed again.
        option: that named it, for messages.

    Raises:
        InputError: another process holds it, or it cannot be written to.
    """
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{option} {folder}: cannot be written ({error.strerror}): choose another, or move away what "
                         "is in its way") from error
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(file, 300, 0).decode() or "another process"
                raise InputError(f"{option} {folder}: {holder} is writing it: wait for that one, or choose another "
                                 f"{option}") from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        # after the one before has removed its file, a lock on that would hold nothing
        if not path.exists() or not os.path.samestat(os.fstat(file), path.stat()):
            raise InputError(f"{option} {folder}: the process that wrote it ended this moment: run the command again")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)
        for place in made:
            with suppress(OSError):  # it holds something
                place.rmdir()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it, rename it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def content_hash(data: bytes) -> int:
    """What tells whether two image files are the same: 64 bits, so that a mistake in 40 million images is unlikely."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8])


def read_image(record: Record) -> tuple[bytes, dict]:
    """The encoded image of a record and further fields of its JSON; BadImage where it cannot be had."""
    try:
        data = record.read()
    except OSError as error:
        raise BadImage("unreadable file") from error
    return data if isinstance(data, tuple) else (data, {})


@cache
def placeholder(size: int) -> bytes:
    """The JPEG of a listed image that could not be read: grey. Its hash in the index is 0, and no reader shows it."""
    out = io.BytesIO()
    Image.new("L", (size, size), 128).save(out, "JPEG")
    return out.getvalue()


def write_shard(folder: Path, number: int, first: int, records: list[Record], labels: list[int],
                settings: dict) -> int:
    """Write shard `number`, atomically, then its part of the index under .parts/; returns how many records it took."""
    name, rows, skipped = f"shard-{number:06d}.tar", [], []
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
                original, fields = read_image(record)
                data = fit_image(original, settings["size"], settings["fit"], settings["quality"])
            except BadImage as error:
                skipped.append((record.name, str(error)))
                if not settings["listed"]:
                    continue
                original, data, fields = None, placeholder(settings["size"]), {"unreadable": str(error)}
            key = f"{place:09d}"  # the place in the source's order: a skipped image leaves a gap
            meta = {"key": key, "domain": settings["domain"], "label": label, "identity": record.identity,
                    "source": settings["source"]}
            optional = {c: getattr(record, c) for c in ("person", *OPTIONAL) if getattr(record, c) is not None}
            offset = add(f"{key}.jpg", data)
            add(f"{key}.json", json.dumps(meta | optional | fields).encode())
            rows.append([place, offset, len(data), label, *(optional.get(c, -1) for c in OPTIONAL),
                         content_hash(original) if original is not None else 0])
    with open(temporary, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    size = temporary.stat().st_size
    os.replace(temporary, folder / name)
    part = {"file": name, "samples": len(rows), "bytes": size, "sha256": digest, "rows": rows, "skipped": skipped}
    write_bytes(folder / ".parts" / f"{name}.json", json.dumps(part).encode())
    return len(records)


def start_worker(parent: int) -> None:
    """One thread a worker, which ends with its parent: a killed preparation must leave nobody who still writes."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts the whole group; the parent speaks for all
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


def told_of_disk(function: Callable) -> Callable:
    """The function, whose first argument is the folder that it writes; InputError where the disk does not take it."""
    @wraps(function)
    def call(folder: Path, *arguments, **options):
        try:
            return function(folder, *arguments, **options)
        except OSError as error:
            raise disk_error(folder, error) from error

    return call


@told_of_disk
def write_split(folder: Path, source: Source, *, source_name: str, size: int, fit: str, quality: int, train: bool,
                seed: int = 0, shard_size: int = 2048, workers: int = 1, options: dict | None = None,
                drop_duplicates: bool = False, data_set: list[str] | None = None) -> dict:
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
        drop_duplicates: read every image first, and leave out those whose content came before in the source or, of a
            training split, is in a finished test split of the domain.
        data_set: names of the data sets that the images come from (default: `source_name`); of several, each image's
            own stands in its JSON.

    Returns:
        The index.

    Raises:
        InputError: nothing to write, or a folder that holds something else.
    """
    domain, split = folder.parts[-2:]
    if not isinstance(source.records, Records):
        source = replace(source, records=Records(source.records, folder))
    if not source.records:
        raise InputError(f"{folder}: the source holds no images"
                         + "".join(f"; {n} left out: {reason}" for reason, n in source.skipped.items()))
    data_set = data_set or [source_name]
    settings = {"domain": domain, "source": data_set[0], "size": size, "fit": fit, "quality": quality,
                "listed": source.listed and source.protocol is not None}
    choices = [train, seed, shard_size, source.deal is not None, *(["drop duplicates"] if drop_duplicates else [])]
    plan = hashlib.sha256(json.dumps([FORMAT, VERSION, source_name, settings, *choices, source.protocol, source.pairs,
                                      sorted(source.names.items())]).encode())
    for record in source.records:
        optional = (getattr(record, name) for name in OPTIONAL)
        plan.update(repr((record.name, record.identity, record.person, *optional)).encode())
    for name, rows in source.tables.items():
        plan.update(name.encode() + rows.tobytes())
    plan = plan.hexdigest()
    if (folder / "index.json").exists():
        index = read_index(folder)
        if index["provenance"].get("plan") == plan:
            for leftover in (folder / ".parts", *folder.glob("*.tmp")):  # of a kill after the last step
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
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

    if drop_duplicates:
        keep = unique_images(folder, source.records, train, workers)
        source = restrict(source, keep, "copy of another image", named=True)
    records = source.records
    classes, labels = records.labels()
    order = random_order(len(records), source.blocks, seed) if train else np.arange(len(records))

    def tasks() -> Iterator[tuple]:
        for number, first in enumerate(range(0, len(records), shard_size)):
            places = order[first : first + shard_size]
            if not part_path(folder, number).exists():
                yield folder, number, first, [records[i] for i in places], labels[places].tolist(), settings

    shards = -(-len(records) // shard_size)
    finished = sum(part_path(folder, number).exists() for number in range(shards))
    with progress(total=len(records), initial=min(finished * shard_size, len(records)), desc=f"{domain}/{split}",
                  unit="img") as bar:
        for done in in_parallel(write_shard, tasks(), min(workers, shards)):
            bar.update(done)

    table, place = write_columns(folder, shards, settings["listed"])
    for name, rows in source.tables.items():
        np.save(folder / "index" / f"{name}.npy", rows)
    protocol, misses = source.protocol, int((np.load(folder / "index" / "hash.npy", mmap_mode="r") == 0).sum())
    bad = [(name, reason) for part in table for name, reason in part.pop("skipped")]
    if protocol:
        counts = {"misses": misses, "unreadable": protocol.get("unreadable", 0) + len(bad) - misses}
        protocol = protocol | {key: n for key, n in counts.items() if n}
    if source.deal and protocol and not len(source.pairs):
        np.save(folder / "index" / "role.npy", source.deal(np.load(folder / "index" / "label.npy"), classes))
    if len(source.pairs):
        row_of = np.full(len(records) + 1, -1)  # the last entry serves ends that are gone already
        row_of[order[place]] = np.arange(len(place))
        pairs = np.array(source.pairs)
        pairs[:, :2] = row_of[pairs[:, :2]]
        lost = (pairs[:, :2] < 0).any(1)
        pairs = pairs[~lost]
        if source.deal:
            pairs[:, 3] = source.deal(pairs[:, 2])
            protocol = protocol | {"folds": len(np.unique(pairs[:, 3]))}
        np.save(folder / "index" / "pairs.npy", pairs)
        protocol = protocol | {"pairs": len(pairs), "pairs_lost": int(lost.sum())}
    left_out = write_skipped(folder, source.skipped, bad, settings["listed"])
    index = {
        "format": FORMAT, "domain": domain, "split": split, "size": size, "fit": fit, "quality": quality,
        "samples": len(place), "classes": classes, "names": [source.names.get(name, name) for name in classes],
        "shards": table, "columns": sorted(path.stem for path in (folder / "index").glob("*.npy")),
        "protocol": protocol, "skipped": left_out,
        "provenance": {"source": source_name, "data_set": data_set, "options": options or {}, "version": VERSION,
                       "seed": seed, "order": "random" if train else "source", "plan": plan},
    }
    write_bytes(folder / "index.json", (json.dumps(index, indent=1) + "\n").encode())
    shutil.rmtree(parts)
    return index


def write_skipped(folder: Path, before: Counter, bad: list[tuple[str, str]], listed: bool) -> dict[str, int]:
    """Name every file that was left out, and why, in skipped.csv; returns the counts by reason.

    Args:
        before: what the source left out; what a caller chose to leave out (--list, --max-images, ...) has no names.
        bad: name and reason of what could not be read.
        listed: that stays in the protocol, as misses.
    """
    after = Skipped(before)
    for name, reason in bad:
        after.add(name, reason + ": kept as a miss, as a list names it" * listed)
    if files := [file for skipped in (before, after) if (file := getattr(skipped, "file", None))]:
        temporary = folder / f"skipped.csv.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as out:
            out.write("file,reason\n")
            for file in files:
                file.seek(0)
                shutil.copyfileobj(file, out)
        os.replace(temporary, folder / "skipped.csv")
    return dict(+after)


def column_type(name: str) -> np.dtype:
    """What the numbers of a column are."""
    return np.dtype({"hash": np.uint64, "quality": np.float64}.get(name, np.int64))


def part_path(folder: Path, number: int) -> Path:
    """Where the index of a finished shard waits for the others."""
    return folder / ".parts" / f"shard-{number:06d}.tar.json"


def write_columns(folder: Path, shards: int, listed: bool) -> tuple[list[dict], np.ndarray]:
    """Join the parts of all shards, one at a time, into index/*.npy.

    Returns:
        The shard table, with what each shard skipped, and the place in the written order of every row, int64 [M].
    """
    table = []
    for number in range(shards):
        part = json.loads(part_path(folder, number).read_text())
        del part["rows"]
        table.append(part)
    total, unread = sum(part["samples"] for part in table), sum(len(part["skipped"]) for part in table)
    if not total or (listed and total == unread):
        raise InputError(f"{folder}: none of the images can be read")
    shutil.rmtree(folder / "index", ignore_errors=True)  # of a run that was interrupted here
    (folder / "index").mkdir()

    place, first, present = np.empty(total, dtype=np.int64), 0, set()
    with ExitStack() as stack:
        files = {}
        for name in ("shard", "offset", "length", "label", *OPTIONAL, "hash"):
            files[name] = stack.enter_context(open(folder / "index" / f"{name}.npy", "wb"))
            header = {"descr": column_type(name).str, "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(files[name], header)
        for number in range(shards):  # appended, not mapped: a full disk is an error here and would be a crash there
            rows = json.loads(part_path(folder, number).read_text())["rows"]
            columns = dict(zip(("place", *list(files)[1:]), zip(*rows, strict=True), strict=False))
            columns["shard"] = [number] * len(rows)
            place[first : first + len(rows)] = columns.pop("place", [])
            first += len(rows)
            for name, values in columns.items():
                values = np.array(values, dtype=column_type(name))
                files[name].write(values)
                if name in OPTIONAL and (values >= 0).any():
                    present.add(name)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    for name in set(OPTIONAL) - present:
        (folder / "index" / f"{name}.npy").unlink()
    return table, place


def hash_images(records: list[Record]) -> list[int]:
    """The content hash of each image; 0 where it cannot be read."""
    hashes = []
    for record in records:
        try:
            hashes.append(content_hash(read_image(record)[0]))
        except BadImage:
            hashes.append(0)
    return hashes


def unique_images(folder: Path, records: Records, train: bool, workers: int) -> np.ndarray:
    """Which records `drop_duplicates` keeps, bool [N].

    The answer is kept with the unfinished split: a preparation that is continued must not see test splits that came
    after it began.
    """
    path = folder / ".parts" / "unique.npy"
    if path.exists():
        return np.load(path)
    blocks = [range(first, min(first + 1024, len(records))) for first in range(0, len(records), 1024)]
    hashes = np.zeros(len(records), dtype=np.uint64)
    tasks = (([records[i] for i in block],) for block in blocks)
    with progress(total=len(records), desc="look for copies", unit="img") as bar:
        for block, found in zip(blocks, in_parallel(hash_images, tasks, workers, in_order=True), strict=True):
            hashes[block.start : block.stop] = found
            bar.update(len(block))
    tests = [split.column("hash") for split in siblings(folder) if train and split.protocol and split.hashed]
    keep = first_copies(hashes, np.concatenate(tests) if tests else None)
    out = io.BytesIO()
    np.save(out, keep)
    write_bytes(path, out.getvalue())
    return keep


def siblings(folder: Path) -> list["Split"]:
    """The other finished splits of the domain."""
    return [Split(path.parent) for path in sorted(folder.parent.glob("*/index.json")) if path.parent != folder]


def in_parallel(function: Callable, tasks: Iterable[tuple], workers: int, in_order: bool = False) -> Iterator:
    """The results of function(*task) as they come, or in order; tasks are taken when a worker is about to be free.

    So memory does not grow with their number. Without a second worker everything happens in this process.
    """
    if workers <= 1:
        yield from (function(*task) for task in tasks)
        return
    tasks, others = iter(tasks), set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, PROCESSES, start_worker, (os.getpid(),)) as pool:
        try:
            running = [pool.submit(function, *task) for task in islice(tasks, 2 * workers)]
            while running:
                wait(running[:1] if in_order else running, return_when=FIRST_COMPLETED)
                done = [f for f in (running[:1] if in_order else running) if f.done()]
                running = [f for f in running if f not in done]
                running += [pool.submit(function, *task) for task in islice(tasks, len(done))]
                yield from (future.result() for future in done)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()  # nobody waits for their results any more
            if isinstance(error, BrokenProcessPool):
                raise InputError(f"one of {workers} workers was killed: out of memory? Take fewer --workers, or a "
                                 "machine with more memory; what is done stays done") from error
            raise


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
    needed = {"verification": {"folds": int}, "classification": {"reference": str}}.get(protocol["name"], {})
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
        # a reader allocates what the index says; several, as one may be damaged
        sides = {jpeg_sides(self.jpeg(row)[1]) for row in range(min(len(self), 4))} - {None}
        for place in [place for place in OPEN_FILES if place[0] is self.key]:  # most splits are only looked at
            os.close(OPEN_FILES.pop(place))
        if sides and (self.size, self.size) not in sides:
            raise InputError(f"{self.folder}/index.json: size is {self.size}, its first images have "
                             f"{'x'.join(map(str, min(sides)))} pixels; {again}")

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
        """The JSON of a sample, which lies behind its JPEG.

        Raises:
            InputError: there is none.
        """
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


def ordered_tests(splits: Iterable[Split], ood: bool = False) -> list[Split]:
    """The test splits of a domain in the order in which one of them stands for all; a training split is none of them.

    First those whose classes are the training split's own (reference `train`, or none), then by name.

    Args:
        splits: of one domain.
        ood: those out of distribution instead of those in distribution.
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


def verify_shard(folder: Path, number: int) -> list[str]:
    """What is wrong with one shard: hash, members, metadata, JPEGs."""
    split = open_split(folder)
    shard = split.index["shards"][number]
    path, problems = folder / shard["file"], []
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
            problems.append(f"{path}: sha256 differs from the index")
    rows = np.arange(*np.searchsorted(split.shard, (number, number + 1)))
    columns = {name: split.column(name) for name in OPTIONAL if name in split.index["columns"]}
    try:
        with tarfile.open(path, "r:") as tar:
            members = list(islice(tar, 2 * len(rows) + 1))  # those of a damaged tar may run in a circle
            if len(members) != 2 * len(rows):
                return [*problems, f"{path}: its members do not fit the {len(rows)} samples of the index"]
            for row, image, meta in zip(rows, members[::2], members[1::2], strict=True):
                key = image.name.removesuffix(".jpg")
                if image.name != f"{key}.jpg" or meta.name != f"{key}.json" or not key.isdigit():
                    problems.append(f"{path}: members {image.name!r}, {meta.name!r}: want <key>.jpg, <key>.json")
                    continue
                if (image.offset_data, image.size) != (split.offset[row], split.length[row]):
                    problems.append(f"{path}: {image.name} is not where the index says")
                    continue
                fields = split.fields(row)
                label = int(split.labels[row])
                expected = {"key": key, "domain": split.domain, "label": label,
                            "identity": split.classes[label] if label >= 0 else None}
                expected |= {name: column[row].item() for name, column in columns.items() if column[row] >= 0}
                if "role" not in fields:  # dealt when all images were written
                    expected.pop("role", None)
                problems += [f"{path}: {meta.name}: {name} is {fields.get(name)!r}, the index says {value!r}"
                             for name, value in expected.items() if fields.get(name) != value]
                try:
                    if not split.missing[row]:
                        split.image(row)
                except BadImage as error:
                    problems.append(f"{path}: {error}")
    except InputError as error:
        problems.append(error.message)
    except Exception as error:  # tarfile raises TarError, ValueError, IndexError, OverflowError, ... by damage
        problems.append(f"{path}: not a readable tar ({' '.join(str(error).split())[:200]})")
    return problems


def verify_protocol(split: Split) -> list[str]:
    """What is wrong with the rows that a protocol names."""
    name = (split.protocol or {}).get("name")
    problems = []
    if name == "verification":
        pairs = split.column("pairs")
        if not len(pairs):
            return [f"{split.folder}: verification needs pairs"]
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
            table = split.column(name)
            if not len(table):
                problems.append(f"{split.folder}: {name} is empty")
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
    if "merged" in split.index:
        from data_prep.merge import verify_merged  # here, because merging builds on this module

        return verify_merged(split, workers)
    numbers = range(len(split.index["shards"]))
    problems = verify_protocol(split)
    counts = [shard["samples"] for shard in split.index["shards"]]
    if not np.array_equal(split.shard, np.repeat(numbers, counts)):
        problems.append(f"{folder}/index/shard.npy: rows are not in the order of the shard table")
    open_split.cache_clear()  # the folder may have changed since it was opened here; workers inherit what is open
    results = in_parallel(verify_shard, ((folder, number) for number in numbers), min(workers, len(numbers)), True)
    for found in progress(results, desc=f"verify {folder}", total=len(numbers), unit="shard"):
        problems += found
    return problems
