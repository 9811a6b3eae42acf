"""Runs beside each other and against experts: paired intervals, seeds, non-inferiority."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep import DOMAIN_COLOURS, DOMAINS, InputError
from evaluate_bootstrap import Figure
from evaluate_figures import COLOURS
from evaluate_report import literal, save_figure
from evaluate_results import FEW_NOTE, Row, mark, read_rows
from run_folder import FREE_ON_RESUME, hash_file, read_json, weights_of


@dataclass
class Scored:
    """What evaluate.py found for one run, with one set of weights."""

    folder: Path
    config: dict
    seed: int  # of the resamplings
    found: dict[tuple[str, str, str, str], tuple[Row, np.ndarray]]  # by domain, split, metric, protocol

    @property
    def name(self) -> str:
        """Of the run; a folder's name need not be text, and a figure has no sign for what is none."""
        return self.folder.resolve().name.encode("utf-8", "backslashreplace").decode()

    @property
    def recipe(self) -> str:
        """What two runs share that differ in their seed alone; a backbone without a run is only itself."""
        free = FREE_ON_RESUME | {"seed", "argv", "git_commit", "versions", "weights", "weights_sha256"}
        weights = next(iter(self.found.values()))[0].weights
        if not self.config:
            return str(self.folder.resolve())
        options = {key: value for key, value in self.config.items() if key not in free}
        return weights + json.dumps(options | {"weights": weights_of(self.config)})


def read_scored(folder: Path, weights: str | None) -> Scored:
    """The rows of a run and their resampled values; InputError where there are none.

    Args:
        folder: of the run.
        weights: "tuned" or "foundation"; None: tuned where there are such rows.
    """
    rows, path = read_rows(folder / "eval"), folder / "eval" / "draws.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            draws, seed = file["draws"].astype(np.float32), int(file["seed"])
            of = str(file["weights"]) if "weights" in file else ""
        if draws.ndim != 2 or len(draws) != len(rows) or draws.shape[1] < 2:
            raise ValueError(f"{list(draws.shape)} values for the {len(rows)} rows of results.json")
    except Exception as error:  # a damaged archive raises many kinds
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); run evaluate.py on {folder} "
                         "again") from error
    if of and (now := hash_file(folder / "model.safetensors")) and of != now:
        raise InputError(f"{folder}/eval is of other weights than model.safetensors: run evaluate.py on {folder} again")
    weights = weights or max((row.weights for row in rows), default="tuned")  # "tuned" comes after "foundation"
    found = {(row.domain, row.split, row.metric, row.protocol): (row, drawn.astype(float))
             for row, drawn in zip(rows, draws, strict=True) if row.weights == weights}
    if not found:
        raise InputError(f"{folder}: no figures of the {weights} weights; run evaluate.py on it without "
                         "--no-foundation")
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    domains, counts = config.get("domains", []), config.get("counts", {})
    if not isinstance(domains, list) or not set(map(str, domains)) <= {*DOMAINS} or not isinstance(counts, dict) \
            or not all(isinstance(count, int | float) for count in counts.values()):
        raise InputError(f"{path}: domains and counts do not name tasks and their images: restore it")
    return Scored(folder, config, seed, found)


def unlike_figures(a: Scored, b: Scored) -> dict[tuple[str, str, str], str]:
    """Why a figure that both runs have cannot be compared, by domain, split, metric.

    InputError where the resamplings of the runs do not pair.
    """
    if a.seed != b.seed or len(next(iter(a.found.values()))[1]) != len(next(iter(b.found.values()))[1]):
        raise InputError(f"{a.folder} and {b.folder} were resampled differently: run evaluate.py on both with the same "
                         "--seed and --bootstrap")
    made: list[dict] = [{}, {}]
    for strings, scored in zip(made, (a, b), strict=True):
        for domain, split, metric, protocol in scored.found:
            strings.setdefault((domain, split, metric), set()).add(protocol)
    found = {}
    for key in [key for key in made[0] if key in made[1]]:
        if unlike := sorted(made[0][key] ^ made[1][key]):
            where = [a.folder if protocol in made[0][key] else b.folder for protocol in unlike]
            found[key] = (f"only {where[0]} has it by the protocol '{unlike[0]}'"
                          + (f", only {where[-1]} by '{unlike[-1]}'" if where[-1] != where[0] else "")
                          + ": score both on the same splits with the same options")
        for protocol in made[0][key] & made[1][key]:
            counts = [scored.found[(*key, protocol)][0].count for scored in (a, b)]
            if counts[0] != counts[1]:
                found[key] = (f"{counts[0]:,} samples in {a.folder}, {counts[1]:,} in {b.folder} (unreadable images?): "
                              "run evaluate.py on both again")
    return found


