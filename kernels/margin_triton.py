"""The margin loss in Triton; kernels/margin_loss.py defines its formulas and calls it.
Copy with it: kernels/margin_plan.py; kernels/margin_loss.py calls it.

The forward pass:

    group_rows      sort samples by domain into slots; every domain starts a tile, the rest of its last tile is empty
    sample_norms    copy the samples in slot order and in the dtype of the products; 1/|x_i| and target cosine in fp32
    class_norms     1/|w_j|, and a copy of W in the dtype of the products, whole or in windows
    cosine_tiles    per (sample, strip of classes): best cosine, log Σ exp, Σ s c over the non-targets
    losses          φ, ℓ, sums by domain, and coefficients for the backward pass

The backward pass, by chunks of classes of all domains, so that no N x C matrix exists:

    gradient_tiles  P_ij = dL/dc_ij / (|x_i| |w_j|) of the chunk, from recomputed cosines
    sample_products dx_i += Σ_j P_ij w_j, whose component along x_i is subtracted at the end
    class_products  dw_j  = Σ_i P_ij x_i - (its component along w_j): complete after one visit, without atomics

P contains both norms, so the products need no normalised copies. Ranges that overlap without being equal are processed
one group after another. Sums run in a fixed order: results are deterministic. There is no host synchronisation and no
size depends on data, so a call can be captured in a CUDA graph. cuBLAS would need the number of samples of each domain,
which only the GPU knows.
"""

from functools import lru_cache, partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .margin_plan import Plan, disjoint_groups, make_plan

TINY = tl.constexpr(1e-12)  # as in margin_loss.py
# rows of `fields`, fp32 [9, S], by slot
NORM, SCALE, ANGULAR, ADDITIVE, TARGET, LSE, NEGATIVE, SHIFT, POSITIVE = (tl.constexpr(row) for row in range(9))

# ---------------------------------------------------------------- kernels: forward
# do_not_specialize: otherwise, a value that is 1 or divisible by 16 in some calls causes recompilation


@triton.jit
def find_members(labels, domains, total, i, N, k):
    """Membership int32 [n, KP] of samples i [n] in domains k [KP], 0 for ignored and invalid labels; and labels [n]."""
    domain, label = tl.load(domains + i, mask=i < N, other=-1), tl.load(labels + i, mask=i < N, other=-1)
    return ((domain[:, None] == k) & (label[:, None] >= 0) & (label[:, None] < total)).to(tl.int32), label


