"""Comparison of runs, with each other and with experts: paired intervals, seeds, non-inferiority."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep import DOMAIN_COLOURS, DOMAINS, InputError, literal, make_folder, write_csv, write_json
from protocols.bootstrap import FEW_NOTE, group_seeds, margin, mark, minus
from protocols.claims import as_many
from protocols.results import D_PRIMES, Row, Scored, aggregate, read_rows, read_scored, start_of
from reports.plots import COLOURS
from reports.rows import as_table
from reports.tables import new_figure, save_figure, write_text


def shared_figures(runs: list[Scored], splits: set[str]) -> list[tuple[str, str, str, tuple]]:
    """Keys of the figures that all runs have, by the same protocols and on as many samples.

    InputError if the resamplings of the runs are not paired, or a figure of `splits`, or every one, differs otherwise.
    """
    first, *others = runs
    unlike: dict[tuple[str, str, str], list[str]] = {}  # why a figure cannot be compared, by domain, split, metric
    for other in others:
        if first.resampled != other.resampled:
            raise InputError(f"{first.folder} and {other.folder} were resampled differently: run evaluate.py on both "
                             "with the same --seed and --bootstrap")
        both = {key[:3] for key in first.rows} & {key[:3] for key in other.rows}
        for key in [key for key in {**first.rows, **other.rows} if key[:3] in both]:
            rows = [(one.folder, one.rows[key][0]) for one in (first, other) if key in one.rows]
            if len(rows) == 1:
                why = [f"only {folder} has it by the protocol '{row.protocol}'" for folder, row in rows]
            elif rows[0][1].count != rows[1][1].count:
                why = [f"{row.count:,} samples in {folder} (unreadable images?)" for folder, row in rows]
            else:
                continue
            unlike[key[:3]] = unlike.get(key[:3], []) + why
    keys = [key for key in first.rows if all(key in other.rows for other in others) and key[:3] not in unlike]
    by_split: dict[str, list[str]] = {}
    for (domain, split, metric), why in unlike.items():
        by_split.setdefault(f"{domain}/{split}", []).append(f"{metric}: {', '.join(why)}: score all on the same splits "
                                                            "with the same options")
    for name, reasons in by_split.items():
        if name in splits or not keys:
            raise InputError(f"{name} {reasons[0]}")
        if not splits:
            print(f"{name}: {len(reasons)} figures left out; {reasons[0]}")
    return keys


def compare_groups(groups: list[list[Scored]], splits: set[str]) -> list[dict]:
    """One row per shared figure and group: its mean over seeds, and its difference from the first group.

    The interval of a difference resamples the same people in both runs, so that the difficulty of a set cancels out.
    Seeds are not resampled: their standard deviation is a separate column.
    """
    table = []
    for key in shared_figures([scored for group in groups for scored in group], splits):
        row, reference = groups[0][0].rows[key][0], aggregate(groups[0], key)
        if row.readout in ("rater", "people"):  # the same for every run
            continue
        for group in groups:
            figure, values = aggregate(group, key), [scored.rows[key][0].value for scored in group]
            with np.errstate(invalid="ignore"):  # without errors in a resampling, both d' are infinite
                lead = None if group is groups[0] else minus(figure, reference)
            table.append({
                **identify(row), "runs": " ".join(scored.name for scored in group),
                "weights": group[0].rows[key][0].weights, "seeds": len(group), "value": figure.value, "low": figure.low,
                "high": figure.high, "seed_sd": float(np.std(values, ddof=1)) if len(group) > 1 else None,
                "difference": lead and lead.value, "difference_low": lead and lead.low,
                "difference_high": lead and lead.high, "headline": row.headline, "count": figure.count,
                "identities": row.identities})
    return table


def identify(row: Row) -> dict:
    """The columns that identify a figure; "unit": the factor by which its values are multiplied for display."""
    return {name: getattr(row, name) for name in ("domain", "split", "metric", "protocol", "unit")}


def find_expertise(run: Scored, expert: Scored) -> str:
    """The domain that an expert was trained on; InputError if the two runs are not comparable."""
    domains = expert.config.get("domains", [])
    if len(domains) != 1:
        raise InputError(f"{expert.folder} is no expert: it was trained on {', '.join(domains) or 'unknown domains'}; "
                         f"train one with --domains {DOMAINS[1]}, or leave --experts out")
    domain = domains[0]
    if domain not in run.config.get("domains", []):
        raise InputError(f"{run.folder} was not trained on {domain}, the task of the expert {expert.folder}: leave it "
                         "out")
    if start_of(run.config) != start_of(expert.config):
        raise InputError(f"{expert.folder} starts from another backbone, weights or input size than {run.folder}: "
                         "train the expert like the run")
    count, expert_count = (one.config.get("counts", {}).get(domain, 0) for one in (run, expert))
    if not as_many(expert_count, count):
        raise InputError(f"{expert.folder} saw {expert_count:,} images of {domain}, {run.folder} {count:,}: not the "
                         f"same number (within a quarter); train the expert with --images {count}")
    return domain


def is_share(row: Row) -> bool:
    """Whether a figure is a share, is better when higher, and repeats or compares no other row."""
    return (row.kind not in ("retention", "gap", "clean", "unified", "human trials", "human choices")
            and row.measure not in (*D_PRIMES, "eer", "accuracy sd"))


def compare_experts(runs: list[Scored], groups: list[list[Scored]], splits: set[str], delta: float) -> list[dict]:
    """Non-inferiority of a run (or the mean of its seeds) to its own experts, each on the splits of its domain.

    Non-inferior: the lower end of the paired 95 % interval of run - expert lies above -margin (a test at 2.5 %);
    inferior: its upper end lies below; else undecided. Scores on the clean images of a shifted split count for the
    split that contains these images.
    """
    table = []
    for group in groups:
        domain = find_expertise(runs[0], group[0])
        scored = [replace(one, rows={key: pair for key, pair in one.rows.items() if key[0] == domain
                                     and is_share(pair[0])}) for one in [*runs, *group]]
        if any(not one.rows for one in scored):
            raise InputError(f"{group[0].folder} and {runs[0].folder}: no figures of {domain}: run evaluate.py on both")
        unified, experts = scored[: len(runs)], scored[len(runs) :]
        names = [" ".join(one.name for one in seeds) for seeds in (unified, experts)]
        for key in shared_figures(scored, splits):
            row, run, expert = unified[0].rows[key][0], aggregate(unified, key), aggregate(experts, key)
            lead, allowed = minus(run, expert), margin(expert.value, delta)
            verdict = ("non-inferior" if lead.low > -allowed or lead.low >= 0 else
                       "inferior" if lead.high < -allowed else "undecided")
            table.append(identify(row) | {
                "run": names[0], "expert": names[1], "value": run.value, "expert_value": expert.value,
                "difference": lead.value, "low": lead.low, "high": lead.high, "delta": allowed, "verdict": verdict,
                "headline": row.headline, "count": run.count, "identities": row.identities})
    return table


def show_experts(table: list[dict], domains: list[str]) -> str:
    """The rows of `compare_experts` as Markdown, headlines first, and the joint verdict of the headlines."""
    lines = []
    for row in sorted(table, key=lambda row: not row["headline"]):
        name, metric, expert, protocol = map(literal, (f"{row['domain']}/{row['split']}", row["metric"],
                                                       row["expert"], row["protocol"]))
        lines.append([name, metric, *(f"{100 * row[key]:.1f}" for key in ("value", "expert_value")),
                      *(f"{100 * row[key]:+.2f}" for key in ("difference", "low")),
                      f"{100 * row['high']:+.2f}{mark(row['identities'])}", f"{100 * row['delta']:.2f}",
                      f"**{row['verdict']}**" if row["headline"] else row["verdict"], expert, protocol])
    verdicts = {row["verdict"] for row in table if row["headline"]}
    joint = next((verdict for verdict in ("inferior", "undecided") if verdict in verdicts), "non-inferior")
    without = [domain for domain in domains if domain not in {row["domain"] for row in table}]
    return "\n".join([
        "Percent; differences run - expert, paired by person, with 95 % intervals. Non-inferior: the whole interval "
        "above -δ, which is --delta and, for an expert above 90 %, at most a tenth of its error."
        + f" {FEW_NOTE}." * any(mark(row["identities"]) for row in table), "",
        *as_table(("split", "metric", "run", "expert", "difference", "low", "high", "δ", "verdict", "expert's name",
                   "protocol"), lines), "", f"On the headlines together: {joint}"
        + (f"; no expert of {', '.join(without)} was given" if without else " on every task") + ".\n"])


def draw_experts(path: Path, table: list[dict]) -> None:
    """Each headline's difference run - expert with its interval, beside the margin that it must stay above."""
    rows = [row for row in table if row["headline"]] or table
    colours = {"non-inferior": "#009E73", "undecided": "#999999", "inferior": "#D55E00"}
    figure, [[ax]] = new_figure(1, 1, (7, 1.4 + 0.5 * len(rows)))
    for i, row in enumerate(rows):
        error = np.maximum([[row["difference"] - row["low"]], [row["high"] - row["difference"]]], 0)
        ax.errorbar(100 * row["difference"], i, xerr=100 * error, fmt="o", capsize=4, color=colours[row["verdict"]])
        ax.plot([-100 * row["delta"]] * 2, [i - 0.35, i + 0.35], "k--", lw=1.2, label="-δ" if i == 0 else None)
    ax.axvline(0, color="0.7", lw=0.8)
    ax.set_yticks(range(len(rows)), [f"{row['domain']}/{row['split']} {row['metric']}\nagainst {row['expert']}: "
                                     f"{row['verdict']}" for row in rows], fontsize=8, parse_math=False)
    ax.invert_yaxis()
    ax.set_xlabel("run - expert, points, 95 % interval")
    ax.legend(fontsize=8)
    save_figure(path, figure)


