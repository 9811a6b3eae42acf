"""Templates of IJB-B and IJB-C: listed pairs (1:1) and search in galleries (1:N).

Copy with it: protocols/bootstrap.py, protocols/pairs.py, protocols/search.py, data_prep/__init__.py,
data_prep/format.py.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch

from data_prep.format import Split
from protocols.bootstrap import Estimate, Unscorable, bootstrap_counts, intervals, normalise, weighted_mean
from protocols.pairs import FARS, SCORE_BINS, tar_at_far
from protocols.search import FPIRS, mates_in, search_gallery, tpir_at_fpir


@dataclass
class Templates:
    """The images of a template set, pooled: one vector and one identity per template."""

    ids: np.ndarray  # int64 [T], ascending: every template that has an image or is listed
    vectors: np.ndarray  # unit float32 [T, D]; zeros where not enrolled
    identity: np.ndarray  # int64 [T]; below 0 and unique where neither images nor a genuine pair give the person
    enrolled: np.ndarray  # bool [T]: has a readable image

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Indices of templates in these arrays."""
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
        quality: [M], factors of the embeddings.
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
    enrolled[place], identity[named] = True, split.labels[listed]  # unreadable images give it, too
    templates, known = Templates(ids, vectors, identity, enrolled), np.isin(np.arange(len(ids)), named)
    if "template_pairs" in split.index["columns"] and not known.all():
        pairs = split.column("template_pairs")
        left, right = (templates.places(column) for column in pairs[pairs[:, 2] == 1, :2].T)
        for a, b in ((left, right), (right, left)):
            missing = ~known[a] & known[b]
            identity[a[missing]] = identity[b[missing]]
    return templates


def score_listed(x: np.ndarray, left: np.ndarray, right: np.ndarray, block: int = 256,
                 device: torch.device | str = "cpu") -> np.ndarray:
    """Inner products float32 [P] of listed pairs of rows of x, by blocks of left rows times all rows.

    Lists name the same templates thousands of times, and gathering both sides pair by pair moves far more memory.
    """
    order = np.argsort(left, kind="stable")
    lefts, size = np.unique(left, return_counts=True)
    first = np.concatenate([[0], np.cumsum(size)])
    x, listed = torch.from_numpy(x).to(device), np.empty(len(left), dtype=np.float32)
    for start in range(0, len(lefts), block):
        chunk = lefts[start : start + block]
        pairs = order[first[start] : first[start + len(chunk)]]
        rows = np.repeat(np.arange(len(chunk)), size[start : start + len(chunk)])
        scores = x[torch.from_numpy(chunk).to(device)] @ x.T
        places = torch.from_numpy(rows * len(x) + right[pairs]).to(device)
        listed[pairs] = scores.flatten()[places].cpu().numpy()
    return listed


@dataclass
class Tail:
    """The ROC of millions of pairs where the FAR is small: exact, and quick to reweight."""

    pairs: np.ndarray  # [n] the highest scores, descending
    start: np.ndarray  # [points] first of the `pairs` between this point and the one before
    corner: np.ndarray  # bool [points]: also a point of scikit-learn's roc_curve, which drops some


def find_tail(scores: np.ndarray, same: np.ndarray, target: float, need: int) -> Tail | None:
    """The ROC down to the `need`-th highest impostor; None where that does not decide TAR at every FAR up to `target`.

    Points without a genuine pair of their own are kept only where scikit-learn keeps them: where the steps to the
    neighbouring thresholds differ. The rule of the nearest FAR depends on that, to the last digit.

    Args:
        scores: [P] similarities; below -1: never accepted.
        same: bool [P], genuine pairs.
    """
    impostors = scores[~same]
    least = np.partition(impostors, -need)[-need] if need <= len(impostors) else -np.inf
    pairs = np.flatnonzero(scores >= least)
    pairs, whole = pairs[np.argsort(-scores[pairs], kind="stable")], len(pairs) == len(scores)
    last = np.flatnonzero(np.append(np.diff(scores[pairs]) != 0, True))  # ties are accepted together
    genuine, false = np.cumsum(same[pairs])[last], np.cumsum(~same[pairs])[last]
    corner = np.ones(len(last), dtype=bool)
    corner[1:-1] = (np.diff(genuine, 2) != 0) | (np.diff(false, 2) != 0)
    corner[-1] = whole  # else its lower neighbour is unknown
    if not whole and not (corner & (false >= target * len(impostors))).any():
        return None
    kept = corner | (np.diff(genuine, prepend=0) > 0)
    ends = last[kept]
    return Tail(pairs[: ends[-1] + 1], np.append(0, ends[:-1] + 1), corner[kept])


def tar_at_nearest_far(far: np.ndarray, tar: np.ndarray, target: float) -> float:
    """The TAR at the FAR nearest to the target, of several the last (insightface's rule; may exceed the target)."""
    if math.isnan(far[-1] + tar[-1]):
        return math.nan
    gap = np.abs(far - target)
    return float(tar[np.flatnonzero(gap == gap.min())[-1]])


