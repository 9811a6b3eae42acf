"""Rows of results: from splits to figures to results.json, results.csv and the pages of a report."""

import csv
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path

import numpy as np

from data_prep import InputError
from data_prep.shards import ROLES, Split
from evaluate_bootstrap import FEW, Figure, gap, retention
from evaluate_classes import Readouts, score_classification
from evaluate_embed import Embedder, fingerprint, normalise
from evaluate_pairs import FARS, score_pairs, score_templates, score_verification
from evaluate_report import literal
from evaluate_search import (
    Unscorable,
    describe_variant,
    gallery_rule,
    origin_of,
    say_once,
    score_gallery,
    variants_of,
)
from run_folder import Run, write_atomically

# the figure that stands for a protocol in summaries; a readout that tuned and untouched backbones both have
HEADLINE = {"verification": "auc", "templates": "tar@far=0.0001", "reid": "rank-1", "identification": "rank-1",
            "classification": "nearest-mean top-1"}


# ---------------------------------------------------------------- results


@dataclass
class Row:
    """One figure. Values are fractions 0..1 but for d-prime; low and high: 95 % bootstrap over identities."""

    run: str
    weights: str  # "tuned" or "foundation"
    domain: str
    split: str
    protocol: str
    metric: str
    value: float
    low: float
    high: float
    count: int  # pairs, probes or images
    identities: int = 0  # or classes, that the interval resamples; 0: unknown

    @property
    def headline(self) -> bool:
        """Whether this is the figure that stands for its protocol."""
        return HEADLINE.get(self.protocol.split(",")[0]) == self.metric

    @property
    def out_of_distribution(self) -> bool:
        return self.protocol.endswith(", out of distribution")


def chance(split: Split, metric: str) -> float:
    """The expected value of a headline metric for random embeddings."""
    if metric.endswith("auc"):
        return 0.5
    if metric.startswith("tar@far="):
        return float(metric.partition("=")[2])
    if split.protocol["name"] == "classification":
        return 1 / len(split.classes)
    roles = split.optional("role")
    probes, gallery = np.flatnonzero(roles == ROLES.index("probe")), np.flatnonzero(roles > 0)
    mates = gallery_rule(split, gallery, variants_of(split)[0])
    found = [[len(places) for places in mates(probe)] for probe in probes]
    return float(np.mean([right / (len(gallery) - ignored) for right, ignored in found if right]))


def describe_protocol(split: Split, rule: str, flip: bool) -> str:
    """The protocol string of a row: two numbers of a metric are comparable exactly when theirs are equal."""
    parts = [split.protocol["name"], rule, f"set {fingerprint(split)}", "flip" if flip else "no flip"]
    return ", ".join(parts + ["out of distribution"] * bool(split.protocol.get("ood")))


def clean_of(split: Split, splits: list[Split]) -> Split | None:
    """Whose images an out-of-distribution split of objects shifts: its reference, or what has the same reference.

    It has images of every class that the split has images of; None where no such split is scored.
    """
    of, groups = split.protocol.get("reference"), split.protocol.get("groups") or {}
    if not split.protocol.get("ood") or split.name == of:
        return None
    wanted = [{name, *groups.get(name, [])} for name, count in zip(split.classes, split.counts, strict=True) if count]

    def covers(other: Split) -> bool:
        there = {name for name, count in zip(other.classes, other.counts, strict=True) if count}
        return not any(there.isdisjoint(group) for group in wanted)

    alike = [other for other in splits if other.domain == split.domain and other.folder != split.folder
             and other.protocol["name"] == "classification" and covers(other)]
    return next((other for other in alike if other.name == of),
                next((other for other in alike if not other.protocol.get("ood")
                      and other.protocol["reference"] == of), None))


