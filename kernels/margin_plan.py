"""Launch sizes of the margin loss, from shapes and class ranges alone (without Triton).
Copy with it: nothing; kernels/margin_triton.py calls it.
"""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Tile sizes of the matrix products."""

    rows: int  # samples per forward tile; every domain starts a tile
    height: int  # samples per backward tile; divides rows
    classes: int  # per tile
    width: int  # of D per step of the cosines; divides columns
    columns: int  # of D per program of the products
    step: int  # samples or classes per step of the products; divides height and classes
    warps: int
    class_warps: int  # of class_products, whose tile is classes x columns
    stages: int


# By dtype and samples per domain; from arithmetic and compilation (`kernels.bench compile`), not from measurements:
# see RESULTS.md.
LAUNCH = {
    ("bf16", 512): Launch(256, 128, 128, width=64, columns=128, step=64, warps=8, class_warps=8, stages=3),
    ("bf16", 128): Launch(128, 128, 128, width=64, columns=128, step=64, warps=8, class_warps=8, stages=3),
    ("bf16", 64): Launch(64, 64, 128, width=64, columns=128, step=64, warps=4, class_warps=8, stages=3),
    ("bf16", 16): Launch(16, 16, 128, width=64, columns=128, step=16, warps=4, class_warps=8, stages=3),
    ("fp32", 64): Launch(64, 64, 64, width=32, columns=64, step=32, warps=4, class_warps=4, stages=3),
    ("fp32", 16): Launch(16, 16, 64, width=32, columns=64, step=16, warps=4, class_warps=4, stages=3),
}
STRIP = 1024  # smallest number of classes per strip: 8 bytes per sample for 1024 logits
CHUNK_BYTES = 16 << 20  # size of P, which is written once, read D / columns times, and should stay in the L2 cache
CHUNK = 1024  # smallest number of classes per chunk
COPY_BYTES = 512 << 20  # largest whole copy of W; a larger one is made in windows, forward and backward
WINDOW_BYTES = 256 << 20  # size of a window


class Plan(NamedTuple):
    """Sizes of a call, for the worst case, because only the GPU knows the number of samples of each domain."""

    launch: Launch
    K: int
    slots: int  # S: N and a partial tile per domain
    pitch: int  # D rounded up to whole columns
    operand: torch.dtype  # of the products
    precision: str
    copy: bool  # whether the products need a copy of W
    longest: int  # classes of the largest domain
    covers: int  # rows of W that one pass over the ranges writes; 0 where overlapping ranges need several
    window: int  # classes per domain in a partial copy of W; 0: a whole copy
    strip: int
    strips: int  # of a window, or of all classes
    chunk: int  # classes per domain in P, in whole tiles
    splits: int  # see choose_splits

    def windows(self) -> list[tuple[int, int]]:
        """First class and end of each window."""
        step = self.window or max(self.longest, 1)
        return [(low, min(low + step, self.longest)) for low in range(0, self.longest, step)]

    def chunks(self, low: int, high: int) -> list[tuple[int, int]]:
        """First class and end of each chunk of a window."""
        return [(first, min(first + self.chunk, high)) for first in range(low, high, self.chunk)]

    def workspace(self, C: int) -> int:
        """Peak bytes beyond inputs and gradients, in the backward pass."""
        size, copied = self.operand.itemsize, self.window * self.K or C
        return (self.slots * (self.pitch * (size + 4 * self.splits) + self.chunk * size + 40)
                + self.slots // self.launch.height * self.chunk * 4 + 4 * C + self.copy * copied * self.pitch * size)


def disjoint_groups(ranges: tuple) -> list[list[tuple[int, int]]]:
    """Distinct ranges in groups without overlap: one group if all ranges are disjoint or equal."""
    groups: list[list[tuple]] = []
    for span in dict.fromkeys(r for r in ranges if r[0] < r[1]):
        group = next((t for t in groups if all(span[1] <= a or b <= span[0] for a, b in t)), None)
        groups.append([span]) if group is None else group.append(span)
    return groups


def near_equal(count: int, largest: int, unit: int) -> int:
    """Size of near-equal parts of `count`: a multiple of `unit`, not much above `largest`."""
    parts = max(ceil(count / max(largest, 1)), 1)
    return max(ceil(count / (parts * unit)), 1) * unit


def choose_splits(programs: int, chunk: int, processors: int) -> int:
    """Number of parts in which sample_products sums a chunk, by waves of programs and memory traffic of the sums.

    A program does 2·height·columns·chunk operations; a split moves 8 bytes per output of the height·columns of a tile;
    209 operations take as long as a byte (H100: 700 TFLOP/s, 3.35 TB/s).
    """
    return min(range(1, 17), key=lambda s: ceil(programs * s / processors) / s
               + s * 4 * 209 * programs / (chunk * processors))


@lru_cache(maxsize=256)
def make_plan(N: int, D: int, ranges: tuple, embeddings: torch.dtype, weight: torch.dtype, matmul: str,
              processors: int) -> Plan:
    """Tile sizes and precision of a call.

    Products are in bf16 for bf16 embeddings; for fp32 in fp32 or, if `matmul` (torch's float32_matmul_precision) is not
    "highest", in TF32; for fp16 in TF32, which has the precision of fp16 without its overflow.
    """
    K, kind = len(ranges), "bf16" if embeddings == torch.bfloat16 else "fp32"
    operand = torch.bfloat16 if kind == "bf16" else torch.float32
    exact = embeddings == torch.float32 and matmul == "highest"
    fits = [rows for name, rows in LAUNCH if name == kind and rows <= max(N // K, 16)]
    launch = LAUNCH[kind, max(fits)]
    slots = (N + K * (launch.rows - 1)) // launch.rows * launch.rows
    pitch, longest = ceil(D / launch.columns) * launch.columns, max(end - start for start, end in ranges)
    copy, window = weight != operand or pitch != D, 0
    if copy and max(end for _, end in ranges) * pitch * operand.itemsize > COPY_BYTES:
        window = near_equal(longest, WINDOW_BYTES // (K * pitch * operand.itemsize), launch.classes)
    groups = disjoint_groups(ranges)
    covers = sum(end - start for start, end in groups[0]) if len(groups) == 1 else 0
    part = min(window or longest, longest)
    strip = near_equal(part, max(part * slots // launch.rows // (8 * processors), STRIP), launch.classes)
    strips = max(ceil(part / strip), 1)
    chunk = near_equal(part, max(CHUNK_BYTES // (slots * operand.itemsize), CHUNK), launch.classes)
    splits = choose_splits(slots // launch.height * (pitch // launch.columns), chunk, processors)
    return Plan(launch, K, slots, pitch, operand, "ieee" if exact else "tf32", copy, longest, covers,
                window and strip * strips, strip, strips, chunk, splits)
