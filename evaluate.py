"""Score a run on every test split of its data, before and after fine-tuning.

    python evaluate.py --run runs/NAME                                        # all test splits of the run's data root
    python evaluate.py --run runs/NAME --splits face_hq/test,object/val      # some of them
    python evaluate.py --run runs/NAME --data other/data --device cuda
    python evaluate.py --model tf_efficientnet_lite0 --weights FILE           # an untouched backbone, without a run
    torchrun --nproc-per-node 8 -- evaluate.py --run runs/NAME                # eight GPUs embed, the first scores
    python evaluate.py --run runs/NAME --humans anna.csv --humans ben.csv     # beside people, on the same trials
    python evaluate.py --run runs/NAME --humans object/edges=edge.csv         # people on the stimuli of a forced choice
    python evaluate.py compare runs/A-s0 runs/A-s1 runs/B-s0                 # paired differences; seeds are averaged
    python evaluate.py compare runs/B --experts runs/face runs/body          # non-inferiority to your own experts
    python evaluate.py leaks --run runs/NAME --threshold 0.95                # test images that training nearly repeats
    python evaluate.py bench --cases reid --json bench.json                  # large cases beside numpy and scikit-learn
    python evaluate.py embed photos/ --run runs/NAME --domain face_hq         # embeddings of your own pictures

The protocol in a split's index.json decides the metrics. RUN/eval/ then holds results.json and results.csv (one row a
figure), report.md and report.html (the same, in one file), figures, and the embeddings, which are computed once.
Human trials, experts and published figures: docs/humans.md.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from data_prep import (
    DOMAINS,
    GroupedHelp,
    InputError,
    Number,
    add_options,
    hash_file,
    lock_folder,
    option,
    refuse_options,
    run_command,
)
from data_prep.format import Split, named_splits, open_root
from models.backbones import BACKBONES, SIZES, Backbone, Network, load_backbone, resolve_backbone
from models.runs import Ranks, Run, join_ranks, load_foundation, load_run, load_tuned
from protocols.bootstrap import FEW_NOTE, mark
from protocols.classify import Readouts, read_prompts
from protocols.embed import DEBUG, Embedder, EmbedOptions, make_embedder
from protocols.humans import Rating, Trials, read_humans, score_humans
from protocols.results import HEADLINE, Row, read_stages
from protocols.unified import choose_crowd, make_members, score_unified
from reports.choice import choice_rows, draw_choices, show_choices
from reports.plots import draw_figures, draw_split
from reports.rows import (
    Results,
    ScoreOptions,
    check_references,
    headlines,
    make_human_rows,
    make_report,
    make_rows,
    make_unified_rows,
    score,
    show_value,
    write_draws,
    write_rows,
)
from reports.tables import (
    Published,
    beside,
    datasets_of,
    draw_stages,
    human_rows,
    human_verdict,
    read_published,
    show_humans,
    show_published,
    show_stages,
    write_report,
)

# ---------------------------------------------------------------- options


@dataclass
class Options(ScoreOptions):
    """Options of an evaluation."""

    foundation: bool = option("scores", True, bool, "Score the untouched backbone too.")
    prompts: str = option("scores", "1,7,80", str, "Zero-shot classification by CLIP: shipped sets of prompts, by "
                          "number, or files with a template a line, {} for the class name; '' for none.",
                          metavar="SETS")
    probe: int = option("scores", 50_000, click.IntRange(0), "Fit the linear probe to at most N images of a reference "
                        "split (0: no probe).", metavar="N")
    crowd: int = option("scores", 5000, click.IntRange(0, 1_000_000), "Probes of a domain that are searched among all "
                        "domains at once (0: none).")
    humans: tuple[str, ...] = option(
        "scores", (), str, "What people answered, a file or a folder of files: ratings of pairs (split,left_key,"
        "right_key,rater,rating), e.g. from the page of `data_prep trials`, or trials of a forced choice (subj,"
        "object_response,category,condition,imagename) on a split of `data_prep stimuli`; may be given again.",
        multiple=True, metavar="[SPLIT=]FILE.csv")
    published: tuple[str, ...] = option(
        "scores", (), str, "Data set of a split whose name is not the set's, e.g. object/val=imagenet: its published "
        "figures stand beside the run's (SPLIT= for none); may be given again.", multiple=True, metavar="SPLIT=DATASET")

    backbone: str | None = option("without --run", None, click.Choice(list(BACKBONES)), "An untouched backbone.")
    size: str = option("without --run", "large", click.Choice(SIZES), "Its size.")
    model: str | None = option("without --run", None, str, "Any timm or open_clip model instead of --backbone.",
                               metavar="NAME")
    weights: str = option("without --run", "pretrained", str, "'pretrained', 'none' or a FILE.", metavar="WHICH")
    image_size: int | None = option("without --run", None, click.IntRange(16, 4096), "Input side in pixels.")
    out: str | None = option("without --run", None, str, "Folder for the results (default: runs/NAME-foundation).",
                             metavar="DIR")


# ---------------------------------------------------------------- what is scored


def choose_splits(root: dict[str, dict[str, Split]], names: str | None, where: str) -> list[Split]:
    """The test splits to score: all that have a protocol, or those named as domain/split."""
    wanted = named_splits(root, names, where) if names else [s for splits in root.values() for s in splits.values()]
    scored = {f"{split.domain}/{split.name}": split for split in wanted if split.protocol}
    for name, split in list(scored.items()):
        if split.protocol["name"] not in HEADLINE:
            print(f"  {name}: protocol {split.protocol['name']!r} is not scored yet: left out")
            del scored[name]
    if not scored:
        raise InputError(f"{where}: no test split to score: prepare one, `python -m data_prep SOURCE ... --part test`")
    check_references(list(scored.values()), root)
    return sorted(scored.values(), key=lambda s: (DOMAINS.index(s.domain), bool(s.protocol.get("ood")), s.name))


def training_split(run: Run | None, root: dict[str, dict[str, Split]]) -> Split | None:
    """The split of objects that a run was trained on, where the data root holds it."""
    split = root.get("object", {}).get("train")
    known = run is not None and split is not None and run.config["shards"].get("object")
    return split if known and split.index["provenance"]["plan"] == known else None


def add_references(splits: list[Split], root: dict[str, dict[str, Split]]) -> list[Split]:
    """Test splits and the splits that class means and neighbours of them come from, each once."""
    references = [root[split.domain].get(split.protocol.get("reference")) for split in splits]
    return list({split.folder: split for split in [*references, *splits] if split is not None}.values())


def leave(ranks: Ranks) -> None:
    """End a process of several at once: gloo's threads now and then abort an interpreter that is torn down."""
    if ranks.world > 1:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


