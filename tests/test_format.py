"""Shards and their index: what is written however often it is called, and what opening and verify find damaged."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data_prep.format
from data_prep import InputError
from data_prep.format import BadImage, Split, open_root
from data_prep.verify import verify_split
from tests.conftest import ROOT, script
from tests.test_data_prep import class_folders, files_of, people, prepared, run_here
from tests.test_merge import made


@pytest.fixture
def small(tmp_path) -> Path:
    """A training split of 3 x 5 images in shards of 4."""
    out = tmp_path / "data" / "object" / "train"
    run_here("folder", "--src", class_folders(tmp_path / "src"), "--out", out, "--size", 24, "--shard-size", 4,
             "--workers", 1)
    return out


# ---------------------------------------------------------------- what is written


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


def test_what_a_kill_after_the_last_step_leaves_goes_with_the_next_call(small, tmp_path):
    before = files_of(small)
    for name in (".parts/plan", ".parts/shard-000000.tar.json", "index.json.77.tmp", ".lock"):
        (small / name).parent.mkdir(exist_ok=True)
        (small / name).write_text("left")
    run_here("folder", "--src", tmp_path / "src", "--out", small, "--size", 24, "--shard-size", 4)
    assert files_of(small) == before and not (small / ".parts").exists()


# ---------------------------------------------------------------- what is read


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


def test_loader_processes_reopen_a_split(small):
    import pickle

    split = Split(small)
    split.image(0)
    again = pickle.loads(pickle.dumps(split))
    assert again.key is not split.key and torch.equal(again.image(3), split.image(3))


def test_show_draws_a_contact_sheet(small, capsys):
    run_here("show", small, "--rows", 2, "--columns", 3)
    sheet = Image.open(small / "contact-sheet.png")
    assert sheet.size == (3 * 26, 2 * (24 + 14 + 4)) and len(np.unique(np.asarray(sheet))) > 50


# ---------------------------------------------------------------- damage


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
    (damage_pickle, "column 'label' cannot be read"), (damage_index, "index.json: damaged ("),
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


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x/shard-000000.tar", "../.ssh/shard-000000.tar", "",
                                  "../../shard-000000.tar", "shard-000000.tar/../x", "a/shard-000000.tar"])
def test_a_shard_table_cannot_name_other_files(name, tmp_path):
    made(tmp_path / "body/a", [("1", None, 0)])
    index = json.loads((tmp_path / "body/a/index.json").read_text())
    index["shards"][0]["file"] = name
    (tmp_path / "body/a/index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="is not a shard's name"):
        Split(tmp_path / "body/a")


def test_a_size_that_the_images_do_not_have_and_foreign_shards_are_refused(tmp_path):
    a = prepared(people(tmp_path / "src", {"a": 2, "b": 2}), tmp_path / "d/object/a", "--part", "train").folder
    text = (a / "index.json").read_text()
    for size, words in ((4096, "size is 4096, its images have 24x24"), (65535, "'size' is missing or not valid")):
        (a / "index.json").write_text(text.replace('"size": 24', f'"size": {size}'))
        with pytest.raises(InputError, match=words):
            Split(a)
    shard = a / "shard-000000.tar"
    good = shard.read_bytes()
    (a / "index.json").write_text(text)
    at = [good.find(b"\xff\xc0", int(offset)) + 5 for offset in Split(a).offset]
    for forged, words in ((1, "size is 4096, its images have 24x24"), (4, "size is 4096, its images have no readable")):
        data = bytearray(good)  # headers that declare the size of a forged index: nobody allocates 4096 x 4096 pixels
        for place in at[:forged]:
            data[place : place + 4] = b"\x10\0\x10\0"
        shard.write_bytes(data)
        (a / "index.json").write_text(text.replace('"size": 24', '"size": 4096'))
        with pytest.raises(InputError, match=words):
            Split(a)
    (a / "index.json").write_text(text)  # headers alone: three of the images are good
    data[at[1] : at[1] + 4] = data[at[2] : at[2] + 4] = data[at[3] : at[3] + 4] = good[at[0] : at[0] + 4]
    shard.write_bytes(data)
    with pytest.raises(BadImage, match="not a readable JPEG"):
        Split(a).image(0)
    shard.write_bytes(good)
    shutil.copytree(a, tmp_path / "d/object/b")
    (a / "index.json").write_text(text.replace("shard-000000.tar", "../b/shard-000000.tar"))
    with pytest.raises(InputError, match="a link, or another split's shard"):
        Split(a)
    (a / "index.json").write_text(text)
    (a / "shard-000000.tar").unlink()
    (a / "shard-000000.tar").symlink_to(tmp_path / "d/object/b/shard-000000.tar")
    with pytest.raises(InputError, match="a link, or another split's shard"):
        Split(a)
