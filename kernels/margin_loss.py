"""The multi-domain margin loss: a softmax over the classes of each sample's own domain, all domains in one call.
Copy with it: for GPUs kernels/margin_triton.py and kernels/margin_plan.py, into one package.

`margin_loss_reference` is the definition, the fallback on every device and the oracle of the tests.
"""

import hashlib
import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TINY = 1e-12  # |x|² below which a vector counts as zero and has no gradient
CLASS_CHUNK = 16384  # classes whose logits the fallback holds at once
TRITON_EMBEDDINGS = (torch.bfloat16, torch.float16, torch.float32)
TRITON_WEIGHTS = (torch.float32, torch.bfloat16)
TRITON_DOMAINS = 64  # one program counts all domains


class MarginLoss(NamedTuple):
    """The result of `margin_loss`; all fields but `loss` are detached."""

    loss: Tensor  # scalar
    per_domain: Tensor  # [K] sum of the domain's losses / n_d, unweighted; NaN without a valid sample in this call
    target_cos: Tensor  # [N] cosine to the target class, without margin; NaN where the label is -1
    correct: Tensor  # [N] bool: the target class has the highest cosine (without margin); False where ignored


class Shard(NamedTuple):
    """The slice of every domain's classes that this rank holds, and how statistics are merged over ranks.

    Every rank calls `margin_loss` with the samples of ALL ranks and its own rows of the class weights. All ranks get
    the same loss and `correct`; each gets the gradient of its rows and its part of the embeddings' gradient, which is
    summed over ranks.
    """

    start: tuple[int, ...]  # [K] number, among the domain's classes, of the first class of this rank
    total: tuple[int, ...]  # [K] classes of the domain over all ranks; labels count over these
    merge: Callable | None = None  # see `merge_over`


def merge_over(group=None) -> Callable:
    """The `merge` of a Shard by all-reduce over a process group.

    A merge takes and returns four tensors [N]: the best non-target cosine (-inf: none), Σ exp(s (c - best)) and Σ s c
    over the non-targets, and the target cosine (-inf: on another rank). It also takes the scale s [N].
    """

    def merge(best: Tensor, mass: Tensor, total: Tensor, target: Tensor, scale: Tensor):
        top = best.clone()
        torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=group)
        rescaled = torch.where(best == -math.inf, 0.0, mass * (scale * (best - top)).exp())
        sums = torch.stack([rescaled, total])
        torch.distributed.all_reduce(sums, group=group)
        target = target.clone()
        torch.distributed.all_reduce(target, torch.distributed.ReduceOp.MAX, group=group)
        return top, sums[0], sums[1], target

    return merge


# ---------------------------------------------------------------- reference


def unit(x: Tensor) -> Tensor:
    """Rows of x [N, D] divided by their lengths; rows with |x|² < 1e-12 become 0 with gradient 0."""
    square = x.square().sum(1, keepdim=True)
    nonzero = square >= TINY
    return x * torch.where(nonzero, torch.where(nonzero, square, 1.0).rsqrt(), 0.0)


def margin_target(cos: Tensor, m_ang: Tensor, m_add: Tensor, gradient: str) -> Tensor:
    """φ(t) of the target cosines [n]: the cosine with its margin, with an explicit derivative.

    t = cos clamped to [-1, 1], θ = arccos t:
        φ = cos(θ + m_ang) - m_add               φ' = cos m + t sin m / √max(1 - t², 1e-6)   0 <= θ + m_ang <= π
        φ = t - m_ang sin(m_ang) - m_add         φ' = 1                                      above π
        φ = t + 1 - cos(m_ang) - m_add           φ' = 1                                      below 0
    gradient="straight_through": φ' = 1 everywhere, as in arcface_torch.
    """
    with torch.no_grad():  # autograd through arccos would give infinities at |t| = 1
        t = cos.clamp(-1, 1)
        angle = t.arccos() + m_ang
        inside = (angle >= 0) & (angle <= math.pi)
        beyond = torch.where(angle > 0, -m_ang * m_ang.sin(), 1 - m_ang.cos())
        value = torch.where(inside, angle.cos(), t + beyond)
        # without an angular margin φ is t itself: cos(arccos t) would lose half of t's digits near 1
        value = torch.where(m_ang == 0, t, value)
        slope = m_ang.cos() + t * m_ang.sin() / (1 - t.square()).clamp(min=1e-6).sqrt()
        slope = torch.where(inside, slope, 1.0)
        if gradient == "straight_through":
            slope = torch.ones_like(slope)
    return value - m_add + slope * (cos - cos.detach())


