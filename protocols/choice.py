"""Forced choice of a category: what models and people choose on the same stimuli, and whether their errors agree.

Copy with it: protocols/bootstrap.py, protocols/classify.py, protocols/embed.py, protocols/humans.py,
protocols/pairs.py, protocols/search.py, models/, kernels/, data_prep/.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from data_prep.format import Split
from protocols.bootstrap import Estimate, Unscorable, bootstrap_counts, intervals, unit
from protocols.classify import class_means, nearest_mean, nearest_neighbours
from protocols.humans import UNSEEN, Trials
from protocols.search import take_rows


def categories_of(names: list[str], split: Split) -> np.ndarray:
    """The category that each class belongs to, by the protocol's `groups` or by its own name: int [C], -1: none."""
    groups = split.protocol.get("groups", {})
    place = {name: i for i, category in enumerate(split.protocol["choices"])
             for name in (category, *groups.get(category, []))}
    return np.array([place.get(name, -1) for name in names], dtype=np.int64)


def choose(x: np.ndarray, split: Split, reference: tuple[np.ndarray, Split], head: np.ndarray | None,
           head_classes: list[str], texts: dict[str, np.ndarray], device: torch.device | str = "cpu"
           ) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The choices of a model among the categories that the reference has images of.

    By readout: the nearest mean of a category's images, a vote of 20 neighbours, the mean of the trained class weights
    of a category, prompts. The weights are left out where they lack a category.

    Args:
        x: unit embeddings of the split [M, D].
        reference: unit embeddings and split.
        head, head_classes: class weights [C, D] and their names, or None.
        texts: unit embeddings of the protocol's `choices`, by set of prompts, [K, D].

    Returns:
        By readout, the index in `choices` of each choice, int64 [M] (-1: none); the indices that were available.
    """
    (y, other), count = reference, len(split.protocol["choices"])
    labels = np.append(categories_of(other.classes, split), -1)[other.labels]
    vote = np.flatnonzero((labels >= 0) & np.isfinite(y[:, 0]))
    y, labels = take_rows(y, vote), labels[vote]
    available = np.unique(labels)
    if len(available) < 2:
        raise Unscorable(f"{split.folder}: fewer than two of its categories have images in its reference "
                         f"{other.folder}: prepare it again with --classes FILE, the classes of each category")
    weights = {name: (w, np.arange(count)) for name, w in texts.items()}
    if head is not None:
        weights = {"head": (unit(head), categories_of(head_classes, split))} | weights
    choices = {"nearest-mean": nearest_mean(x, class_means(y, labels, count)),
               "knn": nearest_neighbours(x, y, labels, count, False, device=device)}
    for name, (w, of) in weights.items():
        kept = np.isin(of, available)
        if len(np.unique(of[kept])) == len(available):
            choices[name] = nearest_mean(x, class_means(w[kept], of[kept], count))
    return choices, available


def agreement(right: np.ndarray, seen: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pair of R deciders: the first's accuracy where both decided, observed and error consistency, [R, R].

    Error consistency is Cohen's kappa of being right, (observed - expected) / (1 - expected): two that err
    independently, with accuracies p and q, are expected to agree on p q + (1 - p)(1 - q). It is NaN where that is 1.
    Source: Geirhos, Meding, Wichmann, NeurIPS 2020.

    Args:
        right, seen: bool [R, n]; an unseen stimulus is not right.
        weights: of the stimuli [n].
    """
    right, seen = right.astype(float), seen.astype(float)
    both, hits, alike = ((a * weights) @ b.T for a, b in ((seen, seen), (right, seen), (right, right)))
    with np.errstate(divide="ignore", invalid="ignore"):
        p, observed = hits / both, (both - hits - hits.T + 2 * alike) / both
        expected = p * p.T + (1 - p) * (1 - p.T)
        return p, observed, np.where(1 - expected > 1e-9, (observed - expected) / (1 - expected), np.nan)


