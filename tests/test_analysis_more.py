"""Further measures of analyze.py on planted structure, or against a slow computation of the same."""

import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

import analyze
import protocols.pairs
import reports.analysis_plots
from data_prep import InputError
from protocols.bootstrap import Estimate, bootstrap_counts, normalise
from protocols.embed import save_array
from protocols.explore import (
    draw_up_map,
    explore_transfer,
    hits_without_each,
    measure_components,
    measure_further,
)
from protocols.pairs import score_pairs
from protocols.results import Pair, Sources
from protocols.separability import hold_out, tell_sources
from protocols.sharing import measure_sharing
from protocols.subspaces import (
    Curve,
    Trial,
    Turned,
    combine,
    hits_by_k,
    hits_one_by_one,
    unit,
)
from protocols.tasks import Embeddings, Task, vectors_of
from reports.analysis import Analysis, report_sources, write_analysis
from reports.analysis_plots import draw_deletion, find_measured
from tests.test_subspaces import SHARED, D, orthogonal, pairs_of, planted, sweep_case, task_of, transfer

# ---------------------------------------------------------------- components that are left out, each alone


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_leaving_out_each_component_equals_a_full_evaluation_without_it(dtype, objects):
    probe, gallery, task = sweep_case(dtype, objects)
    slow = np.concatenate([hits_one_by_one(np.delete(probe, i, 1), np.delete(gallery, i, 1), task, [39])
                           for i in range(40)])
    assert len(np.unique(slow.sum(1))) > 3  # it matters which
    np.testing.assert_array_equal(hits_without_each(probe, gallery, task, 40), slow)
    np.testing.assert_array_equal(hits_without_each(probe, gallery, task, 7, size=3 * len(gallery)), slow[:7])


def test_a_component_of_nuisance_hurts_and_those_of_identity_are_needed():
    """Identities live in 4 directions; in task 0 the shots of a person differ most in a fifth, its first component."""
    rng, directions, people, shots = np.random.default_rng(0), orthogonal(D, 5)[0], 60, 4
    ids, embedded, tasks = np.repeat(np.arange(people), shots), {}, []
    for name, nuisance in (("face_hq*", 3.0), ("body*", 0.0)):
        parts = []
        for _ in range(2):
            x = np.repeat(rng.normal(size=(people, 4)), shots, axis=0) @ directions[:4]
            x = x + nuisance * rng.normal(size=(len(ids), 1)) * directions[4] + 0.06 * rng.normal(size=(len(ids), D))
            parts.append(unit(x).astype(np.float32))
        embedded[name], tasks = tuple(parts), [*tasks, task_of(name, ids)]
    pairs = pairs_of(transfer(embedded, tasks, 5, 50, 0, importance=10))
    own, other = (pairs["face_hq", name]["importance"] for name in ("face_hq", "body"))
    assert own["low"][0] > 0.05 and abs(other["change"][0]) < 0.02  # the nuisance is the first task's alone
    for found in (own, other):
        assert max(found["high"][1:5]) < 0 and np.abs(found["change"][5:]).max() < 0.03
        assert all(len(found[key]) == 10 for key in ("change", "low", "high"))
    assert pairs_of(transfer(embedded, tasks, 5, 2, 0))["body", "body"]["importance"] is None


def test_importance_by_hand():
    """Without the first coordinate alone the probe's nearest is the wrong vector; without the second it stays right."""
    probe, gallery = np.array([[1.0, 0.2, 0.5]]), np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    task = Task("x", None, None, None, None, None, np.arange(2), None, [np.array([0])], [np.zeros(0, int)])
    assert hits_without_each(probe, gallery, task, 3).ravel().tolist() == [False, True, True]


# ---------------------------------------------------------------- the tasks' other metrics


