"""The margin loss in Triton: what `kernels.margin_loss.margin_loss` runs on a GPU; its formulas are defined there.

One call is

    group_rows      samples sorted by domain into tiles of one domain each, by index, without a copy
    sample_norms    1/|x_i| and the target cosine, in fp32 whatever the products are computed in
    class_norms     1/|w_j|, and a bf16 copy of W where that pays
    cosine_tiles    per (sample, strip of classes): best cosine, Σ exp, Σ s c over the non-targets
    merge_strips    ... over the strips; ranks that hold other classes are merged here
    losses          φ, ℓ, the sums by domain, and per sample all that the backward pass needs

and backward, for one chunk of class rows after the other so that nothing of size N x C ever exists:

    gradient_tiles  P_ij = dL/dc_ij / (|x_i| |w_j|) of the chunk, from recomputed cosines
    sample_products dx_i += Σ_j P_ij w_j
    class_products  dw_j  = Σ_i P_ij x_i - (its part along w_j): complete after one visit, so no atomics
    project_samples dx_i -= (its part along x_i)

With the raw vectors as operands and both norms inside P, no product needs a scaled copy. Sums run in a fixed order:
the same inputs give the same bits.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TINY = tl.constexpr(1e-12)  # as in margin_loss.py

# ---------------------------------------------------------------- kernels: forward


@triton.jit
def group_rows(
    labels, domains, classes, order, groups, count, N, K,
    KP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counting sort by domain, in one program: order [N], groups [4, K] (rows from, to; tiles from, to), count [K]."""
    k = tl.arange(0, KP)
    total = tl.load(classes + 4 * k + 3, mask=k < K, other=0)
    counts = tl.zeros([KP], tl.int32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        domain = tl.load(domains + i, mask=i < N, other=-1)
        label = tl.load(labels + i, mask=i < N, other=-1)
        member = (domain[:, None] == k[None, :]) & (label[:, None] >= 0) & (label[:, None] < total[None, :])
        counts += tl.sum(member.to(tl.int32), 0)
    row_end = tl.cumsum(counts, 0)
    tiles = (counts + ROWS - 1) // ROWS
    tile_end = tl.cumsum(tiles, 0)
    tl.store(groups + k, row_end - counts, mask=k < K)
    tl.store(groups + K + k, row_end, mask=k < K)
    tl.store(groups + 2 * K + k, tile_end - tiles, mask=k < K)
    tl.store(groups + 3 * K + k, tile_end, mask=k < K)
    tl.store(count + k, counts.to(tl.float32), mask=k < K)
    place = row_end - counts
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        domain = tl.load(domains + i, mask=i < N, other=-1)
        label = tl.load(labels + i, mask=i < N, other=-1)
        member = (domain[:, None] == k[None, :]) & (label[:, None] >= 0) & (label[:, None] < total[None, :])
        one = member.to(tl.int32)
        slot = tl.sum(one * (place[None, :] + tl.cumsum(one, 0) - one), 1)
        tl.store(order + slot, i, mask=tl.sum(one, 1) > 0)
        place += tl.sum(one, 0)


@triton.jit
def tile_rows(m, groups, order, K, KP: tl.constexpr, ROWS: tl.constexpr):
    """Domain of tile m (K: there is no such tile), its sample numbers [ROWS] and which of them are real."""
    k = tl.arange(0, KP)
    ends = tl.load(groups + 3 * K + k, mask=k < K, other=2147483647)
    domain = tl.sum((ends <= m).to(tl.int32), 0)
    known = domain < K
    first = tl.load(groups + domain, mask=known, other=0)
    last = tl.load(groups + K + domain, mask=known, other=0)
    tile = tl.load(groups + 2 * K + domain, mask=known, other=0)
    row = first + (m - tile) * ROWS + tl.arange(0, ROWS)
    live = row < last
    # padding points at a real sample: its loads need no mask, and what it computes is never stored
    index = tl.load(order + tl.where(live, row, first), mask=known, other=0)
    return domain, index, live


@triton.jit
def sample_norms(x, w, labels, domains, classes, inverse, target, column, N, K, D, WIDTH: tl.constexpr):
    """One sample a program: 1/|x|, target cosine (-inf where its class is not here), row of W of its class (or -1)."""
    i = tl.program_id(0)
    label = tl.load(labels + i)
    domain = tl.load(domains + i)
    known = (label >= 0) & (domain >= 0) & (domain < K)
    domain = tl.where(known, domain, 0)
    start = tl.load(classes + 4 * domain)
    end = tl.load(classes + 4 * domain + 1)
    row = start + label - tl.load(classes + 4 * domain + 2)
    here = known & (row >= start) & (row < end)
    safe = tl.where(here, row, 0).to(tl.int64)  # a wrong label must not read outside W
    xx = tl.zeros([WIDTH], tl.float32)
    xw = tl.zeros([WIDTH], tl.float32)
    ww = tl.zeros([WIDTH], tl.float32)
    for d in range(0, D, WIDTH):
        at = d + tl.arange(0, WIDTH)
        a = tl.load(x + i.to(tl.int64) * D + at, mask=at < D, other=0).to(tl.float32)
        b = tl.load(w + safe * D + at, mask=(at < D) & here, other=0).to(tl.float32)
        xx += a * a
        xw += a * b
        ww += b * b
    square = tl.sum(xx, 0)
    own = tl.sum(ww, 0)
    scale = tl.where(square >= TINY, tl.rsqrt(square), 0.0)
    cos = tl.sum(xw, 0) * scale * tl.where(own >= TINY, tl.rsqrt(own), 0.0)
    tl.store(inverse + i, scale)
    tl.store(target + i, tl.where(here, cos, float("-inf")))
    tl.store(column + i, tl.where(here, row, -1).to(tl.int32))


@triton.jit
def class_norms(w, copy, inverse, C, D, COPY: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr):
    """1/|w_j| of CLASSES rows a program, and their bf16 copy in the same pass."""
    j = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    square = tl.zeros([CLASSES], tl.float32)
    for d in range(0, D, WIDTH):
        at = d + tl.arange(0, WIDTH)
        inside = (j < C)[:, None] & (at < D)[None, :]
        place = j.to(tl.int64)[:, None] * D + at[None, :]
        b = tl.load(w + place, mask=inside, other=0).to(tl.float32)
        square += tl.sum(b * b, 1)
        if COPY:
            tl.store(copy + place, b.to(tl.bfloat16), mask=inside)
    tl.store(inverse + j, tl.where(square >= TINY, tl.rsqrt(square), 0.0), mask=j < C)


@triton.jit
def inner_products(
    x, w, index, cols, D,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, WIDTH: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """<x_i, w_j> of a tile [ROWS, CLASSES], summed in fp32."""
    at = tl.arange(0, WIDTH)
    xs = x + index.to(tl.int64)[:, None] * D + at[None, :]
    ws = w + cols.to(tl.int64)[None, :] * D + at[:, None]  # int64: C·D passes 2³¹
    dots = tl.zeros([ROWS, CLASSES], tl.float32)
    for d in tl.range(0, D, WIDTH, num_stages=STAGES):
        if EVEN:
            a = tl.load(xs + d)
            b = tl.load(ws + d)
        else:
            a = tl.load(xs + d, mask=(d + at < D)[None, :], other=0)
            b = tl.load(ws + d, mask=(d + at < D)[:, None], other=0)
        dots = tl.dot(a.to(OPERAND), b.to(OPERAND), dots, input_precision=PRECISION)
    return dots


@triton.jit
def cosine_tiles(
    x, w, inv_x, inv_w, scale, column, order, groups, classes, best, mass, total, N, K, D, strip,
    SMOOTH: tl.constexpr, KP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    CLASSES: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Online log-sum-exp of ROWS samples over `strip` classes of their domain; the target column is left out.

    Tiles of samples are neighbours in launch order, so that a strip of W comes from memory once and then from L2.
    """
    domain, index, live = tile_rows(tl.program_id(0), groups, order, K, KP, ROWS)
    if domain >= K:
        return
    start = tl.load(classes + 4 * domain).to(tl.int32)
    end = tl.load(classes + 4 * domain + 1).to(tl.int32)
    first = start + tl.program_id(1) * strip
    if first >= end:
        return
    norm = tl.load(inv_x + index)
    s = tl.load(scale + index)
    own = tl.load(column + index)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    logits = tl.zeros([ROWS], tl.float32)
    for c in range(first, tl.minimum(first + strip, end), CLASSES):
        cols = c + tl.arange(0, CLASSES)
        inside = cols < end
        near = tl.where(inside, cols, end - 1)
        cos = inner_products(x, w, index, near, D, OPERAND, PRECISION, ROWS, CLASSES, WIDTH, EVEN, STAGES)
        cos = cos * norm[:, None] * tl.load(inv_w + near)[None, :]
        other = inside[None, :] & (cols[None, :] != own[:, None])
        if SMOOTH:
            logits += s * tl.sum(tl.where(other, cos, 0.0), 1)
        cos = tl.where(other, cos, float("-inf"))
        new = tl.maximum(top, tl.max(cos, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN
        sums = sums * tl.exp(s * (top - finite)) + tl.sum(tl.exp(s[:, None] * (cos - finite[:, None])), 1)
        top = new
    out = tl.program_id(1) * N + index
    tl.store(best + out, top, mask=live)
    tl.store(mass + out, sums, mask=live)
    if SMOOTH:
        tl.store(total + out, logits, mask=live)


@triton.jit
def merge_strips(
    best, mass, total, scale, labels, domains, classes, top_out, sum_out, total_out, N, K, strip, strips,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per sample over all strips of its domain: best other cosine, Σ exp(s (c - best)), Σ s c."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + i, mask=i < N, other=-1)
    domain = tl.load(domains + i, mask=i < N, other=-1)
    known = (i < N) & (label >= 0) & (domain >= 0) & (domain < K)
    domain = tl.where(known, domain, 0)
    size = tl.load(classes + 4 * domain + 1) - tl.load(classes + 4 * domain)
    known = known & (label < tl.load(classes + 4 * domain + 3))
    s = tl.load(scale + i, mask=i < N, other=1.0)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    logits = tl.zeros([BLOCK], tl.float32)
    for part in range(0, strips):
        there = known & (part * strip < size)
        at = part * N + i
        b = tl.load(best + at, mask=there, other=float("-inf"))
        m = tl.load(mass + at, mask=there, other=0.0)
        new = tl.maximum(top, b)
        finite = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(s * (top - finite)) + m * tl.exp(s * (b - finite))
        top = new
        if SMOOTH:
            logits += tl.load(total + at, mask=there, other=0.0)
    tl.store(top_out + i, top, mask=i < N)
    tl.store(sum_out + i, sums, mask=i < N)
    tl.store(total_out + i, logits, mask=i < N)


@triton.jit
def margin_target(cos, m, CLAMP: tl.constexpr, STRAIGHT: tl.constexpr):
    """φ before the additive margin, and φ'; arccos is never taken: θ + m <= π is t >= -cos m, and so on."""
    t = tl.minimum(tl.maximum(cos, -1.0), 1.0)
    square = (1 - t) * (1 + t)  # 1 - t² would lose the digits of 1 - t
    cos_m, sin_m = tl.cos(m), tl.sin(m)
    turned = t * cos_m - tl.sqrt(square) * sin_m  # cos(θ + m)
    if CLAMP:
        low = (m < 1e-3) & (t > tl.cos(1e-3 - m))  # θ + m < 1e-3
        high = (m > -1e-3) & (t < -tl.cos(1e-3 + m))  # θ + m > π - 1e-3
        edge = 0.9999995  # cos 1e-3
        phi = tl.where(low, edge, tl.where(high, -edge, turned))
        outside = 0.0
    else:
        low = (m < 0) & (t > cos_m)  # θ + m < 0
        high = (m > 0) & (t < -cos_m)  # θ + m > π
        phi = tl.where(low, t + 1 - cos_m, tl.where(high, t - m * sin_m, turned))
        phi = tl.where(m == 0, t, phi)
        outside = 1.0
    slope = cos_m + t * sin_m * tl.rsqrt(tl.maximum(square, 1e-6))
    slope = tl.where(low | high, outside, slope)
    if STRAIGHT:
        slope = tl.full(slope.shape, 1.0, tl.float32)
    return phi, slope


@triton.jit
def losses(
    best, mass, total, target, scale, m_ang, m_add, labels, domains, classes, count, step_count, weight, smoothing,
    loss, per_domain, target_cos, correct, lse, other_slope, shift, target_slope, N, K, num_domains,
    BY_SAMPLE: tl.constexpr, CLAMP: tl.constexpr, STRAIGHT: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ℓ of every sample and the sums by domain, in one program: N values are few, and their order stays fixed.

    With z = lse⁻ - sφ, q = sigmoid(z) = 1 - p_y and G = w_d / denominator, for the backward pass:
        dL/dc_ij = G s q exp(s c_ij - lse⁻) - G s ε/C        other_slope, shift        j != y
        dL/dc_iy = G s (ε (1 - 1/C) - q) φ'                  target_slope
    """
    k = tl.arange(0, KP)
    seen = tl.load(count + k, mask=k < K, other=0.0)
    n = tl.load(step_count + k, mask=k < K, other=0.0)
    size_k = tl.load(classes + 4 * k + 3, mask=k < K, other=1)
    active = num_domains
    if num_domains == 0:
        active = tl.maximum(tl.sum((seen > 0).to(tl.int32), 0), 1)
    denominator = active * n
    if BY_SAMPLE:
        denominator = tl.sum(n, 0) + 0 * n
    factor = tl.load(weight + k, mask=k < K, other=0.0) / tl.where(seen > 0, denominator, 1.0)
    eps_k = tl.load(smoothing + k, mask=k < K, other=0.0)
    sums = tl.zeros([KP], tl.float32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        label = tl.load(labels + i, mask=i < N, other=-1)
        domain = tl.load(domains + i, mask=i < N, other=-1)
        member = (domain[:, None] == k[None, :]) & (k < K)[None, :]
        member = member & (label[:, None] >= 0) & (label[:, None] < size_k[None, :])
        valid = tl.sum(member.to(tl.int32), 1) > 0
        wrong += tl.where((i < N) & (label != -1) & (valid == 0), 1, 0)
        G = tl.sum(tl.where(member, factor[None, :], 0.0), 1)
        eps = tl.sum(tl.where(member, eps_k[None, :], 0.0), 1)
        C = tl.sum(tl.where(member, size_k[None, :], 0), 1).to(tl.float32)
        s = tl.load(scale + i, mask=i < N, other=1.0)
        cos = tl.load(target + i, mask=i < N, other=0.0)
        top = tl.load(best + i, mask=i < N, other=0.0)
        phi, slope = margin_target(cos, tl.load(m_ang + i, mask=i < N, other=0.0), CLAMP, STRAIGHT)
        own = s * (phi - tl.load(m_add + i, mask=i < N, other=0.0))
        rest = s * top + tl.log(tl.load(mass + i, mask=i < N, other=1.0))
        z = tl.where(valid, rest - own, 0.0)
        small = tl.exp(-tl.abs(z))
        u = 1 + small  # log(1 + small) to the last digit also where u rounds to 1
        log1p = tl.where(u == 1, small, small * tl.log(u) / tl.where(u == 1, 1.0, u - 1))
        q = tl.where(z < 0, small / u, 1 / u)
        value = tl.maximum(z, 0.0) + log1p
        value += eps * (own - (own + tl.load(total + i, mask=i < N, other=0.0)) / tl.maximum(C, 1.0))
        sums += tl.sum(tl.where(member, value[:, None], 0.0), 0)
        tl.store(lse + i, rest, mask=i < N)
        tl.store(other_slope + i, G * s * q, mask=i < N)
        tl.store(shift + i, G * s * eps / tl.maximum(C, 1.0), mask=i < N)
        tl.store(target_slope + i, G * s * (eps * (1 - 1 / tl.maximum(C, 1.0)) - q) * slope, mask=i < N)
        tl.store(target_cos + i, tl.where(valid, cos, float("nan")), mask=i < N)
        tl.store(correct + i, (valid & (cos > top)).to(tl.int8), mask=i < N)
    tl.store(per_domain + k, tl.where(seen > 0, sums / tl.where(seen > 0, n, 1.0), float("nan")), mask=k < K)
    # a label outside its range must not pass for a small loss
    tl.store(loss, tl.where(tl.sum(wrong, 0) > 0, float("nan"), tl.sum(factor * sums, 0)))


# ---------------------------------------------------------------- kernels: backward


@triton.jit
def gradient_tiles(
    x, w, inv_x, inv_w, scale, column, lse, other_slope, shift, target_slope, upstream, order, groups, classes,
    gradients, along, K, D, first, chunk,
    KP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """P [tiles x ROWS, chunk] and along_j = Σ_i P_ij <x_i, w_j> / |w_j|² per tile [tiles, chunk].

    A tile that the domain's range only touches is written whole, with zeros outside the range; one that the range does
    not reach is neither written here nor read later.
    """
    m = tl.program_id(0)
    domain, index, live = tile_rows(m, groups, order, K, KP, ROWS)
    if domain >= K:
        return
    start = tl.load(classes + 4 * domain).to(tl.int32)
    end = tl.load(classes + 4 * domain + 1).to(tl.int32)
    place = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    low = first + tl.program_id(1) * CLASSES
    if (low + CLASSES <= start) | (low >= end):
        return
    cols = first + place
    inside = (cols >= start) & (cols < end)
    near = tl.where(inside, cols, start)
    dots = inner_products(x, w, index, near, D, OPERAND, PRECISION, ROWS, CLASSES, WIDTH, EVEN, STAGES)
    norm_x, norm_w = tl.load(inv_x + index), tl.load(inv_w + near)
    s, own = tl.load(scale + index), tl.load(column + index)
    cos = dots * norm_x[:, None] * norm_w[None, :]
    p = tl.exp(s[:, None] * cos - tl.load(lse + index)[:, None])  # of the non-targets: q p is their softmax
    slope = tl.load(other_slope + index)[:, None] * p - tl.load(shift + index)[:, None]
    slope = tl.where(cols[None, :] == own[:, None], tl.load(target_slope + index)[:, None], slope)
    slope = tl.where(inside[None, :] & live[:, None], slope, 0.0) * tl.load(upstream)
    P = (slope * norm_x[:, None] * norm_w[None, :]).to(gradients.dtype.element_ty)
    row = (m * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tl.store(gradients + row[:, None] * chunk + place[None, :], P)
    # from the rounded P, as the products will see it: the part along w_j then cancels to fp32
    tl.store(along + m.to(tl.int64) * chunk + place, tl.sum(P.to(tl.float32) * dots, 0) * norm_w * norm_w)


@triton.jit
def sample_products(
    w, gradients, order, groups, classes, out, N, K, D, first, last, chunk,
    KP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[split, i] += Σ_j P_ij w_j over the split's share of the chunk; splits fill the GPU where samples are few."""
    m = tl.program_id(0)
    domain, index, live = tile_rows(m, groups, order, K, KP, ROWS)
    if domain >= K:
        return
    start = tl.maximum(tl.load(classes + 4 * domain).to(tl.int32), first)
    end = tl.minimum(tl.load(classes + 4 * domain + 1).to(tl.int32), last)
    start = first + (start - first) // CLASSES * CLASSES  # tiles lie as gradient_tiles wrote them
    share = tl.cdiv(tl.maximum(end - start, 0), CLASSES * tl.num_programs(2)) * CLASSES
    start += tl.program_id(2) * share
    end = tl.minimum(start + share, end)
    if start >= end:
        return
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    width = at < D
    row = (m * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for c in tl.range(start, end, STEP, num_stages=STAGES):
        cols = c + tl.arange(0, STEP)
        P = tl.load(gradients + row[:, None] * chunk + (cols - first)[None, :])
        near = tl.minimum(cols, last - 1).to(tl.int64)  # P is 0 past the range, W has to be finite there
        b = tl.load(w + near[:, None] * D + at[None, :], mask=width[None, :], other=0)
        sums = tl.dot(P.to(OPERAND), b.to(OPERAND), sums, input_precision=PRECISION)
    place = out + (tl.program_id(2).to(tl.int64) * N + index)[:, None] * D + at[None, :]
    keep = live[:, None] & width[None, :]
    tl.store(place, tl.load(place, mask=keep, other=0.0) + sums, mask=keep)


@triton.jit
def class_products(
    x, w, gradients, along, order, groups, classes, out, K, D, first, last, chunk,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dw_j = Σ_i P_ij x_i - along_j w_j over every domain whose range reaches row j, in their order; 0 without any."""
    place = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    low = first + tl.program_id(0) * CLASSES
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    width = at < D
    sums = tl.zeros([CLASSES, COLUMNS], tl.float32)
    parallel = tl.zeros([CLASSES], tl.float32)
    for k in range(0, K):
        start = tl.load(classes + 4 * k)
        end = tl.load(classes + 4 * k + 1)
        if (low < end) & (low + CLASSES > start):
            row_start = tl.load(groups + k)
            row_end = tl.load(groups + K + k)
            tile_start = tl.load(groups + 2 * K + k)
            for m in range(tile_start, tl.load(groups + 3 * K + k)):
                i = tl.arange(0, ROWS)
                row = row_start + (m - tile_start) * ROWS + i
                index = tl.load(order + tl.minimum(row, row_end - 1)).to(tl.int64)  # P is 0 in padded rows
                slot = (m * ROWS + i).to(tl.int64)
                P = tl.load(gradients + slot[None, :] * chunk + place[:, None])
                a = tl.load(x + index[:, None] * D + at[None, :], mask=width[None, :], other=0)
                sums = tl.dot(P.to(OPERAND), a.to(OPERAND), sums, input_precision=PRECISION)
                parallel += tl.load(along + m * chunk + place)
    cols = first + place
    keep = (cols < last)[:, None] & width[None, :]
    where = cols.to(tl.int64)[:, None] * D + at[None, :]
    b = tl.load(w + where, mask=keep, other=0).to(tl.float32)
    tl.store(out + where, (sums - parallel[:, None] * b).to(out.dtype.element_ty), mask=keep)


@triton.jit
def project_samples(x, inverse, sums, out, N, D, SPLITS, WIDTH: tl.constexpr):
    """One sample a program: dx = v - <v, x̂> x̂ with v the sum over the splits."""
    i = tl.program_id(0).to(tl.int64)
    norm = tl.load(inverse + i)
    dot = tl.zeros([WIDTH], tl.float32)
    for d in range(0, D, WIDTH):
        at = d + tl.arange(0, WIDTH)
        v = tl.zeros([WIDTH], tl.float32)
        for split in range(0, SPLITS):
            v += tl.load(sums + (split * N + i) * D + at, mask=at < D, other=0.0)
        dot += v * tl.load(x + i * D + at, mask=at < D, other=0).to(tl.float32)
    along = tl.sum(dot, 0) * norm * norm
    for d in range(0, D, WIDTH):
        at = d + tl.arange(0, WIDTH)
        v = tl.zeros([WIDTH], tl.float32)
        for split in range(0, SPLITS):
            v += tl.load(sums + (split * N + i) * D + at, mask=at < D, other=0.0)
        v -= along * tl.load(x + i * D + at, mask=at < D, other=0).to(tl.float32)
        tl.store(out + i * D + at, v.to(out.dtype.element_ty), mask=at < D)


# ---------------------------------------------------------------- launch settings


class Launch(NamedTuple):
    """Tile sizes of the matrix products; `rows` x `classes` is the tile that P is made and read in."""

    rows: int
    classes: int
    width: int  # of D, per step of the cosines
    columns: int  # of D, per program of the gradients
    step: int  # classes per step of sample_products; divides `classes`
    warps: int
    stages: int


# By operand and samples per domain; from arithmetic (accumulator registers, shared memory: `python -m kernels.bench
# compile`), not yet from measurements: see RESULTS.md.
LAUNCH = {
    ("bf16", 128): Launch(rows=128, classes=128, width=64, columns=128, step=64, warps=8, stages=3),
    ("bf16", 64): Launch(rows=64, classes=128, width=64, columns=128, step=64, warps=4, stages=3),
    ("bf16", 16): Launch(rows=16, classes=128, width=64, columns=128, step=64, warps=4, stages=3),
    ("fp32", 128): Launch(rows=64, classes=64, width=32, columns=64, step=32, warps=4, stages=3),
    ("fp32", 64): Launch(rows=64, classes=64, width=32, columns=64, step=32, warps=4, stages=3),
    ("fp32", 16): Launch(rows=16, classes=64, width=32, columns=64, step=32, warps=4, stages=3),
}
PROGRAMS = 1056  # of a launch: 8 for each of the 132 multiprocessors of an H100
STRIP = 1024  # classes at least per strip: 8 bytes a sample for 1024 logits
CHUNK_BYTES = 16 << 20  # of P: it is written once and read D / columns times, and should stay in the L2 cache
CHUNK = 1024  # classes at least per chunk, whatever CHUNK_BYTES says
COPY_ROWS = 512  # samples per domain from which a bf16 copy of fp32 class weights pays for itself


def choose_launch(operand: str, N: int, K: int) -> Launch:
    """By the samples that a domain has on average; how many it really has is known to the GPU alone."""
    return next(LAUNCH[operand, rows] for rows in (128, 64, 16) if rows <= max(N // K, 16))


class Call(NamedTuple):
    """What the launches of one call share."""

    N: int
    C: int
    D: int
    K: int
    launch: Launch
    operand: tl.dtype
    precision: str
    ranges: tuple[tuple[int, int], ...]
    copy: bool

    @property
    def tiles(self) -> int:
        """Upper bound on the tiles of samples: every domain may end in one that is not full."""
        return (self.N + self.K * (self.launch.rows - 1)) // self.launch.rows

    @property
    def shape(self) -> dict:
        """Arguments of the kernels that work on tiles."""
        launch = self.launch
        return {"KP": triton.next_power_of_2(self.K), "OPERAND": self.operand, "PRECISION": self.precision,
                "ROWS": launch.rows, "CLASSES": launch.classes, "num_warps": launch.warps}

    @property
    def chunk(self) -> int:
        """Classes whose P is in memory at once, in whole tiles."""
        launch = self.launch
        size = 2 if self.operand == tl.bfloat16 else 4
        most = max(CHUNK_BYTES // (self.tiles * launch.rows * size), CHUNK)
        return triton.cdiv(min(most, self.C), launch.classes) * launch.classes


def plan(embeddings: Tensor, weight: Tensor, ranges: tuple) -> Call:
    """Tile sizes and precision of a call.

    bf16 embeddings are multiplied in bf16. Others in TF32 where `torch.set_float32_matmul_precision` allows it ("high",
    "medium"), in fp32 where it does not; fp16 always in TF32, which has fp16's digits without its overflow.
    """
    (N, D), C, K = embeddings.shape, len(weight), len(ranges)
    bf16 = embeddings.dtype == torch.bfloat16
    exact = embeddings.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    copy = bf16 and weight.dtype == torch.float32 and N >= COPY_ROWS * K
    return Call(N, C, D, K, choose_launch("bf16" if bf16 else "fp32", N, K), tl.bfloat16 if bf16 else tl.float32,
                "ieee" if exact else "tf32", ranges, copy)


@lru_cache(maxsize=64)
def class_table(ranges: tuple, starts: tuple, totals: tuple, device: torch.device) -> Tensor:
    """int64 [K, 4]: rows of W from, to; number of the first of them among the domain's classes; classes in all."""
    rows = [(*r, start, total) for r, start, total in zip(ranges, starts, totals, strict=True)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


# ---------------------------------------------------------------- autograd function


def forward(call: Call, x, w, labels, domains, classes, per_sample, per_domain, merge, options: dict):
    """The forward launches; returns what the caller is given and what backward needs."""
    N, C, D, K = call[:4]
    launch, device = call.launch, x.device
    scale, m_ang, m_add = per_sample
    weight, smoothing, step_count = per_domain
    smooth = options.pop("smooth")

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    KP, width = triton.next_power_of_2(K), min(triton.next_power_of_2(D), 1024)
    order, groups, count = empty(N, dtype=torch.int32), empty(4, K, dtype=torch.int32), empty(K)
    group_rows[(1,)](labels, domains, classes, order, groups, count, N, K, KP=KP, ROWS=launch.rows, BLOCK=256)
    inv_x, target, column = empty(N), empty(N), empty(N, dtype=torch.int32)
    sample_norms[(N,)](x, w, labels, domains, classes, inv_x, target, column, N, K, D, WIDTH=width)
    inv_w = empty(C)
    operand = empty(C, D, dtype=torch.bfloat16) if call.copy else w
    class_norms[(triton.cdiv(C, 4),)](w, operand, inv_w, C, D, COPY=call.copy, CLASSES=4, WIDTH=width)

    longest = max((end - start for start, end in call.ranges), default=0)
    strips = max(min(triton.cdiv(PROGRAMS, call.tiles), triton.cdiv(longest, STRIP)), 1)
    strip = triton.cdiv(triton.cdiv(longest, strips), launch.classes) * launch.classes
    strips = max(triton.cdiv(longest, strip), 1) if longest else 1
    parts = [empty(strips, N) for _ in range(3 if smooth else 2)]
    best, mass, total = (*parts, parts[0])[:3]  # without smoothing the sum of logits is neither written nor read
    if longest:
        cosine_tiles[(call.tiles, strips)](
            x, operand, inv_x, inv_w, scale, column, order, groups, classes, best, mass, total, N, K, D, strip,
            SMOOTH=smooth, WIDTH=launch.width, EVEN=D % launch.width == 0, STAGES=launch.stages, **call.shape)
    others = empty(3, N)
    merge_strips[(triton.cdiv(N, 128),)](best, mass, total, scale, labels, domains, classes, *others, N, K,
                                         max(strip, 1), strips if longest else 0, SMOOTH=smooth, BLOCK=128)
    if merge is not None:
        *others, target = merge(*others, target)

    loss, by_domain, cos = empty(1), empty(K), empty(N)
    correct = empty(N, dtype=torch.int8)
    slopes = [empty(N) for _ in range(4)]
    losses[(1,)](*others, target, scale, m_ang, m_add, labels, domains, classes, count,
                 count if step_count is None else step_count, weight, smoothing, loss, by_domain, cos, correct, *slopes,
                 N, K, KP=KP, BLOCK=512, **options)
    return (loss[0], by_domain, cos, correct.bool()), (operand, inv_x, inv_w, column, order, groups, *slopes)


def backward(call: Call, x, w, scale, classes, upstream, saved, need_x: bool, need_w: bool):
    """dx, dw, one chunk of classes after the other."""
    N, C, D, K = call[:4]
    launch, device = call.launch, x.device
    operand, inv_x, inv_w, column, order, groups, *slopes = saved
    chunk, shape = call.chunk, call.shape
    columns = triton.cdiv(D, launch.columns)
    splits = max(min(triton.cdiv(PROGRAMS // 4, call.tiles * columns), 16), 1)
    dw = torch.empty_like(w) if need_w else None
    sums = torch.zeros(splits, N, D, dtype=torch.float32, device=device) if need_x else None
    gradients = torch.empty(call.tiles * launch.rows, chunk, device=device,
                            dtype=torch.bfloat16 if call.operand == tl.bfloat16 else torch.float32)
    along = torch.empty(call.tiles, chunk, device=device)
    for first in range(0, C, chunk):
        last = min(first + chunk, C)
        if not any(start < last and first < end for start, end in call.ranges):
            if need_w:
                dw[first:last] = 0
            continue
        blocks = triton.cdiv(last - first, launch.classes)
        gradient_tiles[(call.tiles, blocks)](
            x, operand, inv_x, inv_w, scale, column, *slopes, upstream, order, groups, classes, gradients, along,
            K, D, first, chunk, WIDTH=launch.width, EVEN=D % launch.width == 0, STAGES=launch.stages, **shape)
        if need_x:
            sample_products[(call.tiles, columns, splits)](
                operand, gradients, order, groups, classes, sums, N, K, D, first, last, chunk,
                COLUMNS=launch.columns, STEP=launch.step, STAGES=launch.stages, **shape)
        if need_w:
            class_products[(blocks, columns)](
                x, operand, gradients, along, order, groups, classes, dw, K, D, first, last, chunk,
                COLUMNS=launch.columns, **{k: v for k, v in shape.items() if k != "KP"})
    dx = torch.empty_like(x) if need_x else None
    if need_x:
        width = min(triton.next_power_of_2(D), 1024)
        project_samples[(N,)](x, inv_x, sums, dx, N, D, splits, WIDTH=width)
    return dx, dw


class MarginLossFunction(torch.autograd.Function):
    """loss, per_domain, target_cos, correct; only the loss has a gradient, to embeddings and class weights."""

    @staticmethod
    def forward(ctx, x, w, call, labels, domains, classes, per_sample, per_domain, merge, options):
        out, saved = forward(call, x, w, labels, domains, classes, per_sample, per_domain, merge, dict(options))
        ctx.save_for_backward(x, w, per_sample[0], classes, *saved)
        ctx.call = call
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        x, w, scale, classes, *saved = ctx.saved_tensors
        dx, dw = backward(ctx.call, x, w, scale, classes, upstream.float().contiguous(), saved,
                          *ctx.needs_input_grad[:2])
        return dx, dw, *[None] * 8


def margin_loss(embeddings, weight, labels, domains, class_ranges, shard, per_sample, per_domain, *, num_domains,
                by_sample, clamp, straight, smooth) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.margin_loss.margin_loss` with every argument as a tensor: scale and margins [N], weight, smoothing and
    counts [K], fp32."""
    ranges = tuple((int(start), int(end)) for start, end in class_ranges)
    sizes = tuple(end - start for start, end in ranges)
    starts, totals = ((0,) * len(ranges), sizes) if shard is None else (tuple(shard.start), tuple(shard.total))
    classes = class_table(ranges, starts, totals, embeddings.device)
    merge = None if shard is None or shard.merge is None else partial(shard.merge, scale=per_sample[0])
    options = {"num_domains": num_domains, "BY_SAMPLE": by_sample, "CLAMP": clamp, "STRAIGHT": straight,
               "smooth": smooth}
    return MarginLossFunction.apply(
        embeddings.contiguous(), weight.contiguous(), plan(embeddings, weight, ranges), labels.contiguous(),
        domains.contiguous(), classes, per_sample, per_domain, merge, options)
