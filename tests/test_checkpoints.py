"""What a run keeps: --keep, and that nothing which ends a run early costs more than the steps since its checkpoint."""

import csv
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train
from data_prep import InputError
from tests.conftest import ROOT, TINY, script
from tests.test_recipes import stop_at
from tests.test_train import LONG, assert_same_weights, log_of, run_here, start, uninterrupted, wait_for_step

__all__ = ["uninterrupted"]  # the fixture: LONG from start to end

SHORT = [*TINY, "--images", "160", "--save-every", "2", "--domains", "object,body"]  # 10 steps


def kept(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in sorted((run / "checkpoints").glob("step-*"))]


# ---------------------------------------------------------------- --keep


def test_the_newest_checkpoints_stay_and_are_runs_of_their_own(demo_root, tmp_path):
    run = tmp_path / "run"
    run_here(*SHORT, "--data", demo_root, "--out", run, "--keep", "2", "--ema", "0.5")
    assert kept(run) == [8, 10] and not (run / "checkpoints/best").exists()
    assert_same_weights(run / "checkpoints/step-00000010", run)
    stop_at(tmp_path / "eight", [*SHORT, "--data", demo_root, "--ema", "0.5"], 8)
    assert_same_weights(run / "checkpoints/step-00000008", tmp_path / "eight")
    found = train.load_run(run / "checkpoints/step-00000008")  # without --allow-partial: it is whole as it is
    assert found.config["steps"] == 8 and sum(found.config["counts"].values()) == 8 * 16
    assert train.load_tuned(found).dim == 64


def test_the_best_by_the_look_at_fixed_images_stays(demo_root, tmp_path, monkeypatch):
    scores = iter([0.5, 0.6, 0.8, 0.7, 0.6])  # before step 1, after 3, 6, 9 and 10
    monkeypatch.setattr(train, "probe", lambda *_: {"object/val": 0.5, "body/test": next(scores)})
    run_here(*SHORT, "--data", demo_root, "--out", tmp_path / "run", "--keep", "1", "--eval-every", "3")
    assert kept(tmp_path / "run") == [6, 10]
    best = tmp_path / "run/checkpoints/best"
    assert best.resolve().name == "step-00000006" and train.load_run(best).config["steps"] == 6


def test_what_is_kept_is_cut_back_with_the_logs(demo_root, tmp_path):
    """Killed after step 6 was kept and before the state of step 6 was written: it goes on from step 4."""
    common, run = [*SHORT, "--data", demo_root, "--keep", "9"], tmp_path / "run"
    stop_at(run, common, 4)
    shutil.copytree(run / "checkpoints/step-00000004", run / "checkpoints/step-00000006")
    (run / "checkpoints/step-00000008.tmp").mkdir()
    run_here(*common, "--out", run, "--resume")
    assert kept(run) == [2, 4, 6, 8, 10] and not list((run / "checkpoints").glob("*.tmp"))
    run_here(*common, "--out", tmp_path / "whole")
    for step in kept(run):
        name = f"checkpoints/step-{step:08d}"
        assert_same_weights(run / name, tmp_path / "whole" / name)


def test_older_ones_go_only_when_the_new_one_is_complete(demo_root, tmp_path, monkeypatch):
    save, run = train.save_weights, tmp_path / "run"

    def full_disk(folder, *rest):
        if folder.name == "step-00000006.tmp":
            (folder / "model.safetensors").write_text("half")
            raise InputError(f"{folder}: cannot be written (No space left on device)")
        save(folder, *rest)

    monkeypatch.setattr(train, "save_weights", full_disk)
    with pytest.raises(InputError, match="No space left"):
        run_here(*SHORT, "--data", demo_root, "--out", run, "--keep", "1")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    train.load_tuned(train.load_run(run / "checkpoints/step-00000004"))


# ---------------------------------------------------------------- evaluate.py --watch

WATCH = ["--watch", "--splits", "object/val,body/test", "--bootstrap", "2", "--workers", "0", "--crowd", "0"]


