"""Options, caches and files that evaluate.py must refuse or repair; what it leaves in a run's folder; `leaks`."""

import csv
import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
from data_prep import InputError
from data_prep.shards import Record, Source, Split, open_root, write_split
from tests.test_evaluate import run_here, unit

OPTIONS = ["--bootstrap", "3", "--workers", "0", "--device", "cpu"]
NO_READOUTS = evaluate.Readouts({}, 0, {}, [])


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the tiny run, not yet evaluated."""
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval", "analysis"))
    return tmp_path / "run"


def known(arrays: dict[str, np.ndarray]):
    """What `score` needs of an embedder, with embeddings by "domain/split"."""

    class Known(SimpleNamespace):
        def raw(self, split):
            return arrays[f"{split.domain}/{split.name}"].copy()

        def __call__(self, split):
            return evaluate.normalise(self.raw(split))

    return Known(name="tuned", device="cpu", model=SimpleNamespace(library="timm"))


# ---------------------------------------------------------------- leaks


def copy_of(split: Split, folder, rows: list[int], protocol: dict, tables: dict | None = None, **columns) -> Split:
    """A test split of some images of another; columns: one value a row."""
    records = [Record(partial(bytes, split.jpeg(row)[1]), f"{place} {row}", split.classes[split.labels[row]],
                      **{name: values[place] for name, values in columns.items()}) for place, row in enumerate(rows)]
    write_split(folder, Source(records, protocol, tables=tables or {}), source_name="folder", size=split.size,
                fit="crop", quality=95, train=False)
    return Split(folder)


def test_leaks_of_a_split_that_is_its_own_reference_are_no_references(demo_root, tmp_path):
    """Noise, every image left out that the first is near to: leave-one-out among the rest, as if they were all."""
    base = Split(demo_root / "object/val")
    protocol = {"name": "classification", "reference": "own", "ood": False}
    own = copy_of(base, tmp_path / "data/object/own", list(range(len(base))), protocol)
    leaked = np.arange(0, len(own), 3)
    kept = np.setdiff1d(np.arange(len(own)), leaked)
    x = np.random.default_rng(0).normal(size=(len(own), 8)).astype(np.float32)
    figures, _ = evaluate.score(known({"object/own": x}), [own], open_root(tmp_path / "data"), None, 2, 0, NO_READOUTS,
                                {"object/own": leaked})
    found = {metric: figure for rule in figures["object/own"].values() for metric, figure in rule.items()}
    x, labels, classes = unit(x[kept]), own.labels[kept], len(own.classes)
    votes = evaluate.nearest_neighbours(x, x, labels, classes, True)
    means = evaluate.nearest_mean(x, evaluate.class_means(x, labels, classes), labels)
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
        figures, _ = evaluate.score(known(arrays), [other], root, None, 2, 0, NO_READOUTS, without)
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
    monkeypatch.setattr(evaluate, "find_leaks", lambda *_: (leaks, []))
    leaks_here(run, root)
    rows = [evaluate.Row(**row) for row in json.loads((run / "eval/leaks.json").read_text())]
    ranks = [row for row in rows if row.metric == "rank-1"]
    assert len(ranks) == 4 and not any(row.headline for row in rows if row.split == "sets")
    first = [next(row for row in ranks if ("without 1 leaked" in row.protocol) == without) for without in (False, True)]
    assert [line for line in capsys.readouterr().out.splitlines() if " leaked" in line] == [
        f"{'body/reid':22s} 1 leaked; all {evaluate.show_value(first[0])}   "
        f"without them {evaluate.show_value(first[1])}", f"{'body/sets':22s} 1 leaked"]


def test_leaks_that_find_nothing_leave_nothing_of_others(demo_root, run, tmp_path, monkeypatch):
    root = tmp_path / "data"
    for name in ("body/train", "body/test"):
        shutil.copytree(demo_root / name, root / name)
    # without --sheet, and of other rows: what an earlier call left must go
    (run / "eval").mkdir()
    for name in ("leaks.csv", "leaks.json", "leaks-sheet.png"):
        (run / "eval" / name).write_text("older")
    monkeypatch.setattr(evaluate, "find_leaks", lambda *_: ([], []))
    assert leaks_here(run, root, "--cache", tmp_path / "cache") == []
    assert (run / "eval/leaks.csv").read_text().strip() == (
        "split,row,key,identity,cosine,train_split,train_key,train_identity")
    assert not (run / "eval/leaks.json").exists() and not (run / "eval/leaks-sheet.png").exists()
    with pytest.raises(InputError, match="--threshold nan: want a cosine from -1 to 1"):
        leaks_here(run, root, "--threshold", "nan")


# ---------------------------------------------------------------- what an evaluation leaves


def test_figures_of_an_earlier_evaluation_go(run):
    out = run / "eval"
    out.mkdir()
    older = ["roc.png", "cmc.png", "scores.png", "stages.png", "sheet-face_hq-test.png", "sheet-body-test.png"]
    for name in [*older, "watch.png", "mine.png"]:
        (out / name).write_text("older")
    run_here("--run", run, *OPTIONS, "--splits", "body/test", "--no-foundation", "--sheet")
    assert {path.name for path in out.glob("*.png")} == {"bars.png", "cmc.png", "sheet-body-test.png", "watch.png",
                                                         "mine.png"}
    assert (out / "cmc.png").stat().st_size > 5000 and (out / "sheet-body-test.png").stat().st_size > 5000
