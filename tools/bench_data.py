"""Speed of writing and reading shards, compared with decoding and encoding alone on the same cores.

Every contender runs in `workers` processes of its own, each with its part of the images, which it decodes and consumes
with their labels. Contenders alternate in turns of a fraction of a second, so that other load on the machine affects
all of them, and goals are judged by the median ratio of consecutive turns. Pictures are synthetic: some with the
spectrum of photographs and at least their bytes, by which goals are judged, and smooth ones.
"""

import io
import json
import os
import platform
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_prep import InputError, progress
from data_prep.demo import draw_face
from data_prep.format import Record, Source, Split, decoder, encode
from data_prep.stream import Batches, Order, Stream
from data_prep.write import PROCESSES, fit_image, write_split

BATCH = 64
DISTINCT = 200  # distinct pictures; a corpus repeats them
CLASSES = 50


def draw_smooth(size: int, i: int) -> np.ndarray:
    """A drawn face with some grain [size, size, 3]."""
    face = Image.open(io.BytesIO(draw_face(0, i, 0))).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(face) + np.random.default_rng(i).normal(0, 4, (size, size, 3))


def draw_photograph(size: int, i: int) -> np.ndarray:
    """Light and colour whose amplitudes fall as 1 / frequency, as in natural images [size, size, 3].

    Source: Field, J. Opt. Soc. Am. A 4, 2379 (1987).
    """
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    noise = np.fft.rfft2(np.random.default_rng(i).standard_normal((3, size, size)))
    noise = np.fft.irfft2(noise * (frequency > 0) / np.maximum(frequency, 0.5 / size), s=(size, size))
    light, red, blue = noise / noise.std((1, 2), keepdims=True) * [[[45]], [[12]], [[12]]]
    return 128 + np.stack([light + red, light - red / 2 - blue / 2, light + blue], axis=2)


KINDS = {"read": draw_photograph, "read, smooth pictures": draw_smooth}


def draw_pictures(draw: Callable, size: int) -> list[bytes]:
    """Encoded pictures of size x size pixels."""
    pictures = (Image.fromarray(draw(size, i).clip(0, 255).astype(np.uint8)) for i in range(DISTINCT))
    return [encode(picture, "JPEG", quality=90) for picture in pictures]


# ---------------------------------------------------------------- contenders: endless iterators of numbers of images


def shuffled(split: Split, part: int, parts: int) -> np.ndarray:
    """The rows of one process, in the order of training."""
    order = Order([shard["samples"] for shard in split.index["shards"]], 0, 0)
    return order(np.arange(part, len(split), parts))[1]


def decode_only(folder: Path, part: int, parts: int) -> Iterator[int]:
    """The ceiling of reading: JPEGs in memory, decoded and discarded."""
    split, decode = Split(folder), decoder()
    for jpeg in cycle([bytearray(split.jpeg(row)[1]) for row in shuffled(split, part, parts)]):
        decode(jpeg)
        yield 1


def our_images(folder: Path, part: int, parts: int) -> Iterator[int]:
    """Images and labels one by one, shuffled."""
    split = Split(folder)
    for row in cycle(shuffled(split, part, parts).tolist()):
        split.image(row)
        int(split.labels[row])
        yield 1


def our_batches(folder: Path, part: int, parts: int) -> Iterator[int]:
    """Shuffled batches in one tensor, as for computing embeddings."""
    split = Split(folder)
    batches = Batches(split, shuffled(split, part, parts), BATCH)
    for b in cycle(range(len(batches))):
        rows, _ = batches[b]
        split.labels[rows]
        yield len(rows)


