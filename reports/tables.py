"""Tables beside a run's own figures: published ones, human trials, stages of a sequential run; the report as HTML.

evaluate.py writes report.md; nothing here computes a metric.
"""

import base64
import csv
import html
import math
import re
from dataclasses import dataclass
from pathlib import Path

from data_prep import DOMAINS, InputError, literal, write_atomically
from protocols.results import Row, Stages
from reports.rows import as_table, show_value

PUBLISHED = Path(__file__).parent.parent / "protocols" / "published"  # figures whose source was checked


# ---------------------------------------------------------------- published figures


@dataclass(frozen=True)
class Published:
    """A figure published by others; the fields after the first are the columns of the file."""

    kind: str  # "human" or "expert"
    dataset: str
    domain: str
    metric: str  # as in the rows of evaluate.py
    protocol: str  # in words
    value: float  # 0..1 (the file: percent, as printed)
    who: str
    source: str
    same_protocol: bool
    requires: dict[str, str | bool]  # fields of a row that it may be compared with

    def comparable(self, row: Row | None) -> bool:
        """Whether a row was measured in the same way."""
        return row is not None and self.same_protocol and all(
            getattr(row, name) == wanted for name, wanted in self.requires.items())


def read_published(folder: Path = PUBLISHED) -> list[Published]:
    """The figures of people, then of experts; InputError names a line that is not one."""
    figures, flags = [], {"yes": True, "no": False}
    for kind in ("human", "expert"):
        path = folder / f"{kind}s.csv"
        with open(path, newline="", encoding="utf-8") as file:
            for line, row in enumerate(csv.DictReader(file), 2):
                try:
                    requires = dict(part.split("=") for part in row["requires"].split(" & ") if part)
                    figures.append(Published(kind, **row | {
                        "value": float(row["value"]) / 100, "same_protocol": flags[row["same_protocol"]],
                        "requires": {name: flags.get(wanted, wanted) for name, wanted in requires.items()}}))
                    if not 0 <= figures[-1].value <= 1 or row["domain"] not in DOMAINS or not row["source"]:
                        raise ValueError("want percent, a domain and a source")
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    raise InputError(f"{path}, line {line}: not a published figure ({error!r})") from error
    return figures


def plain(name: str) -> str:
    """A data set's name without case, spaces and signs: Market-1501 is market1501."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def datasets_of(names: list[str], given: tuple[str, ...], published: list[Published]) -> dict[str, str]:
    """{"domain/split": data set} of splits, by their name or as --published says: NAME=DATASET; NAME= for none.

    Names of data sets are plain; splits not named after one with published figures are absent.
    """
    known = {(row.domain, plain(row.dataset)) for row in published}
    by_split = {name: plain(name.split("/")[1]) for name in names}
    for word in given:
        name, sign, dataset = word.partition("=")
        if not sign or name not in names:
            raise InputError(f"--published {word}: want SPLIT=DATASET with a split that is scored: {', '.join(names)}")
        domain, by_split[name] = name.split("/")[0], plain(dataset)
        if dataset and (domain, plain(dataset)) not in known:
            sets = sorted({row.dataset for row in published if row.domain == domain})
            raise InputError(f"--published {word}: nothing is published of {dataset!r} as {domain}; there is "
                             f"{', '.join(sets) or 'nothing'}")
    return {name: dataset for name, dataset in by_split.items() if (name.split("/")[0], dataset) in known}


Beside = tuple[Published, str, Row | None]  # a published figure, the split, and the run's row to put beside it


def beside(rows: list[Row], datasets: dict[str, str], published: list[Published]) -> list[Beside]:
    """Each published figure of the run's data sets.

    The row has the same metric; tuned rows come first, then those of the same protocol.
    """
    pairs = []
    for name, dataset in datasets.items():
        for one in published:
            if (one.domain, plain(one.dataset)) == (name.split("/")[0], dataset):
                measured = [row for row in rows if f"{row.domain}/{row.split}" == name and row.metric == one.metric]
                pairs.append((one, name, min(measured, default=None, key=lambda row, one=one: (
                    row.weights != "tuned", not one.comparable(row)))))
    return pairs


def show_published(pairs: list[Beside]) -> list[str]:
    """Lines of report.md; none if nothing is published of the run's data sets."""
    if not pairs:
        return []
    lines = ["", "## Published figures", "", "Of people and of models that others trained; their sources were checked. "
             "For your own experts see `evaluate.py compare RUN --experts`. Where protocols differ, they may explain "
             "a difference."]
    for kind, title in (("human", "People"), ("expert", "Experts")):
        table = [(literal(name), one.metric, f"{100 * row.value:.1f} ({row.weights})" if row else "not computed",
                  f"{100 * one.value:.2f}", one.who, "yes" if one.comparable(row) else "no", one.protocol, one.source)
                 for one, name, row in sorted(pairs, key=lambda pair: (pair[1], pair[0].metric, -pair[0].value))
                 if one.kind == kind]
        if table:
            lines += ["", f"### {title}", "", *as_table(
                ("split", "metric", "this run", "published", "who", "same protocol", "how", "source"), table)]
    return lines