def shared_figures(runs: list[Scored], splits: set[str]) -> list[tuple[str, str, str, str]]:
    """The figures that all runs have, made in the same way; InputError where --splits names others, or none is left."""
    first, *others = runs
    unlike = {key: why for other in others for key, why in unlike_figures(first, other).items()}
    unlike = {key: why for key, why in unlike.items() if not splits or "/".join(key[:2]) in splits}
    keys = [key for key in first.found if all(key in other.found for other in others) and key[:3] not in unlike
            and (not splits or "/".join(key[:2]) in splits)]
    by_split: dict[str, list[str]] = {}
    for key, why in unlike.items():
        by_split.setdefault("/".join(key[:2]), []).append(f"{key[2]}: {why}")
    for name, reasons in by_split.items():
        if splits or not keys:
            raise InputError(f"{name} {reasons[0]}")
        print(f"{name}: {len(reasons)} figures left out; {reasons[0]}")
    return keys


def aggregate(group: list[Scored], key: tuple) -> Figure:
    """The mean of a figure over runs that differ in their seed, and of its resampled values, person by person."""
    rows, draws = zip(*(scored.found[key] for scored in group), strict=True)
    return Figure(float(np.mean([row.value for row in rows])), np.mean(draws, axis=0), rows[0].count,
                  identities=rows[0].identities)


def compare_groups(groups: list[list[Scored]], splits: set[str]) -> list[dict]:
    """One row for each figure that all runs have and each group: its mean over seeds, and its lead over the first.

    The interval of a difference resamples people, the same ones in both runs, so that what makes a set hard for all
    cancels out. Seeds are not resampled: their standard deviation stands beside.
    """
    keys = [key for key in shared_figures([scored for group in groups for scored in group], splits)
            if not key[2].startswith(("AUC of rater ", "human AUC"))]  # people's own, the same beside every run
    if not keys:
        raise InputError("the runs have no figure in common" + (" on these --splits" if splits else "")
                         + ": score them on the same splits")
    table = []
    for key in keys:
        reference = aggregate(groups[0], key)
        for group in groups:
            figure, values = aggregate(group, key), [scored.found[key][0].value for scored in group]
            with np.errstate(invalid="ignore"):  # a resampling without errors has an infinite d', of both
                lead = Figure(figure.value - reference.value, figure.draws - reference.draws)
            spread = float(np.std(values, ddof=1)) if len(group) > 1 else None
            row = dict(zip(("domain", "split", "metric", "protocol"), key, strict=True))
            row |= {"runs": " ".join(scored.name for scored in group),
                    "weights": group[0].found[key][0].weights, "seeds": len(group), "value": figure.value,
                    "low": figure.low, "high": figure.high, "seed_sd": spread, "count": figure.count,
                    "headline": group[0].found[key][0].headline, "identities": group[0].found[key][0].identities}
            if group is not groups[0]:
                row |= {"difference": lead.value, "difference_low": lead.low, "difference_high": lead.high}
            table.append({"difference": None, "difference_low": None, "difference_high": None} | row)
    order = ("domain", "split", "metric", "protocol", "runs", "weights", "seeds", "value", "low", "high", "seed_sd",
             "difference", "difference_low", "difference_high", "headline", "count", "identities")
    return [{name: row[name] for name in order} for row in table]


def refuse_unshared(names: set[str], groups: list[list[Scored]], experts: bool) -> None:
    """InputError where --splits names what not all runs have; of experts each is asked for its own domains alone."""
    first, *others = [set.intersection(*({"/".join(key[:2]) for key in one.found} for one in group))
                      for group in groups]
    if experts:
        others = [set.union(*({name for name in found if name.split("/")[0] in group[0].config.get("domains", [])}
                              for found, group in zip(others, groups[1:], strict=True)))]
    shared = set.intersection(first, *others)
    if unknown := sorted(names - shared):
        raise InputError(f"the runs have no figure in common on these --splits: {', '.join(unknown)}; they share "
                         f"{', '.join(sorted(shared)) or 'none'}")


def start_of(config: dict) -> tuple:
    """What two runs must share to be compared: the untouched backbone and its input."""
    return *(config.get(key) for key in ("backbone", "size", "model", "image_size", "embed_dim")), weights_of(config)


