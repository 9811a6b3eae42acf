"""The abstract's claims, measured on a folder of runs."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

import backbones
from analyze_report import interval, needed
from analyze_subspaces import above_chance, minus, show
from data_prep import DOMAINS, InputError
from evaluate_bootstrap import Figure
from evaluate_compare import Scored, aggregate, as_many, margin, read_scored, start_of
from evaluate_report import literal, read_stages
from evaluate_results import FEW_NOTE, HEADLINE, Row, mark, read_rows, write_csv
from run_folder import RUN_ROLES, hash_file, read_json, write_atomically

HOLDS, FAILS, WIDE = "holds", "fails", "not measured (intervals too wide to decide)"
ORDER = ("fails", "not measured", "holds, but", "holds")  # of verdicts, the weakest first
CROSS = {(a, b) for a in DOMAINS for b in DOMAINS if a != b}  # pairs of tasks: components of one, used by another


@dataclass
class Finding:
    """One measured number behind a claim, and what it says about it."""

    what: str
    value: float | None
    low: float | None
    high: float | None
    verdict: str
    form: str = "+.1f"  # in percent
    note: str = ""
    threshold: float | None = None  # None: it decides nothing
    identities: int = 0  # or classes, that the interval resamples; 0: unknown

    def __str__(self) -> str:
        figure = interval({"value": self.value, "low": self.low, "high": self.high}, self.form) + mark(self.identities)
        return f"{self.what} {figure}{f' ({self.note})' if self.note else ''}"


@dataclass
class Claim:
    """One line of the claims table."""

    claim: str
    backbones: str  # those that were measured
    measured: str
    decided_by: str  # the finding that did, the weakest; its figure, interval and the threshold it was held against:
    value: float | None
    low: float | None
    high: float | None
    threshold: float | None
    rule: str  # when the claim holds
    verdict: str  # "holds", "holds, but no better than ...", "fails" or "not measured (why)"
    seeds: int  # the fewest of any group behind the line
    findings: list[Finding]

    @property
    def told(self) -> str:
        """The verdict for readers."""
        return self.verdict + " (1 seed)" * (self.seeds == 1 and self.verdict.startswith((HOLDS, FAILS)))


@dataclass
class Measured:
    """A run with what evaluate.py and analyze.py found."""

    name: str
    config: dict
    found: dict[str, Scored]  # by weights: "tuned", "foundation"
    analysis: dict | None
    lost: dict[str, float] = field(default_factory=dict)  # AUC from the best stage to the end, by "domain/split"

    @property
    def family(self) -> str:
        """The backbone; one that began from random weights is nobody's foundation model."""
        name = self.config["backbone"] or self.config["model"]
        return name if self.config["weights"] != "none" else f"{name} from a random start"

    @property
    def start(self) -> tuple:
        return start_of(self.config)


