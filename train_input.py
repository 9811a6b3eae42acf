"""From shards to the batches of a step: loader processes, the cache of decoded images, the way to the device."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from backbones import Backbone
from data_prep import InputError, progress
from data_prep.shards import Split
from data_prep.stream import Batches, Chunk, Stream
from kernels.gather import gather_interleaved
from kernels.margin_loss import sample_classes
from train_options import class_shares, per_domain
from train_ranks import Ranks, gather_rows, own_draw
from train_schedule import ramp

if TYPE_CHECKING:
    from train import Job

SHARED_MEMORY = 1 << 30  # where /dev/shm is smaller, a loader process that dies has probably filled it


def start_loader(_: int) -> None:
    """A loader process ends with its parent, however that ends, and leaves a first SIGTERM to it.

    Terminals and schedulers signal the whole group, and the parent still has to end its step and to save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody reads the pipe that it may be writing to
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)
    # what cannot be sent would be dropped, and the parent would wait for it for ever
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(
        lambda error, _: os._exit(getattr(error, "errno", None) or 1))


def end_loaders() -> None:
    """End every loader process at once: one that writes into a full pipe would not, and exiting would wait for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


def loader_error(error: Exception) -> Exception:
    """One line about a loader process that failed or died; other errors stay what they are."""
    text, shared = str(error).strip(), Path("/dev/shm")
    last = text.splitlines()[-1] if text else ""
    if isinstance(error, InputError):
        return InputError(last.removeprefix(f"{InputError.__module__}.InputError: "))
    if "Too many open files" in text or f"exit code {errno.EMFILE}." in text:
        return InputError("loading images: too many open files: raise the limit (`ulimit -n 4096`) or take --workers 0")
    died = "DataLoader worker (pid" in text or isinstance(error, ConnectionError | EOFError)
    died |= "Pin memory thread exited" in text
    if not died and "shared memory" not in text and not isinstance(error, OSError | MemoryError):
        return error
    small = shared.is_dir() and shutil.disk_usage(shared).total < SHARED_MEMORY
    if "shared memory" in text or (died and small):
        size = f", which holds {shutil.disk_usage(shared).total >> 20:,} MiB," if shared.is_dir() else ""
        return InputError(f"loading images: the shared memory /dev/shm{size} is full: take --workers 0, or enlarge it "
                          "(docker run --shm-size 8g, or --ipc=host)")
    if died:
        return InputError("loading images: a loader process died (killed because memory is full, as a rule): lower "
                          "--workers or --batch, or take --workers 0")
    return InputError(f"loading images: {last}")


def watch_loaders() -> None:
    """Let the death of a loader process end what the main one does, in one line.

    PyTorch raises wherever the main process is: it may be reading half a message, whose other half never comes.
    """
    raises = signal.getsignal(signal.SIGCHLD)
    if raises in (signal.SIG_DFL, signal.SIG_IGN, None) or getattr(raises, "named", False):
        return

    def handle(*arguments) -> None:
        try:
            raises(*arguments)
        except RuntimeError as error:
            end_loaders()
            raise loader_error(error) from error

    handle.named = True
    signal.signal(signal.SIGCHLD, handle)


def as_it_is(item):
    """No conversion: the loader's own would turn row numbers into tensors."""
    return item


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Inside, a loader process that fails or dies is bad input."""
    try:
        yield
    except Exception as error:
        if (line := loader_error(error)) is error:
            raise
        end_loaders()  # what they say from now on is no news
        raise line from error


def load(dataset: torch.utils.data.Dataset, first: int, workers: int, pin: bool) -> Iterator:
    """The items of a data set from number `first` on, decoded ahead by worker processes.

    Raises:
        InputError: a worker died, or had no memory or files left.
    """
    with in_one_line():
        items = iter(torch.utils.data.DataLoader(
            dataset, batch_size=None, sampler=range(first, len(dataset)), num_workers=workers, pin_memory=pin,
            worker_init_fn=start_loader, prefetch_factor=4 if workers else None, collate_fn=as_it_is,
        ))
    if workers:
        watch_loaders()
        atexit.unregister(end_loaders)
        atexit.register(end_loaders)  # after the iterator's own hooks, so that it comes before them

    def draw() -> Iterator:
        with in_one_line():
            yield from items

    return draw()


class Finished(torch.utils.data.Dataset):
    """The chunks of a stream with their finished images, for a step on the CPU: made by the loader processes."""

    def __init__(self, stream: Stream, cache: list[torch.Tensor] | None, model: Backbone) -> None:
        self.stream, self.cache = stream, cache
        self.look = SimpleNamespace(image_size=model.image_size, mean=model.mean, std=model.std,
                                    interpolation=model.interpolation)

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, c: int) -> Chunk:
        chunk = self.stream[c]
        if self.cache is not None:
            chunk = dataclasses.replace(chunk, banks=self.cache)
        return dataclasses.replace(chunk, banks=[], images=to_images(chunk, self.look, torch.device("cpu")))


def to_images(chunk: Chunk, model: Backbone, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The interleaved, augmented, normalised batch [B, 3, S, S] of a chunk."""
    banks = [bank.to(device, non_blocking=True) for bank in chunk.banks]
    images = gather_interleaved(banks, chunk.domain, chunk.row, size=model.image_size, mean=model.mean, std=model.std,
                                boxes=chunk.boxes, flip=chunk.flip, interpolation=model.interpolation, dtype=dtype)
    return chunk.augment(images, model.mean, model.std)