def score_template_pairs(templates: Templates, pairs: np.ndarray, draws: int, seed: int,
                         device: torch.device | str = "cpu") -> tuple[dict[str, dict[str, Estimate]], dict]:
    """TAR@FAR of listed pairs of templates, by rule for the FAR ("nearest", "strict"), and curves to draw.

    FARs below 1 / (impostor pairs) are left out. A pair with a template that is not enrolled is never accepted.
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

    scores = score_listed(templates.vectors, left, right, device=device)
    scores[~(templates.enrolled[left] & templates.enrolled[right])] = -2  # below every cosine

    def resample(tail: Tail) -> tuple[dict[tuple[str, float], Estimate], float]:
        """Figures by rule and FAR, and the least FAR at which a resampling's tail ends."""
        a, b, matched = identity[left[tail.pairs]], identity[right[tail.pairs]], same[tail.pairs]
        corner, ends = np.append(True, tail.corner), []

        def statistic(counts: np.ndarray | None) -> dict[tuple[str, float], float]:
            """Of these counts of each person; NaN without pairs of a kind."""
            counts = np.ones(people, dtype=np.int64) if counts is None else counts
            once = counts[a]
            genuine = np.add.reduceat(np.where(matched, once, 0), tail.start)
            false = np.add.reduceat(np.where(matched, 0, once * counts[b]), tail.start)
            far = np.append(0, np.cumsum(false)) / (counts @ (impostors_of @ counts) or math.nan)
            tar = np.append(0, np.cumsum(genuine)) / (counts @ genuine_of or math.nan)
            ends.append(far[corner][-1])
            nearest = {("nearest", f): tar_at_nearest_far(far[corner], tar[corner], f) for f in targets}
            return nearest | {("strict", f): tar_at_far(far, tar, f) for f in targets}

        tars = intervals(statistic, bootstrap_counts(np.arange(people), draws, seed), len(pairs), np.arange(people))
        return tars, np.nanmin(ends)

    # then all, if many scores are equal or a resampling lacks the people of the highest impostors
    for need in (int(1.5 * max(targets) * others) + 2, others + 1):
        if tail := find_tail(scores, same, max(targets), need):
            tars, end = resample(tail)
            if end > max(targets):
                break
    figures = {rule: {f"tar@far={far:g}": tars[rule, far] for far in targets} for rule in ("nearest", "strict")}
    return figures, draw_scores(scores, same)


def draw_scores(scores: np.ndarray, same: np.ndarray, points: int = 2000) -> dict[str, np.ndarray]:
    """Plot data of a long list of pairs: its ROC at FARs that are evenly spaced as logarithms, and its scores."""
    kinds = np.sort(scores[~same]), np.sort(scores[same])
    rejected = kinds[0][-np.unique(np.geomspace(1, len(kinds[0]), points).astype(int))]  # what is above is accepted
    far, tar = (np.concatenate([[0], 1 - np.searchsorted(kind, rejected, side="right") / len(kind), [1]])
                for kind in kinds)
    different, same = (np.histogram(np.minimum(kind, 1), SCORE_BINS)[0] for kind in kinds)  # rounding may pass 1
    return {"far": far, "tar": tar, "same": same, "different": different}


def score_template_search(templates: Templates, galleries: list[np.ndarray], probes: np.ndarray, draws: int,
                          seed: int, device: torch.device | str = "cpu") -> dict[str, Estimate]:
    """Rank-k and TPIR@FPIR of probe templates in each gallery separately.

    Hits at a rank are summed over galleries and divided by all probes (each has its mate in one of them); TPIR is the
    mean over galleries. A probe is mated if a gallery lists its person; if either is not enrolled, it is a miss. A
    probe that is not enrolled and of unknown person is a miss in every gallery.
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
        search.correct[lost], search.first[lost], search.wrong[lost] = -np.inf, np.inf, -2
        searches.append((search, listed | (lost & (people < 0))))
    supported = [f for f in FPIRS if all((~mated).sum() * f >= 1 and mated.any() for _, mated in searches)]

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        values = {f"rank-{k}": weighted_mean(sum((search.first <= k).astype(float) for search, _ in searches), weights)
                  for k in (1, 5, 10)}
        for f in supported:
            values[f"tpir@fpir={f:g}"] = float(np.mean([tpir_at_fpir(*pair, f, weights) for pair in searches]))
        return values

    who = templates.identity[probes]
    return intervals(statistic, bootstrap_counts(who, draws, seed), len(probes), who)


def score_templates(x: np.ndarray, split: Split, draws: int, seed: int,
                    device: torch.device | str = "cpu") -> tuple[dict, dict]:
    """1:1 and 1:N figures of a template set, by rule, with and without the detector's score as a weight.

    Args:
        x: embeddings [M, D], not normalised.

    Returns:
        {rule: {metric: Estimate}}, the customary one first, and its plot data, as of `score_verification`.
    """
    columns, figures, curve = split.index["columns"], {}, {}
    poolings = {"norm": np.ones(len(split), dtype=np.float32)}
    if "quality" in columns:
        poolings = {"norm x detector score": np.maximum(split.column("quality"), 0)} | poolings
    for pooling, quality in poolings.items():
        templates, how = pool_templates(x, split, quality), f"means of media weighted by {pooling}"
        if "template_pairs" in columns:
            by_rule, drawn = score_template_pairs(templates, split.column("template_pairs"), draws, seed, device)
            curve = curve or drawn
            figures |= {f"1:1, {how}, {rule} FAR": by_metric for rule, by_metric in by_rule.items()}
        if {"template_gallery", "template_probes"} <= set(columns):
            listed, probes = split.column("template_gallery"), split.column("template_probes")[:, 0]
            galleries = [listed[listed[:, 1] == g, 0] for g in np.unique(listed[:, 1])]
            rule = f"1:N in {len(galleries)} galleries, {how}, TPIR above the floor(N x FPIR)-th non-mate"
            figures[rule] = score_template_search(templates, galleries, probes, draws, seed, device)
    if not any(figures.values()):
        raise Unscorable(f"{split.folder}: its lists support no figure: {1 / max(FARS):g} impostor pairs and a genuine "
                         "one, or a gallery and probes, are needed")
    return figures, curve
