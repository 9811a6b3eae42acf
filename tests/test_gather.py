"""The interleaved gather against torchvision's resampling and a literal loop."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import resize

from kernels.gather import gather_interleaved

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def banks(*sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (m, h, w, 3), generator=g, dtype=torch.uint8) for m, h, w in sizes]


def normalise(x):
    mean, std = (torch.tensor(v, dtype=x.dtype).view(3, 1, 1) for v in (MEAN, STD))
    return (x / 255 - mean) / std


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_whole_images_are_a_pure_copy(dtype, channels_last):
    b = banks((3, 16, 16), (5, 16, 16))
    domain, row = torch.tensor([1, 0, 1, 1]), torch.tensor([4, 2, 0, 4])
    out = gather_interleaved(b, domain, row, size=16, mean=MEAN, std=STD, dtype=dtype, channels_last=channels_last)
    expected = torch.stack([normalise(b[d][r].permute(2, 0, 1).float()) for d, r in zip(domain, row, strict=True)])
    assert torch.equal(out, expected.to(dtype))
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("size", [7, 16, 40])
@pytest.mark.parametrize("box", [(0, 0, 33, 20), (3, 5, 30, 17), (10, 2, 12, 20), (0, 0, 1, 1)])
def test_whole_pixel_boxes_equal_crop_and_resize(box, size):
    """Half-pixel centres and antialiasing as torchvision has them, up and down, each axis on its own."""
    b = banks((2, 20, 33))
    boxes = torch.tensor([box, box], dtype=torch.float32)
    out = gather_interleaved(b, torch.zeros(2, dtype=torch.long), torch.tensor([1, 0]), size=size, mean=MEAN, std=STD,
                             boxes=boxes, flip=torch.tensor([False, True]), dtype=torch.float32)
    x0, y0, x1, y1 = box
    for place, row in enumerate((1, 0)):
        crop = b[0][row].permute(2, 0, 1).float()[:, y0:y1, x0:x1]
        expected = normalise(resize(crop, [size, size], antialias=True))
        torch.testing.assert_close(out[place], expected.flip(2) if place else expected, rtol=1e-4, atol=1e-4)


def test_fractional_boxes_equal_a_literal_loop():
    b, size = banks((1, 12, 15), (1, 9, 9)), 5
    boxes = torch.tensor([[1.3, 0.2, 13.9, 11.5], [2.25, 3.5, 5.75, 4.0]])
    out = gather_interleaved(b, torch.tensor([0, 1]), torch.tensor([0, 0]), size=size, mean=(0, 0, 0), std=(1, 1, 1),
                             boxes=boxes, dtype=torch.float64)
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
                np.testing.assert_allclose(out[place, :, v, u].numpy(), total / mass, rtol=1e-9)


def test_empty_batch_and_unused_bank():
    b = banks((2, 8, 8), (0, 1, 1))
    assert gather_interleaved(b, torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long), size=4,
                              mean=MEAN, std=STD).shape == (0, 3, 4, 4)
    assert gather_interleaved(b, torch.tensor([0]), torch.tensor([1]), size=4, mean=MEAN, std=STD).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("change, error, words", [
    ({"row": torch.tensor([0, 2])}, IndexError, "output 1: row 2 of domain 1"),
    ({"row": torch.tensor([-1, 0])}, IndexError, "output 0: row -1"),
    ({"domain": torch.tensor([0, 5])}, IndexError, "domain 5 is not in the banks"),
    ({"row": torch.tensor([0])}, ValueError, "one for each of 2 output images"),
    ({"boxes": torch.tensor([[0, 0, 8, 8], [4, 4, 4, 8.0]])}, ValueError, "output 1: box"),
    ({"boxes": torch.tensor([[0, 0, 9, 8], [0, 0, 8, 8.0]])}, ValueError, "output 0: box"),
    ({"banks": [torch.zeros(1, 8, 8, 3)] * 2}, ValueError, "uint8"),
    ({"dtype": torch.int32}, ValueError, "floating dtype"),
    ({"impl": "triton"}, NotImplementedError, "no Triton kernel"),
    ({"impl": "fast"}, ValueError, "auto, triton, torch"),
])  # fmt: skip
def test_bad_arguments(change, error, words):
    call = {"banks": banks((2, 8, 8), (1, 8, 8)), "domain": torch.tensor([0, 1]), "row": torch.tensor([0, 0]),
            "size": 4, "mean": MEAN, "std": STD}
    gather_interleaved(**call)
    with pytest.raises(error, match=words):
        gather_interleaved(**call | change)
