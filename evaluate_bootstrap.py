"""Uncertainty: figures with the resamplings that their 95 % intervals are made of."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

FEW = 20  # identities or classes below which a bootstrap's 95 % interval is too narrow (of 11 it covers 90 %)


def bootstrap_counts(identities: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each sample's identity is drawn, [n], for each of `draws` resamplings of the identities."""
    names, index = np.unique(identities, return_inverse=True)
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[index]


@dataclass
class Figure:
    """A value with its 95 % percentile interval, the resampled values behind it and what it was computed from."""

    value: float
    draws: np.ndarray
    count: int = 0  # pairs, probes or images
    chance: float = math.nan  # of random embeddings, where retention is to be told
    identities: int = 0  # or classes, that were resampled

    @property
    def low(self) -> float:
        return self.quantile(0.025)

    @property
    def high(self) -> float:
        return self.quantile(0.975)

    def quantile(self, q: float) -> float:
        finite = self.draws[np.isfinite(self.draws)]
        return float(np.quantile(finite, q)) if len(finite) > 1 else self.value


def intervals(statistic: Callable[[np.ndarray | None], dict[str, float]], weights: Iterator[np.ndarray],
              count: int = 0, identities: np.ndarray | None = None) -> dict[str, Figure]:
    """Each figure of a statistic of sample weights (None: all 1), with its bootstrap; `identities`: its samples'."""
    draws, several = [statistic(w) for w in weights], 0 if identities is None else len(np.unique(identities))
    return {name: Figure(float(value), np.array([draw[name] for draw in draws], dtype=float), count, math.nan, several)
            for name, value in statistic(None).items()}


def retention(before: Figure, after: Figure, chance: float) -> Figure | None:
    """(after - chance) / (before - chance), paired draw by draw; None where `before` is not above chance."""
    if not before.low > chance:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return Figure((after.value - chance) / (before.value - chance),
                      (after.draws - chance) / (before.draws - chance), after.count, math.nan, after.identities)


def gap(clean: Figure, shifted: Figure, seed: int) -> Figure:
    """What is lost from clean to shifted images; the two sets are resampled each for itself."""
    return Figure(clean.value - shifted.value, clean.draws - np.random.default_rng(seed).permutation(shifted.draws),
                  shifted.count, math.nan, min(clean.identities, shifted.identities))


def weighted_mean(values: np.ndarray, weights: np.ndarray | None) -> float:
    """Mean of [n] values; NaN where all weights are 0."""
    if weights is None:
        return float(values.mean())
    return float((values * weights).sum() / weights.sum()) if weights.sum() else math.nan
