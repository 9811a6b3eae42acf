"""The pages and tables of an analysis. A report is a list of blocks (headings, paragraphs, tables, lists)."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data_prep import literal, write_csv, write_json
from protocols.bootstrap import FEW, FEW_NOTE, interval, needed, number
from protocols.claims import Claim
from protocols.explore import FURTHER_RANDOM, Explored
from protocols.results import Separability, Sources, Transfer
from protocols.separability import CLASSIFIERS
from protocols.sharing import Sharing
from protocols.subspaces import Curve
from reports import analysis_plots as plots
from reports.tables import write_text


def mistrust(identities: int) -> str:
    """A remark on an interval from few identities; "" if they are enough."""
    return f"{identities} identities: interval unreliable" if identities < FEW else ""


@dataclass
class Analysis:
    """The results of analyze.py for a run: analysis.json."""

    run: str
    weights_sha256: str | None
    domains: list[str]
    splits: dict[str, list[str]]  # by domain: fitted on, tested on
    left_out: dict[str, str]  # domain -> why
    degraded: dict[str, float]  # domain -> severity of its training images
    map: str  # method
    transfer: dict[str, Transfer] = field(default_factory=dict)  # by weights
    explored: list[Explored] = field(default_factory=list)  # of the tuned weights
    separability: Separability | None = None
    sharing: dict[str, Sharing] = field(default_factory=dict)  # by weights
    cka: dict[str, float | None] = field(default_factory=dict)  # by domain


def tabulate(rows: Iterable[dict[str, str]]) -> str:
    """A table of one or more rows, cells by column."""
    rows = list(rows)
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def list_few(identities: dict[str, int], what: str = "") -> list[str]:
    """The tasks of few identities as a list, if there are any."""
    few = [f"- {what}{domain}: {note}" for domain, count in identities.items() if (note := mistrust(count))]
    return ["\n".join(few)] if few else []


def report_tasks(analysis: Analysis) -> str:
    """The splits that were fitted on and tested, and those left out."""
    few, rows = {pair.test: mistrust(pair.identities) for pair in analysis.transfer["tuned"].pairs}, []
    for domain, (base, test) in analysis.splits.items():
        severity = analysis.degraded.get(domain)
        remarks = [few[domain], f"fitted on images degraded as in training (severity up to {severity:g})"
                   if severity is not None else ""]
        rows.append({"task": domain, "fitted on": literal(base), "tested on": literal(test),
                     "remarks": "; ".join(filter(None, remarks))})
    for domain, why in analysis.left_out.items():
        rows.append({"task": domain, "fitted on": "-", "tested on": "-", "remarks": f"left out: {literal(why)}"})
    return tabulate(rows)


def report_transfer(transfer: Transfer, weights: str, explored: list[Explored]) -> list[str]:
    """The transfer of one set of weights."""
    headline, dim, limit, rows = transfer.pairs[0].k, transfer.dim, transfer.limit, []
    note = f" **Rank-limited**: fewer than 5 x {dim} images." if transfer.rank_limited else ""
    if limit < dim:
        note += (f" They determine {limit:,} components, where everything stops: any basis of the other dimensions is "
                 f"as good (> {limit:,}: not even with all of them).")
    columns = {"pooled": "pooled", "bottom": "last k", "own_mean": "own mean", "deleted": "range deleted"}
    more = {(e.fit, e.test): {title: number(control["value"]) for key, title in columns.items()
                              if (control := getattr(e, key))} for e in explored}
    for p in transfer.pairs:
        beyond = "-" if p.kept is None else f"> {limit:,}"
        coarse = [f"{k:,.0f}" if k else beyond for k in (p.k99_grid, p.k99_random)]
        row = {"PCs of": p.fit, "used by": p.test, "raw": number(p.raw), "all": number(p.full),
               "kept at k": interval(p.share), "k99": needed([p.k99]), "k95": needed([p.k95]),
               "k99 / random's": " / ".join(coarse), "random": number(p.random["value"])}
        row |= {"untouched PCs": number(p.foundation["value"])} if p.foundation else {}
        row |= more.get((p.fit, p.test), {}) | {"lead over random": interval(p.over_random, "+.1f")}
        row |= {"lead over untouched PCs": interval(p.over_foundation, "+.1f")} if p.foundation else {}
        rows.append(row)
    blocks = [f"### {weights}",
              f"{transfer.images_per_task:,} images a task, {dim:,} dimensions, k = {headline}.{note}", tabulate(rows),
              "Number of components from which on every task keeps 99 or 95 % (-: a task is not above chance): "
              + "; ".join(f"of {row.fit} {needed([row.k99])} for 99 %, {needed([row.k95])} for 95 %"
                          for row in transfer.all_tasks) + f"; of {dim:,}.",
              *list_few({p.test: p.identities for p in transfer.pairs}, "used by ")]
    if explored:
        blocks += report_further(explored, dim)
        if explored[0].importance:
            blocks += report_importance(explored)
        if cut := explored[0].deleted:
            blocks.append(f"Range deleted: without components {cut['from'] + 1} to {cut['to']} of the fitted task.")
    return blocks


def report_further(explored: list[Explored], dim: int) -> list[str]:
    """The tasks' other metrics in a few subspaces."""
    rows: dict[tuple, dict[str, str]] = {}
    for pair in explored:
        for of in pair.further:  # k rises
            row = rows.setdefault((pair.fit, pair.test, of["metric"]), {
                "PCs of": pair.fit, "used by": pair.test, "metric": of["metric"]})
            column, beside = ("all", "") if of["k"] == dim else (f"k = {of['k']}", f" ({number(of['random'])})")
            row[column] = number(of["value"]) + beside
    return ["Other metrics with k components, in percent (in brackets: k random dimensions, the mean of "
            f"{FURTHER_RANDOM}; intervals: further.csv). A random subspace keeps nearly all of an AUC, which "
            "says little here; no verdict rests on this table.", tabulate(rows.values())]


