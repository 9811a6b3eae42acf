"""Listed pairs: 10-fold verification, templates (IJB-B/C, with their 1:N), and the yardstick that every split gets."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch

from data_prep.shards import Split
from evaluate_bootstrap import Figure, bootstrap_counts, intervals, weighted_mean
from evaluate_embed import normalise
from evaluate_search import FPIRS, Unscorable, mates_in, score_blocks, search_gallery, tpir_at_fpir
from train import matched_pairs

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SCORE_BINS = np.linspace(-1, 1, 51)  # of the score distributions
BINS = 50 * 1300  # of the scores of long lists of pairs, 3e-5 wide: whole numbers of them make the above


# ---------------------------------------------------------------- verification


def roc(scores: np.ndarray, same: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """FAR and TAR, from (0, 0) to (1, 1), at every distinct score as a threshold (accepted: score >= threshold).

    Args:
        scores: [P] similarities.
        same: bool [P], genuine pairs.
        weights: [P], default 1.
    """
    order = np.argsort(-scores)  # not stable, and faster for it: ties are accepted together
    ordered, accepted = scores[order], same[order]
    last = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
    if weights is None:
        genuine = np.cumsum(accepted)[last]
        impostor = last + 1 - genuine
    else:
        w = weights[order].astype(float)
        genuine, impostor = np.cumsum(w * accepted)[last], np.cumsum(w * ~accepted)[last]
    with np.errstate(invalid="ignore", divide="ignore"):
        tar, far = genuine / genuine[-1], impostor / impostor[-1]
    return np.concatenate([[0.0], far]), np.concatenate([[0.0], tar])


def tar_at_far(far: np.ndarray, tar: np.ndarray, target: float) -> float:
    """The largest TAR whose FAR does not exceed the target (strict rule, no interpolation); NaN of one kind alone."""
    if math.isnan(far[-1] + tar[-1]):
        return math.nan  # a resampling without genuine pairs or without impostors
    return float(tar[np.searchsorted(far, target * (1 + 1e-9), side="right") - 1])


def equal_error_rate(far: np.ndarray, tar: np.ndarray) -> float:
    """Where FAR = 1 - TAR, linear between the neighbouring points of the ROC."""
    gap = far - (1 - tar)
    if not np.isfinite(gap).all():
        return math.nan  # a resampling without genuine pairs or without impostors
    i = int(np.argmax(gap >= 0))
    if i == 0:
        return float(far[0])
    t = -gap[i - 1] / (gap[i] - gap[i - 1])
    return float(far[i - 1] + t * (far[i] - far[i - 1]))


def d_prime(scores: np.ndarray, same: np.ndarray, weights: np.ndarray | None = None) -> float:
    """(mean genuine - mean impostor) / √((var genuine + var impostor) / 2)."""
    moments = []
    for mask in (same, ~same):
        w = None if weights is None else weights[mask]
        mean = weighted_mean(scores[mask], w)
        moments.append((mean, weighted_mean((scores[mask] - mean) ** 2, w)))
    (a, va), (b, vb) = moments
    return (a - b) / math.sqrt((va + vb) / 2) if va + vb > 0 else math.nan


def fold_accuracy(scores: np.ndarray, same: np.ndarray, folds: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean over folds of the accuracy at the threshold that is best on the other folds (LFW's protocol, exact form).

    Candidate thresholds lie half-way between neighbouring scores; of equally good ones the highest is taken.
    Source: LFW, unrestricted with labelled outside data; insightface's `verification.py` searches a grid instead.
    """
    w = np.ones(len(scores)) if weights is None else weights.astype(float)
    order = np.argsort(-scores, kind="stable")
    scores, same, folds, w = scores[order], same[order], folds[order], w[order]
    accuracies = []
    for fold in np.unique(folds):
        rest, here = folds != fold, folds == fold
        if not w[here].sum() or not w[rest].sum():
            continue
        # accepting the first i of the sorted pairs gets right: genuine ones among them, impostors after them
        gain = np.concatenate([[0.0], np.cumsum(np.where(same[rest], w[rest], -w[rest]))])
        s = scores[rest]
        cut = np.append(True, np.append(s[:-1] != s[1:], True))  # equal scores are not separated
        i = int(np.argmax(np.where(cut, gain, -np.inf)))
        threshold = np.inf if i == 0 else -np.inf if i == len(s) else (s[i - 1] + s[i]) / 2
        accuracies.append(weighted_mean((scores[here] >= threshold) == same[here], w[here]))
    return float(np.mean(accuracies)) if accuracies else math.nan