def mean_of(values: np.ndarray) -> float:
    """The mean of the finite values; NaN without any."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else np.nan


@dataclass(frozen=True, eq=False)
class Decisions:
    """Models and people on the same n stimuli; R deciders, the models first."""

    models: dict[str, np.ndarray]  # by readout the category chosen [n]
    people: dict[str, np.ndarray]  # by observer; also NO_ANSWER and UNSEEN
    truth: np.ndarray  # [n]; in a cue conflict the category of the shape
    texture: np.ndarray  # [n] category of the texture, -1: none


def score_decisions(of: Decisions, draws: int, seed: int) -> dict[str, Estimate]:
    """Accuracy of models and people, their differences and consistency; intervals resample the stimuli.

    A model is compared with each observer on that observer's stimuli, then averaged over observers. Shape share: where
    the cues conflict, the share of shape among choices of either cue. Source: Geirhos et al., ICLR 2019.
    """
    chosen, m = np.array([*of.models.values(), *of.people.values()]).reshape(-1, len(of.truth)), len(of.models)
    right, seen, apart = chosen == of.truth, chosen != UNSEEN, ~np.eye(len(of.people), dtype=bool)
    conflict = (of.texture >= 0) & (of.texture != of.truth)

    def by_decider(values: np.ndarray, measure: str, of_model: str) -> dict[tuple[str, str, str], float]:
        """A figure of every decider, and the mean over observers, by readout, measure and metric."""
        named = {(name, of_model, f"{name} {of_model}"): values[i] for i, name in enumerate(of.models)}
        named |= {("observer", measure, f"{measure} of observer {name}"): values[m + i]
                  for i, name in enumerate(of.people)}
        mean = {("people", measure, f"human {measure} (mean of observers)"): mean_of(values[m:])}
        return named | (mean if of.people else {})

    def statistic(counts: np.ndarray | None) -> dict[tuple[str, str, str], float]:
        weights = np.ones(len(of.truth)) if counts is None else counts
        accuracy, observed, kappa = agreement(right, seen, weights)
        consistencies = {"observed consistency": observed, "error consistency": kappa}
        by_name = by_decider(accuracy.diagonal(), "accuracy", "top-1")
        if conflict.any():
            shape, texture = (right & conflict) @ weights, ((chosen == of.texture) & conflict) @ weights
            with np.errstate(invalid="ignore"):
                by_name |= by_decider(shape / (shape + texture), "shape share", "shape share")
        if len(of.people) > 1:
            by_name |= {("people", measure, f"{measure} among people"): mean_of(values[m:, m:][apart])
                        for measure, values in consistencies.items()}
        for i, name in enumerate(of.models if of.people else ()):
            lead = accuracy[i, m:] - accuracy[m:, i]
            by_name |= {(name, "accuracy", f"{name} accuracy on human trials"): mean_of(accuracy[i, m:]),
                        (name, "lead", f"{name} minus human accuracy"): mean_of(lead),
                        (name, "beaten", f"{name} share of observers beaten"): float((lead > 0).mean())}
            by_name |= {(name, measure, f"{name} {measure} with people"): mean_of(values[i, m:])
                        for measure, values in consistencies.items()}
        return by_name

    stimuli, of_models = np.arange(len(of.truth)), ("top-1", "shape share")
    estimates = intervals(statistic, bootstrap_counts(stimuli, draws, seed), len(stimuli), stimuli)
    return {metric: replace(figure, readout=readout, measure=measure,
                            kind="" if readout in of.models and measure in of_models else "human choices")
            for (readout, measure, metric), figure in estimates.items()}


def score_choice(models: dict[str, np.ndarray], among: np.ndarray, split: Split, readable: np.ndarray,
                 trials: Trials | None, draws: int, seed: int) -> tuple[dict[str, dict[str, Estimate]], Decisions]:
    """Figures of a split by scope, "11 of 16 categories[, condition c30]"; and the decisions behind the first of them.

    The first scope is the stimuli of the model's categories; people, who choose among all, are also scored on all. The
    conditions are those of the people's trials.

    Args:
        models, among: as `choose` gives them.
        readable: bool [M], images that are scored.
    """
    choices = split.protocol["choices"]
    place = {name: i for i, name in enumerate(choices)}
    truth = np.array([*(place[name] for name in split.classes), -1])[split.labels]
    texture = np.array([place.get(split.fields(row).get("texture"), -1) for row in range(len(split))])
    if not (readable & np.isin(truth, among)).any():
        raise Unscorable(f"{split.folder}: no readable stimulus of a category that its reference has")
    figures, first = {}, None
    for known, by_readout in ((among, models), (np.arange(len(choices)), {})):
        inside, scope = readable & np.isin(truth, known), f"{len(known)} of {len(choices)} categories"
        conditions = np.unique(trials.conditions[inside].astype(str)) if trials else np.array([])
        parts = {scope: inside} if by_readout or trials else {}
        if len(conditions) > 1:
            parts |= {f"{scope}, condition {name}": inside & (trials.conditions == name) for name in conditions if name}
        for part, rows in parts.items():
            people = dict(zip(trials.observers, trials.answers[:, rows], strict=True)) if trials else {}
            decisions = Decisions({name: chosen[rows] for name, chosen in by_readout.items()},
                                  {name: chosen for name, chosen in people.items() if (chosen != UNSEEN).any()},
                                  truth[rows], np.where(np.isin(texture, known), texture, -1)[rows])
            first = first or decisions
            if part in figures:  # the model has every category
                continue
            figures[part] = score_decisions(decisions, draws, seed)
            for metric, figure in list(figures[part].items()):
                if part != scope and not figure.kind:
                    del figures[part][metric]  # a model's own figures do not depend on the observers
                elif figure.measure in ("top-1", "accuracy"):
                    figure.chance = 1 / len(known if figure.readout in models else choices)
    return figures, first
