"""The pages and tables of an analysis."""

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
from reports.analysis_plots import (
    draw_deletion,
    draw_importance,
    draw_map,
    draw_separability,
    draw_sharing,
    draw_spectrum,
    draw_transfer,
)
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


def report_tasks(analysis: Analysis) -> list[str]:
    """Lines about the splits that were fitted on and tested, and those left out."""
    lines = ["| task | fitted on | tested on | remarks |", "| --- | --- | --- | --- |"]
    few = {pair.test: mistrust(pair.identities) for pair in analysis.transfer["tuned"].pairs}
    for domain, (base, test) in analysis.splits.items():
        severity = analysis.degraded.get(domain)
        remarks = [few[domain], f"fitted on images degraded as in training (severity up to {severity:g})"
                   if severity is not None else ""]
        lines.append(f"| {domain} | {literal(base)} | {literal(test)} | {'; '.join(filter(None, remarks))} |")
    lines += [f"| {domain} | - | - | left out: {literal(why)} |" for domain, why in analysis.left_out.items()]
    return [*lines, ""]


def report_transfer(transfer: Transfer, weights: str, explored: list[Explored]) -> list[str]:
    """Lines about the transfer of one set of weights."""
    headline, dim, limit = transfer.pairs[0].k, transfer.dim, transfer.limit
    note = f" **Rank-limited**: fewer than 5 x {dim} images." if transfer.rank_limited else ""
    if limit < dim:
        note += (f" They determine {limit:,} components, where everything stops: any basis of the other dimensions is "
                 f"as good (> {limit:,}: not even with all of them).")
    columns = {"pooled": "pooled", "bottom": "last k", "own_mean": "own mean"} if explored else {}
    if explored and explored[0].deleted:
        columns["deleted"] = "range deleted"
    more, untouched = {(e.fit, e.test): e for e in explored}, transfer.pairs[0].foundation is not None
    head = ["PCs of", "used by", "raw", "all", "kept at k", "k99", "k95", "k99 / random's", "random",
            *["untouched PCs"] * untouched, *columns.values(), "lead over random",
            *["lead over untouched PCs"] * untouched]
    lines = [f"### {weights}", "",
             f"{transfer.images_per_task:,} images a task, {dim:,} dimensions, k = {headline}.{note}", "",
             f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for p in transfer.pairs:
        beyond = "-" if p.kept is None else f"> {limit:,}"
        coarse = [f"{k:,.0f}" if k else beyond for k in (p.k99_grid, p.k99_random)]
        controls = [p.random, *[p.foundation] * untouched, *(getattr(more[p.fit, p.test], key) for key in columns)]
        cells = [p.fit, p.test, f"{100 * p.raw:.1f}", f"{100 * p.full:.1f}", interval(p.share), needed([p.k99]),
                 needed([p.k95]), " / ".join(coarse), *(number(control["value"]) for control in controls),
                 interval(p.over_random, "+.1f"), *[interval(p.over_foundation, "+.1f")] * untouched]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Number of components from which on every task keeps 99 or 95 % (-: a task is not above chance): "
              + "; ".join(f"of {row.fit} {needed([row.k99])} for 99 %, {needed([row.k95])} for 95 %"
                          for row in transfer.all_tasks) + f"; of {dim:,}."]
    few = {p.test: note for p in transfer.pairs if (note := mistrust(p.identities))}
    lines += ["", *(f"- used by {test}: {note}" for test, note in few.items())] if few else []
    if explored:
        lines += ["", *report_further(explored, dim)]
        if explored[0].importance:
            lines += ["", *report_importance(explored)]
        if cut := explored[0].deleted:
            lines += ["", f"Range deleted: without components {cut['from'] + 1} to {cut['to']} of the fitted task."]
    return [*lines, ""]


def report_further(explored: list[Explored], dim: int) -> list[str]:
    """Lines about the tasks' other metrics in a few subspaces."""
    ks = sorted({row["k"] for row in explored[0].further})
    lines = ["Other metrics with k components, in percent (in brackets: k random dimensions, the mean of "
             f"{FURTHER_RANDOM}; intervals: further.csv). A random subspace keeps nearly all of an AUC, which "
             "says little here; no verdict rests on this table.", "",
             f"| PCs of | used by | metric | {' | '.join(f'k = {k}' if k < dim else 'all' for k in ks)} |",
             "| --- " * (len(ks) + 3) + "|"]
    for pair in explored:
        rows = {(row["metric"], row["k"]): row for row in pair.further}
        for metric in dict.fromkeys(metric for metric, _ in rows):
            cells = [number(row["value"]) + f" ({number(row['random'])})" * (row["k"] < dim)
                     for row in (rows[metric, k] for k in ks)]
            lines.append(f"| {pair.fit} | {pair.test} | {metric} | {' | '.join(cells)} |")
    return lines