def grid_accuracy(scores: np.ndarray, same: np.ndarray, folds: np.ndarray,
                  weights: np.ndarray | None = None) -> dict[str, float]:
    """The same with thresholds on the squared distance 2 - 2 cos in 0, 0.01, ..., 3.99: mean and SD over the folds.

    Accepted where the distance is below the threshold; of equally good ones the first.
    Source: insightface, `verification.py`, calculate_roc (np.mean and np.std of its accuracies).
    """
    grid, w = np.arange(0, 4, 0.01), np.ones(len(scores)) if weights is None else weights.astype(float)
    place = np.searchsorted(grid, 2 - 2 * scores.astype(float), side="right")  # the first threshold that accepts
    names, fold = np.unique(folds, return_inverse=True)
    right = np.zeros((len(names), len(grid) + 1))
    np.add.at(right, (fold, place), np.where(same, w, -w))  # an accepted pair: right if genuine, else no longer right
    right = np.cumsum(right, axis=1)[:, : len(grid)] + np.bincount(fold, w * ~same)[:, None]
    total = np.bincount(fold, w)
    used = (total > 0) & (total.sum() > total)
    if not used.any():
        return {"accuracy": math.nan, "accuracy sd": math.nan}
    best = (right.sum(0) - right).argmax(1)  # on the other folds
    accuracies = (right[np.arange(len(names)), best] / np.maximum(total, 1e-300))[used]
    return {"accuracy": float(accuracies.mean()), "accuracy sd": float(accuracies.std())}


def grid_tar(scores: np.ndarray, same: np.ndarray, folds: np.ndarray, weights: np.ndarray | None = None,
             target: float = 1e-3) -> dict[str, float]:
    """TAR at a threshold that has this FAR on the other folds: mean and SD over the folds, and the FAR that it has.

    Thresholds on the squared distance 2 - 2 cos in 0, 0.001, ..., 3.999, accepted below, and between two of them where
    the FAR of the other folds, taken as linear, is the target; 0 where none has so high a FAR.
    Source: insightface, `verification.py`, calculate_val (interp1d "slinear", as SciPy read repeated FARs until 1.3).
    """
    grid, w = np.arange(0, 4, 0.001), np.ones(len(scores)) if weights is None else weights.astype(float)
    distances = np.maximum(2 - 2 * scores.astype(float), 0)  # of a vector with itself it may round below 0
    names, fold = np.unique(folds, return_inverse=True)
    false = np.zeros((len(names), len(grid) + 1))
    np.add.at(false, (fold[~same], np.searchsorted(grid, distances[~same], side="right")), w[~same])
    false = np.cumsum(false, axis=1)[:, : len(grid)]
    genuine, impostors = np.bincount(fold, w * same), np.bincount(fold, w * ~same)
    rest = impostors.sum() - impostors
    far = (false.sum(0) - false) / np.maximum(rest, 1e-300)[:, None]
    # of thresholds with one FAR, np.interp takes the last below the target and the first above it
    thresholds = np.array([np.interp(target, row, grid) if row[-1] >= target else 0.0 for row in far])
    accepted = w * (distances < thresholds[fold])
    tars = (np.bincount(fold, accepted * same) / np.maximum(genuine, 1e-300))[(genuine > 0) & (rest > 0)]
    fars = (np.bincount(fold, accepted * ~same) / np.maximum(impostors, 1e-300))[(impostors > 0) & (rest > 0)]
    if not len(tars) or not len(fars):
        return dict.fromkeys((f"tar@far={target:g}", f"tar@far={target:g} sd", f"far found for {target:g}"), math.nan)
    return {f"tar@far={target:g}": float(tars.mean()), f"tar@far={target:g} sd": float(tars.std()),
            f"far found for {target:g}": float(fars.mean())}


