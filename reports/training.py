"""What a training run reports: its log, its first images, and a page with its curves."""

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data_prep import DOMAIN_COLOURS, DOMAINS, InputError, append, literal, read_lines, write_atomically, writing
from data_prep.format import Split
from data_prep.stream import Feed, make_images
from models.head import MANY_CLASSES, HeadLoss, embedding_norms, show_loss

MAX_SKIPPED = 10  # non-finite steps in a row that stop a run
MAX_DAMAGED = 0.001  # share of damaged images that stops a run


# ---------------------------------------------------------------- before the first step


def describe_run(options: Any, recipe: dict[str, float], splits: list[Split], plan: np.ndarray, shares: list[float],
                 last_rate: float) -> None:
    """Print the images, passes, losses and learning rates of a run, before anything is built.

    `plan`: int64 [steps, batches per step, K], images of each domain; `shares`: of each domain's class weights that a
    step draws (Partial FC); `last_rate`: of the cosine, as a share of the peak.
    """
    print(f"{options.out}: schedule {options.schedule}, {len(plan)} steps of {options.batch} images")
    if recipe:
        print(f"  recipe of {options.backbone}: " + ", ".join(f"{key}={value:g}" for key, value in recipe.items()))
    for split, loss, share, seen in zip(splits, options.per_domain("loss"), shares, plan.sum((0, 1)), strict=True):
        passes = seen / len(split)
        warning = "  WARNING: above 50 passes, expect memorisation" if passes > 50 else ""
        over = f" over {share:g} of the classes per step" if share < 1 else ""
        print(f"  {split.domain:8s} {len(split):9,d} images of {len(split.classes):7,d} classes: {seen:10,d} drawn, "
              f"{passes:.1f} passes; {show_loss(loss)}{over}{warning}")
    stages = " in every stage" * (options.schedule == "sequential")
    print(f"  learning rate {options.lr:g} at the top of the backbone, x {options.layer_decay:g} per layer downwards, "
          f"class weights {options.head_lr:g}; warm-up {options.warmup:.0%}, cosine to x {last_rate:g}{stages}; not "
          "scaled with the batch or the number of processes")
    if isinstance(options.sample_classes, float) and options.sample_classes < min(shares):
        print(f"  --sample-classes: no domain has {MANY_CLASSES:,} classes, so all are used; to draw fewer, name the "
              "domains: object=1,...")


# ---------------------------------------------------------------- what a step leaves


def empty_totals(num_domains: int, width: int, device: torch.device) -> dict[str, Tensor]:
    """What `add_to_totals` adds up over the micro-batches of a step."""
    total = {"loss": torch.zeros((), device=device), "direction": torch.zeros(width, device=device)}
    total |= {name: torch.zeros(num_domains, device=device) for name in ("loss_by_domain", "cos", "correct", "count")}
    return total | {"norms": torch.zeros(num_domains, 3, dtype=torch.float64, device=device)}


@torch.no_grad()
def add_to_totals(total: dict[str, Tensor], x: Tensor, result: HeadLoss, labels: Tensor, domains: Tensor) -> None:
    """Add a micro-batch of this rank, without waiting for the device.

    Adds to: loss; loss_by_domain, cos, correct, count [K]; direction [D], the sum of unit embeddings; norms [K, 3],
    (n, sum, sum of squares) of the lengths of embeddings.
    """
    valid = labels >= 0
    total["loss"] += result.own_loss
    total["loss_by_domain"] += result.per_domain
    total["cos"].index_add_(0, domains, result.target_cos)
    total["correct"].index_add_(0, domains, result.correct.float())
    total["count"].index_add_(0, domains, valid.float())
    length = embedding_norms(x).double()
    powers = torch.stack([torch.ones_like(length), length, length.square()], 1)
    total["norms"].index_add_(0, domains, torch.where(valid[:, None], powers, 0.0))
    total["direction"] += (F.normalize(x.detach().float(), dim=1) * valid[:, None]).sum(0)


