"""data_prep as its users run it: sources, format, resumption, checks, bad input."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
from collections import OrderedDict
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image

import data_prep.format
from data_prep import InputError, progress
from data_prep.__main__ import cli
from data_prep.degrade import degrade
from data_prep.demo import demo_splits, draw_body, draw_face, draw_object
from data_prep.format import BadImage, Split, open_root
from data_prep.sources.faces import lfw, read_pairs
from data_prep.verify import verify_split
from data_prep.write import fit_image
from tests.conftest import ROOT, script


def run_here(*arguments) -> None:
    cli.main([str(a) for a in arguments], standalone_mode=False)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def class_folders(folder: Path, classes: int = 3, images: int = 5, **options) -> Path:
    for c in range(classes):
        (folder / f"c{c}").mkdir(parents=True)
        for i in range(images):
            (folder / f"c{c}" / f"{i}.jpg").write_bytes(encode(picture(10 * c + i, **options)))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- one image


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


# ---------------------------------------------------------------- format


@pytest.fixture
def small(tmp_path) -> Path:
    """A training split of 3 x 5 images in shards of 4."""
    out = tmp_path / "data" / "object" / "train"
    run_here("folder", "--src", class_folders(tmp_path / "src"), "--out", out, "--size", 24, "--shard-size", 4,
             "--workers", 1)
    return out


def test_webdataset_reads_the_shards(small):
    import webdataset

    shards = [str(p) for p in sorted(small.glob("shard-*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    split = Split(small)
    assert len(shards) == 4 and len(samples) == len(split) == 15
    for row, sample in enumerate(samples):
        meta = sample["json"]
        assert meta["key"] == sample["__key__"] and meta["domain"] == "object" and meta["source"] == "src"
        assert meta["label"] == split.labels[row] and meta["identity"] == split.classes[meta["label"]]
        ours = split.image(row).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(ours - np.asarray(sample["jpg"]).astype(int)).max() <= 3  # decoders round differently


def test_index_and_order(small, tmp_path):
    index = json.loads((small / "index.json").read_text())
    assert index["format"] == "imic-shards/1" and index["classes"] == ["c0", "c1", "c2"] and index["size"] == 24
    assert index["protocol"] is None and index["provenance"]["source"] == "folder"
    split = Split(small)
    assert split.labels.tolist() != sorted(split.labels) and split.counts.tolist() == [5, 5, 5]  # seeded random order
    run_here("folder", "--src", tmp_path / "src", "--out", tmp_path / "data/object/val", "--size", 24)
    val = Split(tmp_path / "data/object/val")
    assert val.labels.tolist() == sorted(val.labels) and val.protocol["name"] == "classification"  # source order
    assert list(open_root(tmp_path / "data")["object"]) == ["train", "val"]


def test_every_split_of_the_demo_verifies(demo_root):
    for splits in open_root(demo_root).values():
        for split in splits.values():
            assert verify_split(split.folder) == []


def test_workers_and_interruption_give_the_same_bytes(small, tmp_path):
    """Kill -9 while shards are being written, then continue: byte for byte the uninterrupted result."""
    src = class_folders(tmp_path / "many", classes=6, images=60, width=900, height=900)
    command = ["-m", "data_prep", "folder", "--src", src, "--size", "200", "--shard-size", "8", "--workers", "2"]
    script(*command, "--out", tmp_path / "a" / "object" / "train")
    out = tmp_path / "b" / "object" / "train"
    process = subprocess.Popen([sys.executable, *map(str, command), "--out", str(out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while len(list(out.glob("shard-*.tar"))) < 3 and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.kill()  # the parent alone: its workers must notice
    process.wait()
    assert not (out / "index.json").exists() and list(out.glob("shard-*.tar"))
    with pytest.raises(InputError, match="did not finish"):
        Split(out)
    with pytest.raises(InputError, match="unfinished preparation with other options"):
        run_here("folder", "--src", src, "--out", out, "--size", 100)
    before = {p: p.stat().st_mtime_ns for p in out.glob("shard-*.tar")}
    time.sleep(1.2)  # by now orphaned workers are gone
    finished = {p for p, t in before.items() if p.exists()}
    script(*command[:-2], "--workers", "1", "--out", out)
    assert files_of(out) == files_of(tmp_path / "a" / "object" / "train")
    kept = [p for p in finished if p.stat().st_mtime_ns == before[p]]
    assert kept  # finished shards were not written again


def test_a_finished_split_is_left_alone(small, tmp_path, capsys):
    before = files_of(small)
    again = ["--src", tmp_path / "src", "--out", small, "--size", 24, "--shard-size", 4]
    run_here("folder", *again)
    assert "complete" in capsys.readouterr().out and files_of(small) == before
    with pytest.raises(InputError, match="already holds another split"):
        run_here("folder", *again, "--quality", 50)


def test_no_name_from_an_archive_becomes_a_path(small, tmp_path):
    """A tar whose members climb out of their folder is read at offsets only; verify names them."""
    path = small / "shard-000000.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    with tarfile.open(path, "w") as tar:
        for i, member in enumerate(members):
            info = tarfile.TarInfo("../../evil.jpg" if i == 0 else member.name)
            info.size = member.size
            tar.addfile(info, io.BytesIO(b"x" * member.size))
    index = json.loads((small / "index.json").read_text())
    index["shards"][0]["bytes"] = path.stat().st_size
    (small / "index.json").write_text(json.dumps(index))
    problems = verify_split(small)
    assert any("evil" in problem for problem in problems) and not list(tmp_path.rglob("evil*"))


# ---------------------------------------------------------------- checks


def damage_truncate(folder: Path) -> None:
    with open(folder / "shard-000001.tar", "r+b") as tar:
        tar.truncate(3000)


def damage_bytes(folder: Path) -> None:
    offset, length = (int(np.load(folder / f"index/{name}.npy")[1]) for name in ("offset", "length"))
    with open(folder / "shard-000000.tar", "r+b") as tar:
        tar.seek(offset)
        tar.write(b"\0" * length)


def damage_label(folder: Path) -> None:
    labels = np.load(folder / "index/label.npy")
    labels[0] = (labels[0] + 1) % 3
    np.save(folder / "index/label.npy", labels)


def damage_label_range(folder: Path) -> None:
    np.save(folder / "index/label.npy", np.load(folder / "index/label.npy") + 2)


def damage_offset(folder: Path) -> None:
    offsets = np.load(folder / "index/offset.npy")
    offsets[2] += 512
    np.save(folder / "index/offset.npy", offsets)


def damage_column(folder: Path) -> None:
    np.save(folder / "index/length.npy", np.load(folder / "index/length.npy")[:-1])


def damage_pickle(folder: Path) -> None:
    np.save(folder / "index/label.npy", np.array([{}] * 15, dtype=object), allow_pickle=True)


def damage_missing(folder: Path) -> None:
    (folder / "shard-000002.tar").unlink()


def damage_index(folder: Path) -> None:
    (folder / "index.json").write_text("{")


@pytest.mark.parametrize("damage, words", [
    (damage_truncate, "shard-000001.tar: 3000 bytes, but the index"), (damage_missing, "shard-000002.tar: missing"),
    (damage_label_range, "labels outside -1..2"), (damage_column, "holds int64 [14], want int64 [15]"),
    (damage_pickle, "column 'label' cannot be read"), (damage_index, "index.json: cannot be read"),
])  # fmt: skip
def test_a_split_that_disagrees_with_itself_is_refused_when_opened(damage, words, small):
    damage(small)
    with pytest.raises(InputError) as error:
        Split(small)
    assert words in error.value.message and "\n" not in error.value.message


@pytest.mark.parametrize("damage, words", [(damage_bytes, "not a readable JPEG"), (damage_bytes, "sha256 differs"),
                                           (damage_label, "label is"), (damage_offset, "not where the index says")])
def test_verify_finds_what_opening_cannot_see(damage, words, small):
    damage(small)
    assert any(words in problem for problem in verify_split(small))
    with pytest.raises(InputError, match="problems; prepare the split again"):
        run_here("verify", small, "--workers", 1)


def test_a_split_in_anothers_place_is_refused(small):
    shutil.copytree(small, small.parent / "val")
    with pytest.raises(InputError, match=r"val holds the split object/train"):
        open_root(small.parent.parent)
    assert list(open_root(small.parent.parent, ["object"], "train")["object"]) == ["train"]  # others are not opened


def test_few_shards_are_open_at_once(small, monkeypatch):
    """Of all splits of a process together, and the last used ones stay: a quarter of `ulimit -n` at most."""
    monkeypatch.setattr(data_prep.format, "OPEN_FILES", OrderedDict())
    monkeypatch.setattr(data_prep.format.resource, "getrlimit", lambda _: (8, 4096))
    split, other = Split(small), Split(small)
    images = [split.image(row) for row in range(15)]
    assert len(data_prep.format.OPEN_FILES) == 2
    assert all(torch.equal(s.image(row), images[row]) for row in (0, 14, 7) for s in (split, other))
    assert len(data_prep.format.OPEN_FILES) == 2 and len({int(split.shard[row]) for row in (0, 14, 7)}) == 3
    first, second = (int(split.shard[row]) for row in (0, 14))
    for shard in (first, second, first, int(split.shard[7])):
        split.open_shard(shard)
    assert [shard for _, shard in data_prep.format.OPEN_FILES] == [first, int(split.shard[7])]
    monkeypatch.setattr(data_prep.format.resource, "getrlimit", lambda _: (-1, -1))
    assert split.image(0) is not None and len(data_prep.format.OPEN_FILES) == 2


def test_show_draws_a_contact_sheet(small, capsys):
    run_here("show", small, "--rows", 2, "--columns", 3)
    sheet = Image.open(small / "contact-sheet.png")
    assert sheet.size == (3 * 26, 2 * (24 + 14 + 4)) and len(np.unique(np.asarray(sheet))) > 50


# ---------------------------------------------------------------- sources


def test_skipped_files_are_counted_by_reason(tmp_path, capsys):
    src = class_folders(tmp_path / "src")
    (src / "c0" / "notes.txt").write_text("no image")
    (src / "c1" / "fake.png").write_text("no image either")
    (src / "c2" / "cut.jpg").write_bytes(encode(picture(0))[:150])
    (src / "stray.jpg").write_bytes(encode(picture(0)))
    run_here("folder", "--src", src, "--out", tmp_path / "data/object/train", "--size", 24)
    split = Split(tmp_path / "data/object/train")
    assert len(split) == 15
    assert split.index["skipped"] == {"not an image by its name": 1, "not in a class folder": 1, "unreadable image": 2}
    assert "19 images in, 15 of 3 classes written, 4 skipped" in capsys.readouterr().out


def test_names_for_prompts(tmp_path):
    (tmp_path / "names.txt").write_text("c0\ttench, Tinca\nc2\tgoldfish\n")
    run_here("folder", "--src", class_folders(tmp_path / "src"), "--out", tmp_path / "d/object/train", "--size", 24,
             "--names", tmp_path / "names.txt")
    split = Split(tmp_path / "d/object/train")
    assert split.classes == ["c0", "c1", "c2"] and split.names == ["tench, Tinca", "c1", "goldfish"]


def test_people_folders_are_an_identification_test(tmp_path):
    src = class_folders(tmp_path / "src", classes=3, images=3)
    (src / "c9").mkdir()
    (src / "c9" / "only.jpg").write_bytes(encode(picture(99)))
    run_here("folder", "--src", src, "--out", tmp_path / "d/face_hq/search")
    split = Split(tmp_path / "d/face_hq/search")
    assert split.protocol == {"name": "identification"} and split.size == 112
    assert split.column("role").tolist() == [1, 0, 0] * 3 + [2]


def lfw_folder(folder: Path, people: int = 4, images: int = 3) -> Path:
    for p in range(people):
        (folder / f"P_{p}").mkdir(parents=True)
        for i in range(1, images + 1):
            (folder / f"P_{p}" / f"P_{p}_{i:04d}.jpg").write_bytes(encode(picture(10 * p + i, 36, 36)))
    return folder


PAIRS = "2\t1\nP_0\t1\t3\nP_0\t1\tP_1\t2\nP_2\t2\t1\nP_3\t1\tP_2\t3\n"


def test_lfw_pairs_become_rows(tmp_path):
    (tmp_path / "pairs.txt").write_text(PAIRS)
    out = tmp_path / "d/face_hq/lfw"
    run_here("lfw", "--src", lfw_folder(tmp_path / "src"), "--pairs", tmp_path / "pairs.txt", "--out", out)
    split = Split(out)
    assert split.size == 36 and split.protocol == {"name": "verification", "folds": 2, "pairs": 4, "pairs_lost": 0}
    # source order: P_0 1..3 are rows 0..2, P_1 are 3..5, ...
    assert split.column("pairs").tolist() == [[0, 2, 1, 0], [0, 4, 0, 0], [7, 6, 1, 1], [9, 8, 0, 1]]
    assert verify_split(out) == []


def test_pairs_of_a_damaged_image_are_left_out_and_counted(tmp_path, capsys):
    (tmp_path / "pairs.txt").write_text(PAIRS)
    (lfw_folder(tmp_path / "src") / "P_0" / "P_0_0001.jpg").write_bytes(b"damaged")
    run_here("lfw", "--src", tmp_path / "src", "--pairs", tmp_path / "pairs.txt", "--out", tmp_path / "d/face_hq/lfw")
    split = Split(tmp_path / "d/face_hq/lfw")
    assert split.column("pairs").tolist() == [[6, 5, 1, 1], [8, 7, 0, 1]] and split.protocol["pairs_lost"] == 2
    assert "2 pairs left out" in capsys.readouterr().out


@pytest.mark.parametrize("text, words", [
    (PAIRS.replace("P_0", "P_7").replace("P_3", "P_7"), ": 3 of 4 entries"),
    (PAIRS.replace("P_", "Q_"), "such as 'Q_0/Q_0_0001'"),
    ("", "line 1: want"), ("pairs\n" + PAIRS, "line 1: want"), ("10\t300\n", "announces 10 folds"),
    (PAIRS.replace("P_2\t2\t1", "P_2\t2"), "line 4: want `name i j`"),
])  # fmt: skip
def test_bad_pairs_files(text, words, tmp_path):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(InputError) as error:
        lfw(lfw_folder(tmp_path / "src"), "face_hq", False, tmp_path / "pairs.txt")
    assert words in error.value.message


CSV = "name,imagenum1,imagenum2,\nP_0,1,3,\nP_0,1,P_1,2\nP_2,2,1,\nP_3,1,P_2,3\n"


@pytest.mark.parametrize("text", [PAIRS, "\ufeff" + PAIRS.replace("\n", "\r\n"), PAIRS.replace("\t", "  "),
                                  PAIRS.replace("\n", "\t\n"), PAIRS.replace("P_", " P_").replace("\t", " \t"), CSV])
@pytest.mark.parametrize("layout", ["plain", "nested", "mtcnn", "missing", "old"])
def test_lfw_as_people_have_it(text, layout, tmp_path, capsys):
    """Official, Kaggle's double folder and CSV, MTCNN's names, one face that a detector missed, an older copy below."""
    (tmp_path / "pairs.txt").write_text(text, encoding="utf-8", newline="")
    src = lfw_folder(tmp_path / "src" / ("lfw/lfw" if layout == "nested" else ""))
    lost = [src / "P_1/P_1_0002.jpg"] if layout == "missing" else []
    for path in sorted(src.rglob("*.jpg")):
        if layout == "old":
            (path.parent / "old").mkdir(exist_ok=True)
            (path.parent / "old" / path.name).write_bytes(encode(picture(999, 36, 36)))
        elif layout == "mtcnn":
            path.rename(path.with_name(f"{path.stem}_0.jpg"))
        elif path in lost:
            path.unlink()
    run_here("lfw", "--src", tmp_path / "src", "--pairs", tmp_path / "pairs.txt", "--out", tmp_path / "d/face_hq/lfw")
    split, found = Split(tmp_path / "d/face_hq/lfw"), []
    of = {encode(picture(10 * p + i, 36, 36)): f"P_{p} {i}" for p in range(4) for i in range(1, 4)}
    for left, right, same, fold in split.column("pairs").tolist():
        found.append((of[split.jpeg(left)[1]], of[split.jpeg(right)[1]], same, fold))
    pairs = [("P_0 1", "P_0 3", 1, 0), ("P_0 1", "P_1 2", 0, 0), ("P_2 2", "P_2 1", 1, 1), ("P_3 1", "P_2 3", 0, 1)]
    assert found == [pair for pair in pairs if not lost or "P_1 2" not in pair]
    assert split.protocol["pairs_lost"] == len(lost) and verify_split(split.folder) == []
    assert ("1: listed, but not in the source" in capsys.readouterr().out) == bool(lost)


def test_two_versions_of_lfw_are_not_mixed(tmp_path):
    (tmp_path / "pairs.txt").write_text(PAIRS)
    for name in ("lfw", "lfw-deepfunneled"):
        lfw_folder(tmp_path / "src" / name)
    with pytest.raises(InputError, match=r"two images of P_0 1, lfw.* and lfw.*: give the folder of one version"):
        run_here("lfw", "--src", tmp_path / "src", "--pairs", tmp_path / "pairs.txt", "--out", tmp_path / "d/face_hq/x")


@pytest.mark.parametrize("stored, typed", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_are_one_however_they_are_spelled(stored, typed, tmp_path, capsys):
    """macOS stores decomposed names; people type composed ones."""
    def spell(form: str, text: str) -> str:
        return unicodedata.normalize(form, text)

    for p, person in enumerate(("José_Müller", "Zoë_Ångström")):
        folder = tmp_path / "src" / spell(stored, person)
        folder.mkdir(parents=True)
        for i in (1, 2):
            (folder / spell(stored, f"{person}_{i:04d}.jpg")).write_bytes(encode(picture(10 * p + i, 24, 24)))
    lists = {"pairs.txt": "1\t1\nJosé_Müller\t1\t2\nJosé_Müller\t1\tZoë_Ångström\t2\n", "list.txt": "José_Müller\n",
             "pairs.csv": "José_Müller/José_Müller_0001.jpg,José_Müller/José_Müller_0002.jpg,1\n"
                          "José_Müller/José_Müller_0001.jpg,Zoë_Ångström/Zoë_Ångström_0002.jpg,0\n",
             "names.tsv": "José_Müller\tJ. Müller\nNobody\tN. N.\n",
             "classes.csv": "José_Müller,Übung\nZoë_Ångström,two\n"}
    for name, text in lists.items():
        (tmp_path / name).write_text(spell(typed, text))
    for source, split, options in [
        ("lfw", "lfw", ["--pairs", "pairs.txt"]), ("pairs", "pairs", ["--pairs", "pairs.csv"]),
        ("folder", "train", ["--list", "list.txt", "--names", "names.tsv"]),
        ("folder", "../object/train", ["--classes", "classes.csv"])]:
        options = [tmp_path / option if "." in option else option for option in options]
        run_here(source, "--src", tmp_path / "src", "--out", tmp_path / "d/face_hq" / split, *options)
    assert all(Split(tmp_path / "d/face_hq" / name).column("pairs").tolist() == pairs for name, pairs in [
        ("lfw", [[0, 1, 1, 0], [0, 3, 0, 0]]), ("pairs", [[0, 1, 1, 0], [0, 2, 0, 1]])])
    train = Split(tmp_path / "d/face_hq/train")
    assert train.classes == ["José_Müller"] and len(train) == 2 and train.names == ["J. Müller"]
    assert Split(tmp_path / "d/object/train").classes == ["two", "Übung"]
    assert "names.tsv: 1 of its folders are not in the source: Nobody" in capsys.readouterr().out


def test_pairs_file_of_one_fold(tmp_path):
    (tmp_path / "pairs.txt").write_text("1\nP_0 1 2\nP_0 1 P_1 1\n")
    assert [p[:4] for p in read_pairs(tmp_path / "pairs.txt")] == [(("P_0", 1), ("P_0", 2), 1, 0),
                                                                   (("P_0", 1), ("P_1", 1), 0, 0)]


def test_market_rules(tmp_path):
    names = {"bounding_box_train": ["0002_c1s1_000451_03.jpg", "0007_c3s1_000001_01.jpg"],
             "query": ["0003_c1s1_000001_00.jpg", "0005_c2s1_000001_00.jpg"],
             "bounding_box_test": ["0003_c6s1_000009_00.jpg", "0005_c2s2_000001_01.jpg", "-1_c4s1_000001_00.jpg",
                                   "0000_c5s1_000001_00.jpg", "Thumbs.db", "readme.jpg"]}
    for folder, files in names.items():
        (tmp_path / "src" / folder).mkdir(parents=True)
        for i, name in enumerate(files):
            (tmp_path / "src" / folder / name).write_bytes(encode(picture(i, 16, 32)))
    for part in ("train", "test"):
        run_here("market", "--src", tmp_path / "src", "--out", tmp_path / "d/body" / part, "--size", 32)
    split = Split(tmp_path / "d/body/test")
    assert split.classes == ["0003", "0005"] and split.protocol == {"name": "reid"}
    # query first, then the gallery by name: the distractor 0000 has no label, junk -1 is gone
    assert split.labels.tolist() == [0, 1, -1, 0, 1] and split.column("role").tolist() == [0, 0, 2, 1, 1]
    assert split.column("camera").tolist() == [0, 1, 4, 5, 1]
    assert split.index["skipped"] == {"not an image by its name": 1, "name is not Market-1501's": 1,
                                      "junk (person -1)": 1}
    assert Split(tmp_path / "d/body/train").classes == ["0002", "0007"] and verify_split(split.folder) == []


def test_an_overlap_of_train_and_test_people_is_reported(tmp_path, capsys):
    src = lfw_folder(tmp_path / "src")
    for name in ("train", "test"):
        run_here("folder", "--src", src, "--out", tmp_path / "d/face_hq" / name)
    assert "train and test overlap, 4 identities are in train too: P_0" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["folder", "--src", "{src}", "--out", "{out}/faces/train"], "want DATA/<domain>/<split>"),
    (["folder", "--src", "{src}/none", "--out", "{out}/object/train"], "no such folder"),
    (["folder", "--src", "{empty}", "--out", "{out}/object/train"], "holds no images"),
    (["folder", "--src", "{src}", "--out", "{out}/object/train", "--names", "{src}/no.txt"], "--names"),
    (["lfw", "--src", "{src}", "--out", "{out}/face_hq/test"], "needs --pairs"),
    (["lfw", "--src", "{src}", "--out", "{out}/face_hq/train", "--pairs", "x"], "is for test splits"),
    (["market", "--src", "{src}", "--out", "{out}/body/train"], "no folder bounding_box_train"),
    (["folder", "--src", "{src}", "--out", "{out}/object/train", "--ood"], "are for test splits of objects"),
    (["folder", "--src", "{src}", "--out", "{out}/body/test", "--reference", "x"], "are for test splits of objects"),
    (["verify", "{empty}"], "no index.json"), (["show", "{empty}"], "no index.json"),
    (["folder", "--src", "{src}"], "--out"), (["tiff"], "No such command"),
])  # fmt: skip
def test_bad_input(arguments, words, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"src": class_folders(tmp_path / "src"), "out": tmp_path / "out", "empty": tmp_path / "empty"}
    with pytest.raises(click.ClickException) as error:
        run_here(*[a.format(**places) for a in arguments])
    assert words in error.value.format_message()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    command = ["-m", "data_prep", "folder", "--src", tmp_path / "none", "--out", tmp_path / "object/train"]
    result = script(*command, check=2)
    assert result.stderr.strip().splitlines() == [f"error: --src {tmp_path}/none: no such folder or archive"]
    assert not result.stdout
    result = script("-m", "data_prep", "verify", tmp_path, "--debug", check=1)
    assert "Traceback" in result.stderr


def test_names_that_are_no_text_are_classes_as_others(tmp_path):
    """A folder called b"a\\xff" becomes a class that can be printed and written."""
    for part in ("train", "test"):
        (tmp_path / "src" / os.fsdecode(b"a\xff")).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            (tmp_path / "src" / os.fsdecode(b"a\xff") / f"{i}.jpg").write_bytes(encode(picture(i, 24, 24)))
        strict = "import sys; sys.argv[0] = 'data_prep'; sys.stdout.reconfigure(encoding='utf-8', errors='strict'); " \
                 "from data_prep.__main__ import cli, run_command; run_command(cli)"
        result = script("-c", strict, "folder", "--src", tmp_path / "src", "--out", tmp_path / "d/face_hq" / part,
                        "--workers", "1")
    assert "1 identities are in train too: a\\udcff" in result.stdout
    names = Split(tmp_path / "d/face_hq/train").classes
    assert names == ["a\\udcff"] and names[0].encode()  # a figure or a CSV can hold it
    with pytest.raises(InputError, match="want a name in UTF-8"):
        run_here("folder", "--src", tmp_path / "src", "--out", tmp_path / "d/face_hq" / os.fsdecode(b"a\xff"))


def test_ctrl_c_leaves_what_is_done(tmp_path):
    src = class_folders(tmp_path / "src", classes=6, images=60, width=900, height=900)
    for attempt in range(3):  # a busy machine may let it finish before it is interrupted
        out = tmp_path / f"d{attempt}/object/train"
        command = ["-m", "data_prep", "folder", "--src", str(src), "--out", str(out), "--size", "200", "--shard-size",
                   "8", "--workers", "2"]
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                   start_new_session=True)
        deadline = time.time() + 60
        while len(list(out.glob("shard-*.tar"))) < 2 and time.time() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
        _, err = process.communicate(timeout=30)
        if process.returncode:
            break
    assert process.returncode == 130 and err.strip().splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in err
    script(*command)
    assert verify_split(out) == []
    shutil.rmtree(out)


# ---------------------------------------------------------------- disks, other processes


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    """The second is refused before anything is read; the lock goes with the life of the first."""
    out, src = tmp_path / "d/object/train", class_folders(tmp_path / "src")
    hold = "import sys; from pathlib import Path; from data_prep import lock_folder\n" \
           "with lock_folder(Path(sys.argv[1]), '--out'): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(out)], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    before = files_of(out)
    result = script("-m", "data_prep", "folder", "--src", tmp_path / "none", "--out", out, check=2)
    assert result.stderr.startswith(f"error: --out {out}: process {holder.pid} on ") and result.stderr.count("\n") == 1
    assert files_of(out) == before
    holder.kill()
    holder.communicate(timeout=60)
    run_here("folder", "--src", src, "--out", out, "--size", 24)
    assert verify_split(out) == [] and not (out / ".lock").exists()


def test_a_refused_command_leaves_no_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        run_here("folder", "--src", tmp_path / "none", "--out", tmp_path / "d/object/train")
    assert not list(tmp_path.iterdir())


def children_of(process: subprocess.Popen) -> list[int]:
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_killed_worker_and_a_terminated_parent_leave_nobody_behind(victim, tmp_path):
    """SIGKILL to a worker, as when memory is short: one line; SIGTERM to the parent: obeyed at once."""
    src = class_folders(tmp_path / "src", classes=4, images=25, width=900, height=900)
    out = tmp_path / "d/object/train"
    command = ["-m", "data_prep", "folder", "--src", str(src), "--out", str(out), "--size", "200", "--shard-size", "1"]
    process = subprocess.Popen([sys.executable, *command, "--workers", "2"], cwd=ROOT, stderr=subprocess.PIPE,
                               text=True)
    while not list(out.glob("shard-*.tar")) and process.poll() is None:
        time.sleep(0.005)
    workers = children_of(process)
    assert len(workers) == 2
    os.kill(*((workers[0], signal.SIGKILL) if victim == "worker" else (process.pid, signal.SIGTERM)))
    _, err = process.communicate(timeout=120)  # the pipe closes with the last of them
    deadline = time.monotonic() + 60
    while any(map(lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, workers))
    if victim == "worker":
        assert process.returncode == 2 and err.count("\n") == 1
        assert err.startswith("error: one of 2 workers was killed: out of memory? Take fewer --workers")
    else:
        assert process.returncode == -signal.SIGTERM and not err
    run_here(*command[2:], "--workers", "1")
    assert verify_split(out) == [] and len(Split(out)) == 100
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".tar") == ["index", "index.json"]


def limited(megabytes: float, *arguments) -> subprocess.CompletedProcess:
    """A command that may write no file larger than this, which ends as on a full disk: in an OSError."""
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({int(megabytes * 2**20)},) * 2); " \
           "sys.argv[0] = 'data_prep'; from data_prep.__main__ import cli, run_command; run_command(cli)"
    return script("-c", code, *arguments, check=2)


@pytest.mark.parametrize("megabytes", [0.001, 0.2])  # the list of images, a shard
def test_a_disk_that_takes_no_more_ends_in_one_line_and_the_same_command_goes_on(megabytes, tmp_path):
    src, out = tmp_path / "src", tmp_path / "d/object/train"
    for i in range(400):
        (src / f"c{i % 4}").mkdir(parents=True, exist_ok=True)
        (src / f"c{i % 4}/{i}.png").write_bytes(encode(picture(i, 24, 24), "PNG"))
    command = ["folder", "--src", src, "--out", out, "--size", 24, "--shard-size", 200, "--workers", 2]
    result = limited(megabytes, *command)
    assert result.stderr.startswith(f"error: --out {out}: cannot be written (File too large; ")
    assert result.stderr.count("\n") == 1 and not (out / "index.json").exists() and not (out / ".lock").exists()
    run_here(*command)
    assert verify_split(out) == []


@pytest.mark.parametrize("place, reason", [("file/object/train", "Not a directory"), ("d/object/file", "File exists"),
                                           ("d/object/" + 300 * "x", "File name too long")])
def test_places_that_cannot_be_written_are_named_at_once(place, reason, tmp_path):
    (tmp_path / "d/object").mkdir(parents=True)
    for name in ("file", "d/object/file"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError) as error:
        run_here("folder", "--src", tmp_path / "none", "--out", tmp_path / place)
    assert str(error.value).startswith(f"--out {tmp_path / place}") and reason in str(error.value)


def test_what_a_kill_after_the_last_step_leaves_goes_with_the_next_call(small, tmp_path):
    before = files_of(small)
    for name in (".parts/plan", ".parts/shard-000000.tar.json", "index.json.77.tmp", ".lock"):
        (small / name).parent.mkdir(exist_ok=True)
        (small / name).write_text("left")
    run_here("folder", "--src", tmp_path / "src", "--out", small, "--size", 24, "--shard-size", 4)
    assert files_of(small) == before and not (small / ".parts").exists()


def test_progress_is_told_in_lines_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter(range(0, 1000, 12))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))  # 12 s pass with every image
    assert list(progress(range(7), desc="list", unit="img")) == list(range(7))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("[")[0] for line in lines] == ["list:  43% 3/7 ", "list:  86% 6/7 "]
    assert lines[0].endswith("[00:36<00:48, 12.00s/img]")


# ---------------------------------------------------------------- degradation and demo


def test_degradation_grows_and_repeats():
    sharp = torch.from_numpy(np.array(Image.open(io.BytesIO(draw_face(0, 1, 2))))).permute(2, 0, 1)
    loss = []
    for severity in (0.0, 0.3, 0.6, 1.0):
        soft = [degrade(sharp, severity, np.random.default_rng(i))[0] for i in range(30)]
        assert all(s.shape == sharp.shape and s.dtype == torch.uint8 for s in soft)
        loss.append(np.mean([(s.float() - sharp.float()).abs().mean() for s in soft]))
    assert loss[0] == 0 < loss[1] < loss[2] < loss[3]
    one, draws = degrade(sharp, 0.8, np.random.default_rng(5))
    two, again = degrade(sharp, 0.8, np.random.default_rng(5))
    assert torch.equal(one, two) and draws == again and draws["severity"] == 0.8


def test_the_demo_is_a_function_of_its_seed():
    for draw in (lambda s: draw_face(s, 3, 1), lambda s: draw_face(s, 3, 1, 0.7), lambda s: draw_body(s, 3, 1, 2),
                 lambda s: draw_object(s, 3, 1), lambda s: draw_object(s, 3, 1, True)):
        assert draw(0) == draw(0) != draw(1)


def test_demo_people_are_the_same_in_both_qualities_and_never_in_train_and_test(demo_root):
    root = open_root(demo_root)
    for domain in ("face_hq", "face_lq", "body"):
        assert not set(root[domain]["train"].classes) & set(root[domain]["test"].classes)
    assert root["face_hq"]["test"].classes == root["face_lq"]["test"].classes
    drawn = {name: {record.name for record in source.records} for name, (source, _) in demo_splits(0, 0.1).items()}
    for split in ("train", "test"):  # and no picture is in both, sharp and degraded
        assert len(drawn[f"face_hq/{split}"]) == len(drawn[f"face_lq/{split}"]) == len(root["face_lq"][split])
        assert not drawn[f"face_hq/{split}"] & drawn[f"face_lq/{split}"]
    with tarfile.open(root["face_lq"]["test"].folder / "shard-000000.tar") as tar:
        meta = json.loads(tar.extractfile(tar.getmembers()[1]).read())
    assert meta["person"] == f"demo-{meta['identity']}"


def test_loader_processes_reopen_a_split(small):
    import pickle

    split = Split(small)
    split.image(0)
    again = pickle.loads(pickle.dumps(split))
    assert again.key is not split.key and torch.equal(again.image(3), split.image(3))
