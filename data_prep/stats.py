"""What a split looks like in numbers: images per class, file sizes, JPEG quality, sharpness; JSON and a figure."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep import InputError
from data_prep.format import ROLES, BadImage, Split


@cache
def table_sums() -> np.ndarray:
    """Sum of the luminance table of each quality 1..100, as the encoder writes it; in any order it tells a quality."""
    sums = []
    for quality in range(1, 101):
        Image.new("L", (8, 8)).save(out := io.BytesIO(), "JPEG", quality=quality)
        sums.append(sum(Image.open(out).quantization[0]))
    return np.array(sums)


def jpeg_quality(data: bytes) -> int | None:
    """The quality 1..100 whose table is nearest to that of a JPEG; None where it has none that can be read."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            table = image.quantization[0]
    except Exception:  # as wherever Pillow reads a stranger's file
        return None
    return int(np.abs(table_sums() - sum(table)).argmin()) + 1


def sharpness(image: np.ndarray) -> float:
    """Standard deviation of the 5-point Laplacian of the grey image (0..255).

    Args:
        image: uint8 [3, H, W], RGB.
    """
    grey = np.tensordot((0.299, 0.587, 0.114), image.astype(np.float64), 1)
    inner = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner).std())


def spread(values: np.ndarray) -> dict[str, float]:
    """Least, quartiles, largest and mean."""
    points = np.percentile(values, [0, 25, 50, 75, 100])
    found = dict(zip(("min", "p25", "median", "p75", "max"), points.tolist(), strict=True)) | {"mean": values.mean()}
    return {name: round(float(value), 3) for name, value in found.items()}


def split_stats(split: Split, sample: int, seed: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Statistics of a split, and the values behind them, for the figure.

    Args:
        sample: images that are decoded for quality and sharpness, drawn by `seed`; counts and sizes are of all.
    """
    if not len(split):
        raise InputError(f"{split.folder}: no images in it")
    rows = np.sort(np.random.default_rng(seed).permutation(len(split))[:sample])
    quality, sharp, bad = [], [], 0
    for row in rows.tolist():
        try:
            sharp.append(sharpness(split.image(row).numpy()))
        except BadImage:
            bad += 1
            continue
        quality.append(jpeg_quality(split.jpeg(row)[1]))
    values = {"images per class": split.counts[split.counts > 0], "bytes per image": np.asarray(split.length),
              "JPEG quality": np.array([q for q in quality if q is not None]), "sharpness": np.array(sharp)}
    if "quality" in split.index["columns"]:
        values["detector's quality"] = np.asarray(split.column("quality"))
    values = {name: found for name, found in values.items() if len(found)}
    stats = {
        "split": f"{split.domain}/{split.name}", "images": len(split), "classes": len(split.classes),
        "unlabelled": int((split.labels < 0).sum()), "classes with one image": int((split.counts == 1).sum()),
        "pixels": split.size, "bytes": sum(shard["bytes"] for shard in split.index["shards"]),
        **{name: spread(found) for name, found in values.items()},
        "decoded": {"images": len(rows), "seed": seed, "unreadable": bad},
        "skipped": split.index.get("skipped", {}),
    }
    if split.hashed:
        stats["copies"] = split.copies
    for name in ("camera", "clothes", "template"):
        if name in split.index["columns"]:
            column = split.column(name)
            stats[f"{name} numbers"] = len(np.unique(column[column >= 0]))
    if "role" in split.index["columns"]:
        roles = split.column("role")
        stats["roles"] = {role: int((roles == i).sum()) for i, role in enumerate(ROLES)}
    return stats, values


def draw_stats(path: Path, title: str, values: dict[str, np.ndarray]) -> None:
    """One histogram a statistic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(values), figsize=(3.2 * len(values), 2.8), constrained_layout=True)
    for axis, (name, found) in zip(np.atleast_1d(axes), values.items(), strict=True):
        low, high = found.min(), found.max()
        if low == high:  # a bar over the whole panel would say nothing
            of = "classes" if name == "images per class" else "images"
            axis.text(0.5, 0.5, f"{low:,.6g} in all\n{len(found):,} {of}", ha="center", va="center",
                      transform=axis.transAxes)
            axis.set(title=name, xticks=[], yticks=[])
            axis.title.set_fontsize(10)
            continue
        if name == "images per class" and high > 20 * max(low, 1):  # a few classes with most of the images
            axis.set_xscale("log")
            bins = np.geomspace(max(low, 1), high, 31)
        elif found.dtype.kind == "f":
            bins = np.linspace(low, high, 31)
        else:
            bins = np.arange(low, high + 2, max((high - low) // 30, 1)) - 0.5
        axis.hist(found, bins=bins, color="#4477aa")
        axis.axvline(np.median(found), color="#cc6677", linewidth=1.2)
        axis.set_title(name, fontsize=10)
        axis.set_ylabel("classes" if name == "images per class" else "images", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"{title} (line: median)", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
