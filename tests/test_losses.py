"""Losses by name, and the statistics of AdaFace."""

import json
import os

import numpy as np
import pytest
import torch

import reports.training
import train
from data_prep import InputError
from models.head import HeadSettings, Loss, MarginHead, adaptive_margins, parse_losses
from models.runs import Ranks
from tests.conftest import TINY, script
from tests.test_distributed import SHORT, C, K, assert_near, dealt, in_whole, make, torchrun
from tests.test_interrupted_training import start, wait_for_step
from tests.test_schedule import LOSSES, make_head, step_gradients
from tests.test_train import assert_same_weights, log_of, run_here

# ---------------------------------------------------------------- losses by name


@pytest.mark.parametrize("text, scale, additive, angular, adaptive", [
    ("face_hq=arcface:m=0.4,s=32", [30, 32, 64, 64], [0, 0, 0.35, 0.35], [0, 0.4, 0, 0], [0] * 4),
    ("face_hq=arcface; body=adaface", [30, 64, 64, 64], [0, 0, 0.35, 0.4], [0, 0.5, 0, 0], [0, 0, 0, 0.333]),
    ("cosface:m=.2", [30, 64, 64, 64], [0.2] * 4, [0] * 4, [0] * 4),
    ("adaface:m=0.3,h=0.5,s=48;object=softmax", [30, 48, 48, 48], [0, 0.3, 0.3, 0.3], [0] * 4, [0, 0.5, 0.5, 0.5]),
    ("object=softmax:s=16", [16, 64, 64, 64], [0, 0.35, 0.35, 0.35], [0] * 4, [0] * 4),
    ("body=combined", [30, 64, 64, 64], [0, 0.35, 0.35, 0.2], [0, 0, 0, 0.3], [0] * 4),
    ("body=combined:m2=0.1,m3=0.05", [30, 64, 64, 64], [0, 0.35, 0.35, 0.05], [0, 0, 0, 0.1], [0] * 4),
])  # fmt: skip
def test_a_named_loss_is_its_numbers(text, scale, additive, angular, adaptive):
    losses = list(parse_losses(text).values())
    assert [loss.scale for loss in losses] == scale and [loss.additive for loss in losses] == additive
    assert [loss.angular for loss in losses] == angular and [loss.concentration for loss in losses] == adaptive
    assert {(loss.smoothing, loss.weight) for loss in losses} == {(0, 1)}


def test_smoothing_and_weight_belong_to_every_loss():
    losses = parse_losses("softmax:e=0.1;face_hq=arcface:w=2;body=adaface:e=0.2,w=0.5")
    assert [loss.smoothing for loss in losses.values()] == [0.1, 0, 0.1, 0.2]
    assert [loss.weight for loss in losses.values()] == [1, 2, 1, 0.5]


def test_a_loss_for_a_domain_that_is_not_trained_is_allowed():
    options = train.Options(domains=["body"], loss=parse_losses("face_hq=arcface;body=adaface"))
    assert options.per_domain("loss") == [Loss(64.0, 0.4, concentration=0.333)]  # a grid gives all its runs the same


def test_every_number_of_a_loss_reaches_the_step():
    """Each changes the gradient of the backbone: scale, both margins, h, smoothing and weight."""
    model, weight, images, labels = make()
    plan = [[7, 5, 3, 2]]

    def gradient(loss: Loss) -> torch.Tensor:
        head = make_head(weight, HeadSettings([loss, *LOSSES[1:]]))
        if head.statistics is not None:
            head.statistics += torch.tensor([10.0, 8.0, 8.0])  # lengths were seen: mean 0.8, deviation 0.4
        return step_gradients(model, head, dealt(plan, 0, 1, 100, images, labels), plan)[0][0]

    values = {"scale": 30.0, "additive": 0.2, "angular": 0.1, "concentration": 0.3, "smoothing": 0.0, "weight": 1.0}
    before = gradient(Loss(**values))
    for name in values:
        other = gradient(Loss(**values | {name: values[name] + 0.1}))
        assert not torch.allclose(before, other, rtol=1e-4, atol=1e-9), name