def score_verification(x: np.ndarray, split: Split, draws: int, seed: int) -> tuple[dict, dict]:
    """10-fold accuracy, AUC, EER, TAR@FAR (where there are 1 / FAR impostors) and d' of a split's pairs.

    insightface's TAR@FAR=0.001 is of a threshold from the other folds: it is left out where those of a fold hold less
    than 1,000 impostors.

    Returns:
        {rule: {metric: Figure}}, the exact thresholds first, and to draw: the ROC, and how many scores of either kind
        fall into each of SCORE_BINS.
    """
    pairs, folded = np.array(split.column("pairs")), f"{split.protocol['folds']} folds"
    if len(np.unique(pairs[:, 3])) == 1:  # dealt before any pair is left out: the same folds for every run
        pairs[:, 3], folded = np.arange(len(pairs)) % 10, "10 folds, dealt"
    pairs = pairs[np.isfinite(x[pairs[:, 0], 0]) & np.isfinite(x[pairs[:, 1], 0])]
    left, right, same, folds = pairs[:, 0], pairs[:, 1], pairs[:, 2] == 1, pairs[:, 3]
    if same.all() or not same.any():
        raise Unscorable(f"{split.folder}: its pairs are all genuine or all impostors: nothing to verify")
    scores = (x[left] * x[right]).sum(1)
    a, b = split.labels[left], split.labels[right]

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        far, tar = roc(scores, same, weights)
        values = {"accuracy": fold_accuracy(scores, same, folds, weights), "auc": float(np.trapezoid(tar, far)),
                  "eer": equal_error_rate(far, tar), "d-prime": d_prime(scores, same, weights)}
        supported = [target for target in FARS if target * (~same).sum() >= 1]
        return values | {f"tar@far={target:g}": tar_at_far(far, tar, target) for target in supported}

    def pair_weights() -> Iterator[np.ndarray]:
        for counts in bootstrap_counts(split.labels, draws, seed):
            yield np.where(a == b, counts[left], counts[left] * counts[right])

    (far, tar), people = roc(scores, same), split.labels[pairs[:, :2]]
    spread = {kind: np.histogram(scores[mask], SCORE_BINS)[0] for kind, mask in (("same", same), ("different", ~same))}
    found = {f"{folded}, exact thresholds, strict FAR": intervals(statistic, pair_weights(), len(pairs), people),
             f"{folded}, thresholds 0 to 4 by 0.01 on the squared distance": intervals(
                 lambda w: grid_accuracy(scores, same, folds, w), pair_weights(), len(pairs), people)}
    if (~same).sum() - np.unique(folds[~same], return_counts=True)[1].max() >= 1000:
        found[f"{folded}, thresholds 0 to 4 by 0.001 on the squared distance, interpolated to the FAR of the other "
              "folds"] = intervals(lambda w: grid_tar(scores, same, folds, w), pair_weights(), len(pairs), people)
    return found, {"far": far, "tar": tar, **spread}


# ---------------------------------------------------------------- templates


