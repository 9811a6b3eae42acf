"""People and models on the same trials.

Copy with it: protocols/bootstrap.py, protocols/pairs.py, protocols/search.py, data_prep/__init__.py,
data_prep/format.py.
"""

import csv
import io
import math
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import InputError
from data_prep.format import Split
from protocols.bootstrap import Estimate, bootstrap_counts, intervals
from protocols.pairs import roc
from protocols.search import name_identities

RATING_COLUMNS = ("split", "left_key", "right_key", "rater", "rating")


@dataclass(frozen=True)
class Rating:
    """One answer of one rater."""

    split: str  # "domain/split"
    left: int  # rows of the split
    right: int
    same: bool  # the truth
    rater: str
    value: float  # -3 (different) to +3 (same)


def find_row(split: Split, key: str) -> int | None:
    """The row of a sample's key: keys ascend in a test split, which is written in source order."""
    row = bisect_left(range(len(split)), key, key=lambda row: split.jpeg(row)[0])
    return row if row < len(split) and split.jpeg(row)[0] == key else None


def read_ratings(paths: list[Path], splits: dict[str, Split]) -> list[Rating]:
    """Ratings of several files.

    Args:
        paths: CSV files with the columns RATING_COLUMNS.
        splits: by "domain/split".

    Raises:
        InputError: with the file and the number of the line, which a text editor shows too.
    """
    found, seen, rows = [], {}, {}
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8-sig")
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            if missing := [name for name in RATING_COLUMNS if name not in (reader.fieldnames or [])]:
                raise InputError(f"--humans {path}: line 1 lacks the column {missing[0]!r}: want "
                                 + ",".join(RATING_COLUMNS))
            for record in reader:
                where = f"--humans {path}, line {reader.line_num}"
                name, left, right, rater, value = (record[column] for column in RATING_COLUMNS)
                if None in record or None in (name, left, right, rater, value):
                    raise InputError(f"{where}: not as many fields as the first line has columns")
                if name not in splits:
                    raise InputError(f"{where}: {name!r} is no split that is scored here; those are "
                                     f"{', '.join(splits)}")
                if not rater.strip():
                    raise InputError(f"{where}: no rater: every line needs a name or a code")
                if any(unicodedata.category(sign) in ("Cc", "Zl", "Zp") for sign in rater.strip()):
                    raise InputError(f"{where}: rater {rater[:80]!r}: want a name without line breaks and control "
                                     "characters")
                try:
                    rating = float(value)
                except ValueError:
                    rating = math.nan
                if not -3 <= rating <= 3:
                    raise InputError(f"{where}: rating {value!r}: want a number from -3 (different) to 3 (same)")
                for key in (left, right):
                    if (name, key) not in rows:
                        rows[name, key] = find_row(splits[name], key)
                    if rows[name, key] is None:
                        raise InputError(f"{where}: {name} has no image {key!r}: were the trials drawn from another "
                                         "preparation of it?")
                if left == right:
                    raise InputError(f"{where}: an image against itself")
                trial = (name, *sorted((left, right)), rater.strip())
                if trial in seen:
                    raise InputError(f"{where}: {rater.strip()} has rated this pair before, {seen[trial]}")
                seen[trial] = where.removeprefix("--humans ")
                a, b = (int(splits[name].labels[rows[name, key]]) for key in (left, right))
                if min(a, b) < 0:
                    raise InputError(f"{where}: nobody knows who is on an image without a label")
                found.append(Rating(name, rows[name, left], rows[name, right], a == b, rater.strip(), rating))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"--humans {path}: cannot be read ({error})") from error
    if not found:
        raise InputError(f"--humans {paths[0]}: holds no ratings")
    return found


def score_humans(ratings: list[Rating], splits: dict[str, Split], embeddings: dict[str, np.ndarray], draws: int,
                 seed: int) -> dict[str, dict[str, Estimate]]:
    """AUC of each rater and of the model on exactly the trials of that rater; ties count half.

    The figures of a split are of the raters who saw pairs of both kinds there; those of a domain with several splits of
    the raters who did so in them all, each with the mean over splits; those of "everything" of the raters who did so in
    every domain, each with the mean over domains of the mean over splits.

    Returns:
        {place: {metric: Estimate}}; a place is "domain/split", a domain with several splits, or "everything".

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

    def statistic(counts: np.ndarray | None) -> dict[tuple[str, str, str], float]:
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
            found |= {(place, "rater", f"AUC of rater {rater}"): pair[1]
                      for rater, pair in zip(who, both, strict=True)}
            model, human = both[np.isfinite(both).all(1)].T  # a resampling may leave a rater without one kind
            if len(model):
                found |= {(place, "model", "AUC on human trials"): model.mean(),
                          (place, "people", "human AUC (mean of raters)"): human.mean(),
                          (place, "lead", "model minus human AUC"): (model - human).mean(),
                          (place, "beaten", "share of raters beaten"): (model > human).mean()}
        return found

    whole = statistic(None)
    missing = dict.fromkeys(whole, math.nan)
    found = intervals(lambda counts: whole if counts is None else missing | statistic(counts),
                      bootstrap_counts(np.arange(len(people)), draws, seed))
    who = {name: np.unique(np.concatenate([np.append(a[i], b[i]) for (split, _), i in used.items() if split == name]))
           for name in names if any(split == name for split, _ in used)}
    shown = {name: {pair for (split, _), pairs in seen.items() if split == name for pair in pairs} for name in names}
    figures: dict[str, dict[str, Estimate]] = {}
    for (place, readout, metric), figure in found.items():
        figure.readout = readout
        these = [place] if place in shown else domains.get(place, shown)
        figure.count = sum(len(shown[name]) for name in these)
        figure.identities = len(np.unique(np.concatenate([who[name] for name in these if name in who])))
        figures.setdefault(place, {})[metric] = figure
    return figures
