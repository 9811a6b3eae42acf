"""Unit embeddings of a user's own pictures."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_prep import InputError, progress, write_atomically, write_csv
from data_prep.format import FITS, MAX_SIZE, BadImage, Skipped, decoder, fits, open_training
from data_prep.sources.archives import members
from data_prep.sources.folders import is_image
from data_prep.write import fit_image
from models.backbones import embed_rows
from models.runs import Run, describe_sources, load_tuned, pick_device
from protocols.embed import EmbedOptions


@dataclass
class Pictures:
    """Image files with the interface of a split for `embed_rows`; each is fitted and encoded as in a shard."""

    paths: list[Path]
    size: int  # pixels
    fit: str  # see `fit_image`, as is quality
    quality: int

    def image(self, row: int) -> torch.Tensor:
        """uint8 [3, size, size], RGB; BadImage if the file is not an image or is damaged."""
        try:
            data = fit_image(self.paths[row].read_bytes(), self.size, self.fit, self.quality)
            return decoder()(bytearray(data))
        except (OSError, RuntimeError) as error:
            raise BadImage(f"{self.paths[row]}: unreadable") from error


def find_pictures(places: tuple[Path, ...]) -> list[Path]:
    """The given files, and every image (by file name) below the given folders, without repetition."""
    pictures, skipped = [], Skipped()
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: no such file or folder; give pictures, or folders of pictures")
        inside = [place]
        if place.is_dir():  # the path on disk, whose spelling may differ from the name
            inside = [Path(file.path) for file in members(place, skipped) if is_image(file, skipped)]
        if not inside:
            raise InputError(f"{place}: holds no images (no names that end in .jpg, .png or the like)")
        pictures += inside
    for reason, count in skipped.items():
        print(f"  {count:,} files left out: {reason}")
    return list(dict.fromkeys(pictures))


def find_fitting(run: Run, domain: str | None) -> dict:
    """Size, fit and JPEG quality of the shards that a domain of a run was trained on."""
    domain = domain or run.config["domains"][0]
    if domain not in run.config["domains"]:
        raise InputError(f"--domain {domain}: the run was trained on {', '.join(run.config['domains'])}: use the one "
                         "whose images are prepared like yours")
    sources = run.config.get("sources") or describe_sources(open_training(run.config["data"], run.config["domains"]))
    fitting = {key: sources.get(domain, {}).get(key) for key in ("size", "fit", "quality")}
    if not (fits(fitting, {"size": int, "quality": int}) and fitting["size"] <= MAX_SIZE and fitting["fit"] in FITS):
        raise InputError(f"{run.folder}/config.json: its sources do not record how {domain} was fitted ({fitting}): "
                         "restore it")
    print(f"fitted as {domain}: {fitting['size']} px, {fitting['fit']}")
    return fitting


def write_embeddings(path: Path, names: list[str], x: np.ndarray) -> None:
    """`files` [M] and `embeddings` [M, D] as .npz, or .csv with one line per file."""
    if path.suffix == ".csv":
        write_csv(path, [{"file": name} | {f"e{i}": f"{value:.9g}" for i, value in enumerate(row)}
                         for name, row in zip(names, x, strict=True)])
    else:
        data = io.BytesIO()
        np.savez(data, files=np.array(names), embeddings=x)
        write_atomically(path, lambda temporary: temporary.write_bytes(data.getbuffer()))


def embed_pictures(places: tuple[Path, ...], run: Run, domain: str | None, out: Path, options: EmbedOptions) -> None:
    """`evaluate.py embed`: write the embeddings of the given pictures and of those in the given folders to `out`."""
    paths, device = find_pictures(places), pick_device(options.device)
    files = Pictures(paths, **find_fitting(run, domain))
    model = load_tuned(run).to(device)
    rows, parts = [], []
    with progress(total=len(paths), desc="embed", unit="img") as bar:
        for good, x in embed_rows(model, files, np.arange(len(paths)), device, options.batch, options.workers,
                                  options.flip):
            rows += good.tolist()
            parts.append(torch.nn.functional.normalize(x, dim=1).cpu().numpy())
            bar.update(len(good))
    for row in sorted(set(range(len(paths))) - set(rows)):
        print(f"skipped, not a readable image: {paths[row]}", file=sys.stderr)
    if not rows:
        raise InputError(f"none of the {len(paths)} files can be read as an image: nothing written")
    write_embeddings(out, [str(paths[row]) for row in rows], np.concatenate(parts))
    print(f"{out}: {len(rows)} embeddings of {model.dim} dimensions"
          + (f"; {len(paths) - len(rows)} files skipped" if len(rows) < len(paths) else ""))