def report_importance(explored: list[Explored]) -> list[str]:
    """Lines about the components that raise or lower a score most."""
    count = len(explored[0].importance["change"])
    lines = [f"One component left out at a time, of the first {count}: the three of the largest loss and of the "
             "largest gain, change of the score in points (intervals of all: importance.csv; the largest of many are "
             "large by chance, too).", "", "| PCs of | used by | losses: component (change) | gains |",
             "| --- | --- | --- | --- |"]
    for pair in explored:
        change = 100 * np.array(pair.importance["change"])
        order = np.argsort(change, kind="stable")
        ends = [", ".join(f"{i + 1} ({change[i]:+.1f})" for i in part if change[i] * sign > 0) or "-"
                for part, sign in ((order[:3], -1), (order[::-1][:3], 1))]
        lines.append(f"| {pair.fit} | {pair.test} | {ends[0]} | {ends[1]} |")
    return lines


def report_separability(result: Separability) -> list[str]:
    """Lines about the linear separability of the tasks."""
    lines = ["## Linear separability of the tasks", "",
             f"Balanced accuracy on unseen identities, {result.images_per_task} images a task, chance "
             f"{100 * result.chance:.0f}. Pixel statistics carry no content; \"canon\": all images in one format. "
             "Only the lead of the tuned space, paired by identity, counts.",
             "",
             f"| space | {' | '.join(CLASSIFIERS.values())} | lead of tuned (logistic) |",
             "| --- " * (len(CLASSIFIERS) + 2) + "|"]
    for name, space in result.spaces.items():
        cells = [interval(getattr(space, model)) + " (not converged)" * (not space.converged[model])
                 for model in CLASSIFIERS]
        lines.append(f"| {name} | {' | '.join(cells)} | {interval(space.lead_of_tuned, '+.1f')} |")
    few = {name: note for name, count in result.identities.items() if (note := mistrust(count))}
    lines += ["", *(f"- {name}: {note}" for name, note in few.items())] if few else []
    if len(result.identities) > 2:
        lines += ["", "Pairs of tasks, logistic regression:", "", f"| pair | {' | '.join(result.spaces)} |",
                  "| --- " * (len(result.spaces) + 1) + "|"]
        lines += [f"| {key} | {' | '.join(number(s.pairwise[key]['value']) for s in result.spaces.values())} |"
                  for key in result.spaces["tuned"].pairwise]
    if unseen := result.unseen_sources:
        names = list(unseen[0].spaces)
        lines += ["", "The same with a task's images from a source that the classifier was not fitted on (recall: of "
                  "these images):", "",
                  f"| task | source | images | {' | '.join(names)} |", "| --- " * (len(names) + 3) + "|"]
        for row in unseen:
            note = f" ({note})" if (note := mistrust(row.identities)) else ""
            cells = [f"{interval(figure)}, recall {100 * figure['recall']:.1f}"
                     + " (not converged)" * (not figure["converged"]) for figure in row.spaces.values()]
            lines.append(f"| {row.domain} | {literal(row.source)}{note} | {row.images:,} | {' | '.join(cells)} |")
    return [*lines, "", *report_sources(result.sources, result.spaces), ""]


def report_sources(result: dict[str, Sources], spaces: Iterable[str]) -> list[str]:
    """Lines about how well the sources within each task are separated."""
    names = [name for name in spaces if not name.endswith("canon")]
    lines = ["The source of an image as the label, within each task, on unseen identities: "
             f"{' / '.join(CLASSIFIERS.values())}. Where sources are separated as well as tasks are, tasks may be "
             "separated by their sources.", "",
             f"| task | sources (images) | chance | {' | '.join(names)} |", "| --- " * (len(names) + 3) + "|"]
    for domain, of in result.items():
        if of.why:
            lines.append(f"| {domain} | not measured ({literal(of.why)}) |{' - |' * (len(names) + 1)}")
            continue
        notes = {name: mistrust(count) for name, count in of.identities.items()}
        sources = [f"{literal(name)} ({count:,}{'; ' * bool(notes[name])}{notes[name]})"
                   for name, count in of.images.items()]
        cells = [" / ".join(interval(of.spaces[name][model]) for model in CLASSIFIERS) for name in names]
        lines.append(f"| {domain} | {', '.join(sources)} | {100 * of.chance:.0f} | {' | '.join(cells)} |")
    return lines


