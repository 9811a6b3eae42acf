"""Subspaces: how well each task is served by the leading components of another, at every k, beside controls."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

import train
from analyze_tasks import ROWS, Task, vectors_of
from data_prep import progress
from evaluate_bootstrap import Figure, bootstrap_counts, intervals, weighted_mean
from evaluate_pairs import roc, tar_at_far
from evaluate_search import average_precision, inverse_negative_penalty, search_gallery

# numbers of components at which controls are measured; the claim itself is measured at every one
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 99, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
LEVELS = (0.99, 0.95)  # k* is the number of components that keeps so much of what is above chance
RANDOM_SEEDS = 10
TIE = 1e-6  # cosines that differ by less are equal: far above rounding in float32, far below what a score can show
FURTHER, FURTHER_PROBES, FURTHER_RANDOM = (10, 30), 2000, 3  # other metrics: ks beside the claim's and D; probes; bases
FITTED = 20  # at most so many images per dimension are fitted on: more do not change a covariance, only take time


# ---------------------------------------------------------------- subspaces


def principal_components(x: np.ndarray, device: torch.device | str = "cpu"
                         ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [D], components as columns [D, D] by falling variance, variances [D] of rows x [n, D] (float64)."""
    rows = torch.as_tensor(x, device=device).double()
    mean = rows.mean(0)
    rows = rows - mean
    variances, vectors = torch.linalg.eigh(rows.T @ rows / max(len(rows) - 1, 1))
    return mean.cpu().numpy(), vectors.flip(1).cpu().numpy(), variances.flip(0).clamp(min=0).cpu().numpy()


def determined(variances: np.ndarray, n: int) -> int:
    """How many components n images determine: n - 1, or fewer where images repeat or dimensions are dead.

    Along all further ones nothing varies: any orthonormal basis of the rest is as right, and which one is returned is
    an accident of rounding, so that no figure may depend on it.
    """
    rounding = variances[0] * len(variances) * np.finfo(np.float64).eps
    return max(min(n - 1, int((variances > rounding).sum())), 1)