def our_stream(folder: Path, part: int, parts: int) -> Iterator[int]:
    """Training batches: shuffled, in one tensor, with random crops and flips."""
    split = Split(folder)
    steps = max(len(split) // BATCH, parts)
    stream = Stream([split], np.full((steps, 1), BATCH), seed=0, crop=[0.8])
    for step in cycle(range(part, steps, parts)):
        stream[step]
        yield BATCH


def library(folder: Path, part: int, parts: int, batched: bool) -> Iterator[int]:
    """The `webdataset` library with the same decoder, shuffled as it recommends."""
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("shard-*.tar"))][part::parts]
    decode = decoder()

    def sample(fields: dict) -> tuple[torch.Tensor, int]:
        return decode(bytearray(fields["jpg"])), json.loads(fields["json"])["label"]

    images = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).map(sample)
    while True:
        yield from (len(labels) for _, labels in images.batched(BATCH)) if batched else (1 for _ in images)


def decode_and_encode(files: list[Path], size: int, part: int, parts: int) -> Iterator[int]:
    """The ceiling of preparing: images in memory, decoded, resized, encoded and discarded."""
    for image in cycle([path.read_bytes() for path in files[part::parts]]):
        fit_image(image, size, "squash", 95)
        yield 1


READERS: dict[str, Callable] = {
    "decode only": decode_only, "ours, images": our_images, "ours, batches": our_batches, "ours, training": our_stream,
    "webdataset, images": partial(library, batched=False), "webdataset, batches": partial(library, batched=True),
}  # fmt: skip


# ---------------------------------------------------------------- measuring


def take_turns(contender: Callable, part: int, parts: int, seconds: float, pipe) -> None:
    """Run in a process of its own: at every message, read for `seconds` and send back images per second."""
    torch.set_num_threads(1)
    images = contender(part=part, parts=parts)
    while pipe.recv():
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            count += next(images)
        pipe.send(count / (time.perf_counter() - begin))


@contextmanager
def contestants(contenders: dict[str, Callable], workers: int, seconds: float) -> Iterator[Callable[[str], float]]:
    """Start the processes of every contender; yields a function from a name to images per second in one turn."""
    pipes: dict[str, list] = {name: [] for name in contenders}
    processes = []

    def take_turn(name: str) -> float:
        try:
            for pipe in pipes[name]:
                pipe.send(True)
            return sum(pipe.recv() for pipe in pipes[name])
        except (EOFError, OSError) as error:
            raise InputError(f"bench: a process of {name!r} ended early (out of memory?)") from error

    try:
        for name, contender in contenders.items():
            for part in range(workers):
                parent, child = PROCESSES.Pipe()
                process = PROCESSES.Process(target=take_turns, args=(contender, part, workers, seconds, child),
                                            daemon=True)
                process.start()
                child.close()  # so that the end of the process raises EOFError here
                processes.append(process)
                pipes[name].append(parent)
            take_turn(name)  # warm up
        yield take_turn
    finally:
        for process in processes:
            process.kill()
            process.join()


