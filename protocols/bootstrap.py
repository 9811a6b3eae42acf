"""Uncertainty: figures with the resamplings that their 95 % intervals are made of.

Copy with it: data_prep/__init__.py.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from types import UnionType
from typing import Any, get_args, get_origin

import numpy as np

from data_prep import InputError

FEW = 20  # identities or classes below which a bootstrap's 95 % interval is too narrow (with 11 it covers 90 %)
FEW_NOTE = f"†: of fewer than {FEW} identities or classes, whose bootstrap interval is too narrow"


class Unscorable(InputError):
    """A split whose images support no figure; an evaluation scores the others."""


def bootstrap_counts(identities: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each sample's identity is drawn, [n], for each of `draws` resamplings of the identities."""
    names, index = np.unique(identities, return_inverse=True)
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[index]


def resample_pairs(identities: np.ndarray, pairs: np.ndarray, genuine: np.ndarray, draws: int, seed: int
                   ) -> Iterator[np.ndarray]:
    """How often each pair of samples, [P, 2], is there in each of `draws` resamplings of the identities, [P]."""
    for counts in bootstrap_counts(identities, draws, seed):
        left, right = counts[pairs].T
        yield np.where(genuine, left, left * right)


@dataclass
class Estimate:
    """A value with its 95 % percentile interval, the resampled values behind it and what it was computed from."""

    value: float
    draws: np.ndarray
    count: int = 0  # pairs, probes or images
    chance: float = math.nan  # of random embeddings, where retention is computed
    identities: int = 0  # or classes, that were resampled
    kind: str = ""  # if not the split's protocol; see Row, which takes over these four fields
    readout: str = ""
    measure: str = ""
    unseen: bool = False

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
              count: int = 0, identities: np.ndarray | None = None) -> dict[str, Estimate]:
    """Each figure of a statistic of sample weights (None: all 1), with its bootstrap; `identities`: of the samples."""
    draws, distinct = [statistic(w) for w in weights], 0 if identities is None else len(np.unique(identities))
    return {name: Estimate(float(value), np.array([draw[name] for draw in draws], dtype=float), count,
                           identities=distinct)
            for name, value in statistic(None).items()}


def retention(before: Estimate, after: Estimate, chance: float) -> Estimate | None:
    """(after - chance) / (before - chance), paired draw by draw; None where `before` is not above chance."""
    if not before.low > chance:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return replace(after, value=(after.value - chance) / (before.value - chance),
                       draws=(after.draws - chance) / (before.draws - chance), chance=math.nan, kind="retention")


def gap(clean: Estimate, shifted: Estimate, seed: int) -> Estimate:
    """The loss from clean to shifted images; the two sets are resampled independently."""
    return replace(shifted, value=clean.value - shifted.value, kind="gap", chance=math.nan,
                   draws=clean.draws - np.random.default_rng(seed).permutation(shifted.draws),
                   identities=min(clean.identities, shifted.identities))


def weighted_mean(values: np.ndarray, weights: np.ndarray | None) -> float:
    """Mean of [n] values; NaN where all weights are 0."""
    if weights is None:
        return float(values.mean())
    return float((values * weights).sum() / weights.sum()) if weights.sum() else math.nan


def unit(x: np.ndarray) -> np.ndarray:
    """Rows divided by their lengths."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def normalise(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 IN PLACE: a copy of a million embeddings would be gigabytes."""
    x /= np.maximum(np.sqrt(np.einsum("nd,nd->n", x, x)), 1e-12)[:, None]
    return x


def finite(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None


def show(figure: Estimate) -> dict[str, float | None]:
    """A figure for JSON; unknown values are null."""
    return {"value": finite(figure.value), "low": finite(figure.low), "high": finite(figure.high)}


def minus(a: Estimate, b: Estimate) -> Estimate:
    """The difference of two figures with paired resamplings."""
    return Estimate(a.value - b.value, a.draws - b.draws, a.count, identities=a.identities)


def from_json(value: Any, kind: Any, where: str = "") -> Any:
    """A value read from JSON as `kind`: a dataclass, a list or dict of values, a figure (`dict`) or a plain type.

    KeyError, TypeError or ValueError if a field is missing, unknown or of another type, or a number is not finite.
    """
    origin, inner, prefix = get_origin(kind), get_args(kind), where and f"{where}: "
    if origin is UnionType:  # of a kind and None
        return None if value is None else from_json(value, inner[0], where)
    if is_dataclass(kind) and isinstance(value, dict):
        made = kind(**value)
        return replace(made, **{f.name: from_json(getattr(made, f.name), f.type, prefix + f.name)
                                for f in fields(kind)})
    if origin is list and isinstance(value, list):
        return [from_json(part, inner[0], f"{where} {i}") for i, part in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: from_json(part, inner[1], f"{where} {key}") for key, part in value.items()}
    if kind is dict and isinstance(value, dict):
        ends = ["value", "low", "high", *(["above"] if "above" in value else [])]
        return value | {end: from_json(value[end], float | None, prefix + end) for end in ends}
    wanted = int | float if kind is float else origin or kind
    finite = not isinstance(value, float) or math.isfinite(value)
    if not isinstance(value, wanted) or isinstance(value, bool) != (kind is bool) or not finite:
        raise ValueError(f"{where} is {str(value)[:80]!r}")
    return value


def margin(expert: float, delta: float) -> float:
    """Margin of non-inferiority: delta, but at most a tenth of the error of an expert above 0.9 (saturated)."""
    return delta if expert <= 0.9 else min(delta, 0.1 * (1 - expert))


def mark(identities: int) -> str:
    """The sign behind an interval of so few identities or classes that it is too narrow."""
    return "†" if 0 < identities < FEW else ""


def number(value: float | None) -> str:
    """A fraction in percent; "-" where it is unknown."""
    return "-" if value is None else f"{100 * value:.1f}"


def interval(figure: dict | None, form: str = ".1f") -> str:
    """A figure with its interval, in percent; "-" without one."""
    if not figure or figure["value"] is None:
        return "-"
    ends = [format(100 * figure[end], form) if figure[end] is not None else "-" for end in ("value", "low", "high")]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


def group_seeds(runs: list[tuple[str, int | None]]) -> list[list[int]]:
    """Indices of runs, (recipe, seed), that are averaged: of one recipe, each seed once; repetitions stand apart."""
    groups: dict[tuple[str, int], list[int]] = {}
    for i, run in enumerate(runs):
        groups.setdefault((run[0], runs[:i].count(run)), []).append(i)
    return list(groups.values())


def average(figures: list[dict | None]) -> dict | None:
    """The mean of a figure {"value", "low", "high"} over seeds; None where one lacks it."""
    if any(figure is None or None in figure.values() for figure in figures):
        return None
    return {end: float(np.mean([figure[end] for figure in figures])) for end in ("value", "low", "high")}


def needed(figures: list[dict]) -> str:
    """A k* with its interval, averaged over seeds; "> K" where the K components that images determine are too few."""
    if any(None in figure.values() and not figure.get("above") for figure in figures):
        return "-"
    ends = []
    for end in ("value", "low", "high"):
        known = [figure[end] if figure[end] is not None else figure["above"] for figure in figures]
        ends.append("> " * any(figure[end] is None for figure in figures) + f"{np.mean(known):,.0f}")
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"
