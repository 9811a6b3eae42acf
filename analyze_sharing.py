"""What tasks share: overlap of subspaces, variance explained, CKA, d' along components, scatter."""

import math

import numpy as np

import train
from analyze_subspaces import finite
from analyze_tasks import Task
from evaluate_classes import class_means


def participation_ratio(variances: np.ndarray) -> float:
    """(Σ λ)² / Σ λ²: how many dimensions carry the variance."""
    return float(variances.sum() ** 2 / np.square(variances).sum())


def principal_angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angles between two subspaces, degrees, rising; a and b hold orthonormal columns [D, k]."""
    return np.degrees(np.arccos(np.clip(np.linalg.svd(a.T @ b, compute_uv=False), 0, 1)))


def subspace_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """|AᵀB|² / k of orthonormal columns [D, k]: the mean squared cosine of the principal angles; by chance k / D."""
    return float(np.square(a.T @ b).sum() / a.shape[1])


def debiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of two embeddings [n, D] and [n, E] of the same n > 3 images.

    Source: Kornblith et al. 2019 with the unbiased HSIC of Song et al. 2012: 0, not a positive number, is expected of
    unrelated embeddings. A few outliers can dominate it (Davari et al. 2023).
    """
    n, grams = len(x), []
    for z in (x.astype(np.float64), y.astype(np.float64)):
        gram = z @ z.T
        np.fill_diagonal(gram, 0)
        grams.append(gram)

    def hsic(k: np.ndarray, l: np.ndarray) -> float:
        return ((k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ l.sum(0)) / (n - 2))

    k, l = grams
    return float(hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l)))


def scatter_ratio(x: np.ndarray, labels: np.ndarray) -> float:
    """Scatter of class means about the mean, over scatter of images about their class mean; x [n, D]."""
    labels = np.unique(labels, return_inverse=True)[1]
    size = np.bincount(labels)
    means = class_means(x, labels, len(size)) / size[:, None]
    between = (size * np.square(means - x.mean(0, dtype=np.float64)).sum(1)).sum()
    return float(between / np.square(x - means[labels]).sum())


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
    drawn = {task.domain: train.matched_pairs(task.target, pairs, seed) for task in tasks}
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


def measure_sharing(embedded: dict, tasks: list[Task], bases: dict, headline: int) -> dict:
    """Overlap, angles, explained variance and mean cosines of every pair of tasks; spectrum and scatter of each."""
    table, by_task, means = [], {}, {}
    for task in tasks:
        _, _, variances = bases[task.domain]
        x = embedded[task.domain][1][task.probe]
        total = np.cumsum(variances) / variances.sum()
        means[task.domain] = x.mean(0, dtype=np.float64)
        by_task[task.domain] = {
            "participation_ratio": participation_ratio(variances),
            **{f"components_for_{share}": int(np.searchsorted(total, share / 100) + 1) for share in (50, 90, 95)},
            "scatter_ratio": finite(scatter_ratio(x, task.target))}
    for a, (_, first, _) in bases.items():
        for b, (_, second, variances) in bases.items():
            u, v = first[:, :headline], second[:, :headline]
            angles = principal_angles(u, v)
            covered = (variances * np.square(u.T @ second).sum(0)).sum() / variances.sum()
            cosine = means[a] @ means[b] / np.linalg.norm(means[a]) / np.linalg.norm(means[b])
            table.append({"a": a, "b": b, "overlap": subspace_overlap(u, v), "smallest_angle": float(angles[0]),
                          "median_angle": float(np.median(angles)), "largest_angle": float(angles[-1]),
                          "explained": float(covered), "mean_cosine": float(cosine)})
    D = len(next(iter(bases.values()))[0])
    return {"k": headline, "chance": headline / D, "pairs": table, "tasks": by_task}
