"""Probes against galleries: identification, re-identification, all domains at once; scores are held in blocks alone."""

import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise, product

import numpy as np
import torch

from data_prep import DOMAINS, InputError
from data_prep.shards import ROLES, Split, ordered_tests
from evaluate_bootstrap import Figure, bootstrap_counts, intervals, weighted_mean

FPIRS = (1e-1, 1e-2)


class Unscorable(InputError):
    """A split whose images support no figure; an evaluation scores the others."""


@functools.cache
def say_once(line: str) -> None:
    """Print what is the same for every set of weights."""
    print(line)


# ---------------------------------------------------------------- identification, re-identification


@dataclass
class Search:
    """What probes found in a gallery."""

    ranks: list[np.ndarray]  # of each probe's mates, ascending, 1 = nearest; ties count against them
    first: np.ndarray  # [n] rank of the nearest mate; inf without one
    own: np.ndarray  # [n] score of the nearest mate; -inf without one
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


def search_gallery(x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, mates: Callable, size: int = 1 << 27,
                   other: np.ndarray | None = None, device: torch.device | str = "cpu") -> Search:
    """Search every probe in a gallery by blocks of the score matrix, without ever ordering the gallery's items.

    Only the ranks of mates matter: 1 + how many others score as high or higher. For a few mates they are counted; for
    more, one sort of the row's values (as dear as a dozen counts of 2,000 values, a hundred of 20,000) serves all.

    Args:
        x: unit vectors [M, D].
        probes, gallery: rows of x, [n] and [m].
        other: unit vectors that the gallery's rows are of, if not of x; float16 (a memory map, say) is widened block
            by block.
        mates: row of a probe -> places in `gallery` that are right, and places that are neither right nor wrong.
        size: scores held at once.
        device: of the products and of the counting, where it is not the CPU.
    """
    other = x if other is None else other
    if torch.device(device).type != "cpu":
        return search_on(torch.device(device), x, probes, gallery, mates, size, other)
    found = Search([np.zeros(0, dtype=np.int64)] * len(probes), *np.full((3, len(probes)), -np.inf))
    block = int(np.clip(size // max(len(gallery), 1), 1, 1024))
    few = int(np.clip(len(gallery) // 200, 12, 200))
    lanes = 2 if 2 * block * len(gallery) <= size else 1  # two: a block is multiplied while the other is counted
    buffers = np.empty((lanes, block, len(gallery)), dtype=x.dtype)  # kept: fresh pages cost as much as the product

    def rank(scores: np.ndarray, start: int, part: range) -> None:
        for i in part:
            s = scores[i - start]
            right, ignored = mates(probes[i])
            own = np.sort(s[right])[::-1]
            s[right], s[ignored] = -np.inf, -np.inf
            if len(own) < few:
                above = np.array([np.count_nonzero(s >= score) for score in own], dtype=np.int64)
                found.wrong[i] = s.max(initial=-np.inf)
            else:
                s.sort()
                above, found.wrong[i] = len(s) - np.searchsorted(s, own, side="left"), s[-1]
            found.ranks[i] = np.arange(1, len(own) + 1) + above
            found.own[i], found.first[i] = (own[0], found.ranks[i][0]) if len(own) else (-np.inf, np.inf)

    threads, busy = torch.get_num_threads(), [[] for _ in range(lanes)]
    with ThreadPoolExecutor(threads) as pool:  # numpy counts and sorts outside the interpreter's lock
        for number, start in enumerate(range(0, len(probes), block)):
            scores, rows = buffers[number % lanes], probes[start : start + block]
            for task in busy[number % lanes]:
                task.result()
            queries = x[rows]
            for left in range(0, len(gallery), 1 << 16):
                part = take_rows(other, gallery[left : left + (1 << 16)]).astype(x.dtype, copy=False)
                np.matmul(queries, part.T, out=scores[: len(rows), left : left + len(part)])
                del part  # else a copy of rows that are no neighbours would stay while the next one is made
            stops = np.linspace(start, start + len(rows), threads + 1).astype(int)
            busy[number % lanes] = [pool.submit(rank, scores, start, range(*ends)) for ends in pairwise(stops)]
        for task in chain(*busy):
            task.result()
    return found


def search_on(device: torch.device, x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, mates: Callable, size: int,
              other: np.ndarray) -> Search:
    """`search_gallery` on an accelerator that holds the gallery: the same, to the rounding of a score."""
    found = Search([np.zeros(0, dtype=np.int64)] * len(probes), *np.full((3, len(probes)), -np.inf))
    block = int(np.clip(size // max(len(gallery), 1), 1, 1024))
    items = torch.empty(len(gallery), x.shape[1], dtype=torch.from_numpy(x[:0]).dtype, device=device)
    for left in range(0, len(gallery), 1 << 16):
        part = take_rows(other, gallery[left : left + (1 << 16)]).astype(x.dtype, copy=False)
        items[left : left + len(part)] = torch.from_numpy(np.ascontiguousarray(part)).to(device)

    for start in range(0, len(probes), block):
        rows = probes[start : start + block]
        right, ignored = zip(*(mates(probe) for probe in rows), strict=True)
        scores = torch.from_numpy(x[rows]).to(device) @ items.T

        def cells(lists: tuple) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
            """Row and column of each listed place, and its number in its list."""
            sizes = [len(places) for places in lists]
            row, column = np.repeat(np.arange(len(lists)), sizes), np.concatenate(lists).astype(np.int64)
            within = np.arange(len(row)) - np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
            return torch.from_numpy(row).to(device), torch.from_numpy(column).to(device), within

        row, column, within = cells(right)
        most = max(map(len, right), default=0)
        own = torch.full((len(rows), most), -torch.inf, dtype=scores.dtype, device=device)
        own[row, torch.from_numpy(within).to(device)] = scores[row, column]
        scores[row, column] = -torch.inf
        row, column, _ = cells(ignored)
        scores[row, column] = -torch.inf
        if len(gallery):
            found.wrong[start : start + len(rows)] = scores.amax(1).cpu().numpy()
        own = own.sort(1, descending=True).values
        if most < 12:
            above = [(scores >= own[:, j : j + 1]).sum(1) for j in range(most)]
            above = torch.stack(above, 1) if most else own
        else:
            above = len(gallery) - torch.searchsorted(scores.sort(1).values, own)
        own, above = own.cpu().numpy(), above.cpu().numpy()
        for i, places in enumerate(right, start):
            ranks = np.arange(1, len(places) + 1) + above[i - start, : len(places)]
            found.ranks[i] = ranks.astype(np.int64)
            found.own[i], found.first[i] = (own[i - start, 0], ranks[0]) if len(ranks) else (-np.inf, np.inf)
    return found


def score_blocks(x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, size: int = 1 << 27,
                 device: torch.device | str = "cpu") -> Iterator[tuple[int, np.ndarray]]:
    """Scores of probes with a whole gallery, [b, m], some probes at a time, and the place of the first of these.

    Args:
        x: unit vectors [M, D].
        probes, gallery: rows of x, [n] and [m].
        size: scores held at once; they are overwritten by the next.
    """
    block, here = int(np.clip(size // max(len(gallery), 1), 1, 1024)), torch.device(device).type == "cpu"
    scores = np.empty((block, len(gallery)), dtype=x.dtype)
    for start in range(0, len(probes), block):
        queries = x[probes[start : start + block]]
        for left in range(0, len(gallery), 1 << 16):
            part = take_rows(x, gallery[left : left + (1 << 16)])
            found = scores[: len(queries), left : left + len(part)]
            if here:
                np.matmul(queries, part.T, out=found)
            else:
                found[:] = (torch.from_numpy(queries).to(device) @ torch.from_numpy(part).to(device).T).cpu().numpy()
            del part
        yield start, scores[: len(queries)]


def search_shots(x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, labels: np.ndarray, mates: Callable,
                 draws: int, seed: int, device: torch.device | str = "cpu") -> np.ndarray:
    """Ranks of the mate among one drawn image of each identity, [draws, n]; inf for a probe without a mate.

    Every probe draws for itself, from what its rule leaves of the gallery; what is nobody's (label -1) all stays. Ties
    count against the probe.
    Source: torchreid, `metrics/rank.py`, eval_cuhk03; its draws are NumPy's global ones, and cannot be repeated.

    Args:
        x, probes, gallery, mates, device: as of `search_gallery`.
        labels: identities of the gallery, [m].
    """
    order = np.argsort(labels, kind="stable")
    order, strangers = order[labels[order] >= 0], order[labels[order] < 0]
    people, start, size = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.full((draws, len(probes)), np.inf)
    for first, scores in score_blocks(x, probes, gallery, device=device):
        for i, s in enumerate(scores, first):
            right, _ = mates(probes[i])
            if not len(right):
                continue
            rng = np.random.default_rng((seed, probes[i]))  # of the probe alone: blocks and other probes do not matter
            own = s[rng.choice(right, draws)]
            drawn = s[order[start + rng.integers(size, size=(draws, len(size)))]]
            drawn[:, np.searchsorted(people, labels[right[0]])] = -np.inf  # the probe's own is `own`
            ranks[:, i] = 1 + (drawn >= own[:, None]).sum(1) + (s[strangers] >= own[:, None]).sum(1)
    return ranks


def tpir_at_fpir(search: Search, mated: np.ndarray, target: float, weights: np.ndarray | None = None) -> float:
    """Share of the mated probes whose mate comes first and scores above a threshold that others rarely pass.

    The threshold is the floor(N x FPIR)-th highest best score of the N probes without a mate.
    Source: insightface, `ijb_evals.py`.
    """
    w = np.ones(len(mated)) if weights is None else weights
    order = np.argsort(-search.wrong[~mated], kind="stable")
    top, cumulative = search.wrong[~mated][order], np.cumsum(w[~mated][order])
    if not cumulative[-1]:
        return math.nan  # a resampling without them
    threshold = top[np.searchsorted(cumulative, max(int(cumulative[-1] * target), 1))]
    hit = (search.own > search.wrong) & (search.own > threshold)
    return weighted_mean(hit[mated].astype(float), w[mated])


def number_mates(ranks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All probes' ranks in a row, the number 1.. of each within its probe, where a probe begins, how many it has."""
    size = np.array([len(r) for r in ranks])
    start = np.append(0, np.cumsum(size)[:-1])
    flat = np.concatenate(ranks)
    return flat, np.arange(1, len(flat) + 1) - np.repeat(start, size), start, size


def average_precision(ranks: list[np.ndarray]) -> np.ndarray:
    """(1/R) Σ i / r_i, r_i the rank of the i-th of a probe's R relevant items (rectangle rule: torchreid, fast-reid).

    Args:
        ranks: of each probe's relevant items, at least one, ascending from 1.

    Returns:
        [n], of each probe.
    """
    r, i, start, size = number_mates(ranks)
    return np.add.reduceat(i / r, start) / size


def trapezoid_precision(ranks: list[np.ndarray]) -> np.ndarray:
    """(1/R) Σ (i / r_i + (i - 1) / (r_i - 1)) / 2, the second term 1 where r_i = 1 (Market-1501's own evaluation)."""
    r, i, start, size = number_mates(ranks)
    before = np.where(r > 1, (i - 1) / np.maximum(r - 1, 1), 1.0)
    return np.add.reduceat((i / r + before) / 2, start) / size


def inverse_negative_penalty(ranks: list[np.ndarray]) -> np.ndarray:
    """R / r_R, how early the last relevant item is found (INP; its mean over probes is mINP; Ye et al. 2021)."""
    return np.array([len(r) / float(r[-1]) for r in ranks])


def gallery_rule(split: Split, gallery: np.ndarray, variant: str) -> Callable:
    """`mates` of `search_gallery` for a variant of re-identification, or identification (data_prep/bodies.py)."""
    # copies: to look a few places up in a memory map takes several times as long
    cameras, clothes = np.array(split.optional("camera")), np.array(split.optional("clothes"))
    labels = np.array(split.labels)
    same = mates_in(labels[gallery])

    def mates(probe: int) -> tuple[np.ndarray, np.ndarray]:
        places = same(labels[probe])
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
    """Why probes have no mate that the rule of a variant lets count, in words."""
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
    """Places of one random image of each person, `draws` times; distractors (label -1) are all kept."""
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
        raise InputError(f"{split.folder}: this version does not score by the rule {unknown[0][:80]!r}; it knows "
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
    identity, and misses where all those images are unreadable; the others set the threshold of TPIR. Unreadable probes
    are left out. Single-shot: the gallery is one drawn image of each identity, the same for all probes;
    single-gallery-shot (CUHK03): each probe draws its own, and average precision is of the whole gallery.
    """
    variant = variant or variants_of(split)[0]
    roles, good, reid = split.optional("role"), np.isfinite(x[:, 0]), split.protocol["name"] == "reid"
    q, g = np.flatnonzero((roles == ROLES.index("probe")) & good), np.flatnonzero((roles > 0) & good)
    single, shots = variant.endswith(" single-shot"), variant.endswith(" single-gallery-shot")
    ks, repeats, galleries = (1, 5, 10) if reid else (1, 5, 20), split.protocol.get("draws", 10), [g]
    if single:
        galleries = [g[places] for places in draw_galleries(split.labels[g], repeats, seed)]
    searches = [search_gallery(x, q, rows, gallery_rule(split, rows, variant), device=device) for rows in galleries]
    counted = (np.all([np.isfinite(search.first) for search in searches], axis=0) if reid else
               np.isin(split.labels[q], split.labels[roles > 0]) & (split.labels[q] >= 0))
    if not counted.any():
        raise Unscorable(f"{split.folder}, {variant}: none of {len(q):,} probes can be scored: "
                         + explain_unscored(split, q, variant))
    if reid and not counted.all():
        say_once(f"  {split.domain}/{split.name}, {variant}: {(~counted).sum():,} of {len(q):,} probes are not scored: "
                 + explain_unscored(split, q[~counted], variant))
    first = np.array([search.first for search in searches])
    if shots:
        first = search_shots(x, q, g, np.array(split.labels[g]), gallery_rule(split, g, variant), repeats, seed, device)
    first = first[:, counted]
    per_probe = {f"rank-{k}": (first <= k).mean(0) for k in ks}
    if reid and not single:
        ranks = [r for r in searches[0].ranks if len(r)]
        per_probe |= {name: of(ranks) for name, of in (
            ("mAP", average_precision), ("mAP trapezoid", trapezoid_precision), ("mINP", inverse_negative_penalty)
        )[: 1 if shots else 3]}

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        return {name: weighted_mean(values, weights) for name, values in per_probe.items()}

    weights = bootstrap_counts(split.labels[q][counted], draws, seed)
    cmc = np.array([(first <= k).mean() for k in range(1, 1 + min(50, *map(len, galleries)))])
    found = intervals(statistic, weights, int(counted.sum()), split.labels[q][counted])
    supported = [] if reid else [f for f in FPIRS if (~counted).sum() * f >= 1]
    if supported:  # probes without a label are strangers, each for itself
        people = np.where(split.labels[q] < 0, len(split.classes) + np.arange(len(q)), split.labels[q])
        found |= intervals(lambda w: {f"tpir@fpir={f:g}": tpir_at_fpir(searches[0], counted, f, w) for f in supported},
                           bootstrap_counts(people, draws, seed), len(q), people)
    return found, {"cmc": cmc}


# ---------------------------------------------------------------- all domains at once


def choose_crowd(splits: list[Split]) -> list[Split]:
    """The test split that stands for each domain; none where there are not two domains."""
    chosen = [ordered_tests([split for split in splits if split.domain == domain])[:1] for domain in DOMAINS]
    crowd = [split for one in chosen for split in one]
    return crowd if len(crowd) > 1 else []


def origin_of(split: Split) -> tuple[str, str]:
    """Domain and plan of the split that degraded copies were made from: its identities are theirs; else a split's own.

    Two splits of one plan show the same people.
    """
    made = split.index["provenance"]
    if made["source"] != "degrade" or not {"src", "src_plan"} <= set(made.get("options") or {}):
        return split.domain, made["plan"]
    return str(made["options"]["src"]).split("/")[0], str(made["options"]["src_plan"])


def name_identities(split: Split, rows: np.ndarray | None = None, space: str | None = None) -> np.ndarray:
    """Who is on each image, [M]: the person that the source proves across domains, else a class of a domain; "".

    Args:
        rows: of these images alone, as each takes a read.
        space: within which equal classes are the same (default: the domain that the images come from).
    """
    rows = np.arange(len(split)) if rows is None else rows
    space = space or origin_of(split)[0]
    own = np.array([f"{space}/{name}" for name in split.classes] + [""])[split.labels[rows]]
    if split.domain == "object":
        return own
    persons = [split.fields(int(row)).get("person") for row in rows]
    return np.array([name if person is None else f"person {person}" for name, person in zip(own, persons, strict=True)])


@dataclass(eq=False)
class Member:
    """What a domain brings to the unified gallery."""

    split: Split
    x: np.ndarray  # unit embeddings [M, D]
    who: np.ndarray  # int64 [M]: identity over all domains, -1 unknown
    probes: np.ndarray  # rows
    gallery: np.ndarray  # rows
    picture: np.ndarray  # int64 [M]: a number that a degraded copy shares with its original; -1: no copies

    def mates(self, other: "Member") -> Callable:
        """`mates` of `search_gallery` for this domain's probes in another's gallery, or in its own."""
        same, gallery = mates_in(other.who[other.gallery]), other.gallery
        cameras, template = self.split.optional("camera"), self.split.optional("template")

        def mates(probe: int) -> tuple[np.ndarray, np.ndarray]:
            places = same(self.who[probe])
            rows = gallery[places]
            ignored = (other.picture[rows] == self.picture[probe]) & (self.picture[probe] >= 0)
            if other is self:
                ignored |= (rows == probe) | ((template[rows] == template[probe]) & (template[probe] >= 0))
                if self.split.protocol["name"] == "reid":
                    ignored |= cameras[rows] == cameras[probe]
            return places[~ignored], places[ignored]

        return mates

    def has_mates(self) -> bool:
        """Whether any of its probes can be scored in its own gallery."""
        mates = self.mates(self)
        return any(len(mates(probe)[0]) for probe in self.probes)


def number_pictures(splits: list[Split]) -> list[np.ndarray]:
    """Numbers [M] for each split that a copy shares with its original; -1 in splits of which no other has copies."""
    plans, numbers, found = [origin_of(split)[1] for split in splits], {}, []
    for split, plan in zip(splits, plans, strict=True):
        keys = []
        if plans.count(plan) > 1:
            original = split.index["provenance"]["plan"] == plan
            keys = [split.jpeg(row)[0] if original else str(split.fields(row).get("degradation", {}).get("from"))
                    .rpartition("/")[2] for row in range(len(split))]
        found.append(np.array([numbers.setdefault((plan, key), len(numbers)) for key in keys] or [-1] * len(split)))
    return found


def make_members(splits: list[Split], embeddings: list[np.ndarray], limit: int, seed: int) -> list[Member]:
    """Probes and gallery of each domain by its roles; without roles every image is both (and never its own mate).

    Domains without a probe that has a mate are left out; none where two do not remain.
    """
    # one split a domain: equal classes of two are one person only where one was made from the other
    names = [name_identities(split, space=origin_of(split)[1]) for split in splits]
    people, members = np.unique(np.concatenate(names)), []
    for split, x, name, picture in zip(splits, embeddings, names, number_pictures(splits), strict=True):
        who = np.where(name == "", -1, np.searchsorted(people, name))
        good, roles = np.isfinite(x[:, 0]), split.optional("role")
        probes = np.flatnonzero(good & (roles <= ROLES.index("probe")) & (who >= 0))
        rng = np.random.default_rng((seed, DOMAINS.index(split.domain)))
        probes = np.sort(rng.permutation(probes)[:limit])
        members.append(Member(split, x, who, probes, np.flatnonzero(good & (roles != ROLES.index("probe"))),
                              picture))
    kept = [member for member in members if member.has_mates()]
    for split in [member.split for member in members if member not in kept]:
        say_once(f"  everything: without {split.domain}/{split.name}: no probe has a mate there that its rule counts")
    return kept if len(kept) > 1 else []


def score_unified(members: list[Member], draws: int, seed: int,
                  device: torch.device | str = "cpu") -> dict[str, dict[str, Figure]]:
    """Probes of every domain against the galleries of all domains together; ties count against the probe.

    A hit on the same person in another domain is right, but a copy of the probe's own picture (`data_prep degrade`)
    is neither right nor wrong. By domain, over its probes with a mate in their own gallery:
    rank-1 alone and in the crowd, and the shares whose nearest vector is of each domain; "rank-1 in D" over those with
    a mate in D, against D's gallery. Under "all": the average and the worst of the domains.
    """
    found = [[search_gallery(a.x, a.probes, b.gallery, a.mates(b), other=b.x, device=device) for b in members]
             for a in members]
    hits: dict[tuple[str, str], tuple[int, np.ndarray, np.ndarray]] = {}  # member, its probes that count, their values
    domains = [member.split.domain for member in members]
    for i, (row, domain) in enumerate(zip(found, domains, strict=True)):
        own, wrong = (np.array([getattr(search, name) for search in row]) for name in ("own", "wrong"))
        counted = np.isfinite(own[i])
        hits[domain, "rank-1 alone"] = (i, counted, own[i] > wrong[i])
        hits[domain, "rank-1 in the crowd"] = (i, counted, own.max(0) > wrong.max(0))
        nearest = np.maximum(own, wrong).argmax(0)
        for j, other in enumerate(domains):
            hits[domain, f"nearest is {other}"] = (i, counted, nearest == j)
            if j != i and np.isfinite(own[j]).any():
                hits[domain, f"rank-1 in {other}"] = (i, np.isfinite(own[j]), own[j] > wrong[j])
    ends = np.cumsum([len(member.probes) for member in members])[:-1]

    def statistic(weights: np.ndarray | None) -> dict[tuple[str, str], float]:
        parts = [None] * len(members) if weights is None else np.split(weights, ends)
        values = {key: weighted_mean(hit[counted].astype(float), None if parts[i] is None else parts[i][counted])
                  for key, (i, counted, hit) in hits.items()}
        for name in ("rank-1 alone", "rank-1 in the crowd"):
            tasks = [values[domain, name] for domain in domains]
            values["all", f"average {name}"] = float(np.mean(tasks))
            values["all", f"worst {name}"] = float(np.min(tasks))
        return values

    # one resampling of the people for all domains: who is in two of them is drawn, or not, in both
    who = np.concatenate([member.who[member.probes] for member in members])
    figures: dict = {}
    for (domain, metric), figure in intervals(statistic, bootstrap_counts(who, draws, seed)).items():
        if domain == "all":
            figure.count, figure.identities = len(who), len(np.unique(who))
        else:
            i, counted, _ = hits[domain, metric]
            figure.count = int(counted.sum())
            figure.identities = len(np.unique(members[i].who[members[i].probes][counted]))
        figures.setdefault(domain, {})[metric] = figure
    return figures