def as_many(seen: int, wanted: int) -> bool:
    """Whether an expert saw as many images as it should, within a quarter."""
    return 0.75 <= seen / max(wanted, 1) <= 1.25


def find_expertise(run: Scored, expert: Scored) -> str:
    """The domain that an expert was trained on; InputError where the two cannot be held against each other."""
    known = expert.config.get("domains", [])
    if len(known) != 1:
        raise InputError(f"{expert.folder} is no expert: it was trained on {', '.join(known) or 'nothing known'}; "
                         f"train one with --domains {DOMAINS[1]}, or leave --experts out")
    domain = known[0]
    if domain not in run.config.get("domains", []):
        raise InputError(f"{run.folder} was not trained on {domain}, the task of the expert {expert.folder}: leave it "
                         "out")
    if start_of(run.config) != start_of(expert.config):
        raise InputError(f"{expert.folder} starts from another backbone, weights or input size than {run.folder}: "
                         "train the expert like the run")
    own, theirs = (one.config.get("counts", {}).get(domain, 0) for one in (run, expert))
    if not as_many(theirs, own):
        raise InputError(f"{expert.folder} saw {theirs:,} images of {domain}, {run.folder} {own:,}: not the same "
                         f"number (within a quarter); train the expert with --images {own}")
    return domain


def margin(expert: float, delta: float) -> float:
    """How much worse still counts as no worse: delta; where the expert is above 0.9, at most a tenth of its error.

    Such metrics are saturated: a point of 99.8 % would be five times what the expert gets wrong.
    """
    return delta if expert <= 0.9 else min(delta, 0.1 * (1 - expert))


OTHER_METRICS = ("d-prime", "eer", "retention", "gap of ", "clean ", " sd", "far found")  # no shares, or told elsewhere


def compare_experts(runs: list[Scored], groups: list[list[Scored]], splits: set[str], delta: float) -> list[dict]:
    """Non-inferiority of a run (or the mean of its seeds) to its own experts, each on the splits of its domain.

    Non-inferior: the lower end of the paired 95 % interval of run - expert lies above -margin; inferior: its upper end
    lies below; else undecided. (The lower end of a two-sided interval: a test at 2.5 %.) Metrics are those that are
    shares and better when higher: no d', EER, retention, gap to clean images, spread over folds or FAR found. What
    clean images of a shifted split score is told of the split that they are of.
    """
    table = []
    for group in groups:
        domain, kept = find_expertise(runs[0], group[0]), []
        for one in [*runs, *group]:
            found = {key: pair for key, pair in one.found.items() if key[0] == domain and key[1] != "everything"
                     and not key[3].startswith("human trials") and not any(word in key[2] for word in OTHER_METRICS)}
            kept.append(replace(one, found=found))
        if any(not one.found for one in kept):
            raise InputError(f"{group[0].folder} and {runs[0].folder}: no figures of {domain}: run evaluate.py on both")
        ours, theirs = kept[: len(runs)], kept[len(runs) :]
        for key in shared_figures(kept, splits):
            row = ours[0].found[key][0]
            run, expert = aggregate(ours, key), aggregate(theirs, key)
            lead, allowed = Figure(run.value - expert.value, run.draws - expert.draws), margin(expert.value, delta)
            verdict = ("non-inferior" if lead.low > -allowed or lead.low >= 0 else
                       "inferior" if lead.high < -allowed else "undecided")
            named = [" ".join(one.name for one in some) for some in (ours, theirs)]
            table.append(dict(zip(("domain", "split", "metric", "protocol"), key, strict=True)) | {
                "run": named[0], "expert": named[1], "value": run.value, "expert_value": expert.value,
                "difference": lead.value, "low": lead.low, "high": lead.high, "delta": allowed, "verdict": verdict,
                "headline": row.headline, "count": run.count, "identities": row.identities})
    if not table:
        raise InputError("the run and its experts have no figure in common: score them on the same splits")
    return table