def open_models(options: Options, given: set[str]
                ) -> tuple[str, Path, Run | None, dict[str, Callable[[], Backbone]], str]:
    """Name, output folder, run (if any), loaders of the foundation and the tuned backbone, data root.

    `given`: names of the options on the command line.
    """
    if options.run:
        for key in ("backbone", "size", "model", "weights", "image_size", "out"):
            if key in given:
                raise InputError(f"--{key.replace('_', '-')} describes an untouched backbone: leave it out with --run")
        run = load_run(Path(options.run), options.allow_partial)
        models = {"foundation": lambda: load_foundation(run)} if options.foundation else {}
        models["tuned"] = lambda: load_tuned(run)
        return run.folder.name, run.folder, run, models, options.data or run.config["data"]
    if not options.model and not options.backbone:
        raise InputError("what is to be scored? give --run RUN, or --model NAME for an untouched backbone")
    for name, used in (("--no-foundation", not options.foundation), ("--allow-partial", options.allow_partial)):
        if used:
            raise InputError(f"{name} describes how a run is scored: give --run RUN, or leave it out")
    network = Network.of(vars(options) | {"embed_dim": 0})
    resolve_backbone(network)  # refuses an unknown name before anything is read
    name = f"{network.name}-foundation"
    models = {"foundation": lambda: load_backbone(network).eval()}
    return name, Path(options.out or f"runs/{name}"), None, models, options.data or "data"


