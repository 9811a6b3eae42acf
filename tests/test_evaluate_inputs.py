"""Options, caches and files that evaluate.py must refuse or repair; what it leaves in a run's folder; `leaks`."""

import csv
import html
import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import click
import numpy as np
import pytest

import models.runs
import protocols.classify
import reports.plots
import tools.leaks
import train
from data_prep import InputError, hash_file, join_config, literal, lock_folder, write_csv
from data_prep.degrade import degrade_between, degraded_split
from data_prep.format import Record, Source, Split, open_root
from data_prep.write import write_split
from models.runs import Run, find_run, gather_facts, load_foundation
from protocols.bootstrap import Estimate, normalise, say_once
from protocols.classify import Readouts, class_means, fit_probe, nearest_mean, nearest_neighbours
from protocols.humans import RATING_COLUMNS
from protocols.pairs import FARS
from protocols.results import Row, Scored, read_stages, start_of
from protocols.search import name_identities, score_gallery
from protocols.unified import make_members, score_unified
from reports.rows import (
    make_unified_rows,
    scopes_of,
    score,
    show_value,
    unsupported_fars,
    write_draws,
    write_rows,
)
from reports.tables import to_html
from tests.conftest import script
from tests.test_evaluate import FakeSplit, run_here, unit
from tests.test_protocols import write_run
from tools.compare import refuse_unshared

OPTIONS = ["--bootstrap", "3", "--workers", "0", "--device", "cpu"]
NO_READOUTS = Readouts({}, 0, [])


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
            return normalise(self.raw(split))

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


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("arguments, words", [
    (["--run", "{run}", "--weights", "pretrained"], "--weights describes an untouched backbone: leave it out with"),
    (["--run", "{run}", "--size", "large"], "--size describes an untouched backbone: leave it out with --run"),
    (["--backbone", "clip", "--no-foundation"], "--no-foundation describes how a run is scored: give --run RUN"),
    (["--backbone", "clip", "--allow-partial"], "--allow-partial describes how a run is scored: give --run RUN"),
    (["--run", "{run}", "--cache", "{file}"], "--cache: {file} cannot be created as a folder (File exists)"),
    (["--run", "{run}", "--cache", "{file}/more"],
     "--cache: {file}/more cannot be created as a folder (Not a directory)"),
    (["--backbone", "clip", "--size", "tiny", "--weights", "none", "--data", "{data}", "--out", "{file}"],
     "--out {file}/eval: cannot be written (Not a directory)"),
])  # fmt: skip
def test_options_without_effect_and_files_for_folders(arguments, words, run, demo_root, tmp_path):
    (tmp_path / "file").write_text("mine")
    places = {"run": run, "file": tmp_path / "file", "data": demo_root}
    with pytest.raises(InputError) as error:
        run_here(*[word.format(**places) for word in arguments], *OPTIONS)
    assert words.format(**places) in error.value.message and (tmp_path / "file").read_text() == "mine"
    assert "\n" not in error.value.message


def test_compare_refuses_a_split_that_the_runs_do_not_share(tmp_path):
    people = np.arange(10)
    runs = [write_run(tmp_path / name, np.ones(10), people, config={"schedule": name}) for name in "ab"]
    shared = {f"{row['domain']}/{row['split']}" for row in json.loads((runs[0] / "eval/results.json").read_text())}
    assert len(shared) == 1
    arguments = ["compare", *runs, "--out", tmp_path / "c", "--splits"]
    with pytest.raises(InputError, match=f"in common on these --splits: typo/x; they share {min(shared)}$"):
        run_here(*arguments, f"{min(shared)},typo/x")
    assert run_here(*arguments, min(shared)) == 0


def test_compare_takes_what_the_runs_share(tmp_path, capsys):
    """One figure by one protocol, one by two: the first is compared, the second told; named, it is refused."""
    runs = []
    for name in "ab":
        runs.append(write_run(tmp_path / name, np.ones(10), np.arange(10), config={"schedule": name}))
        rows = [Row(**row) for row in json.loads((runs[-1] / "eval/results.json").read_text())]
        rows.append(replace(rows[0], split="other", protocol=f"reid, general, set {name}, flip", images=name))
        write_rows(runs[-1] / "eval", rows)
        write_draws(runs[-1] / "eval", [(row, np.ones(400)) for row in rows], 0)
    assert run_here("compare", *runs, "--out", tmp_path / "c") == 0
    table = json.loads((tmp_path / "c/comparison.json").read_text())
    assert {row["split"] for row in table} == {"test"}
    assert "body/other: 1 figures left out; rank-1: only " in capsys.readouterr().out
    with pytest.raises(InputError, match=r"body/other rank-1: only .* by the protocol 'reid, general, set a, flip'"):
        run_here("compare", *runs, "--out", tmp_path / "c", "--splits", "body/other")


