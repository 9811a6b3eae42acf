"""The pages and tables of an analysis."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from analyze_figures import (
    draw_deletion,
    draw_importance,
    draw_map,
    draw_separability,
    draw_sharing,
    draw_spectrum,
    draw_transfer,
)
from analyze_separability import CLASSIFIERS
from analyze_subspaces import FURTHER_RANDOM, LEVELS
from evaluate_bootstrap import FEW
from evaluate_report import literal
from evaluate_results import write_csv
from run_folder import write_atomically, write_json


def number(value: float | None) -> str:
    """A fraction in percent; "-" where it is not known."""
    return "-" if value is None else f"{100 * value:.1f}"


def interval(found: dict | None, form: str = ".1f", factor: float = 100) -> str:
    """A figure with its interval, in percent; "-" where there is none."""
    if not found or found["value"] is None:
        return "-"
    ends = [format(factor * found[end], form) if found[end] is not None else "-" for end in ("value", "low", "high")]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


def needed(figures: list[dict]) -> str:
    """A k* with its interval, averaged over seeds; "> K" where the K components that images determine are too few."""
    if any(None in found.values() and not found.get("above") for found in figures):
        return "-"
    ends = []
    for end in ("value", "low", "high"):
        known = [found[end] if found[end] is not None else found["above"] for found in figures]
        ends.append("> " * any(found[end] is None for found in figures) + f"{np.mean(known):,.0f}")
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


def mistrust(identities: int) -> str:
    """What is to be said of an interval from so many identities; nothing if they are enough."""
    return f"{identities} identities: interval not to be trusted" if identities < FEW else ""


def report_tasks(analysis: dict) -> list[str]:
    """Lines about what was fitted on and tested, and what was not."""
    lines = ["| task | fitted on | tested on | remarks |", "| --- | --- | --- | --- |"]
    few = {pair["test"]: mistrust(pair["identities"]) for pair in analysis["transfer"]["tuned"]["pairs"]}
    for domain, (base, test) in analysis["splits"].items():
        severity = analysis["degraded"].get(domain)
        remarks = [few[domain], f"fitted on images degraded as in training (severity up to {severity:g})"
                   if severity is not None else ""]
        lines.append(f"| {domain} | {literal(base)} | {literal(test)} | {'; '.join(filter(None, remarks))} |")
    lines += [f"| {domain} | - | - | left out: {literal(why)} |" for domain, why in analysis["left_out"].items()]
    return [*lines, ""]


def report_transfer(result: dict, weights: str) -> list[str]:
    """Lines about the transfer of one set of weights."""
    headline, dim, limit = result["pairs"][0]["k"], result["dim"], result["limit"]
    note = f" **Rank-limited**: fewer than 5 x {dim} images." if result["rank_limited"] else ""
    if limit < dim:
        note += (f" They determine {limit:,} components, and everything stops there: of the other dimensions every "
                 f"basis is as right (> {limit:,}: not even with all that are determined).")
    lines = [f"### {weights}", "",
             f"{result['images_per_task']:,} images a task, {dim:,} dimensions, k = {headline}.{note}", ""]
    columns = {"random": "random", "foundation": "untouched PCs", "pooled": "pooled", "bottom": "last k",
               "own_mean": "own mean", "deleted": "range deleted"}
    there = {key: name for key, name in columns.items() if key in result["pairs"][0]}
    head = ["PCs of", "used by", "raw", "all", "kept at k", "k99", "k95", "k99 / random's", *there.values(),
            "lead over random", *(["lead over untouched PCs"] if "foundation" in there else [])]
    lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for p in result["pairs"]:
        beyond = "-" if p["kept"] is None else f"> {limit:,}"
        coarse = [f"{p[key]:,.0f}" if p[key] else beyond for key in ("k99_grid", "k99_random")]
        cells = [p["fit"], p["test"], f"{100 * p['raw']:.1f}", f"{100 * p['full']:.1f}",
                 interval({"value": p["kept"], "low": p["low"], "high": p["high"]}),
                 needed([p["k99"]]), needed([p["k95"]]), " / ".join(coarse),
                 *(number(p[key]["value"]) for key in there), interval(p["over_random"], "+.1f"),
                 *([interval(p["over_foundation"], "+.1f")] if "foundation" in there else [])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Components from which on every task keeps so much (-: a task is not above chance): "
              + "; ".join(f"of {row['fit']} " + ", ".join(f"{needed([row[f'k{100 * level:g}']])} for {100 * level:g} %"
                                                          for level in LEVELS)
                          for row in result["all_tasks"]) + f"; of {dim:,}."]
    few = {p["test"]: note for p in result["pairs"] if (note := mistrust(p["identities"]))}
    lines += ["", *(f"- used by {test}: {note}" for test, note in few.items())] if few else []
    if "further" in result["pairs"][0]:
        lines += ["", *report_further(result["pairs"], dim)]
    if "importance" in result["pairs"][0]:
        lines += ["", *report_importance(result["pairs"])]
    if "deleted" in there:
        cut = result["pairs"][0]["deleted"]
        lines += ["", f"Range deleted: without components {cut['from'] + 1} to {cut['to']} of the fitted task."]
    return [*lines, ""]


def report_further(pairs: list[dict], dim: int) -> list[str]:
    """Lines about the tasks' other metrics in a few subspaces."""
    ks = sorted({row["k"] for row in pairs[0]["further"]})
    lines = ["Other metrics with k components, in percent (in brackets: k random dimensions, the mean of "
             f"{FURTHER_RANDOM}; intervals: further.csv). On an AUC a random subspace keeps nearly everything, so that "
             "it tells little here; no verdict rests on this table.", "",
             f"| PCs of | used by | metric | {' | '.join(f'k = {k}' if k < dim else 'all' for k in ks)} |",
             "| --- " * (len(ks) + 3) + "|"]
    for p in pairs:
        rows = {(row["metric"], row["k"]): row for row in p["further"]}
        for metric in dict.fromkeys(metric for metric, _ in rows):
            cells = [number(row["value"]) + f" ({number(row['random'])})" * (row["k"] < dim)
                     for row in (rows[metric, k] for k in ks)]
            lines.append(f"| {p['fit']} | {p['test']} | {metric} | {' | '.join(cells)} |")
    return lines


