"""The schedule: what is drawn when, and that A and B couple the gradients alike."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import train
from data_prep import InputError, MixRamp
from data_prep.stream import Order, interleave, random_boxes
from models.backbones import Network, load_backbone
from models.head import HeadSettings, Loss, MarginHead
from models.runs import Ranks
from reports.training import mean_pairwise_cosine
from train import Options, blend_counts, plan_batches, ramp_up, rate, shares_at

# of the four domains; every value differs from some other one
LOSSES = [Loss(30.0, angular=0.1), Loss(64.0, 0.35, 0.1, weight=2.0), Loss(64.0, 0.2, 0.1, weight=0.5),
          Loss(64.0, 0.1, 0.1)]


class Net(nn.Sequential):
    """A small float64 network from images [B, 3, S, S] to embeddings, with what a step asks of a backbone."""

    def __init__(self, side: int, hidden: int, dim: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * side**2, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dim = dim
        self.double()

    def layers(self) -> dict[str, int]:
        return {name: int(name[0]) // 2 for name, p in self.named_parameters() if p.requires_grad}


def make_head(weight: Tensor, settings: HeadSettings, ranks: Ranks = Ranks(), shard: bool = False) -> MarginHead:
    """A head in the precision of `weight` [C, D], with as many classes in every domain."""
    classes = [len(weight) // len(settings.losses)] * len(settings.losses)
    head = MarginHead(classes, weight.shape[1], settings, ranks=ranks, shard=shard).to(weight.dtype)
    head.set_whole(weight)
    return head


class Gradients(torch.optim.SGD):
    """Takes no step, but keeps the gradients that it was to take one with; those of the class weights come last."""

    def step(self) -> None:
        self.kept = [p.grad for group in self.param_groups for p in group["params"]]


def step_gradients(model: Net, head: MarginHead, batches: list[tuple], plan: list[list[int]], *, hook=None,
                   tune_backbone: bool = True) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """(gradients of the backbone, of the head, totals) of one step of training that is not clipped.

    Args:
        batches: (images, labels, domains) of this rank's micro-batches.
        plan: images of each domain in each batch of the step.
    """
    options, plan = Options(margin_ramp=0.0, head_warmup=0.0 if tune_backbone else 1.0), np.array([plan])
    optimizer = Gradients([{"params": list(model.parameters()), "scale": 1.0}, {"params": [head.weight], "scale": 1.0}])
    job = train.Job(options, Path(), torch.device("cpu"), head.ranks, [None] * plan.shape[2], plan,
                    torch.from_numpy(plan.sum(1)), model, head, optimizer, torch.zeros(2, dtype=torch.int64), hook=hook)
    net = nn.parallel.DistributedDataParallel(model) if head.ranks.world > 1 else model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CLIP", float("inf"))
        total = train.take_step(job, net, batches, 0, len(batches))
    *backbone, own = optimizer.kept
    return backbone, own, total


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5), st.integers(1, 300))
def test_blend_counts_are_exact_and_never_negative(weights, batch):
    shares = np.array(weights) / sum(weights)
    counts = blend_counts([shares] * 300, batch)
    assert (counts >= 0).all() and (counts.sum(1) == batch).all()
    error = np.cumsum(counts, 0) - batch * shares * np.arange(1, 301)[:, None]
    assert np.abs(error).max() < len(shares)  # carried from batch to batch, never drifting


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum))
def test_interleaving_loses_no_image(counts):
    domain, number = interleave(np.array(counts))
    for d, n in enumerate(counts):
        assert number[domain == d].tolist() == list(range(n))


def test_blend_counts_follow_a_ramp():
    ramp = (0, 1.0, 0.25, 0.5)
    shares = np.full(4, 0.25)
    counts = blend_counts([shares_at(s / 1000, shares, ramp) for s in range(1000)], 40)
    assert (counts >= 0).all() and (counts.sum(1) == 40).all()
    assert counts[0].tolist() == [40, 0, 0, 0] and (counts[600:] == 10).all()
    expected = sum(40 * shares_at(s / 1000, shares, ramp)[1] for s in range(1000))
    assert abs(counts[:, 1].sum() - expected) <= 2


def test_plan_of_every_schedule():
    def plan(name, steps):
        options = Options(schedule=name, domains=["body", "object", "face_lq", "face_hq"], batch=64, images=64 * steps)
        return plan_batches(options, [range(100)] * 4)

    a = plan("A", 3)
    assert a.shape == (3, 4, 4) and (a.sum(1) == 16).all() and ((a > 0).sum(2) == 1).all()
    assert plan("B", 3).shape == (3, 1, 4) and (plan("B", 3) == 16).all()
    assert (plan("alternate", 5).sum((1, 2)) == 64).all() and (plan("sequential", 8).sum((1, 2)) == 64).all()
    assert plan("alternate", 5)[:, 0].argmax(1).tolist() == [0, 1, 2, 3, 0]
    assert plan("sequential", 8)[:, 0].argmax(1).tolist() == [3, 3, 0, 0, 2, 2, 1, 1]  # in the order of --domains
    with pytest.raises(InputError, match=r"62 cannot be divided among 4 domains .* use 60"):
        plan_batches(Options(schedule="A", batch=62), [range(100)] * 4)


def test_length_and_shares_by_hand():
    """Sizes 900 and 100: T = 0.5 makes shares 30 : 10; an epoch is 900 images of the first, 1,200 in all."""
    options = {"domains": ["object", "body"], "batch": 40}
    sizes = [range(900), range(100)]
    plan = plan_batches(Options(**options, epochs=1.0), sizes)
    assert plan.shape == (30, 1, 2) and (plan[:, 0] == [30, 10]).all()
    assert len(plan_batches(Options(**options), sizes)) == 300  # ten epochs
    assert (plan_batches(Options(**options, images=80, mix=0.0), sizes) == 20).all()
    assert (plan_batches(Options(**options, images=80, mix=1.0), sizes) == [36, 4]).all()
    named = Options(**options, images=80, mix={"body": 3.0, "object": 1.0, "face_hq": 9.0})
    assert (plan_batches(named, sizes) == [10, 30]).all()  # of the domains that are trained
    ramp = Options(**options, images=160, mix_ramp=MixRamp("body", 1.0, 0.5, 0.5))
    assert plan_batches(ramp, sizes)[:, 0].tolist() == [[0, 40], [10, 30], [20, 20], [20, 20]]
    assert plan_batches(Options(**options, epochs=1.0, mix={"object": 0.0, "body": 1.0}), sizes).sum() == 100 // 40 * 40


def test_interleave_spreads_every_domain_over_the_batch():
    domain, number = interleave(np.array([8, 4, 0, 4]))
    for d, n in enumerate([8, 4, 0, 4]):
        assert sorted(number[domain == d]) == list(range(n))
    for quarter in np.split(domain, 4):
        assert np.bincount(quarter, minlength=4).tolist() == [2, 1, 0, 1]


@pytest.mark.parametrize("sizes", [[10], [7, 7, 3], [5] * 11])
def test_an_epoch_visits_every_row_once_in_an_order_of_its_own(sizes):
    def drawn(seed: int, numbers) -> list[tuple[int, int]]:
        epoch, row = Order(sizes, seed, 1, window=4)(np.array(numbers))
        return list(zip(epoch.tolist(), row.tolist(), strict=True))

    total = sum(sizes)
    epochs = [drawn(3, range(e * total, (e + 1) * total)) for e in range(3)]
    for e, rows in enumerate(epochs):
        assert {epoch for epoch, _ in rows} == {e} and sorted(row for _, row in rows) == list(range(total))
    assert [row for _, row in epochs[0]] != [row for _, row in epochs[1]]
    order = Order(sizes, 3, 1, window=4)
    backwards = [tuple(v.item() for v in order(np.array([n]))) for n in reversed(range(3 * total))][::-1]
    assert backwards == [*epochs[0], *epochs[1], *epochs[2]]  # a function of n alone, not of what was asked before
    assert drawn(4, range(total)) != epochs[0]


def test_a_window_keeps_reading_local():
    rows = Order([10] * 20, 0, 0, window=2)(np.arange(200))[1]
    for start in range(0, 200, 20):
        assert len({row // 10 for row in rows[start : start + 20]}) == 2


def test_crops_stay_inside_and_keep_their_area():
    u = np.random.default_rng(0).random((500, 4))
    x0, y0, x1, y1 = random_boxes(u, 80, 0.4, 0.6, 4 / 3).T
    assert ((x0 >= 0) & (x0 < x1) & (x1 <= 80) & (y0 >= 0) & (y0 < y1) & (y1 <= 80)).all()
    assert ((x1 - x0) * (y1 - y0) >= 0.4 * 6400 * 0.75).all()  # a clipped side may cost some of the drawn area
    assert (random_boxes(u, 80, 1.0, 0.0, 1) == (0, 0, 80, 80)).all()


def test_rates_and_ramps_in_closed_form():
    assert rate(0, 100, 0.1) == pytest.approx(0.1) and rate(50, 100, 0.1) == pytest.approx(0.01 + 0.99 / 2)
    assert rate(100, 100, 0.1) == pytest.approx(0.01) and rate(0, 100, 0.0) == 1
    # in 3 stages of 10 steps, which start at steps 0, 4 and 7
    stage = 10 / 3
    assert [rate(step, 10, 0.0, 3) for step in range(10)] == pytest.approx(
        [0.01 + 0.99 * (1 + np.cos(np.pi * i / stage)) / 2 for i in (0, 1, 2, 3, 0, 1, 2, 0, 1, 2)])
    assert rate(4, 10, 0.9, 3) == pytest.approx(1 / (0.9 * stage))
    assert [ramp_up(p, 0.5) for p in (0, 0.25, 0.5, 1)] == [0, 0.5, 1, 1] and ramp_up(0.0, 0.0) == 1


@pytest.mark.parametrize("coupling", ["domain", "sample"])
@pytest.mark.parametrize("margins", ["with margins", "plain"])
def test_A_and_B_have_the_same_gradient_on_the_same_images(coupling, margins):
    """The invariant of the design: at equal shares a step of A equals a step of B to rounding, in float64."""
    torch.manual_seed(0)
    K, per, C = 4, 6, 5
    images, labels = torch.randn(K, per, 3, 8, 8, dtype=torch.float64), torch.randint(0, C, (K, per))
    losses = LOSSES if margins == "with margins" else [Loss(loss.scale, weight=loss.weight) for loss in LOSSES]
    model = Net(8, 24, 16)
    head = make_head(torch.randn(K * C, 16, dtype=torch.float64), HeadSettings(losses, coupling=coupling))

    def gradient(batches, plan=([per] * K,)):
        backbone, own, total = step_gradients(model, head, batches, plan)
        return [*backbone, own], total

    a, total_a = gradient([(images[k], labels[k], torch.full((per,), k)) for k in range(K)], np.eye(K, dtype=int) * per)
    domain, number = map(torch.from_numpy, interleave(np.full(K, per)))
    b, total_b = gradient([(images[domain, number], labels[domain, number], domain)])
    parts = zip(domain.split(7), number.split(7), strict=True)
    micro, _ = gradient([(images[d, n], labels[d, n], d) for d, n in parts])
    for x, y, z in zip(a, b, micro, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(x, z, rtol=1e-10, atol=1e-13)
    assert total_a["loss"] == pytest.approx(float(total_b["loss"]), rel=1e-6) and max(g.abs().max() for g in a) > 1e-6
    # and it matters that the denominators are those of the whole step: a domain with half the samples weighs as much
    sizes = [6, 3, 3, 3]
    fewer, _ = gradient([(images[k, :n], labels[k, :n], torch.full((n,), k)) for k, n in enumerate(sizes)])
    assert not torch.allclose(fewer[0], b[0], rtol=1e-3)


def test_frozen_batchnorm_makes_samples_independent():
    """No layer may mix the samples of a batch: the invariant above depends on it."""
    model = load_backbone(Network(None, model="test_efficientnet", weights="none", image_size=64)).train()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[:2], model(images[:2]), rtol=1e-4, atol=1e-5)


def test_mean_pairwise_cosine():
    x = torch.nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1)
    pairs = [float(x[i] @ x[j]) for i in range(7) for j in range(7) if i != j]
    assert float(mean_pairwise_cosine(x.sum(0), torch.tensor(7.0))) == pytest.approx(np.mean(pairs))
