"""The figures of an evaluation: ROC, CMC, score distributions, bars, sheets of pictures."""

from pathlib import Path

import numpy as np

from data_prep.format import Split
from models.runs import write_atomically
from protocols.humans import human_rows
from protocols.search import make_members, score_blocks
from protocols.templates import SCORE_BINS
from reports.rows import Row, chance, headlines
from reports.tables import Published

HIT, MISS = "#009E73", "#D55E00"  # frames of what is right and wrong
COLOURS = {"foundation": "#999999", "tuned": "#0072B2", "people": "#E69F00"}  # Okabe-Ito


def draw_figures(folder: Path, rows: list[Row], curves: dict[str, dict], splits: list[Split],
                 published: list[tuple[Published, str, Row | None]]) -> list[tuple[str, str]]:
    """bars.png, roc.png (log FAR), cmc.png and scores.png, where there is something to draw: title and name of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [("Figures before and after, beside people and published experts", "bars.png")]
    draw_bars(plt, folder / "bars.png", rows, splits, published)
    for kind, name, x_label, y_label in (("far", "roc", "FAR", "TAR"), ("cmc", "cmc", "rank", "identification rate")):
        panels = [key for key, curve in next(iter(curves.values())).items() if kind in curve]
        if not panels:
            continue
        figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
        for ax, key in zip(axes[0], panels, strict=True):
            for weights, by_split in curves.items():
                curve = by_split[key]
                if kind == "far":
                    far = np.maximum(curve["far"], 1e-7)
                    ax.step(far, curve["tar"], where="post", color=COLOURS[weights], label=weights)
                    least = min(f for f in curve["far"] if f > 0)
                    ax.set(xscale="log", xlim=(max(least, 1e-6), 1))
                else:
                    ax.plot(np.arange(1, len(curve["cmc"]) + 1), curve["cmc"], color=COLOURS[weights], label=weights)
            ax.set(title=key, xlabel=x_label, ylabel=y_label, ylim=(0, 1.01))
            ax.grid(alpha=0.3)
            ax.legend(loc="lower right", fontsize=8)
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
        plt.close(figure)
        drawn.append(({"roc": "ROC of the pairs", "cmc": "Identification rate by rank"}[name], f"{name}.png"))

    panels = [key for key, curve in next(iter(curves.values())).items() if "same" in curve]
    if panels:
        figure, axes = plt.subplots(len(curves), len(panels), figsize=(4.2 * len(panels), 2.6 * len(curves)),
                                    squeeze=False, sharex=True)
        for line, (weights, by_split) in zip(axes, curves.items(), strict=True):
            for ax, key in zip(line, panels, strict=True):
                for kind, colour in (("different", "#D55E00"), ("same", "#009E73")):
                    share = by_split[key][kind] / by_split[key][kind].sum()
                    ax.stairs(share, SCORE_BINS, fill=True, alpha=0.5, color=colour, label=kind)
                ax.set(title=f"{key}, {weights}", ylabel="share of the pairs")
                ax.legend(fontsize=8)
        for ax in axes[-1]:
            ax.set_xlabel("cosine")
        figure.tight_layout()
        figure.savefig(folder / "scores.png", dpi=150, bbox_inches="tight")
        plt.close(figure)
        drawn.append(("Scores of pairs of one identity and of two", "scores.png"))
    return drawn


def draw_bars(plt, path: Path, rows: list[Row], splits: list[Split],
              published: list[tuple[Published, str, Row | None]]) -> None:
    """Headlines and whatever else is published, before and after; then the human trials with every rater as a point."""
    by_name = {f"{split.domain}/{split.name}": split for split in splits}
    groups = [(f"{domain}\n{split}\n{next(iter(pair.values())).metric}", pair,
               chance(by_name[f"{domain}/{split}"], next(iter(pair.values())).metric),
               [one for one, name, row in published if row and name == f"{domain}/{split}"
                and one.metric == next(iter(pair.values())).metric], [])
              for (domain, split), pair in headlines(rows).items()]
    for one, name, row in published:
        title = f"{name.replace('/', chr(10))}\n{one.metric}"
        if row and title not in [group[0] for group in groups]:
            like = [r for r in rows if (r.domain, r.split, r.metric, r.protocol)
                    == (row.domain, row.split, row.metric, row.protocol)]
            others = [p for p, where, r in published if r and where == name and p.metric == one.metric]
            groups.append((title, {r.weights: r for r in like}, 0.5 if one.metric == "accuracy" else None, others, []))
    for (domain, split), by_weights in human_rows(rows).items():
        first = next(iter(by_weights.values()))
        pair = {weights: found["AUC on human trials"] for weights, found in by_weights.items()}
        raters = [row.value for metric, row in first.items() if metric.startswith("AUC of rater ")]
        groups.append((f"{domain}\n{split if domain != 'all' else ''}\nAUC on\nhuman trials",
                       pair | {"people": first["human AUC (mean of raters)"]}, 0.5, [], raters))

    names = [weights for weights in COLOURS if any(weights in pair for _, pair, *_ in groups)]
    figure, ax = plt.subplots(figsize=(1.8 + 1.3 * len(groups), 4))
    for i, (_, pair, level, others, raters) in enumerate(groups):
        here = [weights for weights in names if weights in pair]
        width = 0.76 / max(len(here), 2)
        for j, weights in enumerate(here):
            row, x = pair[weights], i + (j - (len(here) - 1) / 2) * width
            error = [[100 * (row.value - row.low)], [100 * (row.high - row.value)]]
            ax.bar(x, 100 * row.value, width * 0.95, yerr=np.maximum(error, 0), capsize=3, color=COLOURS[weights],
                   label=weights)
            if weights == "people":
                shift = np.linspace(-0.3, 0.3, len(raters)) * width if len(raters) > 1 else np.zeros(1)
                ax.plot(x + shift, 100 * np.array(raters), "k.", ms=4, label="one rater", clip_on=False)
        if level is not None:
            ax.plot([i - 0.45, i + 0.45], [100 * level] * 2, "k:", lw=1, label="chance")
        for one in others:
            same = one.comparable(next(iter(pair.values())).protocol)
            colour = COLOURS["people"] if one.kind == "human" else "#CC79A7"
            ax.plot(i + 0.43, 100 * one.value, "*" if one.kind == "human" else "D", ms=9 if one.kind == "human" else 5,
                    color=colour, mfc=colour if same else "none", clip_on=False,
                    label=f"published {one.kind}" + ", other protocol" * (not same))
    ax.set_xticks(range(len(groups)), [title.replace(" top", "\ntop") for title, *_ in groups], fontsize=8)
    ax.set(xlim=(-0.6, len(groups) - 0.4), ylim=(0, 100), ylabel="percent, 95 % interval")
    marks = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # each label once
    ax.legend(marks.values(), marks.keys(), ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0),
              frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


Tile = tuple[Split, int, str, str]  # split, row, colour of the frame, caption


def draw_sheet(path: Path, lines: list[list[Tile | None]], side: int = 96) -> None:
    """Images in lines, each framed under its caption, as PNG; None: a gap."""
    from PIL import Image, ImageDraw

    frame, text, gap = 3, 13, 12
    outer = side + 2 * frame
    wide, high = outer + 2, outer + text + 4
    width = max(sum(gap if tile is None else wide for tile in line) for line in lines)
    sheet = Image.new("RGB", (width, high * len(lines)), "white")
    draw = ImageDraw.Draw(sheet)
    for top, line in zip(range(0, high * len(lines), high), lines, strict=True):
        left = 0
        for tile in line:
            if tile is not None:
                split, row, colour, caption = tile
                draw.text((left, top), caption, fill="black")
                draw.rectangle((left, top + text, left + outer - 1, top + text + outer - 1), colour)
                image = Image.fromarray(split.image(row).permute(1, 2, 0).numpy()).resize((side, side))
                sheet.paste(image, (left + frame, top + text + frame))
            left += gap if tile is None else wide
    write_atomically(path, lambda temporary: sheet.save(temporary, "PNG"))
    people = {tile[0].domain for line in lines for tile in line if tile} != {"object"}
    print(f"{path}" + ": shows people; pass it on only as the licence of the data allows" * people)


def draw_search(folder: Path, split: Split, x: np.ndarray, seed: int, probes: int = 12, top: int = 10) -> None:
    """sheet-DOMAIN-SPLIT.png: drawn probes, each with the images nearest to it, framed as right or wrong."""
    member = make_members([split], [x], probes, seed)[0]
    mates, lines = member.mates(member), []
    for probe in member.probes:
        right, ignored = mates(probe)
        _, (scores,) = next(score_blocks(x, np.array([probe]), member.gallery))
        scores[ignored] = -np.inf
        nearest = np.argsort(-scores, kind="stable")[: min(top, len(scores) - len(ignored))]
        hits = np.isin(nearest, right)
        lines.append([(split, int(probe), "#000000", "probe"), None,
                      *((split, int(member.gallery[place]), HIT if hit else MISS, f"{rank}: {scores[place]:.3f}")
                        for rank, (place, hit) in enumerate(zip(nearest, hits, strict=True), 1))])
    if lines:
        draw_sheet(folder / f"sheet-{split.domain}-{split.name}.png", lines)