@pytest.mark.parametrize("objects", [True, False])
def test_other_metrics_equal_a_slow_computation(objects):
    """A few coordinates of a turned and shifted space; literal cosines, scikit-learn's AP and AUC."""
    probe, gallery, task = sweep_case(np.float64, objects)
    task.domain, mean, k = "object" if objects else "face_hq", np.full(40, 0.01), 6
    (basis,) = orthogonal(40, 40)
    found = measure_further(Trial(task, (probe, gallery), np.ones((1, len(probe)))), mean, basis, [k, 40], 20, 0)
    q, g = (unit((x - mean) @ basis[:, :k]) for x in (probe, gallery))
    values = {"rank-5": [], "mAP": [], "mINP": []}
    for i, (right, out) in enumerate(zip(task.mates, task.ignored, strict=True)):
        relevant, scores = np.zeros(len(g)), g @ q[i]
        relevant[right] = 1
        scores, relevant = np.delete(scores, out), np.delete(relevant, out)
        ranks = np.flatnonzero(relevant[np.argsort(-scores)]) + 1
        values["rank-5"].append(ranks[0] <= 5)
        values["mAP"].append(average_precision_score(relevant, scores))
        values["mINP"].append(len(ranks) / ranks[-1])
    if objects:
        values = {"nearest-mean top-5": values["rank-5"]}
    for name, by_hand in values.items():
        assert found[k, name].value == pytest.approx(np.mean(by_hand), abs=1e-6)
        draws = [np.average(by_hand, weights=w) for w in bootstrap_counts(task.target, 20, 0)]
        np.testing.assert_allclose(found[k, name].draws, draws, atol=1e-6)
    pairs = protocols.pairs.matched_pairs(task.target, 5000, 0)
    scores, same = (q[pairs[:, 0]] * q[pairs[:, 1]]).sum(1), np.arange(len(pairs)) < len(pairs) / 2
    assert found[k, "pair auc"].value == pytest.approx(roc_auc_score(same, scores), abs=1e-4)
    strangers = np.sort(scores[~same])[::-1]
    by_hand = max(np.mean(scores[same] >= t) for t in scores if np.mean(strangers >= t) <= 0.01)
    assert found[k, "tar@far=0.01"].value == pytest.approx(by_hand, abs=0.01)
    like = score_pairs(q, task.target, 20, 0)["pair auc"]  # the yardstick of evaluate.py, resamplings included
    np.testing.assert_allclose(found[k, "pair auc"].draws, like.draws, atol=1e-4)
    assert {metric for _, metric in found} == {*values, "pair auc", "tar@far=0.01"}


def test_components_that_serve_every_task():
    """The largest of the tasks' k*: a task that lives in 12 of the 20 directions needs fewer than one of all 20."""
    (basis,) = orthogonal(D, SHARED)
    embedded, tasks = planted([basis, basis[:12]], inside=1.0)
    result = transfer(embedded, tasks, 16, 30, 0, controls=False)
    pairs = pairs_of(result)
    assert [row["fit"] for row in result["all_tasks"]] == ["object*", "face_hq*"]
    for row in result["all_tasks"]:
        for level in ("k99", "k95"):
            each = [pairs[row["fit"].strip("*"), test][level]["value"] for test in ("object", "face_hq")]
            assert row[level]["value"] == (None if None in each else max(each))
    assert result["all_tasks"][1]["k95"]["value"] > pairs["face_hq", "face_hq"]["k95"]["value"]
    nan = combine(np.max, [Estimate(np.nan, np.array([1.0, np.nan])), Estimate(3.0, np.array([2.0, 2.0]))])
    assert np.isnan(nan.value) and nan.draws[0] == 2 and np.isnan(nan.draws[1])


def test_other_metrics_stand_beside_random_ones():
    (basis,) = orthogonal(D, SHARED)
    embedded, tasks = planted([basis] * 2, inside=1.0)
    for pair in transfer(embedded, tasks, 20, 10, 0)["pairs"]:
        of = {(row["metric"], row["k"]): row for row in pair["further"]}
        assert {k for _, k in of} == {10, 20, 30, D}
        assert all((row["random"] is None) == (k == D) for (_, k), row in of.items())
        assert all(row["low"] <= row["value"] <= row["high"] for row in of.values())
        assert of["mAP", 20]["value"] > of["mAP", 20]["random"] + 0.1  # 20 directions hold all that was planted
        assert of["mAP", 20]["value"] == pytest.approx(of["mAP", D]["value"], abs=0.02)


# ---------------------------------------------------------------- memory


