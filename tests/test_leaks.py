"""evaluate.py leaks: test images that lie near to training images are found, listed and left out."""

import csv
import json
import shutil
from functools import partial

import click
import numpy as np
import pytest

import tools.leaks
from data_prep.format import Record, Source, Split, open_root
from data_prep.write import write_split
from protocols.classify import class_means, nearest_mean, nearest_neighbours, nearest_rows
from protocols.results import Row
from reports.rows import score, show_value
from tests.conftest import script
from tests.test_evaluate import run_here, unit
from tests.test_evaluate_inputs import NO_READOUTS, OPTIONS, copy_of, known


def test_nearest_rows_equal_a_full_matrix():
    rng = np.random.default_rng(0)
    x, y = unit(rng.normal(size=(50, 5))), unit(rng.normal(size=(90, 5)))
    x[3], y[:10] = np.nan, np.nan
    scores, good = np.nan_to_num(x @ y.T, nan=-np.inf), np.arange(50) != 3
    for k in (1, 4, 85):  # 80 can be found
        rows, cosines = nearest_rows(x, y, k, block=7, width=31)
        order = np.argsort(-scores, axis=1)[:, :k]
        np.testing.assert_array_equal(rows[good, :80], order[good, :80])
        np.testing.assert_allclose(cosines[good], np.take_along_axis(scores, order, 1)[good], rtol=1e-6)
        assert (rows[3] == -1).all() and (cosines[3] == -np.inf).all() and (rows[:, 80:] == -1).all()
    rows, _ = nearest_rows(y, y, 2, itself=True, block=7, width=31)
    inner = y @ y.T
    np.fill_diagonal(inner, -np.inf)
    np.testing.assert_array_equal(rows[10:], np.argsort(-np.nan_to_num(inner, nan=-np.inf), axis=1)[10:, :2])


def test_leaked_images_are_listed_and_left_out(demo_root, tiny_run, tmp_path):
    root, base, val = tmp_path / "data", *(Split(demo_root / name) for name in ("object/train", "object/val"))
    for split in (base, val):
        shutil.copytree(split.folder, root / "object" / split.name)
    images = [(base, row) for row in (0, 5, 9)] + [(val, row) for row in range(30)]
    records = [Record(partial(bytes, split.jpeg(row)[1]), f"{split.name} {row}", split.classes[split.labels[row]])
               for split, row in images]
    protocol = {"name": "classification", "reference": "train", "ood": False}
    write_split(root / "object/mixed", Source(records, protocol), source_name="folder", size=base.size, fit="crop",
                quality=95, train=False)
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    options = ["leaks", "--run", tmp_path / "run", "--data", root, "--bootstrap", "5", "--workers", "0"]
    result = script("evaluate.py", *options, "--threshold", "0.99999")
    with open(tmp_path / "run/eval/leaks.csv") as file:
        found = list(csv.DictReader(file))
    assert sorted(int(leak["row"]) for leak in found) == [0, 1, 2] and "object/mixed" in result.stdout
    assert {leak["train_key"] for leak in found} == {base.jpeg(row)[0] for row in (0, 5, 9)}
    assert all(leak["identity"] == leak["train_identity"] for leak in found)
    rows = json.loads((tmp_path / "run/eval/leaks.json").read_text())
    counts = {("without 3 leaked" in r["protocol"], r["metric"]): r["count"] for r in rows}
    assert counts[False, "knn top-1"] == 33 and counts[True, "knn top-1"] == 30
    assert "no test image has" in script("evaluate.py", *options, "--splits", "object/val", "--threshold", "1").stdout
    everything = script("evaluate.py", *options, "--threshold", "-1", check=2)
    assert "no image left to score" in everything.stderr and everything.stderr.count("\n") == 1
    assert "give --run RUN" in script("evaluate.py", "leaks", check=2).stderr


def test_leaks_of_a_split_that_is_its_own_reference_are_no_references(demo_root, tmp_path):
    """Noise, every image left out that the first is near to: leave-one-out among the rest, as if they were all."""
    base = Split(demo_root / "object/val")
    protocol = {"name": "classification", "reference": "own", "ood": False}
    own = copy_of(base, tmp_path / "data/object/own", list(range(len(base))), protocol)
    leaked = np.arange(0, len(own), 3)
    kept = np.setdiff1d(np.arange(len(own)), leaked)
    x = np.random.default_rng(0).normal(size=(len(own), 8)).astype(np.float32)
    figures, _ = score(known({"object/own": x}), [own], open_root(tmp_path / "data"), None, 2, 0, NO_READOUTS,
                       {"object/own": leaked})
    found = {metric: figure for rule in figures["object/own"].values() for metric, figure in rule.items()}
    x, labels, classes = unit(x[kept]), own.labels[kept], len(own.classes)
    votes = nearest_neighbours(x, x, labels, classes, True)
    means = nearest_mean(x, class_means(x, labels, classes), labels)
    assert found["knn top-1"].count == len(kept)
    assert found["knn top-1"].value == pytest.approx((votes == labels).mean()) and (votes == labels).mean() < 0.6
    assert found["nearest-mean top-1"].value == pytest.approx((means == labels).mean())


