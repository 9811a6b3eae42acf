"""What a training run leaves to be looked at: its log, its first images, and a page on how it went with its curves.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from backbones import Backbone
from data_prep import DOMAIN_COLOURS, DOMAINS, InputError, literal
from data_prep.stream import Stream
from run_folder import append, read_lines, write_atomically, writing
from train_input import to_images
from train_schedule import ramp, rate

if TYPE_CHECKING:
    from train import Job


def draw_samples(path: Path, stream: Stream, model: Backbone, cache: list[torch.Tensor] | None = None,
                 columns: int = 8) -> None:
    """The first images as the network sees them, one row a domain: catches colour, crop and label bugs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
    K = len(stream.splits)
    figure, axes = plt.subplots(K, columns, figsize=(1.4 * columns, 1.7 * K), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for d, split in enumerate(stream.splits):
        chunk = stream[int((stream.plan[:, d] > 0).argmax()) * stream.per_batch]
        if cache is not None:
            chunk = dataclasses.replace(chunk, banks=[bank.cpu() for bank in cache])
        images = to_images(chunk, model, torch.device("cpu"))
        for ax, b in zip(axes[d], (chunk.domain == d).nonzero().flatten().tolist(), strict=False):
            ax.imshow((images[b] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
            ax.set_title(split.names[int(chunk.label[b])][:16], fontsize=7)
        axes[d][0].text(-0.15, 0.5, split.domain, transform=axes[d][0].transAxes, rotation=90, va="center", ha="right")
    save_figure(figure, path, bbox_inches="tight")


def save_figure(figure, path: Path, **options) -> None:
    """Write a figure as PNG, whole or not at all."""
    import matplotlib.pyplot as plt

    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120, **options))
    plt.close(figure)


def write_report(job: Job) -> None:
    """report.md, one page on how the run went, and its figures curves.png and conflict.png."""
    log, looks, fights = (read_lines(job.folder / f"{name}.jsonl") for name in ("log", "probe", "conflict"))
    log = [record for record in log if "loss" in record]
    draw_curves(job.folder / "curves.png", log, looks, job.config["domains"])
    lines = [f"# {literal(job.folder.name)}", "",
             f"Schedule {job.config['schedule']}, {job.steps} steps of {job.config['batch']} images, "
             f"{job.tally['seconds'] / 60:.1f} minutes on {job.ranks.world} x {job.device.type}.", "",
             "| domain | images | passes | loss | top-1 | target cosine | norm |", "|---|---|---|---|---|---|---|"]
    for name in job.config["domains"]:
        last = next((r for r in reversed(log) if f"loss/{name}" in r), None)
        if last:
            figures = [f"{last[f'{key}/{name}']:.3f}" for key in ("loss", "top1", "target_cosine", "norm")]
            lines.append(f"| {name} | {last[f'images/{name}']:,} | {last[f'passes/{name}']:.1f} | "
                         f"{' | '.join(figures)} |")
    lines += ["", "Loss, top-1 and target cosine are of augmented training images, with the margins of the moment.", "",
              "![curves](curves.png)"]
    if looks:
        lines += ["", "| same/different AUC of fixed images | start | end |", "|---|---|---|"]
        lines += [f"| {literal(name)} | {looks[0]['auc'].get(name, math.nan):.3f} | {value:.3f} |"
                  for name, value in looks[-1]["auc"].items()]
    if fights:
        draw_conflict(job.folder / "conflict.png", fights)
        mean = {pair: np.mean([f["cosine"][pair] for f in fights if f["cosine"][pair] is not None] or [math.nan])
                for pair in fights[0]["cosine"]}
        lines += ["", "Cosines between the domains' gradients on the backbone (mean over the run; below 0 they pull "
                  "against each other): " + ", ".join(f"{pair} {value:+.2f}" for pair, value in mean.items()), "",
                  "![conflict](conflict.png)"]
    if job.tally["skipped"] or job.tally["bad"] or job.tally["collapsed_at"]:
        lines += ["", f"Skipped steps: {job.tally['skipped']}; damaged images: {job.tally['bad']}; collapsed at: "
                  f"{job.tally['collapsed_at']}."]
    write_atomically(job.folder / "report.md", lambda path: path.write_text("\n".join(lines) + "\n"))


def draw_curves(path: Path, log: list[dict], looks: list[dict], domains: list[str]) -> None:
    """Loss, top-1, target cosine per domain and, where --eval-every looked, AUC, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = [("loss", "training loss"), ("top1", "training top-1"), ("target_cosine", "cosine to the own class")]
    figure, axes = plt.subplots(1, len(keys) + bool(looks), figsize=(4 * (len(keys) + bool(looks)), 3.8), squeeze=False)
    for ax, (key, title) in zip(axes[0], keys, strict=False):
        for name in domains:
            points = [(r["step"], r[f"{key}/{name}"]) for r in log if f"{key}/{name}" in r]
            ax.plot(*zip(*points, strict=True) if points else ((), ()), label=name, color=DOMAIN_COLOURS[name])
        ax.set(title=title, xlabel="optimiser step")
    if looks:
        names = sorted(dict.fromkeys(name for look in looks for name in look["auc"]),
                       key=lambda name: DOMAINS.index(name.partition("/")[0]))
        for name in names:
            domain = name.partition("/")[0]
            number = [other for other in names if other.startswith(f"{domain}/")].index(name)
            axes[0][-1].plot([r["step"] for r in looks], [r["auc"].get(name, math.nan) for r in looks], label=name,
                             color=DOMAIN_COLOURS[domain], ls=("-", "--", ":", "-.")[number % 4],
                             marker="osD^v"[number % 5], markersize=4)
        axes[0][-1].set(title="same/different AUC, fixed images", xlabel="optimiser step")
    for ax in axes[0][:: len(keys)]:  # below the panel, where no curve runs
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=2, frameon=False)
    figure.tight_layout()
    save_figure(figure, path)


def draw_conflict(path: Path, fights: list[dict]) -> None:
    """Cosines of the domains' gradients: over the run in the whole backbone, and by layer (mean over the run)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for pair in fights[0]["cosine"]:
        values = np.array([[math.nan if v is None else v for v in f["cosine_by_layer"][pair]] for f in fights])
        seen = ~np.isnan(values).all(0)
        left.plot([f["step"] for f in fights], [f["cosine"][pair] for f in fights], marker=".", label=pair)
        right.plot(np.flatnonzero(seen), np.nanmean(values[:, seen], 0), marker=".", label=pair)
    left.set(title="whole backbone", xlabel="step", ylabel="cosine of two domains' gradients")
    right.set(title="by layer, mean over the run", xlabel="layer (0: input)")
    for ax in (left, right):
        ax.axhline(0, color="0.6", lw=0.8)
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    save_figure(figure, path)


def log_window(job: Job, board, window: list[dict], done: int) -> dict:
    """Means over the steps since the last line, into log.jsonl and TensorBoard.

    This is where the CPU waits for the GPU and the ranks for each other; in between nobody does.
    """
    config, before = job.config, job.tally.get("logged", 0.0)
    total = {name: torch.stack([t[name].float() for t in window]) for name in window[0]}
    for name in ("loss", "loss_by_domain", "cos", "correct", "count", "direction", "norms"):
        job.ranks.sum(total[name])
    factor = rate(done - 1, job.steps, config["warmup"], config["min_lr"])
    record = {"step": done, "images": done * config["batch"], "lr": factor * config["lr"],
              "head_lr": factor * config["head_lr"], "margin": ramp((done - 1) / job.steps, config["margin_ramp"]),
              "backbone": done > round(config["head_warmup"] * job.steps)}
    record |= summarise(total, config["domains"])
    seen = job.plan[:done].sum((0, 1))
    for name, split, images in zip(config["domains"], job.splits, seen.tolist(), strict=True):
        record |= {f"images/{name}": images, f"passes/{name}": images / len(split)}
    job.tally["skipped"] = int(job.health[0])
    if skipped := int((total["finite"] == 0).sum()):
        tqdm.write(f"until step {done}: {skipped} of {len(window)} steps had no finite gradient and were skipped",
                   file=sys.stderr)
    record["images_per_second"] = len(window) * config["batch"] / max(job.tally["seconds"] - before, 1e-9)
    if job.device.type == "cuda":
        record["memory_GiB"] = torch.cuda.max_memory_allocated(job.device) / 2**30
    job.tally["logged"] = job.tally["seconds"]
    if record.get("mean_cosine", 0) > 0.99 and job.tally["collapsed_at"] is None:
        job.tally["collapsed_at"] = done
        tqdm.write(f"WARNING: step {done}: the embeddings have COLLAPSED (mean pairwise cosine "
                   f"{record['mean_cosine']:.4f}): lower --lr or take --head-init means", file=sys.stderr)
    job.tally["bad"], job.bad = job.tally["bad"] + int(job.ranks.sum(torch.tensor(job.bad))), 0
    record |= {key: value for key, value in job.tally.items() if key != "start"}
    if board is not None:
        append(job.folder / "log.jsonl", record)
        with writing(job.folder / "tensorboard"):
            for name, value in record.items():
                if isinstance(value, int | float):
                    board.add_scalar(name, value, done)
    return record


def summarise(total: dict[str, torch.Tensor], domains: list[str]) -> dict:
    """Means over the steps [n, ...] since the last log line, but for skipped ones; domains not drawn are absent."""
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


def describe_saved(job: Job) -> str:
    """Which checkpoint a run that went wrong can go back to."""
    return (f"no checkpoint was written before them, {job.folder} starts anew" if job.saved is None
            else f"the checkpoint from before them, of step {job.saved}, is in {job.folder}/last")


def check_health(job: Job, done: int) -> None:
    """Stop a run whose steps or images are bad; its last checkpoint stays."""
    config, seen = job.config, done * job.config["batch"]
    job.tally["skipped"], in_a_row = job.health.tolist()
    if in_a_row > config["max_skipped"]:
        raise InputError(f"{job.folder}: {in_a_row} steps in a row were not finite; {describe_saved(job)}: lower --lr "
                         "or raise --warmup")
    if job.tally["bad"] > config["max_bad"] * max(seen, 1000):
        raise InputError(f"{job.tally['bad']} damaged images among {seen} exceed --max-bad: check the shards with "
                         "`python -m data_prep verify DIR`")