@dataclass
class Group:
    """Runs that differ in their seed alone."""

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
        return self.runs[0].start

    @property
    def seeds(self) -> int:
        return len({run.config.get("seed") for run in self.runs})

    @property
    def last(self) -> str:
        """The domain that a sequential run learned last."""
        return (self.config.get("order") or self.config["domains"])[-1]

    @property
    def lost(self) -> dict[str, float]:
        """What every seed lost from its best stage to the end, averaged."""
        return {task: float(np.mean([run.lost[task] for run in self.runs])) for task in self.runs[0].lost
                if all(task in run.lost for run in self.runs)}

    def rows(self, weights: str, wanted: Callable[[Row], bool]) -> dict[tuple, Figure]:
        """Figures that all seeds have, averaged over them, by (domain, split, metric, protocol)."""
        tables = [run.found[weights] for run in self.runs if weights in run.found]
        if len(tables) < len(self.runs) or len({(t.seed, draws_of(t)) for t in tables}) > 1:
            return {}
        return {key: aggregate(tables, key) for key, (row, _) in tables[0].found.items()
                if wanted(row) and all(key in table.found for table in tables)}

    def headline(self, weights: str) -> dict[tuple, Figure]:
        """The figure that stands for each trained domain's test split, in distribution."""
        rows = self.rows(weights, lambda row: row.headline and not row.out_of_distribution
                         and row.domain in self.config["domains"])
        first: dict = {}  # the customary rule of a split comes first
        return {key: figure for key, figure in rows.items() if first.setdefault(key[:2], key) == key}

    def leads(self, other: "Group", mine: str = "tuned", theirs: str = "tuned") -> dict[tuple, Figure]:
        """By domain and split, how far this group is above another, paired by person; none if resampled differently."""
        a, b = self.headline(mine), other.headline(theirs)
        seeds = [group.runs[0].found[weights].seed for group, weights in ((self, mine), (other, theirs))
                 if weights in group.runs[0].found]
        return {key[:2]: minus(a[key], b[key]) for key in a
                if key in b and len(set(seeds)) == 1 and len(a[key].draws) == len(b[key].draws)}

    def analysed(self, of: Callable[[dict], dict | None]) -> dict | None:
        """A figure {"value", "low", "high"} of the analyses, averaged over the seeds; None where one lacks it."""
        found = [of(run.analysis) if run.analysis else None for run in self.runs]
        if any(f is None or None in f.values() for f in found):
            return None
        return {end: float(np.mean([f[end] for f in found])) for end in ("value", "low", "high")}

    def unfinished(self, space: str) -> str:
        """A remark where the logistic regression that tells the tasks apart in a space did not converge."""
        spaces = [run.analysis["separability"]["spaces"][space] for run in self.runs]
        return "" if all(found["converged"]["logistic"] for found in spaces) else "the fit did not converge"

    def not_analysed(self) -> str:
        """A verdict that names the run without an analysis of two tasks or more: others may have one."""
        bare = [run.name for run in self.runs if run.analysis is None]
        return (f"not measured ({', '.join(bare)}: not analysed; call analyze.py --run RUN on it)" if bare else
                f"not measured ({self.name}: analysed on one task alone)")


def draws_of(scored: Scored) -> int:
    """Number of resamplings."""
    return len(next(iter(scored.found.values()))[1])


def check_numbers(found: dict, *names: str, kind: type = int | float | None) -> None:
    """TypeError or KeyError unless each is of that kind."""
    for name in names:
        if isinstance(found[name], bool) or not isinstance(found[name], kind):
            raise TypeError(f"{name!r} is no number")


def read_analysis(path: Path) -> dict:
    """RUN/analysis/analysis.json; InputError where it lacks what the claims rest on."""
    known, ends, weights = read_json(path), ("value", "low", "high"), path.parent.parent / "model.safetensors"
    if (of := known.get("weights_sha256")) and (now := hash_file(weights)) and of != now:
        raise InputError(f"of other weights than {weights.name}: run analyze.py on {path.parent.parent} again")
    try:
        transferred, separated = known["transfer"]["tuned"], known["separability"]
        check_numbers(transferred, "dim", "images_per_task", "limit", kind=int)
        for pair in transferred["pairs"]:
            check_numbers(pair, "k", "identities", kind=int)
            check_numbers(pair, "kept", *ends[1:])
            check_numbers(pair, "chance", "full_low", kind=int | float)
            for figure in (pair["k95"], pair["k99"], pair["over_random"], pair.get("over_foundation")):
                check_numbers({"above": None} | (figure or dict.fromkeys(ends)), *ends, "above")
            if not {pair["fit"], pair["test"]} <= {*DOMAINS}:
                raise TypeError("a task is unknown")
        if separated is not None:
            tables = [space["logistic"] for space in separated["spaces"].values()]
            if not all(isinstance(space["converged"]["logistic"], bool) for space in separated["spaces"].values()):
                raise TypeError("'converged' is neither true nor false")
            tables += [space["lead_of_tuned"] for space in separated["spaces"].values() if "lead_of_tuned" in space]
            check_numbers(separated["identities"], *known["domains"], kind=int)
            for row in separated["unseen_sources"]:
                check_numbers(row, "identities", kind=int)
                tables.append(row["spaces"]["tuned"])
                "/".join((row["domain"], row["source"]))  # TypeError unless both are text
            for figure in tables:
                check_numbers(figure, *ends)
            if not {*known["domains"]} <= {*DOMAINS} or "tuned" not in separated["spaces"]:
                raise TypeError("a task is unknown, or the tuned space missing")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"of another version or damaged: {error}; run analyze.py on {path.parent.parent} again") \
            from None
    return known


