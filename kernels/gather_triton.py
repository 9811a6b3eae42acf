"""The interleaved gather in Triton: what `kernels.gather.gather_interleaved` runs on a GPU; it is defined there.

Both kernels read uint8 and write the finished batch in one pass. A row, domain or box outside the banks makes NaN of
its output image and leaves its place in `flag`: an assert on the device would end the whole process.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements a program of the pure copy: 32 a thread, enough bytes in flight to cover the latency of memory
TILE = (8, 32)  # rows, columns of output pixels a program of the resampling

# ---------------------------------------------------------------- kernels


@triton.jit
def find_image(b, banks, sizes, domain, row):
    """Pointer to the image of output b, its height and width, and whether it is there at all; K is unrolled."""
    d = tl.load(domain + b)
    r = tl.load(row + b)
    image = banks[0]
    height = sizes[1] + 0 * b
    width = sizes[2] + 0 * b
    there = (b < 0) & (b >= 0)
    for k in tl.static_range(len(banks)):
        if d == k:
            there = (r >= 0) & (r < (sizes[3 * k] - 3) // 2)
            height = sizes[3 * k + 1] + 0 * b
            width = sizes[3 * k + 2] + 0 * b
            image = banks[k] + tl.where(there, r, 0) * height.to(tl.int64) * width * 3
    return image, height, width, there


@triton.jit
def copy_images(
    banks, sizes, domain, row, flip, flag, out, f0, f1, f2, s0, s1, s2, S,
    FLIP: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whole images of S x S: factor · byte + shift, by channel; elements in the order of the output."""
    b = tl.program_id(0)
    image, _, _, there = find_image(b, banks, sizes, domain, row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < 3 * S * S
    if CHANNELS_LAST:
        pixel = at // 3
        channel = at - 3 * pixel
    else:
        channel = at // (S * S)
        pixel = at - channel * (S * S)
    mirrored = False
    if FLIP:
        mirrored = tl.load(flip + b) != 0
    if mirrored:
        line = pixel // S
        place = (line * S + S - 1 - (pixel - line * S)) * 3 + channel
        byte = tl.load(image + place, mask=inside & there, other=0)
    else:
        if CHANNELS_LAST:  # input and output in the same order: wide loads
            byte = tl.load(image + at, mask=inside & there, other=0)
        else:
            byte = tl.load(image + pixel * 3 + channel, mask=inside & there, other=0)
    factor = tl.where(channel == 0, f0, tl.where(channel == 1, f1, f2))
    shift = tl.where(channel == 0, s0, tl.where(channel == 1, s1, s2))
    value = byte.to(tl.float32) * factor + shift
    value = tl.where(there, value, float("nan"))
    tl.store(out + b.to(tl.int64) * 3 * S * S + at, value.to(out.dtype.element_ty), mask=inside)
    if (there == 0) & (tl.program_id(1) == 0):
        tl.atomic_min(flag, b)


@triton.jit
def tap(centre, reach, first, low, high, t):
    """Pixel number t of the triangle filter around every centre and its weight, 0 outside low <= pixel < high."""
    pixel = first + t
    weight = tl.maximum(1 - tl.abs(pixel.to(tl.float32) + 0.5 - centre) / reach, 0.0)
    return pixel, tl.where((pixel >= low) & (pixel < high), weight, 0.0)


@triton.jit
def resample_images(
    banks, sizes, domain, row, boxes, flip, flag, out, f0, f1, f2, s0, s1, s2, S,
    BOXES: tl.constexpr, FLIP: tl.constexpr, CHANNELS_LAST: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
):  # fmt: skip
    """A tile TY x TX of output pixels: Σ_y w_y Σ_x w_x byte over the triangle filters of both axes."""
    b = tl.program_id(0)
    image, height, width, there = find_image(b, banks, sizes, domain, row)
    columns = tl.cdiv(S, TX)
    Y = tl.program_id(1) // columns * TY + tl.arange(0, TY)
    X = tl.program_id(1) % columns * TX + tl.arange(0, TX)
    x0, y0 = 0.0, 0.0
    x1, y1 = width.to(tl.float32), height.to(tl.float32)
    if BOXES:
        x0, y0 = tl.load(boxes + 4 * b), tl.load(boxes + 4 * b + 1)
        x1, y1 = tl.load(boxes + 4 * b + 2), tl.load(boxes + 4 * b + 3)
        # a wrong box must not set the length of the loops below
        fits = (x0 >= 0) & (y0 >= 0) & (x1 > x0) & (y1 > y0) & (x1 <= width) & (y1 <= height)
        there = there & fits
        x0, y0 = tl.where(there, x0, 0.0), tl.where(there, y0, 0.0)
        x1, y1 = tl.where(there, x1, 1.0), tl.where(there, y1, 1.0)
    source_x = X
    if FLIP:
        source_x = tl.where(tl.load(flip + b) != 0, S - 1 - X, X)
    step_x, step_y = (x1 - x0) / S, (y1 - y0) / S
    reach_x, reach_y = tl.maximum(step_x, 1.0), tl.maximum(step_y, 1.0)
    centre_x = x0 + (source_x + 0.5) * step_x
    centre_y = y0 + (Y + 0.5) * step_y
    first_x = tl.floor(centre_x - reach_x - 0.5).to(tl.int32)
    first_y = tl.floor(centre_y - reach_y - 0.5).to(tl.int32)
    low_x, low_y = tl.floor(x0).to(tl.int32), tl.floor(y0).to(tl.int32)
    high_x, high_y = tl.ceil(x1).to(tl.int32), tl.ceil(y1).to(tl.int32)
    taps_x, taps_y = tl.ceil(2 * reach_x).to(tl.int32) + 2, tl.ceil(2 * reach_y).to(tl.int32) + 2
    red, green, blue = tl.zeros([TY, TX], tl.float32), tl.zeros([TY, TX], tl.float32), tl.zeros([TY, TX], tl.float32)
    sum_x, sum_y = tl.zeros([TX], tl.float32), tl.zeros([TY], tl.float32)
    for t in range(0, taps_x):
        _, weight = tap(centre_x, reach_x, first_x, low_x, high_x, t)
        sum_x += weight
    for v in range(0, taps_y):
        line, weight_y = tap(centre_y, reach_y, first_y, low_y, high_y, v)
        sum_y += weight_y
        r, g, bl = tl.zeros([TY, TX], tl.float32), tl.zeros([TY, TX], tl.float32), tl.zeros([TY, TX], tl.float32)
        for t in range(0, taps_x):
            column, weight = tap(centre_x, reach_x, first_x, low_x, high_x, t)
            place = image + (line[:, None] * width + column[None, :]) * 3
            seen = (weight_y > 0)[:, None] & (weight > 0)[None, :] & there
            r += weight[None, :] * tl.load(place, mask=seen, other=0).to(tl.float32)
            g += weight[None, :] * tl.load(place + 1, mask=seen, other=0).to(tl.float32)
            bl += weight[None, :] * tl.load(place + 2, mask=seen, other=0).to(tl.float32)
        red += weight_y[:, None] * r
        green += weight_y[:, None] * g
        blue += weight_y[:, None] * bl
    norm = 1 / (tl.where(sum_y > 0, sum_y, 1.0)[:, None] * tl.where(sum_x > 0, sum_x, 1.0)[None, :])
    norm = tl.where(there, norm, float("nan"))
    inside = (Y < S)[:, None] & (X < S)[None, :]
    pixel = Y[:, None] * S + X[None, :]
    kind = out.dtype.element_ty
    out += b.to(tl.int64) * 3 * S * S
    if CHANNELS_LAST:
        tl.store(out + 3 * pixel, (red * norm * f0 + s0).to(kind), mask=inside)
        tl.store(out + 3 * pixel + 1, (green * norm * f1 + s1).to(kind), mask=inside)
        tl.store(out + 3 * pixel + 2, (blue * norm * f2 + s2).to(kind), mask=inside)
    else:
        tl.store(out + pixel, (red * norm * f0 + s0).to(kind), mask=inside)
        tl.store(out + S * S + pixel, (green * norm * f1 + s1).to(kind), mask=inside)
        tl.store(out + 2 * S * S + pixel, (blue * norm * f2 + s2).to(kind), mask=inside)
    if (there == 0) & (tl.program_id(1) == 0):
        tl.atomic_min(flag, b)


# ---------------------------------------------------------------- host


def describe_bank(bank: Tensor) -> tuple[int, int, int]:
    """2 N + 3, height and width of a bank [N, H, W, 3].

    N changes from step to step. Triton makes another kernel where an integer is 1 or divisible by 16, which an odd
    number above 1 never is; heights and widths stay and may have their kernel.
    """
    return 2 * len(bank) + 3, *bank.shape[1:3]


def gather(banks: list[Tensor], domain: Tensor, row: Tensor, size: int, mean, std, boxes: Tensor | None,
           flip: Tensor | None, dtype: torch.dtype, channels_last: bool, flag: Tensor) -> Tensor:
    """`kernels.gather.gather_interleaved` for tensors on one device; `flag` int32 [1] takes the first wrong place."""
    B = len(domain)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(B, 3, size, size, dtype=dtype, device=banks[0].device, memory_format=layout)
    if not B:
        return out
    factors = [1 / (255 * float(s)) for s in std]
    shifts = [-float(m) / float(s) for m, s in zip(mean, std, strict=True)]
    banks = tuple(bank.contiguous() for bank in banks)
    sizes = tuple(number for bank in banks for number in describe_bank(bank))
    flags = {"FLIP": flip is not None, "CHANNELS_LAST": channels_last}
    flip = domain if flip is None else flip.view(torch.uint8)  # never read where FLIP is off
    if boxes is None and all(bank.shape[1:3] == (size, size) for bank in banks):
        copy_images[(B, triton.cdiv(3 * size * size, BLOCK))](
            banks, sizes, domain, row, flip, flag, out, *factors, *shifts, size, BLOCK=BLOCK, **flags)
    else:
        tiles = triton.cdiv(size, TILE[0]) * triton.cdiv(size, TILE[1])
        resample_images[(B, tiles)](
            banks, sizes, domain, row, domain if boxes is None else boxes.contiguous(), flip, flag, out, *factors,
            *shifts, size, BOXES=boxes is not None, TY=TILE[0], TX=TILE[1], **flags)
    return out
