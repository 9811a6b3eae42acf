"""Statistics of a split: images per class, file sizes, JPEG quality, sharpness; as JSON and as a plot."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep import InputError, write_atomically
from data_prep.format import ROLES, BadImage, Split


@cache
def table_sums() -> np.ndarray:
    """Sum of the encoder's luminance table for each quality 1..100; a sum does not depend on the table's order."""
    sums = []
    for quality in range(1, 101):
        Image.new("L", (8, 8)).save(out := io.BytesIO(), "JPEG", quality=quality)
        sums.append(sum(Image.open(out).quantization[0]))
    return np.array(sums)


def jpeg_quality(data: bytes) -> int | None:
    """The quality 1..100 whose luminance table is closest to a JPEG's; None if the JPEG has no readable table."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            table = image.quantization[0]
    except Exception:  # Pillow raises many kinds of errors on damaged files
        return None
    return int(np.abs(table_sums() - sum(table)).argmin()) + 1


def sharpness(image: np.ndarray) -> float:
    """Standard deviation of the 5-point Laplacian of the grey image (0..255) of an RGB image, uint8 [3, H, W]."""
    grey = np.tensordot((0.299, 0.587, 0.114), image.astype(np.float64), 1)
    inner = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner).std())


def spread(values: np.ndarray) -> dict[str, float]:
    """Minimum, quartiles, maximum and mean."""
    points = np.percentile(values, [0, 25, 50, 75, 100]).tolist()
    names = ("min", "p25", "median", "p75", "max", "mean")
    return {name: round(float(value), 3) for name, value in zip(names, [*points, values.mean()], strict=True)}


def split_stats(split: Split, sample: int, seed: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Statistics of a split, and the underlying values for the plot.

    JPEG quality and sharpness are of a random `sample` of images, drawn by `seed`, which are decoded.
    """
    if not len(split):
        raise InputError(f"{split.folder}: has no images")
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
    values = {name: numbers for name, numbers in values.items() if len(numbers)}
    stats = {
        "split": f"{split.domain}/{split.name}", "images": len(split), "classes": len(split.classes),
        "unlabelled": int((split.labels < 0).sum()), "classes with one image": int((split.counts == 1).sum()),
        "pixels": split.size, "bytes": sum(shard["bytes"] for shard in split.index["shards"]),
        **{name: spread(numbers) for name, numbers in values.items()},
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
    """Draw a histogram of each statistic."""
    from matplotlib.figure import Figure  # imported late: it takes a second

    figure = Figure(figsize=(3.2 * len(values), 2.8), constrained_layout=True)
    for axis, (name, numbers) in zip(np.atleast_1d(figure.subplots(1, len(values))), values.items(), strict=True):
        low, high, unit = numbers.min(), numbers.max(), "classes" if name == "images per class" else "images"
        axis.set_title(name, fontsize=10)
        if low == high:  # a histogram would be a single bar
            axis.text(0.5, 0.5, f"all {len(numbers):,} {unit}:\n{low:,.6g}", ha="center", va="center",
                      transform=axis.transAxes)
            axis.set(xticks=[], yticks=[])
            continue
        if name == "images per class" and high > 20 * max(low, 1):  # a few classes with most of the images
            axis.set_xscale("log")
            bins = np.geomspace(max(low, 1), high, 31)
        elif numbers.dtype.kind == "f":
            bins = np.linspace(low, high, 31)
        else:
            bins = np.arange(low, high + 2, max((high - low) // 30, 1)) - 0.5
        axis.hist(numbers, bins=bins, color="#4477aa")
        axis.axvline(np.median(numbers), color="#cc6677", linewidth=1.2)
        axis.set_ylabel(unit, fontsize=8)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"{title} (line: median)", fontsize=10, parse_math=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
