"""Rows of results: from splits to figures, results.json, results.csv and the lines of a report."""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np

from data_prep import InputError, literal, option, say_once, write_atomically, write_csv, write_json
from data_prep.format import ROLES, Split, fingerprint
from models.runs import Run
from protocols.bootstrap import FEW_NOTE, Estimate, Unscorable, finite, gap, mark, normalise, retention
from protocols.choice import Decisions, categories_of, choose, score_choice
from protocols.classify import Readouts, score_classification
from protocols.embed import Embedder, EmbedOptions
from protocols.humans import Rating, Trials
from protocols.pairs import FARS, score_pairs, score_verification
from protocols.results import Row
from protocols.search import describe_variant, gallery_rule, origin_of, score_gallery, variants_of
from protocols.templates import score_templates


@dataclass
class ScoreOptions(EmbedOptions):
    """Options that evaluation shares with `leaks`."""

    splits: str | None = option("scores", None, str, "Comma-separated domain/split: score and report these alone "
                                "(default: all test splits).", metavar="NAMES")
    bootstrap: int = option("scores", 500, click.IntRange(2, 1_000_000), "Resamplings for the intervals.")
    sheet: bool = option("scores", False, bool, "Draw what is scored, sheet-DOMAIN-SPLIT.png: probes of each split "
                         "with the ten images nearest to them, of verification the hardest pairs; of `leaks` the "
                         "nearest pairs, leaks-sheet.png.")


def chance(split: Split, row: Row) -> float:
    """The expected value of a split's headline for random embeddings."""
    if known := {"verification": 0.5, "templates": 1e-4}.get(split.protocol["name"], row.chance):
        return known
    roles = split.optional("role")
    probes, gallery = np.flatnonzero(roles == ROLES.index("probe")), np.flatnonzero(roles > 0)
    mates = gallery_rule(split, gallery, variants_of(split)[0])
    counts = [[len(places) for places in mates(probe)] for probe in probes]
    return float(np.mean([right / (len(gallery) - ignored) for right, ignored in counts if right]))


def describe_losses(protocol: dict) -> list[str]:
    """What a protocol lost of the images that it was prepared from, and whom it does not enrol."""
    parts = {"misses": "{:,} listed images unreadable and missed", "unreadable": "without {:,} unreadable images",
             "pairs_lost": "without {:,} pairs of lost images", "open_set": "open set, {:g} of the people not enrolled"}
    return [text.format(protocol[key]) for key, text in parts.items() if protocol.get(key)]


def clean_of(split: Split, splits: list[Split]) -> Split | None:
    """The clean split of an out-of-distribution split of objects: its reference, or one of the same reference.

    It has images of every class of which the split has images; None if no such split is scored.
    """
    of, groups = split.protocol.get("reference"), split.protocol.get("groups") or {}
    if not split.protocol.get("ood") or split.name == of:
        return None
    wanted = [{name, *groups.get(name, [])} for name, count in zip(split.classes, split.counts, strict=True) if count]

    def covers(other: Split) -> bool:
        present = {name for name, count in zip(other.classes, other.counts, strict=True) if count}
        return not any(present.isdisjoint(group) for group in wanted)

    alike = [other for other in splits if other.domain == split.domain and other.folder != split.folder
             and other.protocol["name"] == "classification" and covers(other) and (
                 other.name == of or (not other.protocol.get("ood") and other.protocol["reference"] == of))]
    return min(alike, key=lambda other: other.name != of, default=None)


def unseen_scope(split: Split, reference: Split, readouts: Readouts) -> tuple[list[str], str]:
    """The classes that a run was not trained on, which are scored apart, and an addition to the rule; [] if too few."""
    seen, how = readouts.seen_classes(split, reference) if readouts.trained else (split.classes, "")
    unseen = [name for name in split.classes if name not in seen]
    which = hashlib.sha256(json.dumps(unseen).encode()).hexdigest()[:8]
    return unseen * (len(unseen) > 1), f", open set of {len(unseen)} classes not trained on {how} {which}"


def unsupported_fars(impostors: int) -> str:
    """A line on the FARs that so few impostor pairs do not support; "" if they support all."""
    lost = [np.format_float_scientific(far, trim="-", exp_digits=1) for far in FARS if far * impostors < 1]
    return f"{impostors:,} impostor pairs support no FAR of {', '.join(lost)}: left out" if lost else ""