def read_lost(home: Path, config: dict) -> dict[str, float]:
    """AUC that a sequential run lost from its best stage to its last step, by "domain/split"."""
    try:
        stages = read_stages(home, config)
        if stages is None or stages.steps[-1] != config["steps"]:
            return {}
        scores = np.array(stages.scores, dtype=float)
        return {task: float(np.nanmax(column) - column[-1])
                for task, column in zip(stages.tasks, scores.T, strict=True) if math.isfinite(column[-1])}
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        print(f"left out: {home / 'probe.jsonl'} (damaged: {error})")
        return {}


def read_run(home: Path) -> Measured:
    """A run that evaluate.py has scored; InputError where it is not whole."""
    if not (home / "done.json").exists():
        raise InputError("not finished")
    config = read_json(home / "config.json")
    lacking = {"role", "backbone", "model", "weights", "domains", "schedule", "counts"} - set(config)
    if lacking:
        raise InputError(f"config.json lacks {min(lacking)!r}")
    if config["role"] not in RUN_ROLES:
        raise InputError(f"config.json: role {config['role']!r} is none of {', '.join(RUN_ROLES)}")
    if not isinstance(config["backbone"] or config["model"], str):
        raise InputError("config.json names no backbone")
    domains, counts = config["domains"], config["counts"]
    if not (isinstance(domains, list) and domains and all(d in DOMAINS for d in domains) and isinstance(counts, dict)
            and all(isinstance(counts.get(d), int | float) for d in domains)):
        raise InputError("config.json: domains and counts do not name tasks and their images")
    order = config.get("order")
    if not (isinstance(config.get("seed"), int) and (order is None or (isinstance(order, list) and order))):
        raise InputError("config.json: seed is no whole number, or order no list of tasks")
    results = home / "eval" / "results.json"
    rows = read_rows(results.parent)
    if not rows:
        raise InputError(f"{results} is empty; run evaluate.py again")
    try:
        found = {name: read_scored(home, name) for name in sorted({row.weights for row in rows})}
        if any(drawn.ndim != 1 or len(drawn) < 2 for scored in found.values() for _, drawn in scored.found.values()):
            raise ValueError("not one list of resamplings a row")
    except InputError:
        raise
    except Exception as error:  # a damaged archive raises many kinds
        raise InputError(f"{home}/eval/draws.npz is damaged ({error}); run evaluate.py again") from None
    known, path = None, home / "analysis" / "analysis.json"
    if path.exists():
        try:
            known = read_analysis(path)
        except InputError as error:
            print(f"left out: {path} ({error.format_message()})")
    return Measured(home.name, config, found, known, read_lost(home, config) if config["role"] == "sequential" else {})


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
    if len({(table.seed, draws_of(table)) for run in runs for table in run.found.values()}) > 1:
        print("the runs were resampled differently, so that some cannot be paired: call evaluate.py on all of them "
              "with the same --seed and --bootstrap")
    return runs


def group_runs(runs: list[Measured]) -> list[Group]:
    """Runs of one recipe and different seeds together, in the order of the first."""
    groups: dict[str, list[Measured]] = {}
    for run in runs:
        groups.setdefault(next(iter(run.found.values())).recipe, []).append(run)
    return [Group(members) for members in groups.values()]


def decide(low: float | None, high: float | None, least: float) -> str:
    """Whether something is above `least`, by its 95 % interval."""
    if low is None or high is None or not math.isfinite(low + high):
        return "not measured (not above chance)"
    return HOLDS if low > least else FAILS if high <= least else WIDE


def judge(what: str, figure: Figure, least: float, form: str = "+.1f") -> Finding:
    """A finding that holds where the figure is above `least`."""
    return Finding(what, *show(figure).values(), decide(figure.low, figure.high, least), form, threshold=least,
                   identities=figure.identities)


def rank(verdict: str) -> int:
    """Place in ORDER."""
    return next(i for i, start in enumerate(ORDER) if verdict.startswith(start))


def join(verdicts: list[str]) -> str:
    """The weakest of several verdicts: one failure is enough, and what was not measured does not hold."""
    return min(verdicts, key=rank)


def for_information(findings: list[Finding]) -> list[Finding]:
    """The same, deciding nothing."""
    return [replace(f, verdict="", threshold=None, note=", ".join(filter(None, [f.note, "for information"])))
            for f in findings]