def free_bytes(device: torch.device) -> int:
    """Memory that is left on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, IndexError, ValueError):  # what Linux would give back counts as free
        free[0] = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError):  # a limit of the job's own (SLURM, a container)
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(min(free), 0)


def check_memory(config: dict, splits: list[Split], image_size: int, world: int) -> None:
    """Refuse a batch whose images alone the memory does not hold: as decoded bytes and as the network's float32."""
    images = min(config["micro_batch"] or config["batch"], -(-config["batch"] // world))
    need = images * 3 * (max(split.size for split in splits) ** 2 + 4 * image_size**2)
    have = free_bytes(torch.device("cpu"))
    if need > have:
        raise InputError(f"--batch {config['batch']}: {images:,} images at a time take {need / 2**30:,.1f} GiB and "
                         f"{have / 2**30:,.1f} GiB are free: lower --micro-batch or --batch")


def check_cache(which: str, splits: list[Split], device: torch.device, ranks: Ranks) -> None:
    """Refuse a --cache that the memory does not hold."""
    place = device if which == "gpu" else torch.device("cpu")
    need, have = sum(len(split) * 3 * split.size**2 for split in splits), free_bytes(place)
    copies = 1 if place.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks.any(need * copies > 0.8 * have):  # nobody begins before all have looked
        each = f" for each of {copies} processes here" * (copies > 1)
        raise InputError(f"--cache {which}: the images take {need / 2**30:.1f} GiB decoded{each} and "
                         f"{have / 2**30:.1f} GiB are free: leave --cache out, or prepare smaller images (--size)")


def fill_cache(job: Job) -> list[np.ndarray]:
    """Decode every image once and keep it (--cache); returns per domain which rows could be read."""
    place = job.device if job.config["cache"] == "gpu" else torch.device("cpu")
    job.cache, readable = [], []
    for split in job.splits:
        bank = torch.zeros(len(split), split.size, split.size, 3, dtype=torch.uint8, device=place)
        good = np.zeros(len(split), dtype=bool)
        parts = load(Batches(split, np.arange(len(split)), 256), 0, job.config["workers"], False)
        with progress(total=len(split), desc=f"cache {split.domain}", unit="img", disable=job.ranks.rank > 0) as bar:
            for rows, images in parts:
                bank[torch.from_numpy(rows).to(place)] = images.permute(0, 2, 3, 1).to(place)
                good[rows] = True
                bar.update(len(rows))
        job.cache.append(bank)
        readable.append(good)
    return readable


def from_cache(job: Job, chunk: Chunk) -> Chunk:
    """The chunk with its banks: the cache itself where it lies on the device, else the rows that the chunk names."""
    if job.cache[0].device == job.device:
        return dataclasses.replace(chunk, banks=job.cache)
    banks, row = [], torch.empty_like(chunk.row)
    for d, bank in enumerate(job.cache):
        places = (chunk.domain == d).nonzero().flatten()
        banks.append(bank[chunk.row[places]].pin_memory())
        row[places] = torch.arange(len(places))
    return dataclasses.replace(chunk, banks=banks, row=row)


def make_stream(job: Job) -> Stream:
    """The micro-batches of the run, for this rank."""
    config = job.config
    progress = np.repeat(np.arange(job.steps) / job.steps, job.plan.shape[1])
    severity = config["degrade_severity"] * np.array([ramp(p, config["degrade_ramp"]) for p in progress])
    readable = fill_cache(job) if config["cache"] != "none" else None
    return Stream(job.splits, job.plan.reshape(-1, len(job.splits)), seed=config["seed"],
                  window=config["shuffle_window"], micro_batch=config["micro_batch"],
                  crop=per_domain(config, "crop_scale"), severity=severity if config["degrade"] else None,
                  rank=job.ranks.rank, world=job.ranks.world, readable=readable,
                  **{name: per_domain(config, name) for name in ("flip", "color", "erase")})


def load_steps(job: Job, stream: Stream, first: int) -> Iterator[Chunk]:
    """The chunks of the run from number `first` on."""
    on_gpu = job.device.type == "cuda"  # there the device makes the images, of fewer bytes
    return load(stream if on_gpu else Finished(stream, job.cache, job.model), first, job.config["workers"], on_gpu)


def receive(job: Job, chunks: Iterator[Chunk], step: int, options: dict, passes: int) -> tuple[Iterator[tuple], dict]:
    """The next `passes` micro-batches, see `to_device`, and the loss's options with the classes of this step."""
    part = itertools.islice(chunks, passes)
    if min(class_shares(job.config, [len(split.classes) for split in job.splits])) < 1:
        part = list(part)
        options = options | draw_classes(job, part, step, options["shard"] is not None)
    return to_device(job, part), options


def to_device(job: Job, chunks: Iterable[Chunk]) -> Iterator[tuple]:
    """Micro-batches on the device, one by one: (images, labels, domains)."""
    for chunk in chunks:
        for line in chunk.bad:
            tqdm.write(f"damaged image replaced: {line}", file=sys.stderr)
        job.bad += len(chunk.bad)
        if chunk.images is None:
            chunk = chunk if job.cache is None else from_cache(job, chunk)
            # what autocast would make of them; colours are changed in float32
            half = job.half and chunk.color is None
            chunk.images = to_images(chunk, job.model, job.device, torch.bfloat16 if half else torch.float32)
        yield chunk.images, *(v.to(job.device, non_blocking=True) for v in (chunk.label, chunk.domain))


def draw_classes(job: Job, chunks: list[Chunk], step: int, sharded: bool) -> dict:
    """Partial FC: the step's classes, as what `loss_options` says of all; renumbers the labels of the step's chunks.

    One draw for the whole step, whose samples all find their class in it: micro-batches and ranks change nothing. On
    the CPU, where the labels are, before anything is sent to the device.
    """
    counts, ranks = [len(split.classes) for split in job.splits], job.ranks
    ends = itertools.accumulate(counts)
    labels, domains = (gather_rows(torch.cat([getattr(chunk, name) for chunk in chunks]), ranks, ranks.control)
                       for name in ("label", "domain"))
    valid = labels >= 0
    rows, labels[valid], ranges = sample_classes(
        labels[valid], domains[valid], [(end - count, end) for count, end in zip(counts, ends, strict=True)],
        class_shares(job.config, counts), seed=job.config["seed"], step=step, minimum=0)
    own = labels.chunk(ranks.world)[ranks.rank].split([len(chunk.label) for chunk in chunks])
    for chunk, label in zip(chunks, own, strict=True):
        chunk.label = label
    rows, ranges, shard = own_draw(rows, ranges, counts, *((ranks.rank, ranks.world) if sharded else (0, 1)))
    # unpinned, a copy of this size would wait for the device
    first = torch.tensor([start for start, _ in ranges])
    rows, first = (v.pin_memory() if job.device.type == "cuda" else v for v in (rows, first))
    return {"rows": rows.to(job.device, non_blocking=True), "first": first.to(job.device, non_blocking=True),
            "class_ranges": ranges, "shard": shard if sharded else None}
