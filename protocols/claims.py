"""The abstract's claims, measured on a folder of runs.

Copy with it: data_prep/__init__.py, protocols/bootstrap.py, protocols/results.py.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from data_prep import DOMAINS
from protocols.bootstrap import Estimate, average, interval, margin, mark, needed, show
from protocols.results import HEADLINE, RUN_ROLES, Group, Measured, Row, group_runs

HOLDS, FAILS, WIDE = "holds", "fails", "not measured (intervals too wide to decide)"
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


def judge(what: str, figure: Estimate, least: float, form: str = "+.1f") -> Finding:
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
    """The same findings, without a verdict."""
    return [replace(f, verdict="", threshold=None, note=", ".join(
        filter(None, [f.note.removesuffix("for information").removesuffix(", "), "for information"])))
        for f in findings]


def only(tasks: Iterable[str]) -> list[str]:
    """A verdict where some of the four tasks are missing."""
    known = set(tasks)
    present = [domain for domain in DOMAINS if domain in known]
    return [f"not measured (only tasks {', '.join(present)})"] if len(present) < len(DOMAINS) else []


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
        judged = [judge(f"{group.name} {domain}/{split}", lead, -delta if domain == "object" else 0)
                 for (domain, split), lead in leads.items()]
        if not leads:
            missing.append(f"not measured (no foundation scores of {group.name}; run evaluate.py without "
                           "--no-foundation)")
        elif thin := only(domain for domain, _ in leads):
            judged, missing = for_information(judged), missing + thin
        findings += judged
    return make_claim(f"Works on {', '.join(families)}",
                      f"lead over the untouched backbone above 0 (objects: above -{100 * delta:g} points), paired",
                      findings, missing)


def as_many(seen: int, wanted: int) -> bool:
    """Whether an expert saw as many images as it should, within a quarter."""
    return 0.75 <= seen / max(wanted, 1) <= 1.25


def kinds_of_match(group: Group, expert: Group, domain: str) -> list[str]:
    """How an expert's images match a unified run's, within a quarter: "exposure" (of its domain), "images" (of all)."""
    seen, counts = expert.config["counts"][domain], group.config["counts"]
    return [kind for kind, count in (("exposure", counts[domain]), ("images", sum(counts.values())))
            if as_many(seen, count)]


def claim_experts(imic: list[Group], experts: list[Group], delta: float) -> Claim:
    """A unified run is not worse than the expert of any task by more than `margin`.

    The verdict rests on experts that saw as many images of their domain as the unified run, if there are any, else on
    those that saw as many images in all. Both are listed.
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
            judged = []
            for kind, expert in rivals:
                expert_scores = {key[:2]: figure.value for key, figure in expert.headline("tuned").items()}
                for key, lead in group.leads(expert).items():
                    judged.append(judge(f"{group.name} against {expert.name} {'/'.join(key)}", lead,
                                       -margin(expert_scores[key], delta)))
                    judged[-1].note = f"matched in {kind}"
                    if kind != deciding:
                        judged[-1:] = for_information(judged[-1:])
            findings += judged
            if not any(f.verdict for f in judged):
                missing.append(f"not measured (no expert run, --domains {domain}, of the backbone and number of images "
                               f"of {group.name}, evaluated alike)")
    missing = missing or ([] if imic else ["not measured (no IMIC run)"])
    return make_claim("On par with domain experts on all four tasks at once",
                      f"lead above -{100 * delta:g} points (beside an expert above 90 %: at most a tenth of its error) "
                      "on every task, paired", findings, missing)


