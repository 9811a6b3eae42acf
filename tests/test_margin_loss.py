"""The margin loss against a literal transcription of its formulas in numpy, sample by sample, in float64."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels.margin_loss import (
    Shard,
    best_impl,
    margin_loss,
    margin_loss_reference,
    margin_target,
    merge_over,
    sample_classes,
)  # fmt: skip

SIZES = [(1, 2, 3), (2, 5, 1), (17, 7, 8), (101, 13, 31)]


def case(n, classes, dim, K=3, seed=0, dtype=torch.float64):
    """Random problem with an empty domain (no samples), a domain of one class and one of many."""
    g = torch.Generator().manual_seed(seed)
    counts = [classes, 1, 2 * classes, 3][: K + 1]
    ends = np.cumsum(counts)
    ranges = [(int(e - c), int(e)) for e, c in zip(ends, counts, strict=True)]
    domains = torch.randint(0, K, (n,), generator=g)  # the last domain stays without samples
    labels = torch.tensor([int(torch.randint(0, counts[d], (1,), generator=g)) for d in domains])
    x = torch.randn(n, dim, generator=g, dtype=torch.float64).to(dtype)
    w = torch.randn(int(ends[-1]), dim, generator=g, dtype=torch.float64).to(dtype)
    return x, w, labels, domains, ranges


def literal(x, w, labels, domains, ranges, s, m_ang, m_add):
    """ℓ_i, t_i and top-1 of every sample by the textbook, with explicit loops and no care for precision but float64."""
    losses, cosines, hits = [], [], []
    for i in range(len(x)):
        start, end = ranges[domains[i]]
        cos = [np.dot(x[i], w[j]) / (np.linalg.norm(x[i]) * np.linalg.norm(w[j])) for j in range(start, end)]
        t = min(max(cos[labels[i]], -1), 1)
        theta = math.acos(t) + m_ang[i]
        if theta > math.pi:
            phi = t - m_ang[i] * math.sin(m_ang[i])
        elif theta < 0:
            phi = t + 1 - math.cos(m_ang[i])
        else:
            phi = math.cos(theta)
        logits = [s[i] * c for c in cos]
        logits[labels[i]] = s[i] * (phi - m_add[i])
        top = max(logits)
        losses.append(top + math.log(sum(math.exp(z - top) for z in logits)) - logits[labels[i]])
        cosines.append(t)
        hits.append(max(range(len(cos)), key=cos.__getitem__) == labels[i])
    return np.array(losses), np.array(cosines), np.array(hits)


@pytest.mark.parametrize("n, classes, dim", SIZES)
def test_equals_the_formulas(n, classes, dim):
    x, w, labels, domains, ranges = case(n, classes, dim)
    rng = np.random.default_rng(1)
    s, m_ang, m_add = rng.uniform(1, 64, n), rng.uniform(-1.5, 1.5, n), rng.uniform(0, 0.4, n)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    samples = {"sample_scale": torch.tensor(s), "sample_margin_angular": torch.tensor(m_ang),
               "sample_margin_additive": torch.tensor(m_add)}
    out = margin_loss(x, w, labels, domains, ranges, domain_weight=weight, **samples)
    losses, cosines, hits = literal(x.numpy(), w.numpy(), labels, domains, ranges, s, m_ang, m_add)
    of = [(domains == k).numpy() for k in range(4)]
    seen = [k for k in range(4) if of[k].any()]
    expected = sum(float(weight[k]) * losses[of[k]].mean() for k in seen) / len(seen)
    assert float(out.loss) == pytest.approx(expected, rel=1e-10)
    for k in range(4):
        value = float(out.per_domain[k])
        assert value == pytest.approx(losses[of[k]].mean(), rel=1e-10) if k in seen else math.isnan(value)
    np.testing.assert_allclose(out.target_cos, cosines, rtol=1e-10)
    assert out.correct.tolist() == hits.tolist()
    sample = margin_loss(x, w, labels, domains, ranges, reduction="sample", **samples)
    assert float(sample.loss) == pytest.approx(losses.mean(), rel=1e-10)


def test_one_value_a_domain_and_one_a_sample_are_never_mistaken():
    """As many samples as domains, the samples in the other order: by domain s = 4, 40 means 40 for the first sample."""
    x = torch.tensor([[1.0, 0], [1, 0]], dtype=torch.float64)
    w = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]], dtype=torch.float64)
    labels, domains, ranges = torch.tensor([1, 1]), torch.tensor([1, 0]), [(0, 2), (2, 4)]
    values = torch.tensor([4.0, 40.0])
    by_domain = margin_loss(x, w, labels, domains, ranges, scale=values).per_domain
    by_sample = margin_loss(x, w, labels, domains, ranges, sample_scale=values).per_domain
    # a sample on the other class: log(1 + exp(s))
    torch.testing.assert_close(by_domain, torch.tensor([4.0, 40]).double().exp().log1p())
    torch.testing.assert_close(by_sample, torch.tensor([40.0, 4]).double().exp().log1p())
    for name in ("margin_angular", "margin_additive"):
        many, few = ({"scale": 5.0, name: torch.tensor(v)} for v in ([0.1, 0.3], [0.3, 0.1]))
        one = margin_loss(x, w, labels, domains, ranges, **many).per_domain
        assert torch.equal(one, margin_loss(x, w, labels, domains, ranges, scale=5.0, **{
            f"sample_{name}": few[name]}).per_domain) and one[0] < one[1]


def test_autocast_does_not_reach_the_definition():
    x, w, labels, domains, ranges = case(20, 5, 6, dtype=torch.float32)
    plain, found = [], []
    for results, low in ((plain, False), (found, True)):
        for chunk in (None, 2):
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                out = margin_loss_reference(a, b, labels, domains, ranges, scale=30.0, class_chunk=chunk)
            out.loss.backward()
            results += [out.loss.detach(), a.grad, b.grad]
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


def test_label_smoothing_is_cross_entropy_against_soft_targets():
    x, w, labels, domains, ranges = case(40, 6, 9)
    s, eps = 12.0, torch.tensor([0.1, 0.2, 0.3, 0.0], dtype=torch.float64)
    out = margin_loss(x, w, labels, domains, ranges, scale=s, margin_additive=0.2, label_smoothing=eps)
    expected = []
    for k in range(3):
        rows = (domains == k).nonzero().flatten()
        a, b = ranges[k]
        cos = torch.nn.functional.normalize(x[rows]) @ torch.nn.functional.normalize(w[a:b]).T
        onehot = torch.nn.functional.one_hot(labels[rows], b - a).double()
        logits = s * (cos - 0.2 * onehot)
        target = (1 - eps[k]) * onehot + eps[k] / (b - a)
        expected.append(torch.nn.functional.cross_entropy(logits, target))
    assert float(out.loss) == pytest.approx(float(sum(expected) / 3), rel=1e-12)


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck(chunk, smoothing):
    x, w, labels, domains, ranges = case(12, 5, 4, seed=3)
    labels[2] = -1
    m_ang = torch.linspace(-0.3, 0.5, 12, dtype=torch.float64)

    def loss(x, w):
        return margin_loss_reference(x, w, labels, domains, ranges, scale=8.0, sample_margin_angular=m_ang,
                                     margin_additive=0.1, domain_weight=torch.tensor([1.0, 2.0, 3.0, 1.0]),
                                     label_smoothing=smoothing, class_chunk=chunk).loss

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize("angle, m", [(3.0, 0.5), (0.1, -0.4), (1.0, 0.5)])
def test_gradcheck_of_every_branch(angle, m):
    cos = torch.tensor([math.cos(angle)], dtype=torch.float64, requires_grad=True)
    m, additive = (torch.tensor([v], dtype=torch.float64) for v in (m, 0.1))
    assert torch.autograd.gradcheck(lambda c: margin_target(c, m, additive, "exact"), cos)


def test_rounding_at_the_ends_of_the_cosine():
    """A cosine past 1 is no NaN, and without an angular margin φ is the cosine to the last bit."""
    cos, zero, half = torch.tensor([1 + 2**-22, -1 - 2**-22, 1 - 2**-20]), torch.zeros(3), torch.full((3,), 0.5)
    assert margin_target(cos, half, zero, "exact").isfinite().all()
    assert margin_target(cos, zero, zero, "exact").tolist() == [1, -1, 1 - 2**-20]


def test_straight_through_changes_the_gradient_alone():
    cos = torch.tensor([-0.99, 0.2, 0.9999], requires_grad=True)
    m, zero = torch.full((3,), 0.5), torch.zeros(3)
    exact, through = (margin_target(cos, m, zero, g) for g in ("exact", "straight_through"))
    assert torch.equal(exact, through)
    assert torch.autograd.grad(through.sum(), cos)[0].tolist() == [1, 1, 1]
    assert torch.autograd.grad(exact.sum(), cos)[0][2] > 20  # unbounded as θ -> 0


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_chunks_of_classes_change_nothing(chunk):
    x, w, labels, domains, ranges = case(30, 9, 6)
    grads = []
    for size in (None, chunk):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        out = margin_loss_reference(a, b, labels, domains, ranges, scale=30.0, margin_additive=0.3, class_chunk=size)
        out.loss.backward()
        grads.append((out.loss.detach(), out.correct, a.grad, b.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 1 - 1e-7])
def test_confident_logits_keep_their_gradient_in_fp32(p):
    """The difference lse - sφ cancels to 0 in fp32 where the truth is 1e-8: the target stays out of the lse."""
    s, C = 64.0, 50
    t = 0.5
    other = (s * t + math.log((1 - p) / p / (C - 1))) / s  # every non-target cosine, so that p_y = p
    x = torch.zeros(1, C + 1, dtype=torch.float64)
    x[0, 0] = 1
    w = torch.eye(C, C + 1, dtype=torch.float64).roll(1, 1)
    w[:, 0] = other
    w[0, 0] = t
    w[:, 1:] *= torch.sqrt(1 - w[:, :1].square())
    results = []
    for dtype in (torch.float64, torch.float32):
        a, b = (v.to(dtype).clone().requires_grad_() for v in (x, w))
        out = margin_loss(a, b, torch.tensor([0]), torch.tensor([0]), [(0, C)], scale=s)
        out.loss.backward()
        results.append((out.loss.double().detach(), a.grad.double(), b.grad.double()))
    assert float(results[0][0]) == pytest.approx(-math.log(p), rel=1e-6)
    for exact, single in zip(*results, strict=True):
        torch.testing.assert_close(single, exact, rtol=3e-5, atol=1e-9 * float(exact.abs().max()))


def test_zero_vectors_and_perfect_targets_have_finite_gradients():
    w = torch.eye(4)[:3].clone()
    w[2] = 0
    x = torch.stack([torch.zeros(4), torch.eye(4)[0] * 5, -torch.eye(4)[1]]).requires_grad_()
    w.requires_grad_()
    labels, domains = torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.long)
    out = margin_loss(x, w, labels, domains, [(0, 3)], scale=64.0, margin_angular=0.5)
    out.loss.backward()
    assert torch.isfinite(out.loss) and torch.isfinite(x.grad).all() and torch.isfinite(w.grad).all()
    assert (x.grad[0] == 0).all() and (w.grad[2] == 0).all()
    assert out.target_cos.tolist() == [0, 1, -1] and out.correct.tolist() == [False, True, False]


def test_ignored_samples_and_nothing_valid():
    x, w, labels, domains, ranges = case(20, 5, 6)
    keep = torch.arange(20) % 3 > 0
    some = margin_loss(x[keep], w, labels[keep], domains[keep], ranges, scale=10.0)
    masked = margin_loss(x, w, torch.where(keep, labels, -1), domains, ranges, scale=10.0)
    assert float(some.loss) == pytest.approx(float(masked.loss), rel=1e-12)
    assert masked.target_cos.isnan().tolist() == (~keep).tolist() and not masked.correct[~keep].any()
    x.requires_grad_(), w.requires_grad_()
    nothing = margin_loss(x, w, torch.full((20,), -1), domains, ranges, scale=10.0)
    nothing.loss.backward()
    assert nothing.loss.item() == 0 and nothing.per_domain.isnan().all()
    assert (x.grad == 0).all() and (w.grad == 0).all()


def test_micro_batches_add_up_with_the_counts_of_the_step():
    x, w, labels, domains, ranges = case(31, 5, 6)
    count = torch.bincount(domains, minlength=4)
    for reduction in ("domain", "sample"):
        options = {"scale": 10.0, "reduction": reduction, "num_domains": 3}
        whole = margin_loss(x, w, labels, domains, ranges, **options)
        parts = [margin_loss(x[p], w, labels[p], domains[p], ranges, domain_count=count, **options)
                 for p in torch.arange(31).split(7)]
        assert float(sum(p.loss for p in parts)) == pytest.approx(float(whole.loss), rel=1e-12)
        total = sum(p.per_domain.nan_to_num(0) for p in parts)
        torch.testing.assert_close(total[:3], whole.per_domain[:3])


def test_overlapping_ranges_share_rows():
    x, w, labels, _, _ = case(20, 5, 6)
    half = torch.arange(20) % 2
    labels = labels % 4
    shared = margin_loss(x, w, labels, half, [(0, 6), (2, 8)], scale=10.0)
    apart = margin_loss(x, torch.cat([w[0:6], w[2:8]]), labels, half, [(0, 6), (6, 12)], scale=10.0)
    assert float(shared.loss) == pytest.approx(float(apart.loss), rel=1e-12)


def test_statistics_of_one_rank_are_merged_into_themselves():
    """A domain of one class has no non-target on any rank: -inf stays, without NaN. One of two has one."""
    group = torch.distributed.ProcessGroupGloo(torch.distributed.HashStore(), 0, 1)
    x, w, labels, domains, ranges = case(40, 2, 6)
    x.requires_grad_(), w.requires_grad_()
    seen = []

    def merge(*statistics, scale):
        before = [value.clone() for value in statistics]
        merged = merge_over(group)(*statistics, scale=scale)
        for old, value, new in zip(before, statistics, merged, strict=True):
            assert torch.equal(old, value) and torch.equal(old, new)
        seen.append(before)
        return merged

    sizes = tuple(end - start for start, end in ranges)
    options = {"scale": 20.0, "margin_additive": 0.2, "label_smoothing": 0.1}
    whole = margin_loss(x, w, labels, domains, ranges, **options)
    one = margin_loss(x, w, labels, domains, ranges, shard=Shard((0,) * len(ranges), sizes, merge), **options)
    assert len(seen) == 1 and (seen[0][0] == -math.inf).any()
    assert one.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    for mine, truth in zip(torch.autograd.grad(one.loss, (x, w)), torch.autograd.grad(whole.loss, (x, w)), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_come_back_in_the_dtype_of_their_inputs(dtype):
    x, w, labels, domains, ranges = case(20, 5, 8, dtype=dtype)
    x.requires_grad_(), w.requires_grad_()
    out = margin_loss(x, w, labels, domains, ranges, scale=30.0, margin_additive=0.3)
    (3 * out.loss).backward()
    truth_x, truth_w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    (3 * margin_loss(truth_x, truth_w, labels, domains, ranges, scale=30.0, margin_additive=0.3).loss).backward()
    assert x.grad.dtype == w.grad.dtype == dtype and out.loss.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    for grad, truth in ((x.grad, truth_x.grad), (w.grad, truth_w.grad)):
        torch.testing.assert_close(grad.double(), truth, rtol=4 * eps, atol=40 * eps * float(truth.abs().max()))


def test_sampled_classes_hold_every_label_and_little_else():
    ranges = [(0, 50), (50, 1050), (1050, 1250)]
    g = torch.Generator().manual_seed(0)
    domains = torch.randint(0, 3, (30,), generator=g)
    labels = (torch.rand(30, generator=g) * torch.tensor([50, 1000, 200])[domains]).long()
    labels[4] = -1
    draw = {"fraction": 0.1, "seed": 1, "minimum": 100}
    rows, mapped, kept = sample_classes(labels, domains, ranges, step=7, **draw)
    assert kept == [(0, 50), (50, 150), (150, 180)]  # whole: too small; a tenth; as many as there are samples
    first, first_kept = (torch.tensor([start for start, _ in r])[domains] for r in (ranges, kept))
    valid = labels >= 0
    assert torch.equal(rows[(first_kept + mapped)[valid]], (first + labels)[valid]) and mapped[4] == -1
    assert len(rows.unique()) == len(rows) == 180 and (rows[50:150].diff() > 0).all()
    again, other = (sample_classes(labels, domains, ranges, step=step, **draw)[0] for step in (7, 8))
    assert torch.equal(rows, again) and not torch.equal(rows, other)
    other = sample_classes(labels, domains, ranges, step=7, **draw | {"seed": 2})[0]
    assert not torch.equal(rows, other)
    assert sample_classes(labels, domains, ranges, step=7, **draw | {"minimum": 200})[2][2] == (150, 180)
    nobody = torch.tensor([-1])  # two domains of one size draw different classes
    pair = sample_classes(nobody, torch.tensor([0]), [(0, 500), (500, 1000)], step=7, **draw)[0]
    assert len(pair) == 100 and not torch.equal(pair[:50], pair[50:] - 500)
    whole = sample_classes(labels, domains, ranges, fraction=1.0, seed=1, step=0)
    assert torch.equal(whole[0], torch.arange(1250)) and torch.equal(whole[1], labels)
    with pytest.raises(ValueError, match="fraction=0"):
        sample_classes(labels, domains, ranges, 0, seed=0, step=0)
    # rows that are not drawn get no gradient, the others that of the loss over the drawn ones
    x, w = torch.randn(30, 8, generator=g), torch.randn(1250, 8, generator=g).requires_grad_()
    margin_loss(x, w[rows], mapped, domains, kept, scale=10.0).loss.backward()
    drawn = torch.zeros(1250, dtype=torch.bool)
    drawn[rows] = True
    assert (w.grad[~drawn] == 0).all() and (w.grad[drawn].abs().sum(1) > 0).all()


def test_random_classes_are_drawn_evenly():
    """Every class without a sample is drawn with the same chance: 8 of 96 others, over 3,000 steps."""
    labels, domains = torch.tensor([5, 17, 17, 80, 99]), torch.zeros(5, dtype=torch.long)
    times = torch.zeros(100)
    for step in range(3000):
        times[sample_classes(labels, domains, [(0, 100)], 0.12, seed=0, step=step, minimum=0)[0]] += 1
    others = torch.ones(100, dtype=torch.bool)
    others[labels] = False
    assert (times[labels] == 3000).all() and times.sum() == 36000
    expected = 3000 * 8 / 96  # binomial: standard deviation 15.1
    assert (times[others] - expected).abs().max() < 5 * 15.1


def test_triton_says_what_it_needs(monkeypatch):
    call = {"embeddings": torch.randn(2, 4), "weight": torch.randn(5, 4), "labels": torch.tensor([0, 1]),
            "domains": torch.tensor([0, 1]), "class_ranges": [(0, 3), (3, 5)], "scale": 10.0, "impl": "triton"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotImplementedError, match=r"not torch\.float64"):
        margin_loss(**call | {"embeddings": torch.randn(2, 4).double()})
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(NotImplementedError, match="needs tensors on a GPU"):
        margin_loss(**call)
    on_gpu, old = SimpleNamespace(is_cuda=True, dtype=torch.float32, device="cuda:1"), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: old.append(device) or (7, 5))
    assert best_impl("auto", on_gpu, call["weight"], 2) == "torch" and old == ["cuda:1"]
    with pytest.raises(NotImplementedError, match="compute capability 8"):
        best_impl("triton", on_gpu, call["weight"], 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert best_impl("auto", on_gpu, call["weight"], 2) == "triton"
    assert best_impl("auto", on_gpu, call["weight"], 65) == best_impl("torch", on_gpu, call["weight"], 2) == "torch"
    monkeypatch.setattr("kernels.margin_loss.find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match="Triton is not installed"):
        margin_loss(**call)
    assert torch.isfinite(margin_loss(**call | {"impl": "auto"}).loss)


@pytest.mark.parametrize("name", ["margin_loss", "gather"])
def test_the_files_work_elsewhere(name, tmp_path):
    """Copied into another package, with the files that they name."""
    source = Path(__file__).parent.parent / "kernels"
    (tmp_path / "mine").mkdir()
    for file in [f"{name}.py", *set(re.findall(r"\b\w+\.py", "\n".join(
            (source / f"{name}.py").read_text().splitlines()[:3])))]:
        (tmp_path / "mine" / file).write_text((source / file).read_text())
    call = {"margin_loss": "margin_loss(torch.ones(2, 3), torch.eye(3), torch.tensor([0, 1]), torch.tensor([0, 0]), "
                           "[(0, 3)], scale=1.0, impl='triton')",
            "gather": "gather_interleaved([torch.zeros(1, 4, 4, 3, dtype=torch.uint8)], torch.tensor([0]), "
                      "torch.tensor([0]), size=4, mean=(0,) * 3, std=(1,) * 3, impl='triton')"}[name]
    subprocess.run([sys.executable, "-c", f"import torch; from mine.{name} import *; {call}"], cwd=tmp_path, check=True,
                   env=os.environ | {"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("change, error, words", [
    ({"impl": "cuda"}, ValueError, "auto, triton, torch"),
    ({"reduction": "mean"}, ValueError, "reduction='mean'"),
    ({"gradient": "none"}, ValueError, "gradient='none'"),
    ({"scale": None}, ValueError, "scale is missing"),
    ({"scale": torch.ones(3)}, ValueError, r"scale is \(3,\): want a number or \[2\].*sample_scale"),
    ({"sample_margin_angular": torch.ones(3)}, ValueError, "sample_margin_angular: want a tensor of one value"),
    ({"label_smoothing": torch.ones(3)}, ValueError, "label_smoothing is"),
    ({"class_ranges": []}, ValueError, "the 2 samples have no domain"),
    ({"shard": Shard((0,), (5,))}, ValueError, "shard has 1 starts"),
    ({"labels": torch.tensor([0, 9])}, ValueError, "sample 1: label 9 is not one of the 2 classes"),
    ({"labels": torch.tensor([-2, 0])}, ValueError, "sample 0: label -2"),
    ({"labels": torch.tensor([0])}, ValueError, "want one of each for 2 samples"),
    ({"domains": torch.tensor([0, 2])}, ValueError, "want 0..1"),
    ({"class_ranges": [(0, 3), (3, 9)]}, ValueError, r"class range 1 is \(3, 9\)"),
    ({"weight": torch.randn(5, 7)}, ValueError, r"want \[C, 4\]"),
])  # fmt: skip
def test_bad_arguments(change, error, words):
    call = {"embeddings": torch.randn(2, 4), "weight": torch.randn(5, 4), "labels": torch.tensor([0, 1]),
            "domains": torch.tensor([0, 1]), "class_ranges": [(0, 3), (3, 5)], "scale": 10.0}
    assert torch.isfinite(margin_loss(**call).loss)
    with pytest.raises(error, match=words):
        margin_loss(**call | change)