def report_importance(pairs: list[dict]) -> list[str]:
    """Lines about the components that a score rests on most, and those that it would be better without."""
    count = len(pairs[0]["importance"]["change"])
    lines = [f"One component left out at a time, of the first {count}: the three of the largest loss and of the "
             "largest gain, change of the score in points (intervals of all: importance.csv; the largest of many are "
             "large by chance, too).", "", "| PCs of | used by | losses: component (change) | gains |",
             "| --- | --- | --- | --- |"]
    for p in pairs:
        change = 100 * np.array(p["importance"]["change"])
        order = np.argsort(change, kind="stable")
        ends = [", ".join(f"{i + 1} ({change[i]:+.1f})" for i in part if change[i] * sign > 0) or "-"
                for part, sign in ((order[:3], -1), (order[::-1][:3], 1))]
        lines.append(f"| {p['fit']} | {p['test']} | {ends[0]} | {ends[1]} |")
    return lines


def report_separability(result: dict) -> list[str]:
    """Lines about the linear separability of the tasks."""
    lines = ["## Linear separability of the tasks", "",
             f"Balanced accuracy on unseen identities, {result['images_per_task']} images a task, chance "
             f"{100 * result['chance']:.0f}. Pixel statistics know nothing of what an image shows; \"canon\": all "
             "images brought to one format first. Only what the tuned space leads by, paired by identity, is its own.",
             "",
             f"| space | {' | '.join(CLASSIFIERS.values())} | lead of tuned (logistic) |",
             "| --- " * (len(CLASSIFIERS) + 2) + "|"]
    for space, found in result["spaces"].items():
        cells = [interval(found[model]) + " (not converged)" * (not found["converged"][model]) for model in CLASSIFIERS]
        lines.append(f"| {space} | {' | '.join(cells)} | "
                     f"{interval(found.get('lead_of_tuned'), '+.1f')} |")
    few = {name: note for name, count in result["identities"].items() if (note := mistrust(count))}
    lines += ["", *(f"- {name}: {note}" for name, note in few.items())] if few else []
    pairwise = {key: v for key, v in result["spaces"]["tuned"]["pairwise"].items() if result["chance"] < 0.5}
    if pairwise:
        lines += ["", "Pairs of tasks, logistic regression:", "", f"| pair | {' | '.join(result['spaces'])} |",
                  "| --- " * (len(result["spaces"]) + 1) + "|"]
        lines += [f"| {key} | " + " | ".join(number(found["pairwise"][key]["value"])
                                             for found in result["spaces"].values()) + " |" for key in pairwise]
    if unseen := result["unseen_sources"]:
        names = list(unseen[0]["spaces"])
        lines += ["", "The same with a task's images from a source that the classifier was not fitted on (recall: of "
                  "these images):", "",
                  f"| task | source | images | {' | '.join(names)} |", "| --- " * (len(names) + 3) + "|"]
        for row in unseen:
            note = f" ({note})" if (note := mistrust(row["identities"])) else ""
            cells = [f"{interval(of)}, recall {100 * of['recall']:.1f}" + " (not converged)" * (not of["converged"])
                     for of in row["spaces"].values()]
            source = literal(row["source"]) + note
            lines.append(f"| {row['domain']} | {source} | {row['images']:,} | {' | '.join(cells)} |")
    return [*lines, "", *report_sources(result["sources"], result["spaces"]), ""]