@triton.jit(do_not_specialize=["N", "tiles"])
def group_rows(labels, domains, classes, order, slots, owner, groups, count, N, K, tiles, KP: tl.constexpr,
               ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Counting sort by domain, in one program; samples with ignored or invalid labels get no slot.

    order [S]: sample of a slot, preset to -1; slots [N]: slot of a sample or -1; owner [tiles]: domain of a tile or -1;
    groups [2, K]: first slot and end of a domain; count [K + 1]: samples of a domain, then invalid labels.
    """
    k = tl.arange(0, KP)[None, :]
    total = tl.load(classes + 5 * k + 3, mask=k < K, other=0)
    counts, wrong = tl.zeros([1, KP], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        member, label = find_members(labels, domains, total, start + tl.arange(0, BLOCK), N, k)
        counts += tl.sum(member, 0)[None, :]
        wrong += ((label != -1) & (tl.sum(member, 1) == 0)).to(tl.int32)
    used = (counts + ROWS - 1) // ROWS
    ends = tl.cumsum(used, 1)
    first = (ends - used) * ROWS
    tl.store(groups + k, first, mask=k < K)
    tl.store(groups + K + k, first + counts, mask=k < K)
    tl.store(count + k, counts.to(tl.float32), mask=k < K)
    tl.store(count + K, tl.sum(wrong, 0).to(tl.float32))
    for start in range(0, tiles, BLOCK):
        m = start + tl.arange(0, BLOCK)
        domain = tl.sum((ends <= m[:, None]).to(tl.int32), 1)
        tl.store(owner + m, tl.where(domain < K, domain, -1), mask=m < tiles)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        member, _ = find_members(labels, domains, total, i, N, k)
        valid = tl.sum(member, 1) > 0
        slot = tl.sum(member * (first + tl.cumsum(member, 0) - member), 1)
        tl.store(order + slot, i, mask=valid)
        tl.store(slots + i, tl.where(valid, slot, -1), mask=i < N)
        first += tl.sum(member, 0)[None, :]


@triton.jit
def find_range(classes, domain, low, window):
    """First row in W and number of classes of a domain, and the row of its class 0 in the operand of the products."""
    start = tl.load(classes + 5 * domain)
    size = (tl.load(classes + 5 * domain + 1) - start).to(tl.int32)
    return start, size, tl.where(window > 0, tl.load(classes + 5 * domain + 4) * window - low, start)


@triton.jit
def sample_norms(x, w, labels, order, owner, classes, scale, m_ang, m_add, fields, column, copy, S, D, pitch,
                 BY_S: tl.constexpr, BY_ANG: tl.constexpr, BY_ADD: tl.constexpr, ROWS: tl.constexpr,
                 SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """For SLOTS slots: copy of x, 1/|x|, s, margins, target cosine (-inf: class on another rank), class (or -1)."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    sample = tl.load(order + slot)
    i = tl.maximum(sample, 0)
    domain = tl.where(sample < 0, 0, tl.load(owner + slot // ROWS))
    start, size, _ = find_range(classes, domain, 0, 0)
    target = (tl.load(labels + i) - tl.load(classes + 5 * domain + 2)).to(tl.int32)
    is_local = (sample >= 0) & (target >= 0) & (target < size)
    xs, ws = x + i.to(tl.int64)[:, None] * D, w + tl.where(is_local, start + target, 0)[:, None] * D
    square, cos, square_w = tl.zeros([SLOTS], tl.float32), tl.zeros([SLOTS], tl.float32), tl.zeros([SLOTS], tl.float32)
    for d in range(0, pitch, WIDTH):
        at = d + tl.arange(0, WIDTH)[None, :]
        a = tl.load(xs + at, mask=(at < D) & (sample >= 0)[:, None], other=0).to(tl.float32)
        b = tl.load(ws + at, mask=(at < D) & is_local[:, None], other=0).to(tl.float32)
        tl.store(copy + slot.to(tl.int64)[:, None] * pitch + at, a.to(copy.dtype.element_ty), mask=at < pitch)
        square, cos, square_w = square + tl.sum(a * a, 1), cos + tl.sum(a * b, 1), square_w + tl.sum(b * b, 1)
    norm = tl.where(square >= TINY, tl.rsqrt(square), 0.0)
    cos *= norm * tl.where(square_w >= TINY, tl.rsqrt(square_w), 0.0)
    tl.store(fields + NORM * S + slot, norm)
    tl.store(fields + SCALE * S + slot, tl.load(scale + (i if BY_S else domain)))
    tl.store(fields + ANGULAR * S + slot, tl.load(m_ang + (i if BY_ANG else domain)))
    tl.store(fields + ADDITIVE * S + slot, tl.load(m_add + (i if BY_ADD else domain)))
    tl.store(fields + TARGET * S + slot, tl.where(is_local, cos, float("-inf")))
    tl.store(column + slot, tl.where(is_local, target, -1))


@triton.jit(do_not_specialize=["low", "window"])
def class_norms(w, classes, copy, inverse, D, pitch, low, window, COPY: tl.constexpr, CLASSES: tl.constexpr,
                WIDTH: tl.constexpr):
    """1/|w_j| of CLASSES classes per program, and their copy."""
    k = tl.program_id(1)
    start, size, base = find_range(classes, k, low, window)
    first = low + tl.program_id(0) * CLASSES
    if (first >= size) | (tl.load(classes + 5 * k + 4) != k):
        return
    c = first + tl.arange(0, CLASSES)
    square = tl.zeros([CLASSES], tl.float32)
    for d in range(0, pitch, WIDTH):
        at = d + tl.arange(0, WIDTH)
        inside = (c < size)[:, None] & (at < D)[None, :]
        b = tl.load(w + (start + c)[:, None] * D + at[None, :], mask=inside, other=0).to(tl.float32)
        square += tl.sum(b * b, 1)
        if COPY:
            to = copy + (base + c)[:, None] * pitch + at[None, :]
            tl.store(to, b.to(copy.dtype.element_ty), mask=(c < size)[:, None] & (at < pitch)[None, :])
    tl.store(inverse + start + c, tl.where(square >= TINY, tl.rsqrt(square), 0.0), mask=c < size)


@triton.jit(do_not_specialize=["low", "window", "strip", "part", "parts"])
def cosine_tiles(x, w, inverse, fields, column, owner, classes, out, S, pitch, low, window, strip, part, parts,
                 SMOOTH: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
                 WIDTH: tl.constexpr, STAGES: tl.constexpr):
    """out [2 or 3, parts, S]: best cosine, log-sum-exp (and sum) of s c over `strip` classes without the target.

    Tiles of samples are adjacent in launch order, so that a strip of W is read from memory once and then from L2. One
    loop over classes and D lets the loads of a class tile overlap the products of the previous one.
    """
    domain = tl.load(owner + tl.program_id(0))
    if domain < 0:
        return
    start, size, base = find_range(classes, domain, low, window)
    first = low + tl.program_id(1) * strip
    if first >= size:
        return
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    norm, s, target = tl.load(fields + NORM * S + slot), tl.load(fields + SCALE * S + slot), tl.load(column + slot)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    sums, logits = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    at = tl.arange(0, WIDTH)
    xs = x + slot.to(tl.int64)[:, None] * pitch + at[None, :]
    ws = w + base * pitch + at[:, None]
    dots = tl.zeros([ROWS, CLASSES], tl.float32)
    steps, last = pitch // WIDTH, tl.minimum(first + strip, size)
    for t in tl.range(0, tl.cdiv(last - first, CLASSES) * steps, num_stages=STAGES):
        cols = first + t // steps * CLASSES + tl.arange(0, CLASSES)
        near, d = tl.minimum(cols, size - 1), t % steps * WIDTH
        dots = tl.dot(tl.load(xs + d), tl.load(ws + near.to(tl.int64)[None, :] * pitch + d), dots,
                      input_precision=PRECISION)  # int64: C·D passes 2³¹
        if d + WIDTH == pitch:
            cos = dots * norm[:, None] * tl.load(inverse + start + near)[None, :]
            negative = (cols < last)[None, :] & (cols[None, :] != target[:, None])
            if SMOOTH:
                logits += s * tl.sum(tl.where(negative, cos, 0.0), 1)
            cos = tl.where(negative, cos, float("-inf"))
            new = tl.maximum(top, tl.max(cos, 1))
            finite = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN
            sums = sums * tl.exp(s * (top - finite)) + tl.sum(tl.exp(s[:, None] * (cos - finite[:, None])), 1)
            top = new
            dots = tl.zeros([ROWS, CLASSES], tl.float32)
    out += (part + tl.program_id(1)) * S + slot
    tl.store(out, top)
    tl.store(out + parts * S, s * top + tl.log(sums))
    if SMOOTH:
        tl.store(out + 2 * parts * S, logits)


@triton.jit
def margin_target(cos, m, STRAIGHT: tl.constexpr):
    """φ before the additive margin, and φ', without arccos: θ + m <= π is t >= -cos m."""
    t = tl.minimum(tl.maximum(cos, -1.0), 1.0)
    square = (1 - t) * (1 + t)  # 1 - t² would lose the digits of 1 - t
    cos_m, sin_m = tl.cos(m), tl.sin(m)
    low = (m < 0) & (t > cos_m)  # θ + m < 0
    high = (m > 0) & (t < -cos_m)  # θ + m > π
    phi = t * cos_m - tl.sqrt(square) * sin_m  # cos(θ + m)
    phi = tl.where(low, t + 1 - cos_m, tl.where(high, t - m * sin_m, phi))
    slope = tl.where(low | high, 1.0, cos_m + t * sin_m * tl.rsqrt(tl.maximum(square, 1e-6)))
    if STRAIGHT:
        slope = tl.full(slope.shape, 1.0, tl.float32)
    return phi, slope


@triton.jit(do_not_specialize=["N", "num_domains"])
def losses(best, lse, total, target, fields, slots, owner, classes, count, step_count, weight, smoothing, loss,
           per_domain, target_cos, correct, S, N, K, num_domains, BY_SAMPLE: tl.constexpr, STRAIGHT: tl.constexpr,
           SMOOTH: tl.constexpr, ROWS: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    """ℓ of every sample and the sums by domain, in one program: N values are few, and the order of the sums is fixed.

    With z = lse⁻ - sφ, q = sigmoid(z) = 1 - p_y and G = w_d / denominator, for the backward pass:
        dL/dc_ij = G s q exp(s c_ij - lse⁻) - G s ε/C        NEGATIVE, SHIFT     j != y
        dL/dc_iy = G s (ε (1 - 1/C) - q) φ'                  POSITIVE
    """
    k = tl.arange(0, KP)
    seen, n = tl.load(count + k, mask=k < K, other=0.0), tl.load(step_count + k, mask=k < K, other=0.0)
    size_k = tl.load(classes + 5 * k + 3, mask=k < K, other=1).to(tl.float32)
    denominator = n * num_domains
    if num_domains == 0:
        denominator = n * tl.maximum(tl.sum((seen > 0).to(tl.int32), 0), 1)
    if BY_SAMPLE:
        denominator = tl.sum(n, 0) + 0 * n
    factor = tl.load(weight + k, mask=k < K, other=0.0) / tl.where(seen > 0, denominator, 1.0)
    # an invalid label makes loss and gradients NaN, so that no step is taken
    factor = tl.where(tl.load(count + K) > 0, float("nan"), factor)
    eps_k = tl.load(smoothing + k, mask=k < K, other=0.0)
    sums = tl.zeros([KP], tl.float32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        slot = tl.load(slots + i, mask=i < N, other=-1)
        valid = slot >= 0
        slot = tl.maximum(slot, 0)
        member = (tl.load(owner + slot // ROWS)[:, None] == k[None, :]) & valid[:, None]
        G = tl.sum(tl.where(member, factor[None, :], 0.0), 1)
        eps = tl.sum(tl.where(member, eps_k[None, :], 0.0), 1)
        C = tl.maximum(tl.sum(tl.where(member, size_k[None, :], 0.0), 1), 1.0)
        s, cos, rest = tl.load(fields + SCALE * S + slot), tl.load(target + slot), tl.load(lse + slot)
        phi, slope = margin_target(cos, tl.load(fields + ANGULAR * S + slot), STRAIGHT)
        logit = s * (phi - tl.load(fields + ADDITIVE * S + slot))
        z = tl.where(valid, rest - logit, 0.0)
        small = tl.exp(-tl.abs(z))
        u = 1 + small  # log(1 + small), exact also where u rounds to 1
        log1p = tl.where(u == 1, small, small * tl.log(u) / tl.where(u == 1, 1.0, u - 1))
        q = tl.where(z < 0, small / u, 1 / u)
        value = tl.maximum(z, 0.0) + log1p
        if SMOOTH:
            value += eps * (logit - (logit + tl.load(total + slot)) / C)
        sums += tl.sum(tl.where(member, value[:, None], 0.0), 0)
        tl.store(fields + LSE * S + slot, rest, mask=valid)
        tl.store(fields + NEGATIVE * S + slot, G * s * q, mask=valid)
        tl.store(fields + SHIFT * S + slot, G * s * eps / C, mask=valid)
        tl.store(fields + POSITIVE * S + slot, G * s * (eps * (1 - 1 / C) - q) * slope, mask=valid)
        tl.store(target_cos + i, tl.where(valid, cos, float("nan")), mask=i < N)
        tl.store(correct + i, (valid & (cos > tl.load(best + slot))).to(tl.int8), mask=i < N)
    tl.store(per_domain + k, tl.where(seen > 0, sums / tl.where(seen > 0, n, 1.0), float("nan")), mask=k < K)
    tl.store(loss, tl.sum(factor * sums, 0))


# ---------------------------------------------------------------- kernels: backward


@triton.jit(do_not_specialize=["first", "low", "window"])
def gradient_tiles(x, w, inverse, fields, column, upstream, owner, groups, classes, gradients, along, S, K, pitch,
                   chunk, first, low, window, PRECISION: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr,
                   CLASSES: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):
    """P [S, chunk], and along_j [S / HEIGHT, chunk] = Σ_i P_ij <x_i, w_j> / |w_j|² over HEIGHT samples.

    The tile in which a domain ends is padded with zeros; tiles past its end are neither written nor read.
    """
    m = tl.program_id(0)
    domain = tl.load(owner + m * HEIGHT // ROWS)
    if domain < 0:
        return
    start, size, base = find_range(classes, domain, low, window)
    place = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    if (first + tl.program_id(1) * CLASSES >= size) | (m * HEIGHT >= tl.load(groups + K + domain)):
        return
    slot, at = m * HEIGHT + tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    cols = first + place
    near = tl.minimum(cols, size - 1)
    xs = x + slot.to(tl.int64)[:, None] * pitch + at[None, :]
    ws = w + (base + near)[None, :] * pitch + at[:, None]
    dots = tl.zeros([HEIGHT, CLASSES], tl.float32)
    for d in tl.range(0, pitch, WIDTH, num_stages=STAGES):
        dots = tl.dot(tl.load(xs + d), tl.load(ws + d), dots, input_precision=PRECISION)
    fields += slot
    norm_x, norm_w = tl.load(fields + NORM * S), tl.load(inverse + start + near)
    cos = dots * norm_x[:, None] * norm_w[None, :]
    # q exp(s c - lse⁻) is the softmax of the non-targets
    p = tl.exp(tl.load(fields + SCALE * S)[:, None] * cos - tl.load(fields + LSE * S)[:, None])
    slope = tl.load(fields + NEGATIVE * S)[:, None] * p - tl.load(fields + SHIFT * S)[:, None]
    is_target = cols[None, :] == tl.load(column + slot)[:, None]
    slope = tl.where(is_target, tl.load(fields + POSITIVE * S)[:, None], slope)
    slope = tl.where((cols < size)[None, :], slope, 0.0) * tl.load(upstream)  # all coefficients of empty slots are 0
    P = (slope * norm_x[:, None] * norm_w[None, :]).to(gradients.dtype.element_ty)
    tl.store(gradients + slot.to(tl.int64)[:, None] * chunk + place[None, :], P)
    # from the rounded P, as in the products: the component along w_j then cancels in fp32
    tl.store(along + m.to(tl.int64) * chunk + place, tl.sum(P.to(tl.float32) * dots, 0) * norm_w * norm_w)


@triton.jit(do_not_specialize=["first", "last", "low", "window"])
def sample_products(w, gradients, owner, groups, classes, out, S, K, pitch, chunk, first, last, low, window,
                    PRECISION: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr,
                    STEP: tl.constexpr, STAGES: tl.constexpr):
    """out[split, slot] += Σ_j P_ij w_j over a split's part of the chunk; splits fill the GPU where samples are few."""
    m = tl.program_id(0)
    domain = tl.load(owner + m * HEIGHT // ROWS)
    if domain < 0:
        return
    _, size, base = find_range(classes, domain, low, window)
    count = tl.minimum(last, size) - first
    share = tl.cdiv(count, STEP * tl.num_programs(2)) * STEP
    begin = tl.program_id(2) * share
    if (begin >= count) | (m * HEIGHT >= tl.load(groups + K + domain)):
        return
    slot = (m * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([HEIGHT, COLUMNS], tl.float32)
    for c in tl.range(begin, tl.minimum(begin + share, count), STEP, num_stages=STAGES):
        place = c + tl.arange(0, STEP)  # whole steps: else the compiler does not prefetch P
        P = tl.load(gradients + slot[:, None] * chunk + place[None, :])
        near = base + tl.minimum(first + place, size - 1)  # P is 0 past the range, but 0 times NaN is NaN
        sums = tl.dot(P, tl.load(w + near[:, None] * pitch + at[None, :]), sums, input_precision=PRECISION)
    out += (tl.program_id(2).to(tl.int64) * S + slot)[:, None] * pitch + at[None, :]
    tl.store(out, tl.load(out) + sums)


@triton.jit(do_not_specialize=["first", "low", "window"])
def class_products(x, w, gradients, along, groups, classes, out, K, D, pitch, chunk, first, low, window,
                   ADD: tl.constexpr, PRECISION: tl.constexpr, HEIGHT: tl.constexpr, CLASSES: tl.constexpr,
                   COLUMNS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr):
    """dw_j = Σ_i P_ij x_i - along_j w_j over all domains with this range, in their order; 0 without a sample."""
    k = tl.program_id(2)
    start, size, base = find_range(classes, k, low, window)
    if (first + tl.program_id(0) * CLASSES >= size) | (tl.load(classes + 5 * k + 4) != k):
        return
    place = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([CLASSES, COLUMNS], tl.float32)
    parallel = tl.zeros([CLASSES], tl.float32)
    for j in range(k, K):
        if tl.load(classes + 5 * j + 4) == k:
            begin, end = tl.load(groups + j), tl.load(groups + K + j)
            for row in tl.range(begin, end, STEP, num_stages=STAGES):
                slot = (row + tl.arange(0, STEP)).to(tl.int64)
                P = tl.load(gradients + slot[None, :] * chunk + place[:, None])
                sums = tl.dot(P, tl.load(x + slot[:, None] * pitch + at[None, :]), sums, input_precision=PRECISION)
            for m in range(begin // HEIGHT, tl.cdiv(end, HEIGHT)):
                parallel += tl.load(along + m * chunk + place)
    cols = first + place
    near = base + tl.minimum(cols, size - 1)
    value = sums - parallel[:, None] * tl.load(w + near[:, None] * pitch + at[None, :]).to(tl.float32)
    out += (start + cols)[:, None] * D + at[None, :]
    keep = (cols < size)[:, None] & (at < D)[None, :]
    if ADD:
        value += tl.load(out, mask=keep, other=0.0)
    tl.store(out, value.to(out.dtype.element_ty), mask=keep)


# ---------------------------------------------------------------- launches


@lru_cache(maxsize=64)
def class_tables(ranges: tuple, starts: tuple, totals: tuple, device: torch.device) -> tuple[Tensor, ...]:
    """int64 [K, 5]: first row of W and end; number of that first row among the domain's classes; classes over all
    ranks; first domain with the same range. Where ranges overlap without being equal, one more table per group of
    `disjoint_groups`, in which the ranges of the other groups are empty.
    """
    tables, groups = [], disjoint_groups(ranges)
    for group in [ranges, *(groups if len(groups) > 1 else [])]:
        rows = [(a, b if (a, b) in group else a, number, total, ranges.index((a, b)))
                for (a, b), number, total in zip(ranges, starts, totals, strict=True)]
        table = torch.tensor(rows, dtype=torch.int64)
        tables.append(table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table)
    return tuple(tables)


def copy_classes(plan: Plan, w: Tensor, table: Tensor, copy: Tensor, inverse: Tensor, low: int) -> None:
    """Norms and copy of the classes from `low` on, of a window or of all."""
    class_norms[(triton.cdiv(plan.window or plan.longest, 16), plan.K)](
        w, table, copy, inverse, w.shape[1], plan.pitch, low, plan.window, COPY=plan.copy, CLASSES=16, WIDTH=256)


def forward(plan: Plan, x, w, labels, domains, tables, values, by, weight, smoothing, step_count, merge, options: dict):
    """Launch the forward pass; returns the results and the tensors for the backward pass."""
    (N, D), launch, K, S, table, smooth = x.shape, plan.launch, plan.K, plan.slots, tables[0], options["SMOOTH"]
    empty, rows = partial(torch.empty, dtype=torch.float32, device=x.device), {"ROWS": launch.rows}
    order, fields = torch.full((S,), -1, dtype=torch.int32, device=x.device), torch.zeros(9, S, device=x.device)
    slots, owner, groups, column = (empty(n, dtype=torch.int32) for n in (N, S // launch.rows, (2, K), S))
    count, samples, inverse = empty(K + 1), empty(S, plan.pitch, dtype=plan.operand), empty(len(w))
    KP = triton.next_power_of_2(K)
    group_rows[(1,)](labels, domains, table, order, slots, owner, groups, count, N, K, len(owner), KP=KP, BLOCK=256,
                     **rows)
    sample_norms[(S // 8,)](
        x, w, labels, order, owner, table, *values, fields, column, samples, S, D, plan.pitch,
        BY_S=by[0], BY_ANG=by[1], BY_ADD=by[2], SLOTS=8, WIDTH=256, **rows)
    operand = empty(plan.window * K or len(w), plan.pitch, dtype=plan.operand) if plan.copy else w
    windows = plan.windows()
    parts = torch.full((2 + smooth, max(len(windows), 1) * plan.strips, S), -torch.inf, device=x.device)
    for number, (low, _) in enumerate(windows):
        copy_classes(plan, w, table, operand, inverse, low)
        cosine_tiles[(len(owner), plan.strips)](
            samples, operand, inverse, fields, column, owner, table, parts, S, plan.pitch, low, plan.window, plan.strip,
            number * plan.strips, parts.shape[1], SMOOTH=smooth, PRECISION=plan.precision, CLASSES=launch.classes,
            WIDTH=launch.width, STAGES=launch.stages, num_warps=launch.warps, **rows)
    best, lse, target = parts[0].amax(0), parts[1].logsumexp(0), fields[4]
    total = parts[2].nan_to_num(neginf=0.0).sum(0) if smooth else lse  # not read
    if merge is not None:
        mass = torch.where(lse == -torch.inf, 0.0, (lse - fields[1] * best).exp())
        best, mass, total, target = merge(best, mass, total, target, scale=fields[1])
        lse = fields[1] * best + mass.log()
    loss, by_domain, cos, correct = empty(()), empty(K), empty(N), empty(N, dtype=torch.bool)
    losses[(1,)](best, lse, total, target, fields, slots, owner, table, count,
                 count if step_count is None else step_count, weight, smoothing, loss, by_domain, cos,
                 correct.view(torch.int8), S, N, K, KP=KP, BLOCK=256, **rows, **options)
    saved = samples, w if plan.window else operand, inverse, fields, column, slots, owner, groups
    return (loss, by_domain, cos, correct), saved


def backward(plan: Plan, x, w, tables, upstream, saved, need_x: bool, need_w: bool):
    """Launch the backward pass, chunk by chunk of classes; returns dx and dw."""
    samples, operand, inverse, fields, column, slots, owner, groups = saved
    D, launch, K, S, pitch, chunk = x.shape[1], plan.launch, plan.K, plan.slots, plan.pitch, plan.chunk
    tiles, columns, turns = S // launch.height, pitch // launch.columns, tables[1:] or tables
    empty = partial(torch.empty, device=x.device)
    gradients, along = empty(S, chunk, dtype=plan.operand), empty(tiles, chunk)
    sums = torch.zeros(plan.splits, S, pitch, device=x.device) if need_x else None
    make = torch.empty_like if plan.covers == len(w) else torch.zeros_like  # rows in no range get 0
    dw = make(w, dtype=torch.float32 if len(turns) > 1 else w.dtype) if need_w else None  # sums over groups in fp32
    if plan.window:
        operand = empty(plan.window * K, pitch, dtype=plan.operand)
    shape = {"PRECISION": plan.precision, "HEIGHT": launch.height, "STAGES": launch.stages}
    tile = shape | {"ROWS": launch.rows, "num_warps": launch.warps}
    steps = {"COLUMNS": launch.columns, "STEP": launch.step}
    for low, high in plan.windows():
        if plan.window:
            copy_classes(plan, w, tables[0], operand, inverse, low)
        for table, (first, last) in product(turns, plan.chunks(low, high)):
            blocks, at = triton.cdiv(last - first, launch.classes), (low, plan.window)
            gradient_tiles[(tiles, blocks)](
                samples, operand, inverse, fields, column, upstream, owner, groups, table, gradients, along, S, K,
                pitch, chunk, first, *at, CLASSES=launch.classes, WIDTH=launch.width, **tile)
            if need_x:
                sample_products[(tiles, columns, plan.splits)](
                    operand, gradients, owner, groups, table, sums, S, K, pitch, chunk, first, last, *at, **steps,
                    **tile)
            if need_w:
                class_products[(blocks, columns, K)](
                    samples, operand, gradients, along, groups, table, dw, K, D, pitch, chunk, first, *at,
                    ADD=len(turns) > 1, CLASSES=launch.classes, num_warps=launch.class_warps, **steps, **shape)
    dx = None
    if need_x:  # a sample without a slot has -1: the last slot, which is then empty
        v, unit = sums.sum(0)[slots, :D], x.float() * fields[0][slots, None]
        dx = (v - (v * unit).sum(1, keepdim=True) * unit).to(x.dtype)
    return dx, dw if dw is None else dw.to(w.dtype)


class MarginLossFunction(torch.autograd.Function):
    """loss, per_domain, target_cos, correct; only the loss is differentiable, in embeddings and class weights."""

    @staticmethod
    def forward(ctx, x, w, plan, labels, domains, tables, *rest):
        with torch.cuda.device_of(x):  # Triton launches on the current device
            out, saved = forward(plan, x, w, labels, domains, tables, *rest)
        ctx.save_for_backward(x, w, *saved)
        ctx.plan, ctx.tables = plan, tables  # cached tables may be inference tensors, which cannot be saved
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        x, w, *saved = ctx.saved_tensors
        with torch.cuda.device_of(x):
            return *backward(ctx.plan, x, w, ctx.tables, upstream.float().contiguous(), saved,
                             *ctx.needs_input_grad[:2]), *[None] * 11


def margin_loss(embeddings, weight, labels, domains, class_ranges, shard, values, by_sample, domain_weight, smoothing,
                step_count, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`margin_loss.margin_loss` with every argument as an fp32 tensor: scale and margins [N] where `by_sample`, else
    [K]; weight, smoothing and counts [K]. The options are those of `losses`."""
    x, w, ranges = embeddings.contiguous(), weight.contiguous(), tuple((int(a), int(b)) for a, b in class_ranges)
    starts, totals, merge = shard or ((0,) * len(ranges), [end - start for start, end in ranges], None)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
    plan = make_plan(*x.shape, ranges, x.dtype, w.dtype, torch.get_float32_matmul_precision(), processors)
    tables = class_tables(ranges, tuple(starts), tuple(totals), x.device)
    return MarginLossFunction.apply(x, w, plan, labels.contiguous(), domains.contiguous(), tables, values, by_sample,
                                    domain_weight, smoothing, step_count, merge, options)