def scopes_of(split: Split, reference: Split, readouts: Readouts) -> list[tuple[list[str] | None, str, str]]:
    """What of a classification split is scored: all of it; and the classes that a run never saw, among themselves.

    Returns:
        Classes (None: all), a prefix of the metrics and an addition to the rule of each.
    """
    seen, how = readouts.seen_classes(split, reference) if readouts.trained else ([], "")
    unseen = [name for name in split.classes if name not in seen]
    if not readouts.trained or len(unseen) < 2:
        return [(None, "", "")]
    which = hashlib.sha256(json.dumps(unseen).encode()).hexdigest()[:8]
    return [(None, "", ""), (unseen, "unseen-class ",
                             f", open set of {len(unseen)} classes not trained on {how} {which}")]


def unsupported_fars(impostors: int) -> str:
    """What to say of the FARs that so many impostor pairs cannot tell; "" where they support all."""
    kept = [far for far in FARS if far * impostors >= 1]
    lost = [np.format_float_scientific(far, trim="-", exp_digits=1) for far in FARS if far not in kept]
    return f"{impostors:,} impostor pairs support no FAR{f' below {min(kept):g}' if kept else ''}: " \
        f"{', '.join(lost)} {'are' if len(lost) > 1 else 'is'} left out" if lost else ""


def score(embed: Embedder, splits: list[Split], root: dict, run: Run | None, draws: int, seed: int,
          readouts: Readouts, without: dict[str, np.ndarray] | None = None, among: list[Split] | None = None
          ) -> tuple[dict[str, dict[str, dict[str, Figure]]], dict]:
    """Score one backbone on test splits.

    Args:
        readouts: of classification.
        without: rows to leave out, by "domain/split"; also of the clean images that a shifted split is held against.
        among: test splits that those clean images may be of (default: those that are scored).

    Returns:
        By "domain/split": figures {rule: {metric: Figure}}, the customary rule first, and curves to draw.
    """
    figures, curves, fitted, failed = {}, {}, {}, {}
    for split in splits:
        x, key = embed.raw(split), f"{split.domain}/{split.name}"
        bad, left_out = int((~np.isfinite(x[:, 0])).sum()), (without or {}).get(key, [])
        x[left_out] = np.nan
        try:
            if not np.isfinite(x[:, 0]).any():
                raise Unscorable(f"{split.folder}: no image left to score: all are unreadable or leaked")
            if split.protocol["name"] == "classification":
                found, curve = score_objects(embed, normalise(x), split, root, run, draws, seed, readouts, fitted,
                                             without or {}, among or splits), {}
            else:
                found, curve = score_people(embed, x, split, draws, seed)
        except Unscorable as error:
            failed[key] = error
            continue
        figures[key] = found | {f"random pairs, seed {seed}": score_pairs(x, split.labels, draws, seed)}
        curves[key] = curve
        if bad:
            print(f"  {key}: {bad} unreadable images left out")
    if failed and not figures:
        raise next(iter(failed.values()))
    for key, error in failed.items():
        say_once(f"  {key}: NOT SCORED: {error.message}")
    return figures, curves


def score_people(embed: Embedder, x: np.ndarray, split: Split, draws: int, seed: int) -> tuple[dict, dict]:
    """Figures by rule and curves of a split whose images are compared with each other; x is normalised in place."""
    protocol, curve, found = split.protocol["name"], {}, {}
    if protocol == "templates":
        found, curve = score_templates(x, split, draws, seed, embed.device)
    normalise(x)
    if protocol == "verification":
        found, curve = score_verification(x, split, draws, seed)
    elif protocol in ("reid", "identification"):
        failed: list[Unscorable] = []
        for variant in variants_of(split):
            try:
                figures, drawn = score_gallery(x, split, draws, seed, variant, embed.device)
            except Unscorable as error:
                failed.append(error)
                continue
            found[describe_variant(split, variant, seed)], curve = figures, curve or drawn
        if not found:
            raise failed[0]
        for error in failed:
            say_once(f"  {split.domain}/{split.name}: {error.message}")
    elif not found:
        raise InputError(f"{split.folder}: protocol {protocol!r} is not known to this version")
    table = {"verification": "pairs", "templates": "template_pairs"}.get(protocol)
    if table and table in split.index["columns"]:
        pairs = split.column(table)
        impostor = pairs[:, 2] == 0
        if protocol == "verification":  # of templates, those that are not enrolled count too
            impostor &= np.isfinite(x[pairs[:, :2], 0]).all(1)
        if line := unsupported_fars(int(impostor.sum())):
            say_once(f"  {split.domain}/{split.name}: {line}")
    return found, curve