def report_sources(result: dict[str, dict], spaces: Iterable[str]) -> list[str]:
    """Lines about how well the sources within each task are told apart."""
    names = [name for name in spaces if not name.endswith("canon")]
    lines = ["The source of an image as the label, within each task, on unseen identities: "
             f"{' / '.join(CLASSIFIERS.values())}. Where sources are told apart as well as tasks are, tasks may be "
             "told by their sources.", "",
             f"| task | sources (images) | chance | {' | '.join(names)} |", "| --- " * (len(names) + 3) + "|"]
    for domain, found in result.items():
        if why := found.get("why"):
            lines.append(f"| {domain} | not measured ({literal(why)}) |{' - |' * (len(names) + 1)}")
            continue
        notes = {name: mistrust(count) for name, count in found["identities"].items()}
        sources = [f"{literal(name)} ({count:,}{'; ' * bool(notes[name])}{notes[name]})"
                   for name, count in found["images"].items()]
        cells = [" / ".join(interval(found["spaces"][name][model]) for model in CLASSIFIERS) for name in names]
        lines.append(f"| {domain} | {', '.join(sources)} | {100 * found['chance']:.0f} | {' | '.join(cells)} |")
    return lines


def report_sharing(result: dict[str, dict], cka: dict[str, float | None]) -> list[str]:
    """Lines about what the tasks share, before and after."""
    lines = ["## What the tasks share", "",
             "Participation ratio: how many dimensions carry the variance. Scatter: of class means about the mean, "
             "over images about their class mean. CKA: debiased, linear, of the same images before and after "
             "fine-tuning.",
             "", "| space | task | participation ratio | PCs for 50 / 90 / 95 % | scatter | CKA with the untouched |",
             "| --- | --- | --- | --- | --- | --- |"]
    for weights, found in result.items():
        for name, t in found["tasks"].items():
            counts = " / ".join(str(t[f"components_for_{share}"]) for share in (50, 90, 95))
            alike = f"{cka[name]:.2f}" if weights == "tuned" and cka.get(name) is not None else ""
            lines.append(f"| {weights} | {name} | {t['participation_ratio']:.1f} | {counts} | "
                         f"{t['scatter_ratio'] or math.nan:.2f} | {alike} |")
    found = result["tuned"]
    if len(found["tasks"]) > 1:
        lines += ["", f"The first {found['k']} components of two tasks, tuned; by chance their overlap is "
                  f"{found['chance']:.2f}:", "",
                  "| a | b | overlap | angles: smallest, median, largest | variance of b in a | cosine of means |",
                  "| --- | --- | --- | --- | --- | --- |"]
        lines += [f"| {p['a']} | {p['b']} | {p['overlap']:.2f} | {p['smallest_angle']:.0f}°, {p['median_angle']:.0f}°, "
                  f"{p['largest_angle']:.0f}° | {p['explained']:.2f} | {p['mean_cosine']:.2f} |"
                  for p in found["pairs"] if p["a"] != p["b"]]
    return [*lines, ""]