def report_importance(explored: list[Explored]) -> list[str]:
    """The components that raise or lower a score most."""
    rows, count = [], len(explored[0].importance["change"])
    for pair in explored:
        change = 100 * np.array(pair.importance["change"])
        order = np.argsort(change, kind="stable")
        losses, gains = (", ".join(f"{i + 1} ({change[i]:+.1f})" for i in part if change[i] * sign > 0) or "-"
                         for part, sign in ((order[:3], -1), (order[::-1][:3], 1)))
        rows.append({"PCs of": pair.fit, "used by": pair.test, "losses: component (change)": losses, "gains": gains})
    return [f"One component left out at a time, of the first {count}: the three of the largest loss and of the "
            "largest gain, change of the score in points (intervals of all: importance.csv; the largest of many are "
            "large by chance, too).", tabulate(rows)]


def report_separability(result: Separability) -> list[str]:
    """The linear separability of the tasks."""
    blocks = ["## Linear separability of the tasks",
              f"Balanced accuracy on unseen identities, {result.images_per_task} images a task, chance "
              f"{100 * result.chance:.0f}. Pixel statistics carry no content; \"canon\": all images in one format. "
              "Only the lead of the tuned space, paired by identity, counts.",
              tabulate({"space": name} | {
                  title: interval(getattr(space, model)) + " (not converged)" * (not space.converged[model])
                  for model, title in CLASSIFIERS.items()}
                  | {"lead of tuned (logistic)": interval(space.lead_of_tuned, "+.1f")}
                  for name, space in result.spaces.items()),
              *list_few(result.identities)]
    if len(result.identities) > 2:
        blocks += ["Pairs of tasks, logistic regression:", tabulate(
            {"pair": key} | {name: number(space.pairwise[key]["value"]) for name, space in result.spaces.items()}
            for key in result.spaces["tuned"].pairwise)]
    if result.unseen_sources:
        rows = []
        for row in result.unseen_sources:
            note = f" ({note})" if (note := mistrust(row.identities)) else ""
            rows.append({"task": row.domain, "source": literal(row.source) + note, "images": f"{row.images:,}"} | {
                space: f"{interval(figure)}, recall {100 * figure['recall']:.1f}"
                + " (not converged)" * (not figure["converged"]) for space, figure in row.spaces.items()})
        blocks += ["The same with a task's images from a source that the classifier was not fitted on (recall: of "
                   "these images):", tabulate(rows)]
    return [*blocks, *report_sources(result.sources, result.spaces)]


def report_sources(result: dict[str, Sources], spaces: Iterable[str]) -> list[str]:
    """How well the sources within each task are separated."""
    names, rows = [name for name in spaces if not name.endswith("canon")], []
    for domain, of in result.items():
        if of.why:
            row = {"sources (images)": f"not measured ({literal(of.why)})", "chance": "-"} | dict.fromkeys(names, "-")
        else:
            notes = {name: f"; {note}" if (note := mistrust(count)) else "" for name, count in of.identities.items()}
            sources = [f"{literal(name)} ({count:,}{notes[name]})" for name, count in of.images.items()]
            row = {"sources (images)": ", ".join(sources), "chance": f"{100 * of.chance:.0f}"} | {
                name: " / ".join(interval(of.spaces[name][model]) for model in CLASSIFIERS) for name in names}
        rows.append({"task": domain} | row)
    return ["The source of an image as the label, within each task, on unseen identities: "
            f"{' / '.join(CLASSIFIERS.values())}. Where sources are separated as well as tasks are, tasks may be "
            "separated by their sources.", tabulate(rows)]


