"""Options, caches and files that evaluate.py must refuse or repair; what it leaves in a run's folder; `leaks`."""

import csv
import html
import json
import re
import shutil
from functools import partial
from types import SimpleNamespace

import click
import numpy as np
import pytest

import evaluate
import protocols.classify
from data_prep import InputError
from data_prep.format import Record, Source, Split, open_root
from data_prep.write import write_split
from protocols.bootstrap import normalise
from protocols.classify import Readouts, class_means, fit_probe, nearest_mean, nearest_neighbours
from protocols.pairs import FARS
from reports.rows import Row, say_once, score, show_value, unsupported_fars
from reports.tables import literal, to_html
from tests.test_evaluate import run_here, unit
from tests.test_protocols import write_run
from tools.compare import Scored, refuse_unshared
from tools.trials import RATING_COLUMNS

OPTIONS = ["--bootstrap", "3", "--workers", "0", "--device", "cpu"]
NO_READOUTS = Readouts({}, 0, {}, [])


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
    monkeypatch.setattr(evaluate, "find_leaks", lambda *_: (leaks, []))
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
    monkeypatch.setattr(evaluate, "find_leaks", lambda *_: ([], []))
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
    (["--run", "{run}", "--cache", "{file}"], "--cache: {file} cannot be made a folder (File exists)"),
    (["--run", "{run}", "--cache", "{file}/more"], "--cache: {file}/more cannot be made a folder (Not a directory)"),
    (["--backbone", "clip", "--size", "tiny", "--weights", "none", "--data", "{data}", "--out", "{file}"],
     "--out: {file}/eval cannot be made a folder (Not a directory)"),
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
    assert f"{path}: damaged: it is made again" in capsys.readouterr().out and path.read_bytes() == whole
    assert (run / "eval/results.json").read_bytes() == rows


def test_damaged_embeddings_are_computed_again(run, capsys):
    options = ["--run", run, *OPTIONS, "--splits", "face_hq/test"]
    run_here(*options)
    assert "computed again" not in capsys.readouterr().out
    path = run / "eval/embeddings/foundation-face_hq-test.npy"
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
        assert said == [f"  {path}: damaged: its embeddings are computed again"]
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
