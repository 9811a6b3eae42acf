"""Analyses beyond the claims: more controls and metrics of the transfer, d' by component, a map.

Copy with it: data_prep/, kernels/gather.py, kernels/gather_triton.py, models/, protocols/.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from data_prep import progress
from data_prep.format import matched_pairs
from protocols.bootstrap import Estimate, bootstrap_counts, finite, intervals, show, unit, weighted_mean
from protocols.pairs import score_pairs
from protocols.results import Transfer
from protocols.search import average_precision, inverse_negative_penalty, search_gallery
from protocols.subspaces import (
    Basis,
    Curve,
    Trial,
    Vectors,
    control_grid,
    draw_fits,
    principal_components,
    random_basis,
    sweep,
)
from protocols.tasks import ROWS, Task

FURTHER, FURTHER_PROBES, FURTHER_RANDOM = (10, 30), 2000, 3  # other metrics: ks beside the claim's and D; probes; bases


# ---------------------------------------------------------------- further controls and metrics of the transfer


@dataclass
class Explored:
    """Further measures of a pair of tasks; a dictionary is a figure {"value", "low", "high"}."""

    fit: str  # the task whose components these are
    test: str
    further: list[dict]  # "metric", "k", a figure, and "random": the mean of a few random subspaces
    pooled: dict  # what components of all tasks pooled keep
    bottom: dict  # the last k
    own_mean: dict  # centred by the mean of the task that is scored
    deleted: dict | None = None  # what is left without the components "from" (counted from 0) to before "to"
    importance: dict | None = None  # see `measure_importance`


def explore_transfer(embedded: dict[str, tuple[np.ndarray, np.ndarray]], tasks: list[Task], result: Transfer,
                     curves: list[Curve], bases: dict[str, Basis], draws: int, seed: int,
                     delete: tuple[int, int] = (0, 0), importance: int = 0, device: torch.device | str = "cpu"
                     ) -> tuple[list[Explored], list[Curve]]:
    """Further controls, curves and metrics of a transfer, which returned `result`, `curves` and `bases`.

    `delete`: components a <= i < b that are left out, for one more figure (counted from 0; a = b: none); `importance`:
    number of first components that are left out, one at a time; 0: none. Others: as for `transfer`.
    """
    D, limit, headline, table, more = result.dim, result.limit, result.pairs[0].k, [], []
    chosen, share = draw_fits(tasks, D, seed), -(-result.images_per_task // len(tasks))
    pooled = principal_components(np.concatenate([embedded[domain][0][rows[:share]]
                                                  for domain, rows in chosen.items()]), device)
    full = {(c.fit, c.test): c.full for c in curves if c.kind == "components"}
    grid, few = control_grid(headline, limit), sorted({k for k in FURTHER if k < limit} | {headline, D})
    turns = [random_basis(D, seed, i) for i in range(FURTHER_RANDOM)]
    bar = progress(total=len(tasks) ** 2, desc="further controls", unit="pair")
    for task in tasks:
        trial = Trial.of(task, embedded[task.domain], draws, seed, device)
        more.append(trial.curve("pooled", "all", *pooled[:2], grid))
        pool = more[-1].at(headline)
        for fit, (mean, basis, _) in bases.items():
            # D random coordinates are the whole space, like D components
            by_chance = [measure_further(trial, mean, turn, [k for k in few if k < D], 0, seed) for turn in turns]
            further = [{"metric": metric, "k": k, **show(figure), "random": finite(
                np.mean([one[k, metric].value for one in by_chance])) if k < D else None}
                for (k, metric), figure in measure_further(trial, mean, basis, few, draws, seed).items()]
            last_first = np.concatenate([basis[:, :limit][:, ::-1], basis[:, limit:]], axis=1)
            bottom = trial.curve("bottom", fit, mean, last_first, grid)
            # without the first k, the last D - k remain: their span does not depend on the basis
            gone = [k for k in grid if k < limit]  # beyond the determined ones, rounding would be scored
            less = trial.curve("deleted", fit, mean, basis[:, ::-1], [D - k for k in reversed(gone)])
            less = replace(less, ks=gone, score=less.score[::-1], kept=less.kept[::-1], draws=less.draws[:, ::-1])
            own_mean = trial.curve("own mean", fit, bases[task.domain][0], basis, grid)
            more += bottom, less, own_mean
            table.append(Explored(fit, task.domain, further, show(pool), show(bottom.at(headline)),
                                  show(own_mean.at(headline))))
            a, b = delete[0], min(delete[1], limit)
            if a < b < a + limit:
                rest = np.concatenate([basis[:, :a], basis[:, b:], basis[:, a:b]], axis=1)
                less = trial.curve("", "", mean, rest, [D - (b - a), D])
                table[-1].deleted = {"from": a, "to": b} | show(less.at(D - (b - a)))
            if importance and D > 1:
                table[-1].importance = measure_importance(trial, mean, basis, full[fit, task.domain],
                                                          min(importance, limit))
            bar.update()
    bar.close()
    return table, more


def hits_without_each(probe: Vectors, gallery: Vectors, task: Task, count: int,
                      device: torch.device | str = "cpu", size: int | None = None) -> np.ndarray:
    """Whether each probe's nearest vector is a mate without one of the first `count` coordinates, bool [count, n].

    One product of all coordinates, and per coordinate S - q_i g_iᵀ and |g|² - g_i²; `hits_one_by_one` of the rest gives
    the same. Arguments as of `hits_by_k`.
    """
    def sums(products: torch.Tensor) -> torch.Tensor:
        return products.sum(1, keepdim=True, dtype=torch.float64) - products[:, :count]

    def advance(i: int, scores: torch.Tensor, x: torch.Tensor, g: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
        if i == 0:
            scores.addmm_(x.T, g)
        return torch.addr(scores, x[i], g[i], alpha=-1, out=spare)

    return sweep(probe, gallery, task, count, sums, advance, device, size)


def measure_importance(trial: Trial, mean: np.ndarray, basis: np.ndarray, full: Estimate, count: int
                       ) -> dict[str, list[float]]:
    """What each of the first `count` components is worth: the score without it minus `full`, the score of all.

    "change" by component, with "low" and "high", paired by resampling.
    """
    score, drawn = trial.resample(hits_without_each(*trial.turned(mean, basis), trial.task, count, trial.device))
    low, high = np.quantile(drawn - full.draws[:, None], [0.025, 0.975], axis=0)
    named = {"change": score - full.value, "low": low, "high": high}
    return {name: np.round(values, 6).tolist() for name, values in named.items()}


def measure_further(trial: Trial, mean: np.ndarray, basis: np.ndarray, ks: list[int], draws: int, seed: int
                    ) -> dict[tuple[int, str], Estimate]:
    """A task's other metrics with the first k coordinates, as evaluate.py computes them, by (k, metric).

    Of people rank-5, mAP and mINP; of objects the top 5 class means; of both AUC and TAR at 1 % FAR of equally many
    random pairs of test images of one identity and of two. Intervals by `draws` resamplings of identities.
    """
    task, by_k, every = trial.task, {}, np.arange(len(trial.vectors[1]))
    target = task.target[:FURTHER_PROBES]
    for k in ks:
        probe, gallery = trial.turned(mean, basis[:, :k])
        q, g = unit(probe[:FURTHER_PROBES].cpu().numpy()), np.empty((len(gallery), k), dtype=np.float32)
        for start in range(0, len(g), ROWS):
            part = slice(start, start + ROWS)
            g[part] = unit(gallery[part].cpu().numpy())
        search = search_gallery(q, np.arange(len(q)), every, lambda i: (task.mates[i], task.ignored[i]),
                                other=g, device=trial.device)
        values = {"nearest-mean top-5": search.first <= 5} if task.domain == "object" else {
            "rank-5": search.first <= 5, "mAP": average_precision(search.ranks),
            "mINP": inverse_negative_penalty(search.ranks)}
        figures = intervals(
            lambda w, values=values: {name: weighted_mean(of, w) for name, of in values.items()},
            bootstrap_counts(target, draws, seed))
        figures |= score_pairs(q, target, draws, seed, target=0.01)
        by_k |= {(k, name): figure for name, figure in figures.items()}
    return by_k


# ---------------------------------------------------------------- components, map


def d_primes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(mean a - mean b) / √((var a + var b) / 2) of each column of [n, D] and [m, D]; NaN where nothing varies."""
    spread = np.sqrt((a.var(0) + b.var(0)) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, (a.mean(0) - b.mean(0)) / spread, np.nan)


