

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
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from data_prep import InputError
from data_prep.format import (
    FORMAT,
    OPTIONAL,
    READABLE,
    VERSION,
    BadImage,
    Record,
    Source,
    Split,
    jpeg_sides,
    read_index,
)
from data_prep.records import Records, first_copies, restrict

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
    if plain and jpeg_sides(data) == image.size == (size, size):  # the first is what readers of the shard go by
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


def write_shard(folder: Path, number: int, first: int, records: list[Record], labels: list[int],
                settings: dict) -> int:
    """Write shard `number`, atomically, then its part of the index under .parts/; returns how many records it took."""
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
                original, fields = read_image(record)
                data = fit_image(original, settings["size"], settings["fit"], settings["quality"])
            except BadImage as error:
                skipped[str(error)] += 1
                continue
            key = f"{place:09d}"  # the place in the source's order: a skipped image leaves a gap
            meta = {"key": key, "domain": settings["domain"], "label": label, "identity": record.identity,
                    "source": settings["source"]}
            optional = {c: getattr(record, c) for c in ("person", *OPTIONAL) if getattr(record, c) is not None}
            offset = add(f"{key}.jpg", data)
            add(f"{key}.json", json.dumps(meta | optional | fields).encode())
            rows.append([place, offset, len(data), label, *(optional.get(c, -1) for c in OPTIONAL),
                         content_hash(original)])
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


def write_split(folder: Path, source: Source, *, source_name: str, size: int, fit: str, quality: int, train: bool,
                seed: int = 0, shard_size: int = 2048, workers: int = 1, options: dict | None = None,
                drop_duplicates: bool = False) -> dict:
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
    settings = {"domain": domain, "source": source_name, "size": size, "fit": fit, "quality": quality}
    choices = [train, seed, shard_size, *(["drop duplicates"] if drop_duplicates else [])]
    plan = hashlib.sha256(json.dumps([FORMAT, VERSION, settings, *choices, source.protocol, source.pairs,
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
        source = restrict(source, unique_images(folder, source.records, train, workers), "copy of another image")
    records = source.records
    classes, labels = records.labels()
    order = random_order(len(records), source.blocks, seed) if train else np.arange(len(records))

    def tasks() -> Iterator[tuple]:
        for number, first in enumerate(range(0, len(records), shard_size)):
            places = order[first : first + shard_size]
            if not part_path(folder, number).exists():
                yield folder, number, first, [records[i] for i in places], labels[places].tolist(), settings

    shards = -(-len(records) // shard_size)
    with tqdm(total=len(records), desc=f"{domain}/{split}", unit="img", disable=None) as bar:
        bar.update(min(sum(part_path(folder, number).exists() for number in range(shards)) * shard_size, len(records)))
        for done in in_parallel(write_shard, tasks(), min(workers, shards)):
            bar.update(done)

    table, place = write_columns(folder, shards)
    for name, rows in source.tables.items():
        np.save(folder / "index" / f"{name}.npy", rows)
    protocol = source.protocol
    if len(source.pairs):
        row_of = np.full(len(records) + 1, -1)  # the last entry serves ends that are gone already
        row_of[order[place]] = np.arange(len(place))
        pairs = np.array(source.pairs)
        pairs[:, :2] = row_of[pairs[:, :2]]
        lost = (pairs[:, :2] < 0).any(1)
        np.save(folder / "index" / "pairs.npy", pairs[~lost])
        protocol = protocol | {"pairs": int((~lost).sum()), "pairs_lost": int(lost.sum())}
    skipped = Counter(source.skipped)
    for part in table:
        skipped.update(part.pop("skipped"))
    index = {
        "format": FORMAT, "domain": domain, "split": split, "size": size, "fit": fit, "quality": quality,
        "samples": len(place), "classes": classes, "names": [source.names.get(name, name) for name in classes],
        "shards": table, "columns": sorted(path.stem for path in (folder / "index").glob("*.npy")),
        "protocol": protocol, "skipped": dict(skipped),
        "provenance": {"source": source_name, "options": options or {}, "version": VERSION, "seed": seed,
                       "order": "random" if train else "source", "plan": plan},
    }
    write_bytes(folder / "index.json", (json.dumps(index, indent=1) + "\n").encode())
    shutil.rmtree(parts)
    return index


def part_path(folder: Path, number: int) -> Path:
    """Where the index of a finished shard waits for the others."""
    return folder / ".parts" / f"shard-{number:06d}.tar.json"


def write_columns(folder: Path, shards: int) -> tuple[list[dict], np.ndarray]:
    """Join the parts of all shards, one at a time, into index/*.npy.

    Returns:
        The shard table, with what each shard skipped, and the place in the written order of every row, int64 [M].
    """
    table = []
    for number in range(shards):
        part = json.loads(part_path(folder, number).read_text())
        del part["rows"]
        table.append(part)
    total = sum(part["samples"] for part in table)
    if not total:
        raise InputError(f"{folder}: none of the images can be read")
    shutil.rmtree(folder / "index", ignore_errors=True)  # of a run that was interrupted here
    (folder / "index").mkdir()

    def column(name: str) -> np.ndarray:
        kind = {"hash": np.uint64, "quality": np.float64}.get(name, np.int64)
        return np.lib.format.open_memmap(folder / "index" / f"{name}.npy", "w+", kind, (total,))

    place = np.empty(total, dtype=np.int64)
    columns = {name: column(name) for name in ("shard", "offset", "length", "label", *OPTIONAL, "hash")}
    first = 0
    for number in range(shards):
        rows = json.loads(part_path(folder, number).read_text())["rows"]
        here = slice(first, first + len(rows))
        columns["shard"][here] = number
        for values, target in zip(zip(*rows, strict=True), (place, *list(columns.values())[1:]), strict=False):
            target[here] = values
        first = here.stop
    for name in OPTIONAL:
        if not (columns[name] >= 0).any():
            (folder / "index" / f"{name}.npy").unlink()
    for values in columns.values():
        values.flush()
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
    with tqdm(total=len(records), desc="look for copies", unit="img", disable=None) as bar:
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
    tasks = iter(tasks)
    with ProcessPoolExecutor(workers, PROCESSES, start_worker, (os.getpid(),)) as pool:
        running = [pool.submit(function, *task) for task in islice(tasks, 2 * workers)]
        try:
            while running:
                wait(running[:1] if in_order else running, return_when=FIRST_COMPLETED)
                done = [f for f in (running[:1] if in_order else running) if f.done()]
                running = [f for f in running if f not in done]
                running += [pool.submit(function, *task) for task in islice(tasks, len(done))]
                yield from (future.result() for future in done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
