"""Training on several processes (gloo, CPU): the gradients of one process, and whole runs under torchrun."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_prep import InputError
from data_prep.stream import interleave
from models.head import HeadSettings
from models.runs import Ranks, end_rank, join_ranks
from tests.conftest import ROOT, TINY, assert_gone, script
from tests.test_schedule import LOSSES, Net, make_head, step_gradients

K, C, D = 4, 7, 12


def make(seed=0):
    """A small float64 network, class weights, and images of every domain."""
    torch.manual_seed(seed)
    model, weight = Net(4, 20, D), torch.randn(K * C, D, dtype=torch.float64)
    images, labels = torch.randn(K, 9, 3, 4, 4, dtype=torch.float64), torch.randint(0, C, (K, 9))
    return model, weight, images, labels


def deal(plan: list[list[int]], rank: int, world: int, micro: int) -> list[tuple[list[int], list[int], list[bool]]]:
    """(domain, number, real) of a rank's micro-batches, dealt as `Stream` deals them, transcribed literally."""
    found = []
    for counts in plan:
        domain, number = interleave(np.array(counts))
        places = [list(range(r, len(domain), world)) for r in range(world)]
        for start in range(0, len(places[0]), micro):
            size = len(places[0][start : start + micro])
            mine = places[rank][start : start + micro]
            real = [True] * len(mine) + [False] * (size - len(mine))
            mine += [0] * (size - len(mine))
            found.append(([int(domain[p]) for p in mine], [int(number[p]) for p in mine], real))
    return found


def dealt(plan, rank, world, micro, images, labels) -> list[tuple]:
    """(images, labels, domains) of a rank's micro-batches."""
    return [(images[domain, number], torch.where(torch.tensor(real), labels[domain, number], -1), torch.tensor(domain))
            for domain, number, real in deal(plan, rank, world, micro)]


def in_whole(part, rows, classes):
    """Gradients of a rank's rows among those of the whole head; the others are 0."""
    whole = torch.zeros(classes, part.shape[1], dtype=part.dtype)
    whole[rows] = part
    return whole


def gradients(rank, world, plan, micro, sharded, coupling, tune_backbone=True):
    """Gradients of a step on this rank: of the backbone, and of the whole head with the rows that are elsewhere 0."""
    model, weight, images, labels = make()
    head = make_head(weight, HeadSettings(LOSSES, coupling=coupling), Ranks(rank, world), sharded)
    backbone, own, total = step_gradients(model, head, dealt(plan, rank, world, micro, images, labels), plan,
                                          tune_backbone=tune_backbone)
    rows = torch.arange(K * C) if head.rows is None else head.rows
    return backbone, in_whole(own, rows, K * C), rows, total


PLANS = {
    "A": [[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4]],
    "B, uneven": [[7, 5, 3, 2]],
    "B, domains missing from ranks": [[9, 1, 1, 0]],
}