def only(tasks: Iterable[str]) -> list[str]:
    """A verdict where some of the four tasks are missing."""
    known = set(tasks)
    there = [domain for domain in DOMAINS if domain in known]
    return [f"not measured (only tasks {', '.join(there)})"] if len(there) < len(DOMAINS) else []


def make_claim(claim: str, rule: str, findings: list[Finding], further: list[str]) -> Claim:
    """A line from its findings. `further`: verdicts about several findings together, or about what is missing."""
    verdict = join([finding.verdict for finding in findings if finding.verdict] + further)
    deciding = [f for f in findings if f.threshold is not None and None not in (f.value, f.low, f.high)]
    if verdict != WIDE and not verdict.startswith((HOLDS, FAILS)):
        deciding = []
    weakest = min(deciding, key=lambda f: (rank(decide(f.low, f.high, f.threshold)), f.low - f.threshold), default=None)
    numbers = [getattr(weakest, name, None) for name in ("value", "low", "high", "threshold")]
    measured = "; ".join(map(str, findings)) or "-"
    return Claim(claim, "", measured, str(weakest or "-"), *numbers, rule, verdict, 0, findings)


def claim_backbones(imic: list[Group], families: list[str], delta: float) -> Claim:
    """In every family, people are recognised better than by the untouched backbone, and objects not worse."""
    findings = []
    absent = [family for family in families if all(group.family != family for group in imic)]
    missing = [f"not measured (no four-task run of {', '.join(absent)})"] if absent else []
    for group in imic:
        leads = group.leads(group, "tuned", "foundation")
        found = [judge(f"{group.name} {domain}/{split}", lead, -delta if domain == "object" else 0)
                 for (domain, split), lead in leads.items()]
        if not leads:
            missing.append(f"not measured (no foundation scores of {group.name}; run evaluate.py without "
                           "--no-foundation)")
        elif thin := only(domain for domain, _ in leads):
            found, missing = for_information(found), missing + thin
        findings += found
    return make_claim(f"Works on {', '.join(families)}",
                      f"lead over the untouched backbone above 0 (objects: above -{100 * delta:g} points), paired",
                      findings, missing)


def kinds_of_match(group: Group, expert: Group, domain: str) -> list[str]:
    """How an expert's images match a unified run's, within a quarter: "exposure" (of its domain), "images" (of all)."""
    seen, counts = expert.config["counts"][domain], group.config["counts"]
    return [kind for kind, count in (("exposure", counts[domain]), ("images", sum(counts.values())))
            if as_many(seen, count)]


def claim_experts(imic: list[Group], experts: list[Group], delta: float) -> Claim:
    """A unified run is not worse than the expert of any task by more than `margin`.

    The verdict rests on experts that saw their domain as often as the unified run did, where there are any; else on
    those that saw as many images in all. Either is listed.
    """
    findings, missing = [], []
    for group in imic:
        domains = group.config["domains"]
        if len(domains) < len(DOMAINS):
            missing.append(f"not measured ({group.name} learned {len(domains)} of {len(DOMAINS)} tasks)")
        for domain in domains:
            rivals = [(kind, e) for e in experts if e.start == group.start and e.config["domains"] == [domain]
                      for kind in kinds_of_match(group, e, domain)]
            deciding = "exposure" if any(kind == "exposure" for kind, _ in rivals) else "images"
            found = []
            for kind, expert in rivals:
                theirs = {key[:2]: figure.value for key, figure in expert.headline("tuned").items()}
                for key, lead in group.leads(expert).items():
                    found.append(judge(f"{group.name} against {expert.name} {'/'.join(key)}", lead,
                                       -margin(theirs[key], delta)))
                    found[-1].note = f"matched in {kind}"
                    if kind != deciding:
                        found[-1:] = for_information(found[-1:])
            findings += found
            if not any(f.verdict for f in found):
                missing.append(f"not measured (no expert run, --domains {domain}, of the backbone and number of images "
                               f"of {group.name}, evaluated alike)")
    missing = missing or ([] if imic else ["not measured (no IMIC run)"])
    return make_claim("On par with domain experts on all four tasks at once",
                      f"lead above -{100 * delta:g} points (beside an expert above 90 %: at most a tenth of its error) "
                      "on every task, paired", findings, missing)


