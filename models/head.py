

import torch

from kernels.margin_loss import Shard, merge_over
from models.runs import Ranks


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
