"""The reading side of the shards: which image is seen when, and interleaved micro-batches of decoded images.

Everything here is a closed-form function of the seed and of running numbers, so neither the number of loader workers
nor an interruption changes what a run sees.
"""

import atexit
import contextlib
import ctypes
import errno
import functools
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_prep import DOMAINS, InputError, progress
from data_prep.degrade import degrade
from data_prep.format import BadImage, Split
from kernels.gather import gather_interleaved

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
LOADERS = min(16, max(CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, 1))  # default number of loader processes


class Order:
    """The data order of one domain: sample number n of a run -> (epoch, row), a function of (seed, domain, n).

    An epoch visits every row once: the shards are shuffled, then the rows inside windows of several shards, so that
    reading stays mostly sequential on network disks.
    """

    def __init__(self, shard_sizes: list[int], seed: int, domain: int, window: int) -> None:
        self.arguments = shard_sizes, seed, domain, window
        self.size, self.key, self.window = sum(shard_sizes), (seed, domain), window
        self.bounds = np.concatenate([[0], np.cumsum(shard_sizes)])
        self.shards = functools.lru_cache(maxsize=2)(self._shards)
        self.rows = functools.lru_cache(maxsize=4)(self._rows)

    def __reduce__(self):  # the caches do not travel to loader processes
        return Order, self.arguments

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng((*self.key, epoch)).permutation(len(self.bounds) - 1)
        starts = np.concatenate([[0], np.cumsum(np.diff(self.bounds)[order])])[:-1]
        return order, starts[:: self.window]  # the first place of each window

    def _rows(self, epoch: int, w: int) -> np.ndarray:
        shards = self.shards(epoch)[0][w * self.window : (w + 1) * self.window]
        rows = np.concatenate([np.arange(self.bounds[s], self.bounds[s + 1]) for s in shards])
        return np.random.default_rng((*self.key, epoch, w)).permutation(rows)

    def __call__(self, n: int) -> tuple[int, int]:
        epoch, place = divmod(int(n), self.size)
        starts = self.shards(epoch)[1]
        w = int(np.searchsorted(starts, place, side="right")) - 1
        return epoch, int(self.rows(epoch, w)[place - starts[w]])


def interleave(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spread the domains evenly over a batch of counts[d] images each.

    Returns:
        For every place: its domain and its running number inside that domain, int64 [B] each.
    """
    domain = np.repeat(np.arange(len(counts)), counts)
    number = np.concatenate([np.arange(n) for n in counts])
    order = np.argsort((number + 0.5) / counts[domain], kind="stable")
    return domain[order], number[order]


def random_box(rng: np.random.Generator, height: int, width: int, scale: float) -> tuple[float, float, float, float]:
    """A crop (x0, y0, x1, y1) in pixels: area scale..1 of the image, aspect 3/4..4/3 where it fits (Inception)."""
    if scale >= 1.0:
        return 0.0, 0.0, float(width), float(height)
    area, aspect = rng.uniform(scale, 1.0), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = min(math.sqrt(area * aspect), 1.0) * width, min(math.sqrt(area / aspect), 1.0) * height
    x, y = rng.random() * (width - w), rng.random() * (height - h)
    return x, y, x + w, y + h


def random_patch(u: np.ndarray, chance: float) -> tuple[float, float, float, float]:
    """Where to erase (x0, y0, x1, y1), fractions of the image as the network sees it; empty but for `chance` of times.

    Args:
        u: five uniform numbers 0..1.

    Source: arXiv 1708.04896 (random erasing): area 2 to 33 %, aspect 0.3 to 3.3.
    """
    if u[0] >= chance:
        return 0.0, 0.0, 0.0, 0.0
    area, aspect = 0.02 + 0.31 * u[1], math.exp(math.log(0.3) * (2 * u[2] - 1))
    w, h = min(math.sqrt(area * aspect), 1.0), min(math.sqrt(area / aspect), 1.0)
    x, y = u[3] * (1 - w), u[4] * (1 - h)
    return x, y, x + w, y + h


def erase_patches(images: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Normalised images [B, 3, S, S] with the mean colour (0) in `patches` [B, 4]; see `random_patch`."""
    size = images.shape[-1]
    center = (torch.arange(size, device=images.device) + 0.5) / size
    x0, y0, x1, y1 = patches.to(images.device, non_blocking=True)[:, :, None].unbind(1)
    across, down = (center >= x0) & (center < x1), (center >= y0) & (center < y1)
    return images.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0.0)


