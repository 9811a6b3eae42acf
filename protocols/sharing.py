"""What tasks share: overlap of subspaces, variance explained, CKA, d' along components, scatter.

Copy with it: data_prep/, kernels/gather.py, kernels/gather_triton.py, models/, protocols/.
"""

import math
from dataclasses import dataclass

import numpy as np

from protocols.bootstrap import finite
from protocols.classify import class_means
from protocols.tasks import Task


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


@dataclass
class Shape:
    """The spectrum and the scatter of a task's embeddings."""

    participation_ratio: float
    components_for_50: int  # of the variance, in percent
    components_for_90: int
    components_for_95: int
    scatter_ratio: float | None


@dataclass
class Overlap:
    """What the first k components of two tasks have in common; angles in degrees."""

    a: str
    b: str
    overlap: float
    smallest_angle: float
    median_angle: float
    largest_angle: float
    explained: float  # share of b's variance in the components of a
    mean_cosine: float  # of the tasks' means


@dataclass
class Sharing:
    """What tasks share."""

    k: int
    chance: float  # overlap of random subspaces
    pairs: list[Overlap]
    tasks: dict[str, Shape]  # by domain


def measure_sharing(embedded: dict, tasks: list[Task], bases: dict, headline: int) -> Sharing:
    """Overlap of the first `headline` components of every pair of tasks; spectrum and scatter of each."""
    table, by_task, means = [], {}, {}
    for task in tasks:
        _, _, variances = bases[task.domain]
        x = embedded[task.domain][1][task.probe]
        total = np.cumsum(variances) / variances.sum()
        means[task.domain] = x.mean(0, dtype=np.float64)
        by_task[task.domain] = Shape(
            participation_ratio(variances), *(int(np.searchsorted(total, share) + 1) for share in (0.5, 0.9, 0.95)),
            finite(scatter_ratio(x, task.target)))
    for a, (_, first, _) in bases.items():
        for b, (_, second, variances) in bases.items():
            u, v = first[:, :headline], second[:, :headline]
            angles = principal_angles(u, v)
            covered = (variances * np.square(u.T @ second).sum(0)).sum() / variances.sum()
            cosine = means[a] @ means[b] / np.linalg.norm(means[a]) / np.linalg.norm(means[b])
            table.append(Overlap(a, b, subspace_overlap(u, v), *map(float, (
                angles[0], np.median(angles), angles[-1], covered, cosine))))
    return Sharing(headline, headline / len(next(iter(bases.values()))[0]), table, by_task)
