"""--sample-classes (Partial FC): a step's loss over drawn classes, and what it leaves alone."""

import itertools
import os
from types import SimpleNamespace

import click
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train
from kernels.margin_loss import sample_classes
from models.head import HeadSettings
from models.runs import Ranks
from tests.conftest import TINY, script
from tests.test_coupling import options_of
from tests.test_distributed import PLANS, C, K, assert_near, deal, dealt, in_whole, make, torchrun
from tests.test_interrupted_training import stop_at
from tests.test_schedule import LOSSES, make_head, step_gradients
from tests.test_train import assert_same_weights, run_here

PLAN = PLANS["B, uneven"]
CLASSES = 40  # a domain: more than the images of a step, so that something is left to draw
SHARES = [0.5, 1, 0.6, 0.1]


def class_weights() -> torch.Tensor:
    return torch.randn(K * CLASSES, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(rank: int, world: int, micro: int, sharded: bool, negatives: str) -> tuple:
    """(gradients of the backbone, of the whole head, rows that were drawn, loss) of one step on this rank."""
    model, _, images, labels = make()
    settings = HeadSettings(LOSSES, SHARES, negatives=negatives, seed=3)
    head = make_head(class_weights(), settings, Ranks(rank, world), sharded)
    pictures, targets, domains = zip(*dealt(PLAN, rank, world, micro, images, labels), strict=True)
    spread = [torch.where(target >= 0, target * (CLASSES // C), -1) for target in targets]
    targets, begin = head.draw_classes(7, spread, list(domains))
    begin()
    batches = list(zip(pictures, targets, domains, strict=True))
    backbone, own, total = step_gradients(model, head, batches, PLAN)
    rows = head.step_rows.rows if head.rows is None else head.rows[head.step_rows.rows]
    return backbone, in_whole(own, rows, K * CLASSES), rows, total["loss"]


def reference(negatives: str) -> tuple:
    """The same step, literally: a cross-entropy per sample over the classes of the draw."""
    model, _, images, labels = make()
    weight = class_weights().requires_grad_()
    (domains, numbers, _), = deal(PLAN, 0, 1, 100)
    label = labels[domains, numbers] * (CLASSES // C)
    ranges = [(k * CLASSES, (k + 1) * CLASSES) for k in range(K)]
    rows, _, kept = sample_classes(label, torch.tensor(domains), ranges, SHARES, seed=3, step=7, minimum=0)
    assert [b - a for a, b in kept] == [20, 40, 24, 17]  # 17: as many as there are images in the step
    drawn, loss = set(rows.tolist()), 0.0
    x = nn.functional.normalize(model(images[domains, numbers]), dim=1)
    for i, d in enumerate(domains):
        own = d * CLASSES + int(label[i])
        domain = range(K * CLASSES) if negatives == "all" else range(*ranges[d])
        others = [row for row in domain if row in drawn]
        assert own in others
        cos = x[i] @ nn.functional.normalize(weight[others], dim=1).T
        place = others.index(own)
        target = (cos[place].clamp(-1, 1).arccos() + LOSSES[d].angular).cos() - LOSSES[d].additive
        logits = LOSSES[d].scale * torch.where(torch.arange(len(others)) == place, target, cos)
        loss = loss - LOSSES[d].weight * logits.log_softmax(0)[place] / (K * PLAN[0][d])
    loss.backward()
    return [p.grad for p in model.parameters()], weight.grad, rows, loss.detach()


def assert_same_step(found: tuple, expected: tuple, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
    torch.testing.assert_close(found[1][found[2]], expected[1][found[2]], rtol=rtol, atol=atol)
    assert expected[1].abs().max() > 1e-6


@pytest.mark.parametrize("negatives", ["own", "all"])
@pytest.mark.parametrize("micro", [100, 2])
def test_the_gradient_is_that_of_a_softmax_over_the_drawn_classes(micro, negatives):
    found, expected = step(0, 1, micro, False, negatives), reference(negatives)
    assert_same_step(found, expected, rtol=1e-5, atol=1e-7)  # scales and margins are float32 in a run
    assert torch.equal(found[2], expected[2]) and float(found[3]) == pytest.approx(float(expected[3]), rel=1e-5)


def on_rank(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for sharded, micro in itertools.product((False, True), (100, 2)):
        torch.save(step(rank, world, micro, sharded, "own"), f"{folder}/{sharded}-{micro}-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort an interpreter that is torn down


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_draw_the_classes_of_one_process(world, tmp_path):
    """The head replicated and sharded, in one and in several micro-batches: 17 images, which no world divides."""
    torch.multiprocessing.spawn(on_rank, (world, str(tmp_path)), nprocs=world)
    expected = step(0, 1, 100, False, "own")
    for sharded, micro in itertools.product((False, True), (100, 2)):
        found = [torch.load(tmp_path / f"{sharded}-{micro}-{rank}.pt") for rank in range(world)]
        for mine in found:
            assert_same_step(mine, expected)
        rows = torch.cat([mine[2] for mine in found]).sort().values
        assert torch.equal(rows if sharded else found[0][2], expected[2])
        assert float(sum(mine[3] for mine in found)) == pytest.approx(float(expected[3]), rel=1e-5)


SOME = ["--sample-classes", "object=1,face_hq=0.4,face_lq=1,body=0.4"]
FEW = [*TINY, "--batch", "8", "--domains", "face_hq,body", "--head-warmup", "0", "--margin-ramp", "0"]


def test_classes_that_are_not_drawn_stay_as_they_are(demo_root, tmp_path):
    """Bit for bit: neither decay nor momentum moves them, and what their moments had gathered stays too."""
    job = train.set_up(options_of(demo_root, tmp_path / "run", *FEW, *SOME, "--ema", "0.5"), {})
    feed, forward = train.make_feed(job), train.make_forward(job)
    feed.start(0)
    weight, state = job.head.weight, job.optimizer.state[job.head.weight]
    classes, seen = len(weight), torch.zeros(len(weight), dtype=torch.bool)
    for number in range(6):
        before = weight.detach().clone()
        moments = {key: v.clone() for key, v in state.items() if v.ndim}
        train.take_step(job, forward, feed.next_step(), number, 1)
        drawn = torch.zeros(classes, dtype=torch.bool)
        drawn[job.head.step_rows.rows] = True
        assert drawn.sum() == 20 and weight.shape == before.shape and state["exp_avg"].shape == before.shape
        assert torch.equal(weight[~drawn], before[~drawn]) and not (weight[drawn] == before[drawn]).all(1).any()
        for key, value in moments.items():
            assert torch.equal(state[key][~drawn], value[~drawn]) and not torch.equal(state[key][drawn], value[drawn])
        assert (state["exp_avg"][~drawn & ~seen] == 0).all()
        assert (state["exp_avg"][~drawn & seen].abs().sum(1) > 0).all()
        seen |= drawn
    assert not torch.equal(job.average.values[-1], weight)


def test_where_all_are_drawn_nothing_changes(demo_root, tmp_path):
    """Once with --sample-classes off, once with so many images in a step that every class is drawn."""
    common = [*TINY, "--batch", "32", "--images", "128", "--domains", "face_hq,body", "--data", demo_root]
    run_here(*common, "--out", tmp_path / "off")
    run_here(*common, *SOME, "--out", tmp_path / "all")
    assert_same_weights(tmp_path / "off", tmp_path / "all")
    run_here(*common, "--sample-classes", "0.1", "--out", tmp_path / "few")  # no domain has 10,000 classes
    assert_same_weights(tmp_path / "off", tmp_path / "few")


def test_a_sampled_run_resumes_bit_for_bit(demo_root, tmp_path):
    common = [*FEW, *SOME, "--data", demo_root, "--images", "80", "--save-every", "4", "--ema", "0.9"]
    run_here(*common, "--out", tmp_path / "whole")
    assert stop_at(tmp_path / "run", common, 4)["step"] == 4
    run_here(*common, "--out", tmp_path / "run", "--resume")
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    states = [torch.load(tmp_path / name / "last/state.pt", weights_only=True) for name in ("whole", "run")]
    moments = [state["optimizer"]["state"][max(state["optimizer"]["state"])] for state in states]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in moments[0])
    run_here(*[o if o != SOME[1] else "1" for o in common], "--out", tmp_path / "all")
    heads = [load_file(tmp_path / name / "head.safetensors")["weight"] for name in ("whole", "all")]
    assert not torch.equal(*heads)


def test_two_processes_draw_what_one_draws(demo_root, tmp_path):
    common = [*FEW, *SOME, "--data", demo_root, "--images", "48", "--schedule", "A"]
    script("train.py", *common, "--out", tmp_path / "one")
    torchrun(2, *common, "--out", tmp_path / "two", "--shard-head")
    assert_near(tmp_path / "two", tmp_path / "one")


def test_one_number_is_for_domains_of_many_classes():
    def shares(value, *classes):
        options = train.Options(domains=["object", "body"], sample_classes=value)
        return train.head_settings(options, [SimpleNamespace(classes=range(n)) for n in classes]).class_share

    assert shares(0.1, 9_999, 10_000) == [1.0, 0.1]
    assert shares({"object": 0.2, "body": 1.0}, 50, 10_000) == [0.2, 1.0]


@pytest.mark.parametrize("value, words", [
    ("0", "'0': 0; want 1e-06 to 1"), ("body=1.5", "body is 1.5; want 1e-06 to 1"),
    ("object=0.1", "--sample-classes: no value for face_hq"), ("object=1,object=1", "names a domain twice"),
])  # fmt: skip
def test_bad_shares_are_refused(value, words, demo_root, tmp_path):
    with pytest.raises(click.ClickException) as error:
        run_here(*TINY, "--sample-classes", value, "--data", demo_root, "--out", tmp_path / "run")
    assert words in error.value.format_message() and "\n" not in error.value.format_message()
