"""Loader processes: their start, end and failures, and the memory that they and a run's images need.

data_prep/stream.py defines what they load.
"""

import atexit
import contextlib
import ctypes
import errno
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

from data_prep import InputError, say_once
from data_prep.format import Split

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2


def local_ranks() -> int:
    """Number of processes that torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


LOADERS = min(16, max(CORES // local_ranks() - 1, 1))  # default number of loader processes

SHARED = Path("/dev/shm")
SHARED_MEMORY = 1 << 30  # if it is smaller, a loader process that died has probably filled it
AHEAD = 4  # items that a loader process prepares ahead

# ---------------------------------------------------------------- memory


def image_memory(*shape: int) -> torch.Tensor:
    """An uninitialised uint8 tensor for a batch of images.

    In a loader process it lies in memory shared with the parent, which saves a copy. Elsewhere NumPy allocates it, in
    large pages: at 224 pixels, small ones took a third of the time.
    """
    if torch.utils.data.get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))
    shared = torch.UntypedStorage._new_shared(math.prod(shape))  # as PyTorch's own collate does
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, IndexError, ValueError):  # caches that Linux would release count as free
        free[0] = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError):  # a limit of the job's own (SLURM, a container)
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(min(free), 0)


def too_large(splits: list[Split], device: torch.device) -> str:
    """Why the decoded images of the splits do not fit in the memory of a device; "" if they do."""
    need, have = sum(len(split) * 3 * split.size**2 for split in splits), free_bytes(device)
    copies = 1 if device.type == "cuda" else local_ranks()
    each = f" for each of {copies} processes here" * (copies > 1)
    return f"the images take {need / 2**30:.1f} GiB decoded{each} and {have / 2**30:.1f} GiB are free" \
        if need * copies > 0.8 * have else ""


def batch_too_large(splits: list[Split], images: int, image_size: int) -> str:
    """Why a batch does not fit in memory, as decoded bytes and as the network's float32; "" if it does."""
    need = images * 3 * (max(split.size for split in splits) ** 2 + 4 * image_size**2)
    have = free_bytes(torch.device("cpu"))
    return f"{images:,} images at a time take {need / 2**30:,.1f} GiB and {have / 2**30:,.1f} GiB are free" \
        if need > have else ""


