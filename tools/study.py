"""The dose-response study of scripts/study.sh: choice of the learning rate, and gain against retention.

    python -m tools.study choose OUT     # the learning rate at which conclusions are drawn
    python -m tools.study report OUT     # study.csv, study.md, study.png

OUT holds a folder of runs for each learning rate of the backbone (the dose), OUT/lr-RATE.
"""

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from data_prep import DOMAINS, InputError, join_config, literal, read_lines, run_command, write_csv
from protocols.bootstrap import FEW, Estimate, interval, show
from protocols.results import HEADLINE, Group, Stages, group_runs, read_runs, read_stages
from reports.rows import as_table
from reports.tables import new_figure, save_figure, write_text

VALID = "valid"  # split of training identities that experts are compared on
KEPT = ("seen", "unseen", "shifts", "shapes")  # object classes of training, other classes, out of distribution, stimuli


def doses(out: Path) -> list[Path]:
    """The folders of runs, in order of learning rate."""
    try:
        folders = sorted(filter(Path.is_dir, out.glob("lr-*")), key=lambda path: float(path.name[3:]))
    except ValueError:
        raise InputError(f"{out}: a folder lr-RATE whose RATE is no number") from None
    if not folders:
        raise InputError(f"{out}: no folder lr-RATE in it; scripts/study.sh creates them")
    return folders


# ---------------------------------------------------------------- the rule


def expert_scores(folder: Path) -> dict[str, float]:
    """Same/different AUC of DOMAIN/valid at the end of that domain's experts, averaged over them."""
    scores: dict[str, list[float]] = {}
    for path in sorted(folder.glob("*-images-s*/probe.jsonl")):
        domains, lines = join_config(path.parent / "config.json")["domains"], read_lines(path)
        score = lines[-1].get("auc", {}).get(f"{domains[0]}/{VALID}") if lines and len(domains) == 1 else None
        if isinstance(score, float) and (path.parent / "done.json").exists():
            scores.setdefault(domains[0], []).append(score)
    return {domain: float(np.mean(values)) for domain, values in scores.items()}


def choose_rate(out: Path) -> tuple[str, list[str]]:
    """The rate whose experts score best on validation identities, mean over the domains; and a table of the scores.

    Runs of several tasks are not used, so that the choice is independent of the comparisons that the study makes.
    """
    tables = {folder.name[3:]: expert_scores(folder) for folder in doses(out)}
    domains = [domain for domain in DOMAINS if any(domain in scores for scores in tables.values())]
    for rate, scores in tables.items():
        if missing := [domain for domain in domains or ["DOMAIN"] if domain not in scores]:
            raise InputError(f"{out}/lr-{rate}: no finished expert with a quick evaluation of {missing[0]}/{VALID}: "
                             "run scripts/study.sh again")
        scores["mean"] = float(np.mean(list(scores.values())))
    best, columns = max(tables, key=lambda rate: tables[rate]["mean"]), [*domains, "mean"]
    return best, as_table(["learning rate", *columns], [
        [rate + " (chosen)" * (rate == best), *(f"{100 * scores[column]:.1f}" for column in columns)]
        for rate, scores in tables.items()])


# ---------------------------------------------------------------- the outcome


@dataclass
class Point:
    """A recipe at a dose."""

    rate: str
    recipe: str  # the schedule with its variant, or an expert's domain
    seeds: int
    # as fractions: "gain" over the untouched backbone, mean over the tasks; "gain domain/split"; and of the KEPT, "kept
    # seen", the retention of object classification
    figures: dict[str, Estimate]


def mean_of(estimates: list[Estimate]) -> Estimate:
    """Mean of estimates, and of their resamplings."""
    return Estimate(float(np.mean([one.value for one in estimates])), np.mean([one.draws for one in estimates], axis=0))


def recipe_of(name: str) -> str:
    """`A`, `sequential+replay`, `face_hq-images`, ... from the name of a run of scripts/grid.sh: MODEL-RECIPE-sSEED."""
    words = name.rpartition("-s")[0].split("-")
    return "-".join(words[-2:]) if words[-1] in ("images", "exposure") else words[-1]