def test_weights_are_known_by_their_hash(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.safetensors").write_bytes(b"the same")
    (tmp_path / "two/other.safetensors").write_bytes(b"others")
    configs = [{"weights": str(tmp_path / name)} for name in ("one/w.safetensors", "two/w.safetensors",
                                                              "two/other.safetensors")]
    told = gather_facts([], "A", 1, {}, {}, configs[0]["weights"]).weights_sha256
    moved = {"weights": "/gone.safetensors", "weights_sha256": told}
    assert start_of(configs[0]) == start_of(configs[1]) == start_of(moved) != start_of(configs[2])
    assert gather_facts([], "A", 1, {}, {}, "pretrained").weights_sha256 is None
    assert start_of({"weights": "pretrained", "weights_sha256": None})[-1] == "pretrained"
    a, b, c = (Scored(tmp_path, {"seed": i} | config, 0, {0: (SimpleNamespace(weights="tuned"), None)})
               for i, config in enumerate((configs[0], moved, configs[2])))
    assert a.recipe == b.recipe != c.recipe  # seeds of one recipe
    (tmp_path / "config.json").write_text(json.dumps({"options": configs[0], "facts": {"weights_sha256": told}}))
    monkeypatch.setattr(models.runs, "read_config", lambda folder: join_config(folder / "config.json"))  # not whole
    assert find_run(tmp_path, {"resume": True} | configs[1], []) == "unfinished"  # its file has moved
    with pytest.raises(InputError, match="--weights was"):
        find_run(tmp_path, {"resume": True} | configs[2], [])
    replaced = Run(tmp_path, {"weights": configs[2]["weights"], "weights_sha256": told}, None, {}, {})
    with pytest.raises(InputError, match=r"not the file that .* started from .its SHA-256 differs.*--no-foundation"):
        load_foundation(replaced)


def test_results_of_other_weights_are_refused_and_a_copy_is_not(tmp_path):
    runs = [write_run(tmp_path / name, np.ones(10), np.arange(10), config={"schedule": name}) for name in "ab"]
    weights, rows = runs[1] / "model.safetensors", json.loads((runs[1] / "eval/results.json").read_text())
    weights.write_bytes(b"of these")
    write_draws(runs[1] / "eval", [(Row(**row), np.ones(400)) for row in rows], 0, hash_file(weights))
    os.utime(runs[1] / "eval/results.json", (0, 0))  # however old a copy says that it is
    assert run_here("compare", *runs, "--out", tmp_path / "c") == 0
    weights.write_bytes(b"of others")
    with pytest.raises(InputError, match=r"b/eval is of other weights than model.safetensors: run evaluate.py on"):
        run_here("compare", *runs, "--out", tmp_path / "c")


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-30]),
    lambda path: np.savez(path, draws=np.zeros(1), seed=0), lambda path: np.savez(path, draws=np.zeros((1, 1)), seed=0),
    lambda path: np.savez(path, draws=np.array([["a", "b"]]), seed=0), lambda path: np.savez(path, seed=0),
    lambda path: np.savez(path, draws=np.zeros((1, 400)), seed=np.zeros(3)), lambda path: path.unlink(),
])  # fmt: skip
def test_damaged_draws_are_one_line(spoil, tmp_path):
    runs = [write_run(tmp_path / name, np.ones(10), np.arange(10), config={"schedule": name}) for name in "ab"]
    spoil(runs[1] / "eval/draws.npz")
    with pytest.raises(InputError, match=r"b/eval/draws.npz: cannot be read .*; run evaluate.py on .*b again"):
        run_here("compare", *runs, "--out", tmp_path / "c")


def test_a_second_evaluation_of_a_run_is_refused_at_the_start(run):
    with lock_folder(run / "eval", "--run"):
        result = script("evaluate.py", "--run", run, *OPTIONS, check=2)
        again = script("evaluate.py", "leaks", "--run", run, *OPTIONS, check=2)
    for said in (result.stderr, again.stderr):
        assert said.count("\n") == 1 and "is writing to it: wait for it to end" in said
    assert not (run / "eval").exists()  # nothing was begun


