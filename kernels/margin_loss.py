"""The multi-domain margin loss: every sample meets the classes of its own domain, all domains in one call.

`margin_loss_reference` is the definition, the fallback on every device and the oracle of the tests.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TINY = 1e-12  # |x|² below which a vector counts as zero: no direction, no gradient
CLASS_CHUNK = 16384  # classes whose logits are held at once by the fallback


class MarginLoss(NamedTuple):
    """What `margin_loss` returns; everything but `loss` is detached."""

    loss: Tensor  # scalar
    per_domain: Tensor  # [K] sum of the domain's losses / n_d, unweighted; NaN without a valid sample in this call
    target_cos: Tensor  # [N] cosine to the own class, without margin; NaN where the label is -1
    correct: Tensor  # [N] bool: the own class is nearer than every other one (no margin); False where ignored


# ---------------------------------------------------------------- reference


def unit(x: Tensor) -> Tensor:
    """Rows of x [N, D] divided by their lengths; rows with |x|² < 1e-12 become 0 with gradient 0."""
    square = x.square().sum(1, keepdim=True)
    alive = square >= TINY
    return x * torch.where(alive, torch.where(alive, square, 1.0).rsqrt(), 0.0)


def margin_target(cos: Tensor, m_ang: Tensor, m_add: Tensor, extension: str, gradient: str) -> Tensor:
    """φ(t) of the target cosines [n]: the cosine with its margin, with the derivative written out.

    t = cos clamped to [-1, 1], θ = arccos t:
        φ = cos(θ + m_ang) - m_add               φ' = cos m + t sin m / √max(1 - t², 1e-6)   0 <= θ + m_ang <= π
        φ = t - m_ang sin(m_ang) - m_add         φ' = 1                                      above π
        φ = t + 1 - cos(m_ang) - m_add           φ' = 1                                      below 0
    extension="clamp" (AdaFace): θ + m_ang clamped to [1e-3, π - 1e-3], φ' = 0 there.
    gradient="straight_through": φ' = 1 everywhere, what arcface_torch trains with.
    """
    with torch.no_grad():  # autograd through arccos would give infinities at |t| = 1
        t = cos.clamp(-1, 1)
        angle = t.arccos() + m_ang
        if extension == "clamp":
            inside = (angle >= 1e-3) & (angle <= math.pi - 1e-3)
            value, outside_slope = angle.clamp(1e-3, math.pi - 1e-3).cos(), 0.0
        else:
            inside = (angle >= 0) & (angle <= math.pi)
            beyond = torch.where(angle > 0, -m_ang * m_ang.sin(), 1 - m_ang.cos())
            value, outside_slope = torch.where(inside, angle.cos(), t + beyond), 1.0
            # without an angular margin φ is t itself: cos(arccos t) would lose half of t's digits near 1
            value = torch.where(m_ang == 0, t, value)
        slope = m_ang.cos() + t * m_ang.sin() / (1 - t.square()).clamp(min=1e-6).sqrt()
        slope = torch.where(inside, slope, outside_slope)
        if gradient == "straight_through":
            slope = torch.ones_like(slope)
    return value - m_add + slope * (cos - cos.detach())


def negatives(x: Tensor, w: Tensor, label: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the classes w [c, D] but for the target (label [n], outside 0..c-1 if it is not here), for unit vectors:

    log Σ exp(s c_ij) (-inf without any), Σ s c_ij and, detached, max c_ij; all [n].
    """
    cos = x @ w.T
    target = torch.arange(len(w), device=w.device) == label[:, None]
    best = cos.detach().masked_fill(target, -math.inf).amax(1)
    logits = scale[:, None] * cos
    return logits.masked_fill(target, -math.inf).logsumexp(1), logits.masked_fill(target, 0.0).sum(1), best


def sample_losses(x, w, label, scale, m_ang, m_add, smoothing, extension, gradient, class_chunk):
    """ℓ, target cosine and top-1 hit of the samples x [n, D] of ONE domain with classes w [C_d, D]; all [n]."""
    x, w = unit(x), unit(w)
    cos = (x * w[label]).sum(1)
    phi = margin_target(cos, m_ang, m_add, extension, gradient)
    # the target is kept out of the log-sum-exp: lse - sφ would cancel to 0 in fp32 where the truth is 1e-8
    lse, total, best = None, 0.0, None
    for start in range(0, len(w), class_chunk):
        part = (x, w[start : start + class_chunk], label - start, scale)
        # one chunk needs no recomputation in the backward pass; of several only one is ever in memory
        chunk = negatives(*part) if class_chunk >= len(w) else checkpoint(negatives, *part, use_reentrant=False)
        lse = chunk[0] if lse is None else torch.logaddexp(lse, chunk[0])
        total, best = total + chunk[1], chunk[2] if best is None else torch.maximum(best, chunk[2])
    target = scale * phi
    loss = -F.logsigmoid(target - lse)  # softplus(lse⁻ - sφ), exact in both tails
    # CE against (1 - ε) onehot + ε/C: the cross-entropy above plus ε (sφ - mean logit)
    loss = loss + smoothing * (target - (target + total) / len(w))
    return loss, cos.detach(), cos.detach() > best