def find_splits(groups: list[Group]) -> tuple[set[str], set[str]]:
    """Object splits with classes absent from the training of runs of several tasks; those of a forced choice."""
    rows = [row for group in groups for row, _ in group.runs[0].scored["tuned"].rows.values()]
    return {row.split for row in rows if row.unseen}, {row.split for row in rows if row.kind == "choice"}


def make_point(rate: str, group: Group, unseen: set[str], stimuli: set[str]) -> Point:
    """Gain and retention of a group of seeds; `unseen`, `stimuli`: as `find_splits`.

    Splits of fewer than FEW classes are excluded from retention, because their wide intervals would hide all else.
    """
    tasks = group.leads(group, "tuned", "foundation")
    by_domain = [[lead for key, lead in tasks.items() if key[0] == domain] for domain in DOMAINS]
    gains = [mean_of(leads) for leads in by_domain if leads]
    figures = {"gain": mean_of(gains)} if gains else {}
    figures |= {f"gain {'/'.join(key)}": lead for key, lead in tasks.items()}
    by_kind: dict[str, dict[str, Estimate]] = {kind: {} for kind in KEPT}
    for key, figure in group.rows("tuned", lambda row: row.kind == "retention" and row.domain == "object" and (
            row.readout, row.measure) == HEADLINE["classification"]).items():
        row = group.runs[0].scored["tuned"].rows[key][0]
        kind = ("shapes" if row.split in stimuli else "shifts" if row.ood else "unseen" if row.split in unseen
                else "seen")
        few = 0 < row.identities < FEW
        if not few and (row.unseen or row.split not in by_kind[kind]):  # only unseen classes, where scored
            by_kind[kind][row.split] = figure
    figures |= {f"kept {kind}": mean_of(list(of.values())) for kind, of in by_kind.items() if of}
    return Point(rate, recipe_of(group.runs[0].name), group.seeds, figures)


def stage_lines(folder: Path) -> list[list[str]]:
    """For every sequential run, each task before training, after its own stage and at the end (AUC of --eval-every)."""
    lines = []
    for path in sorted(folder.glob("*-sequential*/probe.jsonl")):
        stages: Stages | None = read_stages(path.parent, config := join_config(path.parent / "config.json"))
        for task, scores in zip(stages.tasks, np.array(stages.scores).T, strict=True) if stages else ():
            domain = task.split("/")[0]
            if domain in stages.names and domain != config["order"][-1]:
                start, after, end = (100 * scores[i] for i in (0, stages.names.index(domain), -1))
                lines.append([folder.name[3:], literal(path.parent.name), literal(task),
                              *(f"{score:.1f}" for score in (start, after, end)), f"{end - after:+.1f}"])
    return lines


def report_lines(points: list[Point], rule: list[str], stages: list[list[str]]) -> list[str]:
    """The page of the study."""

    def cell(figure: Estimate | None, form: str) -> str:
        return interval(show(figure), form) if figure else ""

    lines = ["# Gain and retention by learning rate", "", "Same/different AUC (%) of the experts on validation "
             "identities, by which the rate was chosen:", "", *rule, "",
             "Gain: mean over the tasks, in points over the untouched backbone. Kept: retention (%) of nearest-mean "
             "accuracy on objects: of classes seen in training, of unseen classes, on shifts, and on stimuli of a "
             f"forced choice; means over the splits of at least {FEW} classes or stimuli. 95 % intervals.", "",
             *as_table(["learning rate", "recipe", "seeds", "gain", *(f"kept, {kind}" for kind in KEPT)], [
                 [point.rate, literal(point.recipe), point.seeds, cell(point.figures.get("gain"), ".1f"),
                  *(cell(point.figures.get(f"kept {kind}"), ".0f") for kind in KEPT)] for point in points])]
    if stages:
        lines += ["", "Earlier tasks of sequential runs (same/different AUC, %):", "", *as_table(
            ["learning rate", "run", "task", "untouched", "after its own stage", "at the end", "change"], stages)]
    return lines


