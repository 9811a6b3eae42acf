"""evaluate.py compare --experts: is a run as good as one trained on each domain alone?"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import evaluate
from data_prep import InputError
from protocols.bootstrap import bootstrap_counts, intervals, margin, weighted_mean
from protocols.results import Row
from reports.rows import rows_of, write_draws, write_rows


def write_scored(folder: Path, config: dict, values: dict[str, np.ndarray], people: np.ndarray) -> Path:
    """An evaluated run with one headline a domain, the mean of a value per probe; resampled by person."""
    (folder / "eval").mkdir(parents=True)
    results = []
    for domain, own in values.items():
        found = intervals(lambda w, own=own: {"rank-1": weighted_mean(own, w)},
                          bootstrap_counts(people, 300, 0), len(own))
        results += rows_of(found, Row(folder.name, "tuned", domain, "test", kind="reid", rule="general"))
    write_rows(folder / "eval", [row for row, _ in results])
    write_draws(folder / "eval", results, 0)
    options = {"backbone": "clip", "size": "tiny", "model": None, "weights": "none", "image_size": 32, "embed_dim": 0,
               "seed": 0, "schedule": "B", "out": str(folder)}
    (folder / "config.json").write_text(json.dumps(options | config))
    return folder


ALL = {"domains": ["face_hq", "body"], "counts": {"face_hq": 1000, "body": 1000}}


def one(domain: str, images: int = 1000, **more) -> dict:
    return {"domains": [domain], "counts": {domain: images}, **more}


def compared(out: Path, *arguments) -> list[dict]:
    code = evaluate.main.main(["compare", *map(str, arguments), "--out", str(out)], standalone_mode=False)
    assert code == 0
    return json.loads((out / "comparison.json").read_text())


@pytest.mark.parametrize("lead, spread, delta, verdict", [
    (0.0, 0.01, 0.01, "non-inferior"),  # as good, and 400 probes of 100 people tell it
    (0.05, 0.01, 0.01, "non-inferior"),  # better
    (-0.05, 0.01, 0.01, "inferior"),
    (-0.05, 0.01, 0.1, "non-inferior"),  # worse by less than what matters
    (0.0, 1.0, 0.01, "undecided"),  # as good, but it could be otherwise
])  # fmt: skip
def test_non_inferiority_of_planted_differences(lead, spread, delta, verdict, tmp_path, capsys):
    rng, people = np.random.default_rng(3), np.repeat(np.arange(100), 4)
    hard = rng.uniform(0.3, 0.7, 100)[people]  # what both find hard: far wider than delta, and it cancels out
    noise = spread * rng.normal(size=400)
    run = write_scored(tmp_path / "run", ALL, {"face_hq": hard + lead + noise - noise.mean(), "body": hard}, people)
    expert = write_scored(tmp_path / "expert", one("face_hq"), {"face_hq": hard, "body": 0 * hard}, people)
    (row,) = compared(tmp_path / "c", run, expert, "--experts", "--delta", delta)
    assert row["verdict"] == verdict and row["difference"] == pytest.approx(lead, abs=1e-6)
    assert (row["domain"], row["run"], row["expert"], row["delta"]) == ("face_hq", "run", "expert", delta)
    assert row["low"] <= row["difference"] <= row["high"]
    if spread < 1:
        assert row["high"] - row["low"] < 0.01 < np.ptp(hard)
    text = capsys.readouterr().out
    assert f"On the headlines together: {verdict}; no expert of body was given" in text
    with open(tmp_path / "c/comparison.csv") as file:
        (line,) = csv.DictReader(file)
    assert {"difference", "low", "high", "delta", "verdict"} < line.keys() and line["verdict"] == verdict
    assert (tmp_path / "c/comparison.png").stat().st_size > 5000


def test_a_saturated_metric_asks_for_a_tenth_of_the_experts_error(tmp_path):
    # 99.5 against 99.8: within a point, but a point would be five times what the expert gets wrong
    people = np.arange(1000)
    expert, run = np.ones(1000), np.ones(1000)
    expert[:2], run[:5] = 0, 0
    folders = [write_scored(tmp_path / "run", ALL, {"face_hq": run}, people),
               write_scored(tmp_path / "expert", one("face_hq"), {"face_hq": expert}, people)]
    (row,) = compared(tmp_path / "c", *folders, "--experts")
    assert row["delta"] == pytest.approx(0.0002) and row["verdict"] != "non-inferior"
    assert [margin(value, 0.01) for value in (0.5, 0.9, 0.95, 1.0)] == pytest.approx([0.01, 0.01, 0.005, 0])
    assert [margin(value, 0.1) for value in (0.5, 0.95)] == pytest.approx([0.1, 0.005])
    # a run that makes no mistake where its expert makes none is not inferior, though the margin is 0
    perfect = [write_scored(tmp_path / name, config, {"face_hq": np.ones(1000)}, people)
               for name, config in (("p", ALL), ("q", one("face_hq")))]
    assert compared(tmp_path / "d", *perfect, "--experts")[0]["verdict"] == "non-inferior"


def test_seeds_of_run_and_experts_are_averaged(tmp_path):
    people, ones = np.arange(50), np.ones(50)
    runs = [write_scored(tmp_path / f"run-s{s}", ALL | {"seed": s}, {"face_hq": v * ones, "body": v * ones}, people)
            for s, v in enumerate((0.4, 0.6))]
    experts = [write_scored(tmp_path / f"{d}-s{s}", one(d, seed=s), {d: v * ones}, people)
               for d, v in (("face_hq", 0.45), ("body", 0.7)) for s in (0, 1)]
    face, body = compared(tmp_path / "c", runs[0], *experts, runs[1], "--experts")
    assert (face["run"], face["expert"]) == ("run-s0 run-s1", "face_hq-s0 face_hq-s1")
    assert face["difference"] == pytest.approx(0.05) and face["verdict"] == "non-inferior"
    assert body["difference"] == pytest.approx(-0.2) and body["verdict"] == "inferior"


@pytest.mark.parametrize("config, words", [
    (one("face_hq", 5000), "saw 5,000 images of face_hq"), (one("object"), "was not trained on object"),
    (one("face_hq", model="vit"), "starts from another backbone"), (ALL | {"schedule": "A"}, "is no expert"),
])  # fmt: skip
def test_experts_that_do_not_match_are_refused(config, words, tmp_path):
    people = np.arange(20)
    run = write_scored(tmp_path / "run", ALL, {"face_hq": np.ones(20)}, people)
    expert = write_scored(tmp_path / "e", config, {"face_hq": np.ones(20), "object": np.ones(20)}, people)
    with pytest.raises(InputError, match=words):
        compared(tmp_path / "c", run, expert, "--experts")


def test_experts_are_asked_for_their_own_domains(tmp_path):
    people, ones = np.arange(50), np.ones(50)
    run = write_scored(tmp_path / "run", ALL, {"face_hq": ones, "body": ones, "object": ones}, people)
    face = write_scored(tmp_path / "face", one("face_hq"), {"face_hq": ones, "body": ones, "object": ones}, people)
    body = write_scored(tmp_path / "body", one("body"), {"body": ones, "face_lq": ones}, people)
    table = compared(tmp_path / "c", run, face, body, "--experts", "--splits", "face_hq/test,body/test")
    assert [(row["domain"], row["expert"]) for row in table] == [("face_hq", "face"), ("body", "body")]
    assert [row["domain"] for row in compared(tmp_path / "c", run, face, body, "--experts", "--splits", "body/test")
            ] == ["body"]
    for name, experts in (("object/test", (face, body)), ("face_lq/test", (face, body)), ("body/test", (face,))):
        with pytest.raises(InputError, match=f"--splits: {name}; they share"):
            compared(tmp_path / "c", run, *experts, "--experts", "--splits", name)


@pytest.mark.parametrize("options, words", [
    (["--delta", "0.02"], "give --experts too"), (["--experts", "--weights", "foundation"], "leave it out"),
    (["--experts"], "want RUN and at least one expert")])
def test_options_of_compare_that_contradict(options, words, tmp_path):
    run = write_scored(tmp_path / "run", ALL, {"face_hq": np.ones(9)}, np.arange(9))
    with pytest.raises(InputError, match=words):
        compared(tmp_path / "c", run, *options)
