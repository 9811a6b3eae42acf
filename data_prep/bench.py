"""Speed of writing and reading shards, beside what decoding and encoding alone allow on the same cores.

The contenders take turns, round by round, so that a busy minute of the machine hits them all; medians are compared.
Every contender runs in `workers` processes of its own, each with its share of the images, and delivers decoded images
with their labels to the process that decoded them. Pictures are drawn here.
"""

import io
import json
import multiprocessing.connection
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data_prep import InputError
from data_prep.demo import draw_face
from data_prep.shards import PROCESSES, Record, Source, Split, decoder, fit_image, write_split
from data_prep.stream import Batches, Order, Stream

BATCH = 64
DISTINCT = 200  # pictures that are drawn; a corpus repeats them
CLASSES = 50


def draw_pictures(size: int) -> list[bytes]:
    """Encoded pictures of size x size pixels with some grain: about as many bytes as a photograph of that size."""
    pictures = []
    for i in range(DISTINCT):
        face = Image.open(io.BytesIO(draw_face(0, i, 0))).resize((size, size), Image.Resampling.BICUBIC)
        grain = np.random.default_rng(i).normal(0, 4, (size, size, 3))
        out = io.BytesIO()
        Image.fromarray((np.asarray(face) + grain).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        pictures.append(out.getvalue())
    return pictures


# ---------------------------------------------------------------- contenders: each yields how many images came


def shuffled(split: Split, part: int, parts: int) -> np.ndarray:
    """A process's share of the rows, in the order of training."""
    order = Order([shard["samples"] for shard in split.index["shards"]], 0, 0, 8)
    return np.array([order(n)[1] for n in range(part, len(split), parts)])


def decode_only(folder: Path, part: int, parts: int) -> Iterator[int]:
    """The ceiling: JPEGs in memory, decoded and dropped."""
    split = Split(folder)
    data = [bytearray(split.jpeg(row)[1]) for row in shuffled(split, part, parts)]
    decode = decoder()
    while True:
        for jpeg in data:
            decode(jpeg)
        yield len(data)


def our_images(folder: Path, part: int, parts: int) -> Iterator[int]:
    """Images and labels one by one, shuffled."""
    split = Split(folder)
    rows = shuffled(split, part, parts).tolist()
    while True:
        for row in rows:
            split.image(row)
            int(split.labels[row])
        yield len(rows)


def our_batches(folder: Path, part: int, parts: int) -> Iterator[int]:
    """Shuffled batches in one tensor, as embeddings are computed."""
    split = Split(folder)
    batches = Batches(split, shuffled(split, part, parts), BATCH)
    while True:
        for b in range(len(batches)):
            rows, _ = batches[b]
            split.labels[rows]
        yield len(batches.rows)


def our_stream(folder: Path, part: int, parts: int) -> Iterator[int]:
    """Training batches: shuffled, in one tensor, with the draws of crop and mirror."""
    split = Split(folder)
    steps = max(len(split) // BATCH, parts)
    stream = Stream([split], np.full((steps, 1), BATCH), seed=0, crop=[0.8])
    while True:
        for step in range(part, steps, parts):
            stream[step]
        yield BATCH * len(range(part, steps, parts))


def library(folder: Path, part: int, parts: int, batched: bool) -> Iterator[int]:
    """The `webdataset` library with the same decoder, shuffled in the way that it recommends."""
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("shard-*.tar"))][part::parts]
    decode = decoder()

    def sample(fields: dict) -> tuple[torch.Tensor, int]:
        return decode(bytearray(fields["jpg"])), json.loads(fields["json"])["label"]

    images = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).map(sample)
    while True:
        if batched:
            yield sum(len(labels) for _, labels in images.batched(BATCH))
        else:
            yield sum(1 for _ in images)


def decode_and_encode(files: list[Path], size: int, part: int, parts: int) -> Iterator[int]:
    """The ceiling of preparing: images in memory, decoded, resized, encoded and dropped."""
    data = [path.read_bytes() for path in files[part::parts]]
    while True:
        for image in data:
            fit_image(image, size, "squash", 95)
        yield len(data)


READERS: dict[str, Callable] = {
    "decode only": decode_only, "ours, images": our_images, "ours, batches": our_batches, "ours, training": our_stream,
    "webdataset, images": partial(library, batched=False), "webdataset, batches": partial(library, batched=True),
}  # fmt: skip


# ---------------------------------------------------------------- measuring


def repeat(contender: Callable, part: int, parts: int, seconds: float, start, results) -> None:
    """In a process of its own: one pass to warm up, then passes for some seconds; puts images a second."""
    torch.set_num_threads(1)
    passes = contender(part=part, parts=parts)
    next(passes)
    start.wait()
    begin, images = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        images += next(passes)
    results.put(images / (time.perf_counter() - begin))


