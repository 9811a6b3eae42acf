"""The rule and the outcome of the study, against figures by hand."""

import csv
import json
from dataclasses import replace

import pytest

from data_prep import InputError
from protocols.results import Row
from tests.test_analyze import GOOD, measured
from tools import study


def write_expert(folder, domain, auc, finished=True):
    run = folder / f"net-{domain}-images-s0"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"options": {"domains": domain}, "facts": {}}))
    (run / "probe.jsonl").write_text("".join(json.dumps({"step": i, "auc": {f"{domain}/valid": a}}) + "\n"
                                             for i, a in enumerate([0.99, auc])))
    if finished:
        (run / "done.json").touch()


def test_the_rate_is_chosen_by_the_experts_alone(tmp_path):
    for rate, scores in (("2e-3", (0.9, 0.7)), ("2e-4", (0.8, 0.6)), ("6e-4", (0.85, 0.85))):
        for domain, auc in zip(("object", "body"), scores, strict=True):
            write_expert(tmp_path / f"lr-{rate}", domain, auc)
    best, lines = study.choose_rate(tmp_path)
    assert best == "6e-4"
    assert lines[2:] == ["| 2e-4 | 80.0 | 60.0 | 70.0 |", "| 6e-4 (chosen) | 85.0 | 85.0 | 85.0 |",
                         "| 2e-3 | 90.0 | 70.0 | 80.0 |"]
    write_expert(tmp_path / "lr-1e-3", "object", 1.0)
    write_expert(tmp_path / "lr-1e-3", "body", 1.0, finished=False)
    with pytest.raises(InputError, match=r"lr-1e-3: no finished expert with a quick evaluation of body/valid: run"):
        study.choose_rate(tmp_path)
    with pytest.raises(InputError, match="no folder lr-RATE in it"):
        study.choose_rate(tmp_path / "lr-1e-3")


def kept(split, value, **more) -> Row:
    return Row("u", "tuned", "object", split, "", "retention", value, 0, 2, 100, kind="retention",
               readout="nearest-mean", measure="top-1", **more)


def test_gain_and_what_was_kept_by_hand(tmp_path, monkeypatch):
    """Gains of .2, .3, .3 and .4 are .3 on average; two shifts that keep 90 and 70 % keep 80; of seven classes none."""
    rows = [kept("val", 1.1), kept("unseen", 0.5), kept("unseen", 0.6, unseen=True), kept("sketch", 0.9, ood=True),
            kept("art", 0.7, ood=True), kept("pacs", 0.1, ood=True, identities=7), kept("edges", 0.4, ood=True)]
    rows.append(replace(rows[-1], kind="choice"))
    runs = [measured("net-sequential+replay-s0", "sequential", rows=rows, schedule="sequential", **GOOD),
            measured("net-body-images-s0", "expert", values={"body": 0.9}, foundation={"body": 0.3},
                     rows=[kept("unseen", 0.3)])]  # it saw no objects: no class is told apart
    write_expert(tmp_path / "lr-1e-3", "body", 0.5)
    monkeypatch.setattr(study, "read_runs", lambda folder: runs)
    study.report.callback(tmp_path)
    point, expert = (study.make_point("1e-3", study.Group([run]), {"unseen"}, {"edges"}) for run in runs)
    assert point.recipe == "sequential+replay" and point.figures["gain"].value == pytest.approx(0.3)
    assert {name: one.value for name, one in point.figures.items() if name.startswith("kept")} == pytest.approx(
        {"kept seen": 1.1, "kept unseen": 0.6, "kept shifts": 0.8, "kept shapes": 0.4})
    assert expert.recipe == "body-images" and expert.figures["gain"].value == pytest.approx(0.6)
    assert list(expert.figures) == ["gain", "gain body/test", "kept unseen"]
    assert expert.figures["kept unseen"].value == pytest.approx(0.3)
    assert study.find_splits([study.Group([run]) for run in runs]) == ({"unseen"}, {"edges"})
    page = (tmp_path / "study.md").read_text()
    assert "| 1e-3 | sequential+replay | 1 | 30.0 [30.0, 30.0] | 110 [" in page
    with (tmp_path / "study.csv").open() as file:
        table = {(row["recipe"], row["quantity"]): float(row["value"]) for row in csv.DictReader(file)}
    assert table["sequential+replay", "kept shifts"] == pytest.approx(0.8)
    assert table["body-images", "gain body/test"] == pytest.approx(0.6)
    assert (tmp_path / "study.png").stat().st_size > 5000


def test_what_later_stages_took(tmp_path):
    run = tmp_path / "lr-1e-3" / "net-sequential-s0"
    run.mkdir(parents=True)
    options = {"domains": "body,object", "schedule": "sequential"}
    (run / "config.json").write_text(json.dumps({"options": options, "facts": {"steps": 4}}))
    looks = [(0, 0.5, 0.6), (2, 0.8, 0.6), (4, 0.7, 0.9)]
    (run / "probe.jsonl").write_text("".join(
        json.dumps({"step": step, "auc": {"body/valid": body, "object/valid": thing}}) + "\n"
        for step, body, thing in looks))
    assert study.stage_lines(run.parent) == [
        ["1e-3", "net-sequential-s0", "body/valid", "50.0", "80.0", "70.0", "-10.0"]]
