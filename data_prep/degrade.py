"""Degradations that turn a sharp face crop into a low-quality one, with one severity from 0 to 1.

The ranges at severity 1 are those of surveillance-like sets at 112 pixels (faces of 12 to 56 pixels, blur, sensor
noise, strong JPEG); lengths scale with the image. Orders and ranges follow the published augmenters of AdaFace,
GFPGAN and Real-ESRGAN in a shortened form.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def filter_image(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve every channel of x [3, H, W] with a normalised kernel of odd sides, edges repeated."""
    kernel = kernel / kernel.sum()
    pad = (kernel.shape[1] // 2,) * 2 + (kernel.shape[0] // 2,) * 2
    padded = F.pad(x[:, None], pad, mode="replicate")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def gaussian(sigma_x: float, sigma_y: float) -> Tensor:
    """Kernel of a Gaussian blur, up to 3 sigma."""
    x, y = (torch.arange(-math.ceil(3 * s), math.ceil(3 * s) + 1.0) / s for s in (sigma_x, sigma_y))
    return torch.exp(-0.5 * (y[:, None] ** 2 + x**2))


def streak(length: float, angle: float) -> Tensor:
    """Kernel of a straight motion of `length` pixels."""
    half = math.ceil(length / 2)
    kernel = torch.zeros(2 * half + 1, 2 * half + 1)
    for t in np.linspace(-length / 2, length / 2, 8 * half + 1):
        kernel[half + round(t * math.sin(angle)), half + round(t * math.cos(angle))] += 1
    return kernel


def degrade(image: Tensor, severity: float, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
    """Degrade one image.

    Args:
        image: uint8 [3, H, W], RGB.
        severity: 0 (nothing) to 1; ranges and probabilities grow with it.
        rng: every draw comes from it, in a fixed number and order: the same generator gives the same image.

    Returns:
        The image (same shape and dtype), and what was drawn, for the sample's metadata.
    """
    from torchvision.io import decode_jpeg, encode_jpeg

    use, strength = rng.random(7), rng.random(8)  # drawn whole, so that one degradation does not shift the others
    noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
    if severity <= 0:
        return image, {}
    H, W = image.shape[1:]
    unit = min(H, W) / 112
    draws, x = {"severity": round(severity, 4)}, image.float()

    def draw(name: str, low: float, high: float, which: int) -> float:
        draws[name] = round(low + (high - low) * float(strength[which]), 4)
        return draws[name]

    if use[0] < 0.7:
        sigma, aspect = draw("blur", 0.1, max(2.5 * severity, 0.2), 0) * unit, draw("blur_aspect", 0.6, 1.0, 1)
        x = filter_image(x, gaussian(sigma, sigma * aspect))
    if use[1] < 0.3:
        x = filter_image(x, streak(draw("motion", 1, 1 + 10 * severity, 2) * unit, draw("motion_angle", 0, math.pi, 3)))
    ratio = math.exp(draw("log_shrink", severity * math.log(12 / 112), severity * math.log(56 / 112), 4))
    side = (max(round(H * ratio), 2), max(round(W * ratio), 2))
    small = F.interpolate(x[None], size=side, mode="bilinear", antialias=True)
    if use[2] < 0.5:
        noise = noise[:, : small.shape[2], : small.shape[3]]
        small = small + draw("noise", 0, 20 * severity, 5) * noise
    if use[3] < 0.3:
        small = 255 * (small.clamp(0, 255) / 255) ** math.exp(draw("log_gamma", -0.7 * severity, 0.7 * severity, 6))
    if use[4] < 0.05 * severity:
        draws["grey"] = 1.0
        small = small.mean(1, keepdim=True).expand_as(small)
    small = small.round().clamp(0, 255).to(torch.uint8)
    if use[5] < 0.8:
        quality = round(draw("jpeg", 100 - 80 * severity, 100 - 10 * severity, 7))
        small = decode_jpeg(encode_jpeg(small[0].contiguous(), quality=quality))[None]
    mode = "bicubic" if use[6] < 0.5 else "bilinear"
    x = F.interpolate(small.float(), size=(H, W), mode=mode)[0]
    return x.round().clamp(0, 255).to(torch.uint8), draws
