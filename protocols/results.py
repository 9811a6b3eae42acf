"""The results of evaluate.py and analyze.py, read back, and how runs are compared.

Copy with it: data_prep/__init__.py, protocols/bootstrap.py.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep import DOMAINS, FREE_ON_RESUME, InputError, hash_file, join_config, read_json, read_lines, weights_of
from protocols.bootstrap import Estimate, average, from_json, group_seeds, minus

# what stands for a protocol in summaries, by kind: readout (one that untouched backbones have too) and measure
HEADLINE = {"verification": ("", "auc"), "templates": ("", "tar@far=0.0001"), "reid": ("", "rank-1"),
            "identification": ("", "rank-1"), **dict.fromkeys(("classification", "choice"), ("nearest-mean", "top-1"))}
D_PRIMES = ("d-prime", "pair d-prime")  # measures that are not fractions


@dataclass
class Row:
    """One figure. Values are fractions 0..1 but for d-prime; low and high: 95 % bootstrap over identities.

    `protocol` is a sentence for people; programs read the fields that it is written from.
    """

    run: str
    weights: str  # "tuned" or "foundation"
    domain: str
    split: str
    protocol: str = ""
    metric: str = ""  # its name, written from kind, readout and measure
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    count: int = 0  # pairs, probes or images
    identities: int = 0  # or classes, that the interval resamples; 0: unknown
    chance: float = 0  # of random embeddings; 0: unknown
    kind: str = ""  # the split's protocol, or yardstick, retention, gap, clean, unified, human trials, human choices
    # of objects: nearest-mean, knn, head, probe, zero-shot N; of people: observer, people, model, rater, lead, beaten
    readout: str = ""
    measure: str = ""  # top-1, rank-1, auc, ...; for retention and gap, what they compare
    rule: str = ""  # how the measure is computed, and its draws
    images: str = ""  # fingerprints of the sets
    flip: bool = True  # embeddings of the image and its mirror image
    lacks: str = ""  # images that could not be read, or were left out
    ood: bool = False  # a split out of distribution
    unseen: bool = False  # scored only among classes that the run was not trained on

    @property
    def headline(self) -> bool:
        """Whether this is the figure that stands for its protocol."""
        return not self.unseen and HEADLINE.get(self.kind) == (self.readout, self.measure)

    @property
    def unit(self) -> int:
        """Factor of a value in reports: 100 for percent, 1 for d-prime."""
        return 1 if self.measure in D_PRIMES else 100

    @property
    def key(self) -> tuple[str, str, str, tuple]:
        """Domain, split, metric and how it was computed: figures with equal keys are comparable."""
        how = self.kind, self.rule, self.images, self.flip, self.lacks, self.ood
        return self.domain, self.split, self.metric, how

    def describe(self) -> str:
        """The sentence in `protocol`, for a figure by the split's protocol."""
        parts = self.kind, self.rule, self.images, "flip" if self.flip else "no flip", self.lacks
        return ", ".join(filter(None, (*parts, "out of distribution" * self.ood)))


def read_rows(folder: Path) -> list[Row]:
    """The rows of RUN/eval/results.json; InputError if missing or damaged."""
    path = folder / "results.json"
    try:
        rows = from_json(json.loads(path.read_text()), list[Row], "row")
        if any(not row.kind for row in rows):
            raise InputError(f"{path}: rows without `kind`, of an earlier version: evaluate again with "
                             f"`evaluate.py --run {folder.parent}`")
        return rows
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run `python evaluate.py --run {folder.parent}` first") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run evaluate.py again") from error