def people_on(rated: set[str], chosen: set[str]) -> list[str]:
    """A verdict that says which tasks have people, unless all four were rated by them."""
    if lacking := [domain for domain in DOMAINS if domain not in rated | chosen]:
        present = [domain for domain in DOMAINS if domain not in lacking]
        return [f"not measured (people on {', '.join(present)}; none on {', '.join(lacking)})"]
    return [f"not measured ({', '.join(sorted(chosen - rated))} by forced choice alone, which is not part of the "
            "mean over tasks)"] if chosen - rated else []


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
        rated, chosen = {domain for domain, *_ in rows} - {"all"}, {domain for domain, *_ in choices}
        worse = {domain for (domain, *_), figure in rows.items() if figure.readout == "lead" and figure.high < 0}
        worse |= {domain for (domain, *_), figure in choices.items() if figure.high < 0}
        below = [domain for domain in DOMAINS if domain in worse]
        thin = people_on(rated, chosen) if rows or choices else []
        if rows and raters < 2:
            thin.append(f"not measured ({raters or 'no'} rater{'s' * (raters != 1)} of all tasks; 2 are needed)")
        for (domain, split, metric, _), figure in rows.items():
            overall = domain == "all" and figure.readout == "lead"
            finding = judge(f"{group.name} {domain} {metric}", figure, 0, "+.1f" if figure.readout == "lead" else ".1f")
            if overall:
                finding.note = f"{raters} raters" + f", below people on {', '.join(below)}" * bool(below)
                if finding.verdict == HOLDS and below:
                    finding.verdict = f"holds, but below people on {' and '.join(below)}"
            if not overall or thin:  # single tasks and shares are for information
                finding.verdict, finding.threshold = "", None
            if not overall:
                finding.what = f"{group.name} {domain}/{split} {metric}"
            findings.append(finding)
        findings += for_information([judge(f"{group.name} {'/'.join(key)}", figure, 0)
                                     for key, figure in choices.items()])
        missing += thin
    if not missing and not any(f.verdict for f in findings):
        missing = ["not measured (no human trials: evaluate.py --humans)"]
    return make_claim("More accurate than humans at multi-tasking", "model minus humans, all four tasks together, of "
                      "at least two raters, above 0", findings, missing)


def claim_generalisation(imic: list[Group], least: float) -> Claim:
    """Retention on out-of-distribution splits, where the untouched backbone is above chance."""
    def is_wanted(row: Row) -> bool:
        return (row.kind == "retention" and row.ood and not row.unseen
                and (row.readout, row.measure) == HEADLINE["classification"])

    findings = [judge(f"{group.name} {domain}/{split}", figure, least, ".0f") for group in imic
                for (domain, split, *_), figure in group.rows("tuned", is_wanted).items()]
    missing = [] if findings else ["not measured (no out-of-distribution split on which the foundation beats chance)"]
    return make_claim("Generalisation outside the training distribution is not substantially harmed",
                      f"retention above {100 * least:g} %", findings, missing)


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
        for expert in experts:
            if (expert.start == other.start and expert.config["domains"] == [key[0]]
                    and "exposure" in kinds_of_match(other, expert, key[0])):
                lead = other.leads(expert).get(key)
                expert_score = next((f.value for k, f in expert.headline("tuned").items() if k[:2] == key), 0)
                if lead and lead.quantile(top) <= -margin(expert_score, delta):
                    evidence.append(expert.name)
        if evidence:
            fallen[key] = ", ".join(evidence)
    return fallen


def has_remedy(group: Group) -> bool:
    """Whether more than the schedule limits forgetting: --retain, --replay or --lora."""
    return any(group.config.get(name) for name in ("retain", "replay", "lora"))


