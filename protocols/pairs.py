"""Listed pairs: 10-fold verification, and the yardstick that every split gets.

Copy with it: protocols/bootstrap.py, data_prep/__init__.py, data_prep/format.py.
"""

import math
from dataclasses import replace

import numpy as np

from data_prep.format import Split, matched_pairs
from protocols.bootstrap import Estimate, Unscorable, intervals, resample_pairs, weighted_mean

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SCORE_BINS = np.linspace(-1, 1, 51)  # of the score distributions


# ---------------------------------------------------------------- verification


def roc(scores: np.ndarray, same: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """FAR and TAR, from (0, 0) to (1, 1), at every distinct score as a threshold (accepted: score >= threshold).

    Args:
        scores: [P] similarities.
        same: bool [P], genuine pairs.
        weights: [P], default 1.
    """
    order = np.argsort(-scores)  # unstable sorting is faster, and ties are accepted together
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
    """The largest TAR whose FAR does not exceed the target (strict rule, no interpolation); NaN without both kinds."""
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
        rest, held = folds != fold, folds == fold
        if not w[held].sum() or not w[rest].sum():
            continue
        # accepting the first i sorted pairs is right for the genuine among them and the impostors after them
        gain = np.concatenate([[0.0], np.cumsum(np.where(same[rest], w[rest], -w[rest]))])
        s = scores[rest]
        cut = np.append(True, np.append(s[:-1] != s[1:], True))  # equal scores are not separated
        i = int(np.argmax(np.where(cut, gain, -np.inf)))
        threshold = np.inf if i == 0 else -np.inf if i == len(s) else (s[i - 1] + s[i]) / 2
        accuracies.append(weighted_mean((scores[held] >= threshold) == same[held], w[held]))
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


def score_verification(x: np.ndarray, split: Split, draws: int, seed: int) -> tuple[dict, dict]:
    """10-fold accuracy, AUC, EER, TAR@FAR (given at least 1 / FAR impostors) and d' of a split's pairs.

    Returns:
        {rule: {metric: Estimate}}, exact thresholds first; and for plots the ROC and the histogram of the scores of
        either kind over SCORE_BINS.
    """
    pairs, folded = np.array(split.column("pairs")), f"{split.protocol['folds']} folds"
    if len(np.unique(pairs[:, 3])) == 1:  # dealt before any pair is left out: every run has the same folds
        pairs[:, 3], folded = np.arange(len(pairs)) % 10, "10 folds, dealt"
    pairs = pairs[np.isfinite(x[pairs[:, :2], 0]).all(1)]
    ends, same, folds = pairs[:, :2], pairs[:, 2] == 1, pairs[:, 3]
    if same.all() or not same.any():
        raise Unscorable(f"{split.folder}: its pairs are all genuine or all impostors: nothing to verify")
    scores, people = (x[ends[:, 0]] * x[ends[:, 1]]).sum(1), split.labels[ends]

    def exact(weights: np.ndarray | None) -> dict[str, float]:
        far, tar = roc(scores, same, weights)
        values = {"accuracy": fold_accuracy(scores, same, folds, weights), "auc": float(np.trapezoid(tar, far)),
                  "eer": equal_error_rate(far, tar), "d-prime": d_prime(scores, same, weights)}
        supported = [target for target in FARS if target * (~same).sum() >= 1]
        return values | {f"tar@far={target:g}": tar_at_far(far, tar, target) for target in supported}

    statistics = {"exact thresholds, strict FAR": exact, "thresholds 0 to 4 by 0.01 on the squared distance":
                  lambda weights: grid_accuracy(scores, same, folds, weights)}
    figures = {f"{folded}, {rule}": intervals(
        statistic, resample_pairs(split.labels, ends, people[:, 0] == people[:, 1], draws, seed), len(pairs), people)
        for rule, statistic in statistics.items()}
    far, tar = roc(scores, same)
    spread = {kind: np.histogram(scores[mask], SCORE_BINS)[0] for kind, mask in (("same", same), ("different", ~same))}
    return figures, {"far": far, "tar": tar, **spread}


# ---------------------------------------------------------------- one yardstick for all


def score_pairs(x: np.ndarray, labels: np.ndarray, draws: int, seed: int, count: int = 5000,
                target: float | None = None) -> dict[str, Estimate]:
    """Same/different AUC and d' (or TAR at a target FAR) on matched numbers of random pairs: a yardstick for all."""
    labels = np.where(np.isfinite(x[:, 0]), labels, -1)
    pairs = matched_pairs(labels, count, seed)
    if not len(pairs):
        return {}
    same, scores = np.arange(len(pairs)) < len(pairs) // 2, (x[pairs[:, 0]] * x[pairs[:, 1]]).sum(1)

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        far, tar = roc(scores, same, weights)
        return {"pair auc": float(np.trapezoid(tar, far))} | (
            {"pair d-prime": d_prime(scores, same, weights)} if target is None else
            {f"tar@far={target:g}": tar_at_far(far, tar, target)})

    figures = intervals(statistic, resample_pairs(labels, pairs, same, draws, seed), len(pairs), labels[pairs])
    return {metric: replace(figure, kind="yardstick", measure=metric) for metric, figure in figures.items()}