def test_embeddings_are_read_by_rows_and_the_file_is_not_changed(tmp_path):
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(50, 8)).astype(np.float32) * 3
    raw[7] = np.nan
    save_array(tmp_path / "x.npy", raw)
    x = Embeddings(tmp_path / "x.npy")
    whole = normalise(raw.copy())
    assert len(x) == 50 and x.shape == (50, 8)
    np.testing.assert_array_equal(x[np.array([9, 2, 7])], whole[[9, 2, 7]])
    np.testing.assert_array_equal(x[10:20], whole[10:20])
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), raw)
    np.testing.assert_array_equal(analyze.find_readable([x, whole]), np.arange(50) != 7)


def test_a_gallery_is_turned_block_by_block(monkeypatch):
    """Single images are taken as they are, and a sweep never reads more of a gallery than a block: 1/32 of `size`."""
    x = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)
    ids = np.arange(300) // 3
    task, mean, basis = task_of("face_hq", ids), x.mean(0), orthogonal(16, 16)[0].astype(np.float32)
    probe, gallery = vectors_of(task, (x, x))
    assert gallery.dtype == np.float32
    read, real = [], Turned.__getitem__

    def counted(self, rows):
        read.append(len(range(len(self))[rows]))
        return real(self, rows)

    monkeypatch.setattr(Turned, "__getitem__", counted)
    turned = [Turned(part, mean, basis, "cpu") for part in (probe[:40], gallery)]
    task.mates, task.ignored = task.mates[:40], task.ignored[:40]
    for sweep, argument in ((hits_by_k, [1, 2, 9, 16]), (hits_without_each, 16)):
        whole = sweep((probe[:40] - mean) @ basis, (gallery - mean) @ basis, task, argument)
        read.clear()
        np.testing.assert_array_equal(sweep(*turned, task, argument, size=32 * 70), whole)
        assert read == [40, 70, 70, 70, 70, 20]  # the probes, then the gallery


# ---------------------------------------------------------------- the source as the label


def sourced(name: str, domain: str, sources: list[str], people: list[str]) -> SimpleNamespace:
    """A split of one image a row, each with its source and person."""
    return SimpleNamespace(name=name, domain=domain, folder=f"{domain}/{name}", labels=np.arange(len(people)),
                           classes=people, protocol=None,
                           index={"provenance": {"source": "merge", "plan": "", "data_set": []}},
                           fields=lambda row: {"source": sources[row], "person": people[row]})


def test_the_source_is_found_where_it_is_planted_and_nowhere_else():
    """Sources a and b differ in one coordinate of "tuned" by 6 standard deviations, in "pixels" by nothing."""
    rng = np.random.default_rng(0)
    people = [f"p{i}" for i in range(100) for _ in range(4)]
    two = sourced("train", "face_hq", ["a", "b"] * 200, people)  # everybody is in both sources
    one = sourced("train", "body", ["c"] * 400, [f"q{i}" for i in range(400)])
    noise = rng.normal(size=(400, 8))
    marked = noise + 6 * (np.arange(400)[:, None] % 2) * (np.arange(8) == 3)
    tasks = [SimpleNamespace(domain=split.domain, train=split) for split in (two, one)]
    spaces = {"tuned": lambda split, rows: marked[rows], "pixels": lambda split, rows: noise[rows]}
    found = tell_sources(spaces, tasks, [np.arange(400)] * 2, {"face_hq": [], "body": []}, 400, 50, 0)
    assert found["body"] == Sources("only one source: c")
    hq = found["face_hq"]
    assert hq.images == {"a": 200, "b": 200} and hq.identities == {"a": 100, "b": 100} and hq.chance == 0.5
    for model in ("logistic", "lda", "svm"):
        assert hq.spaces["tuned"][model]["value"] > 0.98
        pixels = hq.spaces["pixels"][model]
        assert pixels["low"] < 0.5 < pixels["high"] and pixels["high"] - pixels["low"] < 0.25
    report = "\n".join(report_sources(found, ["tuned", "pixels", "tuned canon"]))
    assert "| body | not measured (only one source: c) | - | - | - |" in report
    assert "| face_hq | a (200), b (200) | 50 | " in report


