"""The interleaved gather in Triton; kernels/gather.py defines and calls it.
Copy with it: nothing; kernels/gather.py calls it.

The kernel reads uint8 and writes the finished batch in one pass. For a row, domain or box outside the banks, the output
image is NaN: a device assert would end the process.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = (4, 256)  # lines, and values of the 3 S of a line, per program: 8 per thread, one vector of bf16

# ---------------------------------------------------------------- kernels


@triton.jit
def find_image(b, banks, sizes, domain, row):
    """Pointer to the image of output b, its height and width, and whether it exists.

    `sizes` holds 2 n + 3 for every number n, because Triton recompiles a kernel if an integer is 1 or divisible by 16,
    and the number of images in a bank changes from step to step.
    """
    d = tl.load(domain + b)
    r = tl.load(row + b)
    image = banks[0]
    height, width = 1 + 0 * b, 1 + 0 * b  # of the type of those below
    valid = (b < 0) & (b >= 0)
    for k in tl.static_range(len(banks)):
        if d == k:
            valid = (r >= 0) & (r < (sizes[3 * k] - 3) // 2)
            height, width = (sizes[3 * k + 1] - 3) // 2 + 0 * b, (sizes[3 * k + 2] - 3) // 2 + 0 * b
            image = banks[k] + tl.where(valid, r, 0) * height.to(tl.int64) * width * 3
    return image, height, width, valid


@triton.jit
def filter_weight(x, CUBIC: tl.constexpr):
    """As `gather.filter_weights`."""
    x = tl.abs(x)
    if not CUBIC:
        return tl.maximum(1 - x, 0.0)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return tl.where(x < 1, inner, tl.where(x < 2, outer, 0.0))


@triton.jit
def find_taps(place, low, high, S, CUBIC: tl.constexpr):
    """Centre, widening factor, first pixel and largest number of pixels of the filters of output pixels `place`."""
    step = (high - low) / S
    reach = tl.maximum(step, 1.0)
    support = reach * (2 if CUBIC else 1)
    centre = low + (place + 0.5) * step
    return centre, reach, tl.floor(centre - support + 0.5).to(tl.int32), tl.ceil(2 * support).to(tl.int32)


@triton.jit
def tap(centre, reach, first, low, high, t, CUBIC: tl.constexpr):
    """Pixel t of the filters and its weight, which is 0 outside the pixels that low..high touches."""
    pixel = first + t
    inside = (pixel >= tl.floor(low)) & (pixel < tl.ceil(high))
    return pixel, tl.where(inside, filter_weight((pixel.to(tl.float32) + 0.5 - centre) / reach, CUBIC), 0.0)


@triton.jit
def resample_images(
    banks, sizes, domain, row, boxes, flip, out, f0, f1, f2, s0, s1, s2, S,
    BOXES: tl.constexpr, FLIP: tl.constexpr, CUBIC: tl.constexpr, LINES: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Output values in memory order, channels last: Σ_x w_x Σ_y w_y byte."""
    b = tl.program_id(0)
    image, height, width, valid = find_image(b, banks, sizes, domain, row)
    columns = tl.cdiv(3 * S, NUMBERS)
    Y = tl.program_id(1) // columns * LINES + tl.arange(0, LINES)
    number = tl.program_id(1) % columns * NUMBERS + tl.arange(0, NUMBERS)
    channel, X = number % 3, number // 3
    x0, y0, x1, y1 = 0.0, 0.0, width.to(tl.float32), height.to(tl.float32)
    if BOXES:
        x0, y0 = tl.load(boxes + 4 * b), tl.load(boxes + 4 * b + 1)
        x1, y1 = tl.load(boxes + 4 * b + 2), tl.load(boxes + 4 * b + 3)
        # an invalid box must not determine the length of the loops below
        valid = valid & (x0 >= 0) & (y0 >= 0) & (x1 > x0) & (y1 > y0) & (x1 <= width) & (y1 <= height)
        x0, y0 = tl.where(valid, x0, 0.0), tl.where(valid, y0, 0.0)
        x1, y1 = tl.where(valid, x1, 1.0), tl.where(valid, y1, 1.0)
    source = X
    if FLIP:
        source = tl.where(tl.load(flip + b) != 0, S - 1 - X, X)
    centre_x, reach_x, first_x, taps_x = find_taps(source, x0, x1, S, CUBIC)
    centre_y, reach_y, first_y, taps_y = find_taps(Y, y0, y1, S, CUBIC)
    value = tl.zeros([LINES, NUMBERS], tl.float32)
    sum_x, sum_y = tl.zeros([NUMBERS], tl.float32), tl.zeros([LINES], tl.float32)
    for t in range(0, taps_x):
        column, weight_x = tap(centre_x, reach_x, first_x, x0, x1, t, CUBIC)
        sum_x += weight_x
        part = tl.zeros([LINES, NUMBERS], tl.float32)
        sum_y = tl.zeros([LINES], tl.float32)
        for v in range(0, taps_y):
            line, weight_y = tap(centre_y, reach_y, first_y, y0, y1, v, CUBIC)
            sum_y += weight_y
            place = image + (line[:, None] * width + column[None, :]) * 3 + channel[None, :]
            used = (weight_y != 0)[:, None] & (weight_x != 0)[None, :] & valid
            part += weight_y[:, None] * tl.load(place, mask=used, other=0).to(tl.float32)
        value += weight_x[None, :] * part
    value = value / (tl.where(sum_y != 0, sum_y, 1.0)[:, None] * tl.where(sum_x != 0, sum_x, 1.0)[None, :])
    value = tl.minimum(tl.maximum(value, 0.0), 255.0)  # the cubic filter overshoots
    value = value * tl.where(channel == 0, f0, tl.where(channel == 1, f1, f2))[None, :]
    value = value + tl.where(channel == 0, s0, tl.where(channel == 1, s1, s2))[None, :]
    value = tl.where(valid, value, float("nan")).to(out.dtype.element_ty)
    place = Y[:, None] * 3 * S + number[None, :]
    tl.store(out + b.to(tl.int64) * 3 * S * S + place, value, mask=(Y < S)[:, None] & (number < 3 * S)[None, :])


# ---------------------------------------------------------------- host


def gather(banks: list[Tensor], domain: Tensor, row: Tensor, size: int, mean, std, boxes: Tensor | None,
           flip: Tensor | None, interpolation: str, dtype: torch.dtype) -> Tensor:
    """`gather.gather_interleaved` for tensors on one device."""
    B = len(domain)
    out = torch.empty(B, 3, size, size, dtype=dtype, device=banks[0].device, memory_format=torch.channels_last)
    if not B:
        return out
    factors = [1 / (255 * float(s)) for s in std]
    shifts = [-float(m) / float(s) for m, s in zip(mean, std, strict=True)]
    banks = tuple(bank.contiguous() for bank in banks)
    sizes = tuple(2 * number + 3 for bank in banks for number in bank.shape[:3])
    tiles = triton.cdiv(size, TILE[0]) * triton.cdiv(3 * size, TILE[1])
    # pointers of absent arguments are never read
    boxes_, flip_ = (domain if v is None else v.to(kind).contiguous() for v, kind in (
        (boxes, torch.float32), (flip, torch.uint8)))
    with torch.cuda.device_of(out):  # Triton launches on the current device
        resample_images[(B, tiles)](
            banks, sizes, domain.contiguous(), row.contiguous(), boxes_, flip_, out, *factors, *shifts, size,
            BOXES=boxes is not None, FLIP=flip is not None, CUBIC=interpolation == "bicubic", LINES=TILE[0],
            NUMBERS=TILE[1])
    return out
