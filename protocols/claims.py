"""The abstract's claims, measured on a folder of runs.

Copy with it: data_prep/__init__.py, protocols/bootstrap.py, protocols/results.py.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial

from data_prep import DOMAINS
from protocols.bootstrap import Estimate, average, interval, margin, mark, needed, show
from protocols.results import HEADLINE, RUN_ROLES, Group, Measured, group_runs

HOLDS, FAILS, WIDE = "holds", "fails", "not measured (intervals too wide to decide)"
MEASURED = (HOLDS, FAILS, WIDE)  # how verdicts on figures start
ORDER = ("fails", "not measured", "holds, but", "holds")  # of verdicts, the weakest first
PAPER = ("clip", "eva02", "dinov3")  # the families of backbones that the abstract names
CROSS = {(a, b) for a in DOMAINS for b in DOMAINS if a != b}  # pairs of tasks: components of one, used by another


@dataclass
class Finding:
    """One measured number behind a claim, with its own verdict."""

    what: str
    value: float | None
    low: float | None
    high: float | None
    verdict: str
    form: str = "+.1f"  # in percent
    note: str = ""
    threshold: float | None = None  # None: for information
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
    decided_by: str  # the weakest finding; its figure, interval and threshold:
    value: float | None
    low: float | None
    high: float | None
    threshold: float | None
    rule: str  # when the claim holds
    verdict: str  # "holds", "holds, but no better than ...", "fails" or "not measured (why)"
    seeds: int  # the fewest of any group behind the line
    findings: list[Finding]

    @property
    def reported(self) -> str:
        """The verdict for readers."""
        return self.verdict + " (1 seed)" * (self.seeds == 1 and self.verdict.startswith((HOLDS, FAILS)))


def decide(low: float | None, high: float | None, least: float) -> str:
    """Whether something is above `least`, by its 95 % interval."""
    if low is None or high is None or not math.isfinite(low + high):
        return "not measured (not above chance)"
    return HOLDS if low > least else FAILS if high <= least else WIDE


def judge(what: str, figure: Estimate, least: float | None, form: str = "+.1f", note: str = "") -> Finding:
    """A finding that holds where the figure is above `least`; None: without a verdict."""
    verdict = "" if least is None else decide(figure.low, figure.high, least)
    return Finding(what, *show(figure).values(), verdict, form, note, least, figure.identities)


def rank(verdict: str) -> int:
    """Place in ORDER: one failure is enough, and what was not measured does not hold."""
    return next(i for i, start in enumerate(ORDER) if verdict.startswith(start))


def first_that_applies(*verdicts: tuple[object, str]) -> str:
    """The verdict beside the first condition that is true; "" if none is."""
    return next((verdict for condition, verdict in verdicts if condition), "")


def for_information(findings: list[Finding]) -> list[Finding]:
    """The same findings, without a verdict."""
    return [replace(f, verdict="", threshold=None, note=", ".join(
        filter(None, [f.note.removesuffix("for information").removesuffix(", "), "for information"])))
        for f in findings]


def only(tasks: Collection[str]) -> str:
    """A verdict where some of the four tasks are missing; "" if none is."""
    present = [domain for domain in DOMAINS if domain in tasks]
    return f"not measured (only tasks {', '.join(present)})" if len(present) < len(DOMAINS) else ""


def alike(group: Group, others: Iterable[Group], domains: list[str]) -> list[Group]:
    """Those of other groups that started from the same backbone and learned these domains."""
    return [other for other in others if other.start == group.start and other.config["domains"] == domains]


def make_claim(claim: str, rule: str, findings: list[Finding], further: list[str],
               otherwise: str = "not measured (no IMIC run)") -> Claim:
    """A line from its findings.

    `further`: verdicts about several findings together, or about what is missing; `otherwise`: where there is none.
    """
    verdict = min([finding.verdict for finding in findings if finding.verdict] + further or [otherwise], key=rank)
    deciding = [f for f in findings if f.threshold is not None and None not in (f.value, f.low, f.high)
                and verdict.startswith(MEASURED)]
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
        judged = [judge(f"{group.name} {domain}/{split}", lead, -delta if domain == "object" else 0)
                 for (domain, split), lead in leads.items()]
        if not leads:
            missing.append(f"not measured (no foundation scores of {group.name}; run evaluate.py without "
                           "--no-foundation)")
        elif thin := only({domain for domain, _ in leads}):
            judged, missing = for_information(judged), [*missing, thin]
        findings += judged
    return make_claim(f"Works on {', '.join(families)}",
                      f"lead over the untouched backbone above 0 (objects: above -{100 * delta:g} points), paired",
                      findings, missing)


def as_many(seen: int, wanted: int) -> bool:
    """Whether an expert saw as many images as it should, within a quarter."""
    return 0.75 <= seen / max(wanted, 1) <= 1.25


def match_experts(group: Group, experts: list[Group], domain: str, delta: float
                  ) -> list[tuple[str, Group, dict[tuple, tuple[Estimate, float]]]]:
    """The experts of a domain that saw as many images of it as a group ("exposure") or as many in all ("images").

    Each with the group's leads over it, by domain and split, and the lead below which the group is inferior.
    """
    counts, matched = group.config["counts"], []
    for expert in alike(group, experts, [domain]):
        scores = {key[:2]: figure.value for key, figure in expert.headline("tuned").items()}
        leads = {key: (lead, -margin(scores[key], delta)) for key, lead in group.leads(expert).items()}
        matched += [(kind, expert, leads) for kind, count in
                    (("exposure", counts[domain]), ("images", sum(counts.values())))
                    if as_many(expert.config["counts"][domain], count)]
    return matched


def claim_experts(imic: list[Group], experts: list[Group], delta: float) -> Claim:
    """A unified run is not worse than the expert of any task by more than `margin`.

    The verdict rests on experts that saw as many images of their domain as the unified run, if there are any, else on
    those that saw as many images in all. Both are listed.
    """
    findings, missing = [], []
    for group in imic:
        for domain in group.config["domains"]:
            rivals = match_experts(group, experts, domain, delta)
            deciding = "exposure" if any(kind == "exposure" for kind, *_ in rivals) else "images"
            judged = []
            for kind, expert, leads in rivals:
                against = [judge(f"{group.name} against {expert.name} {'/'.join(key)}", lead, least,
                                 note=f"matched in {kind}") for key, (lead, least) in leads.items()]
                judged += against if kind == deciding else for_information(against)
            findings += judged
            if not any(f.verdict for f in judged):
                missing.append(f"not measured (no expert run, --domains {domain}, of the backbone and number of images "
                               f"of {group.name}, evaluated alike)")
    return make_claim("On par with domain experts on all four tasks at once",
                      f"lead above -{100 * delta:g} points (beside an expert above 90 %: at most a tenth of its error) "
                      "on every task, paired", findings, missing)


def claim_humans(imic: list[Group]) -> Claim:
    """The model is above the human raters of the same trials, over all four tasks together.

    Forced choices of objects are listed for information: they are not a mean over tasks.
    """
    findings, missing = [], []
    for group in imic:
        trials = group.rows("tuned", lambda row: row.kind == "human trials")
        rows = {key: figure for key, figure in trials.items() if figure.readout in ("lead", "beaten")}
        raters = sum(figure.readout == "rater" for (domain, *_), figure in trials.items() if domain == "all")
        scopes = group.rows("tuned", lambda row: (row.kind, row.readout, row.measure)
                            == ("human choices", HEADLINE["choice"][0], "lead"))
        choices = {key[:3]: figure for key, figure in reversed(scopes.items())}  # a split's first row: all conditions
        rated, chosen = ({domain for domain, *_ in table} for table in (rows, choices))
        leads = [*((key, figure) for key, figure in rows.items() if figure.readout == "lead"), *choices.items()]
        worse = {domain for (domain, *_), figure in leads if figure.high < 0}
        below = [domain for domain in DOMAINS if domain in worse]
        thin = []
        if lacking := [domain for domain in DOMAINS if rows | choices and domain not in rated | chosen]:
            present = [domain for domain in DOMAINS if domain not in lacking]
            thin.append(f"not measured (people on {', '.join(present)}; none on {', '.join(lacking)})")
        elif alone := sorted(chosen - rated):
            thin.append(f"not measured ({', '.join(alone)} by forced choice alone, which is not part of the mean over "
                        "tasks)")
        if rows and raters < 2:
            thin.append(f"not measured ({raters or 'no'} rater{'s' * (raters != 1)} of all tasks; 2 are needed)")
        for (domain, split, metric, _), figure in rows.items():
            lead = figure.readout == "lead"
            overall = lead and domain == "all"
            # single tasks and shares are for information
            finding = judge(f"{group.name} {domain}{'' if overall else '/' + split} {metric}", figure,
                            0 if overall and not thin else None, "+.1f" if lead else ".1f")
            if overall:
                finding.note = f"{raters} raters" + f", below people on {', '.join(below)}" * bool(below)
            if finding.verdict == HOLDS and below:
                finding.verdict = f"holds, but below people on {' and '.join(below)}"
            findings.append(finding)
        findings += for_information([judge(f"{group.name} {'/'.join(key)}", figure, 0)
                                     for key, figure in choices.items()])
        missing += thin
    return make_claim("More accurate than humans at multi-tasking", "model minus humans, all four tasks together, of "
                      "at least two raters, above 0", findings, missing,
                      "not measured (no human trials: evaluate.py --humans)")


def claim_generalisation(imic: list[Group], least: float) -> Claim:
    """Retention on out-of-distribution splits, where the untouched backbone is above chance."""
    wanted = ("retention", True, False, *HEADLINE["classification"])
    findings = [judge(f"{group.name} {domain}/{split}", figure, least, ".0f") for group in imic
                for (domain, split, *_), figure in group.rows("tuned", lambda row: (
                    row.kind, row.ood, row.unseen, row.readout, row.measure) == wanted).items()]
    return make_claim("Generalisation outside the training distribution is not substantially harmed",
                      f"retention above {100 * least:g} %", findings, [],
                      "not measured (no out-of-distribution split on which the foundation beats chance)")


def find_fallen(other: Group, early: dict[tuple, Estimate], experts: list[Group], delta: float) -> dict[tuple, str]:
    """The earlier tasks that a sequential run lost, and the evidence; by domain and split.

    A task is lost that ends delta below the untouched backbone or the run's own best stage (on any split of the domain
    that --eval-every looked at), or `margin` below the expert matched in exposure. Intervals by Bonferroni over the
    earlier tasks.
    """
    gains, top, fallen = other.leads(other, "tuned", "foundation"), 1 - 0.025 / max(len(early), 1), {}
    for key in early:
        evidence = []
        if key in gains and gains[key].quantile(top) <= -delta:
            evidence.append("the untouched backbone")
        if max((loss for split, loss in other.lost.items() if split.split("/")[0] == key[0]), default=0) >= delta:
            evidence.append("its best stage")
        for kind, expert, leads in match_experts(other, experts, key[0], delta):
            if kind == "exposure" and key in leads and leads[key][0].quantile(top) <= leads[key][1]:
                evidence.append(expert.name)
        if evidence:
            fallen[key] = ", ".join(evidence)
    return fallen


def claim_forgetting(imic: list[Group], sequential: list[Group], experts: list[Group], delta: float,
                     beside: Iterable[Group] = ()) -> Claim:
    """Sequential training lost a task that it learned before the last and ends below IMIC on it; IMIC loses none.

    If it lost nothing, there is nothing that the interleaved run could have prevented. `beside`: `alternate` and
    sequential runs with a remedy; the verdict names those that IMIC does not clearly beat on the lost tasks.
    """
    findings, further = [], []
    for group in imic:
        over_untouched = group.leads(group, "tuned", "foundation")
        thin = only({domain for domain, _ in over_untouched})
        held = [judge(f"{group.name} over the untouched backbone {domain}/{split}", lead, -delta)
                for (domain, split), lead in over_untouched.items()]
        others, rivals = (alike(group, them, group.config["domains"]) for them in (sequential, beside))
        verdicts, compared, watched = [], False, False
        for other in others:
            early = {key: lead for key, lead in group.leads(other).items() if key[0] != other.last}
            gains, fallen = other.leads(other, "tuned", "foundation"), find_fallen(other, early, experts, delta)
            compared, watched = compared or bool(early), watched or bool(gains or other.lost)
            lower = {key: early[key].quantile(0.025 / len(early)) for key in fallen}
            best = max(lower, key=lower.get, default=None)  # one forgotten task is enough
            for key, lead in early.items():
                notes = [f"sequential over the untouched {interval(show(gains[key]), '+.1f')}"] if key in gains else []
                notes += [f"sequential below {fallen[key]}"] if key in fallen else []
                findings.append(judge(f"{group.name} over {other.name} {'/'.join(key)}", lead, None,
                                      note="; ".join(notes)))
                findings[-1].threshold = 0 if key == best else None
            if fallen:
                verdicts.append(HOLDS if lower[best] > 0 else
                                FAILS if all(early[key].high <= delta for key in fallen) else WIDE)
                as_good = []
                for rival in rivals:
                    leads = {key: lead for key, lead in group.leads(rival).items() if key in fallen}
                    if leads and not any(lead.quantile(0.025 / len(leads)) > 0 for lead in leads.values()):
                        as_good.append(rival.name)
                    findings += for_information([judge(f"{group.name} over {rival.name} {'/'.join(key)}", lead, None)
                                                 for key, lead in leads.items()])
                if as_good and verdicts[-1] == HOLDS:
                    verdicts[-1] = f"holds, but {' and '.join(as_good)} {'do' if as_good[1:] else 'does'} as well"
        instead = first_that_applies(
            (not others, f"not measured (no run of --schedule sequential of the backbone and tasks of {group.name})"),
            (not held, f"not measured (no foundation scores of {group.name})"),
            (not compared, "not measured (no figure in common with the sequential run)"),
            (thin, thin),
            (not verdicts and watched, "not measured (the sequential run forgot nothing)"),
            (not verdicts, "not measured (the sequential run has neither foundation scores nor --eval-every)"))
        findings += for_information(held) if instead else held
        further += [instead] if instead else verdicts
    return make_claim("Sequential fine-tuning forgets where the interleaved one does not",
                      f"an earlier task of the sequential run fell by {100 * delta:g} points (below the untouched "
                      "backbone, its own best stage or the expert matched in exposure) and is lower than IMIC's, "
                      "paired, Bonferroni; IMIC nowhere below the untouched backbone by as much", findings, further)


def claim_separable(imic: list[Group], least: float) -> Claim:
    """Logistic regression tells the tasks apart, better than format, sources and the untouched backbone explain."""
    findings, missing = [], []
    controls = {"pixels": "pixel statistics", "foundation": "the untouched backbone",
                "pixels canon": "pixel statistics in one format",
                "foundation canon": "the untouched backbone in one format"}
    for group in imic:

        def average_of(space: str, name: str, group=group) -> dict | None:
            return group.analysed(lambda a: a.separability and getattr(a.separability.spaces.get(space), name, None))

        value = average_of("tuned", "logistic")
        if value is None:
            missing.append(group.not_analysed())
            continue
        few = min(count for run in group.runs for count in run.analysis.separability.identities.values())
        finding = Finding(f"{group.name} balanced accuracy", *value.values(),
                          decide(value["low"], value["high"], least), ".1f", group.unfinished("tuned"), least, few)
        leads = {key: average_of(key, "lead_of_tuned") for key in controls}
        plain, unseen = average_of("tuned canon", "logistic"), []
        for row in group.runs[0].analysis.separability.unseen_sources:
            recall = group.analysed(lambda a, row=row: next(
                (r.spaces.get("tuned") for r in a.separability.unseen_sources
                 if (r.domain, r.source) == (row.domain, row.source)), None))
            if recall is not None:
                unseen.append(Finding(f"unseen source {row.domain}/{row.source}", *recall.values(), "", ".1f",
                                      identities=min(few, row.identities)))
        findings += [finding, *(Finding(f"lead over {controls[key]}", *lead.values(), "", identities=few,
                                        note=group.unfinished(key)) for key, lead in leads.items() if lead)]
        if plain:
            findings.append(Finding("in one format", *plain.values(), "", ".1f", identities=few))
        findings += unseen
        unbeaten = [controls[key] for key, lead in leads.items() if lead and not lead["low"] > 0]
        limits = [f"no better than {' or '.join(unbeaten)}"] if unbeaten else []
        limits += ["not in one format"] if plain and not plain["low"] > least else []
        limits += ["not on unseen sources"] if any(not recall.low > least for recall in unseen) else []
        if finding.verdict == HOLDS and limits:
            finding.verdict = f"holds, but {' and '.join(limits)}"
        elif finding.verdict == HOLDS and None in (plain, *leads.values()):
            finding.verdict = "not measured (no matched-format control; call analyze.py --run RUN --canon 32)"
        if thin := only(set.intersection(*(set(run.analysis.domains) for run in group.runs))):
            finding.verdict, finding.threshold, missing = "", None, [*missing, thin]
    return make_claim("The tasks are linearly separable (beyond format)",
                      f"balanced accuracy of the four tasks above {100 * least:g} %, in one format and on unseen "
                      "sources too, leads over every control above 0, paired", findings, missing)


def claim_components(imic: list[Group], least: float) -> Claim:
    """Fewer than 100 components of any task keep every other task's score, and more than other subspaces do."""
    findings, further = [], []
    for group in imic:
        transfers = [run.analysis.transfer for run in group.runs if run.analysis]
        across = [(p.fit, p.test) for p in transfers[0].pairs if p.fit != p.test] if transfers else []
        if not across or len(transfers) < len(group.runs):
            further.append(group.not_analysed())
            continue
        ks, dim = {p.k for transfer in transfers for p in transfer.pairs}, transfers[0].dim
        images = min(transfer.images_per_task for transfer in transfers)
        if len(ks) > 1:
            further.append(f"not measured (seeds of {group.name} analysed at k = {' and '.join(map(str, sorted(ks)))}; "
                           "call analyze.py on each with the same --components)")
            continue
        k, verdicts, leads, shown = ks.pop(), [], {"random": [], "foundation": []}, []
        for fit, test in across:
            each = [next((p for p in transfer.pairs if (p.fit, p.test) == (fit, test)), None) for transfer in transfers]
            if any(pair is None or not pair.above_chance for pair in each):
                verdicts.append(f"not measured (the full space is not above chance: {fit} for {test})")
                continue
            value = average([pair.share for pair in each])
            verdicts.append(decide(value["low"], value["high"], least))
            counts = [f"{name} {needed([getattr(pair, name) for pair in each])}" for name in ("k95", "k99")]
            shown.append(Finding(f"{group.name}: {fit} for {test}, k = {k} of {dim}", *value.values(), "", ".1f",
                                 ", ".join(counts) + f"; few images for {dim} dimensions" * (images < 5 * dim),
                                 identities=min(pair.identities for pair in each)))
            for name, over in leads.items():
                over.append(average([getattr(pair, f"over_{name}") for pair in each]))
        verdict, thin = min(verdicts, key=rank), only({task for pair in across for task in pair})
        unmeasured = next((v for v in verdicts if not v.startswith(MEASURED)), "")
        unbeaten = [name for name, over in leads.items() if any(lead and not lead["low"] > 0 for lead in over)]
        verdict = first_that_applies(
            (dim <= 100, f"not measured (a space of {dim} dimensions: 100 components are all of it)"),
            (k >= 100, "not measured (analysed at 100 components or more; call analyze.py --components 99)"),
            (thin, thin),
            (set(across) != CROSS, f"not measured (only {len(set(across))} of {len(CROSS)} pairs of tasks)"),
            (images <= k + 1, f"not measured (rank-limited: {images} images of each task for {dim} dimensions)"),
            (unmeasured, unmeasured),
            (verdict == FAILS and k < 99,
             f"not measured (k = {k} is too few, which says nothing about 99; call analyze.py --components 99)"),
            (verdict == HOLDS and unbeaten, f"holds, but no better than {' or '.join(unbeaten)} "
             + ("subspaces" if unbeaten == ["random"] else "PCs")),
            (verdict == HOLDS and None in leads["random"] + leads["foundation"],
             "not measured (no foundation PCs of the same width)"),
            (True, verdict))
        further.append(verdict)
        for finding in shown if verdict.startswith(MEASURED) else ():
            finding.threshold = least
        findings += sorted(shown, key=lambda f: f.value)
    return make_claim("Fewer than 100 principal components of any task serve all the others",
                      f"above {100 * least:g} % of (score - chance) kept by each of the 12 pairs, leads over random "
                      "subspaces and foundation PCs above 0, paired", findings, further)