@dataclass
class Chunk:
    """A micro-batch, decoded: one bank of images per domain and, for every place, where its image lies."""

    banks: list[torch.Tensor]  # K x uint8 [M_d, H_d, W_d, 3]
    domain: torch.Tensor  # int64 [B], which bank
    row: torch.Tensor  # int64 [B], which image of the bank
    label: torch.Tensor  # int64 [B], counted from the domain's first class; -1: fills up the batch of a rank
    boxes: torch.Tensor  # float32 [B, 4], pixels of the bank's images
    flip: torch.Tensor  # bool [B]
    bad: list[str]  # what had to be replaced: "domain/split key: reason"
    erase: torch.Tensor | None = None  # float32 [B, 4], patches of `erase_patches`; None: no domain has any
    images: torch.Tensor | None = None  # [B, 3, S, S], where the finished batch was made with the chunk

    def __getstate__(self) -> dict:
        """From a loader process: only images as shared memory, which costs half a millisecond a tensor to open."""
        return {name: value.numpy() if isinstance(value, torch.Tensor) and name != "images" else value
                for name, value in vars(self).items()}

    def __setstate__(self, state: dict) -> None:
        vars(self).update({name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                           for name, value in state.items()})

    def pin_memory(self) -> "Chunk":
        """Called by the DataLoader where CUDA copies without waiting."""
        tensors = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return Chunk([bank.pin_memory() for bank in self.banks], **tensors, bad=self.bad)


def image_memory(*shape: int) -> torch.Tensor:
    """An empty uint8 tensor for a batch of images, where it costs least.

    A loader process takes it from the memory that it shares with its parent, else the batch would be copied there. Any
    other process takes it from NumPy, which asks for large pages: a third of the time at 224 pixels went into small
    ones.
    """
    if torch.utils.data.get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))
    shared = torch.UntypedStorage._new_shared(math.prod(shape))  # as PyTorch's own collate does
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


class Stream(torch.utils.data.Dataset):
    """The micro-batches of a run: number c is a pure function of (seed, c).

    Args:
        splits: the training split of each of the K domains.
        plan: int64 [batches, K], images of each domain in each batch; every batch has the same sum.
        seed: of the order and of every per-sample draw (keyed by seed, domain, epoch, sample).
        window: shards among which rows are shuffled.
        micro_batch: at most so many images per chunk (None: the batch).
        crop: least area of the random crop, 0..1, per domain.
        erase: chance of an erased patch, per domain (None: none).
        severity: largest severity 0..1 of the degradation of face_lq in each batch [batches]; None: no degradation.
        rank, world: this process takes the places rank, rank + world, ... of every batch.
        readable: per domain [M_d] bool, which images somebody has decoded already: the chunks then come without banks
            and name rows of the split. None: decode.
    """

    def __init__(self, splits: list[Split], plan: np.ndarray, *, seed: int, window: int = 8,
                 micro_batch: int | None = None, crop: list[float], severity: np.ndarray | None = None,
                 rank: int = 0, world: int = 1, readable: list[np.ndarray] | None = None,
                 erase: list[float] | None = None) -> None:
        self.splits, self.plan, self.seed, self.crop, self.severity = splits, plan, seed, crop, severity
        self.rank, self.world, self.readable = rank, world, readable
        self.erase = erase or []
        most = math.ceil(int(plan[0].sum()) / world)
        self.micro = min(micro_batch or most, most)
        self.per_batch = math.ceil(most / self.micro)  # chunks
        self.micro = math.ceil(most / self.per_batch)  # of one size, or nearly: compiled code fits one size
        self.starts = np.cumsum(plan, axis=0) - plan
        sizes = [[shard["samples"] for shard in split.index["shards"]] for split in splits]
        self.orders = [Order(n, seed, DOMAINS.index(s.domain), window) for n, s in zip(sizes, splits, strict=True)]

    def __len__(self) -> int:
        return len(self.plan) * self.per_batch

    def __getitem__(self, c: int) -> Chunk:
        batch, part = divmod(c, self.per_batch)
        domain, number = interleave(self.plan[batch])
        size = len(range(0, len(domain), self.world)[part * self.micro : (part + 1) * self.micro])
        places = np.arange(self.rank, len(domain), self.world)[part * self.micro : (part + 1) * self.micro]
        # every rank gets as many as rank 0, so that collectives fit together; what is too much counts for nothing
        real, places = len(places), np.concatenate([places, np.zeros(size - len(places), dtype=np.int64)])
        domain, number = domain[places], number[places] + self.starts[batch][domain[places]]
        # filled image by image: stacked at the end, the images would be read again from memory, and transposed
        counts = np.bincount(domain[:0] if self.readable else domain, minlength=len(self.splits)).tolist()
        banks = [image_memory(n, *((split.size, split.size) if n else (1, 1)), 3)
                 for n, split in zip(counts, self.splits, strict=True)]
        filled = [0] * len(self.splits)
        row, label, boxes, flip, erase, bad = [], [], [], [], [], []
        for d, n in zip(domain.tolist(), number.tolist(), strict=True):
            split = self.splits[d]
            epoch, sample = self.orders[d](n)
            image, used = self.read(d, sample, bad)
            rng = np.random.default_rng((self.seed, DOMAINS.index(split.domain), epoch, sample))
            boxes.append(random_box(rng, split.size, split.size, self.crop[d]))
            flip.append(rng.random() < 0.5)
            if self.severity is not None and split.domain == "face_lq":
                image, _ = degrade(image, float(self.severity[batch]) * rng.random(), rng)
            if any(self.erase):
                erase.append(random_patch(rng.random(5), self.erase[d]))
            row.append(used if self.readable else filled[d])
            label.append(int(split.labels[used]))
            if image is not None:
                banks[d][filled[d]] = image.permute(1, 2, 0)
            filled[d] += 1
        label[real:] = [-1] * (size - real)
        return Chunk(banks, torch.from_numpy(domain), torch.tensor(row), torch.tensor(label),
                     torch.tensor(boxes, dtype=torch.float32), torch.tensor(flip), bad,
                     torch.tensor(erase, dtype=torch.float32) if any(self.erase) else None)

    def read(self, d: int, sample: int, bad: list[str]) -> tuple[torch.Tensor | None, int]:
        """An image uint8 [3, H, W] and its row: the next readable one of the split where a file is damaged."""
        split = self.splits[d]
        for row in range(sample, sample + len(split)):
            if self.readable:
                if self.readable[d][row % len(split)]:
                    return None, row % len(split)
                bad.append(f"{split.domain}/{split.name} row {row % len(split)}: unreadable")
                continue
            try:
                return split.image(row % len(split)), row % len(split)
            except BadImage as error:
                bad.append(f"{split.domain}/{split.name} {error}")
        raise InputError(f"{split.folder}: no readable image; run `python -m data_prep verify {split.folder}`")