def draw_comparison(path: Path, table: list[dict], untouched: list[Row]) -> None:
    """A panel for each headline: every run, or mean over seeds, with its interval; grey: the untouched backbone."""
    panels: dict[tuple[str, str], dict[tuple[str, str], dict]] = {}  # by domain and split, then by runs and weights
    for row in [row for row in table if row["headline"]] or table:  # the customary rule is first
        panels.setdefault((row["domain"], row["split"]), {}).setdefault((row["runs"], row["weights"]), row)
    before, labels = {(row.domain, row.split, row.metric): row.value for row in untouched}, []
    for runs, weights in next(iter(panels.values())):
        first, *seeds = runs.split()
        name = f"{first.rpartition('-s')[0] or first}, {1 + len(seeds)} seeds" if seeds else first
        labels.append(name + f" ({weights})" * (weights != "tuned"))
    wide = min(len(panels), 4)
    high = -(-len(panels) // wide)
    figure, axes = new_figure(high, wide, (2 + 2.6 * wide, high * (0.9 + 0.24 * len(labels))), sharey=True,
                              layout="constrained")
    for ax, ((domain, split), panel) in zip(axes.flat, panels.items(), strict=False):
        for i, row in enumerate(panel.values()):
            scale, metric = row["unit"], row["metric"]
            error = np.maximum([[row["value"] - row["low"]], [row["high"] - row["value"]]], 0)
            ax.errorbar(scale * row["value"], i, xerr=scale * error, fmt="o", ms=4, capsize=2,
                        color=DOMAIN_COLOURS.get(domain, "black"))
        if (domain, split, metric) in before:
            ax.axvline(scale * before[domain, split, metric], color=COLOURS["foundation"], lw=2, zorder=0)
        ax.set_title(f"{domain}/{split}\n{metric}", fontsize=9, parse_math=False)
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", lw=0.4)
    for ax in axes[:, 0]:
        ax.set_yticks(range(len(labels)), labels, parse_math=False)  # a run's name may hold dollar signs
    axes[0][0].set_ylim(len(labels) - 0.5, -0.5)
    for ax in list(axes.flat)[len(panels):]:
        ax.set_axis_off()
    figure.supxlabel("percent, 95 % interval" + "; grey: the untouched backbone" * bool(before), fontsize=9)
    save_figure(path, figure)


def show_comparison(table: list[dict]) -> str:
    """The rows of `compare_groups` as Markdown."""

    def show(row: dict, *names: str, sign: str = "") -> str:
        value, low, high = (f"{row[name] * row['unit']:{sign}.1f}" for name in names)
        return f"{value} [{low}, {high}]" + mark(row["identities"])

    lines = []
    for row in table:
        lead = "" if row["difference"] is None else show(
            row, "difference", "difference_low", "difference_high", sign="+")
        if lead and (row["difference_low"] > 0 or row["difference_high"] < 0):
            lead = f"**{lead}**"
        spread = "" if row["seed_sd"] is None else f"{row['seed_sd'] * row['unit']:.1f}"
        name, metric, runs, protocol = map(literal, (f"{row['domain']}/{row['split']}", row["metric"],
                                                     row["runs"], row["protocol"]))
        lines.append([name, metric, f"{runs} ({row['weights']})", show(row, "value", "low", "high"), spread, lead,
                      f"{row['count']:,}", protocol])
    return "\n".join([
        "Percent (d-prime: as it is) with 95 % intervals. Differences from the first run or group of seeds, paired by "
        "person; in bold where the interval excludes 0. Seed SD: over runs that differ only in the seed."
        + f" {FEW_NOTE}." * any(mark(row["identities"]) for row in table), "",
        *as_table(("split", "metric", "runs", "value", "seed SD", "difference", "count", "protocol"), lines), ""])


def write_comparison(runs: tuple[Path, ...], weights: str | None, splits: set[str], delta: float | None, out: Path
                     ) -> None:
    """`evaluate.py compare`: comparison.md, .csv, .json and .png; arguments as of the command.

    `delta`: of non-inferiority to the runs after the first, which are then its experts.
    """
    experts = delta is not None
    if len(runs) == 1 and not experts:
        if weights:
            raise InputError("--weights chooses between the figures of several runs: leave it out with one run")
        scored = [read_scored(runs[0], which) for which in ("foundation", "tuned")]
    else:
        scored = [read_scored(folder, "tuned" if experts else weights) for folder in runs]
    first, *others = [[scored[i] for i in members]
                      for members in group_seeds([(one.recipe, one.config.get("seed")) for one in scored])]
    if experts and not others:
        raise InputError("--experts: want RUN and at least one expert of its domains")
    table = compare_experts(first, others, splits, delta) if experts else compare_groups([first, *others], splits)
    shared = {f"{row['domain']}/{row['split']}" for row in table}
    if not shared or splits - shared:
        asked = f" on these --splits: {', '.join(sorted(splits - shared))}" if splits else ": score the same splits"
        raise InputError(f"the runs have no figure in common{asked}; they share {', '.join(sorted(shared)) or 'none'}")
    table = [row for row in table if not splits or f"{row['domain']}/{row['split']}" in splits]
    make_folder(out, "--out")
    if experts:
        text = shown = show_experts(table, first[0].config.get("domains", []))
        draw_experts(out / "comparison.png", table)
    else:  # all figures are in the files; the terminal shows the headlines
        text, shown = show_comparison(table), show_comparison([row for row in table if row["headline"]] or table)
        untouched = [row for row in read_rows(first[0].folder / "eval") if row.weights == "foundation"]
        draw_comparison(out / "comparison.png", table, untouched if table[0]["weights"] != "foundation" else [])
    write_json(out / "comparison.json", table)
    write_csv(out / "comparison.csv", table)
    write_text(out / "comparison.md", text)
    print(shown + f"written: {out}/comparison.md, .csv, .json and .png")
