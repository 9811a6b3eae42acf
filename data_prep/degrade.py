"""Degradations that turn a sharp face crop into a low-quality one, with one severity from 0 to 1.

The ranges at severity 1 are those of surveillance-like sets at 112 pixels (faces of 12 to 56 pixels, blur, motion,
turbulence, sensor noise, strong JPEG); lengths scale with the image. Orders and ranges follow the published augmenters
of AdaFace, GFPGAN and Real-ESRGAN in a shortened form. Used online by `train.py --degrade`, and offline by
`python -m data_prep degrade`, which writes degraded copies of a split.
"""

import io
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from data_prep import DOMAINS
from data_prep.shards import OPTIONAL, TABLES, BadImage, Record, Source, Split, open_split


def filter_image(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve every channel of x [3, H, W] with a normalised kernel of odd sides, edges repeated."""
    kernel = kernel.to(x.device) / kernel.sum()
    pad = (kernel.shape[1] // 2,) * 2 + (kernel.shape[0] // 2,) * 2
    padded = F.pad(x[:, None], pad, mode="replicate")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def gaussian(sigma_x: float, sigma_y: float, angle: float = 0.0) -> Tensor:
    """Kernel of a Gaussian blur, up to 3 sigma; its axes turned by `angle` (radians)."""
    half = math.ceil(3 * max(sigma_x, sigma_y))
    y, x = torch.meshgrid(*[torch.arange(-half, half + 1.0)] * 2, indexing="ij")
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return torch.exp(-0.5 * ((u / sigma_x) ** 2 + (v / sigma_y) ** 2))


def streak(length: float, angle: float) -> Tensor:
    """Kernel of a straight motion of `length` pixels."""
    half = math.ceil(length / 2)
    kernel = torch.zeros(2 * half + 1, 2 * half + 1)
    for t in np.linspace(-length / 2, length / 2, 8 * half + 1):
        kernel[half + round(t * math.sin(angle)), half + round(t * math.cos(angle))] += 1
    return kernel


def warp(x: Tensor, field: Tensor, tilt: float, sigma: float) -> Tensor:
    """Shift every pixel by a smooth random field, as air in motion does.

    Args:
        x: float [3, H, W].
        field: white noise [2, G, G], the raw material of the field.
        tilt: root mean square of the shifts along an axis, in pixels.
        sigma: over which the shifts change, in cells of the grid.
    """
    H, W = x.shape[1:]
    shift = filter_image(field, gaussian(sigma, sigma)).to(x.device)
    shift = F.interpolate(shift[None], size=(H, W), mode="bicubic")[0]
    shift = tilt * shift / shift.square().mean().sqrt()
    y, x_ = torch.meshgrid(torch.arange(H, device=x.device), torch.arange(W, device=x.device), indexing="ij")
    grid = torch.stack([(2 * (x_ + shift[0]) + 1) / W - 1, (2 * (y + shift[1]) + 1) / H - 1], dim=-1)
    return F.grid_sample(x[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]


FIELD = 28  # cells across the raw material of the turbulence: 4 pixels each in an image of 112
# how a face is made small; two of them do not filter first, which leaves the aliasing that cheap cameras have
DOWN = ({"mode": "bilinear", "antialias": True}, {"mode": "bicubic", "antialias": True}, {"mode": "area"},
        {"mode": "bilinear"}, {"mode": "nearest-exact"})


def degrade(image: Tensor, severity: float, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    """Degrade one image: blur, motion, turbulence, fewer pixels, noise, gamma, grey, JPEG, and up to its size again.

    Args:
        image: uint8 [3, H, W], RGB, on any device (the JPEG step runs on the CPU).
        severity: 0 (nothing) to 1; ranges and probabilities grow with it.
        rng: every draw comes from it, in a fixed number and order: the same generator gives the same image, and what
            happens to it does not change with the severity, only how much.

    Returns:
        The image (same shape, dtype and device), and what was drawn, for the sample's metadata: lengths in pixels of
        an image of 112.
    """
    from torchvision.io import decode_jpeg, encode_jpeg

    use, strength = rng.random(7), rng.random(8)  # drawn whole, so that one degradation does not shift the others
    noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
    use_more, more = rng.random(3), rng.random(4)
    field = torch.from_numpy(rng.standard_normal((2, FIELD, FIELD), dtype=np.float32))
    if severity <= 0:
        return image, {}
    H, W = image.shape[1:]
    unit = min(H, W) / 112
    draws, x = {"severity": round(severity, 4)}, image.float()

    def draw(name: str, low: float, high: float, where: float) -> float:
        draws[name] = round(low + (high - low) * float(where), 4)
        return draws[name]

    if use[0] < 0.7:
        sigma = draw("blur", 0.1, max(2.5 * severity, 0.2), strength[0]) * unit
        aspect = draw("blur_aspect", 0.6, 1.0, strength[1])
        x = filter_image(x, gaussian(sigma, sigma * aspect, draw("blur_angle", 0, math.pi, more[0])))
    if use[1] < 0.3:
        length, angle = draw("motion", 1, 1 + 10 * severity, strength[2]), draw("motion_angle", 0, math.pi, strength[3])
        x = filter_image(x, streak(length * unit, angle))
    if use_more[0] < 0.2:
        tilt = draw("turbulence", 0.5 * severity, 2.5 * severity, more[1]) * unit
        x = warp(x, field, tilt, draw("turbulence_sigma", 4, 12, more[2]) * FIELD / 112)
        sigma = draw("turbulence_blur", 0.1, max(2 * severity, 0.2), more[3]) * unit
        x = filter_image(x, gaussian(sigma, sigma))
    ratio = math.exp(draw("log_shrink", severity * math.log(12 / 112), severity * math.log(56 / 112), strength[4]))
    side = (max(round(H * ratio), 2), max(round(W * ratio), 2))
    draws["short_side"] = min(side)
    draws["down"] = int(use_more[1] * len(DOWN))
    small = F.interpolate(x[None], size=side, **DOWN[draws["down"]]).clamp(0, 255)
    if use[2] < 0.5:
        noise = noise[:, : small.shape[2], : small.shape[3]].to(x.device)
        if use_more[2] < 0.5:
            small = small + draw("noise", 0, 20 * severity, strength[5]) * noise
        else:  # shot noise: its variance is proportional to the light
            small = small + draw("shot_noise", 0, 20 * severity, strength[5]) * (small / 255).sqrt() * noise
    if use[3] < 0.3:
        gamma = math.exp(draw("log_gamma", -0.7 * severity, 0.7 * severity, strength[6]))
        small = 255 * (small.clamp(0, 255) / 255) ** gamma
    if use[4] < 0.05 * severity:
        draws["grey"] = 1
        small = small.mean(1, keepdim=True).expand_as(small)
    small = small.round().clamp(0, 255).to(torch.uint8)
    if use[5] < 0.8:
        quality = round(draw("jpeg", 100 - 80 * severity, 100 - 10 * severity, strength[7]))
        small = decode_jpeg(encode_jpeg(small[0].cpu().contiguous(), quality=quality))[None].to(x.device)
    draws["up"] = "bicubic" if use[6] < 0.5 else "bilinear"
    x = F.interpolate(small.float(), size=(H, W), mode=draws["up"])[0]
    return x.round().clamp(0, 255).to(torch.uint8), draws


# ---------------------------------------------------------------- offline


def degraded_sample(folder: Path, row: int, severity: tuple[float, float], seed: int) -> tuple[bytes, dict]:
    """A sample of a split, degraded, and the fields that say how.

    The draws belong to the seed and the sample, so that the number of workers does not matter.
    """
    split = open_split(folder)
    try:
        image = split.image(row)
    except BadImage as error:
        raise BadImage("unreadable image") from error
    rng = np.random.default_rng((seed, DOMAINS.index("face_lq"), row))
    low, high = severity
    image, draws = degrade(image, low + (high - low) * rng.random(), rng)
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, "BMP")
    shard = Path(split.index["shards"][int(split.shard[row])]["file"])  # of a merged split it is a neighbour's
    name = f"{split.domain}/{shard.parent.name or split.name}/{split.jpeg(row)[0]}"
    return out.getvalue(), {"degradation": draws | {"from": name}, "source": split.fields(row).get("source")}


def degraded_split(split: Split, severity: tuple[float, float], seed: int) -> Source:
    """A source of degraded copies of a split: same identities, columns, protocol and lists that the protocol names.

    Args:
        split: of sharp images.
        severity: least and largest; each sample's is drawn evenly between them.
        seed: of every draw.
    """
    columns = {name: split.column(name) for name in OPTIONAL if name in split.index["columns"]}

    def records() -> Iterator[Record]:
        for row in range(len(split)):
            label, fields = int(split.labels[row]), split.fields(row)
            optional = {name: column[row].item() for name, column in columns.items() if column[row] >= 0}
            yield Record(partial(degraded_sample, split.folder, row, severity, seed),
                         f"{split.domain}/{split.name}/{fields.get('key')}",
                         split.classes[label] if label >= 0 else None, person=fields.get("person"), **optional)

    listed = set(TABLES) & set(split.index["columns"])
    # rows of pairs are counted anew where images are lost; templates are named by their numbers, which stay
    drop = ("pairs", "pairs_lost") if "pairs" in listed else ()
    protocol = split.protocol and {key: value for key, value in split.protocol.items() if key not in drop}
    pairs = split.column("pairs").tolist() if "pairs" in listed else []
    tables = {name: np.array(split.column(name)) for name in sorted(listed - {"pairs"})}
    names = dict(zip(split.classes, split.names, strict=True))
    return Source(records(), protocol, pairs, names=names, tables=tables, listed=bool((protocol or {}).get("misses")))


def draw_ladder(path: Path, images: list[Tensor], seed: int, steps: int = 6) -> None:
    """A picture of severities 0 to 1 from left to right, one row an image, with the draws of a row the same."""
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