def score_models(name: str, embedders: dict[str, Embedder], splits: list[Split], root: dict, run: Run | None,
                 readouts: Readouts, people: tuple[list[Rating], dict[str, Trials]], options: Options
                 ) -> tuple[Results, dict[str, dict]]:
    """Score every set of weights on every split by its protocol, on all domains at once, and beside people.

    Returns:
        Rows with the resampled values behind them, and by name of the weights the curves of `score`.
    """
    draws, seed, (ratings, trials) = options.bootstrap, options.seed, people
    by_name = {f"{split.domain}/{split.name}": split for split in splits}
    crowd = choose_crowd(splits) if options.crowd else []
    if crowd:
        print(f"  everything: {', '.join(f'{split.domain}/{split.name}' for split in crowd)} (--splits chooses)")
    figures, curves, unified, humans = {}, {}, {}, {}
    for weights, embed in embedders.items():
        figures[weights], curves[weights] = score(
            embed, splits, root, run if weights == "tuned" else None, draws, seed, readouts, trials=trials)
        if crowd:
            members = make_members(crowd, [embed(split) for split in crowd], options.crowd, seed)
            crowd = [member.split for member in members]
        if crowd:
            unified[weights] = score_unified(members, draws, seed, embed.device)
        if ratings:
            rated = {name: embed(by_name[name]) for name in {rating.split for rating in ratings}}
            humans[weights] = score_humans(ratings, by_name, rated, draws, seed)
    results = make_rows(name, splits, figures, options.flip)
    results += make_unified_rows(name, crowd, unified, options.flip, options.crowd, seed)
    return results + make_human_rows(name, ratings, by_name, humans, options.flip), curves


def write_pages(out: Path, rows: list[Row], splits: list[Split], curves: dict[str, dict],
                others: list[tuple[Published, str, Row | None]], flip: bool, run: Run | None) -> None:
    """report.md, report.html and their figures; `others`: published figures, as `beside` finds them."""
    for path in [*(out / f"{name}.png" for name in ("roc", "cmc", "scores", "stages")), *out.glob("sheet-*.png")]:
        path.unlink(missing_ok=True)  # of an evaluation of other splits; a sheet shows people
    drawn = draw_figures(out, rows, curves, splits, others) + draw_choices(out, rows, curves)
    middle = [line for title, file in drawn for line in ("", f"![{title}]({file})")]
    middle += show_humans(rows) + show_choices(rows) + show_published(others)
    if run and run.config["schedule"] == "sequential":
        stages = read_stages(run.folder, run.config)
        middle += show_stages(stages, run.config)
        if stages:
            draw_stages(out / "stages.png", stages)
            middle += ["", "![AUC after each stage](stages.png)"]
    write_report(out, make_report(rows, splits, flip, middle))


def print_rows(rows: list[Row]) -> None:
    """The headline of every split, all figures over all domains, and the verdicts of the human trials."""
    for (domain, split), pair in headlines(rows).items():
        print(f"{domain + '/' + split:22s} {next(iter(pair.values())).metric:20s} "
              + "   ".join(f"{weights} {show_value(row)}" for weights, row in pair.items()))
    for row in rows:
        if row.domain == "all":
            print(f"{'everything':22s} {row.metric:30s} {row.weights} {show_value(row)}")
    for (domain, split), by_weights in human_rows(rows).items():
        for weights, human in by_weights.items():
            lead, = human["lead"]
            name = "everything" if domain == "all" else f"{domain}/{split}"
            print(f"{name:22s} {lead.metric:30s} {weights} {show_value(lead)}: {human_verdict(lead)}")
    for name, by_rule in choice_rows(rows).items():
        for weights, figures in next(iter(by_rule.values())).items():
            for lead in figures.get((HEADLINE["choice"][0], "lead"), []):
                print(f"{name:22s} {lead.metric:30s} {weights} {show_value(lead)}: {human_verdict(lead)}")
    if any(mark(row.identities) for row in rows):
        print(FEW_NOTE)


