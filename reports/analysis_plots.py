"""The figures of an analysis, as PDF and PNG."""

from itertools import pairwise, product
from pathlib import Path

import numpy as np

from data_prep import DOMAIN_COLOURS, write_atomically
from protocols.explore import Explored
from protocols.results import Pair, Separability
from protocols.separability import CLASSIFIERS
from protocols.sharing import Sharing
from protocols.subspaces import RANDOM_SEEDS, Curve
from reports import tables

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (  # Okabe-Ito
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
GREY = "#999999"
SPACE_COLOURS = {"tuned": BLUE, "foundation": GREY, "pixels": GREEN}


def new_figure(rows: int, columns: int, size: tuple[float, float], **options):
    """A figure and its axes [rows, columns]; size in inches, as printed."""
    import matplotlib

    # fonttype 42: text stays text in a PDF
    matplotlib.rcParams.update({"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 8,
                                "xtick.labelsize": 7, "ytick.labelsize": 7, "pdf.fonttype": 42,
                                "axes.spines.top": False, "axes.spines.right": False})
    return tables.new_figure(rows, columns, size, layout="constrained", **options)


def save_figure(figure, path: Path, legend: dict[str, dict] | None = None, columns: int = 4, patches: bool = False
                ) -> None:
    """Write PATH.pdf and PATH.png, with one legend above all axes: style of a line (or patch) by label."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if legend:
        handles = [Patch(label=label, **style) if patches else Line2D([], [], label=label, **style)
                   for label, style in legend.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    for ending in (".pdf", ".png"):
        write_atomically(path.with_name(path.name + ending),
                         lambda temporary, ending=ending: figure.savefig(temporary, format=ending[1:], dpi=200))
    plt.close(figure)


def new_grid(names: list[str], use: str, height: float, least: float):
    """A figure of all pairs of tasks and its axes by pair: a row a fitted task, a column one that is `use`d."""
    K = len(names)
    figure, axes = new_figure(K, K, (max(1.75 * K, least), height * K + 1), sharex=True, sharey=True)
    for ax, row, name in zip(axes[0], axes, names, strict=True):
        ax.set_title(f"{use} {name}")
        row[0].set_ylabel(f"components of\n{name}")
    return figure, dict(zip(product(names, repeat=2), axes.flat, strict=True))


def heat_map(ax, values: np.ndarray, names: list[str], title: str, limits: tuple[float, float], form: str) -> None:
    """A matrix with its numbers written in; NaN stays white."""
    ax.imshow(values, cmap="cividis", vmin=limits[0], vmax=limits[1])
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if np.isfinite(value):
                dark = value < limits[0] + 0.55 * (limits[1] - limits[0])
                ax.text(j, i, format(value, f"z{form}"), ha="center", va="center", color="white" if dark else "black")
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set_yticks(range(len(names)), names)
    ax.set_title(title)
    ax.spines[:].set_visible(False)


def find_measured(pairs: list[Pair]) -> set[tuple[str, str]]:
    """The pairs of tasks (fit, test) whose full space is above chance: shares of the others are noise."""
    return {(pair.fit, pair.test) for pair in pairs if pair.above_chance}


def leave_empty(ax) -> None:
    """Say why nothing is drawn."""
    ax.text(0.5, 0.5, "all components are\nnot above chance", transform=ax.transAxes, ha="center", va="center",
            color="#666666")


def draw_transfer(path: Path, curves: list[Curve], names: list[str], pairs: list[Pair]) -> None:
    """The grid of transfer curves: rows are the task whose components are used, columns the task that uses them."""
    styles = {"components": ("first k of the row's task", BLUE, "-"),
              "own": ("of the column's own", BLACK, ":"),
              "foundation": ("of the untouched backbone", GREY, "-"),
              "own mean": ("centred by the column's mean", SKY, "-"),
              "pooled": ("of all tasks pooled", GREEN, "-."),
              "random": (f"random ({RANDOM_SEEDS}, range)", RED, "--"),
              "bottom": ("last k of the row's task", PURPLE, (0, (3, 1, 1, 1)))}
    measured, limit = find_measured(pairs), curves[0].ks[-1]
    # a task may score higher without its first components
    most = 100 * max((c.kept.max() for c in curves if (c.fit, c.test) in measured), default=1)
    figure, axes = new_grid(names, "used by", 1.6, 5)
    for (fit, test), ax in axes.items():
        ax.set(xscale="log", ylim=(-10, 5 + min(max(most, 107), 150)), xlim=(1, limit))
        if (fit, test) not in measured:
            leave_empty(ax)
            continue
        for kind, (_, colour, style) in styles.items():
            name, origin = {"own": ("components", test), "pooled": ("pooled", "all")}.get(kind, (kind, fit))
            drawn = [c for c in curves if (c.kind, c.fit, c.test) == (name, origin, test)]
            if not drawn or (kind in ("own", "own mean") and fit == test):  # the same curve again
                continue
            many = 100 * np.array([c.kept for c in drawn])
            ax.plot(drawn[0].ks, many.mean(0), color=colour, ls=style, lw=1.4 if kind == "components" else 1)
            if kind == "random":
                ax.fill_between(drawn[0].ks, many.min(0), many.max(0), color=colour, alpha=0.25, lw=0)
            if kind == "components":
                ax.fill_between(drawn[0].ks, *100 * drawn[0].interval(), color=colour, alpha=0.2, lw=0)
        ax.axhline(99, color="k", lw=0.6, ls=(0, (1, 2)))
        ax.axvline(100, color="k", lw=0.6, ls=(0, (1, 2)))
    figure.supxlabel(f"number of components k{' (dotted: 100)' * (limit > 100)}, up to the {limit:,} that the fitted "
                     "images determine", fontsize=8)
    figure.supylabel("kept of (score − chance), % (dotted: 99)", fontsize=8)
    save_figure(figure, path, {label: {"color": colour, "ls": style} for label, colour, style in styles.values()}, 3)


def draw_deletion(path: Path, curves: list[Curve], names: list[str], pairs: list[Pair]) -> None:
    """What is left of each task without the first k components of each task."""
    measured = find_measured(pairs)
    figure, axes = new_figure(1, len(names), (max(1.75 * len(names), 4.5), 2.3), sharex=True, sharey=True)
    for ax, test in zip(axes[0], names, strict=True):
        deleted = [c for c in curves if (c.kind, c.test) == ("deleted", test) and (c.fit, test) in measured]
        for c in deleted:
            ax.plot(c.ks, 100 * c.kept, color=DOMAIN_COLOURS[c.fit], lw=1.2)
        if deleted:
            ax.axhline(100, color="k", lw=0.6, ls=(0, (1, 2)))
        else:
            leave_empty(ax)
        ax.set(xscale="log", title=f"scored: {test}", xlabel="first components deleted")
    axes[0][0].set_ylabel("kept of (score − chance), %")
    save_figure(figure, path, {f"components of {name}": {"color": DOMAIN_COLOURS[name]} for name in names})


def draw_importance(path: Path, explored: list[Explored], names: list[str]) -> None:
    """Change of each task's score without one component of each task: rows fitted, columns scored."""
    figure, axes = new_grid(names, "scored:", 1.1, 4.5)
    for pair in explored:
        ax = axes[pair.fit, pair.test]
        change, low, high = (100 * np.array(pair.importance[key]) for key in ("change", "low", "high"))
        ax.bar(np.arange(1, len(change) + 1), change, 1, color=np.where((low > 0) | (high < 0), BLUE, "#BBBBBB"))
        ax.axhline(0, color="k", lw=0.5)
        ax.set(xlim=(0.5, len(change) + 0.5))
        # the first few may count a hundred times as much as the rest
        ax.set_yscale("symlog", linthresh=1, linscale=1)
    low, high = ax.get_ylim()
    ticks = [t for t in (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100) if low <= t <= high]
    ax.set_yticks(ticks, [f"{t:+d}" if t else "0" for t in ticks], minor=False)
    ax.minorticks_off()
    figure.supxlabel("the component left out", fontsize=8)
    figure.supylabel("change of the score, points (linear between −1 and 1)", fontsize=8)
    save_figure(figure, path, {"the 95 % interval excludes 0": {"color": BLUE}, "it does not": {"color": "#BBBBBB"}}, 2,
                patches=True)


def draw_separability(path: Path, result: Separability, names: list[str]) -> None:
    """Balanced accuracy of telling the tasks apart: each space beside its controls; and every pair of tasks."""
    figure, axes = new_figure(1, 2, (7, 2.8), width_ratios=[1.5, 1])
    ax, labels, hatches = axes[0][0], [], (None, "////", "....")
    for i, (name, space) in enumerate(result.spaces.items()):
        base = name.removesuffix(" canon")
        for j, model in enumerate(CLASSIFIERS):
            v = getattr(space, model)
            error = [[100 * max(v["value"] - v["low"], 0)], [100 * max(v["high"] - v["value"], 0)]]
            ax.bar(i + 0.28 * (j - 1), 100 * v["value"], 0.26, yerr=error, capsize=1.5, color=SPACE_COLOURS[base],
                   hatch=hatches[j], edgecolor="white", error_kw={"lw": 0.8})
        base = {"pixels": "pixel\nstatistics", "foundation": "untouched"}.get(base, base)
        labels.append(base + ("\none format" if name.endswith("canon") else ""))
    ax.axhline(100 * result.chance, color="k", ls=":", lw=1)
    ax.set_xticks(range(len(labels)), labels, fontsize=6.5)
    ax.set(ylim=(0, 105), ylabel="balanced accuracy, %",
           title=f"all tasks (dotted: chance {100 * result.chance:.0f})")
    matrix = np.full((len(names), len(names)), np.nan)
    for key, v in result.spaces["tuned"].pairwise.items():
        a, b = (names.index(name) for name in key.split("/"))
        matrix[a, b] = matrix[b, a] = 100 * v["value"]
    heat_map(axes[0][1], matrix, names, "pairs of tasks, tuned (logistic), %", (50, 100), ".1f")
    save_figure(figure, path, {label: {"facecolor": "#666666", "edgecolor": "white", "hatch": hatch}
                               for hatch, label in zip(hatches, CLASSIFIERS.values(), strict=True)}, patches=True)


def draw_sharing(path: Path, result: Sharing, names: list[str]) -> None:
    """Overlap of the tasks' subspaces, the variance that they explain of each other, the cosines of their means."""
    figure, axes = new_figure(1, 3, (7, 2.7))
    panels = {"overlap": f"overlap, k = {result.k} (chance {result.chance:.2f})",
              "explained": "variance of column\nexplained by row", "mean_cosine": "cosine of the task means"}
    for ax, (key, title) in zip(axes[0], panels.items(), strict=True):
        values = np.array([getattr(p, key) for p in result.pairs]).reshape(len(names), len(names))
        heat_map(ax, values, names, title, (-1 if key == "mean_cosine" else 0, 1), ".2f")
    save_figure(figure, path)


def draw_spectrum(path: Path, components: list[dict], names: list[str]) -> None:
    """Cumulative variance of each task; and how single components of a task separate its identities and the task."""
    figure, axes = new_figure(1, 3, (7, 2.6))
    for weights, style in (("foundation", ":"), ("tuned", "-")):
        for name in names:
            total = 100 * np.cumsum([r["variance"] for r in components
                                     if r["weights"] == weights and r["fit"] == r["test"] == name])
            axes[0][0].plot(np.arange(1, len(total) + 1), total, color=DOMAIN_COLOURS[name], ls=style, lw=1.2)
    axes[0][0].set(xscale="log", ylim=(0, 101), title="variance of the first k, %", xlabel="components k")
    for ax, key, title in ((axes[0][1], "identity_dprime", "d′ same − different identity"),
                           (axes[0][2], "task_dprime", "|d′| task − other tasks")):
        for name in names:
            of = [r for r in components if r["weights"] == "tuned" and r["fit"] == r["test"] == name]
            values = np.array([r[key] for r in of], dtype=float)
            values = np.abs(values) if key == "task_dprime" else values
            # single components are noisy: the mean over each of some thirty ranges of equal width on the axis
            edges = np.unique(np.geomspace(1, len(values) + 1, 31).astype(int))
            means = [values[a - 1 : b - 1].mean() for a, b in pairwise(edges)]
            ax.plot(np.sqrt(edges[:-1] * (edges[1:] - 1)), means, color=DOMAIN_COLOURS[name], lw=1.2)
        ax.set(xscale="log", title=title, xlabel="component of the task itself")
    save_figure(figure, path, {name: {"color": DOMAIN_COLOURS[name]} for name in names}
                | {"tuned": {"color": "k"}, "untouched": {"color": "k", "ls": ":"}}, 6)


def draw_map(path: Path, points: list[dict], names: list[str], method: str) -> None:
    """The map coloured by task; beside it each task alone with its most frequent identities in colour."""
    title = {"tsne": "t-SNE", "pca": "PCA"}[method]
    K = len(names)
    figure, axes = new_figure(1, K + 1, (1.75 * (K + 1), 2.3), sharex=True, sharey=True)
    xy = np.array([(p["x"], p["y"]) for p in points])
    task, identity = np.array([p["task"] for p in points]), np.array([p["identity"] for p in points])
    colours, markers = [BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE], "o^sDvP*X"
    for name in names:
        axes[0][0].scatter(*xy[task == name].T, s=3, color=DOMAIN_COLOURS[name], lw=0)
    axes[0][0].set_title(f"{title}, by task")
    for ax, name in zip(axes[0][1:], names, strict=True):
        ax.scatter(*xy[task != name].T, s=1, color="#E5E5E5", lw=0)
        ax.scatter(*xy[(task == name) & (identity < 0)].T, s=2, color="#A0A0A0", lw=0)
        for i, (colour, marker) in enumerate(zip(colours, markers, strict=True)):
            ax.scatter(*xy[(task == name) & (identity == i)].T, s=9, color=colour, marker=marker, lw=0)
        ax.set_title(f"{name}, by identity")
    for ax in axes[0]:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    dot = {"ls": "", "marker": "o"}
    save_figure(figure, path, {name: dot | {"ms": 4, "color": DOMAIN_COLOURS[name]} for name in names} | {
        "other identities (eight have colours and shapes)": dot | {"ms": 3, "color": "#A0A0A0"}}, K + 1)