def measure_components(embedded: dict, tasks: list[Task], bases: dict, limit: int, seed: int) -> list[dict]:
    """How each component of each task, up to `limit`, separates tasks and identities.

    Returns:
        Rows fit, component (from 1), test, variance (share), task d' (probes of `test` against those of the others) and
        identity d' (products of coordinates, a component's part of the cosine, of pairs of one person and of two).
    """
    rows = []
    drawn = {task.domain: matched_pairs(task.target, 4000, seed) for task in tasks}
    for fit, (mean, basis, variances) in bases.items():
        z = {task.domain: (embedded[task.domain][1][task.probe] - mean) @ basis[:, :limit] for task in tasks}
        share = variances[:limit] / variances.sum()
        for test, coordinates in z.items():
            rest = [other for name, other in z.items() if name != test]
            task_d = d_primes(coordinates, np.concatenate(rest)) if rest else np.full(len(share), np.nan)
            left, right = coordinates[drawn[test][:, 0]], coordinates[drawn[test][:, 1]]
            half = len(left) // 2
            identity_d = d_primes(*np.split(left * right, [half])) if half else np.full(len(share), np.nan)
            rows += [{"fit": fit, "component": i + 1, "test": test, "variance": v, "task_dprime": finite(t),
                      "identity_dprime": finite(p)}
                     for i, (v, t, p) in enumerate(zip(share, task_d, identity_d, strict=True))]
    return rows


def draw_up_map(embedded: dict, tasks: list[Task], method: str, seed: int, most: int = 500) -> list[dict]:
    """Two coordinates for test images of every task: rows x, y, task, identity (a number; -1: not among these).

    Up to half of a task's `most` points are of its eight identities with the most images: else none would be visible.
    `method`: "pca" of the points, or "tsne" of their first 50 components, where distances between clusters mean
    nothing.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rng, points, rows = np.random.default_rng(seed), [], []
    for task in tasks:
        count = np.bincount(task.target)
        known = np.argsort(-count, kind="stable")[:8]
        shown = np.concatenate([np.flatnonzero(task.target == identity)[: most // 16] for identity in known])
        others = rng.permutation(np.setdiff1d(np.arange(len(task.target)), shown))[: most - len(shown)]
        chosen = np.concatenate([shown, others])
        points.append(embedded[task.domain][1][task.probe[chosen]])
        match = task.target[chosen, None] == known
        rows += [{"task": task.domain, "identity": int(i)} for i in np.where(match.any(1), match.argmax(1), -1)]
    x = np.concatenate(points).astype(np.float64)
    if method == "tsne" and len(x) >= 10:
        x = PCA(min(50, *x.shape), random_state=seed).fit_transform(x)
        x = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=seed).fit_transform(x)
    else:
        x = PCA(2, random_state=seed).fit_transform(x)
    return [{"x": float(a), "y": float(b), **row} for (a, b), row in zip(x, rows, strict=True)]
