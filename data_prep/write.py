

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, wraps
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_prep import InputError, progress
from data_prep.format import (
    FORMAT,
    OPTIONAL,
    READABLE,
    VERSION,
    BadImage,
    Record,
    Skipped,
    Source,
    Split,
    column_type,
    jpeg_sides,
    read_index,
)
from data_prep.records import Records, disk_error, first_copies, restrict

# fork where it is safe and quick; named, because the default differs between systems and Python versions
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


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