@dataclass
class Pair:
    """How much of one task's score another's components keep; a dictionary is a figure {"value", "low", "high"}."""

    fit: str  # the task whose components these are
    test: str  # the task that is scored with them
    identities: int  # tested
    chance: float
    raw: float  # the score without centring
    full: float  # of all components
    full_low: float
    full_high: float
    k: int  # components of the claim; what they keep of (score - chance), with its interval:
    kept: float | None
    low: float | None
    high: float | None
    random: dict  # what random subspaces keep
    over_random: dict  # the lead over them, paired
    k99: dict  # the number of components from which on 99 % are kept, with "above" where it is beyond the limit
    k95: dict
    k99_grid: float | None  # the same at the k of the controls
    k95_grid: float | None
    k99_random: float | None  # of random subspaces
    k95_random: float | None
    foundation: dict | None = None  # what components of the untouched backbone keep
    over_foundation: dict | None = None

    @property
    def above_chance(self) -> bool:
        """Whether the full space is above chance by its interval: else a share of (score - chance) means nothing."""
        return None not in (self.kept, self.low, self.high) and self.full_low > self.chance

    @property
    def share(self) -> dict[str, float | None]:
        """What is kept at k."""
        return {"value": self.kept, "low": self.low, "high": self.high}


@dataclass
class Serving:
    """From how many components of a task on every task keeps 99 and 95 %."""

    fit: str
    k99: dict
    k95: dict


@dataclass
class Transfer:
    """How well components of each task serve every task."""

    pairs: list[Pair]
    all_tasks: list[Serving]
    images_per_task: int  # that components are fitted on
    rank_limited: bool  # fewer than 5 a dimension
    dim: int
    limit: int  # components that these images determine; every curve stops there


@dataclass
class Space:
    """How well linear classifiers tell the tasks apart in one space; figures of balanced accuracy."""

    logistic: dict
    lda: dict
    svm: dict
    pairwise: dict[str, dict]  # logistic regression on two tasks, by "a/b"
    converged: dict[str, bool]  # by classifier
    lead_of_tuned: dict | None = None  # how far the tuned space is above this one (logistic, paired)


@dataclass
class UnseenSource:
    """The same where the test images of one domain come from a source that was not fitted on."""

    domain: str
    source: str
    images: int
    identities: int
    spaces: dict[str, dict]  # a figure over all tasks, with the "recall" of this domain and whether the fit "converged"


@dataclass
class Sources:
    """How well the sources within a domain are told apart."""

    why: str | None = None  # it was not measured
    images: dict[str, int] = field(default_factory=dict)  # by source
    identities: dict[str, int] = field(default_factory=dict)
    chance: float | None = None
    spaces: dict[str, dict[str, dict]] = field(default_factory=dict)  # by space and classifier


@dataclass
class Separability:
    """How well the tasks are told apart in every space: tuned, foundation, pixels, and these with " canon"."""

    images_per_task: int
    chance: float
    spaces: dict[str, Space]
    identities: dict[str, int]  # by domain, on the test images
    unseen_sources: list[UnseenSource]
    sources: dict[str, Sources] = field(default_factory=dict)  # by domain


@dataclass
class Scored:
    """The results of evaluate.py for one run and one set of weights."""

    folder: Path
    config: dict
    seed: int  # of the resamplings
    rows: dict[tuple[str, str, str, tuple], tuple[Row, np.ndarray]]  # and their draws, by Row.key

    @property
    def name(self) -> str:
        """The run's; bytes of the folder's name that are not text are escaped."""
        return self.folder.resolve().name.encode("utf-8", "backslashreplace").decode()

    @property
    def resampled(self) -> tuple[int, int]:
        """Seed and number of the resamplings."""
        return self.seed, len(next(iter(self.rows.values()))[1])

    @property
    def recipe(self) -> str:
        """Equal for runs that differ only in their seed; a backbone without a run equals only itself."""
        free = FREE_ON_RESUME | {"seed", "argv", "git_commit", "versions", "weights", "weights_sha256"}
        weights = next(iter(self.rows.values()))[0].weights
        if not self.config:
            return str(self.folder.resolve())
        options = {key: value for key, value in self.config.items() if key not in free}
        return weights + json.dumps(options | {"weights": weights_of(self.config)})