def watched(run: Path) -> dict[int, list[dict]]:
    with open(run / "eval/watch.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {step: [row for row in rows if int(row["step"]) == step] for step in sorted({int(r["step"]) for r in rows})}


def test_checkpoints_are_scored_as_they_appear_each_once(demo_root, tmp_path, monkeypatch):
    """What appears while others are scored, between two looks, and together with the end of the run."""
    whole, run, seen = tmp_path / "whole", tmp_path / "run", []
    run_here(*SHORT, "--data", demo_root, "--out", whole, "--keep", "9")
    shutil.copytree(whole, run, ignore=lambda folder, names: [n for n in names if n in ("checkpoints", "done.json")])
    shutil.copytree(whole / "checkpoints/step-00000002", run / "checkpoints/step-00000002")
    (run / "checkpoints/step-00000004.tmp").mkdir()  # not complete: no business of ours
    made = evaluate.make_rows
    monkeypatch.setattr(evaluate, "make_rows", lambda *a: seen.append(a) or made(*a))

    def later(_: float) -> None:
        if not (run / "checkpoints/step-00000006").exists():
            shutil.copytree(whole / "checkpoints/step-00000006", run / "checkpoints/step-00000006")
        else:
            shutil.copytree(whole / "checkpoints/step-00000010", run / "checkpoints/step-00000010")
            shutil.rmtree(run / "checkpoints/step-00000002")  # an old one goes
            shutil.copy(whole / "done.json", run / "done.json")

    monkeypatch.setattr(evaluate.time, "sleep", later)
    evaluate.main.main(["--run", str(run), *WATCH], standalone_mode=False)
    rows = watched(run)
    assert list(rows) == [0, 2, 6, 10] and len(seen) == 5  # the fifth: the run itself
    assert {row["weights"] for row in rows[0]} == {"foundation"} and {row["weights"] for row in rows[6]} == {"tuned"}
    final = {(r.domain, r.split, r.protocol, r.metric): r.value for r in evaluate.read_rows(run / "eval")
             if r.weights == "tuned" and not r.metric.startswith("retention")}
    last = {(r["domain"], r["split"], r["protocol"], r["metric"]): float(r["value"]) for r in rows[10]}
    assert last == pytest.approx(final) and last and (run / "eval/watch.png").stat().st_size > 5000
    assert [r["value"] for r in rows[2]] != [r["value"] for r in rows[10]]
    evaluate.main.main(["--run", str(run), *WATCH], standalone_mode=False)  # complete and scored: only the run again
    assert len(seen) == 6 and watched(run) == rows


def test_a_watch_ends_in_one_line_and_goes_on(demo_root, tmp_path):
    run = tmp_path / "run"
    run_here(*SHORT, "--data", demo_root, "--out", run, "--keep", "9")
    (run / "done.json").unlink()
    (run / "checkpoints/step-00000010").rename(tmp_path / "held")
    for number, first in ((signal.SIGTERM, "step 0: "), (signal.SIGINT, "step 10: ")):
        process = subprocess.Popen([sys.executable, "evaluate.py", "--run", str(run), *WATCH], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        line = process.stdout.readline()
        if number == signal.SIGTERM:  # the second one is waiting, and has scored nothing again
            for _ in range(4):
                process.stdout.readline()
            (tmp_path / "held").rename(run / "checkpoints/step-00000010")
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and err.strip().splitlines()[-1] == "interrupted", err
        assert line.startswith(first) and "Traceback" not in err
    assert list(watched(run)) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("arguments, words", [
    (["--run", "RUN"], "is no run that keeps checkpoints: train it with --keep N"),
    (["--model", "test_vit"], "--watch follows a run: give --run RUN"),
    (["--run", "RUN", "--backbone", "clip"], "--backbone describes an untouched backbone"),
])  # fmt: skip
def test_what_cannot_be_watched(arguments, words, tiny_run):
    arguments = [str(tiny_run) if word == "RUN" else word for word in arguments]
    with pytest.raises(InputError, match=words):
        evaluate.main.main([*arguments, "--watch"], standalone_mode=False)