# ---------------------------------------------------------------- people on the same trials


def human_rows(rows: list[Row]) -> dict[tuple[str, str], dict[str, dict[str, list[Row]]]]:
    """{(domain, split): {weights: {readout: rows}}} of the human trials: a row of each readout, but of "rater"."""
    by_split: dict = {}
    for row in rows:
        if row.kind == "human trials":
            by_readout = by_split.setdefault((row.domain, row.split), {}).setdefault(row.weights, {})
            by_readout.setdefault(row.readout, []).append(row)
    return by_split


def human_verdict(difference: Row) -> str:
    """The verdict of the model's lead over people."""
    return "above humans" if difference.low > 0 else "below humans" if difference.high < 0 else "undecided"


def show_humans(rows: list[Row]) -> list[str]:
    """Lines of report.md; none without human trials."""
    by_split = human_rows(rows)
    if not by_split:
        return []
    lines = ["", "## Human trials", "", "People and model on identical pairs: AUC of the ratings (-3 to +3) and of the "
             "cosine, chance 50. Intervals resample identities, not raters. All splits: the mean over those of a "
             "domain; everything: over domains; both of raters who rated them all.", ""]
    table = []
    for (domain, split), by_weights in by_split.items():
        for weights, by_readout in by_weights.items():
            (model,), (people,), (lead,), (beaten,) = (by_readout[r] for r in ("model", "people", "lead", "beaten"))
            each = [row.value for row in by_readout["rater"]]
            name = "everything" if domain == "all" else literal(f"{domain}/{split}")
            reach = f"{100 * min(each):.1f} to {100 * max(each):.1f}"
            table.append((name, people.count, len(each), f"{show_value(people)} ({reach})", weights, show_value(model),
                          show_value(lead), f"{100 * beaten.value:.0f} %", human_verdict(lead)))
    return lines + as_table(("split", "pairs", "raters", "people: mean (range)", "weights", "model",
                             "model minus people", "beaten", "verdict"), table)


# ---------------------------------------------------------------- stages of a sequential run


def show_stages(stages: Stages | None, config: dict) -> list[str]:
    """The stage x task matrix as lines of report.md."""
    count, title = len(config["order"] or config["domains"]), ["", "## Stages of the sequential run", ""]
    if stages is None:
        return [*title, "The stage x task matrix needs scores after each stage: train with `--eval-every "
                f"{max(config['steps'] // count, 1)}` (the steps of a stage)."]

    def percent(scores: list[float]) -> list[str]:
        return ["" if math.isnan(score) else f"{100 * score:.1f}" for score in scores]

    table = [(literal(name), f"{step:,}" if step == end else f"{step:,} of {end:,}", *percent(scores))
             for name, step, end, scores in zip(stages.names, stages.steps, stages.ends, stages.scores, strict=True)]
    missing = ["", f"Not every stage was evaluated: take an --eval-every that divides {config['steps'] // count}."]
    return [*title, "Same/different AUC of fixed images after each stage (percent; chance 50), and the loss from the "
            "best stage to the end.", "", *as_table(("after", "step", *map(literal, stages.tasks)), [
                *table, ("lost", "", *percent(stages.lost))]), *missing * (len(stages.names) <= count)]