# ---------------------------------------------------------------- command line


@click.group(cls=GroupedHelp, invoke_without_command=True, help=__doc__.split("\n\n")[0],
             context_settings={"show_default": True, "max_content_width": 120})
@add_options(Options)
@DEBUG
@click.pass_context
def main(context: click.Context, **values) -> int | None:
    if context.invoked_subcommand:
        refuse_options(context)
        return None
    options = Options(**values)
    given = {key for key in values if context.get_parameter_source(key) == click.core.ParameterSource.COMMANDLINE}
    name, folder, run, models, data = open_models(options, given)
    trained = run.classes.get("object", []) if run else []
    root = open_root(Path(data))
    readouts = Readouts(read_prompts(options.prompts), options.probe, trained, training_split(run, root))
    splits = choose_splits(root, options.splits, data)
    by_name = {f"{split.domain}/{split.name}": split for split in splits}
    published = read_published()
    datasets = datasets_of(list(by_name), options.published, published)
    people = read_humans(options.humans, by_name)
    ranks, device = join_ranks(options.device)
    out, options.device = folder / "eval", str(device)
    if ranks.rank == 0:
        context.with_resource(lock_folder(out, "--run" if run else "--out"))
    of = hash_file(folder / "model.safetensors")  # before it is read: a run that trains on writes another
    embedders = {weights: make_embedder(load, weights, out, options, ranks) for weights, load in models.items()}
    for embed in embedders.values():  # all ranks embed; the first alone scores
        for split in add_references(splits, root):
            embed.prepare(split)
        embed.ranks = Ranks()
    if ranks.rank:
        leave(ranks)
    results, curves = score_models(name, embedders, splits, root, run, readouts, people, options)
    rows = [row for row, _ in results]
    write_rows(out, rows)
    write_draws(out, results, options.seed, of)
    write_pages(out, rows, splits, curves, beside(rows, datasets, published), options.flip, run)
    for split in splits if options.sheet else []:
        if f"{split.domain}/{split.name}" in curves[embed.name]:
            draw_split(out, split, embed, root, options.seed)
    print_rows(rows)
    print(f"written: {out}/report.html, report.md, results.json, results.csv and figures"
          + (f"; next: python analyze.py --run {folder}" if run else ""))
    if "foundation" in embedders:
        print(f"embeddings of the untouched backbone, for all runs that share it: {embedders['foundation'].folder}")
    leave(ranks)
    return 0


@main.command(help="Differences between evaluated runs, paired by person; runs that differ in the seed alone are "
                   "averaged. The first run, with its seeds, is what the others are compared with; one RUN alone: with "
                   "its own untouched backbone; --experts: whether it is non-inferior to the others.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--weights", type=click.Choice(["tuned", "foundation"]),
              help="Whose figures (default: tuned where a run has them).")
@click.option("--splits", metavar="NAMES", help="Comma-separated domain/split (default: all that the runs share).")
@click.option("--experts", is_flag=True,
              help="The runs after the first (and its seeds) are its experts: the same backbone and number of images, "
                   "one domain each.")
@click.option("--delta", type=Number(0, 1, min_open=True), default=0.01,
              help="With --experts: a difference that does not matter; of an expert above 0.9 at most a tenth of its "
                   "error.")
@click.option("--out", type=click.Path(path_type=Path), default="comparison", metavar="DIR",
              help="Folder for comparison.md, .csv, .json and .png.")