def score_objects(embed: Embedder, x: np.ndarray, split: Split, root: dict, run: Run | None, draws: int, seed: int,
                  readouts: Readouts, fitted: dict, without: dict, among: list[Split]) -> dict[str, dict[str, Figure]]:
    """Figures by rule of a classification split with unit embeddings x; other arguments as of `score`.

    `fitted`: the readouts of each reference so far.
    """
    key, found = f"{split.domain}/{split.name}", {}
    reference, head, classes = root[split.domain][split.protocol["reference"]], None, []
    if run is not None and split.domain in run.classes:
        start, end = run.class_ranges[split.domain]
        head, classes = run.head[start:end].numpy(), run.classes[split.domain]
    y = embed(reference)
    if reference.name not in fitted:
        fitted[reference.name] = readouts.fit(embed, y, reference, seed)
    if reference.folder == split.folder:  # row for row the same; another split's rows stay references
        y[without.get(key, [])] = np.nan
    linear = {name: parts for name, parts in fitted[reference.name].items()
              if name != "probe" or reference.folder != split.folder}  # a probe knows what it was fitted to
    by_readout = {"nearest-mean": f"nearest class mean, reference {fingerprint(reference)}",
                  "knn": f"20 neighbours at T 0.07, reference {fingerprint(reference)}",
                  "head": "trained class weights", **{name: rule for name, (_, _, rule) in linear.items()}}
    for only, prefix, which in scopes_of(split, reference, readouts):
        by_metric = score_classification(
            x, split, (y, reference), head, classes, draws, seed, split.protocol.get("groups"),
            {name: (w, b) for name, (w, b, _) in linear.items()}, only, embed.device)
        rules = {metric: by_readout[metric.rpartition(" ")[0]] for metric in by_metric}
        for metric, figure in by_metric.items():
            found.setdefault(rules[metric] + which, {})[prefix + metric] = figure
        if only is None and (clean := clean_of(split, among)):
            z = embed(clean)
            z[without.get(f"{clean.domain}/{clean.name}", [])] = np.nan
            if not np.isfinite(z[:, 0]).any():
                continue
            itself = reference.folder == clean.folder  # what is left out votes for none of the others
            before = score_classification(
                z, clean, (z if itself else y, reference), head, classes, draws, seed,
                split.protocol.get("groups"), {name: (w, b) for name, (w, b, _) in linear.items()
                                               if name != "probe" or not itself}, split.classes, embed.device)
            same = f"clean is {clean.name} {fingerprint(clean)} by the same classes"
            for metric in [metric for metric in by_metric if metric in before]:
                found.setdefault(f"{same}, {rules[metric]}", {}).update({
                    f"gap of {metric}": gap(before[metric], by_metric[metric], seed),
                    f"clean {metric}": replace(before[metric], chance=math.nan)})  # no retention of it here
        if only is not None:
            labels = np.where(np.isin(split.labels, [split.classes.index(name) for name in only]), split.labels, -1)
            pairs = score_pairs(x, labels, draws, seed)
            found[f"random pairs, seed {seed}{which}"] = {prefix + m: f for m, f in pairs.items()}
    return found


def check_references(splits: list[Split], root: dict[str, dict[str, Split]]) -> None:
    """InputError where a classification split cannot be read out by its reference: before anything is embedded."""
    for split in splits:
        if split.protocol["name"] != "classification":
            continue
        name, groups = split.protocol["reference"], split.protocol.get("groups") or {}
        what = f"prepare {split.domain}/{split.name} again with --reference SPLIT, a split of the same classes, or " \
            "score others with --splits"
        if name not in root[split.domain]:
            raise InputError(f"{split.folder}: its reference split {str(name)!r} is not there: prepare that, or {what}")
        known = set(root[split.domain][name].classes)
        if unknown := [one for group in split.classes for one in groups.get(group, [group]) if one not in known]:
            raise InputError(f"{split.folder}: class {unknown[0]!r}, {len(unknown):,} in all, is not in its reference "
                             f"{root[split.domain][name].folder}: {what}")


