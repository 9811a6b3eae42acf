"""People and models on the same trials.

Copy with it: protocols/bootstrap.py, protocols/pairs.py, protocols/search.py, data_prep/__init__.py,
data_prep/format.py.
"""

import csv
import io
import math
import unicodedata
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import InputError
from data_prep.format import Split, stimulus_of
from protocols.bootstrap import Estimate, bootstrap_counts, intervals
from protocols.pairs import roc
from protocols.search import name_identities

RATING_COLUMNS = ("split", "left_key", "right_key", "rater", "rating")
TRIAL_COLUMNS = ("subj", "object_response", "category", "imagename")
NO_ANSWER, UNSEEN = -1, -2  # instead of a category: no answer in time (an error); no trial
MISSING = {"", "na", "n/a", "nan", "none"}


@dataclass(frozen=True)
class Rating:
    """One answer of one rater."""

    split: str  # "domain/split"
    left: int  # rows of the split
    right: int
    same: bool  # the truth
    rater: str
    value: float  # -3 (different) to +3 (same)


@dataclass(frozen=True, eq=False)
class Trials:
    """What O observers chose on the M images of a split."""

    observers: list[str]
    answers: np.ndarray  # int64 [O, M]: place among the protocol's choices, NO_ANSWER or UNSEEN
    conditions: np.ndarray  # str [M]; "" of stimuli that nobody saw


def find_row(split: Split, key: str) -> int | None:
    """The row of a sample by its key; keys ascend in a test split."""
    row = bisect_left(range(len(split)), key, key=lambda row: split.jpeg(row)[0])
    return row if row < len(split) and split.jpeg(row)[0] == key else None