def new_figure(rows: int, columns: int, size: tuple[float, float], **options):
    """A figure without a display and its axes [rows, columns]; size in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, squeeze=False, **options)


def save_figure(path: Path, figure) -> None:
    """A matplotlib figure as PNG, atomically, cut to what is drawn; it is closed."""
    import matplotlib.pyplot as plt

    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png", bbox_inches="tight"))
    plt.close(figure)


def draw_stages(path: Path, stages: Stages) -> None:
    """The matrix as a picture: a row a stage, a column a task."""
    figure, [[ax]] = new_figure(1, 1, (2 + 1.1 * len(stages.tasks), 1.2 + 0.5 * len(stages.names)))
    image = ax.imshow(stages.scores, vmin=0.5, vmax=1, cmap="viridis", aspect="auto")
    for i, row in enumerate(stages.scores):
        for j, score in enumerate(row):
            if not math.isnan(score):
                ax.text(j, i, f"{100 * score:.1f}", ha="center", va="center", fontsize=9,
                        color="white" if score < 0.8 else "black")
    ax.set_xticks(range(len(stages.tasks)), [task.replace("/", "\n") for task in stages.tasks], fontsize=8,
                  parse_math=False)
    ax.set_yticks(range(len(stages.names)), [name if name == "start" else f"after {name}" for name in stages.names],
                  fontsize=8)
    figure.colorbar(image, label="same/different AUC")
    save_figure(path, figure)


# ---------------------------------------------------------------- report.html


STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { border: 1px solid #ddd; padding: .25rem .55rem; text-align: left; vertical-align: top; }
th { background: #f2f2f0; } tr:nth-child(even) td { background: #fafaf8; }
img { max-width: 100%; } code { background: #f2f2f0; padding: 0 .2rem; }"""


def inline(text: str, folder: Path) -> str:
    """Code, bold and pictures of a line; pictures are embedded in the page."""
    text = re.sub(r"\\(&lt;|&gt;|&amp;|[\\|*!\[\]`])", lambda sign: sign[1] if len(sign[1]) > 1 else
                  f"&#{ord(sign[1])};", html.escape(text, quote=False))  # what `literal` wrote
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)

    def picture(match: re.Match) -> str:
        data = base64.b64encode((folder / match[2]).read_bytes()).decode()
        return f'<img alt="{html.escape(match[1])}" src="data:image/png;base64,{data}">'

    return re.sub(r"!\[([^\]]*)\]\(([\w.-]+\.png)\)", picture, text)


def to_html(lines: list[str], folder: Path) -> str:
    """The lines of report.md as one page: the headings, tables, paragraphs and pictures that evaluate.py writes."""
    body, rows = [], []
    for line in [*lines, ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])])
            continue
        if rows:  # end of a table; its second line is the rule below the head
            table = ["".join(f"<{tag}>{inline(cell, folder)}</{tag}>" for cell in row)
                     for tag, row in [("th", rows[0]), *(("td", row) for row in rows[2:])]]
            body.append("<table>" + "".join(f"<tr>{row}</tr>\n" for row in table) + "</table>")
            rows = []
        if heading := re.match(r"(#{1,3}) (.*)", line):
            level = len(heading[1])
            body.append(f"<h{level}>{inline(heading[2], folder)}</h{level}>")
        elif line:
            body.append(f"<p>{inline(line, folder)}</p>")
    title = html.escape(re.sub(r"\\(.)", r"\1", lines[0].lstrip("# ")))
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
            f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n")


def write_report(folder: Path, lines: list[str]) -> None:
    """report.md and report.html with the same content; the pictures lie in the folder."""
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    write_text(folder / "report.html", to_html(lines, folder))


def write_text(path: Path, text: str) -> None:
    """A text in UTF-8, atomically, in any locale; what is not text in names of runs and classes is escaped."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))
