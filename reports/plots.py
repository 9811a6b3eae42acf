"""The figures of an evaluation: ROC, CMC, score distributions, bars, sheets of pictures."""

from itertools import islice
from pathlib import Path

import numpy as np

from data_prep import write_atomically
from data_prep.format import Split
from protocols.embed import Embedder
from protocols.pairs import SCORE_BINS
from protocols.results import Row
from protocols.search import gallery_rule, mates_in, take_rows, variants_of
from reports.rows import chance, headlines
from reports.tables import Beside, Published, human_rows, new_figure, save_figure

HIT, MISS = "#009E73", "#D55E00"  # frames of what is right and wrong
COLOURS = {"foundation": "#999999", "tuned": "#0072B2", "people": "#E69F00"}  # Okabe-Ito


def panels_of(curves: dict[str, dict], kind: str) -> list[str]:
    """The splits, "domain/split", that have a kind of curve."""
    return [key for key, curve in next(iter(curves.values())).items() if kind in curve]


def draw_figures(folder: Path, rows: list[Row], curves: dict[str, dict], splits: list[Split],
                 published: list[Beside]) -> list[tuple[str, str]]:
    """bars.png, roc.png (log FAR), cmc.png and scores.png, where there is something to draw: title and name of each."""
    drawn = [("Figures before and after, beside people and published experts", "bars.png")]
    draw_bars(folder / "bars.png", rows, splits, published)
    for kind, name, title in (("far", "roc.png", "ROC of the pairs"),
                              ("cmc", "cmc.png", "Identification rate by rank")):
        if not (panels := panels_of(curves, kind)):
            continue
        figure, axes = new_figure(1, len(panels), (4.2 * len(panels), 3.6))
        for ax, key in zip(axes[0], panels, strict=True):
            for weights, by_split in curves.items():
                curve, style = by_split[key], {"color": COLOURS[weights], "label": weights}
                if kind == "far":
                    ax.step(np.maximum(curve["far"], 1e-7), curve["tar"], where="post", **style)
                    least = min(far for far in curve["far"] if far > 0)
                    ax.set(xscale="log", xlim=(max(least, 1e-6), 1), xlabel="FAR", ylabel="TAR")
                else:
                    ax.plot(np.arange(1, len(curve["cmc"]) + 1), curve["cmc"], **style)
                    ax.set(xlim=(0.5, len(curve["cmc"]) + 0.5), xlabel="rank", ylabel="identification rate")
                    ax.xaxis.get_major_locator().set_params(integer=True)  # however small the gallery
            ax.set_ylim(0, 1.01)
            ax.set_title(key, parse_math=False)  # a split's name may hold dollar signs
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
        save_figure(folder / name, figure)
        drawn.append((title, name))

    if panels := panels_of(curves, "same"):
        figure, axes = new_figure(len(curves), len(panels), (4.2 * len(panels), 2.6 * len(curves)), sharex=True)
        for line, (weights, by_split) in zip(axes, curves.items(), strict=True):
            for ax, key in zip(line, panels, strict=True):
                for kind, colour in (("different", MISS), ("same", HIT)):
                    share = by_split[key][kind] / by_split[key][kind].sum()
                    ax.stairs(share, SCORE_BINS, fill=True, alpha=0.5, color=colour, label=kind)
                ax.set_title(f"{key}, {weights}", parse_math=False)
                ax.set_ylabel("share of the pairs")
                ax.legend(fontsize=8)
        for ax in axes[-1]:
            ax.set_xlabel("cosine")
        figure.tight_layout()
        save_figure(folder / "scores.png", figure)
        drawn.append(("Scores of pairs of one identity and of two", "scores.png"))
    return drawn


# title, figures by weights or of "people", chance, the value of each of these people, figures of others
Bars = tuple[str, dict[str, Row], float | None, list[float], list[Published]]