def margin_loss_reference(
    embeddings: Tensor, weight: Tensor, labels: Tensor, domains: Tensor, class_ranges: list[tuple[int, int]], *,
    scale, margin_angular=0.0, margin_additive=0.0, domain_weight=None, domain_count=None, num_domains=None,
    reduction="domain", label_smoothing=0.0, gradient="exact", extension="linear", class_chunk=None,
) -> MarginLoss:
    """The definition of `margin_loss`, unfused, in any dtype (half precision is computed in float32).

    `class_chunk`: logits of at most so many classes are held at once and recomputed in backward (None: all at once).
    """
    N, K, device = len(embeddings), len(class_ranges), embeddings.device
    dtype = torch.promote_types(embeddings.dtype, torch.float32)

    def vector(value) -> Tensor:
        """A number, [K] or [N] as [N]."""
        value = torch.as_tensor(value, dtype=dtype, device=device).detach()
        return value[domains] if value.shape == (K,) and K != N else value.expand(N)

    def by_domain(value) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=device).detach().expand(K)

    s, m_ang, m_add = vector(scale), vector(margin_angular), vector(margin_additive)
    smoothing = by_domain(label_smoothing)
    valid = labels >= 0
    seen = torch.bincount(domains[valid], minlength=K)
    count = (seen if domain_count is None else torch.as_tensor(domain_count, device=device)).to(dtype)
    w_d = by_domain(1.0 if domain_weight is None else domain_weight)
    active = (seen > 0).sum().clamp(min=1) if num_domains is None else num_domains
    denominator = active * count if reduction == "domain" else count.sum().expand(K)

    # the sum of nothing, still part of the graph: a call without a valid sample gives loss 0 and gradients 0
    loss = embeddings[:0].to(dtype).sum() + weight[:0].to(dtype).sum()
    per_domain = torch.full((K,), math.nan, dtype=dtype, device=device)
    target_cos = torch.full((N,), math.nan, dtype=dtype, device=device)
    correct = torch.zeros(N, dtype=torch.bool, device=device)
    for k, (start, end) in enumerate(class_ranges):
        rows = ((domains == k) & valid).nonzero().flatten()
        if not len(rows):
            continue
        losses, cos, hit = sample_losses(
            embeddings[rows].to(dtype), weight[start:end].to(dtype), labels[rows], s[rows], m_ang[rows], m_add[rows],
            smoothing[k], extension, gradient, class_chunk or max(end - start, 1),
        )
        loss = loss + w_d[k] * losses.sum() / denominator[k]
        per_domain[k] = losses.detach().sum() / count[k]
        target_cos[rows], correct[rows] = cos, hit
    return MarginLoss(loss, per_domain, target_cos, correct)


# ---------------------------------------------------------------- public


def check_arguments(embeddings, weight, labels, domains, class_ranges, reduction, gradient, extension, impl) -> None:
    """Raise ValueError for shapes and names that cannot be meant; values are looked at on CPU only (no device sync)."""
    N, D = embeddings.shape
    if weight.ndim != 2 or weight.shape[1] != D:
        raise ValueError(f"weight is {tuple(weight.shape)}: want [C, {D}], the width of the embeddings")
    if labels.shape != (N,) or domains.shape != (N,):
        raise ValueError(f"labels {tuple(labels.shape)} and domains {tuple(domains.shape)}: want one of each for "
                         f"{N} samples")
    for k, (start, end) in enumerate(class_ranges):
        if not 0 <= start <= end <= len(weight):
            raise ValueError(f"class range {k} is ({start}, {end}): not within the {len(weight)} rows of weight")
    for name, value, known in (("reduction", reduction, ("domain", "sample")),
                               ("gradient", gradient, ("exact", "straight_through")),
                               ("extension", extension, ("linear", "clamp")),
                               ("impl", impl, ("auto", "triton", "torch"))):
        if value not in known:
            raise ValueError(f"{name}={value!r}: want one of {', '.join(known)}")
    if labels.device.type == "cpu" and N:
        if not 0 <= int(domains.min()) <= int(domains.max()) < len(class_ranges):
            raise ValueError(f"domains reach from {int(domains.min())} to {int(domains.max())}: "
                             f"want 0..{len(class_ranges) - 1}")
        size = torch.tensor([end - start for start, end in class_ranges])[domains]
        if bool(((labels >= size) | (labels < -1)).any()):
            i = int(((labels >= size) | (labels < -1)).nonzero()[0])
            raise ValueError(f"sample {i}: label {int(labels[i])} is not one of the {int(size[i])} classes of its "
                             f"domain {int(domains[i])}, nor -1")


