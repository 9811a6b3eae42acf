"""Writing a split: images become JPEGs of one size in shards, in parallel and resumably."""

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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_prep import InputError, hash_file, progress, read_json, replacing, write_json, writing
from data_prep.format import (
    FORMAT,
    OPTIONAL,
    READABLE,
    VERSION,
    BadImage,
    Record,
    Skipped,
    Source,
    column_type,
    encode,
    jpeg_sides,
    read_index,
    siblings,
)
from data_prep.records import GO_ON, Records, continuing, first_copies, random_order, rank_in_group, restrict

# fork where it is safe and quick; explicit, because the default depends on the system and the Python version
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def open_image(data: bytes) -> tuple[Image.Image, bool]:
    """A decoded image, and whether its EXIF data ask for a rotation; BadImage if it cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged tags
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=READABLE)
            image.load()  # a truncated file fails here, not in training
            return image, image.getexif().get(0x0112, 1) != 1
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(f"more than {Image.MAX_IMAGE_PIXELS // 1_000_000} million pixels") from error
    except Exception as error:  # by format: OSError, SyntaxError, ValueError, struct.error, ...
        raise BadImage("unreadable image") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB with 8 bits per channel, transparent parts on white.

    Pillow's conversion would clip deeper pixels instead of scaling them and show the colours under transparency.
    """
    if image.mode.startswith(("I", "F")):
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        top = pixels.max()
        # floating-point pixels are in 0..1, 0..255 or 0..65535
        white = 65535 if image.mode.startswith("I") or top > 255 else 255 if top > 1 else 1
        image = Image.fromarray(np.rint(pixels.clip(0, white) * (255 / white)).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit_image(data: bytes, size: int, fit: str, quality: int) -> bytes:
    """An image in one of the formats READABLE as a JPEG; a baseline JPEG that already fits is returned unchanged.

    Args:
        size: side in pixels.
        fit: "crop" (short side to `size`, centre crop), "squash" (ignore the aspect ratio) or "pad" (keep it, fill
            with the mean colour).
        quality: of the JPEG, 1..100, if the image is re-encoded; 100 also switches off chroma subsampling.

    BadImage if it is damaged or no image.
    """
    image, turned = open_image(data)
    plain = image.format == "JPEG" and image.mode in ("RGB", "L") and not image.info.get("progressive") and not turned
    if plain and jpeg_sides(data) == image.size == (size, size):  # readers of the shard rely on jpeg_sides
        return data
    image = as_rgb(ImageOps.exif_transpose(image) if turned else image)
    if fit == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    elif fit == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        mean = tuple(round(c) for c in np.asarray(image).reshape(-1, 3).mean(0))
        image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=mean)
    return encode(image, "JPEG", quality=quality, subsampling=0 if quality == 100 else -1)  # -1: the default, 4:2:0


