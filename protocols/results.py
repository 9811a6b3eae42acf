"""What evaluate.py found for a run, read back: rows and their resampled values, and what runs are compared by.

Copy with it: protocols/bootstrap.py, data_prep/__init__.py.
"""

import json
import math
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np

from data_prep import (
    DOMAINS,
    FREE_ON_RESUME,
    InputError,
    hash_file,
    join_config,
    read_lines,
    weights_of,
)
from protocols.bootstrap import FEW, Figure

# the figure that stands for a protocol in summaries; a readout that tuned and untouched backbones both have
HEADLINE = {"verification": "auc", "templates": "tar@far=0.0001", "reid": "rank-1", "identification": "rank-1",
            "classification": "nearest-mean top-1"}


@dataclass
class Row:
    """One figure. Values are fractions 0..1 but for d-prime; low and high: 95 % bootstrap over identities."""

    run: str
    weights: str  # "tuned" or "foundation"
    domain: str
    split: str
    protocol: str
    metric: str
    value: float
    low: float
    high: float
    count: int  # pairs, probes or images
    identities: int = 0  # or classes, that the interval resamples; 0: unknown

    @property
    def headline(self) -> bool:
        """Whether this is the figure that stands for its protocol."""
        return HEADLINE.get(self.protocol.split(",")[0]) == self.metric

    @property
    def out_of_distribution(self) -> bool:
        return self.protocol.endswith(", out of distribution")


def read_rows(folder: Path) -> list[Row]:
    """The rows of RUN/eval/results.json; InputError where there are none."""
    path, kinds = folder / "results.json", {str: str, float: (int, float), int: int}
    try:
        rows = [Row(**row) for row in json.loads(path.read_text())]
        for (number, row), one in product(enumerate(rows), fields(Row)):
            value = getattr(row, one.name)
            finite = not isinstance(value, float) or math.isfinite(value)
            if not isinstance(value, kinds[one.type]) or isinstance(value, bool) or not finite:
                raise ValueError(f"row {number}: {one.name} is {str(value)[:80]!r}")
        return rows
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run `python evaluate.py --run {folder.parent}` first") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run evaluate.py again") from error


def mark(identities: int) -> str:
    """A sign behind an interval of so few identities or classes that it is too narrow."""
    return "†" if 0 < identities < FEW else ""


FEW_NOTE = f"†: of fewer than {FEW} identities or classes, whose bootstrap interval is too narrow"


@dataclass
class Scored:
    """What evaluate.py found for one run, with one set of weights."""

    folder: Path
    config: dict
    seed: int  # of the resamplings
    found: dict[tuple[str, str, str, str], tuple[Row, np.ndarray]]  # by domain, split, metric, protocol

    @property
    def name(self) -> str:
        """Of the run; a folder's name need not be text, and a figure has no sign for what is none."""
        return self.folder.resolve().name.encode("utf-8", "backslashreplace").decode()

    @property
    def recipe(self) -> str:
        """What two runs share that differ in their seed alone; a backbone without a run is only itself."""
        free = FREE_ON_RESUME | {"seed", "argv", "git_commit", "versions", "weights", "weights_sha256"}
        weights = next(iter(self.found.values()))[0].weights
        if not self.config:
            return str(self.folder.resolve())
        options = {key: value for key, value in self.config.items() if key not in free}
        return weights + json.dumps(options | {"weights": weights_of(self.config)})