def read_tables(folder: Path) -> dict[str, Scored]:
    """The rows of a run and their resampled values, by weights, "foundation" before "tuned"."""
    rows, path = read_rows(folder / "eval"), folder / "eval" / "draws.npz"
    if not rows:
        raise InputError(f"{folder}/eval/results.json is empty; run evaluate.py again")
    try:
        with np.load(path, allow_pickle=False) as file:
            draws, seed = file["draws"].astype(np.float32), int(file["seed"])
            of = str(file["weights"]) if "weights" in file else ""
        if draws.ndim != 2 or len(draws) != len(rows) or draws.shape[1] < 2:
            raise ValueError(f"{list(draws.shape)} values for the {len(rows)} rows of results.json")
    except Exception as error:  # a damaged archive raises many types
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); run evaluate.py on {folder} "
                         "again") from error
    if of and (now := hash_file(folder / "model.safetensors")) and of != now:
        raise InputError(f"{folder}/eval is of other weights than model.safetensors: run evaluate.py on {folder} again")
    path = folder / "config.json"
    config = join_config(path) if path.exists() else {}
    domains, counts = config.get("domains", []), config.get("counts", {})
    if not isinstance(domains, list) or not set(map(str, domains)) <= {*DOMAINS} or not isinstance(counts, dict) \
            or not all(isinstance(count, int | float) for count in counts.values()):
        raise InputError(f"{path}: domains and counts do not name tasks and their images: restore it")
    tables = {weights: Scored(folder, config, seed, {}) for weights in sorted({row.weights for row in rows})}
    for row, drawn in zip(rows, draws, strict=True):
        tables[row.weights].rows[row.key] = row, drawn.astype(float)
    return tables


def read_scored(folder: Path, weights: str | None) -> Scored:
    """The rows of a run's "tuned" or "foundation" weights (None: tuned, if there are such rows)."""
    tables = read_tables(folder)
    weights = weights or max(tables)
    if weights not in tables:
        raise InputError(f"{folder}: no figures of the {weights} weights; run evaluate.py on it without "
                         "--no-foundation")
    return tables[weights]


def aggregate(group: list[Scored], key: tuple) -> Estimate:
    """The mean of a figure over runs that differ in their seed, and of its resampled values, person by person."""
    rows, draws = zip(*(scored.rows[key] for scored in group), strict=True)
    return Estimate(float(np.mean([row.value for row in rows])), np.mean(draws, axis=0), rows[0].count,
                    identities=rows[0].identities, readout=rows[0].readout, measure=rows[0].measure)


def start_of(config: dict) -> tuple:
    """What two runs must share to be compared: the untouched backbone and its input."""
    return *(config.get(key) for key in ("backbone", "size", "model", "image_size", "embed_dim")), weights_of(config)


@dataclass
class Stages:
    """Scores after each stage of a sequential run: what later tasks did to earlier ones."""

    names: list[str]  # "start", then the domain of each stage that was evaluated
    steps: list[int]  # of that evaluation
    ends: list[int]  # last step of the stage
    tasks: list[str]  # splits that were evaluated
    scores: list[list[float]]  # [stages, tasks]; NaN where an evaluation lacks the task

    @property
    def lost(self) -> list[float]:
        """The drop from each task's best stage to the last; NaN where the last evaluation lacks it."""
        return [max((row[i] for row in self.scores if not math.isnan(row[i])), default=math.nan) - last
                for i, last in enumerate(self.scores[-1])]