def enough_loaders(workers: int, item_bytes: int) -> int:
    """The number of loader processes whose images fit in shared memory, at most `workers`; InputError if none do."""
    if not workers or not item_bytes or not SHARED.is_dir():
        return workers
    have = min(shutil.disk_usage(SHARED).free, free_bytes(torch.device("cpu"))) // local_ranks()
    fits = min((have // item_bytes - 2) // AHEAD, workers)  # one is in use, one is on its way
    if fits < workers:
        need = item_bytes * (AHEAD * workers + 2) * local_ranks()
        how = f"enlarge it (docker run --shm-size {-(-need // 2**30)}g, or --ipc=host)"
        line = f"--workers {workers}: the images that they hold ready take {need / 2**30:,.2f} GiB of shared memory " \
            f"and {have * local_ranks() / 2**30:,.2f} GiB of {SHARED} are free"
        if fits < 1:
            raise InputError(f"{line}, too little for one: use --workers 0, or {how}")
        say_once(f"  {line}: {fits} are started; {how}")
    return fits


# ---------------------------------------------------------------- processes


def start_loader(_: int) -> None:
    """Make a loader process end with its parent, in whatever way that ends, and ignore the first SIGTERM.

    Terminals and schedulers signal the whole group, and the parent has yet to finish its step and save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it may hang, writing to a full pipe
    parent = multiprocessing.parent_process()
    served = multiprocessing.get_start_method() == "forkserver"  # its later children keep the pipe of `is_alive` open
    if not parent.is_alive() or (os.getppid() != parent.pid and not served):
        os._exit(1)
    # an item that cannot be sent would be dropped, and the parent would wait for it forever
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(
        lambda error, _: os._exit(getattr(error, "errno", None) or 1))


def end_loaders() -> None:
    """Kill all loader processes: one that writes to a full pipe would not end, and exiting would wait for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


def loader_error(error: Exception) -> Exception:
    """A one-line InputError if a loader process failed or died; other errors unchanged."""
    text = str(error).strip()
    last = text.splitlines()[-1] if text else ""
    if isinstance(error, InputError):
        return InputError(last.removeprefix(f"{InputError.__module__}.InputError: "))
    if "Too many open files" in text or f"exit code {errno.EMFILE}." in text:
        return InputError("loading images: too many open files: raise the limit (`ulimit -n 4096`) or use --workers 0")
    died = isinstance(error, ConnectionError | EOFError) or any(
        words in text for words in ("DataLoader worker (pid", "Pin memory thread exited"))
    if not died and "shared memory" not in text and not isinstance(error, OSError | MemoryError):
        return error
    size = shutil.disk_usage(SHARED).total if SHARED.is_dir() else math.inf
    if "shared memory" in text or (died and size < SHARED_MEMORY):
        holds = f", which holds {size >> 20:,} MiB," if SHARED.is_dir() else ""
        return InputError(f"loading images: the shared memory /dev/shm{holds} is full: use --workers 0, or enlarge it "
                          "(docker run --shm-size 8g, or --ipc=host)")
    if died:
        return InputError("loading images: a loader process died (usually killed because memory is full): lower "
                          "--workers or --batch, or use --workers 0")
    return InputError(f"loading images: {last}")


def watch_loaders() -> None:
    """End the main process with one line if a loader process dies.

    PyTorch's handler raises, but wherever the main process is: it may wait for the rest of a message.
    """
    raises = signal.getsignal(signal.SIGCHLD)
    if raises in (signal.SIG_DFL, signal.SIG_IGN, None) or getattr(raises, "named", False):
        return

    def handle(*arguments) -> None:
        with in_one_line():
            raises(*arguments)

    handle.named = True
    signal.signal(signal.SIGCHLD, handle)


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Turn the failure of a loader process inside the block into a one-line InputError."""
    try:
        yield
    except Exception as error:
        if (line := loader_error(error)) is error:
            raise
        end_loaders()  # before they print more errors
        raise line from error


def load(dataset: torch.utils.data.Dataset, first: int, workers: int, pin: bool) -> Iterator:
    """The items of a data set from number `first` on, decoded ahead by loader processes.

    `dataset.item_bytes`: of an item in shared memory. InputError if a loader process dies or lacks memory or files.
    """
    workers = enough_loaders(workers, getattr(dataset, "item_bytes", 0))
    with in_one_line():
        items = iter(torch.utils.data.DataLoader(
            dataset, batch_size=None, sampler=range(first, len(dataset)), num_workers=workers, pin_memory=pin,
            worker_init_fn=start_loader, prefetch_factor=AHEAD if workers else None,
            collate_fn=torch.nn.Identity(),  # the default would turn row numbers into tensors
        ))
    if workers:
        watch_loaders()
        atexit.unregister(end_loaders)
        atexit.register(end_loaders)  # registered after the iterator's hooks, so that it runs before them

    def draw() -> Iterator:
        with in_one_line():
            yield from items

    return draw()


# ---------------------------------------------------------------- a thread

END = object()


def one_ahead(items: Iterator, device: torch.device) -> Iterator:
    """The same items, each made in a thread while the previous one is in use; errors are raised in their places.

    The thread ends with this iterator, or with the process, after finishing its item.
    """
    prepare = (torch.cuda.set_device, (device,)) if device.type == "cuda" else ()  # a thread starts on the first GPU
    with ThreadPoolExecutor(1, "one-ahead", *prepare) as pool:
        following = pool.submit(next, items, END)
        while (item := following.result()) is not END:
            following = pool.submit(next, items, END)
            yield item
