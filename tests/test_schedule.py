"""The schedule: what is drawn when, and that A and B couple the gradients alike."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import backbones
import train
from data_prep import DOMAINS, InputError
from data_prep.stream import Order, interleave, random_box
from train_options import per_domain
from train_report import mean_pairwise_cosine
from train_schedule import blend_counts, make_schedule, plan_batches, ramp, rate, shares_at

CONFIG = {"schedule": "B", "domains": list(DOMAINS), "order": None, "coupling": "domain", "batch": 64}
LOSS = {"scale": "object=30,face_hq=64,face_lq=64,body=64",
        "margin_additive": "object=0,face_hq=0.35,face_lq=0.2,body=0.1",
        "margin_angular": "0.1", "domain_weight": "object=1,face_hq=2,face_lq=0.5,body=1", "label_smoothing": "0",
        "margin_adaptive": "0", "margin_gradient": "exact"}


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
    shares = np.full(4, 0.25)

    def plan(name, steps):
        schedule = make_schedule(name, 4, 64)
        return plan_batches(CONFIG | {"schedule": name, "order": ["body", "object", "face_lq", "face_hq"]},
                            schedule, steps, shares)

    a = plan("A", 3)
    assert a.shape == (12, 4) and (a.reshape(3, 4, 4).sum(1) == 16).all() and ((a > 0).sum(1) == 1).all()
    assert (plan("B", 3) == 16).all()
    assert plan("alternate", 5).argmax(1).tolist() == [0, 1, 2, 3, 0] and (plan("alternate", 5).sum(1) == 64).all()
    assert plan("sequential", 8).argmax(1).tolist() == [3, 3, 0, 0, 2, 2, 1, 1]
    with pytest.raises(InputError, match=r"62 cannot be dealt to 4 domains .* take 60"):
        make_schedule("A", 4, 62)


def test_interleave_spreads_every_domain_over_the_batch():
    domain, number = interleave(np.array([8, 4, 0, 4]))
    for d, n in enumerate([8, 4, 0, 4]):
        assert sorted(number[domain == d]) == list(range(n))
    for quarter in np.split(domain, 4):
        assert np.bincount(quarter, minlength=4).tolist() == [2, 1, 0, 1]


@pytest.mark.parametrize("sizes", [[10], [7, 7, 3], [5] * 11])
def test_an_epoch_visits_every_row_once_in_an_order_of_its_own(sizes):
    order, total = Order(sizes, 3, 1, window=4), sum(sizes)
    epochs = [[order(n) for n in range(e * total, (e + 1) * total)] for e in range(3)]
    for e, rows in enumerate(epochs):
        assert {epoch for epoch, _ in rows} == {e} and sorted(row for _, row in rows) == list(range(total))
    assert [row for _, row in epochs[0]] != [row for _, row in epochs[1]]
    again = Order(sizes, 3, 1, window=4)
    backwards = [again(n) for n in reversed(range(3 * total))][::-1]
    assert backwards == [*epochs[0], *epochs[1], *epochs[2]]  # a function of n alone, not of what was asked before
    assert [Order(sizes, 4, 1, 4)(n) for n in range(total)] != epochs[0]


def test_a_window_keeps_reading_local():
    rows = [Order([10] * 20, 0, 0, window=2)(n)[1] for n in range(200)]
    for start in range(0, 200, 20):
        assert len({row // 10 for row in rows[start : start + 20]}) == 2


def test_crops_stay_inside_and_keep_their_area():
    rng = np.random.default_rng(0)
    for _ in range(500):
        x0, y0, x1, y1 = random_box(rng, 60, 80, 0.4)
        assert 0 <= x0 < x1 <= 80 and 0 <= y0 < y1 <= 60
        assert (x1 - x0) * (y1 - y0) >= 0.4 * 4800 * 0.75  # a clipped side may cost some of the drawn area
    assert random_box(rng, 60, 80, 1.0) == (0, 0, 80, 60)


def test_rates_and_ramps_in_closed_form():
    assert rate(0, 100, 0.1, 0.0) == pytest.approx(0.1) and rate(50, 100, 0.1, 0.0) == pytest.approx(0.5)
    assert rate(100, 100, 0.1, 0.02) == pytest.approx(0.02)
    assert [ramp(p, 0.5) for p in (0, 0.25, 0.5, 1)] == [0, 0.5, 1, 1] and ramp(0.0, 0.0) == 1


def test_options_per_domain():
    config = {"domains": ["object", "body"], "scale": "object=1, body=2"}
    assert per_domain(config, "scale") == [1, 2] and per_domain({**config, "scale": "3"}, "scale") == [3, 3]
    cases = [("objects=1,body=2", "no domain 'objects'"), ("object=1", "no value for body"), ("x", "want a number")]
    for bad, words in cases:
        with pytest.raises(InputError, match=words):
            per_domain({**config, "scale": bad}, "scale")


@pytest.mark.parametrize("coupling", ["domain", "sample"])
@pytest.mark.parametrize("margins", ["with margins", "plain"])
def test_A_and_B_have_the_same_gradient_on_the_same_images(coupling, margins):
    """The invariant of the design: at equal shares a step of A equals a step of B to rounding, in float64."""
    torch.manual_seed(0)
    K, per, C = 4, 6, 5
    images, labels = torch.randn(K, per, 3, 8, 8, dtype=torch.float64), torch.randint(0, C, (K, per))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.GELU(), nn.Linear(24, 16)).double()
    head = nn.Parameter(torch.randn(K * C, 16, dtype=torch.float64))
    config = CONFIG | LOSS | {"coupling": coupling} | ({} if margins == "with margins" else {"margin_additive": "0"})
    options = train.loss_options(config, [C] * K, torch.device("cpu"))
    counts = torch.full((K,), per)

    def gradient(batches):
        total = train.accumulate(model, head, batches, counts, options)
        grads = [p.grad.clone() for p in [*model.parameters(), head]]
        for p in [*model.parameters(), head]:
            p.grad = None
        return grads, total

    a, total_a = gradient([(images[k], labels[k], torch.full((per,), k)) for k in range(K)])
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
    config = {"backbone": None, "size": "large", "model": "test_efficientnet", "weights": "none", "image_size": 64,
              "embed_dim": 0, "seed": 0}
    model = backbones.load_backbone(config).train()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[:2], model(images[:2]), rtol=1e-4, atol=1e-5)


def test_mean_pairwise_cosine():
    x = torch.nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1)
    pairs = [float(x[i] @ x[j]) for i in range(7) for j in range(7) if i != j]
    assert float(mean_pairwise_cosine(x.sum(0), torch.tensor(7.0))) == pytest.approx(np.mean(pairs))
