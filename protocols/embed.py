"""The embeddings of a split: computed once per backbone and kept in a file that every figure reads.

Copy with it: protocols/bootstrap.py, models/, kernels/, data_prep/.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from data_prep import InputError, make_folder, option, progress, write_atomically, write_json
from data_prep.format import Split
from data_prep.loaders import LOADERS
from models.backbones import Backbone, embed_rows
from models.runs import Ranks, pick_device
from protocols.bootstrap import normalise

PART = 2048  # about the most images that an interruption loses
LARGE = 1 << 29  # bytes of embeddings above which a split's are mapped from a file, not held in memory


# ---------------------------------------------------------------- embeddings


def hash_weights(model: Backbone) -> str:
    """A fingerprint of all weights of a backbone."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_array(path: Path, array: np.ndarray) -> None:
    """np.save to exactly this path (given a name, np.save would add .npy)."""
    with open(path, "wb") as file:
        np.save(file, array)


def load_array(path: Path, shape: tuple[int, int], missing: np.ndarray | bool = False) -> np.ndarray | None:
    """The floats of a file, mapped; None if they are not finite, not of this shape, or damaged.

    `missing`: rows that need not be finite, bool [M].
    """
    try:
        x = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # damage makes NumPy raise OSError, ValueError, EOFError, SyntaxError, TokenError, ...
        return None
    whole = isinstance(x, np.ndarray) and x.dtype == np.float32 and x.shape == shape
    missing = np.broadcast_to(missing, shape[:1])
    return x if whole and all((np.isfinite(x[i : i + 4096]).all(1) | missing[i : i + 4096]).all()
                              for i in range(0, len(x), 4096)) else None


def keep(path: Path, shape: tuple[int, int], make: Callable[[], np.ndarray]) -> np.ndarray:
    """A float32 array that is computed once, then read from its file; a second process waits for the first."""
    if load_array(path, shape) is None:
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if load_array(path, shape) is None:
                if path.exists():
                    print(f"  {path}: damaged: computed again")
                made = make()
                write_atomically(path, lambda temporary: save_array(temporary, made))
    return np.load(path, allow_pickle=False)


