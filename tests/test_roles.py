"""Roles, folds and open sets are dealt among the images that can be read; a listed image that cannot is a miss."""

import csv
import io
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.format import BadImage, Split
from data_prep.sources.folders import strangers
from protocols.search import score_gallery
from protocols.unified import make_members, score_unified
from reports.rows import describe_losses
from tests.test_data_prep import encode, people, picture, prepared, run_here


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


def test_one_camera_is_told_at_preparation(tmp_path, capsys):
    src = listed_people(tmp_path)
    for name, text, line in (
            ("some", LISTED.replace("g/a.jpg,ann,2", "g/a.jpg,ann,1"), "all mates of 1 of 3 probes are from the"),
            ("all", re.sub(r",[23],", ",1,", LISTED), "3 of 3 probes are from the probe's camera")):
        (src / "persons.csv").write_text(text)
        prepared(src, tmp_path / f"d/body/{name}", source="persons")
        shown = capsys.readouterr().out
        assert line in shown and ("there is nothing to score" in shown) == (name == "all")
