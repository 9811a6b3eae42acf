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
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep import InputError
from data_prep.format import Split, stimulus_of
from protocols.bootstrap import Estimate, intervals, resample_pairs
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
    ratings, seen, find = [], {}, cache(lambda name, key: find_row(splits[name], key))
    for where, record in (line for path in paths for line in read_table(path, RATING_COLUMNS)):
        name, *keys, rater, value = (record[column] for column in RATING_COLUMNS)
        if name not in splits:
            raise InputError(f"{where}: {name!r} is not a split that is scored here; those are {', '.join(splits)}")
        check_name(rater, where, "rater")
        try:
            rating = float(value)
        except ValueError:
            rating = math.nan
        if not -3 <= rating <= 3:
            raise InputError(f"{where}: rating {value!r}: want a number from -3 (different) to 3 (same)")
        rows = [find(name, key) for key in keys]
        if None in rows:
            raise InputError(f"{where}: {name} has no image {keys[rows.index(None)]!r}: were the trials drawn from "
                             "another preparation of it?")
        if keys[0] == keys[1]:
            raise InputError(f"{where}: an image against itself")
        trial = (name, *sorted(keys), rater)
        if trial in seen:
            raise InputError(f"{where}: {rater} has rated this pair before, {seen[trial]}")
        seen[trial] = where.removeprefix("--humans ")
        a, b = splits[name].labels[rows].tolist()
        if min(a, b) < 0:
            raise InputError(f"{where}: an image without a label has no known identity")
        ratings.append(Rating(name, *rows, a == b, rater, rating))
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


def find_places(used: Collection[tuple[str, str]],
                names: Iterable[str]) -> dict[str, tuple[list[list[str]], list[str]]]:
    """Where people are scored: by place, its splits by domain, and the raters that count for all of them.

    Args:
        used: splits and raters who saw pairs of both kinds there.
        names: of the splits, in order.
    """
    raters = {name: {rater for split, rater in used if split == name} for name in names}
    domains: dict[str, list[str]] = {}
    for name in filter(raters.get, raters):
        domains.setdefault(name.split("/")[0], []).append(name)
    places = {name: [[name]] for name in raters} | {d: [members] for d, members in domains.items() if len(members) > 1}
    if len(domains) > 1:
        places["everything"] = list(domains.values())
    common = {place: set.intersection(*(raters[name] for name in chain(*parts))) for place, parts in places.items()}
    return {place: (parts, sorted(common[place])) for place, parts in places.items() if common[place]}


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
    people, ends = np.unique(ends, return_inverse=True)  # [P, 2]
    by_rater: dict[tuple[str, str], list[int]] = {}
    for i, r in enumerate(ratings):
        by_rater.setdefault((r.split, r.rater), []).append(i)
    used = {key: np.array(i) for key, i in by_rater.items() if 0 < same[i].sum() < len(i)}
    if unused := sorted(by_rater.keys() - used.keys()):
        print(f"  human trials: {unused[0][1]} rated only pairs of one kind in {unused[0][0]}"
              + f", as {len(unused) - 1} others did" * (len(unused) > 1) + ": left out there")
    if not used:
        raise InputError("--humans: no rater has rated both a pair of one identity and one of two in a split: nothing "
                         "to score")
    places = find_places(used, names)

    def auc(values: np.ndarray, rated: np.ndarray, weights: np.ndarray | None) -> float:
        far, tar = roc(values[rated], same[rated], None if weights is None else weights[rated])
        return float(np.trapezoid(tar, far))

    def statistic(weights: np.ndarray | None) -> dict[tuple[str, str, str], float]:
        values, pairs = {}, {key: (auc(scores, i, weights), auc(answers, i, weights)) for key, i in used.items()}
        for place, (parts, raters) in places.items():
            both = np.array([np.mean([np.mean([pairs[name, rater] for name in members], axis=0) for members in parts],
                                     axis=0) for rater in raters])
            values |= {(place, "rater", f"AUC of rater {rater}"): auc_of_rater
                       for rater, auc_of_rater in zip(raters, both[:, 1], strict=True)}
            model, human = both[np.isfinite(both).all(1)].T  # a resampling may leave a rater without pairs of one kind
            if len(model):
                values |= {(place, "model", "AUC on human trials"): model.mean(),
                           (place, "people", "human AUC (mean of raters)"): human.mean(),
                           (place, "lead", "model minus human AUC"): (model - human).mean(),
                           (place, "beaten", "share of raters beaten"): (model > human).mean()}
        return values

    missing = dict.fromkeys(statistic(None), math.nan)
    estimates = intervals(lambda weights: missing | statistic(weights),
                          resample_pairs(np.arange(len(people)), ends, same, draws, seed))
    figures: dict[str, dict[str, Estimate]] = {}
    for place, (parts, _) in places.items():
        rated = np.concatenate([i for (split, _), i in used.items() if split in chain(*parts)])
        count = len({(ratings[i].split, ratings[i].left, ratings[i].right) for i in rated})
        identities = len(np.unique(ends[rated]))
        figures[place] = {metric: replace(figure, readout=readout, count=count, identities=identities)
                          for (where, readout, metric), figure in estimates.items() if where == place}
    return figures