def read_stages(folder: Path, config: dict) -> Stages | None:
    """The last quick evaluation in each stage of a run; None without any.

    Stage k of K holds the steps s with floor(s K / steps) = k, as train.py plans them.
    """
    records = [record for record in read_lines(folder / "probe.jsonl")
               if isinstance(record.get("step"), int) and isinstance(record.get("auc"), dict)]  # others are damaged
    if not records:
        return None
    order, steps = config["order"] or config["domains"], config["steps"]
    ends = [0] + [-(-(k + 1) * steps // len(order)) for k in range(len(order))]
    stages = Stages([], [], [], list(records[-1]["auc"]), [])
    for name, first, end in zip(["start", *order], [-1, *ends[:-1]], ends, strict=True):
        inside = [record for record in records if first < record["step"] <= end]
        if inside:
            stages.names.append(name)
            stages.steps.append(inside[-1]["step"])
            stages.ends.append(end)
            scores = [inside[-1]["auc"].get(task) for task in stages.tasks]
            stages.scores.append([score if isinstance(score, float) else math.nan for score in scores])
    return stages


RUN_ROLES = ("unified", "expert", "sequential")  # of a run, for `analyze.py claims`


@dataclass
class Analysed:
    """What the claims need of RUN/analysis/analysis.json."""

    domains: list[str]
    transfer: Transfer  # of the tuned weights
    separability: Separability | None  # None: of one task


@dataclass
class Measured:
    """A run with its results."""

    name: str
    config: dict
    scored: dict[str, Scored]  # by weights: "tuned", "foundation"
    analysis: Analysed | None
    lost: dict[str, float] = field(default_factory=dict)  # AUC from the best stage to the end, by "domain/split"

    @property
    def family(self) -> str:
        """The backbone; random initial weights make it no foundation model."""
        name = self.config["backbone"] or self.config["model"]
        return name if self.config["weights"] != "none" else f"{name} from a random start"


def read_analysis(path: Path) -> Analysed:
    """RUN/analysis/analysis.json; InputError if it lacks what the claims need."""
    known, run = read_json(path), path.parent.parent
    if (of := known.get("weights_sha256")) and (now := hash_file(run / "model.safetensors")) and of != now:
        raise InputError(f"of other weights than model.safetensors: run analyze.py on {run} again")
    try:
        analysis = from_json({"domains": known["domains"], "transfer": known["transfer"]["tuned"],
                              "separability": known["separability"]}, Analysed)
        domains, apart = {*analysis.domains}, analysis.separability
        if not domains.union(*((pair.fit, pair.test) for pair in analysis.transfer.pairs)) <= {*DOMAINS}:
            raise ValueError("a task is unknown")
        if apart and not ("tuned" in apart.spaces and domains <= {*apart.identities}):
            raise ValueError("separability: a domain, or the tuned space, is missing")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"of another version or damaged: {error}; run analyze.py on {run} again") from None
    return analysis


def read_lost(home: Path, config: dict) -> dict[str, float]:
    """AUC that a sequential run lost from its best stage to its last step, by "domain/split"."""
    try:
        stages = read_stages(home, config)
        if stages is None or stages.steps[-1] != config["steps"]:
            return {}
        return {task: lost for task, lost in zip(stages.tasks, stages.lost, strict=True) if math.isfinite(lost)}
    except (InputError, KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        print(f"left out: {home / 'probe.jsonl'} (damaged: {error})")
        return {}


def read_run(home: Path) -> Measured:
    """A run that evaluate.py has scored; InputError if it is incomplete."""
    if not (home / "done.json").exists():
        raise InputError("not finished")
    scored = read_tables(home)
    config = next(iter(scored.values())).config
    if lacking := {"role", "backbone", "model", "weights", "domains", "schedule", "counts", "seed"} - set(config):
        raise InputError(f"config.json lacks {min(lacking)!r}")
    valid = {"role": config["role"] in RUN_ROLES, "backbone": isinstance(config["backbone"] or config["model"], str),
             "counts": set(config["domains"]) <= {*config["counts"]}, "seed": isinstance(config["seed"], int)}
    if wrong := [name for name, good in valid.items() if not good]:
        raise InputError(f"config.json: {wrong[0]} is {repr(config[wrong[0]])[:80]}: restore it")
    analysis, path = None, home / "analysis" / "analysis.json"
    if path.exists():
        try:
            analysis = read_analysis(path)
        except InputError as error:
            print(f"left out: {path} ({error.format_message()})")
    lost = read_lost(home, config) if config["role"] == "sequential" else {}
    return Measured(home.name, config, scored, analysis, lost)


def read_runs(folder: Path) -> list[Measured]:
    """Every evaluated run below a folder; one that cannot be used is named and left out."""
    runs = []
    for path in sorted(folder.glob("*/eval/results.json")):
        home = path.parent.parent
        if not (home / "config.json").exists():
            continue
        try:
            runs.append(read_run(home))
        except InputError as error:
            print(f"left out: {home} ({error.format_message()})")
    if not runs:
        raise InputError(f"{folder}: no evaluated run in it; train runs below it and call evaluate.py on each")
    if len({table.resampled for run in runs for table in run.scored.values()}) > 1:
        print("the runs were resampled differently, so that some cannot be paired: call evaluate.py on all of them "
              "with the same --seed and --bootstrap")
    return runs


@dataclass
class Group:
    """Runs that differ only in their seed."""

    runs: list[Measured]

    @property
    def name(self) -> str:
        many = len(self.runs)
        return self.runs[0].name + (f" and {many - 1} more seed{'s' * (many > 2)}" if many > 1 else "")

    @property
    def config(self) -> dict:
        return self.runs[0].config

    @property
    def family(self) -> str:
        return self.runs[0].family

    @property
    def start(self) -> tuple:
        return start_of(self.config)

    @property
    def seeds(self) -> int:
        return len({run.config.get("seed") for run in self.runs})

    @property
    def last(self) -> str:
        """The domain that a sequential run learned last."""
        return (self.config.get("order") or self.config["domains"])[-1]

    @property
    def lost(self) -> dict[str, float]:
        """The mean over seeds of what was lost from the best stage to the end."""
        return {task: float(np.mean([run.lost[task] for run in self.runs])) for task in self.runs[0].lost
                if all(task in run.lost for run in self.runs)}

    def rows(self, weights: str, wanted: Callable[[Row], bool]) -> dict[tuple, Estimate]:
        """Figures that all seeds have, as means over the seeds, by Row.key."""
        tables = [run.scored[weights] for run in self.runs if weights in run.scored]
        if len(tables) < len(self.runs) or len({table.resampled for table in tables}) > 1:
            return {}
        return {key: aggregate(tables, key) for key, (row, _) in tables[0].rows.items()
                if wanted(row) and all(key in table.rows for table in tables)}

    def headline(self, weights: str) -> dict[tuple, Estimate]:
        """The headline of each trained domain's test split, in distribution."""
        rows = self.rows(weights, lambda row: row.headline and not row.ood and row.domain in self.config["domains"])
        first: dict = {}  # the customary rule of a split comes first
        return {key: figure for key, figure in rows.items() if first.setdefault(key[:2], key) == key}

    def leads(self, other: "Group", mine: str = "tuned", theirs: str = "tuned") -> dict[tuple, Estimate]:
        """By domain and split, how far this group is above another, paired by person; none if resampled differently."""
        a, b = self.headline(mine), other.headline(theirs)
        alike = {group.runs[0].scored[weights].resampled for group, weights in ((self, mine), (other, theirs))
                 if weights in group.runs[0].scored}
        return {key[:2]: minus(a[key], b[key]) for key in a if key in b and len(alike) == 1}

    def analysed(self, of: Callable[[Analysed], dict | None]) -> dict | None:
        """A figure {"value", "low", "high"} of the analyses, averaged over the seeds; None where one lacks it."""
        return average([of(run.analysis) if run.analysis else None for run in self.runs])

    def unfinished(self, space: str) -> str:
        """A remark where the logistic regression of a space did not converge."""
        spaces = [run.analysis.separability.spaces[space] for run in self.runs]
        return "" if all(result.converged.get("logistic") for result in spaces) else "the fit did not converge"

    def not_analysed(self) -> str:
        """A verdict that names the run that lacks an analysis of two or more tasks; others may have one."""
        bare = [run.name for run in self.runs if run.analysis is None]
        return (f"not measured ({', '.join(bare)}: not analysed; call analyze.py --run RUN on it)" if bare else
                f"not measured ({self.name}: analysed on one task only)")


def group_runs(runs: list[Measured]) -> list[Group]:
    """Runs of one recipe and different seeds together, in the order of the first."""
    recipes = [(next(iter(run.scored.values())).recipe, run.config.get("seed")) for run in runs]
    return [Group([runs[i] for i in members]) for members in group_seeds(recipes)]