class Batches(torch.utils.data.Dataset):
    """Whole images of a split in the order of `rows`, `batch` at a time, for embedding.

    Item b is (rows int64 [n], images uint8 [n, 3, H, W]); unreadable images are left out.
    """

    def __init__(self, split: Split, rows: np.ndarray, batch: int) -> None:
        self.split, self.rows, self.batch = split, rows, batch

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch)

    def __getitem__(self, b: int) -> tuple[np.ndarray, torch.Tensor]:
        rows, good = self.rows[b * self.batch : (b + 1) * self.batch].tolist(), []
        images = image_memory(len(rows), self.split.size, self.split.size, 3)
        for row in rows:
            try:
                images[len(good)] = self.split.image(row).permute(1, 2, 0)
                good.append(row)
            except BadImage:
                continue
        return np.array(good, dtype=np.int64), images[: len(good)].permute(0, 3, 1, 2)


# ---------------------------------------------------------------- from chunks to images


@dataclass(frozen=True)
class Look:
    """How a network wants its images."""

    image_size: int  # pixels
    mean: tuple[float, float, float]  # RGB, of images scaled to 0..1
    std: tuple[float, float, float]
    interpolation: str = "bilinear"  # or "bicubic"


def make_images(chunk: Chunk, look: Look, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The interleaved, augmented, normalised batch [B, 3, S, S] of a chunk."""
    banks = [bank.to(device, non_blocking=True) for bank in chunk.banks]
    images = gather_interleaved(banks, chunk.domain, chunk.row, size=look.image_size, mean=look.mean, std=look.std,
                                boxes=chunk.boxes, flip=chunk.flip, interpolation=look.interpolation, dtype=dtype)
    return images if chunk.erase is None else erase_patches(images, chunk.erase)


class FinishedImages(torch.utils.data.Dataset):
    """The chunks of a stream with their finished images, for a step on the CPU: made by the loader processes."""

    def __init__(self, stream: Stream, cache: list[torch.Tensor] | None, look: Look) -> None:
        self.stream, self.cache, self.look = stream, cache, look

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, c: int) -> Chunk:
        chunk = self.stream[c]
        if self.cache is not None:
            chunk = replace(chunk, banks=self.cache)
        return replace(chunk, banks=[], images=make_images(chunk, self.look, torch.device("cpu")))


# ---------------------------------------------------------------- loader processes

SHARED_MEMORY = 1 << 30  # where /dev/shm is smaller, a loader process that dies has probably filled it


def start_loader(_: int) -> None:
    """A loader process ends with its parent, however that ends, and leaves a first SIGTERM to it.

    Terminals and schedulers signal the whole group, and the parent still has to end its step and to save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody reads the pipe that it may be writing to
    parent = multiprocessing.parent_process()
    served = multiprocessing.get_start_method() == "forkserver"  # else later loaders hold the pipe that `is_alive` asks
    if not parent.is_alive() or (os.getppid() != parent.pid and not served):
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


# ---------------------------------------------------------------- images decoded once and kept (--cache)


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


def too_large(splits: list[Split], device: torch.device) -> str:
    """Why the decoded images of the splits do not fit the memory of a device; "" where they do."""
    need, have = sum(len(split) * 3 * split.size**2 for split in splits), free_bytes(device)
    copies = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    each = f" for each of {copies} processes here" * (copies > 1)
    return f"the images take {need / 2**30:.1f} GiB decoded{each} and {have / 2**30:.1f} GiB are free" \
        if need * copies > 0.8 * have else ""


def batch_too_large(splits: list[Split], images: int, image_size: int) -> str:
    """Why so many images at a time do not fit the memory, as decoded bytes and as the network's float32; "" if so."""
    need = images * 3 * (max(split.size for split in splits) ** 2 + 4 * image_size**2)
    have = free_bytes(torch.device("cpu"))
    return f"{images:,} images at a time take {need / 2**30:,.1f} GiB and {have / 2**30:,.1f} GiB are free" \
        if need > have else ""


def decode_split(split: Split, device: torch.device, workers: int, quiet: bool) -> tuple[torch.Tensor, np.ndarray]:
    """Every image of a split, uint8 [M, S, S, 3] on the device, and which could be read, bool [M]."""
    bank = torch.zeros(len(split), split.size, split.size, 3, dtype=torch.uint8, device=device)
    readable = np.zeros(len(split), dtype=bool)
    with progress(total=len(split), desc=f"cache {split.domain}", unit="img", disable=quiet) as bar:
        for rows, images in load(Batches(split, np.arange(len(split)), 256), 0, workers, False):
            bank[torch.from_numpy(rows).to(device)] = images.permute(0, 2, 3, 1).to(device)
            readable[rows] = True
            bar.update(len(rows))
    return bank, readable


def from_cache(cache: list[torch.Tensor], chunk: Chunk, device: torch.device) -> Chunk:
    """The chunk with its banks: the cache itself where it lies on the device, else the rows that the chunk names."""
    if cache[0].device == device:
        return replace(chunk, banks=cache)
    banks, row = [], torch.empty_like(chunk.row)
    for d, bank in enumerate(cache):
        places = (chunk.domain == d).nonzero().flatten()
        banks.append(bank[chunk.row[places]].pin_memory())
        row[places] = torch.arange(len(places))
    return replace(chunk, banks=banks, row=row)


class Feed:
    """The micro-batches of a run's steps on the device: decoded ahead by loader processes, made into images there.

    Args:
        stream: of this rank.
        batches_per_step: of the schedule.
        look: how the network wants its images.
        bf16: the network computes in bfloat16.
        cache: the decoded images of every split, for a stream with `readable`.

    Attributes: passes (micro-batches of a step), bad (damaged images that were replaced).
    """

    def __init__(self, stream: Stream, batches_per_step: int, look: Look, device: torch.device, *, bf16: bool = False,
                 workers: int = 0, cache: list[torch.Tensor] | None = None) -> None:
        self.stream, self.look, self.device, self.workers, self.cache = stream, look, device, workers, cache
        self.dtype = torch.bfloat16 if bf16 else torch.float32  # what autocast would make of them
        self.passes, self.bad, self.chunks = stream.per_batch * batches_per_step, 0, iter(())

    def start(self, step: int) -> None:
        """Go on with a step."""
        on_gpu = self.device.type == "cuda"  # there the device makes the images, of fewer bytes
        chunks = self.stream if on_gpu else FinishedImages(self.stream, self.cache, self.look)
        self.chunks = load(chunks, step * self.passes, self.workers, on_gpu)

    def next_step(self, relabel: Callable | None = None) -> Iterator[tuple]:
        """The micro-batches of the next step, one by one: (images [B, 3, S, S], labels [B], domains [B]).

        Args:
            relabel: gets the labels and the domains of all micro-batches, on the CPU, and returns other labels.
        """
        part: Iterable[Chunk] = (next(self.chunks) for _ in range(self.passes))
        if relabel:
            part = list(part)
            labels = relabel([chunk.label for chunk in part], [chunk.domain for chunk in part])
            part = [replace(chunk, label=label) for chunk, label in zip(part, labels, strict=True)]
        return self.finish(part)

    def finish(self, part: Iterable[Chunk]) -> Iterator[tuple]:
        """Chunks as they are wanted on the device."""
        for chunk in part:
            for line in chunk.bad:
                tqdm.write(f"damaged image replaced: {line}", file=sys.stderr)
            self.bad += len(chunk.bad)
            images = chunk.images
            if images is None:
                chunk = chunk if self.cache is None else from_cache(self.cache, chunk, self.device)
                images = make_images(chunk, self.look, self.device, self.dtype)
            yield images, *(v.to(self.device, non_blocking=True) for v in (chunk.label, chunk.domain))