class Turned:
    """Vectors [m, D], centred and turned into a basis whenever a block of them is read: no second copy is held."""

    def __init__(self, x: np.ndarray | torch.Tensor, mean: np.ndarray, basis: np.ndarray, device: torch.device | str
                 ) -> None:
        self.x, self.device = x, device
        self.mean, self.basis = (to_device(np.ascontiguousarray(part), device) for part in (mean, basis))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Coordinates of some rows, float32 [rows, columns of the basis]."""
        # centred before they are turned: afterwards the rounding of a large mean would be in every small coordinate
        return (to_device(self.x[rows], self.device) - self.mean) @ self.basis


Vectors = np.ndarray | torch.Tensor | Turned


def hits_one_by_one(probe: np.ndarray, gallery: np.ndarray, task: Task, ks: list[int]) -> np.ndarray:
    """For projected vectors, whether each probe's nearest gallery vector is a mate with the first k coordinates.

    The definition, as a full evaluation for every k; `hits_by_k` gives the same. A mate must be nearer than every other
    vector by more than a TIE: with one coordinate every cosine is 1 or -1, and rounding must not choose among them.

    Args:
        probe: [n, D] coordinates, largest component first.
        gallery: [m, D] likewise.
        task: its mates and ignored vectors.
        ks: numbers of coordinates, rising.

    Returns:
        bool [len(ks), n].
    """
    hits = np.empty((len(ks), len(probe)), dtype=bool)
    for row, k in zip(hits, ks, strict=True):
        scores = unit(probe[:, :k]) @ unit(gallery[:, :k]).T
        for i, (right, out) in enumerate(zip(task.mates, task.ignored, strict=True)):
            wrong = np.delete(scores[i], np.concatenate([right, out]))
            row[i] = scores[i, right].max() - wrong.max(initial=-np.inf) > TIE
    return hits


def hits_by_k(probe: Vectors, gallery: Vectors, task: Task, ks: list[int],
              device: torch.device | str = "cpu", size: int | None = None) -> np.ndarray:
    """`hits_one_by_one` at the cost of one evaluation of scores and, per k, three passes over a block in the cache.

    With one coordinate more, S += q_k g_kᵀ and |g|² += g_k².

    Args:
        device: of the computation.
        size: see `sweep`.
    """
    columns, edges = torch.tensor(ks, device=device) - 1, [0, *ks]

    def sums(products: torch.Tensor) -> torch.Tensor:
        return products.cumsum(1, dtype=torch.float64)[:, columns]

    def advance(i: int, scores: torch.Tensor, x: torch.Tensor, g: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
        a, b = edges[i : i + 2]
        return scores.addr_(x[a], g[a]) if b == a + 1 else scores.addmm_(x[a:b].T, g[a:b])

    return sweep(probe, gallery, task, len(ks), sums, advance, device, size)


def hits_without_each(probe: Vectors, gallery: Vectors, task: Task, count: int,
                      device: torch.device | str = "cpu", size: int | None = None) -> np.ndarray:
    """Whether each probe's nearest gallery vector is a mate when one of the first `count` coordinates is left out.

    One product of all coordinates, and per coordinate S - q_i g_iᵀ and |g|² - g_i²: `hits_one_by_one` of what is left
    gives the same.

    Args:
        probe: [n, D] coordinates.
        gallery: [m, D] likewise.
        task: its mates and ignored vectors.
        count: coordinates that are left out, each alone.
        device: of the computation.
        size: see `sweep`.

    Returns:
        bool [count, n].
    """
    def sums(products: torch.Tensor) -> torch.Tensor:
        return products.sum(1, keepdim=True, dtype=torch.float64) - products[:, :count]

    def advance(i: int, scores: torch.Tensor, x: torch.Tensor, g: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
        if i == 0:
            scores.addmm_(x.T, g)
        return torch.addr(scores, x[i], g[i], alpha=-1, out=spare)

    return sweep(probe, gallery, task, count, sums, advance, device, size)


def sweep(probe: Vectors, gallery: Vectors, task: Task, steps: int, sums: Callable[[torch.Tensor], torch.Tensor],
          advance: Callable[..., torch.Tensor], device: torch.device | str, size: int | None) -> np.ndarray:
    """Score every probe in one subspace after another, by blocks of scores that stay in the cache.

    The nearest vector is the largest S / |g|, since a probe's own length changes no order. The scores of mates are kept
    apart (there are few), so that S holds the wrong ones alone and the largest of a row is enough. Memory: the probes,
    a block of the gallery twice with its inverse lengths [block, steps], the best scores [steps, n] of mates and of
    others, and for each of torch's threads two blocks of scores.

    Args:
        probe, gallery: coordinates, [n, D] and [m, D].
        task: its mates and ignored vectors.
        steps: number of subspaces.
        sums: products of coordinates [b, D] -> what they sum to in each subspace, float64 [b, steps].
        advance: number of the step, scores [b, m] (0 before the first step, which it may change: -inf stays so),
            coordinates [D, b] and [D, m], a spare block -> the scores of that step.
        device: of the computation.
        size: scores held at once (default: what fits the cache of a core; on a GPU 2**26).

    Returns:
        bool [steps, n].
    """
    size = size or (1 << 19 if torch.device(device).type == "cpu" else 1 << 26)
    q = torch.as_tensor(probe[:], device=device)
    # of a block of the gallery: scores of 32 probes, so that what is read of the gallery is little beside them
    width = min(len(gallery), max(size // 32, 1), 1 << 18)
    block = max(1, min(size // width, len(q)))
    best, wrong = (torch.full((steps, len(q)), -torch.inf, dtype=q.dtype, device=device) for _ in range(2))
    many, flat = np.array([len(mates) for mates in task.mates]), np.concatenate(task.mates)
    places = (many.cumsum() - many)[:, None] + np.minimum(np.arange(many.max()), many[:, None] - 1)
    mates = torch.as_tensor(flat[places], device=device)  # [n, most]; who has fewer has the last once more
    owner = np.repeat(np.arange(len(many)), many + np.array([len(out) for out in task.ignored]))  # rising
    apart = np.concatenate([part for pair in zip(task.mates, task.ignored, strict=True) for part in pair])
    apart = torch.as_tensor(np.stack([owner, apart]), device=device)  # vectors that are no wrong ones

    def score(first: int, start: int, g: torch.Tensor, by_coordinate: torch.Tensor, inverse: torch.Tensor) -> None:
        rows = slice(first, first + block)
        x = q[rows]
        for place in range(many[rows].max()):  # the probes' first mates, second mates, ...
            right = mates[rows, place] - start
            inside = (right >= 0) & (right < len(g))
            right = right.clamp(0, len(g) - 1)
            cosine = sums(x * g[right]).to(x.dtype).T * inverse[:, right]
            best[:, rows] = torch.where(inside, torch.maximum(best[:, rows], cosine), best[:, rows])
        x = x.T.contiguous()
        scores = torch.zeros(x.shape[1], len(g), dtype=x.dtype, device=device)
        mine = apart[:, slice(*np.searchsorted(owner, [first, first + block]))] - torch.tensor(
            [[first], [start]], device=device)
        mine = mine[:, (mine[1] >= 0) & (mine[1] < len(g))]
        scores[mine[0], mine[1]] = -torch.inf
        cosine, highest = torch.empty_like(scores), torch.empty_like(best[:, rows])
        for i in range(steps):
            torch.mul(advance(i, scores, x, by_coordinate, cosine), inverse[i], out=cosine)
            torch.amax(cosine, 1, out=highest[i])
        wrong[:, rows] = torch.maximum(wrong[:, rows], highest)

    threads = torch.get_num_threads()
    for start in range(0, len(gallery), width):
        g = torch.as_tensor(gallery[start : start + width], device=device)
        inverse = torch.cat([sums(part.square()).clamp(min=1e-24).rsqrt().to(g.dtype)
                             for part in g.split(4096)]).T.contiguous()  # [steps, width]
        work = partial(score, start=start, g=g, by_coordinate=g.T.contiguous(), inverse=inverse)
        # a thread a block: operations as short as these would spend their time waiting for one another's threads
        torch.set_num_threads(1 if q.device.type == "cpu" else threads)
        try:
            with ThreadPoolExecutor(threads if q.device.type == "cpu" else 1, initializer=torch.set_num_threads,
                                    initargs=(torch.get_num_threads(),)) as pool:
                list(pool.map(work, range(0, len(q), block)))
        finally:
            torch.set_num_threads(threads)
    lead = torch.cat([sums(part.square()).clamp(min=0).sqrt().to(q.dtype) for part in q.split(4096)]).T * TIE
    return (best - lead > wrong).cpu().numpy()


def unit(x: np.ndarray) -> np.ndarray:
    """Rows divided by their lengths."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def finite(value: float) -> float | None:
    """A number for JSON, which knows no NaN."""
    return float(value) if math.isfinite(value) else None