@DEBUG
@click.pass_context
def compare(context: click.Context, runs: tuple[Path, ...], weights: str | None, splits: str | None, experts: bool,
            delta: float, out: Path) -> int:
    if context.get_parameter_source("delta") == click.core.ParameterSource.COMMANDLINE and not experts:
        raise InputError("--delta is the margin of non-inferiority to experts: give --experts too")
    if experts and weights == "foundation":
        raise InputError("--weights foundation: with --experts the tuned weights are compared; leave it out")
    if len({folder.resolve() for folder in runs}) < len(runs):
        raise InputError("a run is named twice: name each once")
    from tools.compare import write_comparison

    write_comparison(runs, weights, set(splits.split(",")) if splits else set(), delta if experts else None, out)
    return 0


@main.command(help="Test images that training images nearly repeat, and the figures without them: RUN/eval/leaks.csv "
                   "and leaks.json.")
@add_options(ScoreOptions)
@click.option("--threshold", type=Number(-1, 1), default=0.95,
              help="Cosine to the nearest training image from which on a test image counts as leaked.")
@click.option("--by", type=click.Choice(["foundation", "tuned"]), default="foundation",
              help="Whose embeddings find the leaks: fine-tuning draws together what is merely alike.")
@DEBUG
def leaks(threshold: float, by: str, **values) -> int:
    options = ScoreOptions(**values)
    if not options.run:
        raise InputError("whose training images? give --run RUN")
    run = load_run(Path(options.run), options.allow_partial)
    data = options.data or run.config["data"]
    root = open_root(Path(data))
    splits = choose_splits(root, options.splits, data)
    click.get_current_context().with_resource(lock_folder(run.folder / "eval", "--run"))
    from tools.leaks import write_leaks

    write_leaks(run, splits, root, data, options, threshold, by)
    return 0


@main.command(help="Time and memory of the largest cases beside plain numpy and scikit-learn, on generated embeddings.")
@click.option("--cases", default="reid,pairs,curve,search,million", metavar="NAMES",
              help="Which: re-identification, listed pairs of templates, ROC, and 1:N in 100,000 or 1,000,000.")
@click.option("--scale", type=Number(0.001, 1), default=1.0, help="Of all sizes.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Turns that the ways of a case take; of the median.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the result there, too.")
@DEBUG
def bench(cases: str, scale: float, rounds: int, path: Path | None) -> int:
    from tools.bench_evaluate import CASES, bench

    names = cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise InputError(f"--cases {unknown[0]}: there are {', '.join(CASES)}")
    return bench(names, scale, rounds, path)


@main.command(help="Write unit embeddings of your own pictures, prepared and embedded as evaluation does it.")
@click.argument("pictures", nargs=-1, required=True, metavar="IMAGE...|FOLDER", type=click.Path(path_type=Path))
@click.option("--domain", type=click.Choice(DOMAINS),
              help="Fit pictures as this domain's training images were (default: the run's first).")
@click.option("--out", type=click.Path(path_type=Path), default="embeddings.npz", metavar="FILE",
              help="A .npz (arrays files and embeddings) or .csv to write.")
@add_options(EmbedOptions, leave_out=("data", "cache", "seed"))
@DEBUG
def embed(pictures: tuple[Path, ...], domain: str | None, out: Path, **values) -> int:
    options = EmbedOptions(**values)
    if not options.run:
        raise InputError("whose embeddings? give --run RUN")
    if out.suffix not in (".npz", ".csv"):
        raise InputError(f"--out {out}: want a file that ends in .npz or .csv")
    if out.exists():
        raise InputError(f"{out} exists: remove it, or choose another --out")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: {out.parent}: no such folder; make it, or choose another --out")
    from tools.own_pictures import embed_pictures

    embed_pictures(pictures, load_run(Path(options.run), options.allow_partial), domain, out, options)
    return 0


if __name__ == "__main__":
    run_command(main)