def score(embed: Embedder, splits: list[Split], root: dict, run: Run | None, draws: int, seed: int,
          readouts: Readouts, without: dict[str, np.ndarray] | None = None, among: list[Split] | None = None,
          trials: dict[str, Trials] | None = None) -> tuple[dict[str, dict[str, dict[str, Estimate]]], dict]:
    """Score one backbone on test splits.

    Args:
        readouts: of classification.
        without: rows to leave out, by "domain/split", also from the clean images of a shifted split.
        among: test splits that may be the clean ones (default: those that are scored).
        trials: what people chose, by "domain/split".

    Returns:
        By "domain/split": figures {rule: {metric: Estimate}}, the customary rule first, and curves to draw.
    """
    figures, curves, fitted, failed, without = {}, {}, {}, {}, without or {}
    for split in splits:
        x, key, curve = embed.raw(split), f"{split.domain}/{split.name}", {}
        bad = int((~np.isfinite(x[:, 0])).sum())
        x[without.get(key, [])] = np.nan
        try:
            if not np.isfinite(x[:, 0]).any():
                raise Unscorable(f"{split.folder}: no image left to score: all are unreadable or leaked")
            if split.protocol["name"] == "classification":
                by_rule = score_objects(embed, normalise(x), split, root, run, draws, seed, readouts, fitted, without,
                                        among or splits)
            elif split.protocol["name"] == "choice":
                by_rule, decisions = score_choices(embed, normalise(x), split, root, run, draws, seed, readouts,
                                                   (trials or {}).get(key))
                curve = {"decisions": decisions} if decisions.people else {}
            else:
                by_rule, curve = score_people(embed, x, split, draws, seed)
        except Unscorable as error:
            failed[key] = error
            continue
        figures[key] = by_rule | {f"random pairs, seed {seed}": score_pairs(x, split.labels, draws, seed)}
        curves[key] = curve
        if bad and bad > split.missing.sum():  # those are misses
            print(f"  {key}: {bad - split.missing.sum()} unreadable images left out")
    if failed and not figures:
        raise next(iter(failed.values()))
    for key, error in failed.items():
        say_once(f"  {key}: NOT SCORED: {error.message}")
    return figures, curves


def score_people(embed: Embedder, x: np.ndarray, split: Split, draws: int, seed: int) -> tuple[dict, dict]:
    """Figures by rule and curves of a split whose images are compared with each other. Normalises x in place."""
    protocol, name, by_rule, curve = split.protocol["name"], f"{split.domain}/{split.name}", {}, {}
    if protocol == "templates":
        by_rule, curve = score_templates(x, split, draws, seed, embed.device)
    normalise(x)
    if protocol == "verification":
        by_rule, curve = score_verification(x, split, draws, seed)
    elif protocol in ("reid", "identification"):
        failed: list[Unscorable] = []
        for variant in variants_of(split):
            try:
                figures, drawn = score_gallery(x, split, draws, seed, variant, embed.device)
                by_rule[describe_variant(split, variant, seed)], curve = figures, curve or drawn
            except Unscorable as error:
                failed.append(error)
        if not by_rule:
            raise failed[0]
        for error in failed:
            say_once(f"  {name}: {error.message}")
    elif not by_rule:
        raise InputError(f"{split.folder}: protocol {protocol!r} is unknown to this version")
    table = {"verification": "pairs", "templates": "template_pairs"}.get(protocol)
    if table in split.index["columns"]:
        pairs = split.column(table)
        impostor = pairs[:, 2] == 0
        if protocol == "verification":  # templates count even if not enrolled
            impostor &= np.isfinite(x[pairs[:, :2], 0]).all(1)
        if line := unsupported_fars(int(impostor.sum())):
            say_once(f"  {name}: {line}")
    return by_rule, curve


def head_of(run: Run | None, domain: str) -> tuple[np.ndarray | None, list[str]]:
    """Trained class weights [C, D] of a domain and their names; None and [] without any."""
    if run is None or domain not in run.classes:
        return None, []
    start, end = run.class_ranges[domain]
    return run.head[start:end].numpy(), run.classes[domain]