# ---------------------------------------------------------------- the log


@dataclass
class Tally:
    """What accumulates over a run and its resumptions."""

    skipped: int = 0  # steps without a finite gradient
    bad: int = 0  # damaged images
    collapsed_at: int | None = None  # step
    seconds: float = 0.0
    logged: float = 0.0  # `seconds` at the last line of the log
    start: dict[str, float] = field(default_factory=dict)  # AUC of fixed images before the first step


def write_line(job: Any, window: list[dict[str, Tensor]], done: int, rates: dict, bad: int) -> dict:
    """A line of log.jsonl and TensorBoard: means over the steps since the last one.

    The CPU waits for the GPU, and the ranks for each other, only here. `window`: totals of these steps, with
    "grad_norm" and "finite"; `done`: completed steps of the run; `rates`: of the last step, for the record; `bad`:
    damaged images of this rank since the last line.
    """
    tally, ranks, batch = job.tally, job.ranks, int(job.plan[0].sum())
    total = {name: torch.stack([t[name].float() for t in window]) for name in window[0]}
    for name in ("loss", "loss_by_domain", "cos", "correct", "count", "direction", "norms"):
        ranks.sum(total[name])
    record = {"step": done, "images": done * batch, **rates, **summarise(total, [split.domain for split in job.splits])}
    for split, images in zip(job.splits, job.plan[:done].sum((0, 1)).tolist(), strict=True):
        record |= {f"images/{split.domain}": images, f"passes/{split.domain}": images / len(split)}
    tally.skipped = int(job.health[0])
    if skipped := int((total["finite"] == 0).sum()):
        tqdm.write(f"until step {done}: {skipped} of {len(window)} steps had no finite gradient and were skipped",
                   file=sys.stderr)
    record["images_per_second"] = len(window) * batch / max(tally.seconds - tally.logged, 1e-9)
    if job.device.type == "cuda":
        record["memory_GiB"] = torch.cuda.max_memory_allocated(job.device) / 2**30
    tally.logged = tally.seconds
    if record.get("mean_cosine", 0) > 0.99 and tally.collapsed_at is None:
        tally.collapsed_at = done
        tqdm.write(f"WARNING: step {done}: the embeddings have COLLAPSED (mean pairwise cosine "
                   f"{record['mean_cosine']:.4f}): lower --lr or take --head-init means", file=sys.stderr)
    tally.bad += int(ranks.sum(torch.tensor(bad)))
    record |= {key: value for key, value in vars(tally).items() if key != "start"}
    if job.board is not None:
        append(job.folder / "log.jsonl", record)
        with writing(job.folder / "tensorboard"):
            for name, value in record.items():
                if isinstance(value, int | float):
                    job.board.add_scalar(name, value, done)
    return record


def check_health(job: Any, done: int) -> None:
    """Stop a run of non-finite steps or damaged images; its last checkpoint stays."""
    seen, most = done * int(job.plan[0].sum()), MAX_SKIPPED if done < len(job.plan) else 0
    job.tally.skipped, in_a_row = job.health.tolist()
    if in_a_row > most:
        kept = f"no checkpoint was written before them, {job.folder} starts anew" if job.saved is None else \
            f"the checkpoint from before them, of step {job.saved}, is in {job.folder}/last"
        raise InputError(f"{job.folder}: {in_a_row} steps in a row were not finite; {kept}: lower --lr or raise "
                         "--warmup")
    if job.tally.bad > MAX_DAMAGED * max(seen, 1000):
        raise InputError(f"{job.tally.bad} damaged images among {seen} are more than {MAX_DAMAGED:.1%}: check the "
                         "shards with `python -m data_prep verify DIR`")