def test_leaks_of_a_reference_stay_references_of_another_split(demo_root, tmp_path):
    base = Split(demo_root / "object/val")
    protocol = {"name": "classification", "reference": "own", "ood": False}
    own = copy_of(base, tmp_path / "data/object/own", list(range(len(base))), protocol)
    other = copy_of(base, tmp_path / "data/object/other", list(range(0, len(base), 2)), protocol)
    rng, root = np.random.default_rng(0), open_root(tmp_path / "data")
    arrays = {f"object/{split.name}": rng.normal(size=(len(split), 8)).astype(np.float32) for split in (own, other)}
    values = []
    for without in ({}, {"object/own": np.arange(0, len(own), 2)}):
        figures, _ = score(known(arrays), [other], root, None, 2, 0, NO_READOUTS, without)
        values.append({metric: figure.value for rule in figures["object/other"].values()
                       for metric, figure in rule.items()})
    assert values[0] == values[1]


def leaks_here(run, root, *arguments) -> list[dict]:
    (run / "eval").mkdir(exist_ok=True)
    assert run_here("leaks", "--run", run, "--data", root, *OPTIONS, *arguments) == 0
    with open(run / "eval/leaks.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_leaks_tell_the_first_headline_of_each_split(demo_root, run, tmp_path, monkeypatch, capsys):
    """Two variants of re-identification have two; templates too few for a TAR at 1e-4 have none."""
    root, base = tmp_path / "data", Split(demo_root / "body/train")
    shutil.copytree(base.folder, root / "body/train")
    reid = {"name": "reid", "variants": ["general", "general single-shot"]}
    rows = np.concatenate([np.flatnonzero(base.labels == label)[:4] for label in range(3)]).tolist()
    labels = base.labels[rows]
    copy_of(base, root / "body/reid", rows, reid, role=[0, 1] * 6, camera=[0, 1] * 6)
    copy_of(base, root / "body/sets", rows, {"name": "templates"}, template=list(range(12)), tables={
        "template_pairs": np.array([(a, b, labels[a] == labels[b]) for a in range(12) for b in range(a)])})
    leaks = [{"split": name, "row": 11} for name in ("body/reid", "body/sets")]
    monkeypatch.setattr(tools.leaks, "find_leaks", lambda *_: (leaks, []))
    leaks_here(run, root)
    rows = [Row(**row) for row in json.loads((run / "eval/leaks.json").read_text())]
    ranks = [row for row in rows if row.metric == "rank-1"]
    assert len(ranks) == 4 and not any(row.headline for row in rows if row.split == "sets")
    first = [next(row for row in ranks if ("without 1 leaked" in row.protocol) == without) for without in (False, True)]
    assert [line for line in capsys.readouterr().out.splitlines() if " leaked" in line] == [
        f"{'body/reid':22s} 1 leaked; all {show_value(first[0])}   "
        f"without them {show_value(first[1])}", f"{'body/sets':22s} 1 leaked"]


def test_leaks_that_find_nothing_leave_nothing_of_others(demo_root, run, tmp_path, monkeypatch):
    root = tmp_path / "data"
    for name in ("body/train", "body/test"):
        shutil.copytree(demo_root / name, root / name)
    # without --sheet, and of other rows: what an earlier call left must go
    (run / "eval").mkdir()
    for name in ("leaks.csv", "leaks.json", "leaks-sheet.png"):
        (run / "eval" / name).write_text("older")
    monkeypatch.setattr(tools.leaks, "find_leaks", lambda *_: ([], []))
    assert leaks_here(run, root, "--cache", tmp_path / "cache") == []
    assert (run / "eval/leaks.csv").read_text().strip() == (
        "split,row,key,identity,cosine,train_split,train_key,train_identity")
    assert not (run / "eval/leaks.json").exists() and not (run / "eval/leaks-sheet.png").exists()
    with pytest.raises(click.BadParameter, match="nan is not a finite number"):
        leaks_here(run, root, "--threshold", "nan")