def group_by_rule(figures: Iterable[tuple[str, str, Estimate]]) -> dict[str, dict[str, Estimate]]:
    """{rule: {metric: figure}} of (rule, metric, figure)."""
    by_rule: dict[str, dict[str, Estimate]] = {}
    for rule, metric, figure in figures:
        by_rule.setdefault(rule, {})[metric] = figure
    return by_rule


def score_choices(embed: Embedder, x: np.ndarray, split: Split, root: dict, run: Run | None, draws: int, seed: int,
                  readouts: Readouts, trials: Trials | None) -> tuple[dict[str, dict[str, Estimate]], Decisions]:
    """Figures by rule of a forced choice with unit embeddings x, and the decisions; arguments as of `score`."""
    reference = root[split.domain][split.protocol["reference"]]
    texts = {name: (f"zero-shot {name.split()[0]}", w)
             for name, w in readouts.texts(embed, split.protocol["choices"]).items()}
    models, among = choose(x, split, (embed(reference), reference), *head_of(run, split.domain), dict(texts.values()),
                           embed.device)
    by_readout = {"nearest-mean": f"nearest mean of a category, reference {fingerprint(reference)}",
                  "knn": f"20 neighbours at T 0.07, reference {fingerprint(reference)}",
                  "head": "mean of a category's trained class weights",
                  **{readout: f"zero-shot by prompts {name}" for name, (readout, _) in texts.items()}}
    figures, decisions = score_choice(models, among, split, np.isfinite(x[:, 0]), trials, draws, seed)
    if trials:
        answers = hashlib.sha256(repr((trials.observers, trials.answers.tolist())).encode()).hexdigest()[:8]
        beside = f"{len(trials.observers)} observers {answers}, reference {fingerprint(reference)}"
    return group_by_rule((f"{scope}, {beside if figure.kind else by_readout[figure.readout]}", metric, figure)
                         for scope, by_metric in figures.items() for metric, figure in by_metric.items()), decisions


def score_objects(embed: Embedder, x: np.ndarray, split: Split, root: dict, run: Run | None, draws: int, seed: int,
                  readouts: Readouts, fitted: dict, without: dict, among: list[Split]
                  ) -> dict[str, dict[str, Estimate]]:
    """Figures by rule of a classification split with unit embeddings x; other arguments as of `score`.

    `fitted`: the readouts of each reference, so far.
    """
    reference, (head, classes) = root[split.domain][split.protocol["reference"]], head_of(run, split.domain)
    y = embed(reference)
    if reference.name not in fitted:
        fitted[reference.name] = readouts.fit(embed, y, reference, seed)
    linear = fitted[reference.name]
    rules = {"nearest-mean": f"nearest class mean, reference {fingerprint(reference)}",
             "knn": f"20 neighbours at T 0.07, reference {fingerprint(reference)}",
             "head": "trained class weights", **{name: rule for name, (_, _, rule) in linear.items()}}

    def classify(x: np.ndarray, scored: Split, only: list[str] | None = None) -> dict[str, Estimate]:
        itself = scored.folder == reference.folder  # left-out images do not vote, nor is it scored by its own probe
        return score_classification(
            x, scored, (x if itself else y, reference), head, classes, draws, seed, split.protocol.get("groups"),
            {name: (w, b) for name, (w, b, _) in linear.items() if name != "probe" or not itself}, only, embed.device)

    by_metric = classify(x, split)
    figures = [(rules[figure.readout], metric, figure) for metric, figure in by_metric.items()]
    if clean := clean_of(split, among):
        z = embed(clean)
        z[without.get(f"{clean.domain}/{clean.name}", [])] = np.nan
        before = classify(z, clean, split.classes) if np.isfinite(z[:, 0]).any() else {}
        same = f"clean is {clean.name} {fingerprint(clean)} by the same classes"
        for metric in [metric for metric in by_metric if metric in before]:  # the clean figure is not to be retained
            rule = f"{same}, {rules[by_metric[metric].readout]}"
            figures += [(rule, f"gap of {metric}", gap(before[metric], by_metric[metric], seed)),
                        (rule, f"clean {metric}", replace(before[metric], chance=math.nan, kind="clean"))]
    unseen, which = unseen_scope(split, reference, readouts)
    if unseen:
        labels = np.where(np.isin(split.labels, [split.classes.index(name) for name in unseen]), split.labels, -1)
        apart = [(rules[figure.readout], metric, figure) for metric, figure in classify(x, split, unseen).items()]
        apart += [(f"random pairs, seed {seed}", *one) for one in score_pairs(x, labels, draws, seed).items()]
        figures += [(rule + which, f"unseen-class {metric}", replace(figure, unseen=True))
                    for rule, metric, figure in apart]
    return group_by_rule(figures)


