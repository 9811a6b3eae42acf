"""People and models on the same trials."""

import hashlib
import math

import numpy as np

from data_prep import InputError
from data_prep.shards import Split
from data_prep.trials import Rating
from evaluate_bootstrap import Figure, bootstrap_counts, intervals
from evaluate_embed import fingerprint
from evaluate_pairs import roc
from evaluate_report import literal
from evaluate_results import Results, Row, rows_of, show_value
from evaluate_search import name_identities


def score_humans(ratings: list[Rating], splits: dict[str, Split], embeddings: dict[str, np.ndarray], draws: int,
                 seed: int) -> dict[str, dict[str, Figure]]:
    """AUC of each rater and of the model on exactly the trials of that rater; ties count half.

    The figures of a split are of the raters who saw pairs of both kinds there; those of a domain with several splits of
    the raters who did so in them all, each with the mean over splits; those of "everything" of the raters who did so in
    every domain, each with the mean over domains of the mean over splits.

    Returns:
        {place: {metric: Figure}}; a place is "domain/split", a domain with several splits, or "everything".

    Args:
        ratings: as `read_ratings` gives them; trials with an unreadable image are left out, for both sides.
        splits, embeddings: by "domain/split"; unit embeddings, NaN where unreadable.
    """
    ratings = sorted(ratings, key=lambda r: (r.split, r.rater, min(r.left, r.right), max(r.left, r.right)))
    names = {name: name_identities(splits[name]) for name in splits if any(r.split == name for r in ratings)}
    scores = np.array([embeddings[r.split][r.left] @ embeddings[r.split][r.right] for r in ratings], dtype=float)
    if lost := int((~np.isfinite(scores)).sum()):
        print(f"  human trials: {lost} ratings of unreadable images left out")
        ratings = [r for r, score in zip(ratings, scores, strict=True) if np.isfinite(score)]
        scores = scores[np.isfinite(scores)]
    same, answers = np.array([r.same for r in ratings]), np.array([r.value for r in ratings])
    # a person in two domains is drawn, or not, in both
    ends = np.array([[names[r.split][r.left], names[r.split][r.right]] for r in ratings]).reshape(-1, 2)
    people, ends = np.unique(ends, return_inverse=True)
    a, b = ends.reshape(-1, 2).T
    rows: dict[tuple[str, str], list[int]] = {}
    for i, r in enumerate(ratings):
        rows.setdefault((r.split, r.rater), []).append(i)
    used = {key: np.array(i) for key, i in rows.items() if 0 < same[i].sum() < len(i)}
    if unused := sorted(rows.keys() - used.keys()):
        print(f"  human trials: {unused[0][1]} rated pairs of one kind alone in {unused[0][0]}"
              + f", as {len(unused) - 1} others did" * (len(unused) > 1) + ": left out there")
    if not used:
        raise InputError("--humans: no rater has rated both a pair of one identity and one of two in a split: nothing "
                         "to score")
    seen = {key: tuple((ratings[i].left, ratings[i].right) for i in some) for key, some in used.items()}
    domains: dict[str, list[str]] = {}
    for name in names:
        if any(split == name for split, _ in used):
            domains.setdefault(name.split("/")[0], []).append(name)
    raters = {name: sorted(rater for split, rater in used if split == name) for name in names}
    raters |= {domain: sorted(set.intersection(*(set(raters[name]) for name in some)))
               for domain, some in domains.items() if len(some) > 1}
    if len(domains) > 1:
        raters["everything"] = sorted(set.intersection(*(set(raters[n]) for some in domains.values() for n in some)))

    def auc(values: np.ndarray, some: np.ndarray, weights: np.ndarray | None) -> float:
        far, tar = roc(values[some], same[some], None if weights is None else weights[some])
        return float(np.trapezoid(tar, far))

    def statistic(counts: np.ndarray | None) -> dict[tuple[str, str], float]:
        weights = None if counts is None else np.where(same, counts[a], counts[a] * counts[b])
        known, found, pairs = {}, {}, {}  # raters often share their trials: the model is scored on them once
        for (split, rater), some in used.items():
            trials = (split, seen[split, rater])
            if trials not in known:
                known[trials] = auc(scores, some, weights)
            pairs[split, rater] = known[trials], auc(answers, some, weights)
        for domain, some in domains.items():
            for rater in raters.get(domain, []):
                pairs[domain, rater] = tuple(np.mean([pairs[name, rater] for name in some], axis=0))
        for rater in raters.get("everything", []):
            tasks = [np.mean([pairs[name, rater] for name in some], axis=0) for some in domains.values()]
            pairs["everything", rater] = tuple(np.mean(tasks, axis=0))
        for place, who in raters.items():
            both = np.array([pairs[place, rater] for rater in who]).reshape(-1, 2)
            found |= {(place, f"AUC of rater {rater}"): pair[1] for rater, pair in zip(who, both, strict=True)}
            model, human = both[np.isfinite(both).all(1)].T  # a resampling may leave a rater without one kind
            if len(model):
                found |= {(place, "AUC on human trials"): model.mean(),
                          (place, "human AUC (mean of raters)"): human.mean(),
                          (place, "model minus human AUC"): (model - human).mean(),
                          (place, "share of raters beaten"): (model > human).mean()}
        return found

    whole = statistic(None)
    missing = dict.fromkeys(whole, math.nan)
    found = intervals(lambda counts: whole if counts is None else missing | statistic(counts),
                      bootstrap_counts(np.arange(len(people)), draws, seed))
    who = {name: np.unique(np.concatenate([np.append(a[i], b[i]) for (split, _), i in used.items() if split == name]))
           for name in names if any(split == name for split, _ in used)}
    shown = {name: {pair for (split, _), pairs in seen.items() if split == name for pair in pairs} for name in names}
    figures: dict[str, dict[str, Figure]] = {}
    for (place, metric), figure in found.items():
        these = [place] if place in shown else domains.get(place, shown)
        figure.count = sum(len(shown[name]) for name in these)
        figure.identities = len(np.unique(np.concatenate([who[name] for name in these if name in who])))
        figures.setdefault(place, {})[metric] = figure
    return figures