Results = list[tuple["Row", np.ndarray]]  # rows with the resampled values behind them


def make_rows(run: str, splits: list[Split], figures: dict[str, dict], flip: bool) -> Results:
    """All rows, split by split: the figures of each set of weights, then what classification retains."""
    rows: Results = []
    for split in splits:
        key = f"{split.domain}/{split.name}"
        by_weights = {weights: {rule: dict(by_metric) for rule, by_metric in found[key].items()}
                      for weights, found in figures.items() if key in found}
        if split.protocol["name"] == "classification" and len(by_weights) == 2:
            for rule, before in by_weights["foundation"].items():  # what both have: never the trained class weights
                after = by_weights["tuned"].get(rule, {})
                for metric in [m for m in before if m in after and math.isfinite(before[m].chance)]:
                    if kept := retention(before[metric], after[metric], before[metric].chance):
                        after[f"retention of {metric}"] = kept
        for weights, by_rule in by_weights.items():
            for rule, found in by_rule.items():
                protocol = describe_protocol(split, rule, flip)
                rows += rows_of(run, weights, split.domain, split.name, protocol, found)
    return rows


def rows_of(run: str, weights: str, domain: str, split: str, protocol: str, found: dict[str, Figure]) -> Results:
    """The rows of some figures; one that could not be computed is absent."""
    return [(Row(run, weights, domain, split, protocol, metric, f.value, f.low, f.high, f.count, f.identities), f.draws)
            for metric, f in found.items() if math.isfinite(f.value)]


def make_unified_rows(run: str, splits: list[Split], figures: dict[str, dict], flip: bool, limit: int,
                      seed: int) -> Results:
    """The rows of the unified gallery, split "everything": of each domain, and of "all"."""
    sets = " + ".join(f"{split.domain}/{split.name} {fingerprint(split)}" for split in splits)
    copies = len({origin_of(split)[1] for split in splits}) < len(splits)
    protocol = f"unified, at most {limit} probes a domain, seed {seed}, sets {sets}, " \
        + "copies of the probe's picture ignored, " * copies + ("flip" if flip else "no flip")
    return [row for weights, by_domain in figures.items() for domain, found in by_domain.items()
            for row in rows_of(run, weights, domain, "everything", protocol, found)]


