"""The interleaved gather against torchvision's resampling and a literal loop, in PyTorch and in Triton.

The Triton kernels run on a GPU where there is one, else through the interpreter.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from data_prep.stream import Look, make_images
from kernels.gather import gather_interleaved

GPU = torch.cuda.is_available()
IMPLS = ["torch", "triton"] if find_spec("triton") else ["torch"]
if find_spec("triton"):
    from tests import interpreter

    interpreter.repair()
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def banks(*sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (m, h, w, 3), generator=g, dtype=torch.uint8) for m, h, w in sizes]


def run(impl, banks, domain, row, boxes=None, flip=None, **options):
    """On the GPU for Triton where there is one; the result on the CPU."""
    if impl == "triton" and GPU:
        banks = [bank.cuda() for bank in banks]
    return gather_interleaved(banks, domain, row, boxes=boxes, flip=flip, impl=impl, **options).cpu()


def normalise(x):
    mean, std = (torch.tensor(v, dtype=x.dtype).view(3, 1, 1) for v in (MEAN, STD))
    return (x / 255 - mean) / std


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("flip", [None, [True, False, False, True]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_whole_images_are_a_pure_copy(dtype, flip, impl):
    b = banks((3, 16, 16), (5, 16, 16))
    domain, row = torch.tensor([1, 0, 1, 1]), torch.tensor([4, 2, 0, 4])
    mirrored = None if flip is None else torch.tensor(flip)
    out = run(impl, b, domain, row, flip=mirrored, size=16, mean=MEAN, std=STD, dtype=dtype)
    expected = torch.stack([normalise(b[d][r].permute(2, 0, 1).double()) for d, r in zip(domain, row, strict=True)])
    if flip is not None:
        expected = torch.where(mirrored.view(-1, 1, 1, 1), expected.flip(3), expected)
    # one rounding to the output's dtype and a few of fp32
    torch.testing.assert_close(out.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [7, 16, 40])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", [(0, 0, 33, 20), (3, 5, 30, 17), (10, 2, 12, 20), (0, 0, 1, 1)])
def test_whole_pixel_boxes_equal_crop_and_resize(box, interpolation, size, impl):
    """Half-pixel centres and antialiasing as torchvision has them, up and down, each axis on its own."""
    b = banks((2, 20, 33))
    boxes = torch.tensor([box, box], dtype=torch.float32)
    out = run(impl, b, torch.zeros(2, dtype=torch.long), torch.tensor([1, 0]), size=size, mean=MEAN, std=STD,
              boxes=boxes, flip=torch.tensor([False, True]), interpolation=interpolation, dtype=torch.float32)
    x0, y0, x1, y1 = box
    for place, row in enumerate((1, 0)):
        crop = b[0][row].permute(2, 0, 1).float()[:, y0:y1, x0:x1]
        expected = resize(crop, [size, size], InterpolationMode(interpolation), antialias=True).clamp(0, 255)
        expected = normalise(expected)
        torch.testing.assert_close(out[place], expected.flip(2) if place else expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_fractional_boxes_equal_a_literal_loop(impl):
    dtype, rtol = (torch.float64, 1e-9) if impl == "torch" else (torch.float32, 2e-5)
    b, size = banks((1, 12, 15), (1, 9, 9)), 5
    boxes = torch.tensor([[1.3, 0.2, 13.9, 11.5], [2.25, 3.5, 5.75, 4.0]])
    out = run(impl, b, torch.tensor([0, 1]), torch.tensor([0, 0]), size=size, mean=(0, 0, 0), std=(1, 1, 1),
              boxes=boxes, dtype=dtype)
    for place in range(2):
        image = b[place][0].double().numpy() / 255
        x0, y0, x1, y1 = boxes[place].double().tolist()
        for v in range(size):
            for u in range(size):
                total, mass = np.zeros(3), 0.0
                cx, cy = x0 + (u + 0.5) * (x1 - x0) / size, y0 + (v + 0.5) * (y1 - y0) / size
                for y in range(int(np.floor(y0)), int(np.ceil(y1))):
                    for x in range(int(np.floor(x0)), int(np.ceil(x1))):
                        a = max(0, 1 - abs(x + 0.5 - cx) / max((x1 - x0) / size, 1))
                        a *= max(0, 1 - abs(y + 0.5 - cy) / max((y1 - y0) / size, 1))
                        total, mass = total + a * image[y, x], mass + a
                np.testing.assert_allclose(out[place, :, v, u].numpy(), total / mass, rtol=rtol)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch_and_unused_bank(impl):
    b, none = banks((2, 8, 8), (0, 1, 1)), torch.tensor([], dtype=torch.long)
    assert run(impl, b, none, none, size=4, mean=MEAN, std=STD, dtype=torch.float32).shape == (0, 3, 4, 4)
    one = run(impl, b, torch.tensor([0]), torch.tensor([1]), size=4, mean=MEAN, std=STD, dtype=torch.float32)
    assert one.shape == (1, 3, 4, 4) and torch.isfinite(one).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_banks_of_different_sizes_and_odd_shapes(impl):
    """Non-square images of three sizes in one batch, against the images one by one."""
    b = banks((2, 17, 23), (3, 8, 31), (1, 40, 5))
    domain, row = torch.tensor([2, 0, 1, 1, 0]), torch.tensor([0, 1, 2, 0, 0])
    out = run(impl, b, domain, row, size=13, mean=MEAN, std=STD, dtype=torch.float32)
    for place, (d, r) in enumerate(zip(domain.tolist(), row.tolist(), strict=True)):
        expected = normalise(resize(b[d][r].permute(2, 0, 1).float(), [13, 13], antialias=True))
        torch.testing.assert_close(out[place], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_flips_of_any_kind_and_layout(impl):
    """Every other of a tensor of twice the length; numbers instead of truth values; indices that are not contiguous."""
    b, flip = banks((6, 9, 9)), torch.tensor([True, False, False, True, True, False])
    wide = torch.stack([flip, ~flip], 1)
    rows, zero = torch.arange(6), torch.zeros(12, dtype=torch.long)[::2]
    boxes = torch.tensor([[1.0, 0, 8, 9]]).repeat(6, 1)
    options = {"size": 5, "mean": MEAN, "std": STD, "dtype": torch.float32}
    expected = run("torch", b, zero, rows, flip=flip, boxes=boxes, **options)
    for kind in (wide[:, 0], wide[:, 0].to(torch.int64) * 7, wide[:, 0].float()):
        out = run(impl, b, zero, torch.stack([rows, rows], 1)[:, 1], flip=kind,
                  boxes=torch.cat([boxes, 0 * boxes], 1)[:, :4], **options)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_cubic_overshoots_no_further_than_the_bytes(impl):
    """A black and a white half: evaluation clamps the enlarged edge to 0..255, so must training."""
    b = [torch.zeros(1, 8, 8, 3, dtype=torch.uint8)]
    b[0][:, :, 4:] = 255
    out = run(impl, b, *[torch.zeros(1, dtype=torch.long)] * 2, size=32, mean=(0,) * 3, std=(1,) * 3,
              interpolation="bicubic", dtype=torch.float32)
    assert out.min() == 0 and out.max() == 1
    free = resize(b[0][0].permute(2, 0, 1).float(), [32, 32], InterpolationMode("bicubic"), antialias=True)
    assert free.max() > 260
    torch.testing.assert_close(out[0], free.clamp(0, 255) / 255, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_the_definition():
    call = banks((2, 20, 33)), torch.zeros(2, dtype=torch.long), torch.arange(2)
    plain = run("torch", *call, size=16, mean=MEAN, std=STD, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run("torch", *call, size=16, mean=MEAN, std=STD, dtype=torch.float32), plain)


@pytest.mark.parametrize("size", [8, 5])
@pytest.mark.parametrize("place, change", [("row", 2), ("row", -1), ("domain", 7), ("domain", -1)])
def test_wrong_places_on_a_gpu_are_nan_and_read_nothing(place, change, size):
    """The kernel is given what the check on the CPU would have refused."""
    from kernels import gather_triton

    device = "cuda" if GPU else "cpu"
    b = [bank.to(device) for bank in banks((2, 8, 8), (2, 8, 8))]
    indices = {"domain": torch.tensor([0, 1, 0], device=device), "row": torch.tensor([1, 1, 0], device=device)}
    indices[place][1] = change
    call = (size, MEAN, STD, None, None, "bilinear", torch.float32)
    out = gather_triton.gather(b, indices["domain"], indices["row"], *call)
    assert out[1].isnan().all() and torch.isfinite(out[[0, 2]]).all()


@pytest.mark.skipif("triton" not in IMPLS, reason="Triton is not installed")
def test_wrong_boxes_on_a_gpu_end_as_well():
    from kernels import gather_triton

    device = "cuda" if GPU else "cpu"
    b, zero = [bank.to(device) for bank in banks((2, 8, 8))], torch.zeros(4, dtype=torch.long, device=device)
    boxes = torch.tensor([[0, 0, 8, 8], [4, 4, 4, 8], [0, 0, 1e9, 8], [0, 0, float("nan"), 8]], device=device)
    out = gather_triton.gather(b, zero, zero, 4, MEAN, STD, boxes, None, "bicubic", torch.float32)
    assert torch.isfinite(out[0]).all() and out[1:].isnan().all()


@pytest.mark.parametrize("change, error, words", [
    ({"row": torch.tensor([0, 2])}, IndexError, "output 1: row 2 of domain 1"),
    ({"row": torch.tensor([-1, 0])}, IndexError, "output 0: row -1"),
    ({"domain": torch.tensor([0, 5])}, IndexError, "domain 5 is not in the banks"),
    ({"row": torch.tensor([0])}, ValueError, "one for each of 2 output images"),
    ({"boxes": torch.tensor([[0, 0, 8, 8], [4, 4, 4, 8.0]])}, ValueError, "output 1: box"),
    ({"boxes": torch.tensor([[0, 0, 9, 8], [0, 0, 8, 8.0]])}, ValueError, "output 0: box"),
    ({"banks": [torch.zeros(1, 8, 8, 3)] * 2}, ValueError, "uint8"),
    ({"dtype": torch.int32}, ValueError, "floating dtype"),
    ({"impl": "triton", "dtype": torch.float64}, NotImplementedError, "not installed|not torch.float64"),
    ({"impl": "fast"}, ValueError, "auto, triton, torch"),
    ({"interpolation": "lanczos"}, ValueError, "want bilinear or bicubic"),
])  # fmt: skip
def test_bad_arguments(change, error, words):
    call = {"banks": banks((2, 8, 8), (1, 8, 8)), "domain": torch.tensor([0, 1]), "row": torch.tensor([0, 0]),
            "size": 4, "mean": MEAN, "std": STD}
    gather_interleaved(**call)
    with pytest.raises(error, match=words):
        gather_interleaved(**call | change)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_sees_the_pixels_of_evaluation(interpolation):
    """A whole image of 20 px at 32 px, as training gets it and as `embed_rows` resizes it."""
    b, zero = banks((1, 20, 20)), torch.zeros(1, dtype=torch.long)
    chunk = SimpleNamespace(banks=b, domain=zero, row=zero, boxes=None, flip=None, erase=None)
    whole = resize(b[0][0].permute(2, 0, 1).float(), [32, 32], InterpolationMode(interpolation), antialias=True)
    images = make_images(chunk, Look(32, MEAN, STD, interpolation), torch.device("cpu"))
    torch.testing.assert_close(images[0], normalise(whole.clamp(0, 255)), rtol=1e-4, atol=1e-4)