def content_hash(data: bytes) -> int:
    """Identifies the content of an image file; with 64 bits, a collision among 40 million images is unlikely."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8])


def read_image(record: Record) -> tuple[bytes, dict]:
    """The encoded image of a record and further fields of its JSON; BadImage if it cannot be read."""
    try:
        data = record.read()
    except OSError as error:
        raise BadImage("unreadable file") from error
    return data if isinstance(data, tuple) else (data, {})


@cache
def placeholder(size: int) -> bytes:
    """The grey JPEG in place of an unreadable listed image. Its hash in the index is 0, and no reader returns it."""
    return encode(Image.new("L", (size, size), 128), "JPEG")


def write_shard(part: Path, first: int, records: list[Record], labels: list[int], settings: dict) -> int:
    """Write a shard atomically, then its part of the index, .parts/<records of the split>/shard-000000.tar.json.

    `first`: place of the first record in the written order. Returns the number of records, including skipped ones.
    """
    name, rows, skipped = part.stem, [], []
    with replacing(part.parents[2] / name, f".{os.getpid()}") as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:

            def add(member: str, data: bytes) -> int:
                info = tarfile.TarInfo(member)  # default owner, time and mode: equal input gives equal bytes
                info.size = len(data)
                offset = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(info, io.BytesIO(data))
                return offset

            for place, (record, label) in enumerate(zip(records, labels, strict=True), first):
                try:
                    original, fields = read_image(record)
                    data = fit_image(original, settings["size"], settings["fit"], settings["quality"])
                except BadImage as error:
                    skipped.append((place, record.name, str(error)))
                    if not settings["listed"]:
                        continue
                    original, data, fields = None, placeholder(settings["size"]), {"unreadable": str(error)}
                key = f"{place:09d}"  # a skipped image leaves a gap
                meta = {"key": key, "domain": settings["domain"], "label": label, "identity": record.identity,
                        "source": settings["source"]}
                optional = {c: getattr(record, c) for c in ("person", *OPTIONAL) if getattr(record, c) is not None}
                offset = add(f"{key}.jpg", data)
                add(f"{key}.json", json.dumps(meta | optional | fields).encode())
                rows.append([place, offset, len(data), label, *(optional.get(c, -1) for c in OPTIONAL),
                             content_hash(original) if original is not None else 0])
        digest, size = hash_file(temporary), temporary.stat().st_size
    table = {"file": name, "samples": len(rows), "bytes": size, "sha256": digest}
    with replacing(part) as temporary:
        temporary.write_text(json.dumps({"table": table, "rows": rows, "skipped": skipped}))
    return len(records)


def start_worker(parent: int) -> None:
    """Give a worker one thread, and end it with its parent: after a kill, no worker may go on writing."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; only the parent reports it
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_split(folder: Path, source: Source, *, source_name: str, size: int, fit: str, quality: int, train: bool,
                seed: int = 0, shard_size: int = 2048, workers: int = 1, options: dict | None = None,
                drop_duplicates: bool = False, max_images: int | None = None, data_set: list[str] | None = None
                ) -> dict:
    """Write a split folder; continues an unfinished one and leaves a complete one with the same plan unchanged.

    Labels number the classes that have a readable (or listed) image. Returns the index.

    Args:
        folder: DATA/<domain>/<split>.
        source_name: as on the command line.
        size, fit, quality: see `fit_image`.
        train: write in a random order drawn with `seed` (otherwise in source order).
        shard_size: records per shard.
        options: recorded as provenance.
        drop_duplicates: read every image first, and leave out those whose content appeared earlier in the source or,
            for a training split, in a finished test split of the domain.
        max_images: see `first_readable`.
        data_set: names of the data sets of the images (default: `source_name`); if there are several, each image's JSON
            names its own.

    InputError if there is nothing to write, the folder holds something else, or the disk is full.
    """
    if not isinstance(source.records, Records):
        source = replace(source, records=Records(source.records, folder))
    if not source.records:
        raise InputError(f"{folder}: the source holds no images"
                         + "".join(f"; {n} left out: {reason}" for reason, n in source.skipped.items()))
    data_set = data_set or [source_name]
    settings = {"domain": folder.parent.name, "source": data_set[0], "size": size, "fit": fit, "quality": quality,
                "listed": source.listed and source.protocol is not None}
    choices = [train, seed, shard_size, source.deal is not None, *(["drop duplicates"] if drop_duplicates else []),
               *([f"max images {max_images}"] if max_images else [])]
    plan = plan_of(source, [FORMAT, VERSION, source_name, settings, *choices])
    with writing(folder, GO_ON, "--out"), continuing(folder / ".parts"):
        if (index := begin(folder, plan)) is not None:
            print(f"{folder}: complete")
            return index
        if drop_duplicates:
            keep = remember(folder / ".parts/unique.npy", unique_images, folder, source.records, train, workers)
            source = restrict(source, keep, "copy of another image", named=True)
        if max_images:
            keep = remember(folder / ".parts/first.npy", first_readable, source, max_images, workers)
            source = restrict(source, keep, "image beyond --max-images")
        fields, bad, lost = write_images(folder, source, settings, seed if train else None, shard_size, workers)
        index = {
            "format": FORMAT, "domain": settings["domain"], "split": folder.name, "size": size, "fit": fit,
            "quality": quality, **fields, "skipped": write_skipped(folder, source.skipped, bad, settings["listed"]),
            "provenance": {"source": source_name, "data_set": data_set, "options": options or {}, "version": VERSION,
                           "seed": seed, "order": "random" if train else "source", "plan": plan},
            **({"unreadable_classes": lost} if lost else {}),
        }
        write_json(folder / "index.json", index, 1)
        shutil.rmtree(folder / ".parts")
    return index


def plan_of(source: Source, choices: list) -> str:
    """SHA-256 of everything that determines a split: the options and the source's description of its images."""
    plan = hashlib.sha256(json.dumps([*choices, source.protocol, source.pairs, sorted(source.names.items())]).encode())
    for record in source.records:
        optional = (getattr(record, name) for name in OPTIONAL)
        plan.update(repr((record.name, record.identity, record.person, *optional)).encode())
    for name, rows in source.tables.items():
        plan.update(name.encode() + rows.tobytes())
    return plan.hexdigest()


def begin(folder: Path, plan: str) -> dict | None:
    """The index of a split that was finished by this plan; otherwise None, and `.parts` is ready for writing."""
    parts = folder / ".parts"
    if (folder / "index.json").exists():
        index = read_index(folder)
        if index["provenance"]["plan"] != plan:
            raise InputError(f"{folder} already holds another split: remove it or choose another --out")
        shutil.rmtree(parts, ignore_errors=True)  # left by a kill after the last step
    elif (parts / "plan").exists() and (parts / "plan").read_text() != plan:
        raise InputError(f"{folder} holds an unfinished preparation with other options: finish it or remove it")
    else:
        index = None
        parts.mkdir(parents=True, exist_ok=True)
        with replacing(parts / "plan") as temporary:
            temporary.write_text(plan)
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    return index