def check_references(splits: list[Split], root: dict[str, dict[str, Split]]) -> None:
    """InputError if a classification split cannot be scored by its reference, before anything is embedded."""
    for split in splits:
        if split.protocol["name"] not in ("classification", "choice"):
            continue
        name, groups = split.protocol["reference"], split.protocol.get("groups") or {}
        what = f"prepare {split.domain}/{split.name} again with --reference SPLIT, a split of the same classes, or " \
            "score others with --splits"
        if name not in root[split.domain]:
            raise InputError(f"{split.folder}: its reference split {str(name)!r} is missing: prepare it, or {what}")
        known = set(root[split.domain][name].classes)
        if split.protocol["name"] == "choice":
            if not (categories_of([*known], split) >= 0).any():
                raise InputError(f"{split.folder}: its reference {root[split.domain][name].folder} has none of the "
                                 "categories: prepare it again with --classes FILE, the classes of each category")
        elif unknown := [one for group in split.classes for one in groups.get(group, [group]) if one not in known]:
            raise InputError(f"{split.folder}: class {unknown[0]!r}, {len(unknown):,} in all, is not in its reference "
                             f"{root[split.domain][name].folder}: {what}")


Results = list[tuple[Row, np.ndarray]]  # rows with the resampled values behind them


def make_rows(run: str, splits: list[Split], figures: dict[str, dict], flip: bool) -> Results:
    """All rows, split by split: the figures of each set of weights, then what classification retains."""
    rows: Results = []
    for split in splits:
        key = f"{split.domain}/{split.name}"
        for weights, scored in figures.items():
            untouched = figures.get("foundation", {}).get(key, {}) if weights == "tuned" else {}
            for rule, by_metric in scored.get(key, {}).items():
                kept = {f"retention of {metric}": retention(before, by_metric[metric], before.chance)
                        for metric, before in untouched.get(rule, {}).items()  # it lacks the trained class weights
                        if metric in by_metric and math.isfinite(before.chance) and not before.kind}
                rows += rows_of(by_metric | {metric: figure for metric, figure in kept.items() if figure}, Row(
                    run, weights, split.domain, split.name, kind=split.protocol["name"], rule=rule, flip=flip,
                    images=f"set {fingerprint(split)}", lacks=", ".join(describe_losses(split.protocol)),
                    ood=bool(split.protocol.get("ood"))))
    return rows


def rows_of(figures: dict[str, Estimate], about: Row) -> Results:
    """The rows of figures by metric, which share the fields of `about`; figures that are not finite are absent."""
    return [(replace(about, protocol=about.describe(), metric=metric, value=f.value, low=f.low, high=f.high,
                     count=f.count, identities=f.identities, kind=f.kind or about.kind, readout=f.readout,
                     measure=f.measure or metric, unseen=f.unseen, chance=finite(f.chance) or 0), f.draws)
            for metric, f in figures.items() if math.isfinite(f.value)]


def make_unified_rows(run: str, splits: list[Split], figures: dict[str, dict], flip: bool, limit: int,
                      seed: int) -> Results:
    """The rows of the unified gallery, split "everything": of each domain, and of "all"."""
    sets = " + ".join(f"{split.domain}/{split.name} {fingerprint(split)}" for split in splits)
    copies = len({origin_of(split)[1] for split in splits}) < len(splits)
    about = {"kind": "unified", "rule": f"at most {limit} probes a domain, seed {seed}", "flip": flip,
             "images": f"sets {sets}" + ", copies of the probe's picture ignored" * copies}
    return [row for weights, by_domain in figures.items() for domain, by_metric in by_domain.items()
            for row in rows_of(by_metric, Row(run, weights, domain, "everything", **about))]