def claim_humans(imic: list[Group]) -> Claim:
    """The model is above the human raters of the same trials, over all four tasks together."""
    findings, missing = [], []
    for group in imic:
        rows = group.rows("tuned", lambda row: "minus human" in row.metric or "raters beaten" in row.metric)
        each = group.rows("tuned", lambda row: row.metric.startswith("AUC of rater "))
        raters = len({metric for domain, _, metric, _ in each if domain == "all"})
        tasks = {domain for domain, *_ in rows} - {"all"}
        worse = {key[0] for key, figure in rows.items() if "minus human" in key[2] and figure.high < 0}
        below = [domain for domain in DOMAINS if domain in worse]
        thin = only(tasks) if rows else []
        if rows and raters < 2:
            thin.append(f"not measured ({raters or 'no'} rater{'s' * (raters != 1)} of all tasks; two are the least)")
        for (domain, split, metric, _), figure in rows.items():
            overall = domain == "all" and "minus human" in metric
            finding = judge(f"{group.name} {domain} {metric}", figure, 0, "+.1f" if "minus" in metric else ".1f")
            if overall:
                finding.note = f"{raters} raters" + f", below people on {', '.join(below)}" * bool(below)
                if finding.verdict == HOLDS and below:
                    finding.verdict = f"holds, but below people on {' and '.join(below)}"
            if not overall or thin:  # single tasks and shares are told, and decide nothing
                finding.verdict, finding.threshold = "", None
            if not overall:
                finding.what = f"{group.name} {domain}/{split} {metric}"
            findings.append(finding)
        missing += thin
    if not missing and not any(f.verdict for f in findings):
        missing = ["not measured (no human trials: evaluate.py --humans)"]
    return make_claim("More accurate than humans at multi-tasking", "model minus humans, all four tasks together, of "
                      "at least two raters, above 0", findings, missing)


def claim_generalisation(imic: list[Group], least: float) -> Claim:
    """Retention on out-of-distribution splits, where the untouched backbone is above chance."""
    metric = f"retention of {HEADLINE['classification']}"
    findings = [judge(f"{group.name} {domain}/{split}", figure, least, ".0f") for group in imic
                for (domain, split, _, _), figure in
                group.rows("tuned", lambda row: row.out_of_distribution and row.metric == metric).items()]
    missing = [] if findings else ["not measured (no out-of-distribution split on which the foundation beats chance)"]
    return make_claim("Generalisation outside the training distribution is not substantially harmed",
                      f"retention above {100 * least:g} %", findings, missing)


def find_fallen(other: Group, early: dict[tuple, Figure], experts: list[Group], delta: float) -> dict[tuple, str]:
    """The earlier tasks that a sequential run lost, and what shows it; by domain and split.

    Lost is what ends by delta below the untouched backbone, below the run's own best stage, or (`margin`)
    below the expert that saw the domain as often. Intervals by Bonferroni over the earlier tasks.
    """
    own, top, fallen = other.leads(other, "tuned", "foundation"), 1 - 0.025 / max(len(early), 1), {}
    for key in early:
        signs = []
        if key in own and own[key].quantile(top) <= -delta:
            signs.append("the untouched backbone")
        if other.lost.get("/".join(key), 0) >= delta:
            signs.append("its best stage")
        for expert in experts:
            if (expert.start == other.start and expert.config["domains"] == [key[0]]
                    and "exposure" in kinds_of_match(other, expert, key[0])):
                lead = other.leads(expert).get(key)
                theirs = next((f.value for k, f in expert.headline("tuned").items() if k[:2] == key), 0)
                if lead and lead.quantile(top) <= -margin(theirs, delta):
                    signs.append(expert.name)
        if signs:
            fallen[key] = ", ".join(signs)
    return fallen