def report_sharing(result: dict[str, Sharing], cka: dict[str, float | None]) -> list[str]:
    """What the tasks share, before and after."""
    known = {("tuned", name): f"{value:.2f}" for name, value in cka.items() if value is not None}
    blocks = ["## What the tasks share",
              "Participation ratio: how many dimensions carry the variance. Scatter: of class means about the mean, "
              "over images about their class mean. CKA: debiased, linear, of the same images before and after "
              "fine-tuning.", tabulate({
                  "space": weights, "task": name, "participation ratio": f"{t.participation_ratio:.1f}",
                  "PCs for 50 / 90 / 95 %": f"{t.components_for_50} / {t.components_for_90} / {t.components_for_95}",
                  "scatter": f"{t.scatter_ratio or math.nan:.2f}",
                  "CKA with the untouched": known.get((weights, name), "")}
                  for weights, sharing in result.items() for name, t in sharing.tasks.items())]
    sharing = result["tuned"]
    if len(sharing.tasks) > 1:
        blocks += [f"The first {sharing.k} components of two tasks, tuned; by chance their overlap is "
                   f"{sharing.chance:.2f}:", tabulate({
                       "a": p.a, "b": p.b, "overlap": f"{p.overlap:.2f}", "angles: smallest, median, largest":
                       f"{p.smallest_angle:.0f}°, {p.median_angle:.0f}°, {p.largest_angle:.0f}°",
                       "variance of b in a": f"{p.explained:.2f}", "cosine of means": f"{p.mean_cosine:.2f}"}
                       for p in sharing.pairs if p.a != p.b)]
    return blocks


def write_analysis(folder: Path, analysis: Analysis, curves: dict[str, list[Curve]], components: list[dict],
                   points: list[dict]) -> str:
    """analysis.json, the tables, report.md and the figures; returns the report.

    `curves`: by weights; `components`: of `measure_components`, with the weights; `points`: of the map.
    """
    domains, pairs, explored = analysis.domains, analysis.transfer["tuned"].pairs, analysis.explored
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "analysis.json", asdict(analysis))
    write_csv(folder / "transfer.csv", [
        {"weights": weights, "kind": c.kind, "fit": c.fit, "number": c.number, "test": c.test, "k": k}
        | {name: None if math.isnan(value) else round(float(value), 6)
           for name, value in zip(("score", "kept", "low", "high"), values, strict=True)}
        for weights, rows in curves.items() for c in rows
        for k, *values in zip(c.ks, c.score, c.kept, *c.interval(), strict=True)])
    write_csv(folder / "further.csv", [{"fit": e.fit, "test": e.test} | row for e in explored for row in e.further])
    write_csv(folder / "importance.csv", [
        {"fit": e.fit, "test": e.test, "component": i, "change": change, "low": low, "high": high}
        for e in explored if e.importance
        for i, (change, low, high) in enumerate(zip(*e.importance.values(), strict=True), 1)],
        ("fit", "test", "component", "change", "low", "high"))
    write_csv(folder / "dprime.csv", components)
    write_csv(folder / "map.csv", points)
    blocks = [f"# {literal(analysis.run)}", report_tasks(analysis), "## Transfer of principal components",
              f"Share of (score - chance) that the first {pairs[0].k} components of one task keep for another, in "
              "percent with 95 % intervals, resampled by identity; the score is rank-1 for people and the nearest "
              "class mean for objects, on identities that the components were not fitted on (-: all components are "
              "not above chance). Vectors are centred by the mean of the fitted task. All: every component; raw: "
              "without centring. k99 and k95: the number of components from which on 99 % and 95 % are kept; k99 / "
              "random's: that of components and of random subspaces, both at the few k of the controls. Controls at k: "
              "random subspaces (centred as the components are), components of the untouched backbone, of all tasks "
              "pooled, the last k; own mean: centred by the mean of the task that is scored. A claim about components "
              "has a meaning only where they lead."]
    for weights, transfer in analysis.transfer.items():
        blocks += report_transfer(transfer, weights, explored if weights == "tuned" else [])
    if analysis.separability:
        blocks += report_separability(analysis.separability)
        plots.draw_separability(folder / "separability", analysis.separability, domains)
    report = "\n\n".join(blocks + report_sharing(analysis.sharing, analysis.cka)) + "\n"
    write_text(folder / "report.md", report)
    plots.draw_transfer(folder / "transfer", curves["tuned"], domains, pairs)
    plots.draw_deletion(folder / "deletion", curves["tuned"], domains, pairs)
    if explored[0].importance:
        plots.draw_importance(folder / "importance", explored, domains)
    plots.draw_sharing(folder / "sharing", analysis.sharing["tuned"], domains)
    plots.draw_spectrum(folder / "spectrum", components, domains)
    plots.draw_map(folder / "map", points, domains, analysis.map)
    return report


def write_table(folder: Path, table: list[Claim]) -> None:
    """claims.md (the table, then every finding), claims.json and claims.csv."""
    rows = [asdict(claim) for claim in table]
    columns = {"claim": "claim", "backbones": "backbones", "decided by": "decided_by", "threshold": "rule",
               "verdict": "reported"}
    blocks = [tabulate({title: literal(getattr(claim, name)) for title, name in columns.items()} for claim in table)]
    blocks += [f"{FEW_NOTE}."] * any("†" in claim.measured for claim in table)
    for claim in (claim for claim in table if claim.findings):
        blocks += [f"## {literal(claim.claim)}: {literal(claim.backbones)}", "\n".join(
            f"- {literal(str(finding))}" + f": {literal(finding.verdict)}" * bool(finding.verdict)
            for finding in claim.findings)]
    write_json(folder / "claims.json", rows)
    write_text(folder / "claims.md", "\n\n".join(blocks) + "\n")
    write_csv(folder / "claims.csv", [{k: v for k, v in row.items() if k != "findings"} for row in rows])
