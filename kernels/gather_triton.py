"""The interleaved gather in Triton: what `gather.gather_interleaved` runs on a GPU; it is defined there.

The kernel reads uint8 and writes the finished batch in one pass. A row, domain or box outside the banks makes NaN of
its output image and leaves its place in `flag`: an assert on the device would end the whole process.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = (4, 256)  # lines and numbers of a line (3 S of them) a program: 8 a thread, one vector of bf16

# ---------------------------------------------------------------- kernels


@triton.jit
def find_image(b, banks, sizes, domain, row):
    """Pointer to the image of output b, its height and width, and whether it is there at all; K is unrolled.

    `sizes` holds 2 n + 3 for every number n: Triton makes another kernel where an integer is 1 or divisible by 16, and
    the images of a bank change from step to step (none at all: a bank of 1 x 1).
    """
    d = tl.load(domain + b)
    r = tl.load(row + b)
    image = banks[0]
    height, width = (sizes[1] - 3) // 2 + 0 * b, (sizes[2] - 3) // 2 + 0 * b
    there = (b < 0) & (b >= 0)
    for k in tl.static_range(len(banks)):
        if d == k:
            there = (r >= 0) & (r < (sizes[3 * k] - 3) // 2)
            height, width = (sizes[3 * k + 1] - 3) // 2 + 0 * b, (sizes[3 * k + 2] - 3) // 2 + 0 * b
            image = banks[k] + tl.where(there, r, 0) * height.to(tl.int64) * width * 3
    return image, height, width, there


@triton.jit
def filter_weight(x, CUBIC: tl.constexpr):
    """As `gather.filter_weights`."""
    x = tl.abs(x)
    if not CUBIC:
        return tl.maximum(1 - x, 0.0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))


@triton.jit
def find_taps(place, low, high, S, CUBIC: tl.constexpr):
    """Of the output pixels `place` over low..high: where the filter is centred, how far it is widened, its first pixel
    and how many pixels any of them may see."""
    step = (high - low) / S
    reach = tl.maximum(step, 1.0)
    support = reach * (2 if CUBIC else 1)
    centre = low + (place + 0.5) * step
    return centre, reach, tl.floor(centre - support + 0.5).to(tl.int32), tl.ceil(2 * support).to(tl.int32)


@triton.jit
def tap(centre, reach, first, low, high, t, CUBIC: tl.constexpr):
    """Pixel number t of the filters around the centres and its weight, 0 outside the pixels that low..high touches."""
    pixel = first + t
    seen = (pixel >= tl.floor(low)) & (pixel < tl.ceil(high))
    return pixel, tl.where(seen, filter_weight((pixel.to(tl.float32) + 0.5 - centre) / reach, CUBIC), 0.0)


@triton.jit
def resample_images(
    banks, sizes, domain, row, boxes, flip, flag, out, f0, f1, f2, s0, s1, s2, S,
    BOXES: tl.constexpr, FLIP: tl.constexpr, CUBIC: tl.constexpr, CHANNELS_LAST: tl.constexpr, LINES: tl.constexpr,
    NUMBERS: tl.constexpr,
):  # fmt: skip
    """Numbers of the output in the order in which they lie there: Σ_x w_x Σ_y w_y byte over the filters of the axes."""
    b = tl.program_id(0)
    image, height, width, there = find_image(b, banks, sizes, domain, row)
    columns = tl.cdiv(3 * S, NUMBERS)
    Y = tl.program_id(1) // columns * LINES + tl.arange(0, LINES)
    at = tl.program_id(1) % columns * NUMBERS + tl.arange(0, NUMBERS)
    channel, X = at // S, at % S
    if CHANNELS_LAST:
        channel, X = at % 3, at // 3
    x0, y0, x1, y1 = 0.0, 0.0, width.to(tl.float32), height.to(tl.float32)
    if BOXES:
        x0, y0 = tl.load(boxes + 4 * b), tl.load(boxes + 4 * b + 1)
        x1, y1 = tl.load(boxes + 4 * b + 2), tl.load(boxes + 4 * b + 3)
        # a wrong box must not set the length of the loops below
        there = there & (x0 >= 0) & (y0 >= 0) & (x1 > x0) & (y1 > y0) & (x1 <= width) & (y1 <= height)
        x0, y0 = tl.where(there, x0, 0.0), tl.where(there, y0, 0.0)
        x1, y1 = tl.where(there, x1, 1.0), tl.where(there, y1, 1.0)
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
            seen = (weight_y != 0)[:, None] & (weight_x != 0)[None, :] & there
            part += weight_y[:, None] * tl.load(place, mask=seen, other=0).to(tl.float32)
        value += weight_x[None, :] * part
    value = value / (tl.where(sum_y != 0, sum_y, 1.0)[:, None] * tl.where(sum_x != 0, sum_x, 1.0)[None, :])
    value = tl.minimum(tl.maximum(value, 0.0), 255.0)  # the cubic overshoots
    value = value * tl.where(channel == 0, f0, tl.where(channel == 1, f1, f2))[None, :]
    value = value + tl.where(channel == 0, s0, tl.where(channel == 1, s1, s2))[None, :]
    value = tl.where(there, value, float("nan")).to(out.dtype.element_ty)
    place = Y[:, None] * 3 * S + at[None, :]
    if not CHANNELS_LAST:
        place = Y[:, None] * S + (channel * S * S + X)[None, :]
    tl.store(out + b.to(tl.int64) * 3 * S * S + place, value, mask=(Y < S)[:, None] & (at < 3 * S)[None, :])
    if (there == 0) & (tl.program_id(1) == 0):
        tl.atomic_min(flag, b)


# ---------------------------------------------------------------- host


def gather(banks: list[Tensor], domain: Tensor, row: Tensor, size: int, mean, std, boxes: Tensor | None,
           flip: Tensor | None, interpolation: str, dtype: torch.dtype, channels_last: bool, flag: Tensor) -> Tensor:
    """`gather.gather_interleaved` for tensors on one device; `flag` int32 [1] takes the first wrong place."""
    B = len(domain)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(B, 3, size, size, dtype=dtype, device=banks[0].device, memory_format=layout)
    if not B:
        return out
    factors = [1 / (255 * float(s)) for s in std]
    shifts = [-float(m) / float(s) for m, s in zip(mean, std, strict=True)]
    banks = tuple(bank.contiguous() for bank in banks)
    sizes = tuple(2 * number + 3 for bank in banks for number in bank.shape[:3])
    tiles = triton.cdiv(size, TILE[0]) * triton.cdiv(3 * size, TILE[1])
    # what is absent is never read
    boxes_, flip_ = (domain if v is None else v.to(kind).contiguous() for v, kind in (
        (boxes, torch.float32), (flip, torch.uint8)))
    with torch.cuda.device_of(out):  # Triton launches on the current device
        resample_images[(B, tiles)](
            banks, sizes, domain.contiguous(), row.contiguous(), boxes_, flip_, flag, out, *factors, *shifts, size,
            BOXES=boxes is not None, FLIP=flip is not None, CUBIC=interpolation == "bicubic",
            CHANNELS_LAST=channels_last, LINES=TILE[0], NUMBERS=TILE[1])
    return out
