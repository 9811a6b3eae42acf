"""What all sources share: choosing identities and images, copies, memory, statistics, merging, degrading, speed."""

import csv
import hashlib
import io
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import data_prep.write
import tools.bench_data
from data_prep import InputError
from data_prep.__main__ import cli, data_set_name
from data_prep.degrade import SHIFTS, blur, degrade, shift, warp
from data_prep.demo import draw_face
from data_prep.format import BadImage, Record, Source, Split, fingerprint, open_root
from data_prep.records import Records, draw, first_copies, restrict
from data_prep.sources.archives import members
from data_prep.sources.folders import folder, strangers
from data_prep.stats import draw_stats, jpeg_quality, sharpness
from data_prep.stream import Batches, Order
from data_prep.verify import verify_split
from data_prep.write import in_parallel, write_split
from protocols.search import score_gallery
from protocols.unified import make_members, score_unified
from reports.rows import clean_of, describe_losses
from tests.conftest import ROOT, TINY, script
from tests.test_data_prep import PAIRS, class_folders, encode, files_of, lfw_folder, picture, run_here


def people(folder: Path, counts: dict[str, int]) -> Path:
    """Person folders with so many images each, all different."""
    for p, (name, images) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(images):
            (folder / name / f"{i}.jpg").write_bytes(encode(picture(1000 * p + i, 24, 24)))
    return folder


def prepared(src: Path, out: Path, *options, source: str = "folder") -> Split:
    run_here(source, "--src", src, "--out", out, "--size", 24, "--workers", 1, *options)
    assert verify_split(out) == []
    return Split(out)


def counts(split: Split) -> dict[str, int]:
    return dict(zip(split.classes, split.counts.tolist(), strict=True))


# ---------------------------------------------------------------- data sets


@pytest.mark.parametrize("src, name", [
    ("/sets/LFW/train", "LFW"), ("/sets/casia_train", "casia"), ("/sets/lfw.zip/images", "lfw"),
    ("/sets/c4m/train-{000..146}.tar", "c4m"), ("/sets/inet/data/train-00000-of-00294.parquet", "inet"),
    ("https://host/cc12m/{0..9}.tar", "cc12m"), ("/data/test", "unnamed"), ("/sets/ms1m/train.rec", "ms1m"),
])
def test_a_data_set_is_called_after_its_folder(src, name):
    assert data_set_name(src) == name


def test_a_split_records_its_data_set_through_merging_and_degrading(tmp_path):
    """Two data sets by one command are two; a copy of them and a merged split are of both, image by image."""
    root = tmp_path / "d/face_hq"
    src = people(tmp_path / "casia/train", {"a": 2, "b": 2}), people(tmp_path / "other", {"c": 2, "d": 2})
    a = prepared(src[0], root / "a", "--part", "train")
    b = prepared(src[1], root / "b", "--part", "train", "--source-name", "VGG")
    assert [split.index["provenance"]["data_set"] for split in (a, b)] == [["casia"], ["VGG"]]
    assert {split.index["provenance"]["source"] for split in (a, b)} == {"folder"}
    run_here("merge", root / "a", root / "b", "--out", root / "train")
    run_here("degrade", "--src", root / "train", "--out", tmp_path / "d/face_lq/train", "--workers", 1)
    for path in (root / "train", tmp_path / "d/face_lq/train"):
        split = Split(path)
        assert split.index["provenance"]["data_set"] == ["casia", "VGG"] and verify_split(path) == []
        found = {(split.fields(row)["identity"], split.fields(row)["source"]) for row in range(len(split))}
        assert found == {("a", "casia"), ("b", "casia"), ("c", "VGG"), ("d", "VGG")}
    with pytest.raises(InputError, match="already holds another split"):
        prepared(src[1], root / "b", "--part", "train", "--source-name", "another")