def make_human_rows(run: str, ratings: list[Rating], splits: dict[str, Split], figures: dict[str, dict],
                    flip: bool) -> Results:
    """The rows of `score_humans`, by weights: of each split, of "all splits" of a domain, and of domain "all"."""
    rows: Results = []
    for weights, by_place in figures.items():
        for place, by_metric in by_place.items():
            rated = [r for r in ratings if place in (r.split, r.split.split("/")[0], "everything")]
            key = hashlib.sha256(repr(sorted((r.split, *sorted((r.left, r.right)), r.rater, r.value)
                                             for r in rated)).encode()).hexdigest()[:8]
            sets = " + ".join(f"{name} {fingerprint(splits[name])}" for name in sorted({r.split for r in rated}))
            domain, _, split = ("all/human trials" if place == "everything" else place).partition("/")
            rows += rows_of(by_metric, Row(run, weights, domain, split or "all splits", kind="human trials",
                                           rule=f"ratings {key}", images=f"sets {sets}", flip=flip))
    return rows


def headlines(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """{(domain, split): {weights: its headline row}} in the order of the rows."""
    by_split: dict = {}
    for row in rows:
        if row.headline:
            by_split.setdefault((row.domain, row.split), {}).setdefault(row.weights, row)  # customary rule first
    return by_split


def show_value(row: Row) -> str:
    """A figure with its interval: percent, or as it is for d-prime; marked where too few identities are behind it."""
    value, low, high = (f"{row.unit * end:.1f}" for end in (row.value, row.low, row.high))
    return f"{value} [{low}, {high}]" + mark(row.identities)


def as_table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in (columns, ["---"] * len(columns), *rows)]


def before_and_after(pair: dict[str, Row]) -> list[str]:
    """A figure of the untouched and of the tuned backbone; "" where there is none."""
    return [show_value(pair[weights]) if weights in pair else "" for weights in ("foundation", "tuned")]


def make_report(rows: list[Row], splits: list[Split], flip: bool, middle: list[str]) -> list[str]:
    """The lines of report.md: the headline of every split before and after, `middle`, then every figure."""
    by_name, table = {(split.domain, split.name): split for split in splits}, []
    for key, pair in headlines(rows).items():
        row = next(iter(pair.values()))
        change = f"{100 * (pair['tuned'].value - pair['foundation'].value):+.1f}" if len(pair) == 2 else ""
        table.append([literal("/".join(key)) + " (out of distribution)" * row.ood, row.metric,
                      f"{100 * chance(by_name[key], row):.1f}", *before_and_after(pair), change])
    return [f"# {literal(rows[0].run)}", "",
            "Percent (d-prime: as it is) with 95 % bootstrap intervals, resampled by identity. Cosine similarity; "
            f"embeddings of the image{' plus its mirror image' if flip else ''}. Foundation: the untouched backbone."
            + f" {FEW_NOTE}." * any(mark(row.identities) for row in rows), "",
            *as_table(("split", "metric", "chance", "foundation", "tuned", "change"), table), *middle, "",
            "## All figures", "", "Two figures of a metric are comparable where their protocols are equal.", "",
            *tabulate(rows)]


def tabulate(rows: list[Row]) -> list[str]:
    """The lines of a table of all figures, before and after."""
    pairs, table = {}, []
    for row in rows:
        pairs.setdefault(row.key, {})[row.weights] = row
    for pair in pairs.values():
        row = next(iter(pair.values()))
        # names of raters, sources and files of prompts may contain what ends a cell, or markup
        name, metric, protocol = map(literal, (f"{row.domain}/{row.split}", row.metric, row.protocol))
        table.append([name, metric, *before_and_after(pair), f"{row.count:,}", protocol])
    return as_table(("split", "metric", "foundation", "tuned", "count", "protocol"), table)


def write_rows(folder: Path, rows: list[Row]) -> None:
    """results.json and results.csv: the same rows."""
    table = [asdict(row) for row in rows]
    write_json(folder / "results.json", table)
    write_csv(folder / "results.csv", table)


def write_draws(folder: Path, results: Results, seed: int, weights: str | None = None) -> None:
    """draws.npz: the resampled values of every row, [rows, draws], which `compare` pairs between runs.

    `weights`: SHA-256 of the model.safetensors that they are of, where there is one.
    """
    data = io.BytesIO()
    np.savez_compressed(data, draws=np.array([draws for _, draws in results], dtype=np.float32), seed=seed,
                        weights=weights or "")
    write_atomically(folder / "draws.npz", lambda temporary: temporary.write_bytes(data.getbuffer()))
