"""The interleaved gather: crop, resize, flip and normalise images of several uint8 banks into one batch.
Copy with it: for GPUs kernels/gather_triton.py, into one package.

`gather_interleaved_reference` is the definition, the fallback on every device and the oracle of the tests.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

# ---------------------------------------------------------------- reference


def filter_weights(x: Tensor, interpolation: str) -> Tensor:
    """The filter at distance x in pixels: a triangle ("bilinear"), or Keys's cubic with a = -0.5 ("bicubic")."""
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))


def resample_weights(low: Tensor, high: Tensor, length: int, size: int, interpolation: str) -> Tensor:
    """Weights [b, size, length] that resample the interval low..high [b] of `length` pixels.

    Pixel i covers i..i+1. When downsampling, the filter is widened by the factor (antialiasing). Pixels outside the
    interval have weight 0: for a box of whole pixels, this equals cropping first.
    """
    step = ((high - low) / size)[:, None, None]
    centre = low[:, None, None] + (torch.arange(size, device=low.device)[:, None] + 0.5) * step
    pixel = torch.arange(length, device=low.device)
    weights = filter_weights((pixel + 0.5 - centre) / step.clamp(min=1), interpolation)
    weights = weights * ((pixel >= low.floor()[:, None, None]) & (pixel < high.ceil()[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def gather_interleaved_reference(banks: list[Tensor], domain: Tensor, row: Tensor, size: int, mean, std,
                                 boxes: Tensor | None, flip: Tensor | None, interpolation: str, dtype: torch.dtype
                                 ) -> Tensor:
    """The definition of `gather_interleaved`, computed bank by bank in float32 (float64 for float64 output).

    Each axis is one batched matrix product over lines of interleaved RGB, so that the innermost dimension is wide and
    the result is channels-last without a copy.
    """
    work = torch.promote_types(dtype, torch.float32)
    device = banks[0].device
    out = torch.empty(len(domain), size, size * 3, dtype=dtype, device=device)
    mean, std = (torch.as_tensor(v, dtype=work, device=device).repeat(size) for v in (mean, std))
    for k, bank in enumerate(banks):
        outputs = (domain == k).nonzero().flatten()
        if not len(outputs):
            continue
        x, (H, W) = bank[row[outputs]], bank.shape[1:3]  # [n, H, W, 3]
        mirror = None if flip is None else flip[outputs, None, None]
        if boxes is not None or (size, size) != (H, W):
            whole = torch.tensor([0, 0, W, H], dtype=work, device=device).expand(len(outputs), 4)
            x0, y0, x1, y1 = (whole if boxes is None else boxes[outputs].to(work)).unbind(1)
            across, down = (resample_weights(*side, size, interpolation) for side in ((x0, x1, W), (y0, y1, H)))
            if flip is not None:
                across = torch.where(mirror, across.flip(1), across)
            x = x.transpose(1, 2).to(work, memory_format=torch.contiguous_format)
            with torch.autocast(device.type, enabled=False):  # a caller's autocast must not lower the precision
                x = torch.bmm(across, x.flatten(2)).unflatten(2, (H, 3))  # [n, size, H, 3]
                x = torch.bmm(down, x.transpose(1, 2).flatten(2))  # [n, size, size * 3]
            x = x.clamp(0, 255)  # the cubic filter overshoots
        else:
            x = x.to(work)
            x = (x if flip is None else torch.where(mirror[..., None], x.flip(2), x)).flatten(2)
        out[outputs] = torch.addcmul(-mean / std, x, 1 / (255 * std)).to(dtype)  # (x / 255 - mean) / std
    return out.unflatten(2, (size, 3)).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- public


def check_shapes(banks, domain, row, boxes, flip, size, interpolation, dtype) -> None:
    """Raise ValueError for invalid shapes, dtypes and names."""
    if not banks or any(bank.dtype != torch.uint8 or bank.ndim != 4 or bank.shape[3] != 3 for bank in banks):
        raise ValueError("banks: want a list of uint8 tensors [M, H, W, 3]")
    B = len(domain)
    for name, value, shape in (("row", row, (B,)), ("boxes", boxes, (B, 4)), ("flip", flip, (B,))):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} is {tuple(value.shape)}: want {shape}, one for each of {B} output images")
    if size < 1 or dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"size={size}, dtype={dtype}: want a size of at least 1 and a floating dtype")
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation={interpolation!r}: want bilinear or bicubic")


def check_places(banks, domain, row, boxes) -> None:
    """Raise IndexError for rows and domains outside the banks, ValueError for boxes outside their images."""
    if not len(domain):
        return
    sizes = torch.tensor([len(bank) for bank in banks], device=row.device)
    exists = (domain >= 0) & (domain < len(banks))
    wrong = ~exists | (row < 0) | (row >= sizes[domain.clamp(0, len(banks) - 1)])
    if bool(wrong.any()):
        b = int(wrong.nonzero()[0])
        raise IndexError(f"output {b}: row {int(row[b])} of domain {int(domain[b])} is not in the banks, which hold "
                         f"{sizes.tolist()} images")
    if boxes is not None:
        sides = torch.tensor([[bank.shape[2], bank.shape[1]] for bank in banks], device=boxes.device)
        sides = sides[domain.to(boxes.device)]
        valid = (boxes[:, :2] >= 0) & (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sides)
        if not bool(valid.all()):
            b = int((~valid.all(1)).nonzero()[0])
            raise ValueError(f"output {b}: box {boxes[b].tolist()} is empty or not within its image of "
                             f"{sides[b].tolist()} pixels (x, y)")


def triton_obstacle(banks: list[Tensor], dtype: torch.dtype) -> str:
    """Why the Triton kernel cannot run; empty if it can."""
    if not find_spec("triton"):
        return "Triton is not installed: pip install triton"
    if not banks[0].is_cuda and not os.environ.get("TRITON_INTERPRET"):
        return f"it needs banks on a GPU (these are on {banks[0].device}), or TRITON_INTERPRET=1"
    if banks[0].is_cuda and torch.cuda.get_device_capability(banks[0].device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or more (A100 and later)"
    return f"it writes bf16, fp16 or fp32, not {dtype}" if dtype == torch.float64 else ""


def gather_interleaved(
    banks: list[Tensor], domain: Tensor, row: Tensor, *, size: int, mean, std, boxes: Tensor | None = None,
    flip: Tensor | None = None, interpolation: str = "bilinear", dtype: torch.dtype = torch.bfloat16,
    impl: str = "auto",
) -> Tensor:
    """Write an interleaved, normalised batch from K banks of images: gather, crop, resize, flip, normalise.

    Args:
        banks: K tensors uint8 [M_d, H_d, W_d, 3], RGB, on one device; sizes may differ.
        domain: int64 [B], the bank of every output image. domain, row, boxes and flip lie on the banks' device or on
            the CPU (checked there, then copied to the banks' device without synchronisation).
        row: int64 [B], the row of every output image in its bank.
        size: output side S in pixels.
        mean, std: 3 numbers each, per channel, of images scaled to 0..1.
        boxes: float32 [B, 4] as x0, y0, x1, y1 in pixels, pixel i covering i..i+1; antialiased where the box is larger
            than the output. Default: the whole image (a pure copy where H = W = size).
        flip: bool [B], mirror left-right after resampling.
        interpolation: "bilinear" or "bicubic", as torchvision's antialiased resize of floats, clamped to 0..255.
        dtype: of the output: bfloat16, float16, float32 or (PyTorch only) float64.
        impl: "torch", "triton" (one pass, no intermediate tensors) or "auto": Triton for banks on a GPU, else torch.

    Returns:
        [B, 3, S, S], channels-last in memory, (image / 255 - mean) / std.

    Raises:
        IndexError: a row or a domain outside the banks. Indices and boxes on a GPU are not checked before the Triton
            kernel, which would synchronise: an output image without a place in the banks is NaN.
        ValueError: invalid shapes, boxes or dtypes.
        NotImplementedError: impl="triton" where Triton cannot run.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl={impl!r}: want one of auto, triton, torch")
    check_shapes(banks, domain, row, boxes, flip, size, interpolation, dtype)
    device, obstacle = banks[0].device, triton_obstacle(banks, dtype)
    if impl == "triton" and obstacle:
        raise NotImplementedError(f"gather_interleaved: impl='triton' is not possible: {obstacle}; use impl='auto'")
    triton = impl == "triton" or (impl == "auto" and banks[0].is_cuda and not obstacle)
    if domain.device.type == "cpu" or not triton:
        check_places(banks, domain, row, boxes)
    domain, row, boxes, flip = (v if v is None else v.to(device, non_blocking=True) for v in (domain, row, boxes, flip))
    flip = flip if flip is None else flip.bool()
    call = (banks, domain, row, size, mean, std, boxes, flip, interpolation, dtype)
    if not triton:
        return gather_interleaved_reference(*call)
    from .gather_triton import gather  # Triton may be absent

    return gather(*call)