def read_table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of a CSV with their places; column names in lower case, values stripped.

    Raises:
        InputError: with the file and the number of the line, as in a text editor.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
        reader.fieldnames = [str(name).strip().casefold() for name in reader.fieldnames or []]
        if missing := [name for name in columns if name not in reader.fieldnames]:
            raise InputError(f"--humans {path}: line 1 lacks the column {missing[0]!r}: want {','.join(columns)}")
        for record in reader:
            where = f"--humans {path}, line {reader.line_num}"
            if None in record or None in record.values():
                raise InputError(f"{where}: not as many fields as the first line has columns")
            yield where, {name: value.strip() for name, value in record.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--humans {path}: cannot be read ({error})") from error


def check_name(name: str, where: str, what: str) -> None:
    """InputError unless the name of a rater or observer fits in a table."""
    if not name:
        raise InputError(f"{where}: no {what}: every line needs a name or a code")
    if any(unicodedata.category(sign) in ("Cc", "Zl", "Zp") for sign in name):
        raise InputError(f"{where}: {what} {name[:80]!r}: want a name without line breaks and control characters")


def read_ratings(paths: list[Path], splits: dict[str, Split]) -> list[Rating]:
    """Ratings of several files.

    Args:
        paths: CSV files with the columns RATING_COLUMNS.
        splits: by "domain/split".

    Raises:
        InputError: with the file and the number of the line.
    """
    ratings, seen, rows = [], {}, {}
    for where, record in (line for path in paths for line in read_table(path, RATING_COLUMNS)):
        name, left, right, rater, value = (record[column] for column in RATING_COLUMNS)
        if name not in splits:
            raise InputError(f"{where}: {name!r} is not a split that is scored here; those are {', '.join(splits)}")
        check_name(rater, where, "rater")
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
        trial = (name, *sorted((left, right)), rater)
        if trial in seen:
            raise InputError(f"{where}: {rater} has rated this pair before, {seen[trial]}")
        seen[trial] = where.removeprefix("--humans ")
        a, b = (int(splits[name].labels[rows[name, key]]) for key in (left, right))
        if min(a, b) < 0:
            raise InputError(f"{where}: an image without a label has no known identity")
        ratings.append(Rating(name, rows[name, left], rows[name, right], a == b, rater, rating))
    if not ratings:
        raise InputError(f"--humans {paths[0]}: no ratings in it")
    return ratings


def read_trials(paths: list[Path], split: Split) -> Trials:
    """Trials of a forced choice from several files, in the format of the model-vs-human toolbox.

    A stimulus is found by `stimulus_of` of its image's name; trials of stimuli absent from the split are left out.

    Args:
        paths: CSV files with the columns TRIAL_COLUMNS and, where there are several, `condition`.
        split: with the protocol `choice`.
    """
    name, choices, lost = f"{split.domain}/{split.name}", {c: i for i, c in enumerate(split.protocol["choices"])}, 0
    rows = {split.fields(row).get("stimulus"): row for row in range(len(split))}
    answers: dict[str, np.ndarray] = {}
    conditions = np.full(len(split), "", dtype=object)
    for where, record in (line for path in paths for line in read_table(path, TRIAL_COLUMNS)):
        observer, answer, category, image = (record[column] for column in TRIAL_COLUMNS)
        answer, condition, row = answer.casefold(), record.get("condition", ""), rows.get(stimulus_of(image))
        if row is None:
            lost += 1
            continue
        check_name(observer, where, "observer")
        if category.casefold() != (truth := split.classes[split.labels[row]]):
            raise InputError(f"{where}: {image[:80]!r} shows {category[:40]!r}, in {name} {truth!r}: do trials and "
                             "stimuli belong together?")
        if answer not in choices.keys() | MISSING:
            raise InputError(f"{where}: the answer {answer[:40]!r} is none of {', '.join(choices)} and na")
        if conditions[row] not in ("", condition):
            raise InputError(f"{where}: {image[:80]!r} in condition {condition!r}, further up in {conditions[row]!r}: "
                             "prepare each condition as a split of its own")
        answered = answers.setdefault(observer, np.full(len(split), UNSEEN))
        if answered[row] != UNSEEN:
            raise InputError(f"{where}: {observer} has answered {image[:80]!r} before")
        answered[row], conditions[row] = choices.get(answer, NO_ANSWER), condition
    if not answers:
        raise InputError(f"--humans {paths[0]}: no trial of a stimulus of {name}")
    observers = sorted(answers)
    trials = Trials(observers, np.array([answers[observer] for observer in observers]), conditions)
    print(f"  {name}: {(trials.answers != UNSEEN).sum():,} trials of {len(observers)} observers"
          + f"; {lost:,} of other stimuli are left out" * bool(lost))
    return trials


def read_humans(given: tuple[str, ...], splits: dict[str, Split]) -> tuple[list[Rating], dict[str, Trials]]:
    """The files of --humans, of either format: ratings of pairs, and trials of forced choice by "domain/split".

    Args:
        given: FILE.csv, a folder of such files or, if several splits have the stimuli, SPLIT=FILE.csv.
        splits: those that are scored.
    """
    ratings: list[Path] = []
    trials: dict[str, list[Path]] = {}
    fitting = [name for name, split in splits.items() if split.protocol["name"] == "choice"]
    for word in given:
        name, sign, path = word.partition("=")
        if not sign or Path(word).exists():
            name, path = fitting[0] if len(fitting) == 1 else "", word
        path = Path(path)
        for file in sorted(path.glob("*.csv")) or [path]:
            if not any({*TRIAL_COLUMNS[:2]} & {*record} for _, record in read_table(file, ())):
                ratings.append(file)
            elif name in fitting:
                trials.setdefault(name, []).append(file)
            else:
                raise InputError(f"--humans {word}: on which stimuli? " + (
                    f"want SPLIT={path} with one of {', '.join(fitting)}" if fitting else
                    "no split of `data_prep stimuli` is scored here"))
    return (read_ratings(ratings, splits) if ratings else [],
            {name: read_trials(files, splits[name]) for name, files in trials.items()})


def who_counts(used: Collection[tuple[str, str]],
               names: list[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The rated splits of each domain, and the raters that count for each split, domain of several, and everything.

    Args:
        used: splits and raters who saw pairs of both kinds there.
        names: of the splits, in order.
    """
    of = {name: sorted(rater for split, rater in used if split == name) for name in names}
    domains: dict[str, list[str]] = {}
    for name in filter(of.get, names):
        domains.setdefault(name.split("/")[0], []).append(name)

    def of_all(members: Iterable[str]) -> list[str]:
        return sorted(set.intersection(*(set(of[name]) for name in members)))

    raters = of | {domain: of_all(members) for domain, members in domains.items() if len(members) > 1}
    if len(domains) > 1:
        raters["everything"] = of_all(name for members in domains.values() for name in members)
    return domains, raters


def score_humans(ratings: list[Rating], splits: dict[str, Split], embeddings: dict[str, np.ndarray], draws: int,
                 seed: int) -> dict[str, dict[str, Estimate]]:
    """AUC of each rater and of the model on exactly the trials of that rater; ties count half.

    Raters count for a split if they saw pairs of both kinds in it; for a domain with several splits, if they did so in
    all of them (mean over splits); for "everything", if they did so in every domain (mean over domains of these means).

    Returns:
        {place: {metric: Estimate}}; a place is "domain/split", a domain with several splits, or "everything".

    Args:
        ratings: from `read_ratings`; trials with an unreadable image are left out for raters and model.
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
    # a person in two domains is drawn in both or in neither
    ends = np.array([[names[r.split][r.left], names[r.split][r.right]] for r in ratings]).reshape(-1, 2)
    people, ends = np.unique(ends, return_inverse=True)
    a, b = ends.reshape(-1, 2).T
    rows: dict[tuple[str, str], list[int]] = {}
    for i, r in enumerate(ratings):
        rows.setdefault((r.split, r.rater), []).append(i)
    used = {key: np.array(i) for key, i in rows.items() if 0 < same[i].sum() < len(i)}
    if unused := sorted(rows.keys() - used.keys()):
        print(f"  human trials: {unused[0][1]} rated only pairs of one kind in {unused[0][0]}"
              + f", as {len(unused) - 1} others did" * (len(unused) > 1) + ": left out there")
    if not used:
        raise InputError("--humans: no rater has rated both a pair of one identity and one of two in a split: nothing "
                         "to score")
    seen = {key: tuple((ratings[i].left, ratings[i].right) for i in rated) for key, rated in used.items()}
    domains, raters = who_counts(used, list(names))

    def auc(values: np.ndarray, rated: np.ndarray, weights: np.ndarray | None) -> float:
        far, tar = roc(values[rated], same[rated], None if weights is None else weights[rated])
        return float(np.trapezoid(tar, far))

    def statistic(counts: np.ndarray | None) -> dict[tuple[str, str, str], float]:
        weights = None if counts is None else np.where(same, counts[a], counts[a] * counts[b])
        known, values, pairs = {}, {}, {}  # raters often share trials: the model is scored on them once
        for (split, rater), rated in used.items():
            trials = (split, seen[split, rater])
            if trials not in known:
                known[trials] = auc(scores, rated, weights)
            pairs[split, rater] = known[trials], auc(answers, rated, weights)
        for domain, members in domains.items():
            for rater in raters.get(domain, []):
                pairs[domain, rater] = tuple(np.mean([pairs[name, rater] for name in members], axis=0))
        for rater in raters.get("everything", []):
            tasks = [np.mean([pairs[name, rater] for name in members], axis=0) for members in domains.values()]
            pairs["everything", rater] = tuple(np.mean(tasks, axis=0))
        for place, who in raters.items():
            both = np.array([pairs[place, rater] for rater in who]).reshape(-1, 2)
            values |= {(place, "rater", f"AUC of rater {rater}"): pair[1]
                       for rater, pair in zip(who, both, strict=True)}
            model, human = both[np.isfinite(both).all(1)].T  # a resampling may leave a rater without pairs of one kind
            if len(model):
                values |= {(place, "model", "AUC on human trials"): model.mean(),
                           (place, "people", "human AUC (mean of raters)"): human.mean(),
                           (place, "lead", "model minus human AUC"): (model - human).mean(),
                           (place, "beaten", "share of raters beaten"): (model > human).mean()}
        return values

    whole = statistic(None)
    missing = dict.fromkeys(whole, math.nan)
    estimates = intervals(lambda counts: whole if counts is None else missing | statistic(counts),
                          bootstrap_counts(np.arange(len(people)), draws, seed))
    who = {name: np.unique(np.concatenate([np.append(a[i], b[i]) for (split, _), i in used.items() if split == name]))
           for members in domains.values() for name in members}
    shown = {name: {pair for (split, _), pairs in seen.items() if split == name for pair in pairs} for name in names}
    figures: dict[str, dict[str, Estimate]] = {}
    for (place, readout, metric), figure in estimates.items():
        figure.readout = readout
        these = [place] if place in shown else domains.get(place, shown)
        figure.count = sum(len(shown[name]) for name in these)
        figure.identities = len(np.unique(np.concatenate([who[name] for name in these if name in who])))
        figures.setdefault(place, {})[metric] = figure
    return figures