def report_sharing(result: dict[str, Sharing], cka: dict[str, float | None]) -> list[str]:
    """Lines about what the tasks share, before and after."""
    lines = ["## What the tasks share", "",
             "Participation ratio: how many dimensions carry the variance. Scatter: of class means about the mean, "
             "over images about their class mean. CKA: debiased, linear, of the same images before and after "
             "fine-tuning.",
             "", "| space | task | participation ratio | PCs for 50 / 90 / 95 % | scatter | CKA with the untouched |",
             "| --- | --- | --- | --- | --- | --- |"]
    for weights, sharing in result.items():
        for name, t in sharing.tasks.items():
            counts = f"{t.components_for_50} / {t.components_for_90} / {t.components_for_95}"
            cka_of_task = f"{cka[name]:.2f}" if weights == "tuned" and cka.get(name) is not None else ""
            lines.append(f"| {weights} | {name} | {t.participation_ratio:.1f} | {counts} | "
                         f"{t.scatter_ratio or math.nan:.2f} | {cka_of_task} |")
    sharing = result["tuned"]
    if len(sharing.tasks) > 1:
        lines += ["", f"The first {sharing.k} components of two tasks, tuned; by chance their overlap is "
                  f"{sharing.chance:.2f}:", "",
                  "| a | b | overlap | angles: smallest, median, largest | variance of b in a | cosine of means |",
                  "| --- | --- | --- | --- | --- | --- |"]
        lines += [f"| {p.a} | {p.b} | {p.overlap:.2f} | {p.smallest_angle:.0f}°, {p.median_angle:.0f}°, "
                  f"{p.largest_angle:.0f}° | {p.explained:.2f} | {p.mean_cosine:.2f} |"
                  for p in sharing.pairs if p.a != p.b]
    return [*lines, ""]


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
    lines = [f"# {literal(analysis.run)}", "", *report_tasks(analysis), "## Transfer of principal components", "",
             f"Share of (score - chance) that the first {pairs[0].k} components of one task keep for another, in "
             "percent with 95 % intervals, resampled by identity; the score is rank-1 for people and the nearest class "
             "mean for objects, on identities that the components were not fitted on (-: all components are not "
             "above chance). Vectors are centred by the mean of the fitted task. All: every component; raw: without "
             "centring. k99 and k95: the number of components from which on 99 % and 95 % are kept; k99 / random's: "
             "that of components and of random subspaces, both at the few k of the controls. Controls at k: random "
             "subspaces (centred as the components are), components of the untouched backbone, of all tasks pooled, "
             "the last k; own mean: centred by the mean of the task that is scored. A claim about components has a "
             "meaning only where they lead.", ""]
    for weights, transfer in analysis.transfer.items():
        lines += report_transfer(transfer, weights, explored if weights == "tuned" else [])
    if analysis.separability:
        lines += report_separability(analysis.separability)
        draw_separability(folder / "separability", analysis.separability, domains)
    lines += report_sharing(analysis.sharing, analysis.cka)
    report = "\n".join(lines)
    write_text(folder / "report.md", report)
    draw_transfer(folder / "transfer", curves["tuned"], domains, pairs)
    draw_deletion(folder / "deletion", curves["tuned"], domains, pairs)
    if explored[0].importance:
        draw_importance(folder / "importance", explored, domains)
    draw_sharing(folder / "sharing", analysis.sharing["tuned"], domains)
    draw_spectrum(folder / "spectrum", components, domains)
    draw_map(folder / "map", points, domains, analysis.map)
    return report


def write_table(folder: Path, table: list[Claim]) -> None:
    """claims.md (the table, then every finding), claims.json and claims.csv."""
    rows = [asdict(claim) for claim in table]
    lines = ["| claim | backbones | decided by | threshold | verdict |", "| --- | --- | --- | --- | --- |"]
    for c in table:
        lines.append(f"| {' | '.join(map(literal, (c.claim, c.backbones, c.decided_by, c.rule, c.reported)))} |")
    lines += ["", f"{FEW_NOTE}."] * any("†" in claim.measured for claim in table)
    for claim in (claim for claim in table if claim.findings):
        lines += ["", f"## {literal(claim.claim)}: {literal(claim.backbones)}", ""]
        lines += [f"- {literal(str(finding))}" + f": {literal(finding.verdict)}" * bool(finding.verdict)
                  for finding in claim.findings]
    write_json(folder / "claims.json", rows)
    write_text(folder / "claims.md", "\n".join(lines) + "\n")
    write_csv(folder / "claims.csv", [{k: v for k, v in row.items() if k != "findings"} for row in rows])