def claim_forgetting(imic: list[Group], sequential: list[Group], experts: list[Group], delta: float) -> Claim:
    """Sequential training lost a task that it learned before the last, and ends below IMIC there; IMIC falls on none.

    Where it lost nothing, nothing can be said about what the interleaved run prevents.
    """
    findings, further = [], []
    for group in imic:
        held = [judge(f"{group.name} over the untouched backbone {domain}/{split}", lead, -delta)
                for (domain, split), lead in group.leads(group, "tuned", "foundation").items()]
        others = [s for s in sequential if s.start == group.start and s.config["domains"] == group.config["domains"]]
        verdicts, compared, watched = [], False, False
        for other in others:
            early = {key: lead for key, lead in group.leads(other).items() if key[0] != other.last}
            own, fallen = other.leads(other, "tuned", "foundation"), find_fallen(other, early, experts, delta)
            compared, watched = compared or bool(early), watched or bool(own or other.lost)
            lower = {key: early[key].quantile(0.025 / len(early)) for key in fallen}
            best = max(lower, key=lower.get, default=None)  # one task that is forgotten is enough
            for key, lead in early.items():
                notes = [f"sequential over the untouched {interval(show(own[key]), '+.1f')}"] if key in own else []
                notes += [f"sequential below {fallen[key]}"] if key in fallen else []
                findings.append(Finding(f"{group.name} over {other.name} {'/'.join(key)}", *show(lead).values(), "",
                                        note="; ".join(notes), threshold=0 if key == best else None,
                                        identities=lead.identities))
            if fallen:
                verdicts.append(HOLDS if lower[best] > 0 else
                                FAILS if all(early[key].high <= delta for key in fallen) else WIDE)
        if not others:
            verdicts = [f"not measured (no run of --schedule sequential of the backbone and tasks of {group.name})"]
        elif not held:
            verdicts = [f"not measured (no foundation scores of {group.name})"]
        elif not compared:
            verdicts = ["not measured (no figure in common with the sequential run)"]
        elif thin := only(domain for domain, _ in group.leads(group, "tuned", "foundation")):
            verdicts = thin
        elif not verdicts:
            verdicts = ["not measured (the sequential run forgot nothing here)" if watched else
                        "not measured (the sequential run has neither foundation scores nor looks of --eval-every)"]
        else:
            findings, held = findings + held, []
        findings += for_information(held)
        further += verdicts
    return make_claim("Sequential fine-tuning forgets where the interleaved one does not",
                      f"an earlier task of the sequential run fell by {100 * delta:g} points (below the untouched "
                      "backbone, its own best stage or the expert matched in exposure) and is lower than IMIC's, "
                      "paired, Bonferroni; IMIC nowhere below the untouched backbone by as much", findings,
                      further or ["not measured (no IMIC run)"])


def claim_separable(imic: list[Group], least: float) -> Claim:
    """Logistic regression tells the tasks apart, better than format, sources and the untouched backbone explain."""
    findings, missing = [], []
    for group in imic:

        def accuracy(space: str, group=group) -> dict | None:
            return group.analysed(lambda a: a["separability"] and a["separability"]["spaces"].get(space, {})
                                  .get("logistic"))

        value = accuracy("tuned")
        if value is None:
            missing.append(group.not_analysed())
            continue
        few = min(count for run in group.runs for count in run.analysis["separability"]["identities"].values())
        finding = Finding(f"{group.name} balanced accuracy", *value.values(),
                          decide(value["low"], value["high"], least), ".1f", threshold=least, identities=few)
        findings.append(finding)
        unbeaten, unknown = [], False
        finding.note = group.unfinished("tuned")
        controls = {"pixels": "pixel statistics", "foundation": "the untouched backbone",
                    "pixels canon": "pixel statistics in one format",
                    "foundation canon": "the untouched backbone in one format"}
        for key, name in controls.items():
            lead = group.analysed(lambda a, key=key: a["separability"]["spaces"].get(key, {}).get("lead_of_tuned"))
            if lead is None:
                unknown = True
                continue
            findings.append(Finding(f"lead over {name}", *lead.values(), "", identities=few,
                                    note=group.unfinished(key)))
            if not lead["low"] > 0:
                unbeaten.append(name)
        limits = [f"no better than {' or '.join(unbeaten)}"] if unbeaten else []
        plain = accuracy("tuned canon")
        unknown |= plain is None
        if plain is not None:
            findings.append(Finding("in one format", *plain.values(), "", ".1f", identities=few))
            limits += ["not in one format"] if not plain["low"] > least else []
        unseen = []
        for row in group.runs[0].analysis["separability"]["unseen_sources"]:
            place = (row["domain"], row["source"])
            recall = group.analysed(lambda a, place=place: next(
                (r["spaces"]["tuned"] for r in a["separability"]["unseen_sources"]
                 if (r["domain"], r["source"]) == place), None))
            if recall is not None:
                unseen.append(Finding(f"unseen source {'/'.join(place)}", *recall.values(), "", ".1f",
                                      identities=min(few, row["identities"])))
        findings += unseen
        limits += ["not on unseen sources"] if any(not recall.low > least for recall in unseen) else []
        if finding.verdict == HOLDS:
            if limits:
                finding.verdict = f"holds, but {' and '.join(limits)}"
            elif unknown:
                finding.verdict = "not measured (no matched-format control; call analyze.py --run RUN --canon 32)"
        if thin := only(set.intersection(*(set(run.analysis["domains"]) for run in group.runs))):
            finding.verdict, finding.threshold, missing = "", None, missing + thin
    return make_claim("The tasks are linearly separable (beyond format)",
                      f"balanced accuracy of the four tasks above {100 * least:g} %, in one format and on unseen "
                      "sources too, leads over every control above 0, paired", findings,
                      missing or ([] if imic else ["not measured (no IMIC run)"]))