def write_analysis(folder: Path, analysis: dict, curves: dict[str, list[dict]], components: list[dict],
                   points: list[dict]) -> str:
    """analysis.json, the tables, report.md and the figures; returns the report.

    Args:
        folder: RUN/analysis.
        analysis: the summary, all of analysis.json.
        curves: by weights, what `to_row` made.
        components: what `measure_components` found, with the weights.
        points: of the map.
    """
    domains, pairs = analysis["domains"], analysis["transfer"]["tuned"]["pairs"]
    headline = pairs[0]["k"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "analysis.json", analysis)
    write_csv(folder / "transfer.csv", [
        {"weights": weights, "kind": c["kind"], "fit": c["fit"], "number": c["number"], "test": c["test"], "k": k,
         "score": score, "kept": v, "low": low, "high": high} for weights, rows in curves.items() for c in rows
        for k, score, v, low, high in zip(*(c[key] for key in ("ks", "score", "kept", "low", "high")), strict=True)])
    write_csv(folder / "further.csv", [{"fit": p["fit"], "test": p["test"]} | row for p in pairs
                                       for row in p["further"]])
    write_csv(folder / "importance.csv", [
        {"fit": p["fit"], "test": p["test"], "component": i, "change": change, "low": low, "high": high}
        for p in pairs if "importance" in p
        for i, (change, low, high) in enumerate(zip(*p["importance"].values(), strict=True), 1)],
        ("fit", "test", "component", "change", "low", "high"))
    write_csv(folder / "dprime.csv", components)
    write_csv(folder / "map.csv", points)
    lines = [f"# {literal(analysis['run'])}", "", *report_tasks(analysis), "## Transfer of principal components", "",
             f"Share of (score - chance) that the first {headline} components of one task keep for another, in percent "
             "with 95 % intervals, resampled by identity; the score is rank-1 for people and the nearest class mean "
             "for objects, on identities that the components were not fitted on (-: even all components are not above "
             "chance). Vectors are centred by the mean of the task that was fitted on. All: every component; raw: "
             "without centring. k99 and k95: from so many components on 99 % and 95 % are kept; k99 / random's: "
             "the components' and that of random subspaces, both at the few k of the controls. Controls at k: random "
             "subspaces (centred as the components are), components of the untouched backbone, of all tasks pooled, "
             "the last k; own mean: centred by the mean of the task that is scored. A claim about components means "
             "something where they lead.", ""]
    for weights, result in analysis["transfer"].items():
        lines += report_transfer(result, weights)
    if analysis["separability"]:
        lines += report_separability(analysis["separability"])
        draw_separability(folder / "separability", analysis["separability"], domains)
    lines += report_sharing(analysis["sharing"], analysis["cka"])
    report = "\n".join(lines)
    write_atomically(folder / "report.md", lambda path: path.write_text(report))
    draw_transfer(folder / "transfer", curves["tuned"], domains, pairs)
    draw_deletion(folder / "deletion", curves["tuned"], domains, pairs)
    if "importance" in pairs[0]:
        draw_importance(folder / "importance", pairs, domains)
    draw_sharing(folder / "sharing", analysis["sharing"]["tuned"], domains)
    draw_spectrum(folder / "spectrum", components, domains)
    draw_map(folder / "map", points, domains, analysis["map"])
    return report