def map_copy(x: np.ndarray, folder: Path) -> np.ndarray:
    """A writable copy that takes no memory: mapped from a file in `folder` that is deleted with it.

    The file has no name, so that even a killed process leaves none. InputError if the disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for start in range(0, len(x), 1 << 14):
                file.write(np.ascontiguousarray(x[start : start + (1 << 14)]).data)
            file.flush()  # written before it is mapped: a full disk raises here and would crash there
            return np.asarray(np.memmap(file, x.dtype, "r+", shape=x.shape))
    except OSError as error:
        raise InputError(f"{folder}: no room for {x.nbytes / 2**30:.1f} GiB of embeddings while they are scored "
                         f"({error.strerror}): free some") from error


class Embedder:
    """Embeddings of one backbone, computed once per split and kept in `folder` with a fingerprint.

    Those of a large split are mapped from a file, so that the system can reclaim their memory.

    They are computed in parts, each written when done: an interrupted computation continues there, and the ranks of
    torchrun divide the parts. Batches do not depend on the rank, so the result is bit-identical.

    Args:
        model: in eval mode.
        name: "tuned" or "foundation", for file names and rows.
        folder: where the .npy files go.
        flip: add the embedding of the mirrored image (before normalisation, as the face protocols do).
        shared: other runs use the folder too; files are named by fingerprint.
        ranks: the processes that embed.
    """

    def __init__(self, model: Backbone, name: str, folder: Path, device: torch.device, batch: int, workers: int,
                 flip: bool, shared: bool = False, ranks: Ranks = Ranks()) -> None:
        self.model, self.name, self.folder, self.device = model.to(device), name, folder, device
        self.batch, self.workers, self.flip, self.shared, self.ranks = batch, workers, flip, shared, ranks
        self.weights, self.made = hash_weights(model), set()

    def __call__(self, split: Split) -> np.ndarray:
        """Unit embeddings float32 [M, D] of a split; NaN in the rows of unreadable images."""
        return normalise(self.raw(split))

    def raw(self, split: Split) -> np.ndarray:
        """The same before normalisation: norms of faces reflect image quality, and templates use them."""
        path = self.prepare(split)
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        return map_copy(stored, path.parent) if stored.nbytes >= LARGE else np.load(path, allow_pickle=False)

    def prepare(self, split: Split) -> Path:
        """The file of a split's embeddings, computed if missing; all ranks have to call it."""
        index = hashlib.sha256((split.folder / "index.json").read_bytes()).hexdigest()
        fingerprint = {"weights": self.weights, "split": index, "image_size": self.model.image_size, "flip": self.flip}
        key = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:16]
        path = self.folder / f"{self.name}-{split.domain}-{split.name}{'-' + key if self.shared else ''}.npy"
        note, parts = path.with_suffix(".json"), path.with_name(f".{path.stem}.{key}.parts")

        def noted() -> bool:
            try:
                return path.exists() and json.loads(note.read_text()) == fingerprint
            except (OSError, ValueError):
                return False

        def known() -> bool:
            shape = (len(split), self.model.dim)
            return path in self.made or (noted() and load_array(path, shape, split.missing) is not None)

        def leftovers() -> list[Path]:
            """Parts left by a killed evaluation, of these or other weights."""
            return list(path.parent.glob(f".{glob.escape(path.stem)}.{'[0-9a-f]' * 16}.parts"))

        if self.ranks.world == 1 and known() and not leftovers():
            self.made.add(path)  # checked for damage once
            return path
        parts.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if self.ranks.rank == 0:  # a second evaluation with the same cache waits here
                lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.ranks.wait()
            if not known():
                if self.ranks.rank == 0 and noted():
                    print(f"  {path}: damaged: embeddings computed again")
                parts.mkdir(exist_ok=True)
                self.embed_parts(split, parts)
                self.ranks.wait()
                if self.ranks.rank == 0:
                    note.unlink(missing_ok=True)
                    write_atomically(path, lambda temporary: self.join_parts(split, parts, temporary))
                    # damaged images may be repaired: then their embeddings are computed again
                    if (np.isfinite(np.load(path, mmap_mode="r")[:, 0]) | split.missing).all():
                        write_json(note, fingerprint)
                self.ranks.wait()
            for folder in leftovers() if self.ranks.rank == 0 else []:
                shutil.rmtree(folder, ignore_errors=True)
        self.made.add(path)
        return path

    def parts_of(self, split: Split, folder: Path) -> dict[range, Path]:
        """Rows and file of every part; parts are whole batches, so that each can be computed alone."""
        rows, size = range(len(split)), self.batch * max(PART // self.batch, 1)
        parts = [rows[start : start + size] for start in rows[::size]]
        return {part: folder / f"{part.start}-{part.stop}.npy" for part in parts}

    def embed_parts(self, split: Split, folder: Path) -> None:
        """Compute this rank's share of the parts that are missing."""
        share = list(self.parts_of(split, folder).items())[self.ranks.rank :: self.ranks.world]
        todo = {rows: file for rows, file in share if not file.exists()}
        if not todo:
            return
        batches = embed_rows(self.model, split, np.concatenate([*todo]), self.device, self.batch, self.workers,
                             self.flip)
        end: tuple = [-1], None
        with tqdm(disable=True) if self.ranks.rank else progress(
                total=sum(map(len, todo)), desc=f"{self.name} {split.domain}/{split.name}", unit="img") as bar:
            done, embeddings = next(batches, end)
            for rows, file in todo.items():
                x = np.full((len(rows), self.model.dim), np.nan, dtype=np.float32)  # unreadable images have no batch
                while int(done[0]) in rows:
                    x[done - rows.start] = values = embeddings.cpu().numpy()
                    if not np.isfinite(values).all():
                        row = done[~np.isfinite(values).all(1)][0]
                        raise InputError(f"{split.folder}: the {self.name} backbone gives no finite embedding of "
                                         f"sample {split.jpeg(row)[0]}: the run diverged, or the weights are damaged")
                    bar.update(len(done))
                    done, embeddings = next(batches, end)
                write_atomically(file, partial(save_array, array=x))

    def join_parts(self, split: Split, folder: Path, path: Path) -> None:
        """Write the whole array, part by part: a million embeddings are gigabytes."""
        with open(path, "wb") as file:  # not mapped: a full disk raises here and would crash there
            np.lib.format.write_array_header_1_0(file, {
                "descr": "<f4", "fortran_order": False, "shape": (len(split), self.model.dim)})
            for part in self.parts_of(split, folder).values():
                file.write(np.load(part, allow_pickle=False).data)


# ---------------------------------------------------------------- options


@dataclass
class EmbedOptions:
    """Options of every command on a run: what is embedded, and how."""

    run: str | None = option("run", None, str, "Folder of a finished run.", metavar="RUN")
    data: str | None = option("run", None, str, "Data root (default: the run's own).", metavar="DIR")
    allow_partial: bool = option("run", False, bool, "Accept a run that has not finished.")
    flip: bool = option("embeddings", True, bool, "Add the embedding of the mirrored image.")
    batch: int = option("embeddings", 64, click.IntRange(1), "Images per forward pass.")
    workers: int = option("embeddings", LOADERS, click.IntRange(0, 1024), "Loader processes.")
    cache: str | None = option("embeddings", None, str, "Keep the embeddings of untouched backbones here, for all runs "
                               "that share one (default: .foundation beside the run).", metavar="DIR")
    device: str = option("embeddings", "auto", str, "auto, cpu or cuda; evaluate.py under torchrun: each process takes "
                         "its own.")
    seed: int = option("embeddings", 0, click.IntRange(0), "Of every random draw.")


DEBUG = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")


def make_embedder(load: Callable[[], Backbone], weights: str, folder: Path, options: EmbedOptions,
                  ranks: Ranks = Ranks()) -> Embedder:
    """An embedder of a run's weights; `folder`: of its results.

    Those of the untouched backbone go to --cache or, if writable, to a folder beside the runs.
    """
    cache = shared_folder(folder, options.cache) if weights == "foundation" else None
    return Embedder(load(), weights, cache or folder / "embeddings", pick_device(options.device), options.batch,
                    options.workers, options.flip, cache is not None, ranks)


def shared_folder(folder: Path, cache: str | None) -> Path | None:
    """Folder that runs share for their untouched backbone: --cache, or RUNS/.foundation; None if not writable.

    `folder`: RUN/eval.
    """
    if cache:
        make_folder(Path(cache), "--cache")
        return Path(cache)
    runs = folder.resolve().parents[1]
    runs = runs.parents[1] if runs.name == "checkpoints" else runs
    with contextlib.suppress(OSError):
        (runs / ".foundation").mkdir(parents=True, exist_ok=True)
        if os.access(runs / ".foundation", os.W_OK):
            return runs / ".foundation"
    return None