def claim_components(imic: list[Group], least: float) -> Claim:
    """Fewer than 100 components of any task keep every other task's score, and more than other subspaces do."""
    findings, further = [], []
    for group in imic:
        found = [run.analysis["transfer"]["tuned"] for run in group.runs if run.analysis]
        across = [(p["fit"], p["test"]) for p in found[0]["pairs"] if p["fit"] != p["test"]] if found else []
        if not across or len(found) < len(group.runs):
            further.append(group.not_analysed())
            continue
        ks, dim, images = {p["k"] for t in found for p in t["pairs"]}, found[0]["dim"], min(
            t["images_per_task"] for t in found)
        if len(ks) > 1:
            further.append(f"not measured (seeds of {group.name} analysed at k = {' and '.join(map(str, sorted(ks)))}; "
                           "call analyze.py on each with the same --components)")
            continue
        k, verdicts, unbeaten, shown = ks.pop(), [], {}, []
        for fit, test in across:

            def of(name: str | None, fit=fit, test=test) -> Callable[[dict], dict | None]:
                def get(analysis: dict) -> dict | None:
                    pair = next((p for p in analysis["transfer"]["tuned"]["pairs"]
                                 if (p["fit"], p["test"]) == (fit, test)), None)
                    if pair is None or not above_chance(pair):
                        return None
                    return pair.get(name) if name else {"value": pair["kept"], "low": pair["low"], "high": pair["high"]}
                return get

            value = group.analysed(of(None))
            if value is None:
                verdicts.append(f"not measured (the full space is not above chance: {fit} for {test})")
                continue
            verdicts.append(decide(value["low"], value["high"], least))
            counts = [f"{name} {needed([of(name)(run.analysis) for run in group.runs])}" for name in ("k95", "k99")]
            shown.append(Finding(f"{group.name}: {fit} for {test}, k = {k} of {dim}", *value.values(), "", ".1f",
                                 ", ".join(counts) + f"; few images for {dim} dimensions" * (images < 5 * dim),
                                 identities=min(p["identities"] for t in found for p in t["pairs"]
                                                if (p["fit"], p["test"]) == (fit, test))))
            for key, name in (("over_random", "random"), ("over_foundation", "foundation")):
                lead = group.analysed(of(key))
                if lead is None:
                    unbeaten.setdefault("unknown" if key == "over_foundation" else name, None)
                elif not lead["low"] > 0:
                    unbeaten.setdefault(name, None)
        verdict = join(verdicts)
        unmeasured = [v for v in verdicts if v != WIDE and v.startswith("not measured")]
        if dim <= 100:
            verdict = f"not measured (a space of {dim} dimensions: 100 components are all of it)"
        elif k >= 100:
            verdict = "not measured (analysed at 100 components or more; call analyze.py --components 99)"
        elif thin := only({task for pair in across for task in pair}):
            verdict = thin[0]
        elif set(across) != CROSS:
            verdict = f"not measured (only {len(set(across))} of {len(CROSS)} pairs of tasks)"
        elif images <= k + 1:
            verdict = f"not measured (rank-limited: {images} images of each task for {dim} dimensions)"
        elif unmeasured:
            verdict = unmeasured[0]
        elif verdict == FAILS and k < 99:
            verdict = f"not measured (k = {k} is too few, which says nothing of 99; call analyze.py --components 99)"
        elif verdict == HOLDS and (names := [n for n in unbeaten if n != "unknown"]):
            verdict = f"holds, but no better than {' or '.join(names)} {'subspaces' if names == ['random'] else 'PCs'}"
        elif verdict == HOLDS and unbeaten:
            verdict = "not measured (no foundation PCs of the same width)"
        further.append(verdict)
        if verdict == WIDE or verdict.startswith((HOLDS, FAILS)):
            shown = [replace(finding, threshold=least) for finding in shown]
        shown.sort(key=lambda f: f.value)
        findings += shown
    return make_claim("Fewer than 100 principal components of any task serve all the others",
                      f"above {100 * least:g} % of (score - chance) kept by each of the 12 pairs, leads over random "
                      "subspaces and foundation PCs above 0, paired", findings,
                      further or ["not measured (no IMIC run)"])


