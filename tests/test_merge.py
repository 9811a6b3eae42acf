"""Merged splits: who is joined, what is verified, trained on and refused."""

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_prep import InputError
from data_prep.format import Record, Source, Split
from data_prep.stream import Order
from data_prep.verify import verify_split
from data_prep.write import write_split
from tests.conftest import TINY, script
from tests.test_data_prep import encode, people, picture, prepared, run_here


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


def test_a_domain_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk/faces").mkdir(parents=True)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/face_hq").symlink_to(tmp_path / "disk/faces")
    for name in ("a", "b"):
        prepared(people(tmp_path / name, {"x": 2, "y": 2}), tmp_path / f"d/face_hq/{name}", "--part", "train")
    run_here("merge", tmp_path / "d/face_hq/a", tmp_path / "d/face_hq/b", "--out", tmp_path / "d/face_hq/train")
    assert len(Split(tmp_path / "disk/faces/train")) == 8 and verify_split(tmp_path / "d/face_hq/train") == []