def test_a_person_told_by_name_does_not_tell_the_source():
    """Each person has a place of her own and one source: known people would give it away, those held out do not."""
    rng = np.random.default_rng(1)
    who = np.repeat(np.arange(60), 5)
    split = sourced("train", "face_hq", [("a", "b")[i % 2] for i in who], [f"p{i}" for i in who])
    x = rng.normal(size=(60, 40))[who] * 9 + 0.01 * rng.normal(size=(300, 40))
    task = SimpleNamespace(domain="face_hq", train=split)
    found = tell_sources({"tuned": lambda split, rows: x[rows]}, [task], [np.arange(300)], {"face_hq": []},
                         300, 50, 0)["face_hq"]
    assert found.spaces["tuned"]["logistic"]["value"] < 0.75


def test_half_of_each_source_is_held_out():
    people = [np.array(["x", "y", "x"]), np.array(["x", "y", "u", "v", "w", "z"]), np.array(["alone"])]
    for seed in range(10):
        out = hold_out(people, np.random.default_rng(seed))
        assert [len(set(part) & out) for part in people] == [1, 3, 0]
    lone = sourced("train", "face_hq", ["a"] * 4 + ["b"], ["p", "q", "r", "s", "t"])
    task = SimpleNamespace(domain="face_hq", train=lone)
    found = tell_sources({}, [task], [np.arange(5)], {"face_hq": []}, 9, 5, 0)
    assert found["face_hq"] == Sources("too few identities of b to fit on some and test others")


