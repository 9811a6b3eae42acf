"""Degradation of sharp face crops to low quality, with a severity from 0 to 1; and shifts of objects.

At severity 1 the ranges match surveillance-like sets at 112 pixels (faces of 12 to 56 pixels, blur, motion, turbulence,
sensor noise, strong JPEG); lengths scale with the image. Order and ranges are a simplification of the published
augmentations of AdaFace, GFPGAN and Real-ESRGAN. `train.py --degrade` applies them online; `data_prep degrade` writes
degraded copies of a split, or of a test split of objects under one kind of shift each.
"""

import math
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from data_prep import DOMAINS, InputError
from data_prep.format import OPTIONAL, TABLES, BadImage, Record, Source, Split, encode, open_split


@lru_cache(maxsize=256)
def frequencies(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Frequencies of a real image's spectrum in radians per pixel: vertical [H, 1], horizontal [1, W // 2 + 1]."""
    return 2 * math.pi * torch.fft.fftfreq(height)[:, None], 2 * math.pi * torch.fft.rfftfreq(width)[None]


def blur(x: Tensor, sigma: tuple[float, float], angle: float = 0.0, length: float = 0.0, direction: float = 0.0
         ) -> Tensor:
    """Gaussian blur and linear motion blur, multiplied in the Fourier domain, where the cost is that of any length.

    Args:
        x: float32 [C, H, W]; edges are replicated.
        sigma: of the Gaussian along its two axes, in pixels.
        angle: of the first axis in radians, clockwise from the horizontal.
        length: of the motion, in pixels.
        direction: of the motion, as `angle`.
    """
    H, W = x.shape[1:]
    pad = math.ceil(3 * max(sigma) + length / 2)
    h, w = (16 * math.ceil((side + 2 * pad) / 16) for side in (H, W))  # products of small primes
    (v, u), (cos, sin) = frequencies(h, w), (math.cos(angle), math.sin(angle))
    along = (sigma[0] * cos) * u + (sigma[0] * sin) * v
    across = (sigma[1] * cos) * v - (sigma[1] * sin) * u
    transfer = along.square_().addcmul_(across, across).mul_(-0.5).exp_()
    if length:
        half = (length / 2 * math.cos(direction)) * u + (length / 2 * math.sin(direction)) * v + 1e-6
        transfer *= half.sin().div_(half)
    padded = F.pad(x[None], (pad, w - W - pad, pad, h - H - pad), mode="replicate")[0]
    return torch.fft.irfft2(torch.fft.rfft2(padded).mul_(transfer), s=(h, w))[:, pad : pad + H, pad : pad + W]


def warp(x: Tensor, field: Tensor, tilt: float, sigma: float) -> Tensor:
    """Displace every pixel by a smooth random field, as atmospheric turbulence does.

    Args:
        x: float32 [3, H, W].
        field: white noise [2, G, G] on a grid, which is smoothed.
        tilt: root mean square of the displacement along an axis, in pixels.
        sigma: of the smoothing, in cells of the grid.
    """
    H, W = x.shape[1:]
    shift = F.interpolate(blur(field, (sigma, sigma))[None], size=(H, W), mode="bilinear")[0]
    shift = tilt * shift / shift.square().mean().sqrt()
    across, down = ((2 * torch.arange(side) + 1) / side - 1 for side in (W, H))
    grid = torch.stack([across + shift[0] * (2 / W), down[:, None] + shift[1] * (2 / H)], dim=-1)
    return F.grid_sample(x[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]


def to_bytes(x: Tensor) -> Tensor:
    """Rounded and clamped to uint8."""
    return x.round().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=32)
def noise_pool(size: int) -> Tensor:
    """Standard normal noise [size], of which images take stretches: drawing it anew costs as much as a JPEG."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


FIELD = 28  # cells of the turbulence grid along a side: 4 pixels each in an image of 112
# downsampling; the last two do not filter first, which leaves the aliasing of cheap cameras
DOWN = ({"mode": "bilinear", "antialias": True}, {"mode": "bicubic", "antialias": True}, {"mode": "area"},
        {"mode": "bilinear"}, {"mode": "nearest-exact"})
FILTERING = 3  # the first three filter


def degrade(image: Tensor, severity: float, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    """Degrade one image: turbulence, blur, motion, downsampling, noise, gamma, grey, JPEG, upsampling to its size.

    Args:
        image: uint8 [3, H, W], RGB, on the CPU.
        severity: 0 (unchanged) to 1; ranges grow with it.
        rng: source of all draws, of fixed number and order: equal generators give equal images, and severity changes
            the strength of each operation, not which ones are applied (except grey).

    Returns:
        The image (same shape and dtype) and the draws, for the sample's metadata; lengths in pixels of an image of 112.
    """
    from torchvision.io import decode_jpeg, encode_jpeg

    use, strength = rng.random(10), rng.random(12)  # all at once, so that operations do not affect each other's draws
    key = int(rng.integers(1 << 63))
    if severity <= 0:
        return image, {}
    H, W = image.shape[1:]
    draws = {"severity": round(severity, 4)}

    def draw(name: str, low: float, high: float, where: float) -> float:
        draws[name] = round(low + (high - low) * float(where), 4)
        return draws[name]

    ratio = math.exp(draw("log_shrink", severity * math.log(12 / 112), severity * math.log(56 / 112), strength[8]))
    side = (max(round(H * ratio), 2), max(round(W * ratio), 2))
    draws["short_side"], draws["down"] = min(side), int(use[3] * len(DOWN))
    down, turbulent = DOWN[draws["down"]], use[2] < 0.2
    # Blur and filtered downsampling commute, so the blur works on fewer pixels. Aliasing and shifts below one pixel
    # need twice the resolution.
    fine = turbulent or draws["down"] >= FILTERING
    first = (min(2 * side[0], H), min(2 * side[1], W)) if fine else side
    x = image[None] if fine or down["mode"] != "area" else image[None].float()
    x = x if first == (H, W) else F.interpolate(x, size=first, **(DOWN[0] if fine else down))
    x, unit = x[0].to(torch.float32, memory_format=torch.contiguous_format), min(first) / 112
    sigma, angle, length, direction = (0.0, 0.0), 0.0, 0.0, 0.0
    if turbulent:
        tilt = draw("turbulence", 0.5 * severity, 2.5 * severity, strength[5]) * unit
        field = torch.randn(2, FIELD, FIELD, generator=torch.Generator().manual_seed(key))
        x = warp(x, field, tilt, draw("turbulence_sigma", 4, 12, strength[6]) * FIELD / 112)
        sigma = (draw("turbulence_blur", 0.1, max(2 * severity, 0.2), strength[7]) * unit,) * 2
    if use[0] < 0.7:
        wide = draw("blur", 0.1, max(2.5 * severity, 0.2), strength[0]) * unit
        sigma = math.hypot(sigma[0], wide), math.hypot(sigma[1], wide * draw("blur_aspect", 0.6, 1, strength[1]))
        angle = draw("blur_angle", 0, math.pi, strength[2])
    if use[1] < 0.3:
        length = draw("motion", 1, 1 + 10 * severity, strength[3]) * unit
        direction = draw("motion_angle", 0, math.pi, strength[4])
    if sigma[0] or length:
        x = blur(x, sigma, angle, length, direction)
    small = (x if first == side else F.interpolate(x[None], size=side, **down)[0]).clamp(0, 255)
    if use[4] < 0.5:
        n = small.numel()
        pool = noise_pool(1 << (4 * n).bit_length())
        noise = pool[(start := key % (len(pool) - n)) : start + n].view(small.shape)
        if use[5] < 0.5:
            small.add_(noise, alpha=draw("noise", 0, 20 * severity, strength[9]))
        else:  # shot noise: variance proportional to intensity
            small.addcmul_((small / 255).sqrt_(), noise, value=draw("shot_noise", 0, 20 * severity, strength[9]))
    small = to_bytes(small)
    if use[6] < 0.3:
        gamma = math.exp(draw("log_gamma", -0.7 * severity, 0.7 * severity, strength[10]))
        table = to_bytes(255 * (torch.arange(256) / 255) ** gamma)
        small = torch.from_numpy(table.numpy()[small.numpy()])
    if use[7] < 0.05 * severity:
        draws["grey"] = 1
        small = to_bytes(small.float().mean(0, keepdim=True)).expand_as(small)
    if use[8] < 0.8:
        quality = round(draw("jpeg", 100 - 80 * severity, 100 - 10 * severity, strength[11]))
        small = decode_jpeg(encode_jpeg(small.contiguous(), quality=quality))
    draws["up"] = "bicubic" if use[9] < 0.5 else "bilinear"
    # bytes are resized several times as fast as float32
    return F.interpolate(small[None], size=(H, W), mode=draws["up"])[0], draws


# ---------------------------------------------------------------- shifts of one kind

# Names and five severities as in ImageNet-C (arXiv 1903.12261), but other parameters: results are not comparable.
SHIFTS = {
    "gaussian_noise": (0.04, 0.08, 0.13, 0.2, 0.3),  # standard deviation, of images scaled to 0..1
    "gaussian_blur": (0.5, 1.0, 1.6, 2.4, 3.4),  # sigma in pixels of an image of 112
    "contrast": (0.7, 0.5, 0.35, 0.22, 0.12),  # factor on the distance from the mean of each channel
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to images scaled to 0..1
    "pixelate": (0.6, 0.45, 0.33, 0.25, 0.18),  # factor on the pixels along a side
    "jpeg_compression": (30, 20, 14, 9, 5),  # quality
}


def shift(kind: str, severity: int, image: Tensor, rng: np.random.Generator) -> tuple[Tensor, dict]:
    """An image uint8 [3, H, W] (RGB, on the CPU) under a shift of SHIFTS, and fields for its JSON."""
    from torchvision.io import decode_jpeg, encode_jpeg

    strength, x, side = SHIFTS[kind][severity - 1], image.float().contiguous(), image.shape[1:]
    if kind == "gaussian_noise":
        x += 255 * strength * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    elif kind == "gaussian_blur":
        x = blur(x, (strength * min(side) / 112,) * 2)
    elif kind == "contrast":
        x = torch.lerp(x.mean((1, 2), keepdim=True), x, strength)
    elif kind == "brightness":
        x += 255 * strength
    elif kind == "pixelate":
        small = F.interpolate(x[None], size=[max(round(strength * one), 1) for one in side], mode="area")
        x = F.interpolate(small, size=side, mode="nearest-exact")[0]
    else:
        x = decode_jpeg(encode_jpeg(image.contiguous(), quality=strength)).float()
    return to_bytes(x), {"kind": kind, "severity": severity}


def degrade_between(low: float, high: float, image: Tensor, rng: np.random.Generator) -> tuple[Tensor, dict]:
    """`degrade` at a severity drawn uniformly from low..high."""
    return degrade(image, low + (high - low) * rng.random(), rng)


def choose_changes(shifts: str | None, low: float, high: float) -> dict[str, tuple[partial, dict[str, str]]]:
    """The splits that `data_prep degrade` writes: suffix of the name -> (change of an image, its provenance).

    `shifts`: `KIND[-SEVERITY],...` or `all`; a kind without a severity means all five; None: `degrade_between`.
    """
    if shifts is None:
        return {"": (partial(degrade_between, low, high), {"severity": str(high), "min_severity": str(low)})}
    changes = {}
    for part in (",".join(SHIFTS) if shifts == "all" else shifts).split(","):
        kind, _, severity = part.strip().partition("-")
        if kind not in SHIFTS or severity not in ("", *"12345"):
            raise InputError(f"--shift {part.strip()!r}: want all, or KIND[-SEVERITY],... with a severity 1 to 5 and a "
                             f"kind of {', '.join(SHIFTS)}")
        for one in severity or "12345":
            changes[f"-{kind}-{one}"] = partial(shift, kind, int(one)), {"kind": kind, "severity": one}
    return changes


# ---------------------------------------------------------------- offline


def degraded_sample(folder: Path, row: int, change: partial, seed: int) -> tuple[bytes, dict]:
    """A degraded sample of a split, and fields for its JSON.

    Draws depend on the seed and the row alone, not on the number of workers.
    """
    split = open_split(folder)
    try:
        image = split.image(row)
    except BadImage as error:
        raise BadImage("unreadable image") from error
    rng = np.random.default_rng((seed, DOMAINS.index("face_lq"), row))
    image, draws = change(image, rng)
    shard = Path(split.index["shards"][int(split.shard[row])]["file"])  # a neighbour's if the split is merged
    name = f"{split.domain}/{shard.parent.name or split.name}/{split.jpeg(row)[0]}"
    bitmap = encode(Image.fromarray(image.permute(1, 2, 0).numpy()), "BMP")
    return bitmap, {"degradation": draws | {"from": name}, "source": split.fields(row).get("source")}


def degraded_split(split: Split, change: partial, seed: int) -> Source:
    """A source of degraded copies of a split with the same identities, columns, protocol and lists.

    `change`: from `choose_changes`: (image uint8 [3, H, W], generator) -> (degraded image, fields for its JSON).
    """
    columns = {name: split.column(name) for name in OPTIONAL if name in split.index["columns"]}
    done = " ".join(map(str, (change.func.__name__, *change.args)))  # in the names, so that it changes the plan

    def records() -> Iterator[Record]:
        for row in range(len(split)):
            label, fields = int(split.labels[row]), split.fields(row)
            optional = {name: column[row].item() for name, column in columns.items() if column[row] >= 0}
            yield Record(partial(degraded_sample, split.folder, row, change, seed),
                         f"{split.domain}/{split.name}/{fields.get('key')}, {done}",
                         split.classes[label] if label >= 0 else None, person=fields.get("person"), **optional)

    listed = set(TABLES) & set(split.index["columns"])
    # pairs name rows, which are counted again as images may be lost; template numbers stay
    drop = ("pairs", "pairs_lost") if "pairs" in listed else ()
    protocol = split.protocol and {key: value for key, value in split.protocol.items() if key not in drop}
    pairs = split.column("pairs").tolist() if "pairs" in listed else []
    tables = {name: np.array(split.column(name)) for name in sorted(listed - {"pairs"})}
    if change.func is shift:
        protocol["ood"] = True
    names = dict(zip(split.classes, split.names, strict=True))
    return Source(records(), protocol, pairs, names=names, tables=tables, listed=bool((protocol or {}).get("misses")))


def draw_ladder(path: Path, images: list[Tensor], seed: int, steps: int = 6) -> None:
    """Draw severities 0 to 1 from left to right, one row per image, with the same draws in a row."""
    side, top = max(image.shape[2] for image in images), 14
    sheet = Image.new("RGB", (steps * (side + 2), top + len(images) * (side + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, severity in enumerate(np.linspace(0, 1, steps)):
        pen.text((column * (side + 2) + 2, 1), f"severity {severity:.1f}", fill="black")
        for row, image in enumerate(images):
            soft, _ = degrade(image, float(severity), np.random.default_rng((seed, row)))
            sheet.paste(Image.fromarray(soft.permute(1, 2, 0).numpy()),
                        (column * (side + 2), top + row * (side + 2)))
    sheet.save(path)
