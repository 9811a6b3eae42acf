"""Sizes of the margin loss's launches: what the host decides, from shapes and class ranges alone (no Triton needed).
To use it elsewhere, copy it with margin_loss.py and margin_triton.py.
"""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Tile sizes of the matrix products."""

    rows: int  # samples of a forward tile; every domain starts one
    height: int  # samples of a backward tile; divides rows
    classes: int  # of a tile
    width: int  # of D, a step of the cosines; divides columns
    columns: int  # of D, a program of the products
    step: int  # samples or classes, a step of the products; divides height and classes
    warps: int
    class_warps: int  # of class_products, whose tile is classes x columns
    stages: int


# By operand and samples per domain; from arithmetic and from what the compiler says (`kernels.bench compile`), not yet
# from measurements: see RESULTS.md.
LAUNCH = {
    ("bf16", 512): Launch(256, 128, 128, width=64, columns=128, step=64, warps=8, class_warps=8, stages=3),
    ("bf16", 128): Launch(128, 128, 128, width=64, columns=128, step=64, warps=8, class_warps=8, stages=3),
    ("bf16", 64): Launch(64, 64, 128, width=64, columns=128, step=64, warps=4, class_warps=8, stages=3),
    ("bf16", 16): Launch(16, 16, 128, width=64, columns=128, step=16, warps=4, class_warps=8, stages=3),
    ("fp32", 64): Launch(64, 64, 64, width=32, columns=64, step=32, warps=4, class_warps=4, stages=3),
    ("fp32", 16): Launch(16, 16, 64, width=32, columns=64, step=16, warps=4, class_warps=4, stages=3),
}
STRIP = 1024  # classes at least per strip: 8 bytes a sample for 1024 logits
CHUNK_BYTES = 16 << 20  # of P: it is written once and read D / columns times, and should stay in the L2 cache
CHUNK = 1024  # classes at least per chunk, whatever CHUNK_BYTES says
COPY_BYTES = 512 << 20  # of a copy of W as a whole; a larger one is made twice, window by window
WINDOW_BYTES = 256 << 20  # of a window


class Plan(NamedTuple):
    """Sizes of a call; how many samples a domain has is known to the GPU alone, so they are for the worst case."""

    launch: Launch
    K: int
    slots: int  # S: every domain may end in a tile that is not full
    pitch: int  # D in whole columns
    operand: torch.dtype  # of the products
    precision: str
    copy: bool  # W is copied for them
    longest: int  # classes of the largest domain
    covers: int  # rows of W that one pass over the ranges writes; 0 where ranges overlap and add up
    window: int  # classes of a domain whose copy is in memory at once; 0: W as a whole
    strip: int
    strips: int  # of a window, or of all classes
    chunk: int  # classes of a domain whose P is in memory at once, in whole tiles
    splits: int  # see choose_splits

    def windows(self) -> list[tuple[int, int]]:
        """Class numbers from, to."""
        step = self.window or max(self.longest, 1)
        return [(low, min(low + step, self.longest)) for low in range(0, self.longest, step)]

    def chunks(self, low: int, high: int) -> list[tuple[int, int]]:
        """Class numbers from, to, of the chunks of a window."""
        return [(first, min(first + self.chunk, high)) for first in range(low, high, self.chunk)]

    def workspace(self, C: int) -> int:
        """Bytes beyond inputs and gradients at the peak, which is in the backward pass."""
        size, copied = self.operand.itemsize, self.window * self.K or C
        return (self.slots * (self.pitch * (size + 4 * self.splits) + self.chunk * size + 40)
                + self.slots // self.launch.height * self.chunk * 4 + 4 * C + self.copy * copied * self.pitch * size)


def disjoint(ranges: tuple) -> list[list[tuple[int, int]]]:
    """The ranges in groups within which none overlaps another: one group where they are disjoint or equal."""
    turns: list[list[tuple]] = []
    for own in dict.fromkeys(r for r in ranges if r[0] < r[1]):
        turn = next((t for t in turns if all(own[1] <= a or b <= own[0] for a, b in t)), None)
        turns.append([own]) if turn is None else turn.append(own)
    return turns


def near_equal(count: int, most: int, unit: int) -> int:
    """Size of the parts of `count`, near-equal and at most about `most`, in multiples of `unit`."""
    parts = max(ceil(count / max(most, 1)), 1)
    return max(ceil(count / (parts * unit)), 1) * unit


def choose_splits(programs: int, chunk: int, processors: int) -> int:
    """In how many parts sample_products sums a chunk: fewest waves of programs, and traffic of what the parts add to.

    A program does 2·height·columns·chunk operations, a split reads and writes 8 bytes for every height·columns of them;
    209 operations take as long as a byte (H100: 700 TFLOP/s, 3.35 TB/s).
    """
    return min(range(1, 17), key=lambda s: ceil(programs * s / processors) / s
               + s * 4 * 209 * programs / (chunk * processors))


@lru_cache(maxsize=256)
def make_plan(N: int, D: int, ranges: tuple, embeddings: torch.dtype, weight: torch.dtype, matmul: str,
              processors: int) -> Plan:
    """Tile sizes and precision of a call.

    bf16 embeddings are multiplied in bf16, fp32 ones as `matmul`, torch's float32_matmul_precision, says: "highest" in
    fp32, "high" and "medium" in TF32. fp16 always in TF32, which has fp16's digits without its overflow.
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
    turns = disjoint(ranges)
    covers = sum(end - start for start, end in turns[0]) if len(turns) == 1 else 0
    part = min(window or longest, longest)
    strip = near_equal(part, max(part * slots // launch.rows // (8 * processors), STRIP), launch.classes)
    strips = max(ceil(part / strip), 1)
    chunk = near_equal(part, max(CHUNK_BYTES // (slots * operand.itemsize), CHUNK), launch.classes)
    splits = choose_splits(slots // launch.height * (pitch // launch.columns), chunk, processors)
    return Plan(launch, K, slots, pitch, operand, "ieee" if exact else "tf32", copy, longest, covers,
                window and strip * strips, strip, strips, chunk, splits)