def show(figure: Figure) -> dict[str, float | None]:
    """A figure for JSON."""
    return {"value": finite(figure.value), "low": finite(figure.low), "high": finite(figure.high)}


def show_needed(figure: Figure, limit: int) -> dict[str, float | None]:
    """A k* for JSON; a value or an end of its interval that lies beyond the limit is null, and "above" is the limit."""
    draws = figure.draws[~np.isnan(figure.draws)]
    if math.isnan(figure.value) or not len(draws):
        return dict.fromkeys(("value", "low", "high"))
    # the ends are resampled values themselves: between a number and "beyond" there is no middle
    ends = [figure.value, *np.quantile(draws, [0.025, 0.975], method="inverted_cdf")]
    named = dict(zip(("value", "low", "high"), map(finite, ends), strict=True))
    return named | ({"above": limit} if None in named.values() else {})


def kept(scores: np.ndarray, full: np.ndarray | float, chance: float) -> np.ndarray:
    """(score - chance) / (full - chance); NaN where the full space is not above chance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(full > chance, (scores - chance) / (full - chance), np.nan)


def components_needed(share: np.ndarray, ks: list[int], level: float) -> np.ndarray:
    """k*: the smallest of ks from which on every larger one keeps at least `level`; infinite: not even the largest.

    Args:
        share: what is kept, [..., len(ks)].

    Returns:
        float [...]; NaN where a share is unknown.
    """
    short = ~(np.asarray(share) >= level)
    after = np.where(short.any(-1), len(ks) - short[..., ::-1].argmax(-1), 0)  # one behind the last that is short
    return np.where(np.isnan(share).any(-1), np.nan, np.append(np.asarray(ks, dtype=float), np.inf)[after])


@dataclass
class Curve:
    """How well the first k coordinates of some basis serve a task."""

    kind: str  # components, own mean, bottom, deleted, pooled, foundation, random
    fit: str  # the task whose components these are, or whose mean a random basis is used with
    test: str
    ks: list[int]
    score: np.ndarray  # [len(ks)]
    kept: np.ndarray  # [len(ks)]
    draws: np.ndarray  # of `kept`, [resamplings, len(ks)]
    full: Figure  # the score of all D coordinates
    number: int | None = None  # of a random basis

    def at(self, k: int) -> Figure:
        """What k coordinates keep."""
        i = self.ks.index(k)
        return Figure(float(self.kept[i]), self.draws[:, i])


def measure_curve(kind: str, fit: str, task: Task, vectors: tuple[np.ndarray | torch.Tensor, ...], mean: np.ndarray,
                  basis: np.ndarray, ks: list[int], counts: np.ndarray | torch.Tensor, device: torch.device | str
                  ) -> Curve:
    """Centre, rotate, and score the first k coordinates for every k of ks, and all D for reference.

    Args:
        vectors: probe and gallery vectors; tensors on the device are not copied.
        mean: [D], subtracted from both.
        basis: [D, D], orthonormal columns.
        counts: [resamplings, n], how often each probe is drawn.
    """
    turned = (Turned(x, mean, basis, device) for x in vectors)
    D, many = len(mean), len(ks)
    score, drawn = resample(hits_by_k(*turned, task, [*ks, *([D] if ks[-1:] != [D] else [])], device), counts, device)
    chance = task.chance()
    return Curve(kind, fit, task.domain, ks, score[:many], kept(score, score[-1], chance)[:many],
                 kept(drawn, drawn[:, -1:], chance)[:, :many], Figure(float(score[-1]), drawn[:, -1]))


def resample(hits: np.ndarray, counts: np.ndarray | torch.Tensor, device: torch.device | str
             ) -> tuple[np.ndarray, np.ndarray]:
    """Share of hits [steps, n], and the same for each resampling: float64 [steps] and [resamplings, steps]."""
    hits, counts = to_device(hits, device), to_device(counts, device)
    drawn = counts @ hits.T / counts.sum(1, keepdim=True)  # exact sums: whole numbers below 2**24
    return hits.mean(1, dtype=torch.float64).cpu().numpy(), drawn.cpu().numpy()


def measure_importance(task: Task, vectors: tuple[np.ndarray | torch.Tensor, ...], mean: np.ndarray, basis: np.ndarray,
                       full: Figure, count: int, counts: np.ndarray | torch.Tensor, device: torch.device | str
                       ) -> dict[str, list[float]]:
    """What each of the first `count` components is worth: score without it alone - score of all of them.

    Args:
        vectors, mean, basis, counts: see `measure_curve`.
        full: the score of all components, with the same mean.

    Returns:
        "change" by component, with "low" and "high", paired by resampling.
    """
    turned = (Turned(x, mean, basis, device) for x in vectors)
    score, drawn = resample(hits_without_each(*turned, task, count, device), counts, device)
    low, high = np.quantile(drawn - full.draws[:, None], [0.025, 0.975], axis=0)
    named = {"change": score - full.value, "low": low, "high": high}
    return {name: np.round(values, 6).tolist() for name, values in named.items()}


def measure_further(task: Task, vectors: tuple[np.ndarray | torch.Tensor, ...], mean: np.ndarray, basis: np.ndarray,
                    ks: list[int], draws: int, seed: int, device: torch.device | str) -> dict[tuple[int, str], Figure]:
    """A task's other metrics with the first k coordinates, as evaluate.py computes them, by (k, metric).

    Of people rank-5, mAP and mINP; of objects the top 5 class means; of both AUC and TAR at 1 % FAR of equally many
    random pairs of test images of one identity and of two.

    Args:
        vectors, mean, basis: see `measure_curve`.
        ks: numbers of coordinates.
        draws, seed: of the bootstrap over identities.
    """
    target, every, found = task.target[:FURTHER_PROBES], np.arange(len(vectors[1])), {}
    pairs = train.matched_pairs(target, 5000, seed)
    for k in ks:
        probe, gallery = (Turned(x, mean, basis[:, :k], device) for x in vectors)
        q, g = unit(probe[:FURTHER_PROBES].cpu().numpy()), np.empty((len(gallery), k), dtype=np.float32)
        for start in range(0, len(g), ROWS):
            part = slice(start, start + ROWS)
            g[part] = unit(gallery[part].cpu().numpy())
        search = search_gallery(q, np.arange(len(q)), every, lambda i: (task.mates[i], task.ignored[i]),
                                other=g, device=device)
        values = {"nearest-mean top-5": search.first <= 5} if task.domain == "object" else {
            "rank-5": search.first <= 5, "mAP": average_precision(search.ranks),
            "mINP": inverse_negative_penalty(search.ranks)}
        figures = intervals(
            lambda w, values=values: {name: weighted_mean(of, w) for name, of in values.items()},
            bootstrap_counts(target, draws, seed))
        if len(pairs):
            scores, same = (q[pairs[:, 0]] * q[pairs[:, 1]]).sum(1), np.arange(len(pairs)) < len(pairs) // 2
            order = np.argsort(-scores)  # once here: each resampling sorts them anew, and what is sorted goes faster
            scores, same, (left, right) = scores[order], same[order], pairs[order].T

            def accept(weights: np.ndarray | None, scores=scores, same=same) -> dict[str, float]:
                far, tar = roc(scores, same, weights)
                return {"pair auc": float(np.trapezoid(tar, far)), "tar@far=0.01": tar_at_far(far, tar, 0.01)}

            figures |= intervals(accept, (np.where(same, w[left], w[left] * w[right]) for w in
                                          bootstrap_counts(target, draws, seed)))
        found |= {(k, name): figure for name, figure in figures.items()}
    return found


def to_device(x: np.ndarray | torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A float32 tensor on the device; one that is already there as it is."""
    return torch.as_tensor(x, dtype=torch.float32, device=device)