def show_experts(table: list[dict], domains: list[str]) -> str:
    """The rows of `compare_experts` as Markdown; headlines first, then what they say together."""
    lines = ["Percent; differences run - expert, paired by person, with 95 % intervals. Non-inferior: the whole "
             "interval above -δ, which is --delta and, for an expert above 90 %, at most a tenth of its error."
             + f" {FEW_NOTE}." * any(mark(row["identities"]) for row in table), "",
             "| split | metric | run | expert | difference | low | high | δ | verdict | expert's name | protocol |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in sorted(table, key=lambda row: not row["headline"]):
        name, metric, expert, protocol = map(literal, (f"{row['domain']}/{row['split']}", row["metric"],
                                                       row["expert"], row["protocol"]))
        cells = [name, metric, *(f"{100 * row[key]:.1f}" for key in ("value", "expert_value")),
                 *(f"{100 * row[key]:+.2f}" + mark(row["identities"]) * (key == "high")
                   for key in ("difference", "low", "high")), f"{100 * row['delta']:.2f}",
                 f"**{row['verdict']}**" if row["headline"] else row["verdict"], expert, protocol]
        lines.append(f"| {' | '.join(cells)} |")
    verdicts = {row["verdict"] for row in table if row["headline"]}
    said = "inferior" if "inferior" in verdicts else "undecided" if "undecided" in verdicts else "non-inferior"
    without = [domain for domain in domains if domain not in {row["domain"] for row in table}]
    lines += ["", f"On the headlines together: {said}"
              + (f"; no expert of {', '.join(without)} was given" if without else " on every task") + "."]
    return "\n".join(lines) + "\n"


def draw_experts(path: Path, table: list[dict]) -> None:
    """Each headline's difference run - expert with its interval, beside the margin that it must stay above."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in table if row["headline"]] or table
    colours = {"non-inferior": "#009E73", "undecided": "#999999", "inferior": "#D55E00"}
    figure, ax = plt.subplots(figsize=(7, 1.4 + 0.5 * len(rows)))
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str], list[dict]] = {}
    for row in table:
        if row["headline"] or not any(row["headline"] for row in table):
            known = panels.setdefault((row["domain"], row["split"]), [])
            if not known or (known[0]["metric"], known[0]["protocol"]) == (row["metric"], row["protocol"]):
                known.append(row)  # the customary rule is first
    before = {(row.domain, row.split, row.metric): row.value for row in untouched}
    names = [row["runs"].split() for row in next(iter(panels.values()))]
    labels = [(f"{group[0].rpartition('-s')[0] or group[0]}, {len(group)} seeds" if len(group) > 1 else group[0])
              + (f" ({row['weights']})" if row["weights"] != "tuned" else "")
              for group, row in zip(names, next(iter(panels.values())), strict=True)]
    wide = min(len(panels), 4)
    high = -(-len(panels) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(2 + 2.6 * wide, high * (0.9 + 0.24 * len(labels))), squeeze=False,
                                sharey=True, layout="constrained")
    for ax, ((domain, split), rows) in zip(axes.flat, panels.items(), strict=False):
        scale = 1 if "d-prime" in rows[0]["metric"] else 100
        for i, row in enumerate(rows):
            error = np.maximum([[row["value"] - row["low"]], [row["high"] - row["value"]]], 0)
            ax.errorbar(scale * row["value"], i, xerr=scale * error, fmt="o", ms=4, capsize=2,
                        color=DOMAIN_COLOURS.get(domain, "black"))
        if (domain, split, rows[0]["metric"]) in before:
            ax.axvline(scale * before[domain, split, rows[0]["metric"]], color=COLOURS["foundation"], lw=2, zorder=0)
        ax.set_title(f"{domain}/{split}\n{rows[0]['metric']}", fontsize=9)
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

    def show(row: dict, *names: str, sign: str = "") -> list[str]:
        return [f"{row[name] * (1 if 'd-prime' in row['metric'] else 100):{sign}.1f}" for name in names]

    lines = ["Percent (d-prime: as it is) with 95 % intervals. Differences to the first run or group of seeds, paired "
             "by person; in bold where the interval leaves out 0. Seed SD: between runs that differ in the seed alone."
             + f" {FEW_NOTE}." * any(mark(row["identities"]) for row in table),
             "",
             "| split | metric | runs | value | seed SD | difference | count | protocol |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in table:
        lead = ""
        if row["difference"] is not None:
            lead = "{} [{}, {}]".format(*show(row, "difference", "difference_low", "difference_high", sign="+"))
            lead += mark(row["identities"])
            lead = f"**{lead}**" if row["difference_low"] > 0 or row["difference_high"] < 0 else lead
        spread = "" if row["seed_sd"] is None else show(row, "seed_sd")[0]
        value = "{} [{}, {}]".format(*show(row, "value", "low", "high")) + mark(row["identities"])
        name, metric, runs, protocol = map(literal, (f"{row['domain']}/{row['split']}", row["metric"],
                                                     row["runs"], row["protocol"]))
        cells = [name, metric, f"{runs} ({row['weights']})", value, spread, lead, f"{row['count']:,}", protocol]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