# ---------------------------------------------------------------- tables and figures


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Tables and figures of three planted tasks, of which one (body) is not above chance: folder and analysis."""
    (basis,) = orthogonal(D, SHARED)
    embedded, tasks = planted([basis] * 2, people=40, inside=1.0)
    rng, names = np.random.default_rng(0), ["face_hq", "face_lq", "body"]
    noise = tuple(unit(rng.normal(size=(240, D))).astype(np.float32) for _ in range(2))
    tasks = [task_of(name, np.repeat(np.arange(40), 6)) for name in names]
    embedded = dict(zip(names, [*embedded.values(), noise], strict=True))
    found, curves, bases = protocols.subspaces.transfer(embedded, tasks, 20, 20, 0, embedded)
    explored, more = explore_transfer(embedded, tasks, found, curves, bases, 20, 0, importance=10)
    sharing = measure_sharing(embedded, tasks, bases, 20)
    components = [{"weights": weights, **row} for weights in ("tuned", "foundation")
                  for row in measure_components(embedded, tasks, bases, D, 0)]
    analysis = Analysis("planted <img onerror=x>", None, names, {name: ["train", "a|b <i>"] for name in names}, {}, {},
                        "pca", {"tuned": found}, explored, None, {"tuned": sharing, "foundation": sharing},
                        dict.fromkeys(names, 1.0))
    folder = tmp_path_factory.mktemp("written") / "analysis"
    text = write_analysis(folder, analysis, {"tuned": curves + more}, components,
                          draw_up_map(embedded, tasks, "pca", 0))
    return folder, json.loads((folder / "analysis.json").read_text()), text


def test_tables_hold_the_other_metrics_and_every_component_left_out(written):
    folder, analysis, report = written
    pairs = {(p["fit"], p["test"]): p for p in analysis["explored"]}
    with open(folder / "further.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 * 5 * 4  # pairs of tasks, metrics, ks
    row = next(r for r in rows if (r["fit"], r["test"], r["metric"], r["k"]) == ("face_hq", "face_lq", "mAP", "30"))
    of = next(r for r in pairs["face_hq", "face_lq"]["further"] if (r["metric"], r["k"]) == ("mAP", 30))
    assert [float(row[key]) for key in ("value", "low", "high", "random")] == [of[key] for key in
                                                                               ("value", "low", "high", "random")]
    with open(folder / "importance.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 * 10 and {row["component"] for row in rows} == {str(i) for i in range(1, 11)}
    by_hand = [float(row["change"]) for row in rows if (row["fit"], row["test"]) == ("body", "face_hq")]
    assert by_hand == pairs["body", "face_hq"]["importance"]["change"]
    assert "| face_hq | face_lq | mAP | " in report and "A random subspace keeps nearly all of an AUC" in report
    assert "Number of components from which on every task keeps 99 or 95 %" in report
    assert "One component left out at a time, of the first 10" in report and " nan " not in report


def test_names_are_no_markup_and_figures_are_atomic(written, tmp_path, monkeypatch):
    assert r"# planted \<img onerror=x\>" in written[2] and r"| face_hq | train | a\|b \<i\> |" in written[2]
    assert not re.search(r"(?<!\\)<", written[2])

    def fail(path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "map.pdf").write_bytes(b"old")
    with pytest.raises(InputError, match=r"map\.pdf: cannot be written"):
        reports.analysis_plots.save_figure(SimpleNamespace(savefig=fail), tmp_path / "map")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("map.pdf", b"old")]


def test_what_is_not_above_chance_is_not_drawn(written, monkeypatch):
    folder, analysis, _ = written
    pairs, names = [Pair(**pair) for pair in analysis["transfer"]["tuned"]["pairs"]], analysis["domains"]
    assert find_measured(pairs) == {(a, b) for a in names for b in names if b != "body"}
    assert (folder / "importance.png").stat().st_size > 20_000
    drawn = []
    monkeypatch.setattr(reports.analysis_plots, "save_figure", lambda figure, *_, **__: drawn.append(figure))
    draw_deletion(folder / "x", [Curve("deleted", "body", name, [1, 2], None, np.array([0.9, 0.8]), None, None)
                                 for name in names], names, pairs)
    panels = drawn[0].axes
    assert [len(ax.texts) for ax in panels] == [0, 0, 1] and "not above chance" in panels[2].texts[0].get_text()
    assert [len(ax.lines) for ax in panels] == [2, 2, 0]


def test_importance_is_read_past_the_first_components(tmp_path, monkeypatch):
    """The first component counts 80 points, the 60th one: its bar is a fifth of the panel or more."""
    drawn, change = [], [0.8, *[0.01] * 99]
    monkeypatch.setattr(reports.analysis_plots, "save_figure", lambda figure, *_, **__: drawn.append(figure))
    importance = {"change": change, "low": [0.0] * 50 + [0.005] * 50, "high": change}
    explored = [SimpleNamespace(fit=a, test=b, importance=importance) for a in ("object", "body")
                for b in ("object", "body")]
    reports.analysis_plots.draw_importance(tmp_path / "x", explored, ["object", "body"])
    drawn[0].canvas.draw()
    for ax in drawn[0].axes:
        bars = ax.patches
        assert len(bars) == 100 and bars[59].get_window_extent().height > 0.2 * ax.bbox.height
        assert ax.get_xlim() == (0.5, 100.5) and bars[49].get_facecolor() != bars[59].get_facecolor()


def test_an_analysis_of_a_run_holds_all_of_it(analysed, tiny_run):
    """Collages of the demo corpus are a second source of objects; of people it has one alone, and says so."""
    out = tiny_run / "analysis"
    result = json.loads((out / "analysis.json").read_text())
    sources = result["separability"]["sources"]
    assert set(sources) == set(result["domains"])
    for domain, found in sources.items():
        if found["why"]:
            assert f"| {domain} | not measured ({found['why']}) |" in analysed
        else:
            assert list(found["spaces"]) == ["tuned", "foundation", "pixels"] and len(found["images"]) > 1
            assert all(0 <= space[model]["value"] <= 1 for space in found["spaces"].values()
                       for model in ("logistic", "lda", "svm"))
    assert {bool(found["why"]) for found in sources.values()} == {True, False}
    for pair, explored in zip(result["transfer"]["tuned"]["pairs"], result["explored"], strict=True):
        rank_5 = "nearest-mean top-5" if pair["test"] == "object" else "rank-5"
        of = {(row["metric"], row["k"]): row["value"] for row in explored["further"]}
        assert {k for _, k in of} == {10, 16, 30, 64} and of[rank_5, 64] >= pair["full"] - 1e-6
        assert len(explored["importance"]["change"]) == 63
        assert (pair["fit"], pair["test"]) == (explored["fit"], explored["test"])
    for name in ("importance.png", "importance.pdf", "importance.csv", "further.csv"):
        assert (out / name).stat().st_size > 1000