def make_table(runs: list[Measured], delta: float, retention: float, separable: float, keep: float) -> list[Claim]:
    """The claims about the paper's three backbones, then about every other one that was measured.

    Runs of all four tasks decide; those of fewer are listed for information.
    """
    groups, paper = group_runs(runs), list(PAPER)
    others = sorted({run.family for run in runs} - set(paper))
    table = []
    for families in (paper, *([name] for name in others)):
        members = [group for group in groups if group.family in families]
        by_role = {role: [g for g in members if g.config["role"] == role] for role in RUN_ROLES}
        interleaved = [g for g in by_role["unified"] if not g.config.get("retain")]
        unified = [g for g in interleaved if g.config["schedule"] in ("A", "B")]  # `alternate` is a baseline
        imic = [g for g in unified if set(g.config["domains"]) == set(DOMAINS)]
        fewer = [g for g in unified if g not in imic]
        if families is not paper and not unified:
            continue
        experts, sequential = by_role["expert"], [  # in which the schedule alone limits forgetting
            g for g in by_role["sequential"] if not any(g.config.get(name) for name in ("retain", "replay", "lora"))]
        beside = [g for g in [*interleaved, *by_role["sequential"]] if g not in [*unified, *sequential]]
        for claim_of, rivals in (
            (partial(claim_backbones, families=families, delta=delta), []),
            (partial(claim_experts, experts=experts, delta=delta), experts),
            (claim_humans, []),
            (partial(claim_generalisation, least=retention), []),
            (partial(claim_forgetting, sequential=sequential, experts=experts, delta=delta, beside=beside), sequential),
            (partial(claim_separable, least=separable), []),
            (partial(claim_components, least=keep), []),
        ):
            claim = claim_of(imic)
            measured = [name for name in families if claim_of([g for g in imic if g.family == name]).findings]
            claim.seeds = min((group.seeds for group in imic + rivals), default=0)
            if fewer:
                claim.findings += for_information(claim_of(fewer).findings)
                claim.measured = "; ".join(map(str, claim.findings)) or "-"
                if not imic:
                    claim.verdict = only(max((g.config["domains"] for g in fewer), key=len))
            claim.backbones = f"{families[0]} (not one of the paper's)" if families is not paper else \
                ", ".join(measured) or f"none of {', '.join(families)}"
            table.append(claim)
    return table
