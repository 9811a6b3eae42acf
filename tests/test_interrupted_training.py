"""Training that is killed, asked to stop or short of disk: it goes on to the same weights, bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import models.weights
import reports.training
import train
from data_prep import InputError, write_atomically
from models.head import HeadSettings, Loss, MarginHead
from models.runs import STOPPED, Ranks, load_run
from tests.conftest import LONG, ROOT, TINY, script
from tests.test_train import assert_same_weights, log_of, run_here


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "train.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if (run / "log.jsonl").exists() and any(r["step"] >= step for r in log_of_partial(run)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came: {process.communicate()}")


def log_of_partial(run: Path) -> list[dict]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def stop_at(run: Path, arguments: list, step: int) -> dict:
    """Start a run and interrupt it right after the checkpoint of `step`; returns that state."""
    save = train.save_checkpoint

    def save_and_stop(job, done):
        save(job, done)
        if done == step:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save_and_stop)
        with pytest.raises(InterruptedError):
            run_here(*arguments, "--out", run)
    return torch.load(run / "last/state.pt", weights_only=True)


def test_kill_9_and_resume_gives_the_same_weights_bit_for_bit(uninterrupted, demo_root, tmp_path):
    run, dice = tmp_path / "run", random.Random(0)
    for step in (5, 20, 40):
        process = start(*LONG, "--data", demo_root, "--out", run, "--resume")
        wait_for_step(run, step, process)
        time.sleep(dice.random() * 0.3)
        process.kill()
        process.communicate()
        assert not (run / "done.json").exists()
    script("train.py", *LONG, "--data", demo_root, "--out", run, "--resume", "--workers", "1")
    assert_same_weights(uninterrupted, run)
    assert [r["step"] for r in log_of(run)] == [r["step"] for r in log_of(uninterrupted)]
    again = script("train.py", *LONG, "--data", demo_root, "--out", run, "--resume")
    assert "complete" in again.stdout


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "STOP"])
def test_asked_to_stop_it_saves_exits_75_and_resumes_exactly(how, uninterrupted, demo_root, tmp_path):
    run = tmp_path / "run"
    process = start(*LONG, "--data", demo_root, "--out", run)
    wait_for_step(run, 10, process)
    if how == "STOP":
        (run / "STOP").touch()
    else:
        process.send_signal(getattr(signal, how))
    out, err = process.communicate(timeout=60)
    assert process.returncode == STOPPED and "--resume" in out, err
    assert not (run / "done.json").exists()
    with pytest.raises(InputError, match="has not finished"):
        load_run(run)
    assert load_run(run, allow_partial=True).head.shape[1] == 64
    script("train.py", *LONG, "--data", demo_root, "--out", run, "--resume")
    assert_same_weights(uninterrupted, run)


def test_sigterm_to_the_whole_group_saves_too(uninterrupted, demo_root, tmp_path):
    """Schedulers signal loader processes as well; they must not take the run down with them."""
    run = tmp_path / "run"
    process = start(*LONG, "--workers", "2", "--data", demo_root, "--out", run)
    wait_for_step(run, 10, process)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == STOPPED and "Traceback" not in err, out + err
    script("train.py", *LONG, "--data", demo_root, "--out", run, "--resume")
    assert_same_weights(uninterrupted, run)


def test_killed_between_the_last_checkpoint_and_done(tiny_run, demo_root, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("eval", "analysis"))
    (tmp_path / "run/done.json").unlink()
    run_here(*TINY, "--data", demo_root, "--out", tmp_path / "run", "--resume")  # and a moved run may be resumed
    assert (tmp_path / "run/done.json").exists()
    assert_same_weights(tiny_run, tmp_path / "run")


def test_weights_are_never_older_than_the_state(tmp_path, monkeypatch):
    """Killed while a checkpoint is written: what resume continues from must not be ahead of the weights."""
    order = []
    for module in (models.weights, train):
        monkeypatch.setattr(module, "write_atomically", lambda path, write: order.append(path.name))
    model = SimpleNamespace(state_dict=dict, net=SimpleNamespace(state_dict=dict), project=None)
    optimizer = SimpleNamespace(state_dict=lambda: {"state": {}})
    job = SimpleNamespace(folder=tmp_path, ranks=Ranks(), optimizer=optimizer, average=None, model=model, splits=[],
                          head=MarginHead([2], 2, HeadSettings([Loss(1.0)])), tally=reports.training.Tally(),
                          health=None)
    train.save_checkpoint(job, 3)
    assert order == ["model.safetensors", "head.safetensors", "state.pt"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "state"
    path.write_text("old")

    def full_disk(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"cannot be written .*No space left.* what was saved before is intact"):
        write_atomically(path, full_disk)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 60 MB: four checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", place]).returncode:
        pytest.skip("only root may mount a small disk; the limit on the size of files is tested without")
    yield place
    subprocess.run(["umount", place], check=True)


def assert_one_line(err: str, words: str) -> None:
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(words, lines[0]) and "intact" in lines[0] and "Traceback" not in err, err


def test_a_disk_that_fills_up(uninterrupted, demo_root, small_disk):
    """Whatever is written first is refused: the run ends in one line, and goes on where there is room again."""
    run = small_disk / "run"
    process = start(*LONG, "--data", demo_root, "--out", run)
    wait_for_step(run, 5, process)
    with open(small_disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(1 << 12))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert_one_line(err, r"No space left on device|; 0 MiB free there")
    (small_disk / "filler").unlink()
    step = torch.load(run / "last/state.pt", weights_only=True)["step"] if (run / "last/state.pt").exists() else 0
    assert step < 60 and not (run / "done.json").exists()
    run_here(*LONG, "--data", demo_root, "--out", run, "--resume")
    assert_same_weights(uninterrupted, run)


def test_an_evaluation_on_a_full_disk(tiny_run, small_disk):
    """Whatever is written first is refused in one line; a hole in a mapped file would end the process instead."""
    shutil.copytree(tiny_run, run := small_disk / "run", ignore=shutil.ignore_patterns("eval", "last", "analysis"))
    for kibibytes in (0, 8, 100, 400):
        with open(small_disk / "filler", "wb") as file:
            file.write(bytes(shutil.disk_usage(small_disk).free - (kibibytes << 10)))
        err = script("evaluate.py", "--run", run, "--bootstrap", "2", "--workers", "0", check=2).stderr
        assert "Traceback" not in err and str(small_disk) in err.splitlines()[-1], err
        (small_disk / "filler").unlink()
    script("evaluate.py", "--run", run, "--bootstrap", "2", "--workers", "0")