def write_images(folder: Path, source: Source, settings: dict, seed: int | None, shard_size: int, workers: int
                 ) -> tuple[dict, list[tuple[str, str]], list[str]]:
    """Write shards and columns; finished ones stay.

    Only writing shows whether a class has a readable image, but labels, which each sample's JSON holds, must not number
    one without. If there is one, the split is written again without it; the first parts stay until all is done.
    `seed`: of the order; None: source order. Returns fields of the index; name and reason of each unreadable image;
    classes without a readable image.
    """
    dropped, lost = [], []
    while True:
        records = source.records
        classes, labels = records.labels()
        order = np.arange(len(records)) if seed is None else random_order(len(records), source.blocks, seed)
        table, place, bad = write_shards(folder, records, labels, order, settings, shard_size, workers)
        label = np.load(folder / "index/label.npy")
        if not len(empty := np.setdiff1d(np.arange(len(classes)), label)):
            break
        gone = np.isin(labels, empty)
        dropped += [(name, reason) for at, name, reason in bad if gone[order[at]]]
        lost += [classes[i] for i in empty]
        source = restrict(source, ~gone, None)

    for path in set(folder.glob("shard-*.tar")) - {folder / shard["file"] for shard in table}:  # of the first writing
        path.unlink()
    for name, rows in source.tables.items():
        np.save(folder / f"index/{name}.npy", rows)
    protocol, misses = source.protocol, int((np.load(folder / "index/hash.npy", mmap_mode="r") == 0).sum())
    if protocol:
        unreadable = protocol.get("unreadable", 0) + len(dropped) + len(bad) - misses
        protocol = protocol | {key: n for key, n in (("misses", misses), ("unreadable", unreadable)) if n}
    if len(source.pairs):
        row_of = np.full(len(records) + 1, -1)  # the last entry serves ends that are already gone (-1)
        row_of[order[place]] = np.arange(len(place))
        pairs = np.array(source.pairs)
        pairs[:, :2] = row_of[pairs[:, :2]]
        lost_pairs = (pairs[:, :2] < 0).any(1)
        pairs = pairs[~lost_pairs]
        if source.deal:
            pairs[:, 3] = source.deal(pairs[:, 2])
            protocol = protocol | {"folds": len(np.unique(pairs[:, 3]))}
        np.save(folder / "index/pairs.npy", pairs)
        protocol = protocol | {"pairs": len(pairs), "pairs_lost": int(lost_pairs.sum())}
    elif source.deal and protocol:
        np.save(folder / "index/role.npy", source.deal(label, classes))
    fields = {"samples": len(place), "classes": classes, "names": [source.names.get(name, name) for name in classes],
              "shards": table, "columns": sorted(path.stem for path in (folder / "index").glob("*.npy")),
              "protocol": protocol}
    return fields, dropped + [(name, reason) for _, name, reason in bad], lost


def write_shards(folder: Path, records: Records, labels: np.ndarray, order: np.ndarray, settings: dict, shard_size: int,
                 workers: int) -> tuple[list[dict], np.ndarray, list[tuple]]:
    """Write the missing shards and the columns of all; see `write_columns`."""
    starts = range(0, len(records), shard_size)
    parts = [folder / f".parts/{len(records)}/shard-{number:06d}.tar.json" for number in range(len(starts))]
    parts[0].parent.mkdir(exist_ok=True)
    missing = [(part, start) for part, start in zip(parts, starts, strict=True) if not part.exists()]

    def tasks() -> Iterator[tuple]:
        for part, start in missing:
            places = order[start : start + shard_size]
            yield part, start, [records[i] for i in places], labels[places].tolist(), settings

    finished = min((len(parts) - len(missing)) * shard_size, len(records))
    with progress(total=len(records), initial=finished, desc=f"{settings['domain']}/{folder.name}", unit="img") as bar:
        for done in in_parallel(write_shard, tasks(), min(workers, len(parts))):
            bar.update(done)
    return write_columns(folder, parts, settings["listed"])