def draw(path: Path, points: list[Point], chosen: str) -> None:
    """One point per recipe and rate, one colour and line per recipe; intervals at the chosen rate."""
    shown = [point for point in points if "gain" in point.figures and "-" not in point.recipe]
    kinds = [kind for kind in KEPT if any(f"kept {kind}" in point.figures for point in shown)]
    recipes = list(dict.fromkeys(point.recipe for point in shown))
    size = {rate: 25 + 25 * i for i, rate in enumerate(dict.fromkeys(point.rate for point in shown))}
    rows = max(1, -(-len(kinds) // 2))
    figure, axes = new_figure(rows, 2, (11, 4.4 * rows), sharex=True, layout="constrained")
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for number, recipe in enumerate(recipes):
            series = [(point.rate, point.figures["gain"], point.figures[f"kept {kind}"]) for point in shown
                      if point.recipe == recipe and f"kept {kind}" in point.figures]
            x, y = ([100 * ends[i].value for ends in series] for i in (1, 2))
            colour = f"C{number % 10}"
            axis.plot(x, y, "-", color=colour, lw=1, alpha=0.7)
            axis.scatter(x, y, s=[size[rate] for rate, *_ in series], color=colour, label=recipe, zorder=3)
            for rate, gain, kept in series:
                if rate == chosen:
                    axis.errorbar(100 * gain.value, 100 * kept.value, color=colour, lw=0.8, capsize=2,
                                  xerr=[[100 * (gain.value - gain.low)], [100 * (gain.high - gain.value)]],
                                  yerr=[[100 * (kept.value - kept.low)], [100 * (kept.high - kept.value)]])
        axis.axhline(100, color="0.6", lw=0.8, ls=":")
        axis.axvline(0, color="0.6", lw=0.8, ls=":")
        axis.set(title={"seen": "object classes of training", "unseen": "object classes unseen in training",
                        "shifts": "shifts of the images", "shapes": "shapes: edges, silhouettes"}[kind],
                 xlabel="mean gain on the tasks (points)", ylabel="retention (%)")
    for axis in axes.flat[len(kinds):]:
        axis.remove()
    if shown:
        handles = dict(zip(*axes.flat[0].get_legend_handles_labels()[::-1], strict=True))
        figure.legend(handles.values(), handles, fontsize=8, loc="outside right upper",
                      title=f"larger: higher rate\nbars: chosen rate {chosen}", title_fontsize=8)
    save_figure(path, figure)


# ---------------------------------------------------------------- command line


@click.group(help=__doc__.split("\n\n")[0])
def main() -> None:
    pass


@main.command(help="Print the learning rate whose experts are best on validation identities; OUT/rate.md shows why.")
@click.argument("out", type=click.Path(path_type=Path))
def choose(out: Path) -> None:
    best, lines = choose_rate(out)
    write_text(out / "rate.md", "\n".join(lines) + "\n")
    click.echo(best)


@main.command(help="Write study.md, study.csv and study.png into OUT.")
@click.argument("out", type=click.Path(path_type=Path))
def report(out: Path) -> None:
    chosen, rule = choose_rate(out)
    groups = {folder.name[3:]: group_runs(read_runs(folder)) for folder in doses(out)}
    splits = find_splits([group for at_rate in groups.values() for group in at_rate])
    points = [make_point(rate, group, *splits) for rate, at_rate in groups.items() for group in at_rate]
    stages = [line for folder in doses(out) for line in stage_lines(folder)]
    lines = report_lines(points, rule, stages)
    write_text(out / "study.md", "\n".join(lines) + "\n")
    columns = ("rate", "recipe", "seeds", "quantity", "value", "low", "high")
    write_csv(out / "study.csv", [
        dict(zip(columns, (point.rate, point.recipe, point.seeds, name, one.value, one.low, one.high), strict=True))
        for point in points for name, one in point.figures.items()], columns)
    draw(out / "study.png", points, chosen)
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
