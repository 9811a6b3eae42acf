"""What no claim rests on: further metrics, single components, d' along them, a map.

Copy with it: data_prep/, kernels/gather.py, kernels/gather_triton.py, models/, protocols/.
"""

import numpy as np

from data_prep.format import matched_pairs
from protocols.bootstrap import finite
from protocols.tasks import Task


def d_primes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(mean a - mean b) / √((var a + var b) / 2) of each column of [n, D] and [m, D]; NaN where nothing varies."""
    spread = np.sqrt((a.var(0) + b.var(0)) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, (a.mean(0) - b.mean(0)) / spread, np.nan)


def measure_components(embedded: dict, tasks: list[Task], bases: dict, limit: int, seed: int, pairs: int = 4000
                       ) -> list[dict]:
    """What each single component of each task, up to `limit`, says about the tasks and about identities.

    Returns:
        Rows fit, component (from 1), test, variance (share), task d' (probes of `test` against those of the others) and
        identity d' (products of coordinates, a component's part of the cosine, of pairs of one person and of two).
    """
    rows = []
    drawn = {task.domain: matched_pairs(task.target, pairs, seed) for task in tasks}
    for fit, (mean, basis, variances) in bases.items():
        z = {task.domain: (embedded[task.domain][1][task.probe] - mean) @ basis[:, :limit] for task in tasks}
        share = variances[:limit] / variances.sum()
        for test, own in z.items():
            rest = [other for name, other in z.items() if name != test]
            apart = d_primes(own, np.concatenate(rest)) if rest else np.full(len(share), np.nan)
            left, right = own[drawn[test][:, 0]], own[drawn[test][:, 1]]
            half = len(left) // 2
            known = d_primes(*np.split(left * right, [half])) if half else np.full(len(share), np.nan)
            rows += [{"fit": fit, "component": i + 1, "test": test, "variance": v, "task_dprime": finite(t),
                      "identity_dprime": finite(p)}
                     for i, (v, t, p) in enumerate(zip(share, apart, known, strict=True))]
    return rows


def draw_up_map(embedded: dict, tasks: list[Task], method: str, seed: int, most: int = 500) -> list[dict]:
    """Two coordinates for test images of every task: rows x, y, task, identity (a number, -1: not among the shown).

    Up to half of a task's points are kept for its eight identities with the most images: else none could be seen.

    Args:
        embedded: domain -> unit embeddings of its training and of its test split.
        tasks: the tasks.
        method: "pca" (of the points themselves) or "tsne" (of their first 50 components; distances between clusters
            mean nothing there).
        seed: of the choice and of t-SNE.
        most: points a task.
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
        for i in chosen:
            place = np.flatnonzero(known == task.target[i])
            rows.append({"task": task.domain, "identity": int(place[0]) if len(place) else -1})
    x = np.concatenate(points).astype(np.float64)
    if method == "tsne" and len(x) >= 10:
        x = PCA(min(50, *x.shape), random_state=seed).fit_transform(x)
        x = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=seed).fit_transform(x)
    else:
        x = PCA(2, random_state=seed).fit_transform(x)
    return [{"x": float(a), "y": float(b), **row} for (a, b), row in zip(x, rows, strict=True)]
