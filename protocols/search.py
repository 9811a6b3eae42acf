"""Probes against galleries: identification, re-identification; scores are held only in blocks.

Copy with it: protocols/bootstrap.py, data_prep/__init__.py, data_prep/format.py.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise, product

import numpy as np
import torch

from data_prep import InputError, say_once
from data_prep.format import ROLES, Split
from protocols.bootstrap import Unscorable, bootstrap_counts, intervals, weighted_mean

FPIRS = (1e-1, 1e-2)


# ---------------------------------------------------------------- identification, re-identification


@dataclass
class Search:
    """What a search of n probes in a gallery found."""

    ranks: list[np.ndarray]  # of each probe's mates, ascending, 1 = nearest, inf = missed; ties count against them
    first: np.ndarray  # [n] rank of the nearest mate; inf without one
    correct: np.ndarray  # [n] score of the nearest mate; -inf without one
    wrong: np.ndarray  # [n] score of the nearest of the others


def mates_in(labels: np.ndarray) -> Callable[[int], np.ndarray]:
    """A function that gives the places of a label among `labels`; none for the label -1."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    return lambda label: order[slice(*np.searchsorted(ordered, [label, label + 1]))] if label >= 0 else order[:0]


def take_rows(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """x[rows], without a copy where the rows are neighbours."""
    whole = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()
    return x[rows[0] : rows[-1] + 1] if whole else x[rows]


def visit_scores(x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, visit: Callable[[int, np.ndarray], None],
                 size: int = 1 << 27, other: np.ndarray | None = None, device: torch.device | str = "cpu") -> None:
    """Call visit(i, scores [m]), in threads, for each probe's scores with the gallery, which it may change.

    Arguments as of `search_gallery`. Scores are overwritten once all of their block have been visited.
    """
    other, on_cpu = x if other is None else other, torch.device(device) == torch.device("cpu")
    block = int(np.clip(size // max(len(gallery), 1), 1, 1024))
    lanes = 2 if 2 * block * len(gallery) <= size else 1  # two: one is multiplied while the other is visited
    buffers = np.empty((lanes, block, len(gallery)), dtype=x.dtype)  # reused: fresh pages cost as much as the product
    parts = range(0, len(gallery), 1 << 16)

    def items(left: int) -> np.ndarray:
        return take_rows(other, gallery[left : left + (1 << 16)]).astype(x.dtype, copy=False)

    def visit_rows(scores: np.ndarray, start: int, part: range) -> None:
        for i in part:
            visit(i, scores[i - start])

    held = [] if on_cpu else [torch.from_numpy(np.ascontiguousarray(items(left))).to(device) for left in parts]
    threads, busy = torch.get_num_threads(), [[] for _ in range(lanes)]
    with ThreadPoolExecutor(threads) as pool:  # numpy counts and sorts outside the interpreter's lock
        for number, start in enumerate(range(0, len(probes), block)):
            scores, queries = buffers[number % lanes], x[probes[start : start + block]]
            for task in busy[number % lanes]:
                task.result()
            for k, left in enumerate(parts):
                columns = scores[: len(queries), left : left + (1 << 16)]
                if on_cpu:
                    np.matmul(queries, items(left).T, out=columns)
                else:
                    columns[:] = (torch.from_numpy(queries).to(device) @ held[k].T).cpu().numpy()
            stops = np.linspace(start, start + len(queries), threads + 1).astype(int)
            busy[number % lanes] = [pool.submit(visit_rows, scores, start, range(*ends)) for ends in pairwise(stops)]
        for task in chain(*busy):
            task.result()


def search_gallery(x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, mates: Callable, size: int = 1 << 27,
                   other: np.ndarray | None = None, device: torch.device | str = "cpu") -> Search:
    """Search every probe in a gallery by blocks of the score matrix, without ever ordering the gallery's items.

    Only the ranks of mates matter: 1 + how many others score as high or higher. For a few mates they are counted; for
    more, one sort of the row (which costs a dozen counts of 2,000 values, a hundred of 20,000) serves all.

    Args:
        x: unit vectors [M, D]; NaN where unreadable, which is neither found nor finds anything.
        probes, gallery: rows of x, [n] and [m].
        other: unit vectors that hold the gallery's rows, if not x; float16 (such as a memory map) is widened by blocks.
        mates: row of a probe -> places in `gallery` that are right, and places that are neither right nor wrong.
        size: scores held at once.
        device: of the products; it holds the gallery.
    """
    search = Search([np.zeros(0, dtype=np.int64)] * len(probes), *np.full((3, len(probes)), -np.inf))
    few = int(np.clip(len(gallery) // 200, 12, 200))
    unreadable = np.isnan(x[probes, 0]).any() or np.isnan((x if other is None else other)[gallery, 0]).any()

    def rank(i: int, scores: np.ndarray) -> None:
        if unreadable:
            scores[np.isnan(scores)] = -np.inf
        right, ignored = mates(probes[i])
        correct = np.sort(scores[right])[::-1]
        scores[right], scores[ignored] = -np.inf, -np.inf
        if len(correct) < few:
            above = np.array([np.count_nonzero(scores >= score) for score in correct], dtype=np.int64)
            search.wrong[i] = scores.max(initial=-np.inf)
        else:
            scores.sort()
            above, search.wrong[i] = len(scores) - np.searchsorted(scores, correct, side="left"), scores[-1]
        search.ranks[i] = np.where(correct > -np.inf, np.arange(1, len(correct) + 1) + above, np.inf)
        search.correct[i], search.first[i] = (correct[0], search.ranks[i][0]) if len(correct) else (-np.inf, np.inf)

    visit_scores(x, probes, gallery, rank, size, other, device)
    return search


def search_shots(x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, labels: np.ndarray, mates: Callable,
                 draws: int, seed: int, device: torch.device | str = "cpu") -> np.ndarray:
    """Ranks of the mate among one drawn image of each identity, [draws, n]; inf for a probe without a mate.

    Every probe has its own draw, from the gallery that its rule leaves; all images of label -1 stay. Ties count against
    the probe.
    Source: torchreid, `metrics/rank.py`, eval_cuhk03, which draws from NumPy's global generator and cannot be repeated.

    Args:
        x, probes, gallery, mates, device: as of `search_gallery`.
        labels: identities of the gallery, [m].
    """
    order = np.argsort(labels, kind="stable")
    order, strangers = order[labels[order] >= 0], order[labels[order] < 0]
    people, start, size = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.full((draws, len(probes)), np.inf)

    def draw(i: int, scores: np.ndarray) -> None:
        right, _ = mates(probes[i])
        if len(right):
            rng = np.random.default_rng((seed, probes[i]))  # by probe, whatever the blocks and other probes
            correct = scores[rng.choice(right, draws)][:, None]
            drawn = scores[order[start + rng.integers(size, size=(draws, len(size)))]]
            drawn[:, np.searchsorted(people, labels[right[0]])] = -np.inf  # the probe's own is `correct`
            ranks[:, i] = 1 + (drawn >= correct).sum(1) + (scores[strangers] >= correct).sum(1)

    visit_scores(x, probes, gallery, draw, device=device)
    return ranks


def tpir_at_fpir(search: Search, mated: np.ndarray, target: float, weights: np.ndarray | None = None) -> float:
    """Share of the mated probes whose mate ranks first and scores above a threshold.

    The threshold is the floor(N x FPIR)-th highest best score of the N probes without a mate.
    Source: insightface, `ijb_evals.py`.
    """
    w = np.ones(len(mated)) if weights is None else weights
    order = np.argsort(-search.wrong[~mated], kind="stable")
    top, cumulative = search.wrong[~mated][order], np.cumsum(w[~mated][order])
    if not cumulative[-1]:
        return math.nan  # a resampling without them
    threshold = top[np.searchsorted(cumulative, max(int(cumulative[-1] * target), 1))]
    hit = (search.correct > search.wrong) & (search.correct > threshold)
    return weighted_mean(hit[mated].astype(float), w[mated])


def average_precision(ranks: list[np.ndarray], trapezoid: bool = False) -> np.ndarray:
    """(1/R) Σ i / r_i, r_i the rank of the i-th of a probe's R relevant items (torchreid, fast-reid), [n].

    Args:
        ranks: of each probe's relevant items, at least one, ascending from 1.
        trapezoid: the mean of i / r_i and (i - 1) / (r_i - 1), 1 where r_i = 1, as in Market-1501's own evaluation.
    """
    r, size = np.concatenate(ranks), np.array([len(one) for one in ranks])
    start = np.append(0, np.cumsum(size)[:-1])
    i = np.arange(1, len(r) + 1) - np.repeat(start, size)
    precision = i / r
    if trapezoid:
        precision = (precision + np.where(r > 1, (i - 1) / np.maximum(r - 1, 1), 1.0)) / 2
    return np.add.reduceat(precision, start) / size


def inverse_negative_penalty(ranks: list[np.ndarray]) -> np.ndarray:
    """R / r_R, how early the last relevant item is found (INP; its mean over probes is mINP; Ye et al. 2021)."""
    return np.array([len(r) / float(r[-1]) for r in ranks])


def gallery_rule(split: Split, gallery: np.ndarray, variant: str) -> Callable:
    """`mates` of `search_gallery` for identification or a variant of re-identification."""
    # copies: indexing a memory map is several times slower
    cameras, clothes = np.array(split.optional("camera")), np.array(split.optional("clothes"))
    same = mates_in(split.labels[gallery])

    def mates(probe: int) -> tuple[np.ndarray, np.ndarray]:
        places = same(split.labels[probe])
        if split.protocol["name"] != "reid":
            return places, places[:0]
        rows = gallery[places]
        ignored = cameras[rows] == cameras[probe]
        if variant.startswith("cross-clothes"):
            ignored |= clothes[rows] == clothes[probe]
        if variant.startswith("same-clothes"):
            ignored |= clothes[rows] != clothes[probe]
        return places[~ignored], places[ignored]

    return mates


def explain_unscored(split: Split, probes: np.ndarray, variant: str) -> str:
    """Why probes have no mate that counts by the rule of a variant."""
    gallery = np.flatnonzero(split.optional("role") > 0)
    mated = np.isin(split.labels[probes], split.labels[gallery]) & (split.labels[probes] >= 0)
    mates = gallery_rule(split, gallery, variant)
    ignored = np.array([mated[i] and not len(mates(probe)[0]) for i, probe in enumerate(probes)], dtype=bool)
    rule = {"cross-clothes": "of the probe's own camera or clothes", "same-clothes": "of the probe's own camera or of "
            "other clothes"}.get(variant.split()[0], "of the probe's own camera")
    reasons = {"the gallery does not show the person": (~mated).sum(), f"every mate is {rule}": ignored.sum(),
               "a drawn gallery has no mate that counts" if variant.endswith(" single-shot") else
               "every other mate is unreadable": (mated & ~ignored).sum()}
    return ", ".join(f"{reason} ({count:,})" for reason, count in reasons.items() if count)


def draw_galleries(labels: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """One random image of each person, `draws` times, as places; all distractors (label -1) are kept."""
    order = np.argsort(labels, kind="stable")
    order, others = order[labels[order] >= 0], order[labels[order] < 0]
    _, start, size = np.unique(labels[order], return_index=True, return_counts=True)
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.sort(np.append(others, order[start + rng.integers(size)]))


SHOTS = {"single-shot": "in {} drawn galleries, seed {}",
         "single-gallery-shot": "in {} draws a probe (mAP: all its images), seed {}"}
WAYS = [" ".join(way).strip() for way in product(("general", "cross-clothes", "same-clothes"), ("", *SHOTS))]


def variants_of(split: Split) -> list[str]:
    """The ways in which a split's gallery is scored, the customary one first."""
    if split.protocol["name"] != "reid":
        return ["whole gallery"]
    variants = split.protocol.get("variants", ["general"])
    if unknown := [variant for variant in variants if variant not in WAYS]:
        raise InputError(f"{split.folder}: this version has no rule {unknown[0][:80]!r}; it has "
                         f"{', '.join(WAYS)}")
    return variants


def describe_variant(split: Split, variant: str, seed: int) -> str:
    """A way of scoring a gallery, with what it draws."""
    return " ".join([variant, *(SHOTS[shot].format(split.protocol.get("draws", 10), seed) for shot in SHOTS
                                if variant.endswith(f" {shot}"))])


def score_gallery(x: np.ndarray, split: Split, draws: int, seed: int, variant: str | None = None,
                  device: torch.device | str = "cpu") -> tuple[dict, dict]:
    """CMC (and mAP, mINP for re-identification) of a split's probes against its gallery and distractors.

    Re-identification ignores gallery items of the same identity and camera (Market-1501), or as the variant says; a
    probe without a relevant item left is not counted. In identification a probe is mated if the gallery lists its
    identity (a miss if all those images are unreadable); the others set the threshold of TPIR. Listed images that could
    not be read at preparation are misses, as probes and as mates; images unreadable now are left out. Single-shot: the
    gallery is one drawn image of each identity, the same for all probes; single-gallery-shot (CUHK03): each probe has
    its own draw, and average precision uses the whole gallery.
    """
    variant = variant or variants_of(split)[0]
    roles, good, reid = split.optional("role"), np.isfinite(x[:, 0]), split.protocol["name"] == "reid"
    missing = split.missing if split.protocol.get("misses") else np.zeros(len(x), dtype=bool)
    q, g = np.flatnonzero((roles == ROLES.index("probe")) & (good | missing)), np.flatnonzero((roles > 0) & good)
    single, shots = variant.endswith(" single-shot"), variant.endswith(" single-gallery-shot")
    ks, repeats, galleries = (1, 5, 10) if reid else (1, 5, 20), split.protocol.get("draws", 10), [g]
    if single:
        galleries = [g[places] for places in draw_galleries(split.labels[g], repeats, seed)]
    listed = [np.append(rows, np.flatnonzero(missing & (roles > 0))) for rows in galleries]
    searches = [search_gallery(x, q, rows, gallery_rule(split, rows, variant), device=device) for rows in listed]
    enrolled = np.isin(split.labels[q], split.labels[roles > 0]) & (split.labels[q] >= 0)
    counted = np.all([[len(r) > 0 for r in search.ranks] for search in searches], axis=0) if reid else enrolled
    if not counted.any():
        raise Unscorable(f"{split.folder}, {variant}: none of {len(q):,} probes can be scored: "
                         + explain_unscored(split, q, variant))
    first = np.array([search.first for search in searches])
    if shots:
        first = search_shots(x, q, g, split.labels[g], gallery_rule(split, g, variant), repeats, seed, device)
        first[:, missing[q]] = np.inf
    first = first[:, counted]
    per_probe = {f"rank-{k}": (first <= k).mean(0) for k in ks}
    if reid and not single:
        ranks = [r for r in searches[0].ranks if len(r)]
        per_probe["mAP"] = average_precision(ranks)
        if not shots:
            per_probe |= {"mAP trapezoid": average_precision(ranks, trapezoid=True),
                          "mINP": inverse_negative_penalty(ranks)}

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        return {name: weighted_mean(values, weights) for name, values in per_probe.items()}

    weights = bootstrap_counts(split.labels[q][counted], draws, seed)
    cmc = np.array([(first <= k).mean() for k in range(1, 1 + min(50, *map(len, galleries)))])
    figures = intervals(statistic, weights, int(counted.sum()), split.labels[q][counted])
    open_set = not reid or split.protocol.get("open_set")
    supported = [f for f in FPIRS if (~enrolled).sum() * f >= 1] if open_set else []
    used = (counted | ~enrolled).astype(float)  # excludes probes enrolled only under their own camera
    if supported:  # probes without a label are different strangers
        people = np.where(split.labels[q] < 0, len(split.classes) + np.arange(len(q)), split.labels[q])
        figures |= intervals(lambda w: {f"tpir@fpir={f:g}": tpir_at_fpir(
            searches[0], counted, f, used if w is None else w * used) for f in supported},
                             bootstrap_counts(people, draws, seed), len(q), people)
    left = ~counted & (enrolled | (not supported))  # strangers set the threshold of TPIR
    if left.any():
        say_once(f"  {split.domain}/{split.name}, {variant}: {left.sum():,} of {len(q):,} probes are not scored: "
                 + explain_unscored(split, q[left], variant))
    return figures, {"cmc": cmc}


# ---------------------------------------------------------------- who is on an image


def origin_of(split: Split) -> tuple[str, str]:
    """Domain and plan of the split that a degraded copy was made from, or of the split itself.

    Two splits of one plan show the same people.
    """
    made = split.index["provenance"]
    if made["source"] != "degrade" or not {"src", "src_plan"} <= set(made.get("options") or {}):
        return split.domain, made.get("plan", "")
    return str(made["options"]["src"]).split("/")[0], str(made["options"]["src_plan"])


def name_identities(split: Split, rows: np.ndarray | None = None, space: str | None = None) -> np.ndarray:
    """The identity of each image, [M]: a person that the source proves across domains, else a class of a domain; or "".

    Args:
        rows: only these images, since each is read.
        space: within which equal classes are the same (default: the domain that the images come from).
    """
    rows = np.arange(len(split)) if rows is None else rows
    space = space or origin_of(split)[0]
    named = np.array([f"{space}/{name}" for name in split.classes] + [""])[split.labels[rows]]
    if split.domain == "object":
        return named
    persons = [split.fields(int(row)).get("person") for row in rows]
    return np.array([name if one is None else f"person {one}" for name, one in zip(named, persons, strict=True)])