@dataclass
class Templates:
    """What the images of a template set amount to: one vector a template, and whose it is."""

    ids: np.ndarray  # int64 [T], ascending: every template that has an image or is listed
    vectors: np.ndarray  # unit float32 [T, D]; zeros where not enrolled
    identity: np.ndarray  # int64 [T]; below 0, and its own, where neither images nor a genuine pair tell the person
    enrolled: np.ndarray  # bool [T]: has a readable image

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Where templates stand in these arrays."""
        if len(self.ids) and self.ids[0] >= 0 and self.ids[-1] < 1 << 24:  # numbers like IJB's: ten times as fast
            place = np.zeros(self.ids[-1] + 1, dtype=np.int32)
            place[self.ids] = np.arange(len(self.ids))
            return place[ids]
        return np.searchsorted(self.ids, ids).astype(np.int32)


def pool_templates(x: np.ndarray, split: Split, quality: np.ndarray) -> Templates:
    """Templates: the mean over the images of each medium (a video counts once), summed over media, normalised.

    Source: insightface, `ijb_evals.py`.

    Args:
        x: embeddings float32 [M, D], not normalised; NaN where unreadable.
        split: a split with the protocol "templates".
        quality: [M], multiplied to the embeddings.
    """
    template, media = np.array(split.optional("template")), split.optional("media")
    tables = {"template_pairs": 2, "template_gallery": 1, "template_probes": 1}  # columns that name templates
    listed = [split.column(name)[:, :n].ravel() for name, n in tables.items() if name in split.index["columns"]]
    ids = np.unique(np.concatenate([template[template >= 0], *listed]))
    listed = np.flatnonzero(template >= 0)
    named = np.searchsorted(ids, template[listed])
    good = np.isfinite(x[listed, 0])
    rows, place = listed[good], named[good]
    _, medium, size = np.unique(place * (int(media.max()) + 2) + media[rows] + 1, return_inverse=True,
                                return_counts=True)
    weight = (quality[rows] / size[medium]).astype(np.float32)
    vectors = normalise(scipy.sparse.csr_array((weight, (place, rows)), shape=(len(ids), len(x))) @ x)
    enrolled, identity = np.zeros(len(ids), dtype=bool), -2 - np.arange(len(ids))
    enrolled[place], identity[named] = True, split.labels[listed]  # unreadable images tell whose it is, too
    found, told = Templates(ids, vectors, identity, enrolled), np.isin(np.arange(len(ids)), named)
    if "template_pairs" in split.index["columns"] and not told.all():
        pairs = split.column("template_pairs")
        left, right = (found.places(column) for column in pairs[pairs[:, 2] == 1, :2].T)
        for a, b in ((left, right), (right, left)):
            known = ~told[a] & told[b]
            identity[a[known]] = identity[b[known]]
    return found


def score_listed(x: np.ndarray, left: np.ndarray, right: np.ndarray, block: int = 256,
                 device: torch.device | str = "cpu") -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places in the list and inner products float32 of listed pairs of rows of x, some at a time, each pair once.

    By blocks of left rows times all rows: lists of templates name the same ones thousands of times, and to gather both
    sides pair by pair moves far more memory.
    """
    order = np.argsort(left, kind="stable")
    lefts, size = np.unique(left, return_counts=True)
    first = np.concatenate([[0], np.cumsum(size)])
    x = torch.from_numpy(x).to(device)
    for start in range(0, len(lefts), block):
        some = lefts[start : start + block]
        pairs = order[first[start] : first[start + len(some)]]
        rows = np.repeat(np.arange(len(some)), size[start : start + len(some)])
        scores = x[torch.from_numpy(some).to(device)] @ x.T
        places = torch.from_numpy(rows * len(x) + right[pairs]).to(device)
        yield pairs, scores.flatten()[places].cpu().numpy()


@dataclass
class Scores:
    """What a long list of pairs scored, in bounded memory: each score in a bin, and the highest in full."""

    bins: np.ndarray  # int64 [2, BINS + 1]: impostors and genuine pairs by cosine; first those never accepted
    pairs: np.ndarray  # [n] places in the list of those kept, the highest score first
    scores: np.ndarray  # float32 [n] theirs
    whole: bool  # all are kept


