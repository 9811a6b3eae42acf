"""People and models in a forced choice: the section of the report and its plot."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from data_prep import literal
from protocols.choice import Decisions, agreement
from protocols.humans import UNSEEN
from protocols.results import Row
from reports.plots import Bars, draw_groups, panels_of
from reports.rows import as_table, show_value
from reports.tables import human_verdict, new_figure, save_figure

CONSISTENCIES = ("observed consistency", "error consistency")
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
            shown = defaultdict(str, {key: "".join(map(show_value, of)) for key, of in figures.items()})
            mean, each = figures["people", "accuracy"][0], [row.value for row in figures["observer", "accuracy"]]
            for readout in [readout for readout, measure in figures if measure == "lead"]:
                row, lead, beaten = (figures[readout, measure][0] for measure in ("accuracy", "lead", "beaten"))
                alike = [shown[readout, measure] for measure in CONSISTENCIES]
                models.append((
                    stimuli, readout, weights, show_value(row), f"{100 * row.chance:.1f}", show_value(lead),
                    f"{100 * beaten.value:.0f} % of {len(each)}", *alike, shape.get((name, weights, readout), ""),
                    human_verdict(lead)))
        people.append((stimuli, mean.count, len(each), show_value(mean),
                       f"{100 * min(each):.1f} to {100 * max(each):.1f}", f"{100 * mean.chance:.1f}",
                       *(shown["people", measure] for measure in (*CONSISTENCIES, "shape share"))))
    return ["", "## Forced choice beside people", "", "People and model name the category of identical stimuli, those "
            "of the model's categories; people choose among all categories, so their chance differs. Error consistency "
            "is kappa x 100: 0 where two err independently of each other, 100 where they err on the same stimuli; over "
            "several conditions it also reflects their difficulty. Shape share: where the cues conflict, the share of "
            "shape among the choices of shape or texture. Intervals resample the stimuli, not the observers.", "",
            *as_table(("stimuli", "count", "observers", "accuracy: mean", "range", "chance",
                       *(f"{measure} among people" for measure in CONSISTENCIES), "shape share"), people), "",
            *as_table(("stimuli", "readout", "weights", "accuracy", "chance", "minus people", "beaten",
                       *(f"{measure} with people" for measure in CONSISTENCIES), "shape share", "verdict"), models)]


def draw_choices(folder: Path, rows: list[Row], curves: dict[str, dict]) -> list[tuple[str, str]]:
    """choices.png, if people chose: title and name. One row per split: accuracy, and error consistency of each pair."""
    (folder / "choices.png").unlink(missing_ok=True)
    if not (panels := panels_of(curves, "decisions")):
        return []
    figure, axes = new_figure(len(panels), 2, (12.5, 5.2 * len(panels)), layout="constrained")
    for (left, right), key in zip(axes, panels, strict=True):
        draw_groups(left, accuracy_bars(next(iter(choice_rows(rows)[key].values()))), "one observer")
        decisions = {weights: by_split[key]["decisions"] for weights, by_split in curves.items()}
        left.set_xlabel(f"{key}: accuracy on {len(next(iter(decisions.values())).truth)} stimuli", parse_math=False)
        draw_consistency(right, decisions)
    save_figure(folder / "choices.png", figure)
    return [("Forced choice: accuracy of people and model, and error consistency of each pair", "choices.png")]


def accuracy_bars(by_weights: dict[str, Figures]) -> list[Bars]:
    """The observers and their mean, then each readout before and after; each over its own chance."""
    *_, last = by_weights.values()  # the tuned backbone has one readout more; people are the same
    (people,), each = last["people", "accuracy"], [row.value for row in last["observer", "accuracy"]]
    groups = [("people", {"people": people}, people.chance, each, [])]
    for readout in [readout for readout, measure in last if measure == "lead"]:
        pair = {weights: figures[readout, "accuracy"][0] for weights, figures in by_weights.items()
                if (readout, "accuracy") in figures}
        groups.append((readout, pair, next(iter(pair.values())).chance, [], []))
    return groups


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