def draw_bars(path: Path, rows: list[Row], splits: list[Split], published: list[Beside]) -> None:
    """Headlines and other published metrics, before and after; then the human trials with every rater as a point."""
    by_name, groups = {f"{split.domain}/{split.name}": split for split in splits}, {}
    for (domain, split), pair in headlines(rows).items():
        name, row = f"{domain}/{split}", next(iter(pair.values()))
        groups[name, row.metric] = (f"{name}\n{row.metric}", pair, chance(by_name[name], row), [], [])
    for one, name, row in published:
        if row:
            pair = {other.weights: other for other in rows if other.key == row.key}
            alone = (f"{name}\n{one.metric}", pair, 0.5 if one.metric == "accuracy" else None, [], [])
            groups.setdefault((name, one.metric), alone)[-1].append(one)
    for (domain, split), by_weights in human_rows(rows).items():
        first = next(iter(by_weights.values()))
        pair = {weights: by_readout["model"][0] for weights, by_readout in by_weights.items()}
        groups[domain, split] = (f"{domain}/{split if domain != 'all' else ''}\nAUC on\nhuman trials",
                                 pair | {"people": first["people"][0]}, 0.5, [row.value for row in first["rater"]], [])
    figure, [[ax]] = new_figure(1, 1, (1.8 + 1.3 * len(groups), 4))
    draw_groups(ax, list(groups.values()), "one rater")
    save_figure(path, figure)


def draw_groups(ax, groups: list[Bars], person: str) -> None:
    """Bars with intervals over the chance of each group; each person a point; published figures beside them."""
    for i, (_, pair, level, each, published) in enumerate(groups):
        present = [name for name in COLOURS if name in pair]
        width = 0.76 / max(len(present), 2)
        for j, name in enumerate(present):
            row, x = pair[name], i + (j - (len(present) - 1) / 2) * width
            error = [[100 * (row.value - row.low)], [100 * (row.high - row.value)]]
            ax.bar(x, 100 * row.value, width * 0.95, yerr=np.maximum(error, 0), capsize=3, color=COLOURS[name],
                   label=name)
            if name == "people":
                shift = np.linspace(-0.3, 0.3, len(each)) * width if len(each) > 1 else np.zeros(1)
                ax.plot(x + shift, 100 * np.array(each), "k.", ms=4, label=person, clip_on=False)
        if level is not None:
            ax.plot([i - 0.45, i + 0.45], [100 * level] * 2, "k:", lw=1, label="chance")
        for one in published:
            same = one.comparable(next(iter(pair.values())))
            marker, size, colour = ("*", 9, COLOURS["people"]) if one.kind == "human" else ("D", 5, "#CC79A7")
            ax.plot(i + 0.43, 100 * one.value, marker, ms=size, color=colour, mfc=colour if same else "none",
                    clip_on=False, label=f"published {one.kind}" + ", other protocol" * (not same))
    ax.set_xticks(range(len(groups)), [title.replace("/", "\n").replace(" top", "\ntop") for title, *_ in groups],
                  fontsize=8, parse_math=False)
    ax.set(xlim=(-0.6, len(groups) - 0.4), ylim=(0, 100), ylabel="percent, 95 % interval")
    marks = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # each label once
    ax.legend(marks.values(), marks.keys(), ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0),
              frameon=False)


Tile = tuple[Split, int, str, str]  # split, row, colour of the frame, caption of one or two lines


def draw_sheet(path: Path, lines: list[list[Tile | None]], legend: list[str]) -> None:
    """Images in lines under a legend, each with caption and frame, as PNG; None: a gap."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 10)
    side, frame, text, gap = 96, 3, 26, 12
    outer = side + 2 * frame
    wide, high, top = outer + 4, outer + text + 8, 15 * len(legend) + 6
    width = max(*(sum(gap if tile is None else wide for tile in line) for line in lines),
                *(int(font.getlength(line)) + 4 for line in legend))
    sheet = Image.new("RGB", (width, top + high * len(lines)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(legend):
        draw.text((2, 15 * number + 2), line, "black", font)

    def fitted(caption: str) -> str:
        caption = caption.encode("utf-8", "replace").decode()  # names of folders need not be text
        while font.getlength(caption) > outer:
            caption = caption.rstrip("…")[:-1] + "…"
        return caption

    for number, line in enumerate(lines):
        left, y = 0, top + number * high
        for tile in line:
            if tile is not None:
                split, row, colour, caption = tile
                for place, part in enumerate(caption.split("\n")):
                    draw.text((left, y + 12 * place), fitted(part), "black", font)
                image = Image.fromarray(split.image(row).permute(1, 2, 0).numpy()).resize((side, side))
                sheet.paste(ImageOps.expand(image, frame, colour), (left, y + text))
            left += gap if tile is None else wide
    write_atomically(path, lambda temporary: sheet.save(temporary, "PNG"))
    people = {tile[0].domain for line in lines for tile in line if tile} != {"object"}
    print(f"{path}" + ": shows people; pass it on only as the licence of the data allows" * people)


def class_of(split: Split, row: int) -> str:
    """The name of an image's class or person; "unknown" without one."""
    return split.names[split.labels[row]] if split.labels[row] >= 0 else "unknown"