def test_cells_that_a_spreadsheet_would_run_are_prefixed(tmp_path):
    row = {"name": "=HYPERLINK(1)", "other": "@x", "more": "-cmd", "number": -0.5, "text": "-1.5e-3", "plain": "a=b"}
    write_csv(tmp_path / "t.csv", [row])
    with open(tmp_path / "t.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"name": "'=HYPERLINK(1)", "other": "'@x", "more": "'-cmd",
                                               "number": "-0.5", "text": "-1.5e-3", "plain": "a=b"}]


def test_experts_are_asked_for_their_own_domains():
    def scored(domains, *names):
        found = {(*name.split("/"), "rank-1", "protocol"): None for name in names}
        return [Scored(None, {"domains": domains}, 0, found)]

    run = scored(["face_hq", "body"], "face_hq/test", "body/test", "body/market")
    experts = [scored(["face_hq"], "face_hq/test", "body/test"), scored(["body"], "body/test", "face_hq/other")]
    refuse_unshared({"face_hq/test", "body/test"}, [run, *experts], True)
    for name, groups in (("body/market", [run, *experts]), ("face_hq/other", [run, *experts]),
                         ("body/test", [run, experts[0]])):
        with pytest.raises(InputError, match=f"--splits: {name}; they share"):
            refuse_unshared({name}, groups, True)


# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize("name, value", [
    ("value", "0.5"), ("value", None), ("low", [1]), ("high", True), ("count", 3.5), ("metric", 3), ("domain", None),
    ("value", float("nan")), ("low", float("inf")),
])  # fmt: skip
def test_rows_with_values_of_another_kind_are_refused(name, value, tmp_path):
    runs = [write_run(tmp_path / run, np.ones(10), np.arange(10), config={"schedule": run}) for run in "ab"]
    path = runs[1] / "eval/results.json"
    rows = json.loads(path.read_text())
    rows[-1][name] = value
    path.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=f"results.json: cannot be read .row {len(rows) - 1}: {name} is ") as error:
        run_here("compare", *runs, "--out", tmp_path / "c")
    assert "\n" not in error.value.message
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="cannot be read"):
        run_here("compare", *runs, "--out", tmp_path / "c")