def make_human_rows(run: str, ratings: list[Rating], splits: dict[str, Split], figures: dict[str, dict],
                    flip: bool) -> Results:
    """The rows of `score_humans`, by weights: of each split, of "all splits" of a domain, and of domain "all"."""
    rows: Results = []
    for weights, found in figures.items():
        for place, by_metric in found.items():
            some = [r for r in ratings if place in (r.split, r.split.split("/")[0], "everything")]
            told = hashlib.sha256(repr(sorted((r.split, *sorted((r.left, r.right)), r.rater, r.value)
                                              for r in some)).encode()).hexdigest()[:8]
            sets = " + ".join(f"{name} {fingerprint(splits[name])}" for name in sorted({r.split for r in some}))
            protocol = f"human trials, ratings {told}, sets {sets}, {'flip' if flip else 'no flip'}"
            domain, _, split = ("all/human trials" if place == "everything" else place).partition("/")
            split = split or "all splits"
            rows += rows_of(run, weights, domain, split, protocol, by_metric)
    return rows


def human_rows(rows: list[Row]) -> dict[tuple[str, str], dict[str, dict[str, Row]]]:
    """{(domain, split): {weights: {metric: row}}} of the human trials."""
    found: dict = {}
    for row in rows:
        if row.protocol.startswith("human trials,"):
            found.setdefault((row.domain, row.split), {}).setdefault(row.weights, {})[row.metric] = row
    return found


def human_verdict(difference: Row) -> str:
    """What "model minus human AUC" says."""
    return "above humans" if difference.low > 0 else "below humans" if difference.high < 0 else "undecided"


def show_humans(rows: list[Row]) -> list[str]:
    """Lines of report.md; none where there are no human trials."""
    found = human_rows(rows)
    if not found:
        return []
    lines = ["", "## Human trials", "", "People and model on identical pairs: AUC of the ratings (-3 to +3) and of the "
             "cosine, chance 50. Intervals resample who and what is on the pictures; the raters are these, not a "
             "sample of mankind. All splits: the mean over those of a domain; everything: over the domains; of the "
             "raters who did them all.", "",
             "| split | pairs | raters | people: mean (range) | weights | model | model minus people | beaten | |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for (domain, split), by_weights in found.items():
        for weights, by_metric in by_weights.items():
            each = [row.value for metric, row in by_metric.items() if metric.startswith("AUC of rater ")]
            people, lead = by_metric["human AUC (mean of raters)"], by_metric["model minus human AUC"]
            name = "everything" if domain == "all" else literal(f"{domain}/{split}")
            reach = f"{100 * min(each):.1f} to {100 * max(each):.1f}"
            lines.append(f"| {name} | {people.count} | {len(each)} | {show_value(people)} ({reach}) | {weights} "
                         f"| {show_value(by_metric['AUC on human trials'])} | {show_value(lead)} "
                         f"| {100 * by_metric['share of raters beaten'].value:.0f} % | {human_verdict(lead)} |")
    return lines