def negatives(x: Tensor, w: Tensor, label: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics [n] over the non-target classes among w [c, D], for unit vectors.

    log Σ exp(s c_ij) (-inf without any), Σ s c_ij and, detached, max c_ij. A label outside 0..c-1 has no target in w.
    """
    with torch.autocast(x.device.type, enabled=False):  # a caller's autocast must not lower the precision
        cos = x @ w.T
    target = torch.arange(len(w), device=w.device) == label[:, None]
    best = cos.detach().masked_fill(target, -math.inf).amax(1)
    logits = scale[:, None] * cos
    return logits.masked_fill(target, -math.inf).logsumexp(1), logits.masked_fill(target, 0.0).sum(1), best


def reduce_classes(x, w, label, scale, class_chunk):
    """`negatives` of x [n, D] over w [C, D], in chunks of classes."""
    lse, total, best = x.new_full((len(x),), -math.inf), x.new_zeros(len(x)), x.new_full((len(x),), -math.inf)
    for start in range(0, len(w), class_chunk):
        part = (x, w[start : start + class_chunk], label - start, scale)
        # several chunks are recomputed in the backward pass, so that one is in memory at a time
        chunk = negatives(*part) if class_chunk >= len(w) else checkpoint(negatives, *part, use_reentrant=False)
        # the gradient of logaddexp(-inf, -inf) is NaN
        lse = chunk[0] if start == 0 else torch.logaddexp(lse, chunk[0])
        total, best = total + chunk[1], torch.maximum(best, chunk[2])
    return lse, total, best


def merge_statistics(merge: Callable, rows: Tensor, N: int, scale: Tensor, best, lse, total, cos):
    """The statistics [n] of `rows` over all ranks: global values with local gradients."""

    def spread(values: Tensor, fill: float) -> Tensor:
        return values.new_full((N,), fill).index_put((rows,), values.detach())

    s = scale[rows]
    mass = torch.where(best == -math.inf, 0.0, (lse.detach() - s * best).exp())
    top, mass, sums, target = (v[rows] for v in merge(
        spread(best, -math.inf), spread(mass, 0.0), spread(total, 0.0), spread(cos, -math.inf), scale=scale))
    whole = torch.where(mass > 0, s * top + mass.log(), -math.inf)
    share = torch.where(lse == -math.inf, 0.0, (lse.detach() - whole).exp())
    finite_lse = torch.where(lse == -math.inf, 0.0, lse)
    finite_cos = torch.where(cos == -math.inf, 0.0, cos)
    return (top, whole + share * (finite_lse - finite_lse.detach()), sums + (total - total.detach()),
            target + (finite_cos - finite_cos.detach()))


def per_domain(name: str, value, K: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number or [K], as [K]."""
    if isinstance(value, int | float):
        return torch.full((K,), float(value), dtype=dtype, device=device)
    value = torch.as_tensor(value, dtype=dtype, device=device).detach()
    if value.ndim and value.shape != (K,):
        raise ValueError(f"{name} is {tuple(value.shape)}: want a number or [{K}], one for each domain (one for each "
                         "sample: sample_scale, sample_margin_angular, sample_margin_additive)")
    return value.expand(K)


def per_sample(name: str, value, sample, domains: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """`sample` [N] if given, else `value` of each sample's domain."""
    if sample is not None:
        return torch.as_tensor(sample, dtype=dtype, device=domains.device).detach()
    return per_domain(name, value, K, dtype, domains.device)[domains.clamp(0, max(K - 1, 0))]


def class_slices(class_ranges, shard: Shard | None, device) -> tuple[tuple, Tensor]:
    """First class on this rank (K integers) and number of classes over all ranks (int64 [K]) of each domain."""
    sizes = tuple(end - start for start, end in class_ranges)
    first, total = ((0,) * len(sizes), sizes) if shard is None else (shard.start, shard.total)
    return first, torch.tensor(total, dtype=torch.int64, device=device)


def margin_loss_reference(
    embeddings: Tensor, weight: Tensor, labels: Tensor, domains: Tensor, class_ranges: list[tuple[int, int]], *,
    scale=None, margin_angular=0.0, margin_additive=0.0, sample_scale=None, sample_margin_angular=None,
    sample_margin_additive=None, domain_weight=None, domain_count=None, num_domains=None, reduction="domain",
    label_smoothing=0.0, gradient="exact", shard=None, class_chunk=None,
) -> MarginLoss:
    """The definition of `margin_loss`, unfused, in any dtype (half precision is computed in float32).

    `class_chunk`: number of classes whose logits are held at once and recomputed in backward (None: all).
    """
    N, K, device = len(embeddings), len(class_ranges), embeddings.device
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    s, m_ang, m_add = (per_sample(*v, domains, K, dtype) for v in (
        ("scale", scale, sample_scale), ("margin_angular", margin_angular, sample_margin_angular),
        ("margin_additive", margin_additive, sample_margin_additive)))
    w_d = per_domain("domain_weight", 1.0 if domain_weight is None else domain_weight, K, dtype, device)
    smoothing = per_domain("label_smoothing", label_smoothing, K, dtype, device)
    first, size = class_slices(class_ranges, shard, device)
    has_domain = (domains >= 0) & (domains < K)
    size_of = torch.where(has_domain, size[domains.clamp(0, max(K - 1, 0))], 0) if K else torch.zeros_like(domains)
    valid = (labels >= 0) & (labels < size_of)
    num_valid = torch.stack([((domains == k) & valid).sum() for k in range(K)]) if K else labels[:0]
    count = (num_valid if domain_count is None else torch.as_tensor(domain_count, device=device)).to(dtype)
    active = (num_valid > 0).sum().clamp(min=1) if num_domains is None else num_domains
    denominator = active * count if reduction == "domain" else count.sum().expand(K)

    # an empty sum in the graph, so that without a valid sample, loss and gradients are 0
    loss = embeddings[:0].to(dtype).sum() + weight[:0].to(dtype).sum()
    rows_of, parts = [], []
    directions, classes = unit(embeddings.to(dtype)), unit(weight.to(dtype))
    for k, (start, end) in enumerate(class_ranges):
        rows = ((domains == k) & valid).nonzero().flatten()
        rows_of.append(rows)
        x, w = directions[rows], classes[start:end]
        label = labels[rows] - first[k]
        is_local = (label >= 0) & (label < len(w))
        cos = (x * (w[label.clamp(0, len(w) - 1)] if len(w) else torch.zeros_like(x))).sum(1)
        lse, total, best = reduce_classes(x, w, label, s[rows], class_chunk or max(end - start, 1))
        parts.append((best, lse, total, torch.where(is_local, cos, -math.inf)))
    rows = torch.cat(rows_of) if rows_of else labels[:0]
    best, lse, total, cos = map(torch.cat, zip(*parts, strict=True)) if parts else [loss.expand(0)] * 4
    if shard is not None and shard.merge is not None:
        best, lse, total, cos = merge_statistics(shard.merge, rows, N, s, best, lse, total, cos)

    s, eps, domain_of = s[rows], smoothing[domains[rows]], domains[rows]
    target = s * margin_target(cos, m_ang[rows], m_add[rows], gradient)
    # the target is not in the log-sum-exp: lse - sφ would cancel to 0 in fp32 where the loss is 1e-8
    losses = -F.logsigmoid(target - lse)  # softplus(lse⁻ - sφ), exact in both tails
    # CE against (1 - ε) onehot + ε/C: the cross-entropy above plus ε (sφ - mean logit)
    losses = losses + eps * (target - (target + total) / size_of[rows])
    sums = torch.stack([losses[domain_of == k].sum() for k in range(K)]) if K else losses
    factor = torch.where(num_valid > 0, w_d / torch.where(num_valid > 0, denominator, 1), 0)
    loss = loss + (factor * sums).sum()
    # an invalid label makes loss and gradients NaN, so that no step is taken (on a CPU, it was refused above)
    loss = loss * torch.where(((labels != -1) & ~valid).any(), math.nan, 1.0)
    target_cos = torch.full((N,), math.nan, dtype=dtype, device=device).index_put((rows,), cos.detach())
    correct = torch.zeros(N, dtype=torch.bool, device=device).index_put((rows,), cos.detach() > best)
    return MarginLoss(loss, torch.where(num_valid > 0, sums.detach() / count, math.nan), target_cos, correct)


# ---------------------------------------------------------------- Partial FC


def sample_classes(
    labels: Tensor, domains: Tensor, class_ranges: list[tuple[int, int]], fraction: float | list[float], *, seed: int,
    step: int, minimum: int = 10_000,
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """The class rows of a step for Partial FC: in each large domain, the classes of its samples and random others.

    The returned values go into `margin_loss(x, weight[rows], labels, domains, ranges)`; other rows get no gradient. The
    draw depends only on (seed, step, domain) and the labels, without synchronisation.

    Args:
        labels: int64 [N], counted from the start of the sample's range; -1: ignored.
        domains: int64 [N] in 0..K-1.
        class_ranges: K pairs of rows of the whole weight.
        fraction: of a domain's classes to draw, in (0, 1], a number or K; at least N are drawn, so that every sample's
            class is among them.
        seed: of the run.
        step: of the optimiser.
        minimum: in domains with fewer classes, all are used.

    Returns:
        rows int64 [C'] of the whole weight, ascending in every domain; labels [N] and class_ranges that refer to them.

    Raises:
        ValueError: a fraction outside (0, 1].

    Source: Partial FC, arXiv 2203.15565, section 3.2.
    """
    fractions = [fraction] * len(class_ranges) if isinstance(fraction, int | float) else fraction
    if not all(0 < share <= 1 for share in fractions):
        raise ValueError(f"fraction={fraction}: want 0 < fraction <= 1")
    device, rows, ranges, out, end = labels.device, [], [], labels.clone(), 0
    for k, (first, last) in enumerate(class_ranges):
        size = last - first
        keep = min(max(math.ceil(fractions[k] * size), len(labels)), size) if size >= minimum else size
        if keep == size:
            drawn = torch.arange(size, device=device)
        else:
            key = int.from_bytes(hashlib.sha256(f"{seed} {step} {k}".encode()).digest()[:7], "little")
            score = torch.rand(size, generator=torch.Generator(device).manual_seed(key), device=device)
            in_domain = (domains == k) & (labels >= 0)
            score.scatter_reduce_(0, torch.where(in_domain, labels, 0), torch.where(in_domain, 2.0, -1.0), "amax")
            drawn = score.topk(keep).indices.sort().values
            out = torch.where(in_domain, torch.searchsorted(drawn, torch.where(in_domain, labels, 0)), out)
        rows.append(drawn + first)
        ranges.append((end, end + keep))
        end += keep
    return torch.cat(rows), out, ranges


# ---------------------------------------------------------------- public


def check_arguments(embeddings, weight, labels, domains, class_ranges, samples, reduction, gradient, shard,
                    impl) -> None:
    """Raise ValueError for invalid shapes and names; values are checked on a CPU only, to avoid synchronisation."""
    N, D = embeddings.shape
    if weight.ndim != 2 or weight.shape[1] != D:
        raise ValueError(f"weight is {tuple(weight.shape)}: want [C, {D}], the width of the embeddings")
    if labels.shape != (N,) or domains.shape != (N,):
        raise ValueError(f"labels {tuple(labels.shape)} and domains {tuple(domains.shape)}: want one of each for "
                         f"{N} samples")
    if N and not class_ranges:
        raise ValueError(f"class_ranges is empty: the {N} samples have no domain")
    for k, (start, end) in enumerate(class_ranges):
        if not 0 <= start <= end <= len(weight):
            raise ValueError(f"class range {k} is ({start}, {end}): not within the {len(weight)} rows of weight")
    for name, (value, sample) in samples.items():
        if sample is not None and (not torch.is_tensor(sample) or sample.shape != (N,)):
            raise ValueError(f"sample_{name}: want a tensor of one value for each of {N} samples")
        if sample is None and value is None:
            raise ValueError(f"{name} is missing: want a number or [K], or sample_{name}")
    if shard is not None and not len(shard.start) == len(shard.total) == len(class_ranges):
        raise ValueError(f"shard has {len(shard.start)} starts and {len(shard.total)} totals: want one for each of "
                         f"{len(class_ranges)} domains")
    for name, value, choices in (("reduction", reduction, ("domain", "sample")),
                               ("gradient", gradient, ("exact", "straight_through")),
                               ("impl", impl, ("auto", "triton", "torch"))):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: want one of {', '.join(choices)}")
    if labels.device.type == "cpu" and N:
        if not 0 <= int(domains.min()) <= int(domains.max()) < len(class_ranges):
            raise ValueError(f"domains reach from {int(domains.min())} to {int(domains.max())}: "
                             f"want 0..{len(class_ranges) - 1}")
        size = class_slices(class_ranges, shard, labels.device)[1][domains]
        if bool(((labels >= size) | (labels < -1)).any()):
            i = int(((labels >= size) | (labels < -1)).nonzero()[0])
            raise ValueError(f"sample {i}: label {int(labels[i])} is not one of the {int(size[i])} classes of its "
                             f"domain {int(domains[i])}, nor -1")


def best_impl(impl: str, embeddings: Tensor, weight: Tensor, K: int) -> str:
    """Resolve impl="auto": Triton where the kernels can run, else PyTorch.

    Raises:
        NotImplementedError: impl="triton" where they cannot.
    """
    obstacle = ""
    if not find_spec("triton"):
        obstacle = "Triton is not installed: pip install triton"
    elif not embeddings.is_cuda and (impl == "auto" or not os.environ.get("TRITON_INTERPRET")):
        obstacle = f"it needs tensors on a GPU (these are on {embeddings.device}), or TRITON_INTERPRET=1"
    elif embeddings.is_cuda and torch.cuda.get_device_capability(embeddings.device) < (8, 0):
        obstacle = "it needs a GPU of compute capability 8.0 or more (A100 and later)"
    elif embeddings.dtype not in TRITON_EMBEDDINGS or weight.dtype not in TRITON_WEIGHTS:
        obstacle = ("it takes bf16, fp16 or fp32 embeddings and fp32 or bf16 weights, not "
                   f"{embeddings.dtype} and {weight.dtype}")
    elif K > TRITON_DOMAINS:
        obstacle = f"it takes up to {TRITON_DOMAINS} domains, not {K}"
    if impl == "triton" and obstacle:
        raise NotImplementedError(f"margin_loss: impl='triton' is not possible: {obstacle}; use impl='auto'")
    return "torch" if impl == "torch" or obstacle else "triton"


def margin_loss(
    embeddings: Tensor, weight: Tensor, labels: Tensor, domains: Tensor, class_ranges: list[tuple[int, int]], *,
    scale=None, margin_angular=0.0, margin_additive=0.0, sample_scale=None, sample_margin_angular=None,
    sample_margin_additive=None, domain_weight=None, domain_count=None, num_domains=None, reduction="domain",
    label_smoothing=0.0, gradient="exact", shard=None, impl="auto",
) -> MarginLoss:
    """Softmax cross-entropy with angular and additive margins on cosines, each sample over its own domain's classes.

    With θ the angle between an embedding and its class weight, φ = cos(θ + m_ang) - m_add (see `margin_target` for
    its extension beyond 0..π), lse⁻ = log Σ_{j≠y} exp(s c_ij) over the domain's classes:
        ℓ_i = softplus(lse⁻_i - s φ_i)          L = Σ_i w_d(i) ℓ_i / (K n_d(i))
    A domain of one class has ℓ = 0. Special cases: ArcFace (arXiv 1801.07698, eq. 3: m_ang), CosFace
    (1801.09414, eq. 4: m_add), AdaFace (2204.00964, eq. 6-8: both, per sample) and plain normalised softmax (0, 0).

    Args:
        embeddings: [N, D] float, any length; half precision is computed in float32.
        weight: [C, D] float, class weights, any length.
        labels: int64 [N], counted from the start of the sample's range; -1: ignore the sample.
        domains: int64 [N] in 0..K-1.
        class_ranges: K pairs (start, end) of rows of `weight`, end excluded; they may overlap or be empty.
        scale: s > 0: a number or [K], one value per domain.
        margin_angular: m_ang in radians, a number or [K]; scale and margins get no gradient.
        margin_additive: m_add on the cosine, a number or [K].
        sample_scale: [N], one value per sample, instead of `scale`.
        sample_margin_angular: [N], instead of `margin_angular`.
        sample_margin_additive: [N], instead of `margin_additive`.
        domain_weight: a number or [K], w_d (default 1).
        domain_count: [K] n_d, valid samples in the whole optimiser step, so that the losses of micro-batches add up
            (default: counted in this call).
        num_domains: K of the formula (default: domains with a valid sample in this call).
        reduction: "domain" (above) or "sample": L = Σ_i w_d(i) ℓ_i / Σ_d n_d.
        label_smoothing: ε in 0..1, a number or [K]: the target becomes (1 - ε) onehot + ε / C_d.
        gradient: "exact", or "straight_through": dφ/dt = 1, as arcface_torch trains.
        shard: the class rows are sharded over ranks, see `Shard`.
        impl: "torch" (chunked over classes, N x 16384 logits in memory), "triton" (no N x C tensor; deterministic;
            products in bf16 for bf16 embeddings, in TF32 for fp16, as `torch.set_float32_matmul_precision` says for
            fp32), or "auto": Triton on GPUs where it can run, else torch.

    Returns:
        MarginLoss(loss, per_domain [K], target_cos [N], correct [N]).

    Raises:
        ValueError: invalid shapes, ranges or names; on a CPU also labels and domains out of range (on a GPU these give
            a NaN loss and NaN gradients, because a check would synchronise).
        NotImplementedError: impl="triton" where Triton cannot run.
    """
    samples = {"scale": (scale, sample_scale), "margin_angular": (margin_angular, sample_margin_angular),
               "margin_additive": (margin_additive, sample_margin_additive)}
    check_arguments(embeddings, weight, labels, domains, class_ranges, samples, reduction, gradient, shard, impl)
    device, K = embeddings.device, len(class_ranges)
    if best_impl(impl, embeddings, weight, K) == "torch" or not len(embeddings) or not len(weight):
        return margin_loss_reference(
            embeddings, weight, labels, domains, class_ranges, scale=scale, margin_angular=margin_angular,
            margin_additive=margin_additive, sample_scale=sample_scale, sample_margin_angular=sample_margin_angular,
            sample_margin_additive=sample_margin_additive, domain_weight=domain_weight, domain_count=domain_count,
            num_domains=num_domains, reduction=reduction, label_smoothing=label_smoothing, gradient=gradient,
            shard=shard, class_chunk=CLASS_CHUNK,
        )
    from . import margin_triton  # Triton may be absent

    def of_domains(name: str, value) -> Tensor:
        return per_domain(name, value, K, torch.float32, device).contiguous()

    per_value = [of_domains(name, value) if sample is None else sample.detach().to(device, torch.float32).contiguous()
                 for name, (value, sample) in samples.items()]
    out = margin_triton.margin_loss(
        embeddings, weight, labels, domains, class_ranges, shard, per_value,
        tuple(sample is not None for _, sample in samples.values()),
        of_domains("domain_weight", 1.0 if domain_weight is None else domain_weight),
        of_domains("label_smoothing", label_smoothing),
        None if domain_count is None else of_domains("domain_count", domain_count),
        num_domains=num_domains or 0, BY_SAMPLE=reduction == "sample", STRAIGHT=gradient == "straight_through",
        SMOOTH=not isinstance(label_smoothing, int | float) or label_smoothing > 0,
    )
    return MarginLoss(*out)