def summarise(total: dict[str, torch.Tensor], domains: list[str]) -> dict:
    """Means over the steps [n, ...] since the last log line, without skipped ones; domains not drawn are absent."""
    good = total["finite"] > 0
    if not good.any():
        return {}
    total = {name: values[good] for name, values in total.items()}
    count = total["count"].sum(0)
    cosine = torch.stack([mean_pairwise_cosine(d, n.sum()) for d, n in zip(total["direction"], total["count"],
                                                                           strict=True)]).mean()
    record = {"loss": float(total["loss"].mean()), "grad_norm": float(total["grad_norm"].mean()),
              "mean_cosine": float(cosine)}
    for k, name in enumerate(domains):
        if count[k] > 0:
            drawn = (total["count"][:, k] > 0).sum()
            record[f"loss/{name}"] = float(total["loss_by_domain"][:, k].sum() / drawn)
            record[f"top1/{name}"] = float(total["correct"][:, k].sum() / count[k])
            record[f"target_cosine/{name}"] = float(total["cos"][:, k].sum() / count[k])
            record[f"norm/{name}"] = float(total["norms"][:, k, 1].sum() / count[k])
    return record


def mean_pairwise_cosine(direction: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Mean cosine over all pairs of n > 1 embeddings, from the sum of their unit vectors [D]."""
    return (direction.square().sum() - n) / (n * (n - 1)).clamp(min=1)


# ---------------------------------------------------------------- pages and figures


def draw_samples(path: Path, feed: Feed) -> None:
    """The first images as the network sees them, one row a domain: shows errors in colour, crop and label."""
    from matplotlib.figure import Figure

    stream, look = feed.stream, feed.look
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (look.mean, look.std))
    figure = Figure(figsize=(11.2, 1.7 * len(stream.splits)))
    axes = figure.subplots(len(stream.splits), 8, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for d, split in enumerate(stream.splits):
        chunk = stream[int((stream.plan[:, d] > 0).argmax()) * stream.per_batch]
        if feed.cache is not None:
            chunk = replace(chunk, banks=[bank.cpu() for bank in feed.cache])
        images = make_images(chunk, look, torch.device("cpu"))
        for ax, b in zip(axes[d], (chunk.domain == d).nonzero().flatten().tolist(), strict=False):
            ax.imshow((images[b] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
            ax.set_title(split.names[int(chunk.label[b])][:16], fontsize=7, parse_math=False)
        axes[d][0].text(-0.15, 0.5, split.domain, transform=axes[d][0].transAxes, rotation=90, va="center", ha="right")
    save_figure(figure, path, bbox_inches="tight")


def save_figure(figure, path: Path, **options) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120, **options))


def write_report(job: Any) -> None:
    """report.md, one page on how the run went, and its figures curves.png and conflict.png."""
    folder, tally, plan, domains = job.folder, job.tally, job.plan, [split.domain for split in job.splits]
    log, looks, conflicts = (read_lines(folder / f"{name}.jsonl") for name in ("log", "probe", "conflict"))
    log = [record for record in log if "loss" in record]
    draw_curves(folder / "curves.png", log, looks, domains)
    lines = [f"# {literal(folder.name)}", "",
             f"Schedule {job.options.schedule}, {len(plan)} steps of {plan[0].sum()} images, "
             f"{tally.seconds / 60:.1f} minutes on {job.ranks.world} x {job.device.type}.", "",
             "| domain | images | passes | loss | top-1 | target cosine | norm |", "|---|---|---|---|---|---|---|"]
    for name in domains:
        last = next((r for r in reversed(log) if f"loss/{name}" in r), None)
        if last:
            figures = [f"{last[f'{key}/{name}']:.3f}" for key in ("loss", "top1", "target_cosine", "norm")]
            lines.append(f"| {name} | {last[f'images/{name}']:,} | {last[f'passes/{name}']:.1f} | "
                         f"{' | '.join(figures)} |")
    lines += ["", "Loss, top-1 and target cosine are of augmented training images, with the current margins.", "",
              "![curves](curves.png)"]
    if looks:
        lines += ["", "| same/different AUC of fixed images | start | end |", "|---|---|---|"]
        lines += [f"| {literal(name)} | {looks[0]['auc'].get(name, math.nan):.3f} | {value:.3f} |"
                  for name, value in looks[-1]["auc"].items()]
    if conflicts:
        draw_conflict(folder / "conflict.png", conflicts)
        mean = {pair: np.mean([f["cosine"][pair] for f in conflicts if f["cosine"][pair] is not None] or [math.nan])
                for pair in conflicts[0]["cosine"]}
        lines += ["", "Cosines between the domains' gradients on the backbone (mean over the run; below 0 they "
                  "conflict): " + ", ".join(f"{pair} {value:+.2f}" for pair, value in mean.items()), "",
                  "![conflict](conflict.png)"]
    if tally.skipped or tally.bad or tally.collapsed_at:
        lines += ["", f"Skipped steps: {tally.skipped}; damaged images: {tally.bad}; collapsed at: "
                  f"{tally.collapsed_at}."]
    write_atomically(folder / "report.md", lambda path: path.write_text("\n".join(lines) + "\n"))


def draw_curves(path: Path, log: list[dict], looks: list[dict], domains: list[str]) -> None:
    """Loss, top-1, target cosine per domain and, with --eval-every, AUC, over the steps."""
    from matplotlib.figure import Figure

    keys = [("loss", "training loss"), ("top1", "training top-1"), ("target_cosine", "cosine to the true class")]
    count = len(keys) + bool(looks)
    figure = Figure(figsize=(4 * count, 3.8))
    axes = figure.subplots(1, count)
    for ax, (key, title) in zip(axes, keys, strict=False):
        for name in domains:
            points = [(r["step"], r[f"{key}/{name}"]) for r in log if f"{key}/{name}" in r]
            ax.plot(*zip(*points, strict=True) if points else ((), ()), label=name, color=DOMAIN_COLOURS[name],
                    marker="." if len(points) < 10 else None)  # a single point has no line
        ax.set(title=title)
    if looks:
        names = sorted(dict.fromkeys(name for look in looks for name in look["auc"]),
                       key=lambda name: DOMAINS.index(name.partition("/")[0]))
        for name in names:
            domain = name.partition("/")[0]
            number = [other for other in names if other.startswith(f"{domain}/")].index(name)
            axes[-1].plot([r["step"] for r in looks], [r["auc"].get(name, math.nan) for r in looks], label=name,
                             color=DOMAIN_COLOURS[domain], ls=("-", "--", ":", "-.")[number % 4],
                             marker="osD^v"[number % 5], markersize=4)
        axes[-1].set(title="same/different AUC, fixed images")
    for ax in axes:
        ax.set(xlabel="optimiser step")
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for ax in axes[:: len(keys)]:  # below the panel, where no curve runs
        legend = ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=2, frameon=False)
        for text in legend.get_texts():  # names of splits
            text.set_parse_math(False)
    figure.tight_layout()
    save_figure(figure, path)


def draw_conflict(path: Path, conflicts: list[dict]) -> None:
    """Cosines of the domains' gradients: over the run in the whole backbone, and by layer (mean over the run)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4))
    left, right = figure.subplots(1, 2)
    for pair in conflicts[0]["cosine"]:
        values = np.array([[math.nan if v is None else v for v in f["cosine_by_layer"][pair]] for f in conflicts])
        seen = ~np.isnan(values).all(0)
        left.plot([f["step"] for f in conflicts], [f["cosine"][pair] for f in conflicts], marker=".", label=pair)
        right.plot(np.flatnonzero(seen), np.nanmean(values[:, seen], 0), marker=".", label=pair)
    left.set(title="whole backbone", xlabel="step", ylabel="cosine of two domains' gradients")
    right.set(title="by layer, mean over the run", xlabel="layer (0: input)")
    for ax in (left, right):
        ax.axhline(0, color="0.6", lw=0.8)
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    save_figure(figure, path)