def test_the_probe_of_the_untouched_backbone_is_fitted_once_for_all_runs(run, tmp_path, monkeypatch, capsys):
    options, fitted, fit = ["--run", run, *OPTIONS, "--splits", "object/val", "--probe", "50"], [], fit_probe
    monkeypatch.setattr(protocols.classify, "fit_probe", lambda *a: fitted.append(a) or fit(*a))
    run_here(*options)
    rows = (run / "eval/results.json").read_bytes()
    assert b"probe top-1" in rows and len(fitted) == 2  # before and after
    for expected in (2, 1, 1):
        fitted.clear()
        run_here(*options, "--cache", tmp_path / "cache")
        assert len(fitted) == expected and (run / "eval/results.json").read_bytes() == rows
    path, = (tmp_path / "cache").glob("foundation-probe-*.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    capsys.readouterr()
    run_here(*options, "--cache", tmp_path / "cache")
    assert f"{path}: damaged: computed again" in capsys.readouterr().out and path.read_bytes() == whole
    assert (run / "eval/results.json").read_bytes() == rows


def test_damaged_embeddings_are_computed_again(run, capsys):
    options = ["--run", run, *OPTIONS, "--splits", "face_hq/test"]
    run_here(*options)
    assert "computed again" not in capsys.readouterr().out
    path, = (run.parent / ".foundation").glob("foundation-face_hq-test-*.npy")
    whole, rows = path.read_bytes(), (run / "eval/results.json").read_bytes()
    x = np.load(path)
    holes = x.copy()
    holes[3, 1] = np.nan
    for spoil in (lambda: path.write_bytes(whole[: len(whole) // 2]), lambda: path.write_bytes(b""),
                  lambda: np.save(path, holes), lambda: np.save(path, x[:-1]), lambda: np.save(path, x[:, :-1]),
                  lambda: np.save(path, x.astype(str)), lambda: np.savez(path.open("wb"), x=x)):
        spoil()
        run_here(*options)
        said = [line for line in capsys.readouterr().out.splitlines() if "computed again" in line]
        assert said == [f"  {path}: damaged: embeddings computed again"]
        assert path.read_bytes() == whole and (run / "eval/results.json").read_bytes() == rows
    path.with_suffix(".json").write_text("{")  # whose embeddings they are is not known
    run_here(*options)
    assert json.loads(path.with_suffix(".json").read_text())["flip"] is True


# ---------------------------------------------------------------- names


ODD = "![a](roc.png) <b>`x`</b> **c** | d\\ \\| [e](http://f)"


def test_names_in_reports_are_text(tmp_path):
    (tmp_path / "roc.png").write_bytes(b"a picture")
    lines = [f"# {literal(ODD)}", "", "| rater | value |", "| --- | --- |", f"| {literal(ODD)} | 1 |", "",
             f"AUC of rater {literal(ODD)}", "", "**bold** `code`", "![own](roc.png)"]
    page = to_html(lines, tmp_path)
    shown = html.escape(ODD, quote=False)
    assert re.findall(r"<title>(.*?)</title>", page) == [html.escape(ODD)]
    for tag, text in (("h1", shown), ("td", shown), ("p", f"AUC of rater {shown}")):
        found = re.search(f"<{tag}>(.*?)</{tag}>", page)[1]
        assert "<" not in found and html.escape(html.unescape(found), quote=False) == text
    assert page.count("<td>") == 2 and page.count("<img") == 1 and "<b>bold</b> <code>code</code>" in page


def test_names_of_raters_are_text_in_the_report(run, demo_root, tmp_path, capsys):
    split = Split(demo_root / "body/test")
    rows = [np.flatnonzero(split.labels == label)[:2] for label in range(2)]
    pairs = [(rows[0][0], rows[0][1]), (rows[0][0], rows[1][0])]

    def ratings(rater: str):
        with open(tmp_path / "ratings.csv", "w", newline="") as file:
            csv.writer(file).writerows([RATING_COLUMNS, *(
                ["body/test", split.jpeg(int(a))[0], split.jpeg(int(b))[0], rater, 1] for a, b in pairs)])
        run_here("--run", run, *OPTIONS, "--splits", "body/test", "--no-foundation", "--crowd", 0, "--humans",
                 tmp_path / "ratings.csv")

    for rater in ("anna\nben", "anna\x1b[2J", "anna\u2028ben", "anna\x7fben"):
        with pytest.raises(InputError, match="want a name without line breaks and control characters") as error:
            ratings(rater)
        assert error.value.message.isprintable()
    ratings(ODD)
    page, text = ((run / "eval" / name).read_text() for name in ("report.html", "report.md"))
    (line,) = [line for line in text.splitlines() if "AUC of rater" in line]
    assert f"AUC of rater {literal(ODD)} |" in line
    (cell,) = re.findall(r"<td>(AUC of rater .*?)</td>", page)
    assert "<" not in cell and html.unescape(cell) == f"AUC of rater {ODD}"
    ratings("Zoë O'Neill-Ø")
    assert "AUC of rater Zoë O'Neill-Ø |" in (run / "eval/report.md").read_text()


# ---------------------------------------------------------------- what a figure is taken on


def degraded_copy(split: Split, folder) -> Split:
    source = degraded_split(split, partial(degrade_between, 0.0, 0.0), 0)
    write_split(folder, source, source_name="degrade", size=split.size, fit="squash",
                quality=95, train=False, options={"src": f"{split.domain}/{split.name}",
                                                  "src_plan": split.index["provenance"]["plan"]})
    return Split(folder)


def test_degraded_copies_show_the_same_people_and_the_probes_picture_is_no_hit(demo_root, tmp_path):
    """By the numbers: each image's copy is nearest to it, the person's other picture next, a stranger far away."""
    base, body = Split(demo_root / "face_hq/test"), Split(demo_root / "body/test")
    rows = [np.flatnonzero(base.labels == label)[:2] for label in range(4)]
    protocol = {"name": "verification", "folds": 1}
    sharp = copy_of(base, tmp_path / "face_hq/test", np.concatenate(rows).tolist(), protocol)  # no `person`
    lq = degraded_copy(sharp, tmp_path / "face_lq/test")
    assert name_identities(lq).tolist() == name_identities(sharp).tolist() and "person" not in lq.fields(0)
    who, angle = np.repeat(np.arange(4), 2), 0.1 * np.tile([0, 1], 4)
    x = np.zeros((8, 8))
    x[np.arange(8), 2 * who], x[np.arange(8), 2 * who + 1] = np.cos(angle), np.sin(angle)
    strangers = unit(np.random.default_rng(0).normal(size=(len(body), 8)))
    members = make_members([sharp, lq, body], [x, x.copy(), strangers], 100, 0)
    found = {domain: {m: f.value for m, f in by.items()} for domain, by in score_unified(members, 2, 0).items()}
    for domain, other in (("face_hq", "face_lq"), ("face_lq", "face_hq")):
        assert found[domain]["rank-1 in the crowd"] == found[domain]["rank-1 alone"] == 1  # a copy is no stranger ...
        assert found[domain][f"rank-1 in {other}"] == 1
    x[1::2] = -x[1::2]  # the person's other picture is far: nothing but the copy would be a hit
    members = make_members([sharp, lq, body], [x, x.copy(), strangers], 100, 0)
    found = score_unified(members, 2, 0)
    assert found["face_hq"]["rank-1 in the crowd"].value == 0  # ... and no hit either
    other = copy_of(base, tmp_path / "face_hq/other", np.concatenate(rows).tolist()[::-1], protocol)
    assert not set(make_members([other, lq], [x, x], 9, 0)[0].who) & set(make_members([other, lq], [x, x], 9, 0)[1].who)


def test_the_unified_gallery_names_its_splits(demo_root):
    root = open_root(demo_root)
    crowd = [root["object"]["val"], root["face_hq"]["test"]]
    figures = {"tuned": {"all": {"x": Estimate(0.5, np.zeros(2), 3, np.nan, 30)}}}
    (row, _), = make_unified_rows("r", crowd, figures, True, 10, 0)
    assert "sets object/val demo " in row.protocol and " + face_hq/test demo " in row.protocol and row.identities == 30


def one_camera(base: Split, folder, cameras: list[int]) -> Split:
    rows = np.concatenate([np.flatnonzero(base.labels == label)[:2] for label in range(len(cameras) // 2)]).tolist()
    return copy_of(base, folder, rows, {"name": "reid"}, role=[0, 1] * (len(rows) // 2), camera=cameras)


def test_a_split_of_one_camera_is_named_and_the_others_are_scored(demo_root, run, tmp_path, capsys):
    say_once.cache_clear()
    root, base = tmp_path / "data", Split(demo_root / "body/train")
    one_camera(base, root / "body/one", [0] * 8)
    one_camera(base, root / "body/two", [0, 0, 0, 0, 0, 1, 0, 1])
    shutil.copytree(demo_root / "face_hq/test", root / "face_hq/test")
    assert run_here("--run", run, "--data", root, *OPTIONS) == 0
    out = capsys.readouterr().out
    assert "body/one: NOT SCORED: " in out
    assert "none of 4 probes can be scored: every mate is of the probe's own camera (4)\n" in out
    assert "body/two, general: 2 of 4 probes are not scored: every mate is of the probe's own camera (2)\n" in out
    assert "everything: without body/one: no probe has a mate" in out
    rows = json.loads((run / "eval/results.json").read_text())
    assert {row["split"] for row in rows} == {"two", "test"}
    assert next(row["count"] for row in rows if row["metric"] == "rank-1") == 2
    with pytest.raises(InputError, match="every mate is of the probe's own camera"):
        run_here("--run", run, "--data", root, *OPTIONS, "--splits", "body/one")


def test_protocols_say_what_was_computed_and_few_classes_are_marked(run, demo_root):
    run_here("--run", run, *OPTIONS, "--splits", "object/val", "--no-foundation")
    rows = [Row(**row) for row in json.loads((run / "eval/results.json").read_text())]
    rule = {row.metric: row.protocol.split(", ")[1] for row in rows}
    assert rule["nearest-mean top-1"] == "nearest class mean" and rule["knn top-1"] == "20 neighbours at T 0.07"
    assert rule["head top-1"] == rule["head top-5"] == "trained class weights"
    assert rule["probe top-1"].startswith("L-BFGS probe")
    assert {row.identities for row in rows} == {4} and show_value(rows[0]).endswith("]†")
    assert not show_value(replace(rows[0], identities=20)).endswith("†")
    assert "†: of fewer than 20 identities" in (run / "eval/report.md").read_text()


def test_a_class_is_seen_by_its_wordnet_id_name_or_images(demo_root, tmp_path):
    def split_of(name: str, classes: list[str], first: int, reference: str | None = "train") -> Split:
        base = Split(demo_root / "object/train")
        records = [Record(partial(bytes, base.jpeg(first + i)[1]), f"{i}", name) for i, name in enumerate(classes)]
        protocol = reference and {"name": "classification", "reference": reference, "ood": False}
        write_split(tmp_path / "object" / name, Source(records, protocol, names={"n02084071": "dog, a pet"}),
                    source_name="folder", size=base.size, fit="crop", quality=95, train=False)
        return Split(tmp_path / "object" / name)

    training = split_of("train", ["Polar-bear", "n02084071", "n03126707", "thing"], 0, None)
    test = split_of("test", ["polar bear", "dog", "n02012849", "n03126707", "0001", "0002"], 10, "own")
    own = split_of("own", ["n02012849", "0001"], 2)  # images 2 and 3: those of n03126707 and thing
    readouts = Readouts({}, 0, training.classes, training)
    assert readouts.seen_classes(test, test) == ({"polar bear", "dog", "n03126707"}, "by name and images")
    assert readouts.seen_classes(test, own)[0] == {"polar bear", "dog", "n03126707", "n02012849", "0001"}
    assert Readouts({}, 0, training.classes).seen_classes(test, own) == ({"polar bear", "n03126707"}, "by name")
    (_, rule) = scopes_of(test, test, readouts)[1]
    assert rule.startswith(", open set of 3 classes not trained on by name and images ")


def test_a_wrong_reference_is_told_before_anything_is_embedded(demo_root, run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "embed_rows", lambda *_: pytest.fail("embeds"))
    base, root = Split(demo_root / "object/val"), tmp_path / "data"
    shutil.copytree(demo_root / "face_hq/test", root / "face_hq/test")
    copy_of(base, root / "object/val", list(range(len(base))), {"name": "classification", "reference": "photos"})
    with pytest.raises(InputError, match=r"its reference split 'photos' is missing.*--reference SPLIT"):
        run_here("--run", run, "--data", root, *OPTIONS)
    some = np.flatnonzero(base.labels > 0).tolist()
    copy_of(base, root / "object/photos", some, {"name": "classification", "reference": "photos"})
    with pytest.raises(InputError, match=f"class '{base.classes[0]}', 1 in all, is not in its reference"):
        run_here("--run", run, "--data", root, *OPTIONS)


# ---------------------------------------------------------------- figures


def test_a_sheet_shows_the_neighbours_that_are_scored(demo_root, tmp_path, monkeypatch):
    """Of classes those in the reference; of a gallery what the camera rule leaves; of pairs the hardest, each once."""
    drawn = {}
    monkeypatch.setattr(reports.plots, "draw_sheet", lambda path, lines, legend: drawn.update({path.stem: lines}))
    root, rng = open_root(demo_root), np.random.default_rng(0)
    body = one_camera(Split(demo_root / "body/train"), tmp_path / "body/one", [0, 0, 0, 1, 0, 1])
    splits = [root["object"]["val"], body, root["face_hq"]["test"]]
    x = {f"{split.domain}/{split.name}": rng.normal(size=(len(split), 8)).astype(np.float32)
         for split in [*splits, root["object"]["train"]]}
    for split in splits:
        reports.plots.draw_split(tmp_path, split, known(x), root, 0)
    reference = root["object"]["train"]
    y, probes = unit(x["object/train"]), unit(x["object/val"])
    for probe, _, *tiles in drawn["sheet-object-val"]:
        best = np.argsort(-(y @ probes[probe[1]]))[:10]
        assert [tile[1] for tile in tiles] == best.tolist() and all(tile[0] is reference for tile in tiles)
        assert [tile[2] == reports.plots.HIT for tile in tiles] == [
            reference.labels[row] == splits[0].labels[probe[1]] for row in best]
        assert all(tile[3].endswith(f"\n{reference.names[reference.labels[tile[1]]]}") for tile in tiles)
    rows = {line[0][1]: {tile[1] for tile in line[2:]} for line in drawn["sheet-body-one"]}
    assert rows == {2: {1, 3, 5}, 4: {1, 3, 5}}  # the first probe has no mate of another camera: it is not scored
    pairs = [tuple(tile[1] for tile in line[i : i + 2]) for line in drawn["sheet-face_hq-test"]
             for i in range(0, len(line), 3)]
    assert len(set(map(frozenset, pairs))) == len(pairs) == 40
    z = unit(x["face_hq/test"])
    scores = [float(z[a] @ z[b]) for a, b in pairs]
    listed = {tuple(sorted(map(int, row[:2]))): row[2] for row in splits[2].column("pairs")}
    assert scores[0] == pytest.approx(min(z[a] @ z[b] for (a, b), same in listed.items() if same))
    assert scores[20] == pytest.approx(max(z[a] @ z[b] for (a, b), same in listed.items() if not same))


def test_a_cmc_ends_where_the_gallery_does():
    split = FakeSplit([0, 1, 0, 1, 2], {"name": "identification"}, role=np.array([0, 0, 1, 1, 1]))
    _, curve = score_gallery(unit(np.random.default_rng(0).normal(size=(5, 3))), split, 2, 0)
    assert len(curve["cmc"]) == 3 and curve["cmc"][-1] == 1


# ---------------------------------------------------------------- damaged files of a run


def test_stages_of_a_damaged_log(tmp_path):
    looks = [{"step": 1, "auc": {"face_hq/test": 0.5}}, {"step": "x", "auc": {}}, {"step": 2},
             {"step": 3, "auc": [1]},
             {"step": 4, "auc": {"face_hq/test": None}}]
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    stages = read_stages(tmp_path, {"order": ["face_hq", "body"], "domains": [], "steps": 4})
    assert stages.steps == [1, 4] and stages.scores[0] == [0.5] and np.isnan(stages.scores[1]).all()
    (tmp_path / "probe.jsonl").write_text(f"{json.dumps(looks[0])}\n3\n{json.dumps(looks[4])}\n")
    with pytest.raises(InputError, match=r"probe.jsonl, line 2: damaged .*: remove the line"):
        read_stages(tmp_path, {"order": ["face_hq", "body"], "domains": [], "steps": 4})


@pytest.mark.parametrize("change", [{"domains": 3}, {"domains": [["x"]]}, {"counts": []}, {"counts": {"body": "many"}}])
def test_compare_of_a_damaged_config_is_one_line(change, tmp_path):
    runs = [write_run(tmp_path / name, np.ones(10), np.arange(10), config={"schedule": name}) for name in "ab"]
    path = runs[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"b/config.json: domains and counts do not name tasks"):
        run_here("compare", *runs, "--out", tmp_path / "c")


# ---------------------------------------------------------------- FARs that the pairs do not support


@pytest.mark.parametrize("impostors, line", [
    (3000, "3,000 impostor pairs support no FAR below 0.001: 1e-4, 1e-5, 1e-6 are left out"),
    (1000, "1,000 impostor pairs support no FAR below 0.001: 1e-4, 1e-5, 1e-6 are left out"),
    (999_999, "999,999 impostor pairs support no FAR below 1e-05: 1e-6 is left out"), (1_000_000, ""),
    (9, "9 impostor pairs support no FAR: 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6 are left out"),
])  # fmt: skip
def test_unsupported_fars_are_told(impostors, line):
    assert unsupported_fars(impostors) == line


def test_unsupported_fars_are_told_once_a_split(demo_root, tmp_path, capsys):
    say_once.cache_clear()
    base, rng = Split(demo_root / "face_hq/test"), np.random.default_rng(0)
    rows = list(range(30))
    copy_of(base, tmp_path / "face_hq/sets", rows, {"name": "templates"}, template=rows, tables={
        "template_pairs": np.array([(a, b, base.labels[a] == base.labels[b]) for a in rows for b in range(a)])})
    root = open_root(tmp_path)
    root["face_hq"]["test"] = base
    splits = list(root["face_hq"].values())
    x = {f"face_hq/{split.name}": rng.normal(size=(len(split), 8)).astype(np.float32) for split in splits}
    for _ in ("foundation", "tuned"):
        figures, _ = score(known(x), splits, root, None, 2, 0, NO_READOUTS)
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "impostor" in line]
    listed = {"test": base.column("pairs"), "sets": splits[0].column("template_pairs")}
    assert len(said) == 2 and "sets" in said[0]
    for name, line in zip(("sets", "test"), said, strict=True):
        assert line.startswith(f"face_hq/{name}: {(listed[name][:, 2] == 0).sum():,} impostor pairs support no FAR")
        told = {metric for rule in figures[f"face_hq/{name}"].values() for metric in rule if metric.startswith("tar@")}
        lost = [float(far) for far in re.findall(r"1e-\d", line)]
        assert told == {f"tar@far={far:g}" for far in FARS if far not in lost}
