"""What the embedding space of a run looks like, and whether the abstract's claims hold for a folder of runs.

    python analyze.py --run runs/NAME            # transfer of principal components, separability, sharing, a map
    python analyze.py claims runs                # one verdict per claim, from every evaluated run below runs/
    python analyze.py bench                      # how long the transfer takes on this machine

RUN/analysis/ then holds analysis.json, report.md, the tables transfer.csv, further.csv, importance.csv, dprime.csv and
map.csv, and the figures transfer, deletion, importance, separability, sharing, spectrum and map, each as .pdf and .png.
Principal components are fitted on training images whose identities are not among the tested ones.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from data_prep import (
    GroupedHelp,
    InputError,
    Number,
    Parsed,
    add_options,
    hash_file,
    lock_folder,
    option,
    refuse_options,
    run_command,
)
from data_prep.format import open_root
from models.runs import load_foundation, load_run, load_tuned, pick_device
from protocols.bootstrap import finite
from protocols.embed import DEBUG, Embedder, EmbedOptions, make_embedder
from protocols.explore import draw_up_map, explore_transfer, measure_components
from protocols.results import Separability
from protocols.separability import Canon, Features, measure_separability, pixel_statistics
from protocols.sharing import debiased_cka, measure_sharing
from protocols.subspaces import FITTED, transfer
from protocols.tasks import ROWS, Degraded, Task, choose_pairs, drop_tested, make_task, read_embeddings
from reports.analysis import Analysis, write_analysis

# ---------------------------------------------------------------- options


def parse_range(text: str) -> tuple[int, int]:
    """The a and b of "a:b", components from a (counted from 0) to before b."""
    a, _, b = text.partition(":")
    if not (a.isdecimal() and b.isdecimal() and int(a) <= int(b)):
        raise ValueError("want A:B, components from A (counted from 0) to before B, such as 0:10")
    return int(a), int(b)


@dataclass
class Options(EmbedOptions):
    """Everything that can be said of an analysis."""

    splits: str | None = option(
        "analysis", None, str, "Comma-separated domain/split to test on, one a domain (default: the first in "
        "distribution, those of reference `train` before others).", metavar="NAMES")
    components: int = option("analysis", 99, click.IntRange(1), "The k of the claim: fewer than 100.")
    limit: int = option("analysis", 2000, click.IntRange(10), "At most so many probes per task.")
    bootstrap: int = option("analysis", 500, click.IntRange(2, 1_000_000), "Resamplings for the intervals.")
    delete: tuple[int, int] = option("analysis", "0:10", Parsed("A:B", parse_range), "Also score without the "
                                     "components A (from 0) to before B; 0:0: do not.", metavar="A:B")
    importance: int = option("analysis", 100, click.IntRange(0), "Also score without each of so many first components, "
                             "one at a time; 0: do not.")
    canon: int = option("analysis", 32, click.IntRange(0, 128), "Pixels of detail of the matched-format control of "
                        "separability; 0: leave it out.")
    map: str = option("analysis", "tsne", click.Choice(["tsne", "pca"]), "How the map is drawn up.")


# ---------------------------------------------------------------- the job

Spaces = dict[str, dict[str, tuple]]  # embeddings by weights and domain: of the training and of the test split


def make_tasks(embedded: Spaces, splits: dict, left_out: dict[str, str], limit: int, dim: int, seed: int) -> list[Task]:
    """The tasks that can be analysed; of each other domain, `left_out` is told why."""
    tasks = []
    for domain, (base, test) in splits.items():
        readable = tuple(find_readable([spaces[domain][i] for spaces in embedded.values()]) for i in range(2))
        if bad := sum(int((~good).sum()) for good in readable):
            print(f"  {domain}: {bad} unreadable images left out")
        task = make_task(base, test, readable, limit, seed)
        if isinstance(task, str):
            left_out[domain] = task
        else:
            tasks.append(task)
    drop_tested(tasks, FITTED * dim, seed)
    left_out |= {task.domain: "the identities of its training split are all tested" for task in tasks
                 if len(task.fit) < 2}
    for domain, why in left_out.items():
        print(f"  {domain}: left out: {why}")
    return [task for task in tasks if task.domain not in left_out]


def tell_apart(tasks: list[Task], embedders: dict[str, Embedder], root: dict, options: Options) -> Separability:
    """The linear separability of the tasks: for both backbones and pixel statistics, as they are and in one format."""
    features: dict[str, Features] = {
        weights: lambda split, rows, embed=embedders[weights]: read_embeddings(embed, split)[rows]
        for weights in ("tuned", "foundation")}
    features["pixels"] = pixel_statistics
    if side := options.canon:
        features |= {f"{weights} canon": lambda split, rows, embed=embedders[weights]: embed(Canon(split, rows, side))
                     for weights in ("tuned", "foundation")}
        features["pixels canon"] = lambda split, rows: pixel_statistics(Canon(split, rows, side), np.arange(len(rows)))
    others = {}
    for task in tasks:
        tests = [s for s in root[task.domain].values() if s.protocol and s.name != task.split.name]
        others[task.domain] = [(task.split, task.probe)] + [
            (s, np.flatnonzero(find_readable([read_embeddings(embed, s) for embed in embedders.values()])
                               & (s.labels >= 0))) for s in tests]
    return measure_separability(features, tasks, others, options.bootstrap, options.seed, options.limit)


def analyse(options: Options) -> int:
    """Analyse one run and write RUN/analysis."""
    run = load_run(Path(options.run), options.allow_partial)
    folder = run.folder / "analysis"
    click.get_current_context().with_resource(lock_folder(folder, "--run"))  # also: can it be written to?
    data, seed, draws = options.data or run.config["data"], options.seed, options.bootstrap
    root, device = open_root(Path(data)), pick_device(options.device)
    splits, left_out = choose_pairs(root, run.config["domains"], options.splits, data, run.config["degrade"], seed)
    embedders = {weights: make_embedder(lambda load=load: load(run), weights, run.folder / "eval", options)
                 for weights, load in (("foundation", load_foundation), ("tuned", load_tuned))}
    dims = [embedder.model.dim for embedder in embedders.values()]
    a, b = options.delete
    if b > min(dims) or b - a == min(dims):
        raise InputError(f"--delete {a}:{b}: the space has {min(dims)} dimensions, from 0 to {min(dims) - 1}, and some "
                         "must be left")
    embedded = {weights: {domain: tuple(read_embeddings(embedder, split) for split in pair)
                          for domain, pair in splits.items()}
                for weights, embedder in embedders.items()}
    tasks = make_tasks(embedded, splits, left_out, options.limit, max(dims), seed)
    if not tasks:
        raise InputError(f"{data}: no domain has enough identities to fit on some and test others: nothing to analyse")
    result = Analysis(run.folder.name, hash_file(run.folder / "model.safetensors"), [task.domain for task in tasks],
                      {task.domain: [task.train.name, task.split.name] for task in tasks}, left_out,
                      {domain: base.severity for domain, (base, _) in splits.items() if isinstance(base, Degraded)},
                      options.map)
    curves, components = {}, []
    for weights, spaces in embedded.items():
        found, curves[weights], bases = transfer(
            spaces, tasks, options.components, draws, seed,
            embedded["foundation"] if weights == "tuned" else None, device)
        result.transfer[weights] = found
        result.sharing[weights] = measure_sharing(spaces, tasks, bases, found.pairs[0].k)
        components += [{"weights": weights, **row} for row in
                       measure_components(spaces, tasks, bases, found.limit, seed)]
    # of the tuned weights, the last of the two
    result.explored, more = explore_transfer(spaces, tasks, found, curves["tuned"], bases, draws, seed, options.delete,
                                             options.importance, device)
    curves["tuned"] += more
    for task in tasks:
        before, after = (embedded[weights][task.domain][1][task.probe[:4000]] for weights in ("foundation", "tuned"))
        result.cka[task.domain] = finite(debiased_cka(before, after)) if len(before) > 3 else None
    if len(tasks) > 1:
        result.separability = tell_apart(tasks, embedders, root, options)
    points = draw_up_map(embedded["tuned"], tasks, options.map, seed)
    print(write_analysis(folder, result, curves, components, points))
    print(f"written: {folder}/report.md, analysis.json, tables and figures; "
          f"next: python analyze.py claims {run.folder.parent}")
    return 0


def find_readable(spaces: list[np.ndarray]) -> np.ndarray:
    """Rows, bool [n], that are finite in all embeddings [n, D] of a split: images may have been repaired meanwhile."""
    return np.logical_and.reduce([np.concatenate([np.isfinite(x[i : i + ROWS][:, 0])
                                                  for i in range(0, max(len(x), 1), ROWS)]) for x in spaces])


# ---------------------------------------------------------------- command line


@click.group(cls=GroupedHelp, invoke_without_command=True, help=__doc__.split("\n\n")[0],
             context_settings={"show_default": True, "max_content_width": 120})
@add_options(Options)
@DEBUG
@click.pass_context
def main(context: click.Context, **values) -> int | None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("analyze.py runs as one process, not under torchrun (evaluate.py can embed on many devices)")
    if context.invoked_subcommand:
        refuse_options(context)
        return None
    if not values["run"]:
        raise InputError("what is to be analysed? give --run RUN, or `claims RUNS_FOLDER`")
    return analyse(Options(**values))


@main.command(help="Turn the runs of a folder into one verdict per claim of the paper's abstract.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--delta", type=Number(0, 1), default=0.01,
              help="Margin of non-inferiority: to experts, and to the untouched backbone.")
@click.option("--retention", type=Number(0), default=0.95, help="Least retention out of distribution.")
@click.option("--separable", type=Number(0, 1), default=0.95, help="Least balanced accuracy.")
@click.option("--keep", type=Number(0, 1), default=0.95, help="Least share that the components keep.")
@DEBUG
def claims(folder: Path, delta: float, retention: float, separable: float, keep: float) -> int:
    from protocols.claims import make_table
    from protocols.results import read_runs
    from reports.analysis import write_table

    table = make_table(read_runs(folder), delta, retention, separable, keep)
    write_table(folder, table)
    for claim in table:
        print(f"{claim.claim} [{claim.backbones}]\n    {claim.reported}\n    decided by: {claim.decided_by}"
              + f" (1 of {len(claim.findings)} findings)" * (len(claim.findings) > 1 and claim.decided_by != "-")
              + f"\n    threshold: {claim.rule}")
    print(f"written: {folder}/claims.md, claims.json, claims.csv")
    return 0


@main.command(help="Time the transfer of four tasks, all controls, on random embeddings.")
@click.option("--probes", type=click.IntRange(10), default=10_000, help="Probes of a task, and its gallery.")
@click.option("--dim", type=click.IntRange(2), default=1024, help="Dimensions of the embeddings.")
@click.option("--shots", type=click.IntRange(2), default=10, help="Images of an identity.")
@click.option("--bootstrap", type=click.IntRange(2, 1_000_000), default=500, help="Resamplings for the intervals.")
@click.option("--grid/--no-grid", default=True, help="Time the whole grid, too, and not its parts alone.")
@click.option("--slow", is_flag=True, help="Time the plain definition, too, at the largest k.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the embeddings.")
def bench(probes: int, dim: int, shots: int, bootstrap: int, grid: bool, slow: bool, device: str, seed: int) -> int:
    from tools.bench_analyze import time_transfer

    time_transfer(probes, dim, shots, bootstrap, grid, slow, device, seed)
    return 0


if __name__ == "__main__":
    run_command(main)