def draw_split(folder: Path, split: Split, embed: Embedder, root: dict, seed: int) -> None:
    """sheet-DOMAIN-SPLIT.png: examples behind the figures of a split, right and wrong ones framed green and red.

    A dozen probes, each with the ten nearest images among those that its protocol scores it against (the gallery by the
    customary rule; for classes the reference); for verification the hardest pairs; for templates none.
    """
    x, name, protocol = embed(split), f"{split.domain}/{split.name}, {embed.name} backbone", split.protocol["name"]
    if protocol == "templates":
        print(f"  {split.domain}/{split.name}: no sheet: templates pool images")
        return
    path = folder / f"sheet-{split.domain}-{split.name}.png"
    if protocol == "verification":
        draw_pairs(path, split, x, name)
        return
    if protocol in ("classification", "choice"):
        other = root[split.domain][split.protocol["reference"]]
        y, groups = embed(other), split.protocol.get("groups") or {}
        group_of = {member: label for label, one in enumerate(split.classes) for member in groups.get(one, [one])}
        labels = np.array([*(group_of.get(one, -1) for one in other.classes), -1])[other.labels]
        gallery, queries = np.flatnonzero(np.isfinite(y[:, 0]) & (labels >= 0)), np.flatnonzero(split.labels >= 0)
        same, itself = mates_in(labels[gallery]), split.folder.resolve() == other.folder.resolve()
        rule = f"of {other.domain}/{other.name}, which vote"

        def mates(probe: int) -> tuple[np.ndarray, np.ndarray]:
            return same(split.labels[probe]), np.flatnonzero(gallery == probe) if itself else gallery[:0]
    else:
        roles, variant = split.optional("role"), variants_of(split)[0]
        other, y, rule = split, x, f"of the gallery, by the rule '{variant}'"
        gallery, queries = np.flatnonzero(np.isfinite(x[:, 0]) & (roles > 0)), np.flatnonzero(roles == 0)
        mates = gallery_rule(split, gallery, variant)
    queries = queries[np.isfinite(x[queries, 0])]
    lines: list[list[Tile | None]] = []
    scored = (probe for probe in np.random.default_rng(seed).permutation(queries) if len(mates(probe)[0]))
    for probe in islice(scored, 12):
        right, ignored = mates(probe)
        scores = take_rows(y, gallery) @ x[probe]
        scores[ignored] = -np.inf
        nearest = np.argsort(-scores, kind="stable")[: min(10, len(scores) - len(ignored))]
        lines.append([(split, int(probe), "#000000", f"probe\n{class_of(split, probe)}"), None,
                      *((other, int(gallery[place]), HIT if place in right else MISS,
                         f"{rank}: {scores[place]:.3f}\n{class_of(other, gallery[place])}")
                        for rank, place in enumerate(nearest, 1))])
    if lines:
        draw_sheet(path, lines, [f"{name}: drawn probes (seed {seed}), each with the images nearest to it {rule}",
                                 "rank: cosine, class; green: the probe's class or person, red: another"])


def draw_pairs(path: Path, split: Split, x: np.ndarray, name: str) -> None:
    """The genuine pairs with the lowest scores, then the impostors with the highest."""
    pairs = np.array(split.column("pairs"))[:, :3]
    pairs = np.unique(np.column_stack([np.sort(pairs[:, :2], 1), pairs[:, 2]]), axis=0)  # a list may repeat pairs
    pairs = pairs[np.isfinite(x[pairs[:, 0], 0]) & np.isfinite(x[pairs[:, 1], 0])]
    scores, same = (x[pairs[:, 0]] * x[pairs[:, 1]]).sum(1), pairs[:, 2] == 1
    drawn: list[list[Tile | None]] = []
    for kind, sign, colour in ((same, 1, HIT), (~same, -1, MISS)):
        chosen = np.flatnonzero(kind)[np.argsort(sign * scores[kind], kind="stable")][:20]
        for start in range(0, len(chosen), 5):
            line: list[Tile | None] = []
            for i in chosen[start : start + 5]:
                line += [(split, int(row), colour, f"{scores[i]:.3f}\n{class_of(split, row)}") for row in pairs[i, :2]]
                line.append(None)
            drawn.append(line)
    draw_sheet(path, drawn, [f"{name}: the hardest listed pairs, two images each, with their cosine and whose they are",
                             "green: one person, lowest scores first; red: two, highest first"])
