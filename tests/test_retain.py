"""Remedies for forgetting: penalties towards the untouched backbone (--retain) and old images (--replay)."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data_prep import InputError
from models.adapt import RETAIN_TYPE, RetainWeights, Retention
from models.head import HeadSettings
from models.runs import Ranks, load_run, load_tuned
from tests.test_coupling import make, options_of
from tests.test_schedule import LOSSES, make_head, step_gradients
from train import Options, plan_batches, stage_shares


@pytest.mark.parametrize("weights", [RetainWeights(l2sp=0.3), RetainWeights(features=2.0), RetainWeights(0.3, 2.0)])
def test_gradients_are_those_of_the_penalised_loss(weights):
    """In float64, over two micro-batches of unequal size: autograd of loss + W/2 |θ - θ₀|² + W mean(1 - cos)."""
    plan = [[2, 2, 2, 2], [1, 1, 1, 1]]
    model, weight, images, labels = make()
    object.__setattr__(model, "net", model)  # a backbone's network is inside it; here it is the whole
    start = copy.deepcopy([p.detach() for p in model.parameters()])
    hook = Retention(model, weights, False, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    moved = copy.deepcopy(model.state_dict())

    def batch(rows):
        return (images[:, rows].flatten(0, 1), labels[:, rows].flatten(), torch.arange(4).repeat_interleave(len(rows)))

    settings = HeadSettings(LOSSES)
    plain, _, _ = step_gradients(model, make_head(weight, settings), [batch([0, 1]), batch([2])], plan)
    held, _, _ = step_gradients(model, make_head(weight, settings), [batch([0, 1]), batch([2])], plan, hook=hook)
    model.load_state_dict(moved)
    model.zero_grad()
    everything = batch([0, 1, 2])[0]
    with torch.no_grad():
        now = [p.clone() for p in model.parameters()]
        for p, value in zip(model.parameters(), start, strict=True):
            p.copy_(value)
        target = model(everything)
        for p, value in zip(model.parameters(), now, strict=True):
            p.copy_(value)
    unit = partial(F.normalize, dim=1)
    penalty = weights.features * (1 - (unit(model(everything)) * unit(target)).sum(1)).mean()
    penalty = penalty + weights.l2sp / 2 * sum(((p - s) ** 2).sum() for p, s in
                                               zip(model.parameters(), start, strict=True))
    penalty.backward()
    for one, other, parameter in zip(held, plain, model.parameters(), strict=True):
        torch.testing.assert_close(one, other + parameter.grad, rtol=1e-6, atol=1e-8)
        assert parameter.grad.norm() > 1e-3


def test_retain_is_a_notation():
    assert RETAIN_TYPE.parse("l2sp=0.01") == (0.01, 0) and RETAIN_TYPE.parse("features=2, l2sp=1e-3") == (1e-3, 2)
    assert RETAIN_TYPE.parse(RETAIN_TYPE.show(RetainWeights(0.1, 3))) == (0.1, 3)
    for wrong in ("l2sp", "l2sp=-1", "l2sp=0", "l2sp=nan", "l2sp=1,l2sp=2", "lwf=1", "features=inf", ""):
        with pytest.raises(ValueError, match="want l2sp=W"):
            RETAIN_TYPE.parse(wrong)


def test_replay_mixes_the_domains_before():
    assert stage_shares([2], 4, 0.3).tolist() == [0, 0, 1, 0]
    assert stage_shares([2, 0, 3], 4, 0.3).tolist() == pytest.approx([0.15, 0, 0.15, 0.7])
    plan = plan_batches(Options(schedule="sequential", batch=20, images=20 * 8, replay=0.25), [range(100)] * 4)[:, 0]
    assert plan[:2].tolist() == [[20, 0, 0, 0]] * 2 and plan[2:4].tolist() == [[5, 15, 0, 0]] * 2
    assert (plan.sum(1) == 20).all() and plan[4:6].sum(0).tolist() == [5, 5, 30, 0]
    assert plan[6:].sum(0)[3] == 30
    small = plan_batches(Options(schedule="sequential", batch=4, images=400, replay=0.1), [range(100)] * 4)[:, 0]
    assert small[50:75].sum(0).tolist() == [5, 5, 90, 0]  # less than an image a batch: exact over the stage


@pytest.mark.parametrize("wrong, why", [
    (["--retain", "features=1", "--schedule", "A", "--coupling", "pcgrad"], "--retain excludes"),
    (["--retain", "features=1", "--conflict-every", "2"], "--retain excludes"),
    (["--retain", "l2sp=1", "--lora", "2"], "use features=W"),
    (["--retain", "both"], "want l2sp=W, features=W"),
    (["--replay", "0.1", "--schedule", "B"], "--replay mixes the batches of --schedule sequential"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(wrong, why, demo_root, tmp_path, capsys):
    with pytest.raises((InputError, train.click.UsageError), match=why):
        options_of(demo_root, tmp_path / "run", *wrong)


def test_penalties_hold_the_backbone(demo_root, tmp_path):
    """Held strongly, weights and embeddings stay nearer to the untouched ones; stopped and resumed, to the bit."""
    def run(name, *more):
        options = options_of(demo_root, tmp_path / name, "--schedule", "B", "--images", "64", "--head-warmup", "0",
                             "--lr", "1e-3", "--log-every", "1", *more)
        job = train.set_up(options, {})
        start = [p.detach().clone() for p in job.model.parameters()]
        train.run_steps(job)
        moved = sum(float((p.detach() - s).square().sum()) for p, s in zip(job.model.parameters(), start, strict=True))
        return moved, load_tuned(load_run(tmp_path / name)).state_dict()

    free, _ = run("free")
    assert run("l2sp", "--retain", "l2sp=100")[0] < 0.9 * free
    _, weights = run("features", "--retain", "features=100")
    run("loose", "--retain", "features=1e-9")
    l2sp, held, loose = (train.runs.read_lines(tmp_path / name / "log.jsonl")[-1]
                         for name in ("l2sp", "features", "loose"))
    assert l2sp["retain/weights"] > 0 and "retain/features" not in l2sp
    assert 0 < held["retain/features"] < 0.5 * loose["retain/features"]
    options = options_of(demo_root, tmp_path / "again", "--schedule", "B", "--images", "64", "--head-warmup", "0",
                         "--lr", "1e-3", "--log-every", "1", "--retain", "features=100")
    job = train.set_up(options, {})
    (tmp_path / "again" / "STOP").touch()
    assert train.run_steps(job) == train.runs.STOPPED
    (tmp_path / "again" / "STOP").unlink(missing_ok=True)
    options.resume = True
    assert train.run_steps(train.set_up(options, {})) == 0
    again = load_tuned(load_run(tmp_path / "again")).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_ranks_share_the_penalty():
    """The gradient that one of two processes computes is twice its half of the whole: DDP averages them."""
    model, _, images, _ = make()
    object.__setattr__(model, "net", model)
    hooks = [Retention(model, RetainWeights(features=1.0), False, world) for world in (1, 2)]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    found = []
    for hook in hooks:
        hook.begin()
        x = model(images[0])
        result = type("Result", (), {"loss": torch.zeros((), dtype=x.dtype)})
        hook.backward(result, images[0], (x, None, None, torch.tensor([2 * len(x)]), 0.0), [])
        found.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for alone, shared in zip(*found, strict=True):
        torch.testing.assert_close(2 * alone, shared)
    assert Ranks().world == 1 and np.isfinite(float(hooks[0].distance))