def on_rank(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for name, plan in PLANS.items():
        for micro in (100, 2):
            for sharded in (False, True):
                for coupling in ("domain", "sample"):
                    mine = gradients(rank, world, plan, micro, sharded, coupling)
                    torch.save(mine, f"{folder}/{name}-{micro}-{sharded}-{coupling}-{rank}.pt")
    torch.save(gradients(rank, world, PLANS["A"], 3, True, "domain", tune_backbone=False), f"{folder}/warmup-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that is torn down


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    torch.multiprocessing.spawn(on_rank, (request.param, str(folder)), nprocs=request.param)
    return request.param, folder


@pytest.mark.parametrize("coupling", ["domain", "sample"])
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated head", "sharded head"])
@pytest.mark.parametrize("micro", [100, 2])
@pytest.mark.parametrize("name", PLANS)
def test_gradients_are_those_of_one_process(name, micro, sharded, coupling, ranks):
    world, folder = ranks
    backbone, head, _, total = gradients(0, 1, PLANS[name], 100, False, coupling)
    found = [torch.load(f"{folder}/{name}-{micro}-{sharded}-{coupling}-{rank}.pt") for rank in range(world)]
    for rank, (mine, own, rows, sums) in enumerate(found):
        for one, other in zip(mine, backbone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(own[rows], head[rows], rtol=1e-10, atol=1e-13)
        assert float(sums["grad_norm"]) == pytest.approx(float(total["grad_norm"]), rel=1e-10), rank
    assert max(g.abs().max() for g in backbone) > 1e-6 and head.abs().max() > 1e-6
    assert torch.cat([rows for _, _, rows, _ in found]).unique().tolist() == list(range(K * C))
    for key in ("loss", "loss_by_domain", "cos", "correct", "count", "direction"):
        torch.testing.assert_close(sum(t[key] for *_, t in found), total[key], rtol=1e-5, atol=1e-5)


def test_head_warmup_on_several_ranks(ranks):
    world, folder = ranks
    _, head, *_ = gradients(0, 1, PLANS["A"], 100, False, "domain", tune_backbone=False)
    whole = sum(torch.load(f"{folder}/warmup-{rank}.pt")[1] for rank in range(world))
    torch.testing.assert_close(whole, head, rtol=1e-10, atol=1e-13)


# ---------------------------------------------------------------- whole runs


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
SHORT = [*TINY, "--schedule", "B", "--batch", "18", "--images", "108", "--ema", "0.9"]


def torchrun(processes: int, *arguments, check: int = 0) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [*TORCHRUN, str(processes), "train.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == check, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def weights(run):
    return load_file(run / "model.safetensors") | load_file(run / "head.safetensors")


def assert_near(run, other, rtol=1e-3):
    """Equal to rounding: Adam's first steps turn the last digit of a gradient near 0 into a whole step."""
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        if value.is_floating_point():
            difference, size = (value - theirs[key]).norm(), theirs[key].norm()
            assert difference <= rtol * size + 1e-6, f"{key}: {float(difference / size):.2g}"


@pytest.fixture(scope="module")
def runs(demo_root, tmp_path_factory):
    """The same run on one process, and on two with the head replicated and sharded."""
    root = tmp_path_factory.mktemp("torchrun")
    script("train.py", *SHORT, "--data", demo_root, "--out", root / "one")
    torchrun(2, *SHORT, "--data", demo_root, "--out", root / "two")
    torchrun(2, *SHORT, "--data", demo_root, "--out", root / "sharded", "--shard-head", "--micro-batch", "4")
    return root


def test_torchrun_gives_the_weights_of_one_process(runs):
    for name in ("two", "sharded"):
        assert_near(runs / name, runs / "one")
        log = [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
        alone = [json.loads(line) for line in (runs / "one/log.jsonl").read_text().splitlines()]
        assert log[-1]["loss"] == pytest.approx(alone[-1]["loss"], rel=1e-3)
        assert log[-1]["mean_cosine"] == pytest.approx(alone[-1]["mean_cosine"], abs=1e-3)


def test_two_processes_again_give_the_same_bits(runs, demo_root, tmp_path):
    torchrun(2, *SHORT, "--data", demo_root, "--out", tmp_path / "again")
    first, second = weights(runs / "two"), weights(tmp_path / "again")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_stopped_on_two_processes_and_continued_on_three(demo_root, tmp_path):
    """SIGTERM to torchrun: the ranks agree on the step, save the whole head, and another number of them goes on."""
    common = [*TINY, "--data", demo_root, "--schedule", "B", "--batch", "18", "--images", "1080", "--ema", "0.9",
              "--save-every", "5", "--lr", "1e-4"]
    script("train.py", *common, "--out", tmp_path / "one")
    run = tmp_path / "moved"
    process = subprocess.Popen([*TORCHRUN, "2", "train.py", *map(str, common), "--out", str(run), "--shard-head"],
                               cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not (run / "last/state.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    step = torch.load(run / "last/state.pt", weights_only=True)["step"]
    assert 5 <= step < 60 and not (run / "done.json").exists()
    torchrun(3, *common, "--out", run, "--resume")
    assert_near(run, tmp_path / "one", 5e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ranks_do_not_outlive_a_killed_torchrun(demo_root, tmp_path):
    """They save and stop, as they would at its SIGTERM."""
    run = tmp_path / "run"
    process = subprocess.Popen([*TORCHRUN, "2", "train.py", *TINY, "--data", demo_root, "--batch", "18",
                                "--images", "1000000", "--save-every", "5", "--out", run],
                               cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not (run / "last/state.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    pids = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.wait()
    assert len(pids) == 2
    assert_gone(pids)
    assert torch.load(run / "last/state.pt", weights_only=True)["step"] < 50_000 and not (run / ".lock").exists()


def test_a_rank_whose_torchrun_was_killed_before_it_joined_ends(monkeypatch):
    """Else it would ask for half an hour whether torchrun listens again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                        "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match=r"torchrun, which started this process, has ended \(Connection refused\)"):
        join_ranks("cpu")


@pytest.mark.parametrize("error, words", [
    (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3260"),
     r"^error: another process of this job has ended.* with --resume\)$"),
    (RuntimeError("a defect"), "^RuntimeError: a defect$"), (KeyError("peer"), "^KeyError: 'peer'$"),
])
def test_the_last_words_of_a_rank(error, words, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    end_rank(type(error), error, None)
    assert ended == [1] and re.search(words, capsys.readouterr().err.strip())


def test_a_batch_too_small_for_the_processes_is_one_line(demo_root, tmp_path):
    result = torchrun(3, *TINY, "--data", demo_root, "--schedule", "A", "--batch", "8", "--out", tmp_path / "run",
                      check=1)  # torchrun's own exit code
    assert "batches of 2 images cannot be divided among 3 processes" in result.stderr
    assert 'train.py", line' not in result.stderr


def test_pcgrad_on_two_processes_is_that_on_one(demo_root, tmp_path):
    """Also after the first update: gradients that came back in another memory layout would be taken crosswise."""
    options = ["train.py", *TINY, "--data", demo_root, "--schedule", "A", "--coupling", "pcgrad", "--head-warmup", "0",
               "--conflict-every", "1", "--images", "32"]
    script(*options, "--out", tmp_path / "one")
    script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options, "--out", tmp_path / "two")
    one, two = ([json.loads(line) for line in (tmp_path / name / "conflict.jsonl").read_text().splitlines()]
                for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert b["norm"] == pytest.approx(a["norm"], rel=0.02)
        assert b["cosine"] == pytest.approx(a["cosine"], abs=0.02)