def transfer(embedded: dict[str, tuple[np.ndarray, np.ndarray]], tasks: list[Task], headline: int, draws: int,
             seed: int, *, foundation: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
             delete: tuple[int, int] = (0, 0), importance: int = 0, controls: bool = True,
             device: torch.device | str = "cpu") -> dict:
    """Components of every task, used by every task, beside the controls.

    Args:
        embedded: domain -> unit embeddings of its training and of its test split.
        tasks: the tasks.
        headline: the k of the claim; where fewer components are determined, that many.
        draws: bootstrap resamplings, by identity.
        seed: of the sub-sampling and the random subspaces.
        foundation: embeddings of the untouched backbone, whose components are then used on `embedded`, too.
        delete: components a <= i < b that are left out, for one more figure (counted from 0; a = b: none).
        importance: so many of the first components are left out, each alone; 0: none.
        controls: measure all of them; else random subspaces alone.
        device: of the sweeps.

    Returns:
        "curves": dictionaries of `Curve`; "pairs": one per (fit, test): kept at the headline k with its interval, k*
        for each level with its interval (see `show_needed`; and on the k of the controls, beside that of random
        subspaces), the raw score (not centred) and that of all components, identities that are tested, and the
        controls; "all_tasks": for each fit the k* from which on EVERY task keeps that much; "images_per_task",
        "rank_limited", "dim"; "limit": the number of components that the images determine, where every curve stops;
        "bases": (mean, components, variances) by domain.
    """
    rng, D = np.random.default_rng(seed), next(iter(embedded.values()))[0].shape[1]
    n = min(FITTED * D, *(len(task.fit) for task in tasks))
    chosen = {task.domain: rng.permutation(task.fit)[:n] for task in tasks}
    fits = {domain: principal_components(embedded[domain][0][rows], device) for domain, rows in chosen.items()}
    pooled = principal_components(np.concatenate([embedded[domain][0][rows[: -(-n // len(tasks))]]
                                                  for domain, rows in chosen.items()]), device)
    turns = [np.linalg.qr(np.random.default_rng((seed, i)).standard_normal((D, D)))[0] for i in range(RANDOM_SEEDS)]
    untouched = {}
    if foundation and next(iter(foundation.values()))[0].shape[1] == D:
        untouched = {domain: principal_components(foundation[domain][0][rows], device)
                     for domain, rows in chosen.items()}
    limit = min(determined(variances, n) for *_, variances in [*fits.values(), pooled, *untouched.values()])
    headline = min(headline, limit)
    every, grid = list(range(1, limit + 1)), sorted({k for k in GRID if k < limit} | {headline, limit})
    curves, pairs, every_k = [], [], {}
    per_task = len(tasks) * (1 + 3 * controls + bool(untouched) + RANDOM_SEEDS) + controls
    bar = progress(total=len(tasks) * per_task, desc="transfer", unit="sweep")
    for task in tasks:
        vectors = tuple(to_device(x, device) for x in vectors_of(task, embedded[task.domain]))
        counts = np.array(list(bootstrap_counts(task.target, draws, seed)), dtype=np.float32)
        counts = to_device(counts.reshape(draws, len(task.probe)), device)
        identity, chance = np.eye(D), task.chance()

        def measure(kind: str, fit: str, mean: np.ndarray, basis: np.ndarray, ks: list[int], task=task,
                    vectors=vectors, counts=counts) -> Curve:
            bar.update()
            return measure_curve(kind, fit, task, vectors, mean, basis, ks, counts, device)

        raw = measure_curve("raw", "", task, vectors, np.zeros(D), identity, [D], counts, device).full.value
        own = fits[task.domain][0]
        if controls:
            curves.append(measure("pooled", "all", pooled[0], pooled[1], grid))
            pool = curves[-1].at(headline)
        for other in tasks:
            mean, basis, _ = fits[other.domain]
            curve = measure("components", other.domain, mean, basis, every)
            curves.append(curve)
            found = curve.at(headline)
            # with the same mean as the components: else the control would differ in its centring, too
            random = [measure("random", other.domain, mean, turn, grid) for turn in turns]
            for number, one in enumerate(random):
                one.number = number
            curves += random
            chance_level = Figure(float(np.mean([c.at(headline).value for c in random])),
                                  np.mean([c.at(headline).draws for c in random], axis=0))
            mean_random, coarse = np.mean([c.kept for c in random], axis=0), curve.kept[np.array(grid) - 1]
            pair = {"fit": other.domain, "test": task.domain, "identities": len(np.unique(task.target)),
                    "chance": chance, "raw": raw, "full": curve.full.value, "k": headline,
                    "full_low": curve.full.low, "full_high": curve.full.high,
                    "kept": finite(found.value), "low": finite(found.low), "high": finite(found.high),
                    "random": show(chance_level), "over_random": show(minus(found, chance_level))}
            for level in LEVELS:
                needed = Figure(float(components_needed(curve.kept, every, level)),
                                components_needed(curve.draws, every, level))
                pair[f"k{100 * level:g}"] = show_needed(needed, limit)
                every_k.setdefault(other.domain, {}).setdefault(f"k{100 * level:g}", []).append(needed)
                pair[f"k{100 * level:g}_grid"] = finite(components_needed(coarse, grid, level))
                pair[f"k{100 * level:g}_random"] = finite(components_needed(mean_random, grid, level))
            if untouched:
                curves.append(measure("foundation", other.domain, mean, untouched[other.domain][1], grid))
                theirs = curves[-1].at(headline)
                pair |= {"foundation": show(theirs), "over_foundation": show(minus(found, theirs))}
            if controls:
                few = sorted({k for k in FURTHER if k < limit} | {headline, D})
                further = measure_further(task, vectors, mean, basis, few, draws, seed, device)
                # all of D random coordinates are the whole space: the same as all components
                by_chance = [measure_further(task, vectors, mean, turn, [k for k in few if k < D], 0, seed, device)
                             for turn in turns[:FURTHER_RANDOM]]
                pair["further"] = [{"metric": metric, "k": k, **show(figure), "random": finite(
                    np.mean([one[k, metric].value for one in by_chance])) if k < D else None}
                    for (k, metric), figure in further.items()]
                pair["pooled"] = show(pool)
                last_first = np.concatenate([basis[:, :limit][:, ::-1], basis[:, limit:]], axis=1)
                curves.append(measure("bottom", other.domain, mean, last_first, grid))
                pair["bottom"] = show(curves[-1].at(headline))
                # without the first k are the last D - k: what is left does not depend on the basis of the rest
                gone = [k for k in grid if k < limit]  # without all that are determined rounding would be scored
                less = measure("deleted", other.domain, mean, basis[:, ::-1], [D - k for k in reversed(gone)])
                curves.append(replace(less, ks=gone, score=less.score[::-1], kept=less.kept[::-1],
                                      draws=less.draws[:, ::-1]))
                curves.append(measure("own mean", other.domain, own, basis, grid))
                pair["own_mean"] = show(curves[-1].at(headline))
            a, b = delete[0], min(delete[1], limit)
            if a < b < a + limit:
                rest = np.concatenate([basis[:, :a], basis[:, b:], basis[:, a:b]], axis=1)
                less = measure_curve("", "", task, vectors, mean, rest, [D - (b - a), D], counts, device)
                pair["deleted"] = {"from": a, "to": b} | show(less.at(D - (b - a)))
            if importance and D > 1:
                pair["importance"] = measure_importance(task, vectors, mean, basis, curve.full,
                                                        min(importance, limit), counts, device)
            pairs.append(pair)
    bar.close()
    return {"curves": curves, "pairs": pairs, "all_tasks": [
        {"fit": fit} | {name: show_needed(largest(found), limit) for name, found in of.items()}
        for fit, of in every_k.items()],
            "images_per_task": n, "rank_limited": n < 5 * D, "dim": D, "limit": limit, "bases": fits}


def largest(figures: list[Figure]) -> Figure:
    """The largest of several figures with as many resamplings; NaN where one of them is."""
    return Figure(float(np.max([f.value for f in figures])), np.max([f.draws for f in figures], axis=0))


def minus(a: Figure, b: Figure) -> Figure:
    """The difference of two figures with paired resamplings."""
    return Figure(a.value - b.value, a.draws - b.draws, a.count, identities=a.identities)


# ---------------------------------------------------------------- claims


def above_chance(pair: dict) -> bool:
    """Whether the full space is surely above chance, so that a share of what it is above means something."""
    return None not in (pair["kept"], pair["low"], pair["high"]) and pair["full_low"] > pair["chance"]