def collect_scores(listed: Iterator[tuple[np.ndarray, np.ndarray]], same: np.ndarray, need: int) -> Scores:
    """Bin the scores of `score_listed`; keep every pair that scores as high as the `need`-th highest impostor.

    Args:
        listed: places in the list, and cosines; below -1: a pair that is never accepted.
        same: bool [P], genuine pairs.
    """
    bins, least, kept, held, limit = np.zeros((2, BINS + 1), dtype=np.int64), 0, [], 0, 2 * need
    for pairs, scores in listed:
        at = np.where(scores < -1.5, 0, np.clip((scores + 1) * (BINS / 2), 0, BINS - 1).astype(np.int64) + 1)
        bins += np.bincount(same[pairs] * (BINS + 1) + at, minlength=2 * (BINS + 1)).reshape(2, -1)
        # the bin of the need-th highest impostor so far can only rise: what is below it will not be needed
        above = np.cumsum(bins[0, ::-1])
        least = BINS - int(np.searchsorted(above, need)) if above[-1] >= need else 0
        high = at >= least
        kept.append((pairs[high], scores[high], at[high]))
        held += int(high.sum())
        if held > limit:
            kept = [tuple(column[part[2] >= least] for column in part) for part in kept]
            held = sum(len(part[0]) for part in kept)
            limit = 2 * max(need, held)
    pairs, scores, at = (np.concatenate(column) for column in zip(*kept, strict=True))
    pairs, scores = pairs[at >= least], scores[at >= least]
    order = np.argsort(-scores, kind="stable")
    return Scores(bins, pairs[order], scores[order], least == 0)


@dataclass
class Tail:
    """The ROC of millions of pairs where the FAR is small: exact, and quick to reweight."""

    pairs: np.ndarray  # [n] the highest scores, descending
    start: np.ndarray  # [points] first of the `pairs` between this point and the one before
    corner: np.ndarray  # bool [points]: also a point of scikit-learn's roc_curve, which drops some


def find_tail(found: Scores, same: np.ndarray, target: float) -> Tail | None:
    """The part of the ROC that decides TAR at every FAR up to `target`; None where too few scores were kept.

    Points without a genuine pair of their own are kept only where scikit-learn keeps them: where the steps to the
    neighbouring thresholds differ. The rule of the nearest FAR depends on that, to the last digit.
    """
    last = np.flatnonzero(np.append(np.diff(found.scores) != 0, True))  # ties are accepted together
    matched = same[found.pairs]
    genuine, false = np.cumsum(matched)[last], np.cumsum(~matched)[last]
    corner = np.ones(len(last), dtype=bool)
    corner[1:-1] = (np.diff(genuine, 2) != 0) | (np.diff(false, 2) != 0)
    corner[-1] = found.whole  # else its neighbour below is not known
    if not found.whole and not (corner & (false >= target * found.bins[0].sum())).any():
        return None
    kept = corner | (np.diff(genuine, prepend=0) > 0)
    ends = last[kept]
    return Tail(found.pairs[: ends[-1] + 1], np.append(0, ends[:-1] + 1), corner[kept])


def tar_at_nearest_far(far: np.ndarray, tar: np.ndarray, target: float) -> float:
    """The TAR at the FAR nearest to the target, of several the last (insightface's rule; may exceed the target)."""
    if math.isnan(far[-1] + tar[-1]):
        return math.nan
    gap = np.abs(far - target)
    return float(tar[np.flatnonzero(gap == gap.min())[-1]])