def write_columns(folder: Path, parts: list[Path], listed: bool) -> tuple[list[dict], np.ndarray, list[tuple]]:
    """Join the parts of all shards, one at a time, into index/*.npy.

    Returns the shard table; the place of every row in the written order, int64 [M]; place, name and reason of each
    unreadable image.
    """
    table, bad = [], []
    for part in map(read_json, parts):
        table.append(part["table"])
        bad += part["skipped"]
    total = sum(shard["samples"] for shard in table)
    if not total or (listed and total == len(bad)):
        raise InputError(f"{folder}: none of the images can be read")
    shutil.rmtree(folder / "index", ignore_errors=True)  # left by an interruption at this point
    (folder / "index").mkdir()

    place, first, present = np.empty(total, dtype=np.int64), 0, set()
    with ExitStack() as stack:
        files = {}
        for name in ("shard", "offset", "length", "label", *OPTIONAL, "hash"):
            files[name] = stack.enter_context(open(folder / "index" / f"{name}.npy", "wb"))
            header = {"descr": column_type(name).str, "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(files[name], header)
        for number, part in enumerate(parts):  # written, not mapped: a full disk raises an error instead of SIGBUS
            rows = read_json(part)["rows"]
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
    return table, place, bad


def write_skipped(folder: Path, skipped: Skipped, bad: list[tuple[str, str]], listed: bool) -> dict[str, int]:
    """Write skipped.csv, the name and reason of every skipped file; returns counts by reason.

    `skipped`: files left out before writing (those that an option left out are only counted). `bad`: unreadable images,
    by name and reason, which are added; they stay in the split as misses if `listed`.
    """
    for name, reason in bad:
        skipped.add(name, reason + ": kept as a miss, as a list names it" * listed)
    if skipped.file:
        with replacing(folder / "skipped.csv") as temporary, open(temporary, "wb") as out:
            out.write(b"file,reason\n")
            skipped.file.seek(0)
            shutil.copyfileobj(skipped.file.buffer, out)
    return dict(+skipped)


# ---------------------------------------------------------------- images that are read before they are written


def remember(path: Path, compute: Callable[..., np.ndarray], *arguments) -> np.ndarray:
    """The array that a function computes, cached in a file until the preparation is finished.

    A continued preparation thus decides as before, even if a test split or a damaged image has appeared since.
    """
    if not path.exists():
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, compute(*arguments))
    return np.load(path)


def hash_images(records: list[Record], decode: bool) -> list[int]:
    """The content hash of each image; 0 if it cannot be read or, with `decode`, decoded."""
    hashes = []
    for record in records:
        try:
            data, _ = read_image(record)
            hashes.append(content_hash(data) if not decode or open_image(data) else 0)
        except BadImage:
            hashes.append(0)
    return hashes


def hash_places(records: Records, places: np.ndarray, decode: bool, workers: int) -> np.ndarray:
    """`hash_images` of the records at these places, in parallel, uint64."""
    blocks = [places[start : start + 256] for start in range(0, len(places), 256)]
    tasks = (([records[i] for i in block], decode) for block in blocks)
    hashes = progress(in_parallel(hash_images, tasks, workers), total=len(blocks), desc="hash images", unit="block")
    return np.fromiter(chain.from_iterable(hashes), dtype=np.uint64, count=len(places))


def unique_images(folder: Path, records: Records, train: bool, workers: int) -> np.ndarray:
    """Which records `drop_duplicates` keeps, bool [N]."""
    hashes = hash_places(records, np.arange(len(records)), False, workers)
    tests = [split.column("hash") for split in siblings(folder) if train and split.protocol and split.hashed]
    return first_copies(hashes, np.concatenate(tests) if tests else None)


def first_readable(source: Source, most: int, workers: int) -> np.ndarray:
    """Which records --max-images keeps, bool [N]: the first `most` readable images of each identity.

    In a test split images are counted per role; where roles are assigned later, one more is kept for the gallery.
    Unreadable images between the kept ones stay, too: writing them reports them.
    """
    records, most = source.records, most + (source.deal is not None and not len(source.pairs))
    group, people = records.identity.astype(np.int64) * 8 + records.role, records.identity >= 0
    good, known = np.ones(len(records), dtype=bool), ~people
    while True:
        keep = (rank_in_group(group, good) < most) | ~people
        if not len(places := np.flatnonzero(keep & ~known)):
            return keep
        good[places] = hash_places(records, places, True, workers) > 0
        known[places] = True


def in_parallel(function: Callable, tasks: Iterable[tuple], workers: int) -> Iterator:
    """The results of function(*task) in the order of the tasks, computed in this process if there is one worker.

    Tasks are drawn as workers become free, so that memory does not grow with their number.
    """
    if workers <= 1:
        yield from (function(*task) for task in tasks)
        return
    tasks, others = iter(tasks), set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, PROCESSES, start_worker, (os.getpid(),)) as pool:
        try:
            running = deque(pool.submit(function, *task) for task in islice(tasks, 2 * workers))
            while running:
                result = running.popleft().result()
                running.extend(pool.submit(function, *task) for task in islice(tasks, 1))
                yield result
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()  # their results are no longer wanted
            if isinstance(error, BrokenProcessPool):
                raise InputError(f"one of {workers} workers was killed: out of memory? Take fewer --workers, or a "
                                 "machine with more memory; finished shards are kept") from error
            raise