def make_table(runs: list[Measured], delta: float, retention: float, separable: float, keep: float) -> list[Claim]:
    """The claims about the paper's three backbones; then, for each other one, what was measured on it.

    Runs of all four tasks decide; those of fewer are listed for information.
    """
    groups, paper = group_runs(runs), list(backbones.BACKBONES)
    others = sorted({run.family for run in runs} - set(paper))
    table = []
    for families in (paper, *([name] for name in others)):
        here = [group for group in groups if group.family in families]
        by_role = {role: [g for g in here if g.config["role"] == role] for role in RUN_ROLES}
        unified = [g for g in by_role["unified"] if g.config["schedule"] in ("A", "B")]  # `alternate` is a baseline
        imic = [g for g in unified if set(g.config["domains"]) == set(DOMAINS)]
        fewer = [g for g in unified if g not in imic]
        if families is not paper and not unified:
            continue
        experts, sequential = by_role["expert"], by_role["sequential"]
        for claim_of, rivals in (
            (partial(claim_backbones, families=families, delta=delta), []),
            (partial(claim_experts, experts=experts, delta=delta), experts),
            (claim_humans, []),
            (partial(claim_generalisation, least=retention), []),
            (partial(claim_forgetting, sequential=sequential, experts=experts, delta=delta), sequential),
            (partial(claim_separable, least=separable), []),
            (partial(claim_components, least=keep), []),
        ):
            claim = claim_of(imic)
            there = [name for name in families if claim_of([g for g in imic if g.family == name]).findings]
            claim.seeds = min((group.seeds for group in imic + rivals), default=0)
            if fewer:
                claim.findings += for_information(claim_of(fewer).findings)
                claim.measured = "; ".join(map(str, claim.findings)) or "-"
                if not imic:
                    claim.verdict = only(max((g.config["domains"] for g in fewer), key=len))[0]
            claim.backbones = f"{families[0]} (not one of the paper's)" if families is not paper else \
                ", ".join(there) or f"none of {', '.join(families)}"
            table.append(claim)
    return table


def write_table(folder: Path, table: list[Claim]) -> None:
    """claims.md (the table, then every finding), claims.json and claims.csv."""
    rows = [asdict(claim) for claim in table]
    lines = ["| claim | backbones | decided by | threshold | verdict |", "| --- | --- | --- | --- | --- |"]
    for c in table:
        lines.append(f"| {' | '.join(map(literal, (c.claim, c.backbones, c.decided_by, c.rule, c.told)))} |")
    lines += ["", f"{FEW_NOTE}."] * any("†" in claim.measured for claim in table)
    for claim in (claim for claim in table if claim.findings):
        lines += ["", f"## {literal(claim.claim)}: {literal(claim.backbones)}", ""]
        lines += [f"- {literal(str(finding))}" + f": {literal(finding.verdict)}" * bool(finding.verdict)
                  for finding in claim.findings]
    write_atomically(folder / "claims.json", lambda path: path.write_text(json.dumps(rows, indent=1) + "\n"))
    write_atomically(folder / "claims.md", lambda path: path.write_text("\n".join(lines) + "\n"))
    write_csv(folder / "claims.csv", [{k: v for k, v in row.items() if k != "findings"} for row in rows])