# ---------------------------------------------------------------- what cannot be read


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def tar_of(src: Path, path: Path) -> Path:
    """The person folders as WebDataset samples, labelled by their folder."""
    with tarfile.open(path, "w") as tar:
        for i, file in enumerate(sorted(src.rglob("*.jpg"))):
            for ending, data in (("jpg", file.read_bytes()), ("cls", file.parent.name.encode())):
                info = tarfile.TarInfo(f"{i:04d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def parquet_of(src: Path, path: Path) -> Path:
    files = sorted(src.rglob("*.jpg"))
    pq.write_table(pa.table({"image": [file.read_bytes() for file in files], "label": [f.parent.name for f in files]}),
                   path)
    return path


def rec_of(src: Path, path: Path) -> Path:
    path.mkdir()
    with open(path / "train.rec", "wb") as rec:
        for i, file in enumerate(sorted(src.rglob("*.jpg"))):
            data = struct.pack("<IfQQ", 0, float(file.parent.name[1:]), i, 0) + file.read_bytes()
            rec.write(struct.pack("<II", 0xCED7230A, len(data)) + data + bytes(-len(data) % 4))
    return path


PACKED = {"webdataset": (tar_of, ".tar"), "parquet": (parquet_of, ".parquet"), "recordio": (rec_of, "")}


@pytest.mark.parametrize("source, options", [("folder", ()), ("folder", ("--open-set", 0.4)), ("webdataset", ()),
                                             ("folder", ("--max-images", 3)), ("folder", ("--drop-duplicates",)),
                                             ("parquet", ()), ("recordio", ())])
def test_roles_are_dealt_among_the_images_that_can_be_read(source, options, tmp_path, capsys):
    """Three people's first pictures are cut off: everything is as in the set without these files."""
    bad, good = (people(tmp_path / name, {f"p{p}": 5 for p in range(6)}) for name in ("bad", "good"))
    for p in range(3):
        cut(bad / f"p{p}/0.jpg")
        (good / f"p{p}/0.jpg").unlink()
    splits = []
    for src in (bad, good):
        pack, ending = PACKED.get(source, (lambda src, _: src, ""))
        given = pack(src, tmp_path / f"{src.name}-packed{ending}")
        splits.append(prepared(given, tmp_path / src.name / "face_hq/search", *options, source=source))
    found, wanted = splits
    roles = found.column("role")
    assert roles.tolist() == wanted.column("role").tolist() and found.labels.tolist() == wanted.labels.tolist()
    assert found.column("hash").tolist() == wanted.column("hash").tolist()
    if "--open-set" not in options:
        assert np.bincount(roles, minlength=3)[1:].tolist() == [6, 0]  # everybody has an image in the gallery
    assert found.protocol == wanted.protocol | {"unreadable": 3} and wanted.protocol.get("unreadable") is None
    assert describe_losses(found.protocol)[0] == "without 3 unreadable images"
    rows = list(csv.reader((found.folder / "skipped.csv").open()))
    assert rows[0] == ["file", "reason"] and [row[1] for row in rows[1:]] == ["unreadable image"] * 3
    if source == "folder":
        assert [row[0] for row in rows[1:]] == ["p0/0.jpg", "p1/0.jpg", "p2/0.jpg"]
    capsys.readouterr()
    run_here("verify", found.folder, "--workers", 1)
    assert "names 3 files that could not be used" in capsys.readouterr().out
    x = np.random.default_rng(0).standard_normal((len(found), 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    figures = [{name: figure.value for name, figure in score_gallery(x, split, 2, 0)[0].items()} for split in splits]
    assert figures[0] == figures[1]


def test_folds_are_dealt_among_the_pairs_that_can_be_read(tmp_path):
    """Forty pairs of their own images, of which one is cut off: the other 39 are dealt as if they were the list."""
    for i in range(80):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / f"src/{i}.jpg").write_bytes(encode(picture(i, 24, 24)))
    cut(tmp_path / "src/6.jpg")
    lines = [f"{2 * i}.jpg,{2 * i + 1}.jpg,{i % 2}" for i in range(40)]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    (tmp_path / "rest.csv").write_text("\n".join(lines[:3] + lines[4:]))
    found, wanted = (prepared(tmp_path / "src", tmp_path / name / "face_hq/mine", "--pairs", tmp_path / f"{name}.csv",
                              source="pairs") for name in ("all", "rest"))
    assert found.column("pairs")[:, 2:].tolist() == wanted.column("pairs")[:, 2:].tolist()
    assert found.protocol["pairs_lost"] == 1 and found.protocol["folds"] == 10
    assert describe_losses(found.protocol) == ["without 1 unreadable images", "without 1 pairs of lost images"]


LISTED = """path,person,camera,role
q/a.jpg,ann,1,probe
q/b.jpg,bob,1,probe
q/c.jpg,cy,1,probe
g/a.jpg,ann,2,gallery
g/b.jpg,bob,2,gallery
g/b2.jpg,bob,3,gallery
g/c.jpg,cy,2,gallery
"""


def listed_people(tmp_path: Path) -> Path:
    src = tmp_path / "set"
    for i, line in enumerate(LISTED.splitlines()[1:]):
        path = src / line.split(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(i, 24, 24)))
    (src / "persons.csv").write_text(LISTED)
    return src


def test_a_listed_image_that_cannot_be_read_is_a_miss(tmp_path, capsys):
    """The probe cy and one of bob's two mates are cut off. By hand: rank-1 2/3, mAP (1 + .5 + 0) / 3.

    mINP: ann 1, bob and cy 0, as a mate of theirs is never found.
    """
    src = listed_people(tmp_path)
    cut(src / "q/c.jpg")
    cut(src / "g/b2.jpg")
    split = prepared(src, tmp_path / "d/body/mine", source="persons")
    text = capsys.readouterr().out
    assert "2 listed images could not be read; each counts as a miss" in text
    assert split.missing.tolist() == [False, False, True, False, False, True, False] and len(split) == 7
    assert split.column("role").tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert split.protocol == {"name": "reid", "misses": 2}
    assert describe_losses(split.protocol) == ["2 listed images unreadable and missed"]
    with pytest.raises(BadImage, match="could not be read when the split was prepared"):
        split.image(2)
    assert [row[0] for row in csv.reader((split.folder / "skipped.csv").open())] == ["file", "q/c.jpg", "g/b2.jpg"]
    x = np.eye(4, dtype=np.float32)[[0, 1, 2, 0, 1, 1, 2]]
    x[split.missing] = np.nan
    figures = {name: figure.value for name, figure in score_gallery(x, split, 2, 0)[0].items()}
    assert figures["rank-1"] == pytest.approx(2 / 3) and figures["mAP"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert figures["mINP"] == pytest.approx(1 / 3)
    run_here("degrade", "--src", split.folder, "--out", tmp_path / "d/face_lq/copies", "--workers", 1)
    copies = Split(tmp_path / "d/face_lq/copies")
    assert copies.missing.tolist() == split.missing.tolist() and copies.protocol == split.protocol
    everything = score_unified(make_members([copies, split], [x, x], 9, 0), 2, 0)
    assert everything["body"]["rank-1 alone"].value == pytest.approx(2 / 3)
    assert everything["all"]["worst rank-1 in the crowd"].value == pytest.approx(2 / 3)
    assert everything["body"]["rank-1 in face_lq"].value == pytest.approx(2 / 3)
    assert everything["body"]["nearest is body"].count == 3


def test_an_open_set_of_listed_people(tmp_path):
    """Whom --open-set leaves out has probes alone, by name and seed; TPIR is scored beside re-identification."""
    src = listed_people(tmp_path)
    split = prepared(src, tmp_path / "d/body/mine", "--open-set", 0.5, "--seed", 1, source="persons")
    out = strangers(["ann", "bob", "cy"], 0.5, 1)
    assert 0 < out.sum() < 3
    roles = split.column("role")
    assert all((roles[split.labels == c] == 0).all() == out[c] for c in range(3))
    assert split.protocol == {"name": "reid", "open_set": 0.5, "seed": 1}


def test_tpir_needs_people_whom_the_gallery_lacks(tmp_path):
    """Known answer: of 60 people some are strangers; with perfect embeddings everybody enrolled is found, TPIR is 1."""
    split = prepared(people(tmp_path / "src", {f"p{p:02d}": 3 for p in range(60)}), tmp_path / "d/face_hq/open",
                     "--open-set", 0.3)
    roles, out = split.column("role"), strangers(split.classes, 0.3, 0)
    assert 10 <= out.sum() <= 26 and (roles == 1).sum() == 60 - out.sum()
    assert (roles[out[split.labels]] == 0).all() and not (roles == 2).any()
    figures, _ = score_gallery(np.eye(60, dtype=np.float32)[split.labels], split, 2, 0)
    assert figures["rank-1"].value == 1 and figures["tpir@fpir=0.1"].value == 1
    assert figures["rank-1"].count == 2 * (60 - out.sum())
    assert describe_losses(split.protocol) == ["open set, 0.3 of the people not enrolled"]


# ---------------------------------------------------------------- what lies beside images, and how deep


def test_linked_folders_are_followed_and_dead_links_and_circles_counted(tmp_path, capsys):
    src = people(tmp_path / "src", {"cat": 2, "owl": 1})
    people(tmp_path / "elsewhere", {"dog": 3})
    (src / "dog").symlink_to(tmp_path / "elsewhere/dog")
    (src / "owl/9.jpg").symlink_to("/nowhere/9.jpg")
    (src / "owl/all").symlink_to(src)  # a circle
    split = prepared(src, tmp_path / "d/object/val")
    assert counts(split) == {"cat": 2, "dog": 3, "owl": 1}
    assert split.index["skipped"] == {"dead link": 1, "circular link": 1}
    assert "owl/9.jpg,dead link" in (split.folder / "skipped.csv").read_text()
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(src / name)
    assert counts(prepared(tmp_path / "linked", tmp_path / "e/object/val")) == {"cat": 2, "dog": 3}


@pytest.mark.parametrize("archive", [False, True])
def test_what_machines_leave_beside_images_is_counted_and_no_class(archive, tmp_path):
    src = people(tmp_path / "src", {"a": 2, "b": 2, ".ipynb_checkpoints": 1, "@eaDir": 1, "__MACOSX": 1})
    (src / "a/._0.jpg").write_bytes(b"\0\5\x16\7")
    (src / ".DS_Store").write_bytes(b"x")
    if archive:
        src = Path(shutil.make_archive(str(tmp_path / "set"), "zip", src))
    split = prepared(src, tmp_path / "d/face_hq/search")
    assert counts(split) == {"a": 2, "b": 2} and split.column("role").tolist() == [1, 0, 1, 0]
    assert split.index["skipped"] == {"hidden, or left by the system": 5}
    assert "a/._0.jpg" in (split.folder / "skipped.csv").read_text()


@pytest.mark.parametrize("archive", [False, True])
def test_class_folders_one_level_too_deep(archive, tmp_path, capsys):
    src = tmp_path / "src"
    people(src / "set/set", {"a": 2, "b": 2})
    (src / "pairs.csv").write_text("x")
    src = Path(shutil.make_archive(str(tmp_path / "set"), "zip", src)) if archive else src
    assert counts(prepared(src, tmp_path / "d/object/train")) == {"a": 2, "b": 2}


def test_the_parts_of_a_data_set_are_no_classes(tmp_path, capsys):
    src = tmp_path / "src"
    for part in ("train", "val"):
        people(src / part, {"a": 2, "b": 2})
    with pytest.raises(InputError, match="would be train, val, which are parts of a data set: prepare each"):
        prepared(src, tmp_path / "d/object/train")
    vehicles = people(tmp_path / "vehicles", {"train": 2, "bus": 1})  # a train is a train
    assert counts(prepared(vehicles, tmp_path / "d/object/val")) == {"bus": 1, "train": 2}
    prepared(people(tmp_path / "one", {"a": 2}), tmp_path / "d/object/train")
    assert "WARNING: only one class, a, which is too few for training" in capsys.readouterr().out
    message = script(ROOT / "train.py", *TINY, "--data", tmp_path / "d", "--domains", "object", "--out", tmp_path / "r",
                     check=2).stderr
    assert "d/object/train: only one class, 'a': prepare it again" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("sets, classes, archive", [(2, 2, False), (3, 4, False), (3, 2, True), (12, 13, False)])
def test_data_sets_side_by_side_are_no_classes(sets, classes, archive, tmp_path):
    src = tmp_path / "src"
    for k in range(sets):
        people(src / f"set{k:02d}", {f"c{c}": 2 for c in range(classes)})
    (src / "readme.txt").write_text("x")
    given = src
    if archive:  # in two folders around all, as people pack
        shutil.copytree(src, tmp_path / "pack/all/data")
        given = Path(shutil.make_archive(str(tmp_path / "all"), "zip", tmp_path / "pack"))
    with pytest.raises(InputError, match=f"{sets} folders, set00, set01.* hold {sets * classes} folders of images, "
                                         "like several data sets: prepare each .* first --src") as error:
        prepared(given, tmp_path / "d/object/train")
    one = error.value.message.partition("--src ")[2].partition(" --src ")[2].partition(" (`merge`")[0]
    assert one.endswith("/set00") and len(prepared(Path(one), tmp_path / "d/object/train")) == 2 * classes
    (tmp_path / "list").write_text("\n".join(f"set{k:02d}" for k in range(sets)))
    assert counts(prepared(given, tmp_path / "d/face_hq/train", "--list", tmp_path / "list")) == {
        f"set{k:02d}": 2 * classes for k in range(sets)}
    if classes > 2:
        shutil.copy(src / "set00/c0/0.jpg", src / "set00/preview.jpg")
        with pytest.raises(InputError, match="like several data sets"):
            prepared(src, tmp_path / "d/object/other")


def test_people_may_have_a_folder_a_video(tmp_path, capsys):
    for k in range(12):
        people(tmp_path / f"src/p{k:02d}", {"0": 2, "1": 1})
    assert len(prepared(tmp_path / "src", tmp_path / "d/face_hq/train").classes) == 12
    assert "hold 24 folders of images: they are taken as 12 classes" in capsys.readouterr().out
    (tmp_path / "few/a").mkdir(parents=True)
    for k in range(2):
        people(tmp_path / f"few/p{k}", {"0": 2, "1": 1})
        shutil.copy(tmp_path / "src/p00/0/0.jpg", tmp_path / f"few/p{k}/x.jpg")  # images in the class folder itself
    assert len(prepared(tmp_path / "few", tmp_path / "d/face_hq/few").classes) == 2


def test_a_domain_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk/faces").mkdir(parents=True)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/face_hq").symlink_to(tmp_path / "disk/faces")
    for name in ("a", "b"):
        prepared(people(tmp_path / name, {"x": 2, "y": 2}), tmp_path / f"d/face_hq/{name}", "--part", "train")
    run_here("merge", tmp_path / "d/face_hq/a", tmp_path / "d/face_hq/b", "--out", tmp_path / "d/face_hq/train")
    assert len(Split(tmp_path / "disk/faces/train")) == 8 and verify_split(tmp_path / "d/face_hq/train") == []


def test_one_camera_is_told_at_preparation(tmp_path, capsys):
    src = listed_people(tmp_path)
    for name, text, line in (
            ("some", LISTED.replace("g/a.jpg,ann,2", "g/a.jpg,ann,1"), "all mates of 1 of 3 probes are from the"),
            ("all", re.sub(r",[23],", ",1,", LISTED), "3 of 3 probes are from the probe's camera")):
        (src / "persons.csv").write_text(text)
        prepared(src, tmp_path / f"d/body/{name}", source="persons")
        shown = capsys.readouterr().out
        assert line in shown and ("there is nothing to score" in shown) == (name == "all")


@pytest.mark.parametrize("head, mark", [("", ","), ("wnid,category\n", ","), ("", "\t")])
def test_classes_gather_folders(head, mark, tmp_path, capsys):
    src = people(tmp_path / "src", {"n1": 2, "n2": 1, "n3": 3, "n4": 1})
    (tmp_path / "classes.csv").write_text(f"{head}n1,dog\nn2,cat\nn3,dog\nn9,cat\n".replace(",", mark))
    split = prepared(src, tmp_path / "d/object/val", "--classes", tmp_path / "classes.csv", "--max-images", 4)
    assert counts(split) == {"cat": 1, "dog": 4} and split.names == ["cat", "dog"]
    assert split.index["skipped"] == {"folder not in --classes": 1, "image beyond --max-images": 1}
    shown = capsys.readouterr().out
    assert "1 of its folders are not in the source: n9" in shown
    assert split.fields(0)["identity"] == "dog"


@pytest.mark.parametrize("text, words", [
    ("x,dog\ny,cat", "names none of the 2 class folders of the source"),
    ("a,dog\na,cat", "line 2: 'a' is 'dog' above"), ("a,dog,3", "line 1: want folder,class"),
])
def test_bad_classes(text, words, tmp_path):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        prepared(people(tmp_path / "src", {"a": 2, "b": 2}), tmp_path / "d/object/val", "--classes", tmp_path / "c.csv")


def test_a_size_that_the_images_do_not_have_and_foreign_shards_are_refused(tmp_path):
    a = prepared(people(tmp_path / "src", {"a": 2, "b": 2}), tmp_path / "d/object/a", "--part", "train").folder
    text = (a / "index.json").read_text()
    for size, words in ((4096, "size is 4096, its images have 24x24"), (65535, "'size' is not valid")):
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


# ---------------------------------------------------------------- choosing identities and images


FIVE = {"a": 1, "b": 2, "c": 4, "d": 4, "e": 6}


@pytest.mark.parametrize("options, expected", [
    (["--min-images", 4], {"c": 4, "d": 4, "e": 6}),
    (["--max-images", 3], {"a": 1, "b": 2, "c": 3, "d": 3, "e": 3}),
    (["--min-images", 2, "--max-images", 2], {"b": 2, "c": 2, "d": 2, "e": 2}),
])  # fmt: skip
def test_identities_are_chosen_by_their_images(options, expected, tmp_path):
    split = prepared(people(tmp_path / "src", FIVE), tmp_path / "d/face_hq/train", *options)
    assert counts(split) == expected
    assert sum(split.index["skipped"].values()) == 17 - sum(expected.values())
    chosen = zip(options[::2], options[1::2], strict=True)
    assert split.index["provenance"]["options"] == {"ood": "False"} | {
        option.strip("-").replace("-", "_"): str(value) for option, value in chosen
    }


def test_fewer_classes_are_among_more_and_depend_on_the_seed(tmp_path):
    src = people(tmp_path / "src", {f"p{i:02d}": 1 for i in range(20)})
    chosen = {(n, seed): set(prepared(src, tmp_path / f"{n}-{seed}/face_hq/train", "--max-classes", n, "--seed",
                                      seed).classes) for n in (5, 9) for seed in (0, 1)}
    for seed in (0, 1):
        assert len(chosen[5, seed]) == 5 and len(chosen[9, seed]) == 9 and chosen[5, seed] < chosen[9, seed]
    assert chosen[5, 0] != chosen[5, 1]


def test_the_first_images_of_each_role_are_kept(tmp_path):
    split = prepared(people(tmp_path / "src", {"a": 5, "b": 2, "c": 1}), tmp_path / "d/face_hq/search",
                     "--max-images", 1)
    # by default the first image is the gallery, the others are probes, a lone one is a distractor
    assert split.labels.tolist() == [0, 0, 1, 1, 2] and split.column("role").tolist() == [1, 0, 1, 0, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_so_many_readable_images_are_taken(workers, tmp_path, monkeypatch):
    """Of five images of a, three are cut off: two readable ones are there. It is decided once, before a kill."""
    src, out = people(tmp_path / "src", {"a": 5, "b": 3}), tmp_path / "d/face_hq/train"
    for name in ("a/0.jpg", "a/2.jpg", "a/4.jpg", "b/2.jpg"):
        cut(src / name)
    options = ("--max-images", 2, "--shard-size", 2, "--workers", workers)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("data_prep.write.write_columns", lambda *_: 1 / 0)
        prepared(src, out, *options)
    cut(src / "a/1.jpg")  # its shard is written
    split = prepared(src, out, *options)
    assert counts(split) == {"a": 2, "b": 2}
    # b's third image is neither needed nor looked at; a's fifth comes after its second readable one
    assert split.index["skipped"] == {"unreadable image": 2, "image beyond --max-images": 2}
    files = {row[0] for row in csv.reader((out / "skipped.csv").open())}
    assert files == {"file", "a/0.jpg", "a/2.jpg"}
    (src / "b/1.jpg").write_bytes((src / "b/0.jpg").read_bytes())
    unlike = prepared(src, tmp_path / "e/face_hq/train", "--max-images", 2, "--drop-duplicates")
    assert counts(unlike) == {"a": 1, "b": 1}  # of different images
    listed = listed_people(tmp_path)
    cut(listed / "g/b.jpg")  # a listed miss stays, and the other mate of bob is taken
    test = prepared(listed, tmp_path / "d/body/mine", "--max-images", 1, source="persons")
    assert test.missing.tolist() == [False] * 4 + [True, False, False]


@pytest.mark.parametrize("train", [True, False])
def test_a_class_without_a_readable_image_is_none(train, tmp_path, capsys, monkeypatch):
    """Everything is as in the set without that folder, however often the preparation is killed."""
    split = "train" if train else "val"
    bad, good = (people(tmp_path / name, {"a": 3, "b": 2, "c": 3, "d": 2}) for name in ("bad", "good"))
    for name in ("b/0.jpg", "b/1.jpg", "c/1.jpg"):
        cut(bad / name)
        (good / name).unlink()
    out, options = tmp_path / f"bad_/object/{split}", ("--shard-size", 3, "--workers", 1)
    for stop in (1, 2):  # after the first and after the second time that all shards were written
        calls = iter(range(stop - 1))
        with monkeypatch.context() as patch, pytest.raises(StopIteration):
            patch.setattr("data_prep.write.write_columns", lambda *args, f=data_prep.write.write_columns, c=calls:
                          f(*args) if next(c) is not None else None)
            prepared(bad, out, *options)
    found, wanted = prepared(bad, out, *options), prepared(good, tmp_path / f"good_/object/{split}", *options)
    assert "1 classes have no readable image and are left out: b" in capsys.readouterr().out
    assert found.classes == wanted.classes == ["a", "c", "d"] and counts(found) == counts(wanted)
    assert verify_split(out) == [] and len(list(out.glob("*.tar"))) == len(found.index["shards"]) == 3
    assert found.index["unreadable_classes"] == ["b"] and "unreadable_classes" not in wanted.index
    assert found.index["skipped"] == {"unreadable image": 3}
    assert len((out / "skipped.csv").read_text().splitlines()) == 4
    if not train:
        assert [found.jpeg(row)[1] for row in range(7)] == [wanted.jpeg(row)[1] for row in range(7)]
        assert found.protocol == wanted.protocol | {"unreadable": 3}


def test_holdout_keeps_people_apart_whatever_the_other_options(tmp_path):
    src = people(tmp_path / "src", {f"p{i:02d}": 1 + i % 4 for i in range(60)})
    train = prepared(src, tmp_path / "d/face_hq/train", "--holdout", 0.3)
    test = prepared(src, tmp_path / "d/face_hq/test", "--holdout", 0.3)
    everyone = {f"p{i:02d}" for i in range(60)}
    expected = {name for name in everyone if draw(0, name) < 0.3}
    assert set(test.classes) == expected and set(train.classes) == everyone - expected
    assert 8 <= len(expected) <= 28  # 18 on average
    assert len(train) + len(test) == sum(1 + i % 4 for i in range(60))
    fewer = prepared(src, tmp_path / "d/face_hq/few", "--holdout", 0.3, "--min-images", 3, "--max-classes", 4)
    assert len(fewer.classes) == 4 and set(fewer.classes) < expected
    other = prepared(src, tmp_path / "e/face_hq/test", "--holdout", 0.3, "--seed", 1)
    assert set(other.classes) != expected
    # the definition, so that splits of an older version never mix with those of a newer one
    assert draw(3, "p") == int.from_bytes(hashlib.sha256(b"3\0p").digest()[:8]) / 2**64


def test_a_list_names_identities_or_images(tmp_path):
    src = people(tmp_path / "src", FIVE)
    (tmp_path / "list").write_text("\ufeffe\n\nc/2.jpg\nd/0.jpg\nd/0.jpg\n")
    split = prepared(src, tmp_path / "d/face_hq/train", "--list", tmp_path / "list")
    assert counts(split) == {"c": 1, "d": 1, "e": 6} and split.index["skipped"] == {"not in --list": 9}


def test_pairs_follow_what_was_left_out(tmp_path, capsys):
    """Known answer: without P_0 only the second fold is left, and its rows move up by three."""
    (tmp_path / "pairs.txt").write_text(PAIRS)
    (tmp_path / "list").write_text("P_1\nP_2\nP_3\n")
    split = prepared(lfw_folder(tmp_path / "src"), tmp_path / "d/face_hq/lfw", "--pairs", tmp_path / "pairs.txt",
                     "--list", tmp_path / "list", source="lfw")
    assert split.column("pairs").tolist() == [[4, 3, 1, 1], [6, 5, 0, 1]]
    assert split.protocol == {"name": "verification", "folds": 2, "pairs": 2, "pairs_lost": 2}
    assert "12 images in, 9 of 3 classes written, 3 skipped" in capsys.readouterr().out


def test_restricting_a_source_moves_pairs_and_blocks(tmp_path):
    records = Records((Record(partial(bytes, 1), f"{i}", f"p{i % 3}", role=i % 2) for i in range(10)), tmp_path)
    source = Source(records, {"name": "verification"}, [(0, 9, 1, 0), (4, 5, 0, 0), (9, 8, 0, 1)], Counter(old=2),
                    blocks=[0, 3, 4, 8])
    keep = np.array([1, 1, 0, 0, 1, 0, 1, 1, 0, 1], dtype=bool)
    part = restrict(restrict(source, keep, "one"), np.array([0, 1, 1, 1, 1, 1], dtype=bool), "two")
    assert [record.name for record in part.records] == ["1", "4", "6", "7", "9"]
    assert part.pairs == [[-1, 4, 1, 0], [1, -1, 0, 0], [4, -1, 0, 1]]
    assert part.blocks == [0, 1, 4] and part.skipped == {"old": 2, "one": 4, "two": 1}
    assert part.records.labels()[1].tolist() == [1, 1, 0, 1, 0] and part.records.role.tolist() == [1, 0, 0, 1, 1]
    assert source.records[9].read() == b"\0" and len(source.records) == 10  # the whole is still there


# ---------------------------------------------------------------- copies


def test_first_copies():
    hashes = np.array([5, 0, 7, 5, 0, 8, 7], dtype=np.uint64)
    assert first_copies(hashes).tolist() == [True, True, True, False, True, True, False]
    assert first_copies(hashes, np.array([8, 5], dtype=np.uint64)).tolist() == [False, True, True, False, True, False,
                                                                                False]


def with_copies(tmp_path: Path) -> tuple[Path, Path]:
    """Training people b and c and test people x and y; b holds an image twice, c one of b, b one of x."""
    train = people(tmp_path / "train", {"b": 3, "c": 3})
    test = people(tmp_path / "test", {"_": 0, "__": 0, "x": 2, "y": 2})  # places 2 and 3: other pictures than b and c
    (train / "b/3.jpg").write_bytes((train / "b/0.jpg").read_bytes())
    (train / "c/3.jpg").write_bytes((train / "b/1.jpg").read_bytes())
    (train / "b/4.jpg").write_bytes((test / "x/1.jpg").read_bytes())
    return train, test


def test_copies_are_reported(tmp_path, capsys):
    train, test = with_copies(tmp_path)
    prepared(test, tmp_path / "d/face_hq/test")
    assert "are copies" not in capsys.readouterr().out
    split = prepared(train, tmp_path / "d/face_hq/train")
    out = capsys.readouterr().out
    assert len(split) == 9 and "2 images are copies of others in the split" in out
    assert "1 of the copied images have several labels" in out
    assert "train and test overlap, 1 images are in test too: prepare train again, after test" in out


def test_copies_are_dropped(tmp_path, capsys):
    train, test = with_copies(tmp_path)
    prepared(test, tmp_path / "d/face_hq/test")
    split = prepared(train, tmp_path / "d/face_hq/train", "--drop-duplicates")
    assert counts(split) == {"b": 3, "c": 3} and split.index["skipped"] == {"copy of another image": 3}
    assert "copies of others" not in (out := capsys.readouterr().out) and "overlap" not in out
    again = prepared(train, tmp_path / "d/face_hq/train", "--drop-duplicates")
    assert "complete" in capsys.readouterr().out and len(again) == 6


def test_a_damaged_image_is_no_copy(tmp_path):
    src = people(tmp_path / "src", {"a": 2})
    for name in ("2.jpg", "3.jpg"):
        (src / "a" / name).write_bytes(b"damaged")
    split = prepared(src, tmp_path / "d/face_hq/train", "--drop-duplicates")
    assert len(split) == 2 and split.index["skipped"] == {"copy of another image": 1, "unreadable image": 1}


# ---------------------------------------------------------------- resumption


def test_a_killed_preparation_with_filters_continues_to_the_same_bytes(tmp_path):
    src = class_folders(tmp_path / "src", classes=12, images=40, width=500, height=500)
    (src / "c3" / "copy.jpg").write_bytes((src / "c4" / "0.jpg").read_bytes())
    command = ["-m", "data_prep", "folder", "--src", str(src), "--size", "160", "--shard-size", "8", "--holdout", "0.4",
               "--max-images", "38", "--drop-duplicates"]
    script(*command, "--workers", "2", "--out", tmp_path / "a/body/train")
    out = tmp_path / "b/body/train"
    process = subprocess.Popen([sys.executable, *command, "--workers", "2", "--out", str(out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while len(list(out.glob("shard-*.tar"))) < 3 and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (out / "index.json").exists() and list(out.glob("shard-*.tar"))
    time.sleep(1.2)  # by now orphaned workers are gone
    script(*command, "--workers", "1", "--out", out)
    assert files_of(out) == files_of(tmp_path / "a/body/train")
    assert not list(out.glob("*.tmp")) and not (out / ".parts").exists()


def test_what_a_test_split_holds_is_seen_once(tmp_path, monkeypatch):
    """A preparation that is continued after a test split came decides as it did when it began."""
    train, test = with_copies(tmp_path)
    out = tmp_path / "d/face_hq/train"
    monkeypatch.setattr("data_prep.write.write_columns", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(train, out, "--drop-duplicates")
    monkeypatch.undo()
    prepared(test, tmp_path / "d/face_hq/test")
    assert prepared(train, out, "--drop-duplicates").index["skipped"] == {"copy of another image": 2}


# ---------------------------------------------------------------- memory


def blank(number: int) -> bytes:
    return BLANK


BLANK = encode(picture(0, 8, 8))


def test_records_come_from_a_generator_and_are_read_once(tmp_path):
    passes = []

    def generate():
        passes.append(1)
        yield from (Record(partial(blank, i), f"image {i}", f"p{i % 7}", camera=i % 3) for i in range(100))

    index = write_split(tmp_path / "d/body/train", Source(generate()), source_name="made", size=8, fit="pad",
                        quality=95, train=True, shard_size=16)
    listed = write_split(tmp_path / "e/body/train", Source(list(generate())), source_name="made", size=8, fit="pad",
                         quality=95, train=True, shard_size=16)
    assert index == listed and len(passes) == 2 and verify_split(tmp_path / "d/body/train") == []
    assert files_of(tmp_path / "d") == files_of(tmp_path / "e")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments, words", [
    (["--list", "{tmp}/none"], "--list {tmp}/none: cannot be read as text"),
    (["--list", "{tmp}/empty"], "--list {tmp}/empty: is empty"),
    (["--list", "{tmp}/unknown"], "line 2: 'c0/9.jpg' is neither an identity nor an image of the source"),
    (["--list", "{tmp}/binary"], "--list {tmp}/binary: cannot be read as text"),
    (["--min-images", "6"], "--min-images 6: none of the 15 images is left"),
    (["--holdout", "0.0001", "--part", "test"], "--holdout 0.0001 with --seed 0, test part: none of the 15 images"),
    (["--holdout", "1.5"], "--holdout"), (["--max-images", "0"], "--max-images"), (["--max-classes", "x"], "x"),
])  # fmt: skip
def test_bad_selections(arguments, words, tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "unknown").write_text("c0\nc0/9.jpg\nzz\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00c0")
    with pytest.raises(click.ClickException) as error:
        prepared(class_folders(tmp_path / "src"), tmp_path / "d/body/train",
                 *[a.format(tmp=tmp_path) for a in arguments])
    assert words.format(tmp=tmp_path) in error.value.format_message() and "\n" not in error.value.format_message()


def test_holdout_is_for_people(tmp_path):
    with pytest.raises(InputError, match="--holdout separates the people"):
        prepared(class_folders(tmp_path / "src"), tmp_path / "d/object/train", "--holdout", 0.5)


def test_a_bad_option_is_one_line_and_exit_code_2(tmp_path):
    result = script("-m", "data_prep", "folder", "--src", class_folders(tmp_path / "src"), "--out",
                    tmp_path / "d/body/train", "--list", tmp_path / "none", check=2)
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("error: --list")


# ---------------------------------------------------------------- merging


def made(out: Path, rows: list[tuple], protocol: dict | None = None, size: int = 16, **options) -> Split:
    """A split of drawn images; rows are (identity, person, camera)."""
    seed = int(hashlib.sha256(out.name.encode()).hexdigest()[:6], 16)
    records = [Record(partial(encode, picture(seed + i, size, size)), f"{out.name} {i}", identity, person=person,
                      camera=camera) for i, (identity, person, camera) in enumerate(rows)]
    write_split(out, Source(records, protocol, **options), source_name="made", size=size, fit="pad", quality=95,
                train=protocol is None, shard_size=2)
    return Split(out)


def test_people_are_joined_where_a_source_proves_it_and_never_by_name(tmp_path, capsys):
    """Known answer: a/1 is b/9 by their person; a/2 and b/2 only share a name; a/3, b/4 are on their own."""
    root = tmp_path / "data/body"
    a = made(root / "a", [("1", "x", 0), ("2", None, 1), ("3", None, 0), ("1", "x", 1)])
    b = made(root / "b", [("9", "x", 0), ("2", None, 2), ("4", "y", None)])
    run_here("merge", root / "a", root / "b", "--out", root / "train")
    out = capsys.readouterr().out
    assert "7 images of 5 classes in the shards of a, b" in out and "1 classes were merged into others" in out
    assert "1 names occur in several splits and stay separate classes, <split>/<name>" in out
    split = Split(root / "train")
    assert split.classes == ["3", "4", "a/2", "b/2", "x"] and verify_split(split.folder, 1) == []
    assert sorted(p.name for p in split.folder.iterdir()) == ["index", "index.json"]  # no image was copied
    new = {("a", "1"): "x", ("a", "2"): "a/2", ("a", "3"): "3", ("b", "9"): "x", ("b", "2"): "b/2", ("b", "4"): "4"}
    for row in range(7):
        part, at = (a, row) if row < 4 else (b, row - 4)
        assert split.classes[split.labels[row]] == new[part.name, part.classes[part.labels[at]]]
        assert split.jpeg(row) == part.jpeg(at) and split.fields(row) == part.fields(at)
        # camera 0 of one set is not camera 0 of another; -1 stays: there is none
        camera = int(part.column("camera")[at])
        assert split.column("camera")[row] == (camera if row < 4 or camera < 0 else camera + 2)
    moved = (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert verify_split(moved / "body/train") == []


def test_object_classes_of_equal_names_are_joined_on_request(tmp_path, capsys):
    root = tmp_path / "object"
    made(root / "a", [("n1", None, None), ("n2", None, None)], names={"n1": "tench"})
    made(root / "b", [("n2", None, None), ("n3", None, None)], names={"n2": "goldfish"})
    run_here("merge", root / "a", root / "b", "--out", root / "train")
    split = Split(root / "train")
    assert split.classes == ["a/n2", "b/n2", "n1", "n3"] and split.names == ["a/n2", "goldfish", "tench", "n3"]
    assert "(--same-names merges them)" in capsys.readouterr().out
    run_here("merge", root / "a", root / "b", "--out", root / "train", "--same-names")
    split = Split(root / "train")
    assert split.classes == ["n1", "n2", "n3"] and split.counts.tolist() == [1, 2, 1]
    assert verify_split(root / "train") == []


def test_verify_notices_what_happened_to_the_parts_of_a_merged_split(tmp_path):
    root = tmp_path / "body"
    for name in "ab":
        made(root / name, [("1", None, 0), ("2", None, 1), ("3", None, 0)])
    run_here("merge", root / "a", root / "b", "--out", root / "train")
    labels = np.load(root / "train/index/label.npy")
    np.save(root / "train/index/label.npy", labels[::-1])
    assert verify_split(root / "train") == [f"{root}/train/index/label.npy: does not follow from its parts: merge "
                                            "them again"]
    np.save(root / "train/index/label.npy", labels)
    (root / "b").rename(root / "c")
    with pytest.raises(InputError, match=r"\.\./b/shard-000000.tar: missing"):
        Split(root / "train")


def test_a_model_is_trained_on_a_merged_split(tmp_path):
    """One domain out of two sets: every image is seen once an epoch, and the head has a row for each person."""
    root = tmp_path / "data/body"
    made(root / "one", [(f"{i % 5}", None, 0) for i in range(20)], size=32)
    made(root / "two", [(f"{i % 4}", None, 0) for i in range(12)], size=32)
    run_here("merge", root / "one", root / "two", "--out", root / "train")
    made(root / "test", [(f"t{i % 4}", None, i // 4) for i in range(8)], {"name": "verification", "folds": 1}, 32,
         pairs=[(0, 4, 1, 0), (0, 1, 0, 0)])
    run = tmp_path / "run"
    script("train.py", *TINY, "--schedule", "B", "--domains", "body", "--data", tmp_path / "data", "--out", run)
    assert json.loads((run / "done.json").read_text())
    split = Split(root / "train")
    order = Order([shard["samples"] for shard in split.index["shards"]], 0, 3, 8)
    assert sorted(order(np.arange(32))[1].tolist()) == list(range(32)) and len(split.classes) == 9


@pytest.mark.parametrize("arguments, words", [
    (["{d}/body/a"], "want at least two different"), (["{d}/body/a", "{d}/body/a"], "want at least two different"),
    (["{d}/body/a", "{d}/body/test"], "body/test is a test split"), (["{d}/body/a", "{d}/body/none"], "no index.json"),
    (["{d}/body/a", "{d}/object/o"], "must lie side by side"),
    (["{d}/body/a", "{d}/body/big"], "body/big has 24 pixels"),
    (["{d}/body/a", "{d}/body/out"], "must lie side by side"),
    (["{d}/body/a", "{d}/body/m"], "body/m is merged itself"),
    (["{d}/body/a", "{d}/body/b", "--same-names"], "--same-names is for objects"),
    (["{d}/body/a", "{d}/body/b", "--out", "{d}/body/big"], "already holds something else"),
])  # fmt: skip
def test_bad_merges(arguments, words, tmp_path):
    for name in ("body/a", "body/b", "body/out", "object/o"):
        made(tmp_path / name, [("1", None, 0), ("2", None, 0)])
    made(tmp_path / "body/big", [("1", None, 0)], size=24)
    made(tmp_path / "body/test", [("1", None, 0)], {"name": "identification"})
    run_here("merge", tmp_path / "body/a", tmp_path / "body/b", "--out", tmp_path / "body/m")
    arguments = [a.format(d=tmp_path) for a in arguments]
    with pytest.raises(InputError) as error:
        run_here("merge", *arguments, *([] if "--out" in arguments else ["--out", tmp_path / "body/out"]))
    assert words in error.value.message and "\n" not in error.value.message


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x/shard-000000.tar", "../.ssh/shard-000000.tar", "",
                                  "../../shard-000000.tar", "shard-000000.tar/../x", "a/shard-000000.tar"])
def test_a_shard_table_cannot_name_other_files(name, tmp_path):
    made(tmp_path / "body/a", [("1", None, 0)])
    index = json.loads((tmp_path / "body/a/index.json").read_text())
    index["shards"][0]["file"] = name
    (tmp_path / "body/a/index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="is not a shard's name"):
        Split(tmp_path / "body/a")


# ---------------------------------------------------------------- statistics


def test_statistics_have_known_answers(tmp_path, capsys):
    src = tmp_path / "src"
    for name, quality, images in (("a", 40, 1), ("b", 75, 3), ("c", 95, 2)):
        (src / name).mkdir(parents=True)
        for i in range(images):
            (src / name / f"{i}.jpg").write_bytes(encode(picture(ord(name) + 9 * i, 24, 24), quality=quality))
    (src / "c/1.jpg").write_bytes((src / "c/0.jpg").read_bytes())
    split = prepared(src, tmp_path / "d/face_hq/search")
    run_here("stats", split.folder)
    found = json.loads((split.folder / "stats.json").read_text())
    assert (found["images"], found["classes"], found["classes with one image"], found["copies"]) == (6, 3, 1, 1)
    assert found["images per class"] == {"min": 1, "p25": 1.5, "median": 2, "p75": 2.5, "max": 3, "mean": 2}
    assert found["JPEG quality"] == {"min": 40, "p25": 75, "median": 75, "p75": 90, "max": 95, "mean": 75.833}
    assert found["bytes per image"]["mean"] == pytest.approx(np.mean([p.stat().st_size for p in src.rglob("*.jpg")]),
                                                             abs=1e-3)
    assert found["roles"] == {"probe": 3, "gallery": 2, "distractor": 1} and found["pixels"] == 24
    assert Image.open(split.folder / "stats.png").width > 1000 and "JPEG quality" in capsys.readouterr().out
    assert verify_split(split.folder) == []  # what it wrote beside the shards is no part of them


def test_one_value_is_told_and_fills_no_panel(tmp_path, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    draw_stats(tmp_path / "stats.png", "a set", {"images per class": np.array([3, 3]), "sharpness": np.array([1.0, 2])})
    one, several = pyplot.gcf().axes
    assert [text.get_text() for text in one.texts] == ["3 in all\n2 classes"] and not one.patches
    assert sum(bar.get_height() for bar in several.patches) == 2 and not several.texts
    monkeypatch.undo()
    pyplot.close("all")


@pytest.mark.parametrize("quality", [1, 25, 49, 50, 51, 77, 90, 100])
def test_the_quality_of_a_jpeg_is_read_from_its_table(quality):
    assert jpeg_quality(encode(picture(0), quality=quality)) == quality
    assert jpeg_quality(b"damaged") is None


def test_sharpness_of_known_images():
    grey = np.full((3, 16, 16), 100, dtype=np.uint8)
    assert sharpness(grey) == 0
    board = ((np.indices((16, 16)).sum(0) % 2) * 200).astype(np.uint8)[None].repeat(3, 0)
    assert sharpness(board) == pytest.approx(800)  # +-800 at every other pixel, mean 0


def test_bad_statistics(tmp_path):
    with pytest.raises(InputError, match=r"no index\.json"):
        run_here("stats", tmp_path)


# ---------------------------------------------------------------- degrading


def sharp_face(side: int = 112) -> torch.Tensor:
    face = Image.open(io.BytesIO(draw_face(0, 1, 2))).resize((side, side))
    return torch.from_numpy(np.array(face)).permute(2, 0, 1)


def test_every_degradation_happens_within_its_range():
    """Known ranges at severity s; lengths are in pixels of 112, so an image of another size gives the same draws."""
    image, s, seen = sharp_face(), 0.8, Counter()
    limits = {"blur": (0.1, 2.5 * s), "blur_aspect": (0.6, 1), "blur_angle": (0, np.pi), "motion": (1, 1 + 10 * s),
              "motion_angle": (0, np.pi), "turbulence": (0.5 * s, 2.5 * s), "turbulence_sigma": (4, 12),
              "turbulence_blur": (0.1, 2 * s), "noise": (0, 20 * s), "shot_noise": (0, 20 * s), "jpeg": (20, 92),
              "log_gamma": (-0.7 * s, 0.7 * s), "grey": (1, 1), "severity": (s, s), "down": (0, 4),
              "log_shrink": (s * np.log(12 / 112), s * np.log(56 / 112)),
              "short_side": (112 * (12 / 112) ** s - 1, 112 * 0.5**s + 1)}
    for i in range(400):
        soft, draws = degrade(image, s, np.random.default_rng(i))
        assert draws.pop("up") in ("bicubic", "bilinear") and soft.shape == image.shape
        for name, value in draws.items():
            assert limits[name][0] - 1e-3 <= value <= limits[name][1] + 1e-3, name
        seen.update(draws.keys())
    expected = {"blur": 0.7, "motion": 0.3, "turbulence": 0.2, "jpeg": 0.8, "log_gamma": 0.3, "noise": 0.25,
                "shot_noise": 0.25, "grey": 0.05 * s, "down": 1}
    assert set(seen) == set(limits)
    assert all(abs(seen[name] / 400 - share) < 0.08 for name, share in expected.items())


def test_a_warp_moves_pixels_by_its_tilt_and_a_flat_image_not_at_all():
    rng = np.random.default_rng(0)
    field = torch.from_numpy(rng.standard_normal((2, 28, 28), dtype=np.float32))
    ramp = torch.arange(112.0).expand(3, 112, 112)  # the value of a pixel is its column
    shift = (warp(ramp, field, 2.0, 1.5) - ramp)[0, 8:-8, 8:-8]
    assert shift.square().mean().sqrt() == pytest.approx(2.0, rel=0.3)
    assert (shift[:, 1:] - shift[:, :-1]).abs().max() < 1.5  # smooth: neighbours move together
    assert warp(torch.full((3, 30, 20), 7.0), field, 3.0, 2.0).allclose(torch.tensor(7.0))


def test_a_blur_is_the_convolution_that_it_stands_for():
    """Against direct sums over the pixels, edges repeated: a turned Gaussian, and a motion of nine pixels."""
    x, half = sharp_face(60).float(), 12
    v, u = np.mgrid[-half : half + 1, -half : half + 1]
    along, across = u * np.cos(0.6) + v * np.sin(0.6), v * np.cos(0.6) - u * np.sin(0.6)
    turned = np.exp(-0.5 * ((along / 3) ** 2 + (across / 1.5) ** 2))
    padded = np.pad(x.numpy(), ((0, 0), (half, half), (half, half)), mode="edge")

    def summed(kernel):
        kernel = kernel / kernel.sum()
        return sum(weight * padded[:, i : i + 60, j : j + 60] for (i, j), weight in np.ndenumerate(kernel))

    assert np.abs(blur(x, (3.0, 1.5), 0.6).numpy() - summed(turned)).max() < 0.5
    row = ((v == 0) & (np.abs(u) <= 4)).astype(float)
    assert np.abs(blur(x, (1.0, 1.0), 0.0, 9.0, 0.0).numpy() - blur(
        torch.from_numpy(summed(row)).float(), (1.0, 1.0)).numpy())[:, 8:-8, 8:-8].max() < 1
    assert np.abs(blur(x, (1.0, 1.0), 0.0, 9.0, np.pi / 2).mT.numpy()
                  - blur(x.mT.contiguous(), (1.0, 1.0), 0.0, 9.0, 0.0).numpy()).max() < 0.01
    flat = torch.full((3, 31, 47), 9.0)
    assert blur(flat, (2.5, 0.7), 1.0, 7.3, 2.0).allclose(flat, atol=1e-3)


def test_degradation_works_at_the_small_size_and_looks_as_at_full_size():
    """Decibels from the sharp image, mean of 400 images when every step ran at full size with direct convolutions."""
    sharp = sharp_face(112)
    for severity, expected in {0.3: 29.39, 1.0: 20.99}.items():
        soft = torch.stack([degrade(sharp, severity, np.random.default_rng((9, i)))[0] for i in range(200)])
        error = (soft.float() - sharp.float()).square().mean((1, 2, 3))
        assert (10 * torch.log10(255**2 / error)).mean().item() == pytest.approx(expected, abs=0.8)


def test_degraded_shards_keep_people_pairs_and_say_what_was_drawn(tmp_path, capsys):
    (tmp_path / "pairs.txt").write_text(PAIRS)
    sharp = prepared(lfw_folder(tmp_path / "src"), tmp_path / "d/face_hq/lfw", "--pairs", tmp_path / "pairs.txt",
                     source="lfw")
    command = ["degrade", "--src", sharp.folder, "--severity", 0.9, "--min-severity", 0.4, "--seed", 3]
    run_here(*command, "--out", tmp_path / "d/face_lq/lfw", "--workers", 1)
    soft = Split(tmp_path / "d/face_lq/lfw")
    assert verify_split(soft.folder) == [] and soft.classes == sharp.classes and soft.size == sharp.size
    assert soft.labels.tolist() == sharp.labels.tolist() and soft.protocol == sharp.protocol
    assert soft.column("pairs").tolist() == sharp.column("pairs").tolist()
    for row in range(len(soft)):
        draws = soft.fields(row)["degradation"]
        assert 0.4 <= draws["severity"] <= 0.9 and draws["from"] == f"face_hq/lfw/{row:09d}"
        rng = np.random.default_rng((3, 2, row))  # what was drawn can be drawn again
        again, repeated = degrade(sharp.image(row), 0.4 + 0.5 * rng.random(), rng)
        assert draws == repeated | {"from": draws["from"]}
        assert (soft.image(row).float() - again.float()).abs().mean() < 3  # but for the JPEG
    run_here(*command, "--out", tmp_path / "e/face_lq/lfw", "--workers", 2)
    assert files_of(tmp_path / "d/face_lq") == files_of(tmp_path / "e/face_lq")


def test_a_shift_is_what_its_numbers_say():
    image = sharp_face(96)

    def draw(kind, level):
        return shift(kind, level, image, np.random.default_rng(1))[0].float()

    flat = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    noisy = shift("gaussian_noise", 2, flat, np.random.default_rng(0))[0].float()
    assert noisy.std().item() == pytest.approx(20.4, rel=0.03) and noisy.mean().item() == pytest.approx(128, abs=1)
    pale, means = draw("contrast", 5), image.float().mean((1, 2), keepdim=True)
    assert (pale - means - 0.12 * (image.float() - means)).abs().max() <= 0.5 + 1e-3
    assert torch.equal(draw("brightness", 1), (image.float() + 25.5).round().clamp(max=255))
    blocks = draw("pixelate", 5)  # 17 pixels along a side
    assert len(torch.unique_consecutive(blocks, dim=2)[0, 0]) == 17 == round(0.18 * 96)
    sharp = image[:, 20:21].float()
    soft = blur(image.float(), (1.6 * 96 / 112,) * 2)[:, 20:21]
    assert (draw("gaussian_blur", 3)[:, 20:21] - soft).abs().max() <= 0.5 + 1e-3 < 10 < (sharp - soft).abs().max()
    for kind in SHIFTS:
        loss = [(draw(kind, level) - image.float()).abs().mean().item() for level in range(1, 6)]
        assert loss == sorted(loss) and loss[0] > 0.2 and loss[4] > 1.5 * loss[0], kind


def test_shifts_of_objects_are_splits_out_of_distribution(demo_root, tmp_path):
    clean = Split(demo_root / "object/val")
    run_here("degrade", "--src", clean.folder, "--out", tmp_path / "object/val", "--shift", "contrast-5, pixelate",
             "--workers", 1)
    found = open_root(tmp_path)["object"]
    assert sorted(found) == ["val-contrast-5", *(f"val-pixelate-{level}" for level in range(1, 6))]
    for split in found.values():
        kind, severity = split.name.split("-")[1:]
        made = split.index["provenance"]
        assert made["source"] == "degrade" and made["options"] == {
            "src": "object/val", "src_plan": clean.index["provenance"]["plan"], "kind": kind, "severity": severity}
        assert split.protocol == clean.protocol | {"ood": True} and split.labels.tolist() == clean.labels.tolist()
        assert clean_of(split, [split, clean]) is clean  # whose score its retention is held against
    assert len({fingerprint(split) for split in found.values()}) == 6
    assert split.fields(3)["degradation"] == {"kind": kind, "severity": int(severity), "from": "object/val/000000003"}
    with pytest.raises(click.ClickException, match="already holds another split"):  # it was taken for complete
        run_here("degrade", "--src", clean.folder, "--out", found["val-contrast-5"].folder, "--workers", 1)


def test_degraded_training_splits_keep_the_identities_that_a_source_proves(demo_root, tmp_path):
    sharp = Split(demo_root / "face_hq/train")
    run_here("degrade", "--src", sharp.folder, "--out", tmp_path / "face_lq/copies", "--workers", 1)
    soft = Split(tmp_path / "face_lq/copies")
    assert soft.protocol is None and soft.classes == sharp.classes and soft.counts.tolist() == sharp.counts.tolist()
    for row in range(0, len(soft), 17):
        fields = soft.fields(row)
        assert fields["person"] == f"demo-{fields['identity']}" and fields["domain"] == "face_lq"
        origin = int(np.flatnonzero([sharp.jpeg(r)[0] == fields["degradation"]["from"][-9:]
                                     for r in range(len(sharp))])[0])
        assert sharp.classes[sharp.labels[origin]] == fields["identity"]
    assert soft.labels.tolist() != sharp.labels.tolist()  # a training split is written in its own random order


def test_the_ladder_is_drawn_from_sharp_to_poor(demo_root, tmp_path):
    for source in ([], ["--src", demo_root / "face_hq/test"]):
        run_here("degrade", "--ladder", tmp_path / "ladder.png", *source)
        sheet = np.asarray(Image.open(tmp_path / "ladder.png").convert("RGB")).astype(float)
        side = (sheet.shape[0] - 14) // 4 - 2
        assert sheet.shape == (14 + 4 * (side + 2), 6 * (side + 2), 3)
        columns = [sheet[14:, c * (side + 2) : c * (side + 2) + side] for c in range(6)]
        loss = [np.abs(column - columns[0]).mean() for column in columns]
        assert loss[0] == 0 < loss[1] < loss[3] < loss[5]


@pytest.mark.parametrize("arguments, words", [
    ([], "want --src SPLIT --out DATA/face_lq/<split>, or --ladder"), (["--out", "{d}/face_lq/x"], "want --src SPLIT"),
    (["--src", "{d}", "--out", "{d}/face_lq/x"], "no index.json"), (["--src", "{hq}", "--out", "{d}/x"], "want DATA/"),
    (["--src", "{hq}", "--out", "{hq}"], "is the same split as --src"), (["--ladder", "{d}/none/x.png"], "--ladder"),
    (["--src", "{hq}", "--out", "{d}/face_lq/x", "--min-severity", "1", "--severity", ".5"], "is above --severity 0.5"),
    (["--ladder", "{d}/x.none"], "cannot be written"), (["--severity", "2"], "--severity"),
    (["--src", "{hq}", "--out", "{d}/object/x", "--shift", "all"], "--shift makes test splits of objects"),
    (["--src", "{val}", "--out", "{d}/face_lq/x", "--shift", "all"], "--shift makes test splits of objects"),
    (["--src", "{val}", "--out", "{d}/object/x", "--shift", "contrast-6"], "--shift 'contrast-6': want all, or KIND"),
    (["--src", "{val}", "--out", "{d}/object/x", "--shift", "fog"], "kind of gaussian_noise, gaussian_blur, contrast"),
])  # fmt: skip
def test_bad_degradations(arguments, words, demo_root, tmp_path):
    places = {"d": tmp_path, "hq": demo_root / "face_hq/test", "val": demo_root / "object/val"}
    with pytest.raises(click.ClickException) as error:
        run_here("degrade", *[a.format(**places) for a in arguments])
    assert words in error.value.format_message() and "\n" not in error.value.format_message()


# ---------------------------------------------------------------- reading, speed, list of sources


def test_a_loader_process_delivers_the_same_batches(small_split):
    rows = np.array([3, 0, 7, 7, 5])
    batches = Batches(small_split, rows, 2)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1, collate_fn=lambda item: item)
    for b, (found, images) in enumerate(loader):
        good, own = batches[b]
        assert found.tolist() == good.tolist() and torch.equal(images, own) and images.is_shared()
        for row, image in zip(good.tolist(), own, strict=True):
            assert torch.equal(image, small_split.image(row))


@pytest.fixture
def small_split(tmp_path) -> Split:
    return made(tmp_path / "body/train", [(f"{i % 3}", None, 0) for i in range(8)])


def test_unreadable_images_are_left_out_of_a_batch(small_split):
    with open(small_split.folder / "shard-000001.tar", "r+b") as tar:
        tar.seek(int(small_split.offset[3]))
        tar.write(b"\0" * int(small_split.length[3]))
    good, images = Batches(small_split, np.array([2, 3, 4]), 3)[0]
    assert good.tolist() == [2, 4] and torch.equal(images[1], small_split.image(4)) and images.shape == (2, 3, 16, 16)


def test_every_contender_of_the_benchmark_sees_every_image(small_split):
    counts = {"ours, batches": [4], "ours, training": [tools.bench_data.BATCH], "webdataset, batches": [4]}
    for name, contender in tools.bench_data.READERS.items():
        expected = counts.get(name, [1] * 4)  # of a process that has every other image
        for part in range(2):
            assert list(islice(contender(small_split.folder, part, 2), len(expected))) == expected, name


def test_the_benchmark_measures_and_judges(tmp_path):
    result = script("-m", "data_prep", "bench", "--size", 32, "--images", 64, "--prepared", 32, "--rounds", 2,
                    "--seconds", 0.05, "--workers", 2, "--scratch", tmp_path, "--json", tmp_path / "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())["sizes"]["32"]
    assert [*found] == [*tools.bench_data.KINDS, "write", "goals"] and result.stdout.count(" bytes a pixel") == 2
    for kind in tools.bench_data.KINDS:
        assert set(found[kind]) == set(tools.bench_data.READERS)
        assert all(len(rates) == 8 for rates in found[kind].values())
    assert min(min(rates) for kind in found if kind != "goals" for rates in found[kind].values()) > 0
    goal = next(goal for goal in found["goals"] if goal["what"] == "reader / decode only")
    ratio = np.median(np.divide(found["read"]["ours, images"], found["read"]["decode only"]))
    assert goal["ratio"] == pytest.approx(ratio, abs=1e-3) and "reader / decode only: " in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]  # the shards are gone


@pytest.mark.parametrize("arguments, words", [(["--scratch", "{d}/none"], "--scratch {d}/none: no such folder"),
                                              (["--json", "{d}/none/x"], "no folder {d}/none"),
                                              (["--rounds", "0"], "--rounds"), (["--size", "5"], "--size")])
def test_bad_benchmarks(arguments, words, tmp_path):
    with pytest.raises(click.ClickException) as error:
        run_here("bench", *[a.format(d=tmp_path) for a in arguments])
    assert words.format(d=tmp_path) in error.value.format_message()


def test_every_source_is_listed_with_its_layout_and_its_own_options(capsys):
    run_here("sources")
    lines = capsys.readouterr().out.splitlines()
    listed = [line for line in lines if not line.startswith(" ")]
    expected = [name for name, command in cli.commands.items() if "part" in {option.name for option in command.params}]
    assert listed == sorted(expected) and {"folder", "lfw", "market", "parquet"} < set(listed)
    assert not {"bench", "demo", "merge", "verify"} & set(listed)
    text = " ".join(" ".join(lines).split())
    for numbers in ("5,822,653 of 85,742", "501,195 images of 10,572", "4,235,242 of 205,990", "12,720,066 of 617,970",
                    "42,474,557 of 2,059,906", "6,000 pairs, cfp_fp and cfp_ff 7,000", "6,000 pairs in 10 folds",
                    "3,728 probes, 4,443 matches, 153,428 distractors", "227,630 images, 12,115 templates, 8,010,270",
                    "469,375 images, 23,124 templates, 15,658,489", "1,772 and 1,759 templates, 19,593 probes",
                    "12,936 training images; 3,368 queries, 15,913", "16,522, 2,228 and 17,661", "32,621", "17,896",
                    "A 3,384, B 3,543, C 3,873", "9,576", "75,083", "17,527 queries", "1,281,167 training and 50,000",
                    "10,000 images, 10 per", "7,500 images of 200", "30,000 images of 200", "50,889", "113 of 313"):
        assert numbers in text, numbers
    assert "list_{train,val,query,gallery}.txt" in text and "11,659 queries, 82,161 gallery images" in text
    assert "options: --pairs" in text and "--holdout" not in text and max(map(len, lines)) <= 120


def test_records_take_little_memory(tmp_path):
    """At most 60 bytes an image besides the identities: forty million images need not be objects."""
    def generate(n: int):
        for i in range(n):
            yield Record(partial(blank, i), f"a set/with a long name/image-{i}.jpg", f"{i % 50}")

    n = 30_000
    tracemalloc.start()
    records = Records(generate(n), tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60 * n + 200_000 and records[n - 1].name.endswith("image-29999.jpg") and len(records) == n
    assert not list(tmp_path.iterdir())  # the file has no name


def test_a_folder_is_walked_in_the_order_of_names_and_one_folder_at_a_time(tmp_path):
    """2,000 images as a list of records would take over a megabyte."""
    names = ["a/x.jpg", "a-b/y.jpg", "a.jpg", "a/b/z.jpg", "a/b.jpg", "B/1.jpg", "ä/1.jpg", "a /1.jpg"]
    for name in names:
        (tmp_path / "small" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "small" / name).touch()
    (tmp_path / "small/a/loop").symlink_to(tmp_path / "small")
    (tmp_path / "small/a/gone.jpg").symlink_to(tmp_path / "nothing")
    assert [member.name for member in members(tmp_path / "small")] == sorted(names)
    for i in range(2000):
        path = tmp_path / "large" / f"class-{i // 50:02d}" / f"image-with-a-long-name-{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    next(iter(folder(tmp_path / "large", "object", True).records))  # what is imported and cached on first use
    tracemalloc.start()
    source = folder(tmp_path / "large", "object", True)
    assert sum(record.identity.startswith("class-") for record in source.records) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


def test_tasks_are_taken_as_workers_come_free():
    taken = []

    def tasks():
        for i in range(200):
            taken.append(i)
            yield (float(i),)

    for workers in (1, 2):
        taken.clear()
        results = in_parallel(math.sqrt, tasks(), workers, in_order=True)
        assert next(results) == 0 and len(taken) <= 2 * workers + 1
        assert [round(x * x) for x in results] == list(range(1, 200))