def headlines(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """{(domain, split): {weights: its headline row}} in the order of the rows."""
    found: dict = {}
    for row in rows:
        if row.headline:
            found.setdefault((row.domain, row.split), {}).setdefault(row.weights, row)  # the customary rule is first
    return found


def show_value(row: Row) -> str:
    """A figure with its interval: percent, or as it is for d-prime; marked where too few identities are behind it."""
    factor = 1 if "d-prime" in row.metric else 100
    return f"{factor * row.value:.1f} [{factor * row.low:.1f}, {factor * row.high:.1f}]" + mark(row.identities)


def mark(identities: int) -> str:
    """A sign behind an interval of so few identities or classes that it is too narrow."""
    return "†" if 0 < identities < FEW else ""


FEW_NOTE = f"†: of fewer than {FEW} identities or classes, whose bootstrap interval is too narrow"


def make_report(rows: list[Row], splits: list[Split], flip: bool, middle: list[str]) -> list[str]:
    """The lines of report.md: the headline of every split before and after, what stands between, then every figure."""
    by_name = {(split.domain, split.name): split for split in splits}
    lines = [f"# {literal(rows[0].run)}", "",
             "Percent (d-prime: as it is) with 95 % bootstrap intervals, resampled by identity. Cosine similarity; "
             f"embeddings of the image{' plus its mirror image' if flip else ''}. Foundation: the untouched backbone."
             + f" {FEW_NOTE}." * any(mark(row.identities) for row in rows),
             "",
             "| split | metric | chance | foundation | tuned | change |", "| --- | --- | --- | --- | --- | --- |"]
    for key, pair in headlines(rows).items():
        split, row = by_name[key], next(iter(pair.values()))
        both = [show_value(pair[w]) if w in pair else "" for w in ("foundation", "tuned")]
        change = f"{100 * (pair['tuned'].value - pair['foundation'].value):+.1f}" if len(pair) == 2 else ""
        label = literal("/".join(key)) + (" (out of distribution)" if row.out_of_distribution else "")
        level = f"{100 * chance(split, row.metric):.1f}"
        lines.append(f"| {label} | {row.metric} | {level} | {both[0]} | {both[1]} | {change} |")
    lines += [*middle, "", "## All figures", "",
              "Two figures of a metric are comparable where their protocols are equal.", "",
              "| split | metric | foundation | tuned | count | protocol |", "| --- | --- | --- | --- | --- | --- |"]
    table: dict = {}
    for row in rows:
        table.setdefault((row.domain, row.split, row.protocol, row.metric), {})[row.weights] = row
    for (domain, name, protocol, metric), pair in table.items():
        both = [show_value(pair[w]) if w in pair else "" for w in ("foundation", "tuned")]
        count = next(iter(pair.values())).count
        # names of raters, sources and files of prompts may hold what ends a cell, or is markup
        name, metric, protocol = map(literal, (f"{domain}/{name}", metric, protocol))
        lines.append(f"| {name} | {metric} | {both[0]} | {both[1]} | {count:,} | {protocol} |")
    return lines


# ---------------------------------------------------------------- people on the same trials


def write_rows(folder: Path, rows: list[Row]) -> None:
    """results.json and results.csv: the same rows."""
    table = [asdict(row) for row in rows]
    write_atomically(folder / "results.json", lambda path: path.write_text(json.dumps(table, indent=1) + "\n"))

    write_csv(folder / "results.csv", table)


def write_draws(folder: Path, results: Results, seed: int, weights: str | None = None) -> None:
    """draws.npz: the resampled values of every row, [rows, draws], which `compare` pairs between runs.

    `weights`: SHA-256 of the model.safetensors that they are of, where there is one.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, draws=np.array([draws for _, draws in results], dtype=np.float32), seed=seed,
                                weights=weights or "")

    write_atomically(folder / "draws.npz", write)


FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what begins a formula in a spreadsheet


def write_csv(path: Path, table: list[dict], columns: tuple[str, ...] = ()) -> None:
    """A list of like dictionaries as CSV with a header, atomically; `columns`: of a table that may be empty.

    Text that a spreadsheet would take for a formula gets an apostrophe before it; numbers, negative ones too, do not.
    """

    def plain(value):
        formula = isinstance(value, str) and value[:1] in FORMULA
        return f"'{value}" if formula and not re.fullmatch(r"[-+][\d.]+(e[-+]?\d+)?", value) else value

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, columns or list(table[0]))
            writer.writeheader()
            writer.writerows({key: plain(value) for key, value in row.items()} for row in table)

    write_atomically(path, write)


def read_rows(folder: Path) -> list[Row]:
    """The rows of RUN/eval/results.json; InputError where there are none."""
    path, kinds = folder / "results.json", {str: str, float: (int, float), int: int}
    try:
        rows = [Row(**row) for row in json.loads(path.read_text())]
        for (number, row), one in product(enumerate(rows), fields(Row)):
            value = getattr(row, one.name)
            finite = not isinstance(value, float) or math.isfinite(value)
            if not isinstance(value, kinds[one.type]) or isinstance(value, bool) or not finite:
                raise ValueError(f"row {number}: {one.name} is {str(value)[:80]!r}")
        return rows
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run `python evaluate.py --run {folder.parent}` first") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run evaluate.py again") from error