def read_scored(folder: Path, weights: str | None) -> Scored:
    """The rows of a run and their resampled values; InputError where there are none.

    Args:
        folder: of the run.
        weights: "tuned" or "foundation"; None: tuned where there are such rows.
    """
    rows, path = read_rows(folder / "eval"), folder / "eval" / "draws.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            draws, seed = file["draws"].astype(np.float32), int(file["seed"])
            of = str(file["weights"]) if "weights" in file else ""
        if draws.ndim != 2 or len(draws) != len(rows) or draws.shape[1] < 2:
            raise ValueError(f"{list(draws.shape)} values for the {len(rows)} rows of results.json")
    except Exception as error:  # a damaged archive raises many kinds
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); run evaluate.py on {folder} "
                         "again") from error
    if of and (now := hash_file(folder / "model.safetensors")) and of != now:
        raise InputError(f"{folder}/eval is of other weights than model.safetensors: run evaluate.py on {folder} again")
    weights = weights or max((row.weights for row in rows), default="tuned")  # "tuned" comes after "foundation"
    found = {(row.domain, row.split, row.metric, row.protocol): (row, drawn.astype(float))
             for row, drawn in zip(rows, draws, strict=True) if row.weights == weights}
    if not found:
        raise InputError(f"{folder}: no figures of the {weights} weights; run evaluate.py on it without "
                         "--no-foundation")
    path = folder / "config.json"
    config = join_config(path) if path.exists() else {}
    domains, counts = config.get("domains", []), config.get("counts", {})
    if not isinstance(domains, list) or not set(map(str, domains)) <= {*DOMAINS} or not isinstance(counts, dict) \
            or not all(isinstance(count, int | float) for count in counts.values()):
        raise InputError(f"{path}: domains and counts do not name tasks and their images: restore it")
    return Scored(folder, config, seed, found)


def aggregate(group: list[Scored], key: tuple) -> Figure:
    """The mean of a figure over runs that differ in their seed, and of its resampled values, person by person."""
    rows, draws = zip(*(scored.found[key] for scored in group), strict=True)
    return Figure(float(np.mean([row.value for row in rows])), np.mean(draws, axis=0), rows[0].count,
                  identities=rows[0].identities)


def start_of(config: dict) -> tuple:
    """What two runs must share to be compared: the untouched backbone and its input."""
    return *(config.get(key) for key in ("backbone", "size", "model", "image_size", "embed_dim")), weights_of(config)


def as_many(seen: int, wanted: int) -> bool:
    """Whether an expert saw as many images as it should, within a quarter."""
    return 0.75 <= seen / max(wanted, 1) <= 1.25


def margin(expert: float, delta: float) -> float:
    """How much worse still counts as no worse: delta; where the expert is above 0.9, at most a tenth of its error.

    Such metrics are saturated: a point of 99.8 % would be five times what the expert gets wrong.
    """
    return delta if expert <= 0.9 else min(delta, 0.1 * (1 - expert))


@dataclass
class Stages:
    """Scores after each stage of a sequential run: what later tasks did to earlier ones."""

    names: list[str]  # "start", then the domain of each stage that was looked at
    steps: list[int]  # where it was looked at
    ends: list[int]  # where the stage ended
    tasks: list[str]  # splits that were looked at
    scores: list[list[float]]  # [stages, tasks]; NaN where a look lacks the task


def read_stages(folder: Path, config: dict) -> Stages | None:
    """The last look of --eval-every in each stage of a run; None where there are no looks.

    Stage k of K holds the steps s with floor(s K / steps) = k, as train.py plans them.
    """
    looks = [look for look in read_lines(folder / "probe.jsonl") if isinstance(look, dict)
             and isinstance(look.get("step"), int) and isinstance(look.get("auc"), dict)]  # others are damaged
    if not looks:
        return None
    order, steps = config["order"] or config["domains"], config["steps"]
    ends = [0] + [-(-(k + 1) * steps // len(order)) for k in range(len(order))]
    found = Stages([], [], [], list(looks[-1]["auc"]), [])
    for name, first, end in zip(["start", *order], [-1, *ends[:-1]], ends, strict=True):
        inside = [look for look in looks if first < look["step"] <= end]
        if inside:
            found.names.append(name)
            found.steps.append(inside[-1]["step"])
            found.ends.append(end)
            scores = [inside[-1]["auc"].get(task) for task in found.tasks]
            found.scores.append([score if isinstance(score, float) else math.nan for score in scores])
    return found


RUN_ROLES = ("unified", "expert", "sequential")  # of a run, for `analyze.py claims`