def rate(contender: Callable, workers: int, seconds: float) -> float:
    """Images a second of so many processes together."""
    start, results = PROCESSES.Barrier(workers), PROCESSES.SimpleQueue()
    processes = [PROCESSES.Process(target=repeat, args=(contender, part, workers, seconds, start, results), daemon=True)
                 for part in range(workers)]
    for process in processes:
        process.start()
    while not all(process.exitcode is not None for process in processes):
        multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None])
        if any(process.exitcode for process in processes):  # the others would wait for it at the start
            for process in processes:
                process.terminate()
            raise InputError("bench: a process ended early; --debug with --workers 1 may say why")
    return sum(results.get() for _ in processes)


def preparing(folder: Path, files: list[Path], size: int, workers: int) -> float:
    """Images a second of a whole preparation."""
    records = [Record(partial(Path.read_bytes, path), path.name, f"{i % CLASSES:03d}") for i, path in enumerate(files)]
    begin = time.perf_counter()
    write_split(folder, Source(records), source_name="bench", size=size, fit="squash", quality=95, train=True,
                shard_size=128, workers=workers)
    return len(files) / (time.perf_counter() - begin)


def bench_size(scratch: Path, size: int, images: int, prepared: int, rounds: int, seconds: float, workers: int
               ) -> dict[str, dict[str, list[float]]]:
    """Images a second of every contender in every round: {"read": {contender: [...]}, "write": {...}}."""
    pictures, large = draw_pictures(size), draw_pictures(size * 3 // 2)
    split = scratch / f"{size}/face_hq/train"
    records = [Record(partial(bytes, pictures[i % DISTINCT]), str(i), f"{i % CLASSES:03d}") for i in range(images)]
    # at least eight shards a process, for the library deals shards to processes
    write_split(split, Source(records), source_name="bench", size=size, fit="squash", quality=95, train=True,
                shard_size=max(images // (8 * workers), 1))
    files = [scratch / f"{size}-{i:05d}.jpg" for i in range(prepared)]
    for i, path in enumerate(files):
        path.write_bytes(large[i % DISTINCT])
    read: dict[str, list[float]] = {name: [] for name in READERS}
    write: dict[str, list[float]] = {}
    try:
        version("webdataset")
    except PackageNotFoundError:
        print("webdataset is not installed (it is in requirements-dev.txt): measured without it")
        read = {name: [] for name in READERS if not name.startswith("webdataset")}
    for number in tqdm(range(rounds), desc=f"{size} px", unit="round", disable=None):
        for name in read:
            read[name].append(rate(partial(READERS[name], split), workers, seconds))
        for n in sorted({1, workers}):
            write.setdefault(f"decode and encode, {n} workers", []).append(
                rate(partial(decode_and_encode, files, size), n, seconds))
            write.setdefault(f"prepare, {n} workers", []).append(
                preparing(scratch / f"{size}-{number}-{n}/face_hq/train", files, size, n))
    return {"read": read, "write": write}


def machine() -> dict[str, object]:
    """Where it was measured."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow")}
    return {"cpu": model, "cores": os.cpu_count(), "load before": [round(x, 2) for x in os.getloadavg()],
            "python": platform.python_version(), **versions}


def goals(size: int, median: dict[str, float], workers: int) -> list[tuple[str, float, float]]:
    """(what, measured ratio, goal) of one size."""
    found = [("reader / decode only", median["ours, images"] / median["decode only"], 0.9)]
    for kind in ("images", "batches"):
        if f"webdataset, {kind}" in median:
            found.append((f"reader / webdataset, {kind}", median[f"ours, {kind}"] / median[f"webdataset, {kind}"],
                          1.3 if size <= 112 else 1.1))
    if workers == 2:
        found.append(("prepare, 2 workers / 1", median["prepare, 2 workers"] / median["prepare, 1 workers"], 1.8))
    return found


def run_bench(sizes: tuple[int, ...], images: int, prepared: int, rounds: int, seconds: float, workers: int,
              scratch: Path | None) -> dict:
    """Measure everything, print the tables and return them."""
    result: dict = {"machine": machine(), "workers": workers, "rounds": rounds, "sizes": {}}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            found = bench_size(Path(folder), size, images, prepared, rounds, seconds, workers)
        median = {}
        for title, ceiling in (("read", "decode only"), ("write", f"decode and encode, {workers} workers")):
            print(f"\n{title}, {size} px, median of {rounds} rounds" + f", {workers} processes" * (title == "read"))
            print(f"  {'':28s}{'images/s':>10s}{'p20':>9s}{'p80':>9s}{'of ceiling':>12s}")
            top = float(np.median(found[title][ceiling]))
            for name, rates in found[title].items():
                low, median[name], high = np.percentile(rates, (20, 50, 80)).tolist()
                print(f"  {name:28s}{median[name]:10,.0f}{low:9,.0f}{high:9,.0f}{median[name] / top:12.2f}")
        verdicts = goals(size, median, workers)
        print("".join(f"\n  {what}: {ratio:.2f} (goal {goal}) {'met' if ratio >= goal else 'MISSED'}"
                      for what, ratio, goal in verdicts))
        result["sizes"][size] = found | {"goals": [
            {"what": what, "ratio": round(ratio, 3), "goal": goal} for what, ratio, goal in verdicts]}
    return result
