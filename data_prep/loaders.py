"""Loader processes: how they start, end and fail, and the memory that they and a run's images need.

What they load is in data_prep/stream.py.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_prep import InputError
from data_prep.format import Split

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2


def local_ranks() -> int:
    """Processes that torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


LOADERS = min(16, max(CORES // local_ranks() - 1, 1))  # default number of loader processes

SHARED = Path("/dev/shm")
SHARED_MEMORY = 1 << 30  # where it is smaller, a loader process that dies has probably filled it
AHEAD = 4  # items that a loader process makes ahead

# ---------------------------------------------------------------- memory


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
    copies = 1 if device.type == "cuda" else local_ranks()
    each = f" for each of {copies} processes here" * (copies > 1)
    return f"the images take {need / 2**30:.1f} GiB decoded{each} and {have / 2**30:.1f} GiB are free" \
        if need * copies > 0.8 * have else ""


def batch_too_large(splits: list[Split], images: int, image_size: int) -> str:
    """Why so many images at a time do not fit the memory, as decoded bytes and as the network's float32; "" if so."""
    need = images * 3 * (max(split.size for split in splits) ** 2 + 4 * image_size**2)
    have = free_bytes(torch.device("cpu"))
    return f"{images:,} images at a time take {need / 2**30:,.1f} GiB and {have / 2**30:,.1f} GiB are free" \
        if need > have else ""


def enough_loaders(workers: int, item_bytes: int) -> int:
    """So many loader processes, or the fewer that the shared memory holds the images of.

    Raises:
        InputError: it does not hold those of one.
    """
    if not workers or not item_bytes or not SHARED.is_dir():
        return workers
    have = min(shutil.disk_usage(SHARED).free, free_bytes(torch.device("cpu"))) // local_ranks()
    fits = min((have // item_bytes - 2) // AHEAD, workers)  # one is in use, one is on its way
    if fits < workers:
        need = -(-item_bytes * (AHEAD * workers + 2) * local_ranks() // 2**30)
        how = f"enlarge it (docker run --shm-size {need}g, or --ipc=host)"
        line = f"--workers {workers}: the images that they hold ready take {need:,} GiB of shared memory and " \
            f"{have * local_ranks() / 2**30:,.2f} GiB of {SHARED} are free"
        if fits < 1:
            raise InputError(f"{line}, too little for one: take --workers 0, or {how}")
        say_once(f"  {line}: {fits} are started; {how}")
    return fits


@functools.cache
def say_once(line: str) -> None:
    tqdm.write(line)


# ---------------------------------------------------------------- processes


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
    text = str(error).strip()
    last = text.splitlines()[-1] if text else ""
    if isinstance(error, InputError):
        return InputError(last.removeprefix(f"{InputError.__module__}.InputError: "))
    if "Too many open files" in text or f"exit code {errno.EMFILE}." in text:
        return InputError("loading images: too many open files: raise the limit (`ulimit -n 4096`) or take --workers 0")
    died = "DataLoader worker (pid" in text or isinstance(error, ConnectionError | EOFError)
    died |= "Pin memory thread exited" in text
    if not died and "shared memory" not in text and not isinstance(error, OSError | MemoryError):
        return error
    small = SHARED.is_dir() and shutil.disk_usage(SHARED).total < SHARED_MEMORY
    if "shared memory" in text or (died and small):
        size = f", which holds {shutil.disk_usage(SHARED).total >> 20:,} MiB," if SHARED.is_dir() else ""
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

    Args:
        dataset: its `item_bytes` are those of an item, which lie in shared memory.

    Raises:
        InputError: a worker died, or had no memory or files left.
    """
    workers = enough_loaders(workers, getattr(dataset, "item_bytes", 0))
    with in_one_line():
        items = iter(torch.utils.data.DataLoader(
            dataset, batch_size=None, sampler=range(first, len(dataset)), num_workers=workers, pin_memory=pin,
            worker_init_fn=start_loader, prefetch_factor=AHEAD if workers else None, collate_fn=as_it_is,
        ))
    if workers:
        watch_loaders()
        atexit.unregister(end_loaders)
        atexit.register(end_loaders)  # after the iterator's own hooks, so that it comes before them

    def draw() -> Iterator:
        with in_one_line():
            yield from items

    return draw()


# ---------------------------------------------------------------- a thread

END = object()


def one_ahead(items: Iterator, device: torch.device) -> Iterator:
    """The same items, each made in a thread while the one before it is in use; an error comes where it would have.

    The thread ends with this iterator, or with the process, after the item that it is making.
    """
    prepare = (torch.cuda.set_device, (device,)) if device.type == "cuda" else ()  # threads start on the first GPU
    with ThreadPoolExecutor(1, "one-ahead", *prepare) as pool:
        following = pool.submit(next, items, END)
        while (item := following.result()) is not END:
            following = pool.submit(next, items, END)
            yield item
