"""The processes of a run (torchrun's ranks), the device of each, and what they tell each other."""

import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass

import torch

from data_prep import InputError
from kernels.margin_loss import Shard, merge_over


def pick_device(name: str) -> torch.device:
    """The device of --device: `auto` takes CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: want auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    device = torch.device(name)
    if (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    return device


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started for the run; alone it is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    control: object = None  # gloo group, for what the CPUs tell each other while the GPUs work

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place; what lies in the memory of the CPUs is summed there."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor, group=self.control if tensor.device.type == "cpu" else None)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; every rank has to ask."""
        if self.world == 1:
            return flag
        told = torch.tensor(int(flag))
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=self.control)
        return bool(told)

    def wait(self) -> None:
        """Go on when every rank is here."""
        self.any(False)


def watch_parent(parent: int, patience: float = 120.0) -> None:
    """End a rank whose torchrun was killed, which can no longer end it: by SIGTERM, so that a run saves first."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience)  # in a collective that others have left, nobody would come to handle the signal
    os._exit(128 + signal.SIGTERM)


def join_ranks(config: dict) -> Ranks:
    """The ranks of torchrun's environment; a process group where there are several."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Ranks()
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise InputError(f"WORLD_SIZE is {world} and {missing[0]} is not set: start several processes by torchrun, or "
                         "unset WORLD_SIZE")
    device = pick_device(config["device"])
    if device.type == "cuda":
        config["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(pick_device(config["device"]))
    threading.Thread(target=watch_parent, args=(os.getppid(),), daemon=True).start()
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(torch.distributed.get_rank(), world, torch.distributed.new_group(backend="gloo"))
    if ranks.rank:  # one voice
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return ranks


def head_slices(class_counts: list[int], rank: int, world: int) -> tuple[torch.Tensor, list[tuple[int, int]], Shard]:
    """A near-equal slice of EVERY domain's classes for one rank.

    Returns:
        rows of the whole head (int64), class ranges within them, and where the slices lie, for margin_loss.
    """
    rows, ranges, start, first, end = [], [], [], 0, 0
    for count in class_counts:
        low, high = count * rank // world, count * (rank + 1) // world
        rows.append(torch.arange(first + low, first + high))
        ranges.append((end, end + high - low))
        start.append(low)
        first, end = first + count, end + high - low
    return torch.cat(rows), ranges, Shard(tuple(start), tuple(class_counts), merge_over())


def own_draw(drawn: torch.Tensor, ranges: list[tuple[int, int]], class_counts: list[int], rank: int,
             world: int) -> tuple[torch.Tensor, list[tuple[int, int]], Shard]:
    """What lies in this rank's slices of the classes that a step draws: Partial FC with a sharded head.

    Every rank draws the same classes of the whole head, so that a step does not depend on the number of ranks.

    Args:
        drawn: int64 [C'] rows of the whole head, ascending in every domain.
        ranges: of every domain, within `drawn`.

    Returns:
        As `head_slices`, for the drawn classes; the rows count within this rank's part of the head.
    """
    rows, own, start, whole, here, end = [], [], [], 0, 0, 0
    for (first, last), count in zip(ranges, class_counts, strict=True):
        low, high = count * rank // world, count * (rank + 1) // world
        numbers = drawn[first:last] - whole
        i, j = torch.searchsorted(numbers, torch.tensor([low, high])).tolist()
        rows.append(numbers[i:j] - low + here)
        own.append((end, end + j - i))
        start.append(i)
        whole, here, end = whole + count, here + high - low, end + j - i
    return torch.cat(rows), own, Shard(tuple(start), tuple(b - a for a, b in ranges), merge_over())


class GatherSamples(torch.autograd.Function):
    """Embeddings [b, D] of every rank, one after the other [world b, D]; their gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks, ctx.rows = ranks, slice(ranks.rank * len(x), (ranks.rank + 1) * len(x))
        return gather_rows(x, ranks)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.ranks.sum(gradient.contiguous())[ctx.rows], None


def gather_rows(x: torch.Tensor, ranks: Ranks, group=None) -> torch.Tensor:
    """Tensors [b, ...] of equal shape from every rank as one [world b, ...]."""
    if ranks.world == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.world)]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)