def score_template_pairs(templates: Templates, pairs: np.ndarray, draws: int, seed: int,
                         device: torch.device | str = "cpu") -> tuple[dict[str, dict[str, Figure]], dict]:
    """TAR@FAR of listed pairs of templates, by rule for the FAR ("nearest", "strict"), and curves to draw.

    Only FARs of which the list has an impostor to spare. A pair with a template that is not enrolled is never accepted.
    """
    left, right = templates.places(pairs[:, 0]), templates.places(pairs[:, 1])
    same = np.array(pairs[:, 2] == 1)
    _, identity = np.unique(templates.identity, return_inverse=True)
    identity = identity.astype(np.int32)
    people, others = int(identity.max()) + 1, int((~same).sum())
    targets = [far for far in FARS if far * others >= 1]
    if not targets or others == len(pairs):
        return {}, {}
    genuine_of = np.bincount(identity[left[same]], minlength=people)
    impostors_of = scipy.sparse.csr_array((people, people), dtype=np.int32)
    for start in range(0, len(pairs), 1 << 22):  # how often two people are compared, added up bit by bit
        part = slice(start, start + (1 << 22))
        a, b = (identity[side[part][~same[part]]] for side in (left, right))
        impostors_of += scipy.sparse.csr_array((np.ones(len(a), dtype=np.int32), (a, b)), shape=(people, people))

    def listed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for places, scores in score_listed(templates.vectors, left, right, device=device):
            scores[~(templates.enrolled[left[places]] & templates.enrolled[right[places]])] = -2  # below every cosine
            yield places, scores

    def resample(tail: Tail) -> tuple[dict[tuple[str, float], Figure], tuple[np.ndarray, np.ndarray], float]:
        """Figures by rule and FAR, the ROC, and the least FAR at which a resampling's tail ends."""
        a, b, matched = identity[left[tail.pairs]], identity[right[tail.pairs]], same[tail.pairs]
        corner, ends = np.append(True, tail.corner), []

        def roc_of(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """FAR and TAR at the tail's points when each person is there so many times; NaN without pairs of a kind."""
            once = counts[a]
            genuine = np.add.reduceat(np.where(matched, once, 0), tail.start)
            false = np.add.reduceat(np.where(matched, 0, once * counts[b]), tail.start)
            total, impostors = counts @ genuine_of, counts @ (impostors_of @ counts)
            return (np.append(0, np.cumsum(false)) / (impostors or math.nan),
                    np.append(0, np.cumsum(genuine)) / (total or math.nan))

        def statistic(counts: np.ndarray | None) -> dict[str, float]:
            far, tar = roc_of(np.ones(people, dtype=np.int64) if counts is None else counts)
            ends.append(far[corner][-1])
            nearest = {("nearest", f): tar_at_nearest_far(far[corner], tar[corner], f) for f in targets}
            return nearest | {("strict", f): tar_at_far(far, tar, f) for f in targets}

        found = intervals(statistic, bootstrap_counts(np.arange(people), draws, seed), len(pairs), np.arange(people))
        return found, roc_of(np.ones(people, dtype=np.int64)), np.nanmin(ends)

    # all of them where many scores are equal, or where a resampling lacks the people of the highest impostors
    for need in (int(1.5 * max(targets) * others) + 2, others + 1):
        scores = collect_scores(listed(), same, need)
        if tail := find_tail(scores, same, max(targets)):
            found, curve, end = resample(tail)
            if scores.whole or end > max(targets):
                break
    figures = {rule: {f"tar@far={far:g}": found[rule, far] for far in targets} for rule in ("nearest", "strict")}
    return figures, draw_from_bins(scores.bins, *curve)


def draw_from_bins(bins: np.ndarray, far: np.ndarray, tar: np.ndarray, points: int = 2000) -> dict:
    """What is drawn of a long list of pairs: its ROC, exact as far as the tail goes, then from the bins; its scores."""
    impostor, genuine = (np.cumsum(kind[::-1]) / max(kind.sum(), 1) for kind in bins)
    below = impostor > far[-1]
    far, tar = np.append(far, impostor[below]), np.append(tar, genuine[below])
    grid = np.geomspace(max(far[far > 0].min(), 1e-7), 1, points)
    some = np.unique(np.concatenate([[0, len(far) - 1], np.searchsorted(far, grid, side="right") - 1]))
    wide = bins[:, 1:].reshape(2, len(SCORE_BINS) - 1, -1).sum(2)
    return {"far": far[some], "tar": tar[some], "same": wide[1], "different": wide[0]}


def score_template_search(templates: Templates, galleries: list[np.ndarray], probes: np.ndarray, draws: int,
                          seed: int, device: torch.device | str = "cpu") -> dict[str, Figure]:
    """Rank-k and TPIR@FPIR of probe templates in each gallery for itself.

    Hits at a rank are added over the galleries and divided by all probes (each has its mate in one of them); TPIR is
    the mean over galleries. Mated is a probe whose person a gallery lists, enrolled or not: where either of the two is
    not enrolled, it counts as a miss. So does, in every gallery, a probe that is not enrolled and of unknown person.
    Source: insightface, `ijb_evals.py`, evaluation_1N.
    """
    probes, searches = templates.places(probes), []
    lost, people = ~templates.enrolled[probes], templates.identity[probes]
    mated = [np.isin(people, templates.identity[templates.places(gallery)]) & (people >= 0) for gallery in galleries]
    for gallery, listed in zip(galleries, mated, strict=True):
        rows = templates.places(gallery)
        rows = rows[templates.enrolled[rows]]
        same = mates_in(templates.identity[rows])
        search = search_gallery(templates.vectors, probes, rows, lambda p, same=same: (same(templates.identity[p]), []),
                                device=device)
        search.own[lost], search.first[lost], search.wrong[lost] = -np.inf, np.inf, -2
        searches.append((search, listed | (lost & (people < 0))))
    supported = [f for f in FPIRS if all((~mated).sum() * f >= 1 and mated.any() for _, mated in searches)]

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        values = {f"rank-{k}": weighted_mean(sum((search.first <= k).astype(float) for search, _ in searches), weights)
                  for k in (1, 5, 10)}
        for f in supported:
            values[f"tpir@fpir={f:g}"] = float(np.mean([tpir_at_fpir(*found, f, weights) for found in searches]))
        return values

    who = templates.identity[probes]
    return intervals(statistic, bootstrap_counts(who, draws, seed), len(probes), who)


def highest_wrong(x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, mates: Callable, most: int,
                  device: torch.device | str = "cpu") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `most` highest scores of probes with what is not theirs, and each probe's own highest.

    Both are of the same products: a mate and another one that are the same image must not differ by a rounding.

    Args:
        x, probes, gallery, mates, device: as of `search_gallery`.

    Returns:
        Scores, descending, and the number of the probe of each; the score of each probe's nearest mate, or -inf.
    """
    kept, whose, own = np.zeros(0, dtype=x.dtype), np.zeros(0, dtype=np.int64), np.full(len(probes), -np.inf)
    for start, scores in score_blocks(x, probes, gallery, 1 << 22, device):
        for i, s in enumerate(scores, start):
            right, ignored = mates(probes[i])
            own[i] = s[right].max(initial=-np.inf)
            s[right], s[ignored] = -np.inf, -np.inf
        flat = scores.ravel()
        # what is below the least of those kept so far cannot be among the highest
        high = np.flatnonzero(flat > (kept[-1] if len(kept) == most else -np.inf))
        if len(high) > most:
            high = high[np.argpartition(-flat[high], most - 1)[:most]]
        kept, whose = np.append(kept, flat[high]), np.append(whose, start + high // len(gallery))
        order = np.argsort(-kept, kind="stable")[:most]
        kept, whose = kept[order], whose[order]
    return kept, whose, own


def score_legacy_search(templates: Templates, galleries: list[np.ndarray], probes: np.ndarray, draws: int, seed: int,
                        device: torch.device | str = "cpu") -> dict[str, Figure]:
    """Rank-k and TPIR@FPIR of probe templates in all galleries merged, as published before `score_template_search`.

    The threshold is the ceil(probes x FPIR)-th highest of all scores with gallery templates of other people; TPIR is
    the share of all probes whose mate scores above it, first or not. Probes that are not enrolled are misses.
    Source: insightface, `ijb_1n.py`, evaluation.
    """
    probes, rows = templates.places(probes), templates.places(np.unique(np.concatenate(galleries)))
    rows, lost = rows[templates.enrolled[rows]], ~templates.enrolled[probes]
    same = mates_in(templates.identity[rows])

    def mates(probe: int) -> tuple[np.ndarray, np.ndarray]:
        return same(templates.identity[probe]), np.zeros(0, dtype=np.int64)

    search, there = search_gallery(templates.vectors, probes, rows, mates, device=device), np.flatnonzero(~lost)
    search.first[lost] = np.inf
    supported = [f for f in FPIRS if len(probes) * f >= 1]
    pairs = len(there) * len(rows) - sum(len(search.ranks[i]) for i in there)

    def figures(most: int) -> dict[str, Figure]:
        own = np.full(len(probes), -np.inf)
        scores, whose, own[there] = highest_wrong(templates.vectors, probes[there], rows, mates, most, device)
        whose = there[whose]

        def statistic(weights: np.ndarray | None) -> dict[str, float]:
            w = np.ones(len(probes)) if weights is None else weights
            values = {f"rank-{k}": weighted_mean((search.first <= k).astype(float), w) for k in (1, 5, 10)}
            above = np.cumsum(w[whose])  # as if every pair stood there w times
            for f in supported:
                place = np.searchsorted(above, math.ceil(w.sum() * f))
                reached = place < len(scores) or len(scores) == pairs
                threshold = scores[place] if place < len(scores) else -np.inf
                values[f"tpir@fpir={f:g}"] = weighted_mean((own > threshold).astype(float), w) if reached \
                    else math.nan
            return values

        who = templates.identity[probes]
        return intervals(statistic, bootstrap_counts(who, draws, seed), len(probes), who)

    most = 4 * math.ceil(len(probes) * max(supported, default=0)) + 1
    while True:
        found = figures(max(min(most, pairs), 1))
        # a resampling may lack the people of the highest scores, and reach below what was kept
        if most >= pairs or not any(np.isnan(figure.draws).any() for figure in found.values()):
            return found
        most *= 4


def score_templates(x: np.ndarray, split: Split, draws: int, seed: int,
                    device: torch.device | str = "cpu") -> tuple[dict, dict]:
    """1:1 and 1:N figures of a template set, by rule, with and without the detector's score as a weight.

    Args:
        x: embeddings [M, D], not normalised.

    Returns:
        {rule: {metric: Figure}}, the customary one first, and to draw, of that one: as `score_verification`.
    """
    columns, found, curve = split.index["columns"], {}, {}
    poolings = {"norm": np.ones(len(split), dtype=np.float32)}
    if "quality" in columns:
        poolings = {"norm x detector score": np.maximum(split.column("quality"), 0)} | poolings
    for pooling, quality in poolings.items():
        templates, how = pool_templates(x, split, quality), f"means of media weighted by {pooling}"
        if "template_pairs" in columns:
            by_rule, drawn = score_template_pairs(templates, split.column("template_pairs"), draws, seed, device)
            curve = curve or drawn
            found |= {f"1:1, {how}, {rule} FAR": figures for rule, figures in by_rule.items()}
        if {"template_gallery", "template_probes"} <= set(columns):
            listed, probes = split.column("template_gallery"), split.column("template_probes")[:, 0]
            galleries = [listed[listed[:, 1] == g, 0] for g in np.unique(listed[:, 1])]
            rule = f"1:N in {len(galleries)} galleries, {how}, TPIR above the floor(N x FPIR)-th non-mate"
            found[rule] = score_template_search(templates, galleries, probes, draws, seed, device)
            legacy = score_legacy_search(templates, galleries, probes, draws, seed, device)
            found[f"legacy 1:N in {len(galleries)} galleries merged, {how}, TPIR above the ceil(N x FPIR)-th non-mate "
                  "similarity"] = legacy
    if not any(found.values()):
        raise Unscorable(f"{split.folder}: its lists support no figure: {1 / max(FARS):g} impostor pairs and a genuine "
                         "one, or a gallery and probes, are the least")
    return found, curve


# ---------------------------------------------------------------- one yardstick for all


def score_pairs(x: np.ndarray, labels: np.ndarray, draws: int, seed: int, count: int = 5000) -> dict[str, Figure]:
    """Same/different AUC and d' on matched numbers of random pairs: one yardstick for every kind of split."""
    labels = np.where(np.isfinite(x[:, 0]), labels, -1)
    pairs = matched_pairs(labels, count, seed)
    if not len(pairs):
        return {}
    same, scores = np.arange(len(pairs)) < len(pairs) // 2, (x[pairs[:, 0]] * x[pairs[:, 1]]).sum(1)

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        far, tar = roc(scores, same, weights)
        return {"pair auc": float(np.trapezoid(tar, far)), "pair d-prime": d_prime(scores, same, weights)}

    def pair_weights() -> Iterator[np.ndarray]:
        for counts in bootstrap_counts(labels, draws, seed):
            yield np.where(same, counts[pairs[:, 0]], counts[pairs[:, 0]] * counts[pairs[:, 1]])

    return intervals(statistic, pair_weights(), len(pairs), labels[pairs])