def claim_forgetting(imic: list[Group], sequential: list[Group], experts: list[Group], delta: float,
                     beside: Sequence[Group] = ()) -> Claim:
    """Sequential training lost a task that it learned before the last and ends below IMIC on it; IMIC loses none.

    If it lost nothing, there is nothing that the interleaved run could have prevented. `beside`: `alternate` and
    sequential runs with a remedy; the verdict names those that IMIC does not clearly beat on the lost tasks.
    """
    findings, further = [], []
    for group in imic:
        held = [judge(f"{group.name} over the untouched backbone {domain}/{split}", lead, -delta)
                for (domain, split), lead in group.leads(group, "tuned", "foundation").items()]
        others = [s for s in sequential if s.start == group.start and s.config["domains"] == group.config["domains"]]
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
                findings.append(Finding(f"{group.name} over {other.name} {'/'.join(key)}", *show(lead).values(), "",
                                        note="; ".join(notes), threshold=0 if key == best else None,
                                        identities=lead.identities))
            if fallen:
                verdicts.append(HOLDS if lower[best] > 0 else
                                FAILS if all(early[key].high <= delta for key in fallen) else WIDE)
                as_good = []
                for rival in beside:
                    if rival.start == group.start and rival.config["domains"] == group.config["domains"]:
                        leads = {key: lead for key, lead in group.leads(rival).items() if key in fallen}
                        if leads and not any(one.quantile(0.025 / len(leads)) > 0 for one in leads.values()):
                            as_good.append(rival.name)
                        findings += for_information([
                            Finding(f"{group.name} over {rival.name} {'/'.join(key)}", *show(one).values(), "",
                                    identities=one.identities) for key, one in leads.items()])
                if as_good and verdicts[-1] == HOLDS:
                    verdicts[-1] = f"holds, but {' and '.join(as_good)} {'do' if as_good[1:] else 'does'} as well"
        if not others:
            verdicts = [f"not measured (no run of --schedule sequential of the backbone and tasks of {group.name})"]
        elif not held:
            verdicts = [f"not measured (no foundation scores of {group.name})"]
        elif not compared:
            verdicts = ["not measured (no figure in common with the sequential run)"]
        elif thin := only(domain for domain, _ in group.leads(group, "tuned", "foundation")):
            verdicts = thin
        elif not verdicts:
            verdicts = ["not measured (the sequential run forgot nothing)" if watched else
                        "not measured (the sequential run has neither foundation scores nor --eval-every)"]
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
            return group.analysed(
                lambda a: a.separability and getattr(a.separability.spaces.get(space), "logistic", None))

        value = accuracy("tuned")
        if value is None:
            missing.append(group.not_analysed())
            continue
        few = min(count for run in group.runs for count in run.analysis.separability.identities.values())
        finding = Finding(f"{group.name} balanced accuracy", *value.values(),
                          decide(value["low"], value["high"], least), ".1f", threshold=least, identities=few)
        findings.append(finding)
        unbeaten, unknown = [], False
        finding.note = group.unfinished("tuned")
        controls = {"pixels": "pixel statistics", "foundation": "the untouched backbone",
                    "pixels canon": "pixel statistics in one format",
                    "foundation canon": "the untouched backbone in one format"}
        for key, name in controls.items():
            lead = group.analysed(lambda a, key=key: getattr(a.separability.spaces.get(key), "lead_of_tuned", None))
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
        for row in group.runs[0].analysis.separability.unseen_sources:
            recall = group.analysed(lambda a, row=row: next(
                (r.spaces.get("tuned") for r in a.separability.unseen_sources
                 if (r.domain, r.source) == (row.domain, row.source)), None))
            if recall is not None:
                unseen.append(Finding(f"unseen source {row.domain}/{row.source}", *recall.values(), "", ".1f",
                                      identities=min(few, row.identities)))
        findings += unseen
        limits += ["not on unseen sources"] if any(not recall.low > least for recall in unseen) else []
        if finding.verdict == HOLDS:
            if limits:
                finding.verdict = f"holds, but {' and '.join(limits)}"
            elif unknown:
                finding.verdict = "not measured (no matched-format control; call analyze.py --run RUN --canon 32)"
        if thin := only(set.intersection(*(set(run.analysis.domains) for run in group.runs))):
            finding.verdict, finding.threshold, missing = "", None, missing + thin
    return make_claim("The tasks are linearly separable (beyond format)",
                      f"balanced accuracy of the four tasks above {100 * least:g} %, in one format and on unseen "
                      "sources too, leads over every control above 0, paired", findings,
                      missing or ([] if imic else ["not measured (no IMIC run)"]))


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
        k, verdicts, unbeaten, shown = ks.pop(), [], {}, []
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
            for key, name in (("over_random", "random"), ("over_foundation", "foundation")):
                lead = average([getattr(pair, key) for pair in each])
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
            verdict = f"not measured (k = {k} is too few, which says nothing about 99; call analyze.py --components 99)"
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
        experts, sequential = by_role["expert"], [g for g in by_role["sequential"] if not has_remedy(g)]
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
                    claim.verdict = only(max((g.config["domains"] for g in fewer), key=len))[0]
            claim.backbones = f"{families[0]} (not one of the paper's)" if families is not paper else \
                ", ".join(measured) or f"none of {', '.join(families)}"
            table.append(claim)
    return table
