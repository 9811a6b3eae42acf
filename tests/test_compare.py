"""evaluate.py compare: differences paired by person, means over seeds, and runs that do not fit or are damaged."""

import csv
import json
import os
import shutil
from dataclasses import replace

import click
import numpy as np
import pytest

import evaluate
from data_prep import InputError, hash_file
from protocols.bootstrap import bootstrap_counts, intervals, weighted_mean
from protocols.results import Row
from reports.rows import rows_of, write_draws, write_rows
from tests.conftest import script
from tests.test_evaluate import run_here


def write_run(folder, values, people, seed=0, images="set x", config=None, resampling=0):
    """A run folder with one figure: the mean of a value per sample, resampled by person."""
    (folder / "eval").mkdir(parents=True)
    found = intervals(lambda w: {"rank-1": weighted_mean(values, w)},
                      bootstrap_counts(people, 400, resampling), len(values))
    results = rows_of(found, Row(folder.name, "tuned", "body", "test", kind="reid", rule="general", images=images))
    write_rows(folder / "eval", [row for row, _ in results])
    write_draws(folder / "eval", results, resampling)
    options = {"schedule": "B", **(config or {}), "seed": seed, "out": str(folder)}
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def compared(tmp_path, *arguments):
    code = evaluate.main.main(["compare", *map(str, arguments), "--out", str(tmp_path / "c")], standalone_mode=False)
    assert code == 0
    return json.loads((tmp_path / "c/comparison.json").read_text())


def test_differences_are_paired_by_person(tmp_path):
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(80), 5)
    hard = rng.random(80)[people]  # what both runs find hard
    a, b = hard + 0.01 * rng.random(400), hard + 0.1 + 0.01 * rng.random(400)
    first, second = (write_run(tmp_path / name, values, people, config={"schedule": name})
                     for name, values in (("a", a), ("b", b)))
    reference, row = compared(tmp_path, first, second)
    assert reference["difference"] is None and row["difference"] == pytest.approx((b - a).mean())
    # literally: people drawn with the same counts in both, the spread of the mean of differences
    draws = [np.average(b - a, weights=w) for w in bootstrap_counts(people, 400, 0)]
    interval = [row["difference_low"], row["difference_high"]]
    assert interval == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1e-6)
    assert row["difference_high"] - row["difference_low"] < 0.1 * (row["high"] - row["low"])  # far below either's own
    with open(tmp_path / "c/comparison.csv") as file:
        table = list(csv.DictReader(file))
    assert [t["runs"] for t in table] == ["a", "b"] and float(table[1]["difference"]) == row["difference"]
    assert "| **+" in (tmp_path / "c/comparison.md").read_text()


def test_seeds_are_averaged_by_hand(tmp_path):
    # run x with seeds 0 and 1: means 0.5 and 0.7, so 0.6 with SD 0.1414; run y: 0.9: a lead of 0.3
    people, ones = np.arange(10), np.ones(10)
    runs = [write_run(tmp_path / "x-s0", 0.5 * ones, people, 0), write_run(tmp_path / "x-s1", 0.7 * ones, people, 1),
            write_run(tmp_path / "y-s0", 0.9 * ones, people, 0, config={"schedule": "A"})]
    x, y = compared(tmp_path, *runs)
    assert (x["runs"], x["seeds"], y["seeds"]) == ("x-s0 x-s1", 2, 1) and x["value"] == pytest.approx(0.6)
    assert x["seed_sd"] == pytest.approx(np.sqrt(0.02)) and y["seed_sd"] is None
    assert [y["difference"], y["difference_low"], y["difference_high"]] == pytest.approx([0.3] * 3, abs=1e-6)


def test_a_repetition_of_a_seed_is_no_further_seed(tmp_path):
    people, ones = np.arange(10), np.ones(10)
    runs = [write_run(tmp_path / "x", 0.5 * ones, people, 0), write_run(tmp_path / "copy", 0.5 * ones, people, 0),
            write_run(tmp_path / "x-s1", 0.7 * ones, people, 1)]
    x, copy = compared(tmp_path, *runs)
    assert [(row["runs"], row["seeds"]) for row in (x, copy)] == [("x x-s1", 2), ("copy", 1)]
    assert copy["seed_sd"] is None and copy["difference"] == pytest.approx(-0.1)


def test_compare_as_a_script(tiny_run, tmp_path):
    """One run alone: against its own untouched backbone."""
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    script("evaluate.py", "--run", tmp_path / "run", "--splits", "face_hq/test,body/test", "--bootstrap", "20",
           "--workers", "0")
    result = script("evaluate.py", "compare", tmp_path / "run", "--out", tmp_path / "c")
    rows = json.loads((tmp_path / "c/comparison.json").read_text())
    lead = next(r for r in rows if (r["split"], r["metric"], r["weights"]) == ("test", "mAP", "tuned"))
    before, after = (next(r["value"] for r in rows if (r["metric"], r["weights"]) == ("mAP", w))
                     for w in ("foundation", "tuned"))
    assert lead["difference"] == pytest.approx(after - before) and "| body/test | rank-1 |" in result.stdout
    assert "| body/test | mAP |" in (tmp_path / "c/comparison.md").read_text() and "| mAP |" not in result.stdout
    assert (tmp_path / "c/comparison.png").stat().st_size > 5000
    assert {r["split"] for r in rows} == {"test", "everything"}
    failed = script("evaluate.py", "compare", tmp_path / "none", check=2)
    assert failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr


# ---------------------------------------------------------------- what runs share


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


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("change, words", [
    ({"images": "set y"}, "body/test rank-1: only"),
    ({"resampling": 1}, "resampled differently"), ({"people": np.arange(9)}, "10 samples in"),
    ("draws", "draws.npz: cannot be read"), ("rows", "results.json: missing"), ("twice", "a run is named twice"),
    ("splits", "no figure in common on these --splits"), ("one", "no figures of the foundation weights"),
    ("out", "config.json: cannot be written (File exists"),
])  # fmt: skip
def test_bad_comparisons(change, words, tmp_path):
    people = np.arange(10)
    first, more = write_run(tmp_path / "a", np.ones(10), people), change if isinstance(change, dict) else {}
    people = more.pop("people", people)
    second = write_run(tmp_path / "b", np.ones(len(people)), people, **more)
    if isinstance(change, str) and change in ("draws", "rows"):
        (second / "eval" / {"draws": "draws.npz", "rows": "results.json"}[change]).unlink()
    special = {"twice": [first, first], "one": [first], "splits": [first, second, "--splits", "face_hq/lfw"],
               "out": [first, second, "--out", first / "config.json"]}
    arguments = special.get(str(change), [first, second])
    with pytest.raises(click.ClickException) as error:
        evaluate.main.main(["compare", "--out", str(tmp_path / "c"), *map(str, arguments)], standalone_mode=False)
    assert words in error.value.format_message() and "\n" not in error.value.format_message()


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


@pytest.mark.parametrize("change", [{"domains": 3}, {"domains": [["x"]]}, {"counts": []}, {"counts": {"body": "many"}}])
def test_compare_of_a_damaged_config_is_one_line(change, tmp_path):
    runs = [write_run(tmp_path / name, np.ones(10), np.arange(10), config={"schedule": name}) for name in "ab"]
    path = runs[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"b/config.json: domains and counts do not name tasks"):
        run_here("compare", *runs, "--out", tmp_path / "c")