def prepare(folder: Path, reads: list[Callable[[], bytes]], size: int, shards: int, workers: int = 1) -> float:
    """Write images as a training split of at least `shards` shards; returns images per second."""
    records = [Record(read, str(i), f"{i % CLASSES:03d}") for i, read in enumerate(reads)]
    begin = time.perf_counter()
    write_split(folder, Source(records), source_name="bench", size=size, fit="squash", quality=95, train=True,
                shard_size=max(len(records) // shards, 1), workers=workers)
    return len(records) / (time.perf_counter() - begin)


def bench_size(scratch: Path, size: int, images: int, prepared: int, rounds: int, seconds: float, workers: int
               ) -> dict[str, dict[str, list[float]]]:
    """Images per second of every contender in every round: {kind of KINDS: {contender: [...]}, "write": {...}}."""
    readers, rates = READERS, {}
    if not find_spec("webdataset"):
        print("webdataset is not installed (it is in requirements-dev.txt): measured without it")
        readers = {name: reader for name, reader in readers.items() if not name.startswith("webdataset")}
    for kind, draw in KINDS.items():
        pictures = draw_pictures(draw, size)
        print(f"{kind}, {size} px: {sum(map(len, pictures)) / DISTINCT / size**2:.2f} bytes a pixel")
        split = scratch / f"{size}, {kind}/face_hq/train"
        # at least eight shards per process, because the library distributes shards over processes
        prepare(split, [partial(bytes, pictures[i % DISTINCT]) for i in range(images)], size, 8 * workers)
        rates[kind] = read = {name: [] for name in readers}
        with contestants({name: partial(reader, split) for name, reader in readers.items()}, workers, seconds) as turn:
            for _ in progress(range(4 * rounds), desc=f"{kind} {size} px", unit="round"):
                for name in read:
                    read[name].append(turn(name))
    large = draw_pictures(draw_photograph, size * 3 // 2)
    files = [scratch / f"{size}-{i:05d}.jpg" for i in range(prepared)]
    for i, path in enumerate(files):
        path.write_bytes(large[i % DISTINCT])
    rates["write"] = write = defaultdict(list)
    for number in progress(range(rounds), desc=f"write {size} px", unit="round"):
        for n in sorted({1, workers}):
            with contestants({"": partial(decode_and_encode, files, size)}, n, 4 * seconds) as turn:
                write[f"decode and encode, {n} workers"].append(turn(""))
            folder, reads = scratch / f"{size}-{number}-{n}/face_hq/train", [path.read_bytes for path in files]
            write[f"prepare, {n} workers"].append(prepare(folder, reads, size, 8 * max(n, 2), n))
    return rates


def machine() -> dict[str, object]:
    """The machine of the measurement."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow")}
    return {"cpu": model[1] if model else platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "load before": [round(x, 2) for x in os.getloadavg()], "python": platform.python_version(), **versions}


def ratio(a: list[float], b: list[float]) -> float:
    """Median ratio of the rates of two contenders in the same round."""
    return float(np.median(np.array(a) / b))


def goals(size: int, rates: dict[str, dict[str, list[float]]], workers: int) -> list[tuple[str, float, float]]:
    """(title, measured ratio, goal) of every goal at one size."""
    read, write = rates["read"], rates["write"]
    judged = [("reader / decode only", ratio(read["ours, images"], read["decode only"]), 0.9)]
    judged += [(f"reader / webdataset, {kind}", ratio(read[f"ours, {kind}"], read[f"webdataset, {kind}"]),
                1.3 if size <= 112 else 1.1) for kind in ("images", "batches") if f"webdataset, {kind}" in read]
    if workers == 2:
        # the speed-up that the cores allow: below 2 if other programs run
        cores = ratio(write["decode and encode, 2 workers"], write["decode and encode, 1 workers"])
        judged.append((f"prepare, 2 workers / 1 (decode and encode: {cores:.2f})",
                       ratio(write["prepare, 2 workers"], write["prepare, 1 workers"]), 1.8))
    return judged


def run_bench(sizes: tuple[int, ...], images: int, prepared: int, rounds: int, seconds: float, workers: int,
              scratch: Path | None) -> dict:
    """Measure everything, print the tables and return them."""
    result: dict = {"machine": machine(), "workers": workers, "rounds": rounds, "sizes": {}}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            rates = bench_size(Path(folder), size, images, prepared, rounds, seconds, workers)
        for title in rates:
            ceiling = f"decode and encode, {workers} workers" if title == "write" else "decode only"
            print(f"\n{title}, {size} px" + f", {workers} processes, shuffled" * (title != "write"))
            print(f"  {'':28s}{'images/s':>10s}{'p20':>9s}{'p80':>9s}{'of ceiling':>12s}")
            for name, values in rates[title].items():
                low, median, high = np.percentile(values, (20, 50, 80)).tolist()
                share = ratio(values, rates[title][ceiling])
                print(f"  {name:28s}{median:10,.0f}{low:9,.0f}{high:9,.0f}{share:12.2f}")
        print()
        judged = []
        for what, reached, goal in goals(size, rates, workers):
            print(f"  {what}: {reached:.2f} (goal {goal}) {'met' if reached >= goal else 'MISSED'}")
            judged.append({"what": what, "ratio": round(reached, 3), "goal": goal})
        result["sizes"][size] = rates | {"goals": judged}
    return result