def test_a_run_is_replayed_with_its_losses(demo_root, tmp_path):
    text = "adaface:m=0.2,s=24,e=0.05;face_lq=arcface:m=0.1,w=0.5;object=softmax"
    run_here(*TINY, "--loss", text, "--data", demo_root, "--out", tmp_path / "run")
    run_here("--config", tmp_path / "run/config.json", "--out", tmp_path / "again")
    assert_same_weights(tmp_path / "run", tmp_path / "again")
    run_here("--config", tmp_path / "run/config.json", "--loss", "object=arcface:m=0.3", "--out", tmp_path / "other")
    options = json.loads((tmp_path / "other/config.json").read_text())["options"]  # the command line's alone
    assert options["loss"] == ("object=arcface:m=0.3,s=30;face_hq=cosface:m=0.35,s=64;face_lq=cosface:m=0.35,s=64;"
                               "body=cosface:m=0.35,s=64")


# ---------------------------------------------------------------- AdaFace


def test_adaptive_margins_by_hand():
    """Lengths 9.2, 9.6, 10.4, 10.8 were seen: mean 10, std √0.4 = 0.63246. h = 0.5, m = 0.4.

    length 10.63246: z = 0.5 · 0.63246 / 0.63346 = 0.49921; length 2: z = -1 (clipped); m_ang = -m z, m_add = m + m z.
    """
    seen = torch.tensor([9.2, 9.6, 10.4, 10.8], dtype=torch.float64)
    statistics = torch.stack([torch.ones(4), seen, seen**2], 1).sum(0).expand(2, 3)
    length = torch.tensor([10 + 0.4**0.5, 2.0], dtype=torch.float64)
    m, h = torch.full((2,), 0.4, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    found = adaptive_margins(length, torch.zeros(2), m, h, statistics)
    z = torch.tensor([0.5 * 0.4**0.5 / (0.4**0.5 + 1e-3), -1.0], dtype=torch.float64)
    torch.testing.assert_close(found["sample_margin_angular"], -0.4 * z)
    torch.testing.assert_close(found["sample_margin_additive"], 0.4 + 0.4 * z)
    off = adaptive_margins(length, torch.full((2,), 0.1), m, 0 * h, statistics)
    assert off["sample_margin_angular"].tolist() == [pytest.approx(0.1)] * 2
    assert torch.equal(off["sample_margin_additive"], m)


@pytest.mark.parametrize("seen, z", [([], 0), ([9.0], 0), ([9.0, 11.0], 1)])
def test_a_single_sample_has_no_deviation(seen, z):
    statistics = torch.tensor([[len(seen), sum(seen), sum(length**2 for length in seen)]], dtype=torch.float64)
    found = adaptive_margins(torch.tensor([20.0]), torch.zeros(1), torch.full((1,), 0.4), torch.ones(1), statistics)
    assert float(found["sample_margin_additive"]) == pytest.approx(0.4 + 0.4 * z)
    assert float(found["sample_margin_angular"]) == pytest.approx(-0.4 * z)


def test_statistics_are_decayed_sums_and_skipped_steps_leave_them():
    head = MarginHead([2, 2], 4, HeadSettings([Loss(64.0, 0.4, concentration=0.333)] * 2))
    step = torch.tensor([[3.0, 30.0, 310.0], [0, 0, 0]], dtype=torch.float64)
    head.learn_lengths(step, torch.tensor(1.0))
    assert head.statistics.tolist() == step.tolist()
    for skipped in (step, step * float("nan")):
        head.learn_lengths(skipped, torch.tensor(0.0))
    head.learn_lengths(torch.tensor([[0.0] * 3, [1.0, 5.0, 25.0]], dtype=torch.float64), torch.tensor(1.0))
    # the domain that was not drawn keeps what it had
    assert head.statistics.tolist() == [[3.0, 30.0, 310.0], [1.0, 5.0, 25.0]]
    head.learn_lengths(step, torch.tensor(1.0))
    np.testing.assert_allclose(head.statistics[0], 1.99 * step[0])
    assert MarginHead([2], 4, HeadSettings([Loss(64.0, 0.4)])).statistics is None


ADAPTIVE = [Loss(loss.scale, loss.additive, loss.angular, h, weight=loss.weight)
            for loss, h in zip(LOSSES, (0.0, 0.333, 0.5, 0.333), strict=True)]
STEPS = [[[7, 5, 3, 2]], [[9, 1, 1, 0]], [[4, 4, 4, 4]]]  # a single sample of a domain, and none


def adaptive_steps(rank: int, world: int, micro: int, sharded: bool, losses: list[Loss] = ADAPTIVE) -> list[tuple]:
    """(gradients of the backbone, of the whole head, statistics before) of three steps that share their statistics."""
    model, weight, images, labels = make()
    head, found = make_head(weight, HeadSettings(losses), Ranks(rank, world), sharded), []
    rows = torch.arange(K * C) if head.rows is None else head.rows
    for plan in STEPS:
        before = None if head.statistics is None else head.statistics.clone()
        model = make()[0]
        backbone, own, _ = step_gradients(model, head, dealt(plan, rank, world, micro, images, labels), plan)
        found.append((backbone, in_whole(own, rows, K * C), rows, before))
    return found


def on_rank(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for sharded in (False, True):
        torch.save(adaptive_steps(rank, world, 2, sharded), f"{folder}/{sharded}-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that is torn down


def assert_same_steps(found, expected):
    for (backbone, head, rows, before), (x, w, _, norms) in zip(found, expected, strict=True):
        for one, other in zip(backbone, x, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(head[rows], w[rows], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(before, norms, rtol=1e-12, atol=1e-12)


def test_adaptive_margins_are_exact_over_micro_batches_and_ranks(tmp_path):
    """In float64; the head replicated and sharded, with the statistics that the steps before left."""
    expected = adaptive_steps(0, 1, 100, False)
    assert_same_steps(adaptive_steps(0, 1, 3, False), expected)
    torch.multiprocessing.spawn(on_rank, (2, str(tmp_path)), nprocs=2)
    for sharded in (False, True):
        for rank in range(2):
            assert_same_steps(torch.load(tmp_path / f"{sharded}-{rank}.pt"), expected)
    # and the statistics matter: at the first step, without any, the margins are CosFace's
    plain = [backbone[0] for backbone, *_ in adaptive_steps(0, 1, 100, False, LOSSES)]
    assert torch.equal(plain[0], expected[0][0][0]) and not torch.allclose(plain[2], expected[2][0][0], rtol=1e-3)


ADAFACE = ["--loss", "adaface:m=0.3,s=32;object=softmax", "--margin-ramp", "0"]


def test_adaface_resumes_bit_for_bit_after_kill_9(demo_root, tmp_path):
    common = [*TINY, *ADAFACE, "--images", "640", "--save-every", "5", "--log-every", "5", "--domains", "object,body",
              "--data", demo_root]
    run_here(*common, "--out", tmp_path / "whole")
    process = start(*common, "--out", tmp_path / "run")
    wait_for_step(tmp_path / "run", 10, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "run/done.json").exists()
    run_here(*common, "--out", tmp_path / "run", "--resume")
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    states = [torch.load(tmp_path / name / "last/state.pt", weights_only=True)["norms"] for name in ("whole", "run")]
    assert torch.equal(*states) and (states[0] > 0).all()
    assert {"norm/object", "norm/body"} <= set(log_of(tmp_path / "run")[-1])


def test_adaface_on_two_processes(demo_root, tmp_path):
    common = [*SHORT, *ADAFACE, "--data", demo_root]
    script("train.py", *common, "--out", tmp_path / "one")
    torchrun(2, *common, "--out", tmp_path / "two", "--micro-batch", "4", "--shard-head")
    assert_near(tmp_path / "two", tmp_path / "one")
    one, two = (torch.load(tmp_path / name / "last/state.pt", weights_only=True)["norms"] for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_a_skipped_step_leaves_the_statistics(demo_root, tmp_path, monkeypatch):
    monkeypatch.setattr(reports.training, "MAX_SKIPPED", 1)
    jobs, run_steps = [], train.run_steps
    monkeypatch.setattr(train, "run_steps", lambda job: jobs.append(job) or run_steps(job))
    with pytest.raises(InputError, match="steps in a row were not finite"):
        run_here(*TINY, *ADAFACE, "--data", demo_root, "--out", tmp_path / "run", "--head-lr", "inf", "--save-every",
                 "1", "--log-every", "2")
    taken = torch.load(tmp_path / "run/last/state.pt", weights_only=True)["step"]  # before the first that was skipped
    assert int(jobs[0].health[0]) > 0 and 0 < float(jobs[0].head.statistics[:, 0].sum()) <= 16 * taken