def margin_loss(
    embeddings: Tensor, weight: Tensor, labels: Tensor, domains: Tensor, class_ranges: list[tuple[int, int]], *,
    scale, margin_angular=0.0, margin_additive=0.0, domain_weight=None, domain_count=None, num_domains=None,
    reduction="domain", label_smoothing=0.0, gradient="exact", extension="linear", drop_mass=0.0, impl="auto",
) -> MarginLoss:
    """Softmax cross-entropy with angular and additive margins on cosines, each sample over its own domain's classes.

    With θ the angle between an embedding and its class weight, φ = cos(θ + m_ang) - m_add (see `margin_target` for
    its extension beyond 0..π), lse⁻ = log Σ_{j≠y} exp(s c_ij) over the domain's classes:
        ℓ_i = softplus(lse⁻_i - s φ_i)          L = Σ_i w_d(i) ℓ_i / (K n_d(i))
    A domain of one class has ℓ = 0. This one form holds ArcFace (arXiv 1801.07698, eq. 3: m_ang), CosFace
    (1801.09414, eq. 4: m_add), AdaFace (2204.00964, eq. 6-8: both, per sample) and plain normalised softmax (0, 0).

    Args:
        embeddings: [N, D] float, any length; half precision is computed in float32.
        weight: [C, D] float, class weights, any length.
        labels: int64 [N], counted from the start of the sample's range; -1: ignore the sample.
        domains: int64 [N] in 0..K-1.
        class_ranges: K pairs (start, end) of rows of `weight`, end excluded; they may overlap or be empty.
        scale: s > 0: a number, [K] or [N].
        margin_angular: m_ang in radians: a number, [K] or [N] (where K = N: [N]); no gradient flows into margins.
        margin_additive: m_add on the cosine, likewise.
        domain_weight: [K] w_d (default 1).
        domain_count: [K] n_d, valid samples of the whole optimiser step (default: counted in this call), so that
            micro-batches add up to the exact loss.
        num_domains: K of the formula (default: domains with a valid sample in this call).
        reduction: "domain" (above) or "sample": L = Σ_i w_d(i) ℓ_i / Σ_d n_d.
        label_smoothing: ε in 0..1, a number or [K]: the target becomes (1 - ε) onehot + ε / C_d.
        gradient: "exact", or "straight_through": dφ/dt = 1, as arcface_torch trains.
        extension: "linear", or "clamp" as AdaFace's own code has it.
        drop_mass: upper bound on the softmax mass of non-targets that a sparse backward may leave out, as a
            fraction of 1 - p_iy; plain PyTorch leaves out nothing.
        impl: "torch" (chunked over classes, memory N x 16384 logits), "triton", or "auto": the best that is there.

    Returns:
        MarginLoss(loss, per_domain [K], target_cos [N], correct [N]).

    Raises:
        ValueError: shapes, ranges or names that cannot be meant; on CPU also labels and domains out of range.
        NotImplementedError: impl="triton" where there is no Triton kernel.
    """
    check_arguments(embeddings, weight, labels, domains, class_ranges, reduction, gradient, extension, impl)
    if not 0 <= drop_mass < 1:
        raise ValueError(f"drop_mass={drop_mass}: want 0 <= drop_mass < 1")
    if impl == "triton":
        raise NotImplementedError("margin_loss: impl='triton' was asked for, but this version has no Triton kernel; "
                                  "use impl='auto' or impl='torch'")
    return margin_loss_reference(
        embeddings, weight, labels, domains, class_ranges, scale=scale, margin_angular=margin_angular,
        margin_additive=margin_additive, domain_weight=domain_weight, domain_count=domain_count,
        num_domains=num_domains, reduction=reduction, label_smoothing=label_smoothing, gradient=gradient,
        extension=extension, class_chunk=CLASS_CHUNK,
    )
