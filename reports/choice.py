"""People and models in a forced choice: the section of the report and its plot."""

from pathlib import Path

import numpy as np

from data_prep import literal
from protocols.choice import Decisions, agreement
from protocols.humans import UNSEEN
from protocols.results import Row
from reports.plots import COLOURS
from reports.rows import show_value
from reports.tables import human_verdict, new_figure, save_figure

Figures = dict[tuple[str, str], list[Row]]  # by readout and measure; of observers one row each


def choice_rows(rows: list[Row]) -> dict[str, dict[str, dict[str, Figures]]]:
    """{"domain/split": {rule: {weights: figures}}} of the human choices and the comparison with models.

    The first rule of a split is for the stimuli of the model's categories, all conditions together.
    """
    by_split: dict = {}
    for row in rows:
        if row.kind == "human choices":
            by_rule = by_split.setdefault(f"{row.domain}/{row.split}", {})
            figures = by_rule.setdefault(row.rule, {}).setdefault(row.weights, {})
            figures.setdefault((row.readout, row.measure), []).append(row)
    return by_split


def show_choices(rows: list[Row]) -> list[str]:
    """Lines of report.md; none without human choices."""
    by_split, people, models = choice_rows(rows), [], []
    if not by_split:
        return []
    shape = {(f"{row.domain}/{row.split}", row.weights, row.readout): show_value(row)
             for row in rows if row.kind == "choice" and row.measure == "shape share"}
    for name, rule, by_weights in ((name, *one) for name, by_rule in by_split.items() for one in by_rule.items()):
        stimuli = f"{literal(name)}: {literal(rule)}"
        for weights, figures in by_weights.items():
            def value(readout: str, measure: str, figures: Figures = figures) -> str:
                return "".join(map(show_value, figures.get((readout, measure), [])))

            mean, each = figures["people", "accuracy"][0], [row.value for row in figures["observer", "accuracy"]]
            models += [
                f"| {stimuli} | {readout} | {weights} | {value(readout, 'accuracy')} | {100 * row.chance:.1f} "
                f"| {value(readout, 'lead')} | {100 * figures[readout, 'beaten'][0].value:.0f} % of {len(each)} "
                f"| {value(readout, 'observed consistency')} | {value(readout, 'error consistency')} "
                f"| {shape.get((name, weights, readout), '')} | {human_verdict(figures[readout, 'lead'][0])} |"
                for (readout, measure), (row, *_) in figures.items() if (readout, measure) == (row.readout, "accuracy")
                and readout not in ("people", "observer")]
        people.append(f"| {stimuli} | {mean.count} | {len(each)} | {show_value(mean)} | {100 * min(each):.1f} to "
                      f"{100 * max(each):.1f} | {100 * mean.chance:.1f} | {value('people', 'observed consistency')} "
                      f"| {value('people', 'error consistency')} | {value('people', 'shape share')} |")
    return ["", "## Forced choice beside people", "", "People and model name the category of identical stimuli, those "
            "of the model's categories; people choose among all categories, so their chance differs. Error consistency "
            "is kappa x 100: 0 where two err independently of each other, 100 where they err on the same stimuli; over "
            "several conditions it also reflects their difficulty. Shape share: where the cues conflict, the share of "
            "shape among the choices of shape or texture. Intervals resample the stimuli, not the observers.", "",
            "| stimuli | count | observers | accuracy: mean | range | chance | observed consistency among people "
            "| error consistency among people | shape share |", "| --- " * 9 + "|", *people, "",
            "| stimuli | readout | weights | accuracy | chance | minus people | beaten | observed consistency with "
            "people | error consistency with people | shape share | |", "| --- " * 11 + "|", *models]


def draw_choices(folder: Path, rows: list[Row], curves: dict[str, dict]) -> list[tuple[str, str]]:
    """choices.png, if people chose: title and name. One row per split: accuracy, and error consistency of each pair."""
    (folder / "choices.png").unlink(missing_ok=True)
    panels = [key for key, curve in next(iter(curves.values())).items() if "decisions" in curve]
    if not panels:
        return []
    figure, axes = new_figure(len(panels), 2, (12.5, 5.2 * len(panels)), layout="constrained")
    for (left, right), key in zip(axes, panels, strict=True):
        draw_accuracy(left, key, next(iter(choice_rows(rows)[key].values())))
        draw_consistency(right, {weights: by_split[key]["decisions"] for weights, by_split in curves.items()})
    save_figure(folder / "choices.png", figure)
    return [("Forced choice: accuracy of people and model, and error consistency of each pair", "choices.png")]


def draw_accuracy(ax, key: str, by_weights: dict[str, Figures]) -> None:
    """Observers as points beside their mean, then each readout before and after; each over its own chance."""
    first = next(iter(by_weights.values()))
    each = [100 * row.value for row in first["observer", "accuracy"]]
    readouts = list(dict.fromkeys(readout for figures in by_weights.values() for readout, measure in figures
                                  if measure == "lead"))
    bars = [(0.0, "people", first["people", "accuracy"][0])]
    bars += [(1 + i + (j - (len(by_weights) - 1) / 2) * 0.4, weights, figures[readout, "accuracy"][0])
             for i, readout in enumerate(readouts) for j, (weights, figures) in enumerate(by_weights.items())
             if (readout, "accuracy") in figures]
    for x, name, row in bars:
        error = 100 * np.array([[row.value - row.low], [row.high - row.value]])
        ax.bar(x, 100 * row.value, 0.38, yerr=np.maximum(error, 0), capsize=3, color=COLOURS[name], label=name)
        ax.plot([x - 0.25, x + 0.25], [100 * row.chance] * 2, "k:", lw=1, label="chance")
    ax.plot(np.linspace(-0.15, 0.15, len(each)) if len(each) > 1 else [0], each, "k.", ms=5, label="one observer")
    ax.set_xticks(range(1 + len(readouts)), ["people", *readouts], parse_math=False)
    ax.set(ylim=(0, 100), ylabel="accuracy, percent, 95 % interval")
    ax.set_title(f"{key}: {bars[0][2].count} stimuli", parse_math=False)
    marks = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # each label once
    ax.legend(marks.values(), marks.keys(), fontsize=8, ncols=len(marks), loc="upper center",
              bbox_to_anchor=(0.5, -0.06), frameon=False)


def draw_consistency(ax, by_weights: dict[str, Decisions]) -> None:
    """The matrix of kappa: observers, then each readout before and after."""
    one = next(iter(by_weights.values()))
    names = [*one.people, *(f"{readout}, {weights}" for weights, of in by_weights.items() for readout in of.models)]
    chosen = np.array([*one.people.values(), *(a for of in by_weights.values() for a in of.models.values())])
    kappa = agreement(chosen == one.truth, chosen != UNSEEN, np.ones(len(one.truth)))[2]
    np.fill_diagonal(kappa, np.nan)
    image = ax.imshow(kappa, cmap="RdBu_r", vmin=-1, vmax=1)
    for i, j in np.argwhere(np.isfinite(kappa)) if len(names) <= 24 else ():
        ax.text(j, i, f"{kappa[i, j]:.2f}".replace("0.", "."), ha="center", va="center", fontsize=5,
                color="white" if abs(kappa[i, j]) > 0.7 else "black")
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=6, parse_math=False)
    ax.set_yticks(range(len(names)), names, fontsize=6, parse_math=False)
    ax.axhline(len(one.people) - 0.5, color="black", lw=0.8)
    ax.axvline(len(one.people) - 0.5, color="black", lw=0.8)
    ax.set_title("error consistency (kappa)")
    ax.figure.colorbar(image, ax=ax, shrink=0.7)
