"""One image: copied byte for byte where it fits, else fitted with what it shows kept; a damaged one is named."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.format import BadImage, Split
from data_prep.write import fit_image
from tests.test_data_prep import encode, picture, run_here


def test_a_jpeg_that_fits_is_copied_byte_for_byte():
    square = picture(0, 32, 32)
    for options in ({"subsampling": 0}, {"subsampling": 2}, {"quality": 40}):
        data = encode(square, **options)
        assert fit_image(data, 32, "crop", 95) is data
    grey = encode(square.convert("L"))
    assert fit_image(grey, 32, "crop", 95) is grey
    turned = Image.Exif()
    turned[0x0112] = 6
    for data in (encode(square, "PNG"), encode(square, progressive=True), encode(square.convert("CMYK")),
                 encode(square, exif=turned), encode(picture(0, 33, 32))):
        out = fit_image(data, 32, "crop", 95)
        image = Image.open(io.BytesIO(out))
        assert out != data and image.size == (32, 32) and image.mode == "RGB" and not image.info.get("progressive")


def test_fits():
    wide = Image.new("RGB", (60, 30), (200, 0, 0))
    wide.paste((0, 0, 200), (20, 0, 40, 30))  # the middle third is blue

    def fitted(fit):
        data = fit_image(encode(wide, quality=100, subsampling=0), 30, fit, 100)
        return np.asarray(Image.open(io.BytesIO(data))).astype(int)

    crop, squash, pad = fitted("crop"), fitted("squash"), fitted("pad")
    assert (crop[15, :, 2] > 100).mean() == pytest.approx(2 / 3, abs=0.05)
    assert (squash[15, :, 2] > 100).mean() == pytest.approx(1 / 3, abs=0.05)
    assert np.abs(pad[2, 15] - [133, 0, 67]).max() < 12  # bars of the mean colour above and below
    assert (pad[15, :, 2] > 100).mean() == pytest.approx(1 / 3, abs=0.05)


def test_sixteen_bit_images_are_scaled_and_not_cut():
    deep = Image.fromarray(np.full((20, 20), 30000, dtype=np.uint16))
    image = np.asarray(Image.open(io.BytesIO(fit_image(encode(deep, "PNG"), 20, "crop", 95))))
    assert np.abs(image.astype(int) - 30000 / 257).max() <= 2


def test_pixels_of_other_kinds_keep_their_meaning():
    """White is white in floating-point TIFF of any range, and what is transparent is white whatever its colour."""
    ramp = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    for top in (1, 255, 65535):
        jpeg = fit_image(encode(Image.fromarray(ramp * top), "TIFF"), 32, "squash", 100)
        grey = np.asarray(Image.open(io.BytesIO(jpeg)))
        assert np.abs(grey.mean(2) - 255 * ramp).max() < 2.5
    clear = np.zeros((32, 32, 4), dtype=np.uint8)
    clear[:, 16:] = (0, 0, 255, 255)  # the left half is black, under full transparency
    for image, options in [(Image.fromarray(clear), {}), (Image.fromarray(clear[..., :3]), {"transparency": (0, 0, 0)}),
                           (Image.fromarray(clear[..., ::3]), {})]:
        shown = np.asarray(Image.open(io.BytesIO(fit_image(encode(image, "PNG", **options), 32, "crop", 100))))
        assert (shown[:, :15] > 250).all() and (shown[:, 17:, 0] < 5).all()


def test_avif_is_read(tmp_path):
    (tmp_path / "src/c0").mkdir(parents=True)
    (tmp_path / "src/c0/0.avif").write_bytes(encode(picture(0, 32, 32), "AVIF", quality=100))
    run_here("folder", "--src", tmp_path / "src", "--out", tmp_path / "d/object/train", "--size", 32)
    image = Split(tmp_path / "d/object/train").image(0).permute(1, 2, 0).numpy().astype(float)
    assert np.abs(image - np.asarray(picture(0, 32, 32))).mean() < 3


@pytest.mark.parametrize("size, options, quality, decibels", [
    (24, [], 100, 45), (64, [], 100, 45), (65, [], 95, 0), (24, ["--quality", 95], 95, 0)])
def test_small_images_keep_what_they_show(size, options, quality, decibels, tmp_path, capsys):
    """Faces of 24 pixels, lossless: as JPEG 95 with halved chroma they would come back with 33 dB."""
    pixels = np.random.default_rng(0).normal(128, 40, (2, size, size, 3)).clip(0, 255).astype(np.uint8)
    for i in range(2):
        (tmp_path / f"src/p{i}").mkdir(parents=True)
        Image.fromarray(pixels[i]).save(tmp_path / f"src/p{i}/0.png")
    run_here("folder", "--src", tmp_path / "src", "--out", tmp_path / "d/face_lq/test", *options)
    split = Split(tmp_path / "d/face_lq/test")
    assert (split.size, split.index["quality"]) == (size, quality)
    error = np.stack([split.image(row).permute(1, 2, 0).numpy() for row in range(2)]).astype(float) - pixels
    psnr = 10 * np.log10(255**2 / (error**2).mean())
    assert psnr > decibels if decibels else psnr < 35
    assert ("re-encoded as JPEG of quality 100, not 95" in capsys.readouterr().out) == (quality == 100)


@pytest.mark.parametrize("data", [b"", b"text", encode(picture(0))[:200], encode(picture(0), "PNG")[:-40]])
def test_damaged_images_are_named(data):
    with pytest.raises(BadImage, match="unreadable image"):
        fit_image(data, 32, "crop", 95)
