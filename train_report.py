"""What a training run leaves to be looked at: its first images, and a page on how it went with its curves.

Nothing here changes the run; the figures are those that train.py logged.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch

from backbones import Backbone
from data_prep.stream import Stream
from train import COLOURS, Job, read_lines, to_images, write_atomically


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
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def write_report(job: Job) -> None:
    """report.md, one page on how the run went, and its figures curves.png and conflict.png."""
    log, looks, fights = (read_lines(job.folder / f"{name}.jsonl") for name in ("log", "probe", "conflict"))
    log = [record for record in log if "loss" in record]
    draw_curves(job.folder / "curves.png", log, looks, job.config["domains"])
    lines = [f"# {job.folder.name}", "",
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
        lines += [f"| {name} | {looks[0]['auc'].get(name, math.nan):.3f} | {value:.3f} |"
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
    """Loss, top-1, target cosine per domain and, where --eval-every looked, AUC, over the images seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = [("loss", "training loss"), ("top1", "training top-1"), ("target_cosine", "cosine to the own class")]
    figure, axes = plt.subplots(1, len(keys) + bool(looks), figsize=(4 * (len(keys) + bool(looks)), 3), squeeze=False)
    for ax, (key, title) in zip(axes[0], keys, strict=False):
        for name in domains:
            points = [(r["images"], r[f"{key}/{name}"]) for r in log if f"{key}/{name}" in r]
            ax.plot(*zip(*points, strict=True) if points else ((), ()), label=name, color=COLOURS[name])
        ax.set(title=title, xlabel="images")
    if looks:
        for number, name in enumerate(looks[0]["auc"]):
            domain = name.split("/")[0]
            again = domain in [n.split("/")[0] for n in list(looks[0]["auc"])[:number]]
            axes[0][-1].plot([r["step"] for r in looks], [r["auc"].get(name, math.nan) for r in looks], label=name,
                             color=COLOURS[domain], ls="--" if again else "-", marker=".")
        axes[0][-1].set(title="same/different AUC, fixed images", xlabel="step")
        axes[0][-1].legend(fontsize=7)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    figure.savefig(path, dpi=120)
    plt.close(figure)
