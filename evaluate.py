"""Score a run on every test split of its data, before and after fine-tuning.

    python evaluate.py --run runs/NAME                                        # all test splits of the run's data root
    python evaluate.py --run runs/NAME --splits face_hq/test,object/val      # some of them
    python evaluate.py --run runs/NAME --data other/data --device cuda
    python evaluate.py --model tf_efficientnet_lite0 --weights FILE           # an untouched backbone, without a run
    torchrun --nproc-per-node 8 -- evaluate.py --run runs/NAME                # eight GPUs embed, the first scores
    python evaluate.py --run runs/NAME --humans anna.csv --humans ben.csv     # beside people, on the same trials
    python evaluate.py --run runs/NAME --watch                                # every --keep checkpoint as it appears
    python evaluate.py compare runs/A-s0 runs/A-s1 runs/B-s0                 # paired differences; seeds are averaged
    python evaluate.py compare runs/B --experts runs/face runs/body          # non-inferiority to your own experts
    python evaluate.py leaks --run runs/NAME --threshold 0.95                # test images that training nearly repeats
    python evaluate.py bench --cases reid --json bench.json                  # large cases beside numpy and scikit-learn
    python evaluate.py embed photos/ --run runs/NAME --domain face_hq         # embeddings of your own pictures

The protocol in a split's index.json decides the metrics. RUN/eval/ then holds results.json and results.csv (one row a
figure), report.md and report.html (the same, in one file), figures, and the embeddings, which are computed once.

--humans adds, for each set of weights, rows with a protocol that begins with "human trials": of each split that people
rated; of a domain of which they rated several (its "all splits": their mean); and of domain "all" (the mean over the
domains: multi-tasking), where they rated several:
    AUC on human trials           the model's, on the trials of each rater, mean over raters
    human AUC (mean of raters)
    AUC of rater NAME
    model minus human AUC         paired; its low above 0: above humans, its high below 0: below them, else undecided
    share of raters beaten        of the raters, those whose AUC is below the model's on their own trials
Their intervals resample the people and things on the pictures, not the raters.
"""

import contextlib
import csv
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, pairwise, product
from pathlib import Path

import click
import numpy as np
import scipy.optimize
import scipy.sparse
import torch
from tqdm import tqdm

import backbones
import report
import train
from backbones import Backbone
from data_prep import DOMAIN_COLOURS, DOMAINS, InputError, Number, run_command
from data_prep.folders import image_suffixes
from data_prep.shards import ROLES, BadImage, Split, fit_image, open_root
from data_prep.trials import Rating, read_ratings
from run_folder import (
    FREE_ON_RESUME,
    Run,
    describe_sources,
    kept_steps,
    load_foundation,
    load_run,
    load_tuned,
    make_folder,
    read_json,
    write_atomically,
    write_json,
)
from train import matched_pairs
from train_options import LOADERS, refuse_options
from train_ranks import Ranks, join_ranks, pick_device

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# the figure that stands for a protocol in summaries; a readout that tuned and untouched backbones both have
HEADLINE = {"verification": "auc", "templates": "tar@far=0.0001", "reid": "rank-1", "identification": "rank-1",
            "classification": "nearest-mean top-1"}
FPIRS = (1e-1, 1e-2)
HIT, MISS = "#009E73", "#D55E00"  # frames of what is right and wrong
COLOURS = {"foundation": "#999999", "tuned": "#0072B2", "people": "#E69F00"}  # Okabe-Ito
SCORE_BINS = np.linspace(-1, 1, 51)  # of the score distributions
BINS = 50 * 1300  # of the scores of long lists of pairs, 3e-5 wide: whole numbers of them make the above

PART = 2048  # images, about, that an interrupted embedding loses at most
LARGE = 1 << 29  # bytes of a split's embeddings from which on they are mapped from a file, not held in memory
PATIENCE = 5.0  # seconds between looks at a run that trains (--watch)

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


def load_array(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The finite floats of a file, mapped; None where it holds others, or another shape, or is damaged."""
    try:
        x = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception:  # NumPy raises OSError, ValueError, EOFError, SyntaxError, TokenError, ... by damage
        return None
    whole = isinstance(x, np.ndarray) and x.dtype == np.float32 and x.shape == shape
    return x if whole and all(np.isfinite(x[i : i + 4096]).all() for i in range(0, len(x), 4096)) else None


def map_copy(x: np.ndarray, folder: Path) -> np.ndarray:
    """A copy to write to that takes no memory: mapped from a file in `folder` that goes when the copy does.

    The file has no name, so that not even a killed process leaves it behind. InputError where the disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for start in range(0, len(x), 1 << 14):
                file.write(np.ascontiguousarray(x[start : start + (1 << 14)]).data)
            file.flush()  # written, not only mapped: a full disk is an error here, and a crash there
            return np.asarray(np.memmap(file, x.dtype, "r+", shape=x.shape))
    except OSError as error:
        raise InputError(f"{folder}: no room for {x.nbytes / 2**30:.1f} GiB of embeddings while they are scored "
                         f"({error.strerror}): free some") from error


class Embedder:
    """Embeddings of one backbone, computed once per split and kept in `folder` with a fingerprint.

    Those of a large split are mapped from a file where they are used: they take no memory that the system cannot have
    back, and are the same to the bit.

    They are computed in parts, each written when it is done: what is interrupted goes on there, and the ranks of
    torchrun share the parts out. Batches do not depend on who computes them, so that the result is the same to the bit.

    Args:
        model: the backbone, in eval mode.
        name: "tuned" or "foundation", for file names and rows.
        folder: where the .npy files go.
        device, batch, workers: of the computation.
        flip: add the embedding of the mirrored image (before normalisation, as the face protocols do).
        shared: other runs use the folder too: files are named by their fingerprint.
        ranks: this process among those that embed.
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
        """The same before normalisation: the norm of a face tells how good its picture is, so templates use it."""
        path = self.prepare(split)
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        return map_copy(stored, path.parent) if stored.nbytes >= LARGE else np.load(path, allow_pickle=False)

    def prepare(self, split: Split) -> Path:
        """The file of a split's embeddings, computed where it is not there; all ranks have to call it."""
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
            return path in self.made or (noted() and load_array(path, (len(split), self.model.dim)) is not None)

        if self.ranks.world == 1 and known():
            self.made.add(path)  # to look for damage once is enough
            return path
        parts.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if self.ranks.rank == 0:  # a second evaluation with the same cache waits here, and then finds it all done
                lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            self.ranks.wait()
            if not known():
                if self.ranks.rank == 0 and noted():
                    print(f"  {path}: damaged: its embeddings are computed again")
                parts.mkdir(exist_ok=True)
                self.embed_parts(split, parts)
                self.ranks.wait()
                if self.ranks.rank == 0:
                    note.unlink(missing_ok=True)
                    write_atomically(path, lambda temporary: self.join_parts(split, parts, temporary))
                    # a split with damaged images may be repaired: its embeddings are made anew next time
                    if np.isfinite(np.load(path, mmap_mode="r")[:, 0]).all():
                        write_json(note, fingerprint)
                    shutil.rmtree(parts)
                self.ranks.wait()
        self.made.add(path)
        return path

    def parts_of(self, split: Split, folder: Path) -> dict[int, Path]:
        """First row and file of every part: whole batches, so that parts can be computed apart."""
        size = self.batch * max(PART // self.batch, 1)
        return {start: folder / f"{start}-{min(start + size, len(split))}.npy" for start in range(0, len(split), size)}

    def embed_parts(self, split: Split, folder: Path) -> None:
        """Compute this rank's share of the parts that are missing."""
        mine = list(self.parts_of(split, folder).items())[self.ranks.rank :: self.ranks.world]
        todo = [(start, file) for start, file in mine if not file.exists()]
        if not todo:
            return
        rows = [np.arange(*map(int, file.stem.split("-"))) for _, file in todo]

        def blank(place: int) -> np.ndarray:
            return np.full((len(rows[place]) if place < len(rows) else 0, self.model.dim), np.nan, dtype=np.float32)

        place, x = 0, blank(0)

        def finish() -> None:
            nonlocal x, place
            write_atomically(todo[place][1], lambda temporary: save_array(temporary, x))
            place, x = place + 1, blank(place + 1)

        parts = train.embed_rows(self.model, split, np.concatenate(rows), self.device, self.batch, self.workers,
                                 self.flip)
        with tqdm(total=sum(map(len, rows)), desc=f"{self.name} {split.domain}/{split.name}", unit="img",
                  disable=True if self.ranks.rank else None) as bar:
            for good, found in parts:
                while good[0] > rows[place][-1]:
                    finish()
                found = found.cpu().numpy()
                if not np.isfinite(found).all():
                    row = good[~np.isfinite(found).all(1)][0]
                    raise InputError(f"{split.folder}: the {self.name} backbone makes no finite numbers of sample "
                                     f"{split.jpeg(row)[0]}: a run that diverged, or weights that are damaged")
                x[good - rows[place][0]] = found
                bar.update(len(good))
            while place < len(todo):  # the last, and what holds no readable image
                finish()

    def join_parts(self, split: Split, folder: Path, path: Path) -> None:
        """Write the whole array, part by part: a million embeddings are gigabytes."""
        x = np.lib.format.open_memmap(path, "w+", np.float32, (len(split), self.model.dim))
        for start, file in self.parts_of(split, folder).items():
            part = np.load(file, allow_pickle=False)
            x[start : start + len(part)] = part
        x.flush()


def normalise(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 IN PLACE: a copy of a million embeddings would be gigabytes."""
    x /= np.maximum(np.sqrt(np.einsum("nd,nd->n", x, x)), 1e-12)[:, None]
    return x


# ---------------------------------------------------------------- uncertainty


def bootstrap_counts(identities: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each sample's identity is drawn, [n], for each of `draws` resamplings of the identities."""
    names, index = np.unique(identities, return_inverse=True)
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[index]


@dataclass
class Figure:
    """A value with its 95 % percentile interval, the resampled values behind it and what it was computed from."""

    value: float
    draws: np.ndarray
    count: int = 0  # pairs, probes or images
    chance: float = math.nan  # of random embeddings, where retention is to be told

    @property
    def low(self) -> float:
        return self.quantile(0.025)

    @property
    def high(self) -> float:
        return self.quantile(0.975)

    def quantile(self, q: float) -> float:
        finite = self.draws[np.isfinite(self.draws)]
        return float(np.quantile(finite, q)) if len(finite) > 1 else self.value


def intervals(statistic: Callable[[np.ndarray | None], dict[str, float]], weights: Iterator[np.ndarray],
              count: int = 0) -> dict[str, Figure]:
    """Each figure of a statistic of sample weights (None: all 1), with its bootstrap."""
    draws = [statistic(w) for w in weights]
    return {name: Figure(float(value), np.array([draw[name] for draw in draws], dtype=float), count)
            for name, value in statistic(None).items()}


def retention(before: Figure, after: Figure, chance: float) -> Figure | None:
    """(after - chance) / (before - chance), paired draw by draw; None where `before` is not above chance."""
    if not before.low > chance:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return Figure((after.value - chance) / (before.value - chance),
                      (after.draws - chance) / (before.draws - chance), after.count)


def gap(clean: Figure, shifted: Figure, seed: int) -> Figure:
    """What is lost from clean to shifted images; the two sets are resampled each for itself."""
    return Figure(clean.value - shifted.value, clean.draws - np.random.default_rng(seed).permutation(shifted.draws),
                  shifted.count)


def weighted_mean(values: np.ndarray, weights: np.ndarray | None) -> float:
    """Mean of [n] values; NaN where all weights are 0."""
    if weights is None:
        return float(values.mean())
    return float((values * weights).sum() / weights.sum()) if weights.sum() else math.nan


# ---------------------------------------------------------------- verification


def roc(scores: np.ndarray, same: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """FAR and TAR, from (0, 0) to (1, 1), at every distinct score as a threshold (accepted: score >= threshold).

    Args:
        scores: [P] similarities.
        same: bool [P], genuine pairs.
        weights: [P], default 1.
    """
    order = np.argsort(-scores)  # not stable, and faster for it: ties are accepted together
    ordered, accepted = scores[order], same[order]
    last = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
    if weights is None:
        genuine = np.cumsum(accepted)[last]
        impostor = last + 1 - genuine
    else:
        w = weights[order].astype(float)
        genuine, impostor = np.cumsum(w * accepted)[last], np.cumsum(w * ~accepted)[last]
    with np.errstate(invalid="ignore", divide="ignore"):
        tar, far = genuine / genuine[-1], impostor / impostor[-1]
    return np.concatenate([[0.0], far]), np.concatenate([[0.0], tar])


def tar_at_far(far: np.ndarray, tar: np.ndarray, target: float) -> float:
    """The largest TAR whose FAR does not exceed the target (strict rule, no interpolation); NaN of one kind alone."""
    if math.isnan(far[-1] + tar[-1]):
        return math.nan  # a resampling without genuine pairs or without impostors
    return float(tar[np.searchsorted(far, target * (1 + 1e-9), side="right") - 1])


def equal_error_rate(far: np.ndarray, tar: np.ndarray) -> float:
    """Where FAR = 1 - TAR, linear between the neighbouring points of the ROC."""
    gap = far - (1 - tar)
    if not np.isfinite(gap).all():
        return math.nan  # a resampling without genuine pairs or without impostors
    i = int(np.argmax(gap >= 0))
    if i == 0:
        return float(far[0])
    t = -gap[i - 1] / (gap[i] - gap[i - 1])
    return float(far[i - 1] + t * (far[i] - far[i - 1]))


def d_prime(scores: np.ndarray, same: np.ndarray, weights: np.ndarray | None = None) -> float:
    """(mean genuine - mean impostor) / √((var genuine + var impostor) / 2)."""
    moments = []
    for mask in (same, ~same):
        w = None if weights is None else weights[mask]
        mean = weighted_mean(scores[mask], w)
        moments.append((mean, weighted_mean((scores[mask] - mean) ** 2, w)))
    (a, va), (b, vb) = moments
    return (a - b) / math.sqrt((va + vb) / 2) if va + vb > 0 else math.nan


def fold_accuracy(scores: np.ndarray, same: np.ndarray, folds: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean over folds of the accuracy at the threshold that is best on the other folds (LFW's protocol, exact form).

    Candidate thresholds lie half-way between neighbouring scores; of equally good ones the highest is taken.
    Source: LFW, unrestricted with labelled outside data; insightface's `verification.py` searches a grid instead.
    """
    w = np.ones(len(scores)) if weights is None else weights.astype(float)
    order = np.argsort(-scores, kind="stable")
    scores, same, folds, w = scores[order], same[order], folds[order], w[order]
    accuracies = []
    for fold in np.unique(folds):
        rest, here = folds != fold, folds == fold
        if not w[here].sum() or not w[rest].sum():
            continue
        # accepting the first i of the sorted pairs gets right: genuine ones among them, impostors after them
        gain = np.concatenate([[0.0], np.cumsum(np.where(same[rest], w[rest], -w[rest]))])
        s = scores[rest]
        cut = np.append(True, np.append(s[:-1] != s[1:], True))  # equal scores are not separated
        i = int(np.argmax(np.where(cut, gain, -np.inf)))
        threshold = np.inf if i == 0 else -np.inf if i == len(s) else (s[i - 1] + s[i]) / 2
        accuracies.append(weighted_mean((scores[here] >= threshold) == same[here], w[here]))
    return float(np.mean(accuracies)) if accuracies else math.nan


def grid_accuracy(scores: np.ndarray, same: np.ndarray, folds: np.ndarray,
                  weights: np.ndarray | None = None) -> dict[str, float]:
    """The same with thresholds on the squared distance 2 - 2 cos in 0, 0.01, ..., 3.99: mean and SD over the folds.

    Accepted where the distance is below the threshold; of equally good ones the first.
    Source: insightface, `verification.py`, calculate_roc (np.mean and np.std of its accuracies).
    """
    grid, w = np.arange(0, 4, 0.01), np.ones(len(scores)) if weights is None else weights.astype(float)
    place = np.searchsorted(grid, 2 - 2 * scores.astype(float), side="right")  # the first threshold that accepts
    names, fold = np.unique(folds, return_inverse=True)
    right = np.zeros((len(names), len(grid) + 1))
    np.add.at(right, (fold, place), np.where(same, w, -w))  # an accepted pair: right if genuine, else no longer right
    right = np.cumsum(right, axis=1)[:, : len(grid)] + np.bincount(fold, w * ~same)[:, None]
    total = np.bincount(fold, w)
    used = (total > 0) & (total.sum() > total)
    if not used.any():
        return {"accuracy": math.nan, "accuracy sd": math.nan}
    best = (right.sum(0) - right).argmax(1)  # on the other folds
    accuracies = (right[np.arange(len(names)), best] / np.maximum(total, 1e-300))[used]
    return {"accuracy": float(accuracies.mean()), "accuracy sd": float(accuracies.std())}


def grid_tar(scores: np.ndarray, same: np.ndarray, folds: np.ndarray, weights: np.ndarray | None = None,
             target: float = 1e-3) -> dict[str, float]:
    """TAR at a threshold that has this FAR on the other folds: mean and SD over the folds, and the FAR that it has.

    Thresholds on the squared distance 2 - 2 cos in 0, 0.001, ..., 3.999, accepted below, and between two of them where
    the FAR of the other folds, taken as linear, is the target; 0 where none has so high a FAR.
    Source: insightface, `verification.py`, calculate_val (interp1d "slinear", as SciPy read repeated FARs until 1.3).
    """
    grid, w = np.arange(0, 4, 0.001), np.ones(len(scores)) if weights is None else weights.astype(float)
    distances = np.maximum(2 - 2 * scores.astype(float), 0)  # of a vector with itself it may round below 0
    names, fold = np.unique(folds, return_inverse=True)
    false = np.zeros((len(names), len(grid) + 1))
    np.add.at(false, (fold[~same], np.searchsorted(grid, distances[~same], side="right")), w[~same])
    false = np.cumsum(false, axis=1)[:, : len(grid)]
    genuine, impostors = np.bincount(fold, w * same), np.bincount(fold, w * ~same)
    rest = impostors.sum() - impostors
    far = (false.sum(0) - false) / np.maximum(rest, 1e-300)[:, None]
    # of thresholds with one FAR, np.interp takes the last below the target and the first above it
    thresholds = np.array([np.interp(target, row, grid) if row[-1] >= target else 0.0 for row in far])
    accepted = w * (distances < thresholds[fold])
    tars = (np.bincount(fold, accepted * same) / np.maximum(genuine, 1e-300))[(genuine > 0) & (rest > 0)]
    fars = (np.bincount(fold, accepted * ~same) / np.maximum(impostors, 1e-300))[(impostors > 0) & (rest > 0)]
    if not len(tars) or not len(fars):
        return dict.fromkeys((f"tar@far={target:g}", f"tar@far={target:g} sd", f"far found for {target:g}"), math.nan)
    return {f"tar@far={target:g}": float(tars.mean()), f"tar@far={target:g} sd": float(tars.std()),
            f"far found for {target:g}": float(fars.mean())}


def score_verification(x: np.ndarray, split: Split, draws: int, seed: int) -> tuple[dict, dict]:
    """10-fold accuracy, AUC, EER, TAR@FAR (where there are 1 / FAR impostors) and d' of a split's pairs.

    insightface's TAR@FAR=0.001 is of a threshold from the other folds: it is left out where those of a fold hold less
    than 1,000 impostors.

    Returns:
        {rule: {metric: Figure}}, the exact thresholds first, and to draw: the ROC, and how many scores of either kind
        fall into each of SCORE_BINS.
    """
    pairs, folded = np.array(split.column("pairs")), f"{split.protocol['folds']} folds"
    if len(np.unique(pairs[:, 3])) == 1:  # dealt before any pair is left out: the same folds for every run
        pairs[:, 3], folded = np.arange(len(pairs)) % 10, "10 folds, dealt"
    pairs = pairs[np.isfinite(x[pairs[:, 0], 0]) & np.isfinite(x[pairs[:, 1], 0])]
    left, right, same, folds = pairs[:, 0], pairs[:, 1], pairs[:, 2] == 1, pairs[:, 3]
    if same.all() or not same.any():
        raise InputError(f"{split.folder}: its pairs are all genuine or all impostors: nothing to verify")
    scores = (x[left] * x[right]).sum(1)
    a, b = split.labels[left], split.labels[right]

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        far, tar = roc(scores, same, weights)
        values = {"accuracy": fold_accuracy(scores, same, folds, weights), "auc": float(np.trapezoid(tar, far)),
                  "eer": equal_error_rate(far, tar), "d-prime": d_prime(scores, same, weights)}
        supported = [target for target in FARS if target * (~same).sum() >= 1]
        return values | {f"tar@far={target:g}": tar_at_far(far, tar, target) for target in supported}

    def pair_weights() -> Iterator[np.ndarray]:
        for counts in bootstrap_counts(split.labels, draws, seed):
            yield np.where(a == b, counts[left], counts[left] * counts[right])

    far, tar = roc(scores, same)
    spread = {kind: np.histogram(scores[mask], SCORE_BINS)[0] for kind, mask in (("same", same), ("different", ~same))}
    found = {f"{folded}, exact thresholds, strict FAR": intervals(statistic, pair_weights(), len(pairs)),
             f"{folded}, thresholds 0 to 4 by 0.01 on the squared distance": intervals(
                 lambda w: grid_accuracy(scores, same, folds, w), pair_weights(), len(pairs))}
    if (~same).sum() - np.unique(folds[~same], return_counts=True)[1].max() >= 1000:
        found[f"{folded}, thresholds 0 to 4 by 0.001 on the squared distance, interpolated to the FAR of the other "
              "folds"] = intervals(lambda w: grid_tar(scores, same, folds, w), pair_weights(), len(pairs))
    return found, {"far": far, "tar": tar, **spread}


# ---------------------------------------------------------------- templates


@dataclass
class Templates:
    """What the images of a template set amount to: one vector a template, and whose it is."""

    ids: np.ndarray  # int64 [T], ascending: every template that has an image or is listed
    vectors: np.ndarray  # unit float32 [T, D]; zeros where not enrolled
    identity: np.ndarray  # int64 [T]; below 0, and its own, where neither images nor a genuine pair tell the person
    enrolled: np.ndarray  # bool [T]: has a readable image

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Where templates stand in these arrays."""
        if len(self.ids) and self.ids[0] >= 0 and self.ids[-1] < 1 << 24:  # numbers like IJB's: ten times as fast
            place = np.zeros(self.ids[-1] + 1, dtype=np.int32)
            place[self.ids] = np.arange(len(self.ids))
            return place[ids]
        return np.searchsorted(self.ids, ids).astype(np.int32)


def pool_templates(x: np.ndarray, split: Split, quality: np.ndarray) -> Templates:
    """Templates: the mean over the images of each medium (a video counts once), summed over media, normalised.

    Source: insightface, `ijb_evals.py`.

    Args:
        x: embeddings float32 [M, D], not normalised; NaN where unreadable.
        split: a split with the protocol "templates".
        quality: [M], multiplied to the embeddings.
    """
    template, media = np.array(split.optional("template")), split.optional("media")
    tables = {"template_pairs": 2, "template_gallery": 1, "template_probes": 1}  # columns that name templates
    listed = [split.column(name)[:, :n].ravel() for name, n in tables.items() if name in split.index["columns"]]
    ids = np.unique(np.concatenate([template[template >= 0], *listed]))
    listed = np.flatnonzero(template >= 0)
    named = np.searchsorted(ids, template[listed])
    good = np.isfinite(x[listed, 0])
    rows, place = listed[good], named[good]
    _, medium, size = np.unique(place * (int(media.max()) + 2) + media[rows] + 1, return_inverse=True,
                                return_counts=True)
    weight = (quality[rows] / size[medium]).astype(np.float32)
    vectors = normalise(scipy.sparse.csr_array((weight, (place, rows)), shape=(len(ids), len(x))) @ x)
    enrolled, identity = np.zeros(len(ids), dtype=bool), -2 - np.arange(len(ids))
    enrolled[place], identity[named] = True, split.labels[listed]  # unreadable images tell whose it is, too
    found, told = Templates(ids, vectors, identity, enrolled), np.isin(np.arange(len(ids)), named)
    if "template_pairs" in split.index["columns"] and not told.all():
        pairs = split.column("template_pairs")
        left, right = (found.places(column) for column in pairs[pairs[:, 2] == 1, :2].T)
        for a, b in ((left, right), (right, left)):
            known = ~told[a] & told[b]
            identity[a[known]] = identity[b[known]]
    return found


def score_listed(x: np.ndarray, left: np.ndarray, right: np.ndarray, block: int = 256,
                 device: torch.device | str = "cpu") -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places in the list and inner products float32 of listed pairs of rows of x, some at a time, each pair once.

    By blocks of left rows times all rows: lists of templates name the same ones thousands of times, and to gather both
    sides pair by pair moves far more memory.
    """
    order = np.argsort(left, kind="stable")
    lefts, size = np.unique(left, return_counts=True)
    first = np.concatenate([[0], np.cumsum(size)])
    x = torch.from_numpy(x).to(device)
    for start in range(0, len(lefts), block):
        some = lefts[start : start + block]
        pairs = order[first[start] : first[start + len(some)]]
        rows = np.repeat(np.arange(len(some)), size[start : start + len(some)])
        scores = x[torch.from_numpy(some).to(device)] @ x.T
        places = torch.from_numpy(rows * len(x) + right[pairs]).to(device)
        yield pairs, scores.flatten()[places].cpu().numpy()


@dataclass
class Scores:
    """What a long list of pairs scored, in bounded memory: each score in a bin, and the highest in full."""

    bins: np.ndarray  # int64 [2, BINS + 1]: impostors and genuine pairs by cosine; first those never accepted
    pairs: np.ndarray  # [n] places in the list of those kept, the highest score first
    scores: np.ndarray  # float32 [n] theirs
    whole: bool  # all are kept


def collect_scores(listed: Iterator[tuple[np.ndarray, np.ndarray]], same: np.ndarray, need: int) -> Scores:
    """Bin the scores of `score_listed`; keep every pair that scores as high as the `need`-th highest impostor.

    Args:
        listed: places in the list, and cosines; below -1: a pair that is never accepted.
        same: bool [P], genuine pairs.
    """
    bins, least, kept, held, limit = np.zeros((2, BINS + 1), dtype=np.int64), 0, [], 0, 2 * need
    for pairs, scores in listed:
        at = np.where(scores < -1.5, 0, np.clip((scores + 1) * (BINS / 2), 0, BINS - 1).astype(np.int64) + 1)
        bins += np.bincount(same[pairs] * (BINS + 1) + at, minlength=2 * (BINS + 1)).reshape(2, -1)
        # the bin of the need-th highest impostor so far can only rise: what is below it will not be needed
        above = np.cumsum(bins[0, ::-1])
        least = BINS - int(np.searchsorted(above, need)) if above[-1] >= need else 0
        high = at >= least
        kept.append((pairs[high], scores[high], at[high]))
        held += int(high.sum())
        if held > limit:
            kept = [tuple(column[part[2] >= least] for column in part) for part in kept]
            held = sum(len(part[0]) for part in kept)
            limit = 2 * max(need, held)
    pairs, scores, at = (np.concatenate(column) for column in zip(*kept, strict=True))
    pairs, scores = pairs[at >= least], scores[at >= least]
    order = np.argsort(-scores, kind="stable")
    return Scores(bins, pairs[order], scores[order], least == 0)


@dataclass
class Tail:
    """The ROC of millions of pairs where the FAR is small: exact, and quick to reweight."""

    pairs: np.ndarray  # [n] the highest scores, descending
    start: np.ndarray  # [points] first of the `pairs` between this point and the one before
    corner: np.ndarray  # bool [points]: also a point of scikit-learn's roc_curve, which drops some


def find_tail(found: Scores, same: np.ndarray, target: float) -> Tail | None:
    """The part of the ROC that decides TAR at every FAR up to `target`; None where too few scores were kept.

    Points without a genuine pair of their own are kept only where scikit-learn keeps them: where the steps to the
    neighbouring thresholds differ. The rule of the nearest FAR depends on that, to the last digit.
    """
    last = np.flatnonzero(np.append(np.diff(found.scores) != 0, True))  # ties are accepted together
    matched = same[found.pairs]
    genuine, false = np.cumsum(matched)[last], np.cumsum(~matched)[last]
    corner = np.ones(len(last), dtype=bool)
    corner[1:-1] = (np.diff(genuine, 2) != 0) | (np.diff(false, 2) != 0)
    corner[-1] = found.whole  # else its neighbour below is not known
    if not found.whole and not (corner & (false >= target * found.bins[0].sum())).any():
        return None
    kept = corner | (np.diff(genuine, prepend=0) > 0)
    ends = last[kept]
    return Tail(found.pairs[: ends[-1] + 1], np.append(0, ends[:-1] + 1), corner[kept])


def tar_at_nearest_far(far: np.ndarray, tar: np.ndarray, target: float) -> float:
    """The TAR at the FAR nearest to the target, of several the last (insightface's rule; may exceed the target)."""
    if math.isnan(far[-1] + tar[-1]):
        return math.nan
    gap = np.abs(far - target)
    return float(tar[np.flatnonzero(gap == gap.min())[-1]])


def score_template_pairs(templates: Templates, pairs: np.ndarray, draws: int, seed: int,
                         device: torch.device | str = "cpu") -> tuple[dict[str, dict[str, Figure]], dict]:
    """TAR@FAR of listed pairs of templates, by rule for the FAR ("nearest", "strict"), and curves to draw.

    Only FARs of which the list has an impostor to spare. A pair with a template that is not enrolled is never accepted.
    """
    left, right = templates.places(pairs[:, 0]), templates.places(pairs[:, 1])
    same = np.array(pairs[:, 2] == 1)
    _, identity = np.unique(templates.identity, return_inverse=True)
    identity = identity.astype(np.int32)
    people, others = int(identity.max()) + 1, int((~same).sum())
    targets = [far for far in FARS if far * others >= 1]
    if not targets or others == len(pairs):
        return {}, {}
    genuine_of = np.bincount(identity[left[same]], minlength=people)
    impostors_of = scipy.sparse.csr_array((people, people), dtype=np.int32)
    for start in range(0, len(pairs), 1 << 22):  # how often two people are compared, added up bit by bit
        part = slice(start, start + (1 << 22))
        a, b = (identity[side[part][~same[part]]] for side in (left, right))
        impostors_of += scipy.sparse.csr_array((np.ones(len(a), dtype=np.int32), (a, b)), shape=(people, people))

    def listed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for places, scores in score_listed(templates.vectors, left, right, device=device):
            scores[~(templates.enrolled[left[places]] & templates.enrolled[right[places]])] = -2  # below every cosine
            yield places, scores

    def resample(tail: Tail) -> tuple[dict[tuple[str, float], Figure], tuple[np.ndarray, np.ndarray], float]:
        """Figures by rule and FAR, the ROC, and the least FAR at which a resampling's tail ends."""
        a, b, matched = identity[left[tail.pairs]], identity[right[tail.pairs]], same[tail.pairs]
        corner, ends = np.append(True, tail.corner), []

        def roc_of(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """FAR and TAR at the tail's points when each person is there so many times; NaN without pairs of a kind."""
            once = counts[a]
            genuine = np.add.reduceat(np.where(matched, once, 0), tail.start)
            false = np.add.reduceat(np.where(matched, 0, once * counts[b]), tail.start)
            total, impostors = counts @ genuine_of, counts @ (impostors_of @ counts)
            return (np.append(0, np.cumsum(false)) / (impostors or math.nan),
                    np.append(0, np.cumsum(genuine)) / (total or math.nan))

        def statistic(counts: np.ndarray | None) -> dict[str, float]:
            far, tar = roc_of(np.ones(people, dtype=np.int64) if counts is None else counts)
            ends.append(far[corner][-1])
            nearest = {("nearest", f): tar_at_nearest_far(far[corner], tar[corner], f) for f in targets}
            return nearest | {("strict", f): tar_at_far(far, tar, f) for f in targets}

        found = intervals(statistic, bootstrap_counts(np.arange(people), draws, seed), len(pairs))
        return found, roc_of(np.ones(people, dtype=np.int64)), np.nanmin(ends)

    # all of them where many scores are equal, or where a resampling lacks the people of the highest impostors
    for need in (int(1.5 * max(targets) * others) + 2, others + 1):
        scores = collect_scores(listed(), same, need)
        if tail := find_tail(scores, same, max(targets)):
            found, curve, end = resample(tail)
            if scores.whole or end > max(targets):
                break
    figures = {rule: {f"tar@far={far:g}": found[rule, far] for far in targets} for rule in ("nearest", "strict")}
    return figures, draw_from_bins(scores.bins, *curve)


def draw_from_bins(bins: np.ndarray, far: np.ndarray, tar: np.ndarray, points: int = 2000) -> dict:
    """What is drawn of a long list of pairs: its ROC, exact as far as the tail goes, then from the bins; its scores."""
    impostor, genuine = (np.cumsum(kind[::-1]) / max(kind.sum(), 1) for kind in bins)
    below = impostor > far[-1]
    far, tar = np.append(far, impostor[below]), np.append(tar, genuine[below])
    grid = np.geomspace(max(far[far > 0].min(), 1e-7), 1, points)
    some = np.unique(np.concatenate([[0, len(far) - 1], np.searchsorted(far, grid, side="right") - 1]))
    wide = bins[:, 1:].reshape(2, len(SCORE_BINS) - 1, -1).sum(2)
    return {"far": far[some], "tar": tar[some], "same": wide[1], "different": wide[0]}


def score_template_search(templates: Templates, galleries: list[np.ndarray], probes: np.ndarray, draws: int,
                          seed: int, device: torch.device | str = "cpu") -> dict[str, Figure]:
    """Rank-k and TPIR@FPIR of probe templates in each gallery for itself.

    Hits at a rank are added over the galleries and divided by all probes (each has its mate in one of them); TPIR is
    the mean over galleries. Mated is a probe whose person a gallery lists, enrolled or not: where either of the two is
    not enrolled, it counts as a miss. So does, in every gallery, a probe that is not enrolled and of unknown person.
    Source: insightface, `ijb_evals.py`, evaluation_1N.
    """
    probes, searches = templates.places(probes), []
    lost, people = ~templates.enrolled[probes], templates.identity[probes]
    mated = [np.isin(people, templates.identity[templates.places(gallery)]) & (people >= 0) for gallery in galleries]
    for gallery, listed in zip(galleries, mated, strict=True):
        rows = templates.places(gallery)
        rows = rows[templates.enrolled[rows]]
        same = mates_in(templates.identity[rows])
        search = search_gallery(templates.vectors, probes, rows, lambda p, same=same: (same(templates.identity[p]), []),
                                device=device)
        search.own[lost], search.first[lost], search.wrong[lost] = -np.inf, np.inf, -2
        searches.append((search, listed | (lost & (people < 0))))
    supported = [f for f in FPIRS if all((~mated).sum() * f >= 1 and mated.any() for _, mated in searches)]

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        values = {f"rank-{k}": weighted_mean(sum((search.first <= k).astype(float) for search, _ in searches), weights)
                  for k in (1, 5, 10)}
        for f in supported:
            values[f"tpir@fpir={f:g}"] = float(np.mean([tpir_at_fpir(*found, f, weights) for found in searches]))
        return values

    return intervals(statistic, bootstrap_counts(templates.identity[probes], draws, seed), len(probes))


def highest_wrong(x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, mates: Callable, most: int,
                  device: torch.device | str = "cpu") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `most` highest scores of probes with what is not theirs, and each probe's own highest.

    Both are of the same products: a mate and another one that are the same image must not differ by a rounding.

    Args:
        x, probes, gallery, mates, device: as of `search_gallery`.

    Returns:
        Scores, descending, and the number of the probe of each; the score of each probe's nearest mate, or -inf.
    """
    kept, whose, own = np.zeros(0, dtype=x.dtype), np.zeros(0, dtype=np.int64), np.full(len(probes), -np.inf)
    for start, scores in score_blocks(x, probes, gallery, 1 << 22, device):
        for i, s in enumerate(scores, start):
            right, ignored = mates(probes[i])
            own[i] = s[right].max(initial=-np.inf)
            s[right], s[ignored] = -np.inf, -np.inf
        flat = scores.ravel()
        # what is below the least of those kept so far cannot be among the highest
        high = np.flatnonzero(flat > (kept[-1] if len(kept) == most else -np.inf))
        if len(high) > most:
            high = high[np.argpartition(-flat[high], most - 1)[:most]]
        kept, whose = np.append(kept, flat[high]), np.append(whose, start + high // len(gallery))
        order = np.argsort(-kept, kind="stable")[:most]
        kept, whose = kept[order], whose[order]
    return kept, whose, own


def score_legacy_search(templates: Templates, galleries: list[np.ndarray], probes: np.ndarray, draws: int, seed: int,
                        device: torch.device | str = "cpu") -> dict[str, Figure]:
    """Rank-k and TPIR@FPIR of probe templates in all galleries merged, as published before `score_template_search`.

    The threshold is the ceil(probes x FPIR)-th highest of all scores with gallery templates of other people; TPIR is
    the share of all probes whose mate scores above it, first or not. Probes that are not enrolled are misses.
    Source: insightface, `ijb_1n.py`, evaluation.
    """
    probes, rows = templates.places(probes), templates.places(np.unique(np.concatenate(galleries)))
    rows, lost = rows[templates.enrolled[rows]], ~templates.enrolled[probes]
    same = mates_in(templates.identity[rows])

    def mates(probe: int) -> tuple[np.ndarray, np.ndarray]:
        return same(templates.identity[probe]), np.zeros(0, dtype=np.int64)

    search, there = search_gallery(templates.vectors, probes, rows, mates, device=device), np.flatnonzero(~lost)
    search.first[lost] = np.inf
    supported = [f for f in FPIRS if len(probes) * f >= 1]
    pairs = len(there) * len(rows) - sum(len(search.ranks[i]) for i in there)

    def figures(most: int) -> dict[str, Figure]:
        own = np.full(len(probes), -np.inf)
        scores, whose, own[there] = highest_wrong(templates.vectors, probes[there], rows, mates, most, device)
        whose = there[whose]

        def statistic(weights: np.ndarray | None) -> dict[str, float]:
            w = np.ones(len(probes)) if weights is None else weights
            values = {f"rank-{k}": weighted_mean((search.first <= k).astype(float), w) for k in (1, 5, 10)}
            above = np.cumsum(w[whose])  # as if every pair stood there w times
            for f in supported:
                place = np.searchsorted(above, math.ceil(w.sum() * f))
                reached = place < len(scores) or len(scores) == pairs
                threshold = scores[place] if place < len(scores) else -np.inf
                values[f"tpir@fpir={f:g}"] = weighted_mean((own > threshold).astype(float), w) if reached \
                    else math.nan
            return values

        return intervals(statistic, bootstrap_counts(templates.identity[probes], draws, seed), len(probes))

    most = 4 * math.ceil(len(probes) * max(supported, default=0)) + 1
    while True:
        found = figures(max(min(most, pairs), 1))
        # a resampling may lack the people of the highest scores, and reach below what was kept
        if most >= pairs or not any(np.isnan(figure.draws).any() for figure in found.values()):
            return found
        most *= 4


def score_templates(x: np.ndarray, split: Split, draws: int, seed: int,
                    device: torch.device | str = "cpu") -> tuple[dict, dict]:
    """1:1 and 1:N figures of a template set, by rule, with and without the detector's score as a weight.

    Args:
        x: embeddings [M, D], not normalised.

    Returns:
        {rule: {metric: Figure}}, the customary one first, and to draw, of that one: as `score_verification`.
    """
    columns, found, curve = split.index["columns"], {}, {}
    poolings = {"norm": np.ones(len(split), dtype=np.float32)}
    if "quality" in columns:
        poolings = {"norm x detector score": np.maximum(split.column("quality"), 0)} | poolings
    for pooling, quality in poolings.items():
        templates, how = pool_templates(x, split, quality), f"means of media weighted by {pooling}"
        if "template_pairs" in columns:
            by_rule, drawn = score_template_pairs(templates, split.column("template_pairs"), draws, seed, device)
            curve = curve or drawn
            found |= {f"1:1, {how}, {rule} FAR": figures for rule, figures in by_rule.items()}
        if {"template_gallery", "template_probes"} <= set(columns):
            listed, probes = split.column("template_gallery"), split.column("template_probes")[:, 0]
            galleries = [listed[listed[:, 1] == g, 0] for g in np.unique(listed[:, 1])]
            rule = f"1:N in {len(galleries)} galleries, {how}, TPIR above the floor(N x FPIR)-th non-mate"
            found[rule] = score_template_search(templates, galleries, probes, draws, seed, device)
            legacy = score_legacy_search(templates, galleries, probes, draws, seed, device)
            found[f"legacy 1:N in {len(galleries)} galleries merged, {how}, TPIR above the ceil(N x FPIR)-th non-mate "
                  "similarity"] = legacy
    if not any(found.values()):
        raise InputError(f"{split.folder}: its lists support no figure: {1 / max(FARS):g} impostor pairs and a genuine "
                         "one, or a gallery and probes, are the least")
    return found, curve


# ---------------------------------------------------------------- identification, re-identification


@dataclass
class Search:
    """What probes found in a gallery."""

    ranks: list[np.ndarray]  # of each probe's mates, ascending, 1 = nearest; ties count against them
    first: np.ndarray  # [n] rank of the nearest mate; inf without one
    own: np.ndarray  # [n] score of the nearest mate; -inf without one
    wrong: np.ndarray  # [n] score of the nearest of the others


def mates_in(labels: np.ndarray) -> Callable[[int], np.ndarray]:
    """A function that gives the places of a label among `labels`; none for the label -1."""
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    return lambda label: order[slice(*np.searchsorted(ordered, [label, label + 1]))] if label >= 0 else order[:0]


def take_rows(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """x[rows], without a copy where the rows are neighbours."""
    whole = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()
    return x[rows[0] : rows[-1] + 1] if whole else x[rows]


def search_gallery(x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, mates: Callable, size: int = 1 << 27,
                   other: np.ndarray | None = None, device: torch.device | str = "cpu") -> Search:
    """Search every probe in a gallery by blocks of the score matrix, without ever ordering the gallery's items.

    Only the ranks of mates matter: 1 + how many others score as high or higher. For a few mates they are counted; for
    more, one sort of the row's values (as dear as a dozen counts of 2,000 values, a hundred of 20,000) serves all.

    Args:
        x: unit vectors [M, D].
        probes, gallery: rows of x, [n] and [m].
        other: unit vectors that the gallery's rows are of, if not of x; float16 (a memory map, say) is widened block
            by block.
        mates: row of a probe -> places in `gallery` that are right, and places that are neither right nor wrong.
        size: scores held at once.
        device: of the products and of the counting, where it is not the CPU.
    """
    other = x if other is None else other
    if torch.device(device).type != "cpu":
        return search_on(torch.device(device), x, probes, gallery, mates, size, other)
    found = Search([np.zeros(0, dtype=np.int64)] * len(probes), *np.full((3, len(probes)), -np.inf))
    block = int(np.clip(size // max(len(gallery), 1), 1, 1024))
    few = int(np.clip(len(gallery) // 200, 12, 200))
    lanes = 2 if 2 * block * len(gallery) <= size else 1  # two: a block is multiplied while the other is counted
    buffers = np.empty((lanes, block, len(gallery)), dtype=x.dtype)  # kept: fresh pages cost as much as the product

    def rank(scores: np.ndarray, start: int, part: range) -> None:
        for i in part:
            s = scores[i - start]
            right, ignored = mates(probes[i])
            own = np.sort(s[right])[::-1]
            s[right], s[ignored] = -np.inf, -np.inf
            if len(own) < few:
                above = np.array([np.count_nonzero(s >= score) for score in own], dtype=np.int64)
                found.wrong[i] = s.max(initial=-np.inf)
            else:
                s.sort()
                above, found.wrong[i] = len(s) - np.searchsorted(s, own, side="left"), s[-1]
            found.ranks[i] = np.arange(1, len(own) + 1) + above
            found.own[i], found.first[i] = (own[0], found.ranks[i][0]) if len(own) else (-np.inf, np.inf)

    threads, busy = torch.get_num_threads(), [[] for _ in range(lanes)]
    with ThreadPoolExecutor(threads) as pool:  # numpy counts and sorts outside the interpreter's lock
        for number, start in enumerate(range(0, len(probes), block)):
            scores, rows = buffers[number % lanes], probes[start : start + block]
            for task in busy[number % lanes]:
                task.result()
            queries = x[rows]
            for left in range(0, len(gallery), 1 << 16):
                part = take_rows(other, gallery[left : left + (1 << 16)]).astype(x.dtype, copy=False)
                np.matmul(queries, part.T, out=scores[: len(rows), left : left + len(part)])
                del part  # else a copy of rows that are no neighbours would stay while the next one is made
            stops = np.linspace(start, start + len(rows), threads + 1).astype(int)
            busy[number % lanes] = [pool.submit(rank, scores, start, range(*ends)) for ends in pairwise(stops)]
        for task in chain(*busy):
            task.result()
    return found


def search_on(device: torch.device, x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, mates: Callable, size: int,
              other: np.ndarray) -> Search:
    """`search_gallery` on an accelerator that holds the gallery: the same, to the rounding of a score."""
    found = Search([np.zeros(0, dtype=np.int64)] * len(probes), *np.full((3, len(probes)), -np.inf))
    block = int(np.clip(size // max(len(gallery), 1), 1, 1024))
    items = torch.empty(len(gallery), x.shape[1], dtype=torch.from_numpy(x[:0]).dtype, device=device)
    for left in range(0, len(gallery), 1 << 16):
        part = take_rows(other, gallery[left : left + (1 << 16)]).astype(x.dtype, copy=False)
        items[left : left + len(part)] = torch.from_numpy(np.ascontiguousarray(part)).to(device)

    for start in range(0, len(probes), block):
        rows = probes[start : start + block]
        right, ignored = zip(*(mates(probe) for probe in rows), strict=True)
        scores = torch.from_numpy(x[rows]).to(device) @ items.T

        def cells(lists: tuple) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
            """Row and column of each listed place, and its number in its list."""
            sizes = [len(places) for places in lists]
            row, column = np.repeat(np.arange(len(lists)), sizes), np.concatenate(lists).astype(np.int64)
            within = np.arange(len(row)) - np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
            return torch.from_numpy(row).to(device), torch.from_numpy(column).to(device), within

        row, column, within = cells(right)
        most = max(map(len, right), default=0)
        own = torch.full((len(rows), most), -torch.inf, dtype=scores.dtype, device=device)
        own[row, torch.from_numpy(within).to(device)] = scores[row, column]
        scores[row, column] = -torch.inf
        row, column, _ = cells(ignored)
        scores[row, column] = -torch.inf
        if len(gallery):
            found.wrong[start : start + len(rows)] = scores.amax(1).cpu().numpy()
        own = own.sort(1, descending=True).values
        if most < 12:
            above = [(scores >= own[:, j : j + 1]).sum(1) for j in range(most)]
            above = torch.stack(above, 1) if most else own
        else:
            above = len(gallery) - torch.searchsorted(scores.sort(1).values, own)
        own, above = own.cpu().numpy(), above.cpu().numpy()
        for i, places in enumerate(right, start):
            ranks = np.arange(1, len(places) + 1) + above[i - start, : len(places)]
            found.ranks[i] = ranks.astype(np.int64)
            found.own[i], found.first[i] = (own[i - start, 0], ranks[0]) if len(ranks) else (-np.inf, np.inf)
    return found


def score_blocks(x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, size: int = 1 << 27,
                 device: torch.device | str = "cpu") -> Iterator[tuple[int, np.ndarray]]:
    """Scores of probes with a whole gallery, [b, m], some probes at a time, and the place of the first of these.

    Args:
        x: unit vectors [M, D].
        probes, gallery: rows of x, [n] and [m].
        size: scores held at once; they are overwritten by the next.
    """
    block, here = int(np.clip(size // max(len(gallery), 1), 1, 1024)), torch.device(device).type == "cpu"
    scores = np.empty((block, len(gallery)), dtype=x.dtype)
    for start in range(0, len(probes), block):
        queries = x[probes[start : start + block]]
        for left in range(0, len(gallery), 1 << 16):
            part = take_rows(x, gallery[left : left + (1 << 16)])
            found = scores[: len(queries), left : left + len(part)]
            if here:
                np.matmul(queries, part.T, out=found)
            else:
                found[:] = (torch.from_numpy(queries).to(device) @ torch.from_numpy(part).to(device).T).cpu().numpy()
            del part
        yield start, scores[: len(queries)]


def search_shots(x: np.ndarray, probes: np.ndarray, gallery: np.ndarray, labels: np.ndarray, mates: Callable,
                 draws: int, seed: int, device: torch.device | str = "cpu") -> np.ndarray:
    """Ranks of the mate among one drawn image of each identity, [draws, n]; inf for a probe without a mate.

    Every probe draws for itself, from what its rule leaves of the gallery; what is nobody's (label -1) all stays. Ties
    count against the probe.
    Source: torchreid, `metrics/rank.py`, eval_cuhk03; its draws are NumPy's global ones, and cannot be repeated.

    Args:
        x, probes, gallery, mates, device: as of `search_gallery`.
        labels: identities of the gallery, [m].
    """
    order = np.argsort(labels, kind="stable")
    order, strangers = order[labels[order] >= 0], order[labels[order] < 0]
    people, start, size = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.full((draws, len(probes)), np.inf)
    for first, scores in score_blocks(x, probes, gallery, device=device):
        for i, s in enumerate(scores, first):
            right, _ = mates(probes[i])
            if not len(right):
                continue
            rng = np.random.default_rng((seed, probes[i]))  # of the probe alone: blocks and other probes do not matter
            own = s[rng.choice(right, draws)]
            drawn = s[order[start + rng.integers(size, size=(draws, len(size)))]]
            drawn[:, np.searchsorted(people, labels[right[0]])] = -np.inf  # the probe's own is `own`
            ranks[:, i] = 1 + (drawn >= own[:, None]).sum(1) + (s[strangers] >= own[:, None]).sum(1)
    return ranks


def tpir_at_fpir(search: Search, mated: np.ndarray, target: float, weights: np.ndarray | None = None) -> float:
    """Share of the mated probes whose mate comes first and scores above a threshold that others rarely pass.

    The threshold is the floor(N x FPIR)-th highest best score of the N probes without a mate.
    Source: insightface, `ijb_evals.py`.
    """
    w = np.ones(len(mated)) if weights is None else weights
    order = np.argsort(-search.wrong[~mated], kind="stable")
    top, cumulative = search.wrong[~mated][order], np.cumsum(w[~mated][order])
    if not cumulative[-1]:
        return math.nan  # a resampling without them
    threshold = top[np.searchsorted(cumulative, max(int(cumulative[-1] * target), 1))]
    hit = (search.own > search.wrong) & (search.own > threshold)
    return weighted_mean(hit[mated].astype(float), w[mated])


def number_mates(ranks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All probes' ranks in a row, the number 1.. of each within its probe, where a probe begins, how many it has."""
    size = np.array([len(r) for r in ranks])
    start = np.append(0, np.cumsum(size)[:-1])
    flat = np.concatenate(ranks)
    return flat, np.arange(1, len(flat) + 1) - np.repeat(start, size), start, size


def average_precision(ranks: list[np.ndarray]) -> np.ndarray:
    """(1/R) Σ i / r_i, r_i the rank of the i-th of a probe's R relevant items (rectangle rule: torchreid, fast-reid).

    Args:
        ranks: of each probe's relevant items, at least one, ascending from 1.

    Returns:
        [n], of each probe.
    """
    r, i, start, size = number_mates(ranks)
    return np.add.reduceat(i / r, start) / size


def trapezoid_precision(ranks: list[np.ndarray]) -> np.ndarray:
    """(1/R) Σ (i / r_i + (i - 1) / (r_i - 1)) / 2, the second term 1 where r_i = 1 (Market-1501's own evaluation)."""
    r, i, start, size = number_mates(ranks)
    before = np.where(r > 1, (i - 1) / np.maximum(r - 1, 1), 1.0)
    return np.add.reduceat((i / r + before) / 2, start) / size


def inverse_negative_penalty(ranks: list[np.ndarray]) -> np.ndarray:
    """R / r_R, how early the last relevant item is found (INP; its mean over probes is mINP; Ye et al. 2021)."""
    return np.array([len(r) / float(r[-1]) for r in ranks])


def gallery_rule(split: Split, gallery: np.ndarray, variant: str) -> Callable:
    """`mates` of `search_gallery` for a variant of re-identification, or identification (data_prep/bodies.py)."""
    # copies: to look a few places up in a memory map takes several times as long
    cameras, clothes = np.array(split.optional("camera")), np.array(split.optional("clothes"))
    labels = np.array(split.labels)
    same = mates_in(labels[gallery])

    def mates(probe: int) -> tuple[np.ndarray, np.ndarray]:
        places = same(labels[probe])
        if split.protocol["name"] != "reid":
            return places, places[:0]
        rows = gallery[places]
        ignored = cameras[rows] == cameras[probe]
        if variant.startswith("cross-clothes"):
            ignored |= clothes[rows] == clothes[probe]
        if variant.startswith("same-clothes"):
            ignored |= clothes[rows] != clothes[probe]
        return places[~ignored], places[ignored]

    return mates


def draw_galleries(labels: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Places of one random image of each person, `draws` times; distractors (label -1) are all kept."""
    order = np.argsort(labels, kind="stable")
    order, others = order[labels[order] >= 0], order[labels[order] < 0]
    _, start, size = np.unique(labels[order], return_index=True, return_counts=True)
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.sort(np.append(others, order[start + rng.integers(size)]))


SHOTS = {"single-shot": "in {} drawn galleries, seed {}",
         "single-gallery-shot": "in {} draws a probe (mAP: all its images), seed {}"}
WAYS = [" ".join(way).strip() for way in product(("general", "cross-clothes", "same-clothes"), ("", *SHOTS))]


def variants_of(split: Split) -> list[str]:
    """The ways in which a split's gallery is scored, the customary one first."""
    if split.protocol["name"] != "reid":
        return ["whole gallery"]
    variants = split.protocol.get("variants", ["general"])
    if unknown := [variant for variant in variants if variant not in WAYS]:
        raise InputError(f"{split.folder}: this version does not score by the rule {unknown[0][:80]!r}; it knows "
                         f"{', '.join(WAYS)}")
    return variants


def describe_variant(split: Split, variant: str, seed: int) -> str:
    """A way of scoring a gallery, with what it draws."""
    return " ".join([variant, *(SHOTS[shot].format(split.protocol.get("draws", 10), seed) for shot in SHOTS
                                if variant.endswith(f" {shot}"))])


def score_gallery(x: np.ndarray, split: Split, draws: int, seed: int, variant: str | None = None,
                  device: torch.device | str = "cpu") -> tuple[dict, dict]:
    """CMC (and mAP, mINP for re-identification) of a split's probes against its gallery and distractors.

    Re-identification ignores gallery items of the same identity and camera (Market-1501), or as the variant says; a
    probe without a relevant item left is not counted. In identification a probe is mated if the gallery lists its
    identity, and misses where all those images are unreadable; the others set the threshold of TPIR. Unreadable probes
    are left out. Single-shot: the gallery is one drawn image of each identity, the same for all probes;
    single-gallery-shot (CUHK03): each probe draws its own, and average precision is of the whole gallery.
    """
    variant = variant or variants_of(split)[0]
    roles, good, reid = split.optional("role"), np.isfinite(x[:, 0]), split.protocol["name"] == "reid"
    q, g = np.flatnonzero((roles == ROLES.index("probe")) & good), np.flatnonzero((roles > 0) & good)
    single, shots = variant.endswith(" single-shot"), variant.endswith(" single-gallery-shot")
    ks, repeats, galleries = (1, 5, 10) if reid else (1, 5, 20), split.protocol.get("draws", 10), [g]
    if single:
        galleries = [g[places] for places in draw_galleries(split.labels[g], repeats, seed)]
    searches = [search_gallery(x, q, rows, gallery_rule(split, rows, variant), device=device) for rows in galleries]
    counted = (np.all([np.isfinite(search.first) for search in searches], axis=0) if reid else
               np.isin(split.labels[q], split.labels[roles > 0]) & (split.labels[q] >= 0))
    if not counted.any():
        raise InputError(f"{split.folder}: no probe has a mate in the gallery: nothing to score")
    first = np.array([search.first for search in searches])
    if shots:
        first = search_shots(x, q, g, np.array(split.labels[g]), gallery_rule(split, g, variant), repeats, seed, device)
    first = first[:, counted]
    per_probe = {f"rank-{k}": (first <= k).mean(0) for k in ks}
    if reid and not single:
        ranks = [r for r in searches[0].ranks if len(r)]
        per_probe |= {name: of(ranks) for name, of in (
            ("mAP", average_precision), ("mAP trapezoid", trapezoid_precision), ("mINP", inverse_negative_penalty)
        )[: 1 if shots else 3]}

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        return {name: weighted_mean(values, weights) for name, values in per_probe.items()}

    weights = bootstrap_counts(split.labels[q][counted], draws, seed)
    cmc = np.array([(first <= k).mean() for k in range(1, 51)])
    found = intervals(statistic, weights, int(counted.sum()))
    supported = [] if reid else [f for f in FPIRS if (~counted).sum() * f >= 1]
    if supported:  # probes without a label are strangers, each for itself
        people = np.where(split.labels[q] < 0, len(split.classes) + np.arange(len(q)), split.labels[q])
        found |= intervals(lambda w: {f"tpir@fpir={f:g}": tpir_at_fpir(searches[0], counted, f, w) for f in supported},
                           bootstrap_counts(people, draws, seed), len(q))
    return found, {"cmc": cmc}


# ---------------------------------------------------------------- classification


def class_means(x: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Sums of the unit embeddings of each class, [classes, D] (their directions are the class means)."""
    sums = np.zeros((classes, x.shape[1]), dtype=np.float64)
    np.add.at(sums, labels, x)
    return sums


def nearest_mean(x: np.ndarray, means: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
    """Class with the nearest mean direction, int [n]; -1 where no class has an image.

    `own` [n]: x is among the sums of its class; leave it out.
    """
    length = np.linalg.norm(means, axis=1)
    directions, found = means / np.maximum(length, 1e-12)[:, None], np.empty(len(x), dtype=np.int64)
    for start in range(0, len(x), 1024):
        part = slice(start, start + 1024)
        scores = x[part] @ directions.T
        scores[:, length < 1e-9] = -np.inf  # a class without images must not win with its cosine of 0
        if own is not None:
            without = means[own[part]] - x[part]
            size = np.linalg.norm(without, axis=1)
            cosine = (x[part] * without).sum(1) / np.maximum(size, 1e-12)
            scores[np.arange(len(scores)), own[part]] = np.where(size < 1e-6, -np.inf, cosine)
        found[part] = np.where(np.isfinite(scores).any(1), scores.argmax(1), -1)
    return found


def nearest_rows(x: np.ndarray, y: np.ndarray, k: int = 1, itself: bool = False, device: torch.device | str = "cpu",
                 block: int = 1024, width: int = 1 << 16) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of y for each unit row of x, the nearest first: rows int64 and cosines float32, [n, k].

    A row of NaN finds nothing and is not found: -1 and -inf, as where y has fewer than k rows.

    Args:
        itself: x is y; a row does not find itself.
        block, width: rows of x and of y whose scores are held at once.
    """
    rows, cosines = np.full((len(x), k), -1), np.full((len(x), k), -np.inf, dtype=np.float32)
    good = np.flatnonzero(np.isfinite(x[:, 0]))
    for start in range(0, len(good), block):
        some = good[start : start + block]
        queries, own = torch.from_numpy(x[some]).to(device), torch.from_numpy(some).to(device)
        best = torch.full((len(some), k), -torch.inf, dtype=queries.dtype, device=device)
        place = torch.full((len(some), k), -1, device=device)
        for left in range(0, len(y), width):
            part = torch.from_numpy(y[left : left + width]).to(device)
            scores = queries @ part.T
            scores[:, ~part[:, 0].isfinite()] = -torch.inf
            if itself:
                here = torch.nonzero((own >= left) & (own < left + len(part))).flatten()
                scores[here, own[here] - left] = -torch.inf
            top, at = scores.topk(min(k, len(part)), 1)
            best, order = torch.cat([best, top], 1).topk(k, 1)
            place = torch.cat([place, left + at], 1).gather(1, order)
        place[best == -torch.inf] = -1
        rows[some], cosines[some] = place.cpu().numpy(), best.cpu().numpy()
    return rows, cosines


def nearest_neighbours(x: np.ndarray, reference: np.ndarray, labels: np.ndarray, classes: int, same: bool, k: int = 20,
                       temperature: float = 0.07, device: torch.device | str = "cpu") -> np.ndarray:
    """Class by a vote of the k nearest of `reference`, weighted exp(cos / T), int [n]; -1 where none votes.

    Source: DINO's eval_knn.

    `same`: x is the reference itself; a sample does not vote for itself.
    """
    top, cosine = nearest_rows(x, reference, min(k, max(len(reference) - same, 0)), same, device)
    weight, votes = np.exp((cosine.astype(float) - 1) / temperature), np.empty(len(x), dtype=np.int64)
    for start in range(0, len(x), 1024):  # of thousands of classes each
        some = slice(start, start + 1024)
        tally = np.zeros((len(top[some]), classes))
        np.add.at(tally, (np.arange(len(tally))[:, None], labels[top[some]]), weight[some])
        votes[some] = np.where((top[some] >= 0).any(1), tally.argmax(1), -1)
    return votes


def fit_probe(y: np.ndarray, labels: np.ndarray, classes: int, device: torch.device,
              strengths: tuple[float, ...] = (1, 1e-1, 1e-2, 1e-3, 1e-4)) -> tuple[np.ndarray, np.ndarray, float]:
    """A linear probe: multinomial logistic regression by L-BFGS, without any draw.

    The regularisation is chosen on every fifth image of each class, from the strongest on while that gets better, and
    the probe then fitted to all images. With one image a class there is nothing to choose on: it is the strongest.

    Args:
        y: embeddings float32 [n, D]; centred and scaled here to a variance of 1 on average.
        labels: [n] of 0..classes - 1.
        strengths: candidates of l in mean cross-entropy + l/2 |W|² (scikit-learn's C is 1 / (l n)).

    Returns:
        Weights [classes, D] and bias [classes] for y as it came, and the l chosen.
    """
    order = np.argsort(labels, kind="stable")
    held = np.zeros(len(y), dtype=bool)
    place = np.arange(len(y)) - np.searchsorted(labels[order], labels[order])
    held[order] = place % 5 == min(4, place.max())  # where no class has five images, the last of the largest
    mean = y.mean(0)
    scale = float(np.sqrt(max(np.einsum("nd,nd->", y, y) / len(y) - mean @ mean, 1e-12) / y.shape[1]))
    z, target = torch.from_numpy((y - mean) / scale).to(device), torch.from_numpy(labels.astype(np.int64)).to(device)

    def fit(rows: np.ndarray, strength: float, start: np.ndarray) -> np.ndarray:
        blocks = torch.from_numpy(rows).to(device).split(1 << 14)

        def loss_of(flat: np.ndarray) -> tuple[float, np.ndarray]:
            w = torch.from_numpy(flat.reshape(classes, -1)).float().to(device)
            loss, gradient = 0.0, torch.zeros_like(w)
            for block in blocks:
                x, right = z[block], target[block]
                logits = torch.addmm(w[:, -1], x, w[:, :-1].T)
                loss += float(torch.nn.functional.cross_entropy(logits, right, reduction="sum"))
                residual = logits.softmax(1)
                residual[torch.arange(len(x), device=device), right] -= 1
                gradient[:, :-1] += residual.T @ x
                gradient[:, -1] += residual.sum(0)
            gradient /= len(rows)
            gradient[:, :-1] += strength * w[:, :-1]
            loss = loss / len(rows) + strength / 2 * float((w[:, :-1] ** 2).sum())
            return loss, gradient.flatten().double().cpu().numpy()

        found = scipy.optimize.minimize(loss_of, start, jac=True, method="L-BFGS-B",
                                        options={"maxiter": 200, "gtol": 1e-6, "ftol": 1e-8})
        return found.x

    rest, test, best = np.flatnonzero(~held), torch.from_numpy(np.flatnonzero(held)).to(device), (-1.0, strengths[0])
    start = flat = np.zeros(classes * (y.shape[1] + 1))
    for strength in strengths if len(rest) else ():
        flat = fit(rest, strength, flat)
        w = torch.from_numpy(flat.reshape(classes, -1)).float().to(device)
        right = float(((z[test] @ w[:, :-1].T + w[:, -1]).argmax(1) == target[test]).float().mean())
        if right <= best[0]:
            break
        best, start = (right, strength), flat
    w = fit(np.arange(len(y)), best[1], start).reshape(classes, -1)
    weights = (w[:, :-1] / scale).astype(np.float32)
    return weights, (w[:, -1] - weights @ mean).astype(np.float32), best[1]


def read_prompts(names: str) -> dict[str, list[str]]:
    """The templates of --prompts by set: a shipped one by its number, or a file with a template a line, {} the name."""
    found = {}
    for name in filter(None, names.split(",")):
        path = Path(__file__).parent / "prompts" / f"{name}.txt" if name.isdigit() else Path(name)
        try:
            lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise InputError(f"--prompts {name}: {path} cannot be read ({error}); shipped are 1, 7 and 80") from error
        if bad := next((line for line in lines if line.count("{}") != 1), None) or (not lines and "an empty file"):
            raise InputError(f"--prompts {name}: {bad[:80]!r}: want a template a line, with {{}} for the class name")
        found[f"{path.stem} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:8]}"] = lines
    return found


@dataclass
class Readouts:
    """How classification is read out beyond means and neighbours: for all splits of a run, and both its weights."""

    prompts: dict[str, list[str]]  # templates by set; for CLIP alone
    probe: int  # images of a reference that a linear probe is fitted to, at most
    config: dict  # of the backbone
    trained: list[str]  # classes that the run has seen; of others retention is told apart

    def fit(self, embed: Embedder, y: np.ndarray, reference: Split, seed: int) -> dict[str, tuple]:
        """(Weights [C, D], bias [C], rule) by name for the classes of a reference with unit embeddings y."""
        found, good = {}, np.flatnonzero(np.isfinite(y[:, 0]) & (reference.labels >= 0))
        if self.probe and len(np.unique(reference.labels[good])) > 1:
            rows = np.sort(np.random.default_rng(seed).permutation(good)[: self.probe])
            w, b, strength = fit_probe(y[rows], reference.labels[rows], len(reference.classes), embed.device)
            b[reference.counts == 0] = -1e9  # a class without images is never the answer
            print(f"  {embed.name} {reference.domain}/{reference.name}: linear probe of {len(rows):,} images, l2 "
                  f"{strength:g}")
            some = f"{self.probe} drawn images, seed {seed}" if len(good) > self.probe else "all images"
            found["probe"] = w, b, f"L-BFGS probe, l2 chosen on a fifth, of {some}, reference {fingerprint(reference)}"
        if embed.model.library == "open_clip" and embed.model.project is None:
            for name, templates in self.prompts.items():
                key = hashlib.sha256(json.dumps([embed.weights, templates, reference.names]).encode()).hexdigest()[:16]
                path = embed.folder / f"{embed.name}-text-{key}.npy"
                if load_array(path, (len(reference.names), y.shape[1])) is None:
                    if path.exists():
                        print(f"  {path}: damaged: its embeddings are computed again")
                    words = train.text_weights(embed.model, self.config, reference.names, embed.device, templates)
                    words = words.cpu().numpy()
                    write_atomically(path, lambda temporary, words=words: save_array(temporary, words))
                w = np.load(path, allow_pickle=False)
                found[f"zero-shot {name.split()[0]}"] = w, np.zeros(len(w)), f"zero-shot by prompts {name}"
        return found


def true_in_real(split: Split) -> np.ndarray | None:
    """ReaL's labels: which classes are right for an image, bool [M, C] (a row of none: left out); None without them."""
    if not split.protocol.get("real"):
        return None
    number, found = {name: i for i, name in enumerate(split.classes)}, np.zeros((len(split), len(split.classes)), bool)
    for row in range(len(split)):
        found[row, [number[name] for name in split.fields(row).get("real", []) if name in number]] = True
    return found


def score_classification(x: np.ndarray, split: Split, reference: tuple[np.ndarray, Split], head: np.ndarray | None,
                         head_classes: list[str], draws: int, seed: int, groups: dict[str, list[str]] | None = None,
                         linear: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
                         only: list[str] | None = None, device: torch.device | str = "cpu") -> dict[str, Figure]:
    """Top-1 of the nearest class mean and of 20 neighbours; top-1 and top-5 of class weights, trained or otherwise.

    Of classes with equal scores the first is the answer, as of argmax; where no image votes, there is none: a miss.
    Beside each top-1 stands "... ReaL" where the split has ReaL's labels: right is any of them.

    Args:
        x: unit embeddings of the split.
        split: the test split.
        reference: unit embeddings and split that class means and neighbours come from.
        head: class weights [C, D] of the domain, or None.
        head_classes: their names; used where they cover the split's classes (the argmax runs over the split's own).
        groups: classes of the split that stand for several of the reference (ObjectNet), any of which is right.
        linear: more class weights and biases by name, [C, D] and [C] for the classes of the reference.
        only: the classes to score, and to choose among (default: all of the split).
    """
    y, other = reference
    number, classes = {name: i for i, name in enumerate(other.classes)}, split.classes if only is None else only
    several = [(groups or {}).get(name, [name]) for name in classes]
    if unknown := [name for group in several for name in group if name not in number]:
        raise InputError(f"{split.folder}: class {unknown[0]!r} is not in its reference {other.folder}: prepare the "
                         "split with --reference SPLIT, a split of the same classes")
    first = np.array([number[name] for name in classes])
    own, members = np.full(len(other.classes), -1), [np.array([number[name] for name in group]) for group in several]
    for i, group in enumerate(members):
        own[group] = i  # the reference's class as one of `classes`
    # the split's classes may be those of the reference, of which several are one here
    place = {name: int(i) for name, i in zip(other.classes, own, strict=True)} | {name: i for i, name in
                                                                                 enumerate(classes)}
    labels = np.append([place.get(name, -1) for name in split.classes], -1)[split.labels]
    rows, good = np.flatnonzero(np.isfinite(x[:, 0]) & (labels >= 0)), np.isfinite(y[:, 0]) & (other.labels >= 0)
    if not good.any():
        raise InputError(f"{other.folder}: no readable image with a class, and {split.folder} is scored by them: "
                         "prepare that reference again, or leave the split out with --splits")
    itself = split.folder.resolve() == other.folder.resolve()
    x, truth, real = take_rows(x, rows), labels[rows], true_in_real(split)  # without copies: a reference is large
    vote = np.flatnonzero(good & (own[other.labels] >= 0))
    y, y_labels = take_rows(y, vote), other.labels[vote]
    means = class_means(y, y_labels, len(other.classes))  # 0 without votes: a set of some classes is scored among those
    own = np.append(own, -1)  # of no answer
    answers = {"nearest-mean": own[nearest_mean(x, means, first[truth] if itself else None)],
               "knn": own[nearest_neighbours(x, y, y_labels, len(other.classes), itself, device=device)]}
    hits = {f"{name} top-1": answer == truth for name, answer in answers.items()}
    linear = dict(linear or {})
    if head is not None:
        lies = {name: i for i, name in enumerate(head_classes)}
        at = np.array([lies.get(name, -1) for name in other.classes])
        unit = head / np.maximum(np.linalg.norm(head, axis=1, keepdims=True), 1e-12)
        linear["head"] = (unit[at], np.where(at < 0, -np.inf, 0))
    flat, starts = np.concatenate(members), np.cumsum([0, *map(len, members[:-1])])
    for name, (w, b) in linear.items():
        if np.isfinite(b[flat]).all():
            before, answers[name] = np.empty((2, len(x)), dtype=np.int64)  # before: classes that rank above the truth
            for start in range(0, len(x), 1024):
                part = slice(start, start + 1024)
                scores = np.maximum.reduceat(x[part] @ w[flat].T + b[flat], starts, axis=1)  # the best of each group
                right = scores[np.arange(len(scores)), truth[part], None]
                lower = np.arange(len(classes)) < truth[part, None]
                before[part] = ((scores > right) | ((scores == right) & lower)).sum(1)
                answers[name][part] = scores.argmax(1)
            hits |= {f"{name} top-1": before < 1, f"{name} top-5": before < 5}
    chances = {metric: min((5 if metric.endswith("5") else 1) / len(classes), 1) for metric in hits}
    everywhere = np.ones(len(x), dtype=bool)
    counted = dict.fromkeys(hits, everywhere)
    if real is not None:
        column = {name: i for i, name in enumerate(split.classes)}
        real = np.stack([real[rows][:, [column[name] for name in group if name in column]].any(1)
                         for group in several], 1)
        for name, answer in answers.items():
            hits[f"{name} ReaL"] = real[np.arange(len(x)), answer] & (answer >= 0)
            counted[f"{name} ReaL"] = real.any(1)
            chances[f"{name} ReaL"] = float(real.sum(1)[real.any(1)].mean() / len(classes))

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        return {name: weighted_mean(hit[counted[name]].astype(float), None if weights is None else
                                    weights[counted[name]]) for name, hit in hits.items() if counted[name].any()}

    found = intervals(statistic, bootstrap_counts(truth, draws, seed))
    for name, figure in found.items():
        figure.count, figure.chance = int(counted[name].sum()), chances[name]
    return found


# ---------------------------------------------------------------- one yardstick for all


def score_pairs(x: np.ndarray, labels: np.ndarray, draws: int, seed: int, count: int = 5000) -> dict[str, Figure]:
    """Same/different AUC and d' on matched numbers of random pairs: one yardstick for every kind of split."""
    labels = np.where(np.isfinite(x[:, 0]), labels, -1)
    pairs = matched_pairs(labels, count, seed)
    if not len(pairs):
        return {}
    same, scores = np.arange(len(pairs)) < len(pairs) // 2, (x[pairs[:, 0]] * x[pairs[:, 1]]).sum(1)

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        far, tar = roc(scores, same, weights)
        return {"pair auc": float(np.trapezoid(tar, far)), "pair d-prime": d_prime(scores, same, weights)}

    def pair_weights() -> Iterator[np.ndarray]:
        for counts in bootstrap_counts(labels, draws, seed):
            yield np.where(same, counts[pairs[:, 0]], counts[pairs[:, 0]] * counts[pairs[:, 1]])

    return intervals(statistic, pair_weights(), len(pairs))


# ---------------------------------------------------------------- all domains at once


def choose_crowd(splits: list[Split]) -> list[Split]:
    """The first in-distribution test split of each domain; none where there are not two domains."""
    first: dict = {}
    for split in splits:
        if not split.protocol.get("ood"):
            first.setdefault(split.domain, split)
    return list(first.values()) if len(first) > 1 else []


def name_identities(split: Split, rows: np.ndarray | None = None) -> np.ndarray:
    """Who is on each image, [M]: the person that the source proves across domains, else one of this split alone; "".

    `rows`: of these images alone, as each takes a read.
    """
    rows = np.arange(len(split)) if rows is None else rows
    own = np.array([f"{split.domain}/{name}" for name in split.classes] + [""])[split.labels[rows]]
    if split.domain == "object":
        return own
    persons = [split.fields(int(row)).get("person") for row in rows]
    return np.array([name if person is None else f"person {person}" for name, person in zip(own, persons, strict=True)])


@dataclass
class Member:
    """What a domain brings to the unified gallery."""

    split: Split
    x: np.ndarray  # unit embeddings [M, D]
    who: np.ndarray  # int64 [M]: identity over all domains, -1 unknown
    probes: np.ndarray  # rows
    gallery: np.ndarray  # rows

    def mates(self, other: "Member") -> Callable:
        """`mates` of `search_gallery` for this domain's probes in another's gallery, or in its own."""
        same, gallery = mates_in(other.who[other.gallery]), other.gallery
        cameras, template = self.split.optional("camera"), self.split.optional("template")

        def mates(probe: int) -> tuple[np.ndarray, np.ndarray]:
            places = same(self.who[probe])
            if other is not self:
                return places, places[:0]
            rows = gallery[places]
            ignored = (rows == probe) | ((template[rows] == template[probe]) & (template[probe] >= 0))
            if self.split.protocol["name"] == "reid":
                ignored |= cameras[rows] == cameras[probe]
            return places[~ignored], places[ignored]

        return mates


def make_members(splits: list[Split], embeddings: list[np.ndarray], limit: int, seed: int) -> list[Member]:
    """Probes and gallery of each domain by its roles; without roles every image is both (and never its own mate)."""
    names = [name_identities(split) for split in splits]
    people = np.unique(np.concatenate(names))
    members = []
    for split, x, name in zip(splits, embeddings, names, strict=True):
        who = np.where(name == "", -1, np.searchsorted(people, name))
        good, roles = np.isfinite(x[:, 0]), split.optional("role")
        probes = np.flatnonzero(good & (roles <= ROLES.index("probe")) & (who >= 0))
        rng = np.random.default_rng((seed, DOMAINS.index(split.domain)))
        probes = np.sort(rng.permutation(probes)[:limit])
        members.append(Member(split, x, who, probes, np.flatnonzero(good & (roles != ROLES.index("probe")))))
    return members


def score_unified(members: list[Member], draws: int, seed: int,
                  device: torch.device | str = "cpu") -> dict[str, dict[str, Figure]]:
    """Probes of every domain against the galleries of all domains together; ties count against the probe.

    A hit on the same person in another domain is right. By domain, over its probes with a mate in their own gallery:
    rank-1 alone and in the crowd, and the shares whose nearest vector is of each domain; "rank-1 in D" over those with
    a mate in D, against D's gallery. Under "all": the average and the worst of the domains.
    """
    found = [[search_gallery(a.x, a.probes, b.gallery, a.mates(b), other=b.x, device=device) for b in members]
             for a in members]
    hits: dict[tuple[str, str], tuple[int, np.ndarray, np.ndarray]] = {}  # member, its probes that count, their values
    domains = [member.split.domain for member in members]
    for i, (row, domain) in enumerate(zip(found, domains, strict=True)):
        own, wrong = (np.array([getattr(search, name) for search in row]) for name in ("own", "wrong"))
        counted = np.isfinite(own[i])
        if not counted.any():
            raise InputError(f"{members[i].split.folder}: no probe has a mate in the gallery: leave it out of --splits")
        hits[domain, "rank-1 alone"] = (i, counted, own[i] > wrong[i])
        hits[domain, "rank-1 in the crowd"] = (i, counted, own.max(0) > wrong.max(0))
        nearest = np.maximum(own, wrong).argmax(0)
        for j, other in enumerate(domains):
            hits[domain, f"nearest is {other}"] = (i, counted, nearest == j)
            if j != i and np.isfinite(own[j]).any():
                hits[domain, f"rank-1 in {other}"] = (i, np.isfinite(own[j]), own[j] > wrong[j])
    ends = np.cumsum([len(member.probes) for member in members])[:-1]

    def statistic(weights: np.ndarray | None) -> dict[tuple[str, str], float]:
        parts = [None] * len(members) if weights is None else np.split(weights, ends)
        values = {key: weighted_mean(hit[counted].astype(float), None if parts[i] is None else parts[i][counted])
                  for key, (i, counted, hit) in hits.items()}
        for name in ("rank-1 alone", "rank-1 in the crowd"):
            tasks = [values[domain, name] for domain in domains]
            values["all", f"average {name}"] = float(np.mean(tasks))
            values["all", f"worst {name}"] = float(np.min(tasks))
        return values

    # one resampling of the people for all domains: who is in two of them is drawn, or not, in both
    who = np.concatenate([member.who[member.probes] for member in members])
    figures: dict = {}
    for (domain, metric), figure in intervals(statistic, bootstrap_counts(who, draws, seed)).items():
        figure.count = int(hits[domain, metric][1].sum()) if domain != "all" else len(who)
        figures.setdefault(domain, {})[metric] = figure
    return figures


# ---------------------------------------------------------------- results


@dataclass
class Row:
    """One figure. Values are fractions 0..1 but for d-prime; low and high: 95 % bootstrap over identities."""

    run: str
    weights: str  # "tuned" or "foundation"
    domain: str
    split: str
    protocol: str
    metric: str
    value: float
    low: float
    high: float
    count: int  # pairs, probes or images

    @property
    def headline(self) -> bool:
        """Whether this is the figure that stands for its protocol."""
        return HEADLINE.get(self.protocol.split(",")[0]) == self.metric

    @property
    def out_of_distribution(self) -> bool:
        return self.protocol.endswith(", out of distribution")


def chance(split: Split, metric: str) -> float:
    """The expected value of a headline metric for random embeddings."""
    if metric.endswith("auc"):
        return 0.5
    if metric.startswith("tar@far="):
        return float(metric.partition("=")[2])
    if split.protocol["name"] == "classification":
        return 1 / len(split.classes)
    roles = split.optional("role")
    probes, gallery = np.flatnonzero(roles == ROLES.index("probe")), np.flatnonzero(roles > 0)
    mates = gallery_rule(split, gallery, variants_of(split)[0])
    found = [[len(places) for places in mates(probe)] for probe in probes]
    return float(np.mean([right / (len(gallery) - ignored) for right, ignored in found if right]))


def fingerprint(split: Split) -> str:
    """What was prepared and how, in a few letters: the source and the hash of its plan."""
    provenance = split.index["provenance"]
    return f"{provenance['source']} {provenance['plan'][:8]}"


def describe_protocol(split: Split, rule: str, flip: bool) -> str:
    """The protocol string of a row: two numbers of a metric are comparable exactly when theirs are equal."""
    parts = [split.protocol["name"], rule, f"set {fingerprint(split)}", "flip" if flip else "no flip"]
    return ", ".join(parts + ["out of distribution"] * bool(split.protocol.get("ood")))


def clean_of(split: Split, splits: list[Split]) -> Split | None:
    """Whose images an out-of-distribution split of objects shifts: its reference, or what has the same reference.

    It has images of every class that the split has images of; None where no such split is scored.
    """
    of, groups = split.protocol.get("reference"), split.protocol.get("groups") or {}
    if not split.protocol.get("ood") or split.name == of:
        return None
    wanted = [{name, *groups.get(name, [])} for name, count in zip(split.classes, split.counts, strict=True) if count]

    def covers(other: Split) -> bool:
        there = {name for name, count in zip(other.classes, other.counts, strict=True) if count}
        return not any(there.isdisjoint(group) for group in wanted)

    alike = [other for other in splits if other.domain == split.domain and other.folder != split.folder
             and other.protocol["name"] == "classification" and covers(other)]
    return next((other for other in alike if other.name == of),
                next((other for other in alike if not other.protocol.get("ood")
                      and other.protocol["reference"] == of), None))


def scopes_of(split: Split, trained: list[str]) -> list[tuple[list[str] | None, str, str]]:
    """What of a classification split is scored: all of it; and the classes that a run never saw, among themselves.

    Returns:
        Classes (None: all), a prefix of the metrics and an addition to the rule of each.
    """
    groups, known = split.protocol.get("groups") or {}, set(trained)
    unseen = [name for name in split.classes if known.isdisjoint(groups.get(name, [name]))]
    if not trained or len(unseen) < 2:
        return [(None, "", "")]
    which = hashlib.sha256(json.dumps(unseen).encode()).hexdigest()[:8]
    return [(None, "", ""), (unseen, "unseen-class ", f", open set of {len(unseen)} classes not trained on {which}")]


@functools.cache
def say_once(line: str) -> None:
    """Print what is the same for every set of weights."""
    print(line)


def unsupported_fars(impostors: int) -> str:
    """What to say of the FARs that so many impostor pairs cannot tell; "" where they support all."""
    kept = [far for far in FARS if far * impostors >= 1]
    lost = [np.format_float_scientific(far, trim="-", exp_digits=1) for far in FARS if far not in kept]
    return f"{impostors:,} impostor pairs support no FAR{f' below {min(kept):g}' if kept else ''}: " \
        f"{', '.join(lost)} {'are' if len(lost) > 1 else 'is'} left out" if lost else ""


def score(embed: Embedder, splits: list[Split], root: dict, run: Run | None, draws: int, seed: int,
          readouts: Readouts, without: dict[str, np.ndarray] | None = None, among: list[Split] | None = None
          ) -> tuple[dict[str, dict[str, dict[str, Figure]]], dict]:
    """Score one backbone on test splits.

    Args:
        readouts: of classification.
        without: rows to leave out, by "domain/split"; also of the clean images that a shifted split is held against.
        among: test splits that those clean images may be of (default: those that are scored).

    Returns:
        By "domain/split": figures {rule: {metric: Figure}}, the customary rule first, and curves to draw.
    """
    figures, curves, fitted = {}, {}, {}
    for split in splits:
        x, protocol, curve, found = embed.raw(split), split.protocol["name"], {}, {}
        key, bad = f"{split.domain}/{split.name}", int((~np.isfinite(x[:, 0])).sum())
        left_out = (without or {}).get(key, [])
        x[left_out] = np.nan
        if not np.isfinite(x[:, 0]).any():
            raise InputError(f"{split.folder}: no image left to score: all are unreadable or leaked; leave the split "
                             "out with --splits")
        if protocol == "templates":
            found, curve = score_templates(x, split, draws, seed, embed.device)
        normalise(x)
        if protocol == "verification":
            found, curve = score_verification(x, split, draws, seed)
        elif protocol in ("reid", "identification"):
            for variant in variants_of(split):
                found[describe_variant(split, variant, seed)], drawn = score_gallery(x, split, draws, seed, variant,
                                                                                     embed.device)
                curve = curve or drawn
        elif protocol == "classification":
            reference = root[split.domain].get(split.protocol["reference"])
            if reference is None:
                raise InputError(f"{split.folder}: its reference split {split.protocol['reference']!r} is missing: "
                                 "prepare that, or this one with another --reference")
            head, classes = None, []
            if run is not None and split.domain in run.classes:
                start, end = run.class_ranges[split.domain]
                head, classes = run.head[start:end].numpy(), run.classes[split.domain]
            y = embed(reference)
            if reference.name not in fitted:
                fitted[reference.name] = readouts.fit(embed, y, reference, seed)
            if reference.folder == split.folder:  # row for row the same; another split's rows stay references
                y[left_out] = np.nan
            linear = {name: parts for name, parts in fitted[reference.name].items()
                      if name != "probe" or reference.folder != split.folder}  # a probe knows what it was fitted to
            for only, prefix, which in scopes_of(split, readouts.trained):
                by_metric = score_classification(
                    x, split, (y, reference), head, classes, draws, seed, split.protocol.get("groups"),
                    {name: (w, b) for name, (w, b, _) in linear.items()}, only, embed.device)
                rules = {metric: linear.get(metric.rpartition(" ")[0], [f"20 neighbours at T 0.07, reference "
                                                                        f"{fingerprint(reference)}"])[-1]
                         for metric in by_metric}
                for metric, figure in by_metric.items():
                    found.setdefault(rules[metric] + which, {})[prefix + metric] = figure
                if only is None and (clean := clean_of(split, among or splits)):
                    z = embed(clean)
                    z[(without or {}).get(f"{clean.domain}/{clean.name}", [])] = np.nan
                    if not np.isfinite(z[:, 0]).any():
                        continue
                    itself = reference.folder == clean.folder  # what is left out votes for none of the others
                    before = score_classification(
                        z, clean, (z if itself else y, reference), head, classes, draws, seed,
                        split.protocol.get("groups"), {name: (w, b) for name, (w, b, _) in linear.items()
                                                       if name != "probe" or not itself}, split.classes, embed.device)
                    same = f"clean is {clean.name} {fingerprint(clean)} by the same classes"
                    for metric in [metric for metric in by_metric if metric in before]:
                        found.setdefault(f"{same}, {rules[metric]}", {}).update({
                            f"gap of {metric}": gap(before[metric], by_metric[metric], seed),
                            f"clean {metric}": replace(before[metric], chance=math.nan)})  # no retention of it here
                if only is not None:
                    labels = np.where(np.isin(split.labels, [split.classes.index(name) for name in only]),
                                      split.labels, -1)
                    pairs = score_pairs(x, labels, draws, seed)
                    found[f"random pairs, seed {seed}{which}"] = {prefix + m: f for m, f in pairs.items()}
        elif not found:
            raise InputError(f"{split.folder}: protocol {protocol!r} is not known to this version")
        figures[key] = found | {f"random pairs, seed {seed}": score_pairs(x, split.labels, draws, seed)}
        curves[key] = curve
        table = {"verification": "pairs", "templates": "template_pairs"}.get(protocol)
        if table and table in split.index["columns"]:
            pairs = split.column(table)
            impostor = pairs[:, 2] == 0
            if protocol == "verification":  # of templates, those that are not enrolled count too
                impostor &= np.isfinite(x[pairs[:, :2], 0]).all(1)
            if line := unsupported_fars(int(impostor.sum())):
                say_once(f"  {key}: {line}")
        if bad:
            print(f"  {key}: {bad} unreadable images left out")
    return figures, curves


Results = list[tuple["Row", np.ndarray]]  # rows with the resampled values behind them


def make_rows(run: str, splits: list[Split], figures: dict[str, dict], flip: bool) -> Results:
    """All rows, split by split: the figures of each set of weights, then what classification retains."""
    rows: Results = []
    for split in splits:
        key = f"{split.domain}/{split.name}"
        by_weights = {weights: {rule: dict(by_metric) for rule, by_metric in found[key].items()}
                      for weights, found in figures.items()}
        if split.protocol["name"] == "classification" and len(by_weights) == 2:
            for rule, before in by_weights["foundation"].items():  # what both have: never the trained class weights
                after = by_weights["tuned"].get(rule, {})
                for metric in [m for m in before if m in after and math.isfinite(before[m].chance)]:
                    if kept := retention(before[metric], after[metric], before[metric].chance):
                        after[f"retention of {metric}"] = kept
        for weights, by_rule in by_weights.items():
            for rule, found in by_rule.items():
                protocol = describe_protocol(split, rule, flip)
                rows += rows_of(run, weights, split.domain, split.name, protocol, found)
    return rows


def rows_of(run: str, weights: str, domain: str, split: str, protocol: str, found: dict[str, Figure]) -> Results:
    """The rows of some figures; one that could not be computed is absent."""
    return [(Row(run, weights, domain, split, protocol, metric, f.value, f.low, f.high, f.count), f.draws)
            for metric, f in found.items() if math.isfinite(f.value)]


def make_unified_rows(run: str, splits: list[Split], figures: dict[str, dict], flip: bool, limit: int,
                      seed: int) -> Results:
    """The rows of the unified gallery, split "everything": of each domain, and of "all"."""
    sets = " + ".join(f"{split.domain} {fingerprint(split)}" for split in splits)
    protocol = f"unified, at most {limit} probes a domain, seed {seed}, sets {sets}, {'flip' if flip else 'no flip'}"
    return [row for weights, by_domain in figures.items() for domain, found in by_domain.items()
            for row in rows_of(run, weights, domain, "everything", protocol, found)]


def headlines(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """{(domain, split): {weights: its headline row}} in the order of the rows."""
    found: dict = {}
    for row in rows:
        if row.headline:
            found.setdefault((row.domain, row.split), {}).setdefault(row.weights, row)  # the customary rule is first
    return found


def show_value(row: Row) -> str:
    """A figure with its interval: percent, or as it is for d-prime."""
    factor = 1 if "d-prime" in row.metric else 100
    return f"{factor * row.value:.1f} [{factor * row.low:.1f}, {factor * row.high:.1f}]"


def make_report(rows: list[Row], splits: list[Split], flip: bool, middle: list[str]) -> list[str]:
    """The lines of report.md: the headline of every split before and after, what stands between, then every figure."""
    by_name = {(split.domain, split.name): split for split in splits}
    lines = [f"# {report.literal(rows[0].run)}", "",
             "Percent (d-prime: as it is) with 95 % bootstrap intervals, resampled by identity. Cosine similarity; "
             f"embeddings of the image{' plus its mirror image' if flip else ''}. Foundation: the untouched backbone.",
             "",
             "| split | metric | chance | foundation | tuned | change |", "| --- | --- | --- | --- | --- | --- |"]
    for key, pair in headlines(rows).items():
        split, row = by_name[key], next(iter(pair.values()))
        both = [show_value(pair[w]) if w in pair else "" for w in ("foundation", "tuned")]
        change = f"{100 * (pair['tuned'].value - pair['foundation'].value):+.1f}" if len(pair) == 2 else ""
        label = report.literal("/".join(key)) + (" (out of distribution)" if row.out_of_distribution else "")
        level = f"{100 * chance(split, row.metric):.1f}"
        lines.append(f"| {label} | {row.metric} | {level} | {both[0]} | {both[1]} | {change} |")
    lines += [*middle, "", "## All figures", "",
              "Two figures of a metric are comparable where their protocols are equal.", "",
              "| split | metric | foundation | tuned | count | protocol |", "| --- | --- | --- | --- | --- | --- |"]
    table: dict = {}
    for row in rows:
        table.setdefault((row.domain, row.split, row.protocol, row.metric), {})[row.weights] = row
    for (domain, name, protocol, metric), pair in table.items():
        both = [show_value(pair[w]) if w in pair else "" for w in ("foundation", "tuned")]
        count = next(iter(pair.values())).count
        # names of raters, sources and files of prompts may hold what ends a cell, or is markup
        name, metric, protocol = map(report.literal, (f"{domain}/{name}", metric, protocol))
        lines.append(f"| {name} | {metric} | {both[0]} | {both[1]} | {count:,} | {protocol} |")
    return lines


# ---------------------------------------------------------------- people on the same trials


def score_humans(ratings: list[Rating], splits: dict[str, Split], embeddings: dict[str, np.ndarray], draws: int,
                 seed: int) -> dict[str, dict[str, Figure]]:
    """AUC of each rater and of the model on exactly the trials of that rater; ties count half.

    The figures of a split are of the raters who saw pairs of both kinds there; those of a domain with several splits of
    the raters who did so in them all, each with the mean over splits; those of "everything" of the raters who did so in
    every domain, each with the mean over domains of the mean over splits.

    Returns:
        {place: {metric: Figure}}; a place is "domain/split", a domain with several splits, or "everything".

    Args:
        ratings: as `read_ratings` gives them; trials with an unreadable image are left out, for both sides.
        splits, embeddings: by "domain/split"; unit embeddings, NaN where unreadable.
    """
    ratings = sorted(ratings, key=lambda r: (r.split, r.rater, min(r.left, r.right), max(r.left, r.right)))
    names = {name: name_identities(splits[name]) for name in splits if any(r.split == name for r in ratings)}
    scores = np.array([embeddings[r.split][r.left] @ embeddings[r.split][r.right] for r in ratings], dtype=float)
    if lost := int((~np.isfinite(scores)).sum()):
        print(f"  human trials: {lost} ratings of unreadable images left out")
        ratings = [r for r, score in zip(ratings, scores, strict=True) if np.isfinite(score)]
        scores = scores[np.isfinite(scores)]
    same, answers = np.array([r.same for r in ratings]), np.array([r.value for r in ratings])
    # a person in two domains is drawn, or not, in both
    ends = np.array([[names[r.split][r.left], names[r.split][r.right]] for r in ratings]).reshape(-1, 2)
    people, ends = np.unique(ends, return_inverse=True)
    a, b = ends.reshape(-1, 2).T
    rows: dict[tuple[str, str], list[int]] = {}
    for i, r in enumerate(ratings):
        rows.setdefault((r.split, r.rater), []).append(i)
    used = {key: np.array(i) for key, i in rows.items() if 0 < same[i].sum() < len(i)}
    if unused := sorted(rows.keys() - used.keys()):
        print(f"  human trials: {unused[0][1]} rated pairs of one kind alone in {unused[0][0]}"
              + f", as {len(unused) - 1} others did" * (len(unused) > 1) + ": left out there")
    if not used:
        raise InputError("--humans: no rater has rated both a pair of one identity and one of two in a split: nothing "
                         "to score")
    seen = {key: tuple((ratings[i].left, ratings[i].right) for i in some) for key, some in used.items()}
    domains: dict[str, list[str]] = {}
    for name in names:
        if any(split == name for split, _ in used):
            domains.setdefault(name.split("/")[0], []).append(name)
    raters = {name: sorted(rater for split, rater in used if split == name) for name in names}
    raters |= {domain: sorted(set.intersection(*(set(raters[name]) for name in some)))
               for domain, some in domains.items() if len(some) > 1}
    if len(domains) > 1:
        raters["everything"] = sorted(set.intersection(*(set(raters[n]) for some in domains.values() for n in some)))

    def auc(values: np.ndarray, some: np.ndarray, weights: np.ndarray | None) -> float:
        far, tar = roc(values[some], same[some], None if weights is None else weights[some])
        return float(np.trapezoid(tar, far))

    def statistic(counts: np.ndarray | None) -> dict[tuple[str, str], float]:
        weights = None if counts is None else np.where(same, counts[a], counts[a] * counts[b])
        known, found, pairs = {}, {}, {}  # raters often share their trials: the model is scored on them once
        for (split, rater), some in used.items():
            trials = (split, seen[split, rater])
            if trials not in known:
                known[trials] = auc(scores, some, weights)
            pairs[split, rater] = known[trials], auc(answers, some, weights)
        for domain, some in domains.items():
            for rater in raters.get(domain, []):
                pairs[domain, rater] = tuple(np.mean([pairs[name, rater] for name in some], axis=0))
        for rater in raters.get("everything", []):
            tasks = [np.mean([pairs[name, rater] for name in some], axis=0) for some in domains.values()]
            pairs["everything", rater] = tuple(np.mean(tasks, axis=0))
        for place, who in raters.items():
            both = np.array([pairs[place, rater] for rater in who]).reshape(-1, 2)
            found |= {(place, f"AUC of rater {rater}"): pair[1] for rater, pair in zip(who, both, strict=True)}
            model, human = both[np.isfinite(both).all(1)].T  # a resampling may leave a rater without one kind
            if len(model):
                found |= {(place, "AUC on human trials"): model.mean(),
                          (place, "human AUC (mean of raters)"): human.mean(),
                          (place, "model minus human AUC"): (model - human).mean(),
                          (place, "share of raters beaten"): (model > human).mean()}
        return found

    whole = statistic(None)
    missing = dict.fromkeys(whole, math.nan)
    found = intervals(lambda counts: whole if counts is None else missing | statistic(counts),
                      bootstrap_counts(np.arange(len(people)), draws, seed))
    shown = {name: {pair for (split, _), pairs in seen.items() if split == name for pair in pairs} for name in names}
    figures: dict[str, dict[str, Figure]] = {}
    for (place, metric), figure in found.items():
        figure.count = sum(len(shown[name]) for name in ([place] if place in shown else domains.get(place, shown)))
        figures.setdefault(place, {})[metric] = figure
    return figures


def make_human_rows(run: str, ratings: list[Rating], splits: dict[str, Split], figures: dict[str, dict],
                    flip: bool) -> Results:
    """The rows of `score_humans`, by weights: of each split, of "all splits" of a domain, and of domain "all"."""
    rows: Results = []
    for weights, found in figures.items():
        for place, by_metric in found.items():
            some = [r for r in ratings if place in (r.split, r.split.split("/")[0], "everything")]
            told = hashlib.sha256(repr(sorted((r.split, *sorted((r.left, r.right)), r.rater, r.value)
                                              for r in some)).encode()).hexdigest()[:8]
            sets = " + ".join(f"{name} {fingerprint(splits[name])}" for name in sorted({r.split for r in some}))
            protocol = f"human trials, ratings {told}, sets {sets}, {'flip' if flip else 'no flip'}"
            domain, _, split = ("all/human trials" if place == "everything" else place).partition("/")
            split = split or "all splits"
            rows += rows_of(run, weights, domain, split, protocol, by_metric)
    return rows


def human_rows(rows: list[Row]) -> dict[tuple[str, str], dict[str, dict[str, Row]]]:
    """{(domain, split): {weights: {metric: row}}} of the human trials."""
    found: dict = {}
    for row in rows:
        if row.protocol.startswith("human trials,"):
            found.setdefault((row.domain, row.split), {}).setdefault(row.weights, {})[row.metric] = row
    return found


def human_verdict(difference: Row) -> str:
    """What "model minus human AUC" says."""
    return "above humans" if difference.low > 0 else "below humans" if difference.high < 0 else "undecided"


def show_humans(rows: list[Row]) -> list[str]:
    """Lines of report.md; none where there are no human trials."""
    found = human_rows(rows)
    if not found:
        return []
    lines = ["", "## Human trials", "", "People and model on identical pairs: AUC of the ratings (-3 to +3) and of the "
             "cosine, chance 50. Intervals resample who and what is on the pictures; the raters are these, not a "
             "sample of mankind. All splits: the mean over those of a domain; everything: over the domains; of the "
             "raters who did them all.", "",
             "| split | pairs | raters | people: mean (range) | weights | model | model minus people | beaten | |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for (domain, split), by_weights in found.items():
        for weights, by_metric in by_weights.items():
            each = [row.value for metric, row in by_metric.items() if metric.startswith("AUC of rater ")]
            people, lead = by_metric["human AUC (mean of raters)"], by_metric["model minus human AUC"]
            name = "everything" if domain == "all" else report.literal(f"{domain}/{split}")
            reach = f"{100 * min(each):.1f} to {100 * max(each):.1f}"
            lines.append(f"| {name} | {people.count} | {len(each)} | {show_value(people)} ({reach}) | {weights} "
                         f"| {show_value(by_metric['AUC on human trials'])} | {show_value(lead)} "
                         f"| {100 * by_metric['share of raters beaten'].value:.0f} % | {human_verdict(lead)} |")
    return lines


def write_rows(folder: Path, rows: list[Row]) -> None:
    """results.json and results.csv: the same rows."""
    table = [asdict(row) for row in rows]
    write_atomically(folder / "results.json", lambda path: path.write_text(json.dumps(table, indent=1) + "\n"))

    write_csv(folder / "results.csv", table)


def write_draws(folder: Path, results: Results, seed: int) -> None:
    """draws.npz: the resampled values of every row, [rows, draws], which `compare` pairs between runs."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, draws=np.array([draws for _, draws in results], dtype=np.float32), seed=seed)

    write_atomically(folder / "draws.npz", write)


def write_csv(path: Path, table: list[dict], columns: tuple[str, ...] = ()) -> None:
    """A list of like dictionaries as CSV with a header, atomically; `columns`: of a table that may be empty."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns or list(table[0]))
            writer.writeheader()
            writer.writerows(table)

    write_atomically(path, write)


def read_rows(folder: Path) -> list[Row]:
    """The rows of RUN/eval/results.json; InputError where there are none."""
    path, kinds = folder / "results.json", {str: str, float: (int, float), int: int}
    try:
        rows = [Row(**row) for row in json.loads(path.read_text())]
        for (number, row), one in product(enumerate(rows), fields(Row)):
            value = getattr(row, one.name)
            finite = not isinstance(value, float) or math.isfinite(value)
            if not isinstance(value, kinds[one.type]) or isinstance(value, bool) or not finite:
                raise ValueError(f"row {number}: {one.name} is {str(value)[:80]!r}")
        return rows
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run `python evaluate.py --run {folder.parent}` first") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run evaluate.py again") from error


# ---------------------------------------------------------------- figures


def draw_figures(folder: Path, rows: list[Row], curves: dict[str, dict], splits: list[Split],
                 published: list[tuple[report.Published, str, Row | None]]) -> list[tuple[str, str]]:
    """bars.png, roc.png (log FAR), cmc.png and scores.png, where there is something to draw: title and name of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [("Figures before and after, beside people and published experts", "bars.png")]
    draw_bars(plt, folder / "bars.png", rows, splits, published)
    for kind, name, x_label, y_label in (("far", "roc", "FAR", "TAR"), ("cmc", "cmc", "rank", "identification rate")):
        panels = [key for key, curve in next(iter(curves.values())).items() if kind in curve]
        if not panels:
            continue
        figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
        for ax, key in zip(axes[0], panels, strict=True):
            for weights, by_split in curves.items():
                curve = by_split[key]
                if kind == "far":
                    far = np.maximum(curve["far"], 1e-7)
                    ax.step(far, curve["tar"], where="post", color=COLOURS[weights], label=weights)
                    least = min(f for f in curve["far"] if f > 0)
                    ax.set(xscale="log", xlim=(max(least, 1e-6), 1))
                else:
                    ax.plot(np.arange(1, len(curve["cmc"]) + 1), curve["cmc"], color=COLOURS[weights], label=weights)
            ax.set(title=key, xlabel=x_label, ylabel=y_label, ylim=(0, 1.01))
            ax.grid(alpha=0.3)
            ax.legend(loc="lower right", fontsize=8)
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
        plt.close(figure)
        drawn.append(({"roc": "ROC of the pairs", "cmc": "Identification rate by rank"}[name], f"{name}.png"))

    panels = [key for key, curve in next(iter(curves.values())).items() if "same" in curve]
    if panels:
        figure, axes = plt.subplots(len(curves), len(panels), figsize=(4.2 * len(panels), 2.6 * len(curves)),
                                    squeeze=False, sharex=True)
        for line, (weights, by_split) in zip(axes, curves.items(), strict=True):
            for ax, key in zip(line, panels, strict=True):
                for kind, colour in (("different", "#D55E00"), ("same", "#009E73")):
                    share = by_split[key][kind] / by_split[key][kind].sum()
                    ax.stairs(share, SCORE_BINS, fill=True, alpha=0.5, color=colour, label=kind)
                ax.set(title=f"{key}, {weights}", ylabel="share of the pairs")
                ax.legend(fontsize=8)
        for ax in axes[-1]:
            ax.set_xlabel("cosine")
        figure.tight_layout()
        figure.savefig(folder / "scores.png", dpi=150, bbox_inches="tight")
        plt.close(figure)
        drawn.append(("Scores of pairs of one identity and of two", "scores.png"))
    return drawn


def draw_bars(plt, path: Path, rows: list[Row], splits: list[Split],
              published: list[tuple[report.Published, str, Row | None]]) -> None:
    """Headlines and whatever else is published, before and after; then the human trials with every rater as a point."""
    by_name = {f"{split.domain}/{split.name}": split for split in splits}
    groups = [(f"{domain}\n{split}\n{next(iter(pair.values())).metric}", pair,
               chance(by_name[f"{domain}/{split}"], next(iter(pair.values())).metric),
               [one for one, name, row in published if row and name == f"{domain}/{split}"
                and one.metric == next(iter(pair.values())).metric], [])
              for (domain, split), pair in headlines(rows).items()]
    for one, name, row in published:
        title = f"{name.replace('/', chr(10))}\n{one.metric}"
        if row and title not in [group[0] for group in groups]:
            like = [r for r in rows if (r.domain, r.split, r.metric, r.protocol)
                    == (row.domain, row.split, row.metric, row.protocol)]
            others = [p for p, where, r in published if r and where == name and p.metric == one.metric]
            groups.append((title, {r.weights: r for r in like}, 0.5 if one.metric == "accuracy" else None, others, []))
    for (domain, split), by_weights in human_rows(rows).items():
        first = next(iter(by_weights.values()))
        pair = {weights: found["AUC on human trials"] for weights, found in by_weights.items()}
        raters = [row.value for metric, row in first.items() if metric.startswith("AUC of rater ")]
        groups.append((f"{domain}\n{split if domain != 'all' else ''}\nAUC on\nhuman trials",
                       pair | {"people": first["human AUC (mean of raters)"]}, 0.5, [], raters))

    names = [weights for weights in COLOURS if any(weights in pair for _, pair, *_ in groups)]
    figure, ax = plt.subplots(figsize=(1.8 + 1.3 * len(groups), 4))
    for i, (_, pair, level, others, raters) in enumerate(groups):
        here = [weights for weights in names if weights in pair]
        width = 0.76 / max(len(here), 2)
        for j, weights in enumerate(here):
            row, x = pair[weights], i + (j - (len(here) - 1) / 2) * width
            error = [[100 * (row.value - row.low)], [100 * (row.high - row.value)]]
            ax.bar(x, 100 * row.value, width * 0.95, yerr=np.maximum(error, 0), capsize=3, color=COLOURS[weights],
                   label=weights)
            if weights == "people":
                shift = np.linspace(-0.3, 0.3, len(raters)) * width if len(raters) > 1 else np.zeros(1)
                ax.plot(x + shift, 100 * np.array(raters), "k.", ms=4, label="one rater", clip_on=False)
        if level is not None:
            ax.plot([i - 0.45, i + 0.45], [100 * level] * 2, "k:", lw=1, label="chance")
        for one in others:
            same = one.comparable(next(iter(pair.values())).protocol)
            colour = COLOURS["people"] if one.kind == "human" else "#CC79A7"
            ax.plot(i + 0.43, 100 * one.value, "*" if one.kind == "human" else "D", ms=9 if one.kind == "human" else 5,
                    color=colour, mfc=colour if same else "none", clip_on=False,
                    label=f"published {one.kind}" + ", other protocol" * (not same))
    ax.set_xticks(range(len(groups)), [title.replace(" top", "\ntop") for title, *_ in groups], fontsize=8)
    ax.set(xlim=(-0.6, len(groups) - 0.4), ylim=(0, 100), ylabel="percent, 95 % interval")
    marks = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # each label once
    ax.legend(marks.values(), marks.keys(), ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0),
              frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


Tile = tuple[Split, int, str, str]  # split, row, colour of the frame, caption


def draw_sheet(path: Path, lines: list[list[Tile | None]], side: int = 96) -> None:
    """Images in lines, each framed under its caption, as PNG; None: a gap."""
    from PIL import Image, ImageDraw

    frame, text, gap = 3, 13, 12
    outer = side + 2 * frame
    wide, high = outer + 2, outer + text + 4
    width = max(sum(gap if tile is None else wide for tile in line) for line in lines)
    sheet = Image.new("RGB", (width, high * len(lines)), "white")
    draw = ImageDraw.Draw(sheet)
    for top, line in zip(range(0, high * len(lines), high), lines, strict=True):
        left = 0
        for tile in line:
            if tile is not None:
                split, row, colour, caption = tile
                draw.text((left, top), caption, fill="black")
                draw.rectangle((left, top + text, left + outer - 1, top + text + outer - 1), colour)
                image = Image.fromarray(split.image(row).permute(1, 2, 0).numpy()).resize((side, side))
                sheet.paste(image, (left + frame, top + text + frame))
            left += gap if tile is None else wide
    write_atomically(path, lambda temporary: sheet.save(temporary, "PNG"))
    people = {tile[0].domain for line in lines for tile in line if tile} != {"object"}
    print(f"{path}" + ": shows people; pass it on only as the licence of the data allows" * people)


def draw_search(folder: Path, split: Split, x: np.ndarray, seed: int, probes: int = 12, top: int = 10) -> None:
    """sheet-DOMAIN-SPLIT.png: drawn probes, each with the images nearest to it, framed as right or wrong."""
    member = make_members([split], [x], probes, seed)[0]
    mates, lines = member.mates(member), []
    for probe in member.probes:
        right, ignored = mates(probe)
        _, (scores,) = next(score_blocks(x, np.array([probe]), member.gallery))
        scores[ignored] = -np.inf
        nearest = np.argsort(-scores, kind="stable")[: min(top, len(scores) - len(ignored))]
        hits = np.isin(nearest, right)
        lines.append([(split, int(probe), "#000000", "probe"), None,
                      *((split, int(member.gallery[place]), HIT if hit else MISS, f"{rank}: {scores[place]:.3f}")
                        for rank, (place, hit) in enumerate(zip(nearest, hits, strict=True), 1))])
    if lines:
        draw_sheet(folder / f"sheet-{split.domain}-{split.name}.png", lines)


# ---------------------------------------------------------------- comparing runs


@dataclass
class Scored:
    """What evaluate.py found for one run, with one set of weights."""

    folder: Path
    config: dict
    seed: int  # of the resamplings
    found: dict[tuple[str, str, str, str], tuple[Row, np.ndarray]]  # by domain, split, metric, protocol

    @property
    def recipe(self) -> str:
        """What two runs share that differ in their seed alone; a backbone without a run is only itself."""
        free = FREE_ON_RESUME | {"seed", "argv", "git_commit", "versions"}
        weights = next(iter(self.found.values()))[0].weights
        if not self.config:
            return str(self.folder.resolve())
        return weights + json.dumps({key: value for key, value in self.config.items() if key not in free})


def read_scored(folder: Path, weights: str | None) -> Scored:
    """The rows of a run and their resampled values; InputError where there are none.

    Args:
        folder: of the run.
        weights: "tuned" or "foundation"; None: tuned where there are such rows.
    """
    rows, path = read_rows(folder / "eval"), folder / "eval" / "draws.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            draws, seed = file["draws"], int(file["seed"])
        if len(draws) != len(rows):
            raise ValueError(f"{len(draws)} rows for {len(rows)} of results.json")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read ({error}); run evaluate.py on {folder} again") from error
    weights = weights or max((row.weights for row in rows), default="tuned")  # "tuned" comes after "foundation"
    found = {(row.domain, row.split, row.metric, row.protocol): (row, drawn.astype(float))
             for row, drawn in zip(rows, draws, strict=True) if row.weights == weights}
    if not found:
        raise InputError(f"{folder}: no figures of the {weights} weights; run evaluate.py on it without "
                         "--no-foundation")
    config = folder / "config.json"
    return Scored(folder, read_json(config) if config.exists() else {}, seed, found)


def refuse_unlike(a: Scored, b: Scored, splits: set[str]) -> None:
    """InputError where a figure that both runs have was made in different ways, or their resamplings do not pair."""
    if a.seed != b.seed or len(next(iter(a.found.values()))[1]) != len(next(iter(b.found.values()))[1]):
        raise InputError(f"{a.folder} and {b.folder} were resampled differently: run evaluate.py on both with the same "
                         "--seed and --bootstrap")
    made: list[dict] = [{}, {}]
    for strings, scored in zip(made, (a, b), strict=True):
        for domain, split, metric, protocol in scored.found:
            strings.setdefault((domain, split, metric), set()).add(protocol)
    for key in made[0].keys() & made[1].keys():
        name = "/".join(key[:2])
        if splits and name not in splits:
            continue
        if unlike := sorted(made[0][key] ^ made[1][key]):
            where = [a.folder if protocol in made[0][key] else b.folder for protocol in unlike]
            raise InputError(f"{name} {key[2]}: only {where[0]} has it by the protocol '{unlike[0]}'"
                             + (f", only {where[-1]} by '{unlike[-1]}'" if where[-1] != where[0] else "")
                             + ": score both on the same splits with the same options, or leave it out with --splits")
        for protocol in made[0][key]:
            counts = [scored.found[(*key, protocol)][0].count for scored in (a, b)]
            if counts[0] != counts[1]:
                raise InputError(f"{name} {key[2]}: {counts[0]:,} samples in {a.folder}, {counts[1]:,} in {b.folder} "
                                 "(unreadable images?): run evaluate.py on both again")


def aggregate(group: list[Scored], key: tuple) -> Figure:
    """The mean of a figure over runs that differ in their seed, and of its resampled values, person by person."""
    rows, draws = zip(*(scored.found[key] for scored in group), strict=True)
    return Figure(float(np.mean([row.value for row in rows])), np.mean(draws, axis=0), rows[0].count)


def compare_groups(groups: list[list[Scored]], splits: set[str]) -> list[dict]:
    """One row for each figure that all runs have and each group: its mean over seeds, and its lead over the first.

    The interval of a difference resamples people, the same ones in both runs, so that what makes a set hard for all
    cancels out. Seeds are not resampled: their standard deviation stands beside.
    """
    first, *others = [scored for group in groups for scored in group]
    for other in others:
        refuse_unlike(first, other, splits)
    keys = [key for key in first.found if all(key in other.found for other in others)
            and not key[2].startswith(("AUC of rater ", "human AUC"))  # people's own, the same beside every run
            and (not splits or f"{key[0]}/{key[1]}" in splits)]
    if not keys:
        raise InputError("the runs have no figure in common" + (" on these --splits" if splits else "")
                         + ": score them on the same splits")
    table = []
    for key in keys:
        reference = aggregate(groups[0], key)
        for group in groups:
            figure, values = aggregate(group, key), [scored.found[key][0].value for scored in group]
            with np.errstate(invalid="ignore"):  # a resampling without errors has an infinite d', of both
                lead = Figure(figure.value - reference.value, figure.draws - reference.draws)
            spread = float(np.std(values, ddof=1)) if len(group) > 1 else None
            row = dict(zip(("domain", "split", "metric", "protocol"), key, strict=True))
            row |= {"runs": " ".join(scored.folder.resolve().name for scored in group),
                    "weights": group[0].found[key][0].weights, "seeds": len(group), "value": figure.value,
                    "low": figure.low, "high": figure.high, "seed_sd": spread, "count": figure.count,
                    "headline": group[0].found[key][0].headline}
            if group is not groups[0]:
                row |= {"difference": lead.value, "difference_low": lead.low, "difference_high": lead.high}
            table.append({"difference": None, "difference_low": None, "difference_high": None} | row)
    order = ("domain", "split", "metric", "protocol", "runs", "weights", "seeds", "value", "low", "high", "seed_sd",
             "difference", "difference_low", "difference_high", "headline", "count")
    return [{name: row[name] for name in order} for row in table]


def refuse_unshared(names: set[str], groups: list[list[Scored]], experts: bool) -> None:
    """InputError where --splits names what not all runs have; of experts each is asked for its own domains alone."""
    first, *others = [set.intersection(*({"/".join(key[:2]) for key in one.found} for one in group))
                      for group in groups]
    if experts:
        others = [set.union(*({name for name in found if name.split("/")[0] in group[0].config.get("domains", [])}
                              for found, group in zip(others, groups[1:], strict=True)))]
    shared = set.intersection(first, *others)
    if unknown := sorted(names - shared):
        raise InputError(f"the runs have no figure in common on these --splits: {', '.join(unknown)}; they share "
                         f"{', '.join(sorted(shared)) or 'none'}")


def start_of(config: dict) -> tuple:
    """What two runs must share to be compared: the untouched backbone and its input."""
    return tuple(config.get(key) for key in ("backbone", "size", "model", "weights", "image_size", "embed_dim"))


def as_many(seen: int, wanted: int) -> bool:
    """Whether an expert saw as many images as it should, within a quarter."""
    return 0.75 <= seen / max(wanted, 1) <= 1.25


def find_expertise(run: Scored, expert: Scored) -> str:
    """The domain that an expert was trained on; InputError where the two cannot be held against each other."""
    known = expert.config.get("domains", [])
    if len(known) != 1:
        raise InputError(f"{expert.folder} is no expert: it was trained on {', '.join(known) or 'nothing known'}; "
                         f"train one with --domains {DOMAINS[1]}, or leave --experts out")
    domain = known[0]
    if domain not in run.config.get("domains", []):
        raise InputError(f"{run.folder} was not trained on {domain}, the task of the expert {expert.folder}: leave it "
                         "out")
    if start_of(run.config) != start_of(expert.config):
        raise InputError(f"{expert.folder} starts from another backbone, weights or input size than {run.folder}: "
                         "train the expert like the run")
    own, theirs = run.config["counts"][domain], expert.config["counts"][domain]
    if not as_many(theirs, own):
        raise InputError(f"{expert.folder} saw {theirs:,} images of {domain}, {run.folder} {own:,}: not the same "
                         f"number (within a quarter); train the expert with --images {own}")
    return domain


def margin(expert: float, delta: float) -> float:
    """How much worse still counts as no worse: delta; where the expert is above 0.9, at most a tenth of its error.

    Such metrics are saturated: a point of 99.8 % would be five times what the expert gets wrong.
    """
    return delta if expert <= 0.9 else min(delta, 0.1 * (1 - expert))


OTHER_METRICS = ("d-prime", "eer", "retention", "gap of ", "clean ", " sd", "far found")  # no shares, or told elsewhere


def compare_experts(runs: list[Scored], groups: list[list[Scored]], splits: set[str], delta: float) -> list[dict]:
    """Non-inferiority of a run (or the mean of its seeds) to its own experts, each on the splits of its domain.

    Non-inferior: the lower end of the paired 95 % interval of run - expert lies above -margin; inferior: its upper end
    lies below; else undecided. (The lower end of a two-sided interval: a test at 2.5 %.) Metrics are those that are
    shares and better when higher: no d', EER, retention, gap to clean images, spread over folds or FAR found. What
    clean images of a shifted split score is told of the split that they are of.
    """
    table = []
    for group in groups:
        domain, kept = find_expertise(runs[0], group[0]), []
        for one in [*runs, *group]:
            found = {key: pair for key, pair in one.found.items() if key[0] == domain and key[1] != "everything"
                     and not key[3].startswith("human trials") and not any(word in key[2] for word in OTHER_METRICS)}
            kept.append(replace(one, found=found))
        if any(not one.found for one in kept):
            raise InputError(f"{group[0].folder} and {runs[0].folder}: no figures of {domain}: run evaluate.py on both")
        for one in kept[1:]:
            refuse_unlike(kept[0], one, splits)
        ours, theirs = kept[: len(runs)], kept[len(runs) :]
        for key, (row, _) in ours[0].found.items():
            if not all(key in one.found for one in kept) or (splits and f"{key[0]}/{key[1]}" not in splits):
                continue
            run, expert = aggregate(ours, key), aggregate(theirs, key)
            lead, allowed = Figure(run.value - expert.value, run.draws - expert.draws), margin(expert.value, delta)
            verdict = ("non-inferior" if lead.low > -allowed or lead.low >= 0 else
                       "inferior" if lead.high < -allowed else "undecided")
            named = [" ".join(one.folder.resolve().name for one in some) for some in (ours, theirs)]
            table.append(dict(zip(("domain", "split", "metric", "protocol"), key, strict=True)) | {
                "run": named[0], "expert": named[1], "value": run.value, "expert_value": expert.value,
                "difference": lead.value, "low": lead.low, "high": lead.high, "delta": allowed, "verdict": verdict,
                "headline": row.headline, "count": run.count})
    if not table:
        raise InputError("the run and its experts have no figure in common: score them on the same splits")
    return table


def show_experts(table: list[dict], domains: list[str]) -> str:
    """The rows of `compare_experts` as Markdown; headlines first, then what they say together."""
    lines = ["Percent; differences run - expert, paired by person, with 95 % intervals. Non-inferior: the whole "
             "interval above -δ, which is --delta and, for an expert above 90 %, at most a tenth of its error.", "",
             "| split | metric | run | expert | difference | low | high | δ | verdict | expert's name | protocol |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in sorted(table, key=lambda row: not row["headline"]):
        name, metric, expert, protocol = map(report.literal, (f"{row['domain']}/{row['split']}", row["metric"],
                                                              row["expert"], row["protocol"]))
        cells = [name, metric, *(f"{100 * row[key]:.1f}" for key in ("value", "expert_value")),
                 *(f"{100 * row[key]:+.2f}" for key in ("difference", "low", "high")), f"{100 * row['delta']:.2f}",
                 f"**{row['verdict']}**" if row["headline"] else row["verdict"], expert, protocol]
        lines.append(f"| {' | '.join(cells)} |")
    verdicts = {row["verdict"] for row in table if row["headline"]}
    said = "inferior" if "inferior" in verdicts else "undecided" if "undecided" in verdicts else "non-inferior"
    without = [domain for domain in domains if domain not in {row["domain"] for row in table}]
    lines += ["", f"On the headlines together: {said}"
              + (f"; no expert of {', '.join(without)} was given" if without else " on every task") + "."]
    return "\n".join(lines) + "\n"


def draw_experts(path: Path, table: list[dict]) -> None:
    """Each headline's difference run - expert with its interval, beside the margin that it must stay above."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in table if row["headline"]] or table
    colours = {"non-inferior": "#009E73", "undecided": "#999999", "inferior": "#D55E00"}
    figure, ax = plt.subplots(figsize=(7, 1.4 + 0.5 * len(rows)))
    for i, row in enumerate(rows):
        error = np.maximum([[row["difference"] - row["low"]], [row["high"] - row["difference"]]], 0)
        ax.errorbar(100 * row["difference"], i, xerr=100 * error, fmt="o", capsize=4, color=colours[row["verdict"]])
        ax.plot([-100 * row["delta"]] * 2, [i - 0.35, i + 0.35], "k--", lw=1.2, label="-δ" if i == 0 else None)
    ax.axvline(0, color="0.7", lw=0.8)
    ax.set_yticks(range(len(rows)), [f"{row['domain']}/{row['split']} {row['metric']}\nagainst {row['expert']}: "
                                     f"{row['verdict']}" for row in rows], fontsize=8, parse_math=False)
    ax.invert_yaxis()
    ax.set_xlabel("run - expert, points, 95 % interval")
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_comparison(path: Path, table: list[dict], untouched: list[Row]) -> None:
    """A panel for each headline: every run, or mean over seeds, with its interval; grey: the untouched backbone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str], list[dict]] = {}
    for row in table:
        if row["headline"] or not any(row["headline"] for row in table):
            known = panels.setdefault((row["domain"], row["split"]), [])
            if not known or (known[0]["metric"], known[0]["protocol"]) == (row["metric"], row["protocol"]):
                known.append(row)  # the customary rule is first
    before = {(row.domain, row.split, row.metric): row.value for row in untouched}
    names = [row["runs"].split() for row in next(iter(panels.values()))]
    labels = [(f"{group[0].rpartition('-s')[0] or group[0]}, {len(group)} seeds" if len(group) > 1 else group[0])
              + (f" ({row['weights']})" if row["weights"] != "tuned" else "")
              for group, row in zip(names, next(iter(panels.values())), strict=True)]
    wide = min(len(panels), 4)
    high = -(-len(panels) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(2 + 2.6 * wide, high * (0.9 + 0.24 * len(labels))), squeeze=False,
                                sharey=True, layout="constrained")
    for ax, ((domain, split), rows) in zip(axes.flat, panels.items(), strict=False):
        scale = 1 if "d-prime" in rows[0]["metric"] else 100
        for i, row in enumerate(rows):
            error = np.maximum([[row["value"] - row["low"]], [row["high"] - row["value"]]], 0)
            ax.errorbar(scale * row["value"], i, xerr=scale * error, fmt="o", ms=4, capsize=2,
                        color=DOMAIN_COLOURS.get(domain, "black"))
        if (domain, split, rows[0]["metric"]) in before:
            ax.axvline(scale * before[domain, split, rows[0]["metric"]], color=COLOURS["foundation"], lw=2, zorder=0)
        ax.set_title(f"{domain}/{split}\n{rows[0]['metric']}", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", lw=0.4)
    axes[0][0].set_yticks(range(len(labels)), labels, parse_math=False)  # a run's name may hold dollar signs
    axes[0][0].set_ylim(len(labels) - 0.5, -0.5)
    for ax in list(axes.flat)[len(panels):]:
        ax.set_axis_off()
    figure.supxlabel("percent, 95 % interval" + "; grey: the untouched backbone" * bool(before), fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def show_comparison(table: list[dict]) -> str:
    """The rows of `compare_groups` as Markdown."""

    def show(row: dict, *names: str, sign: str = "") -> list[str]:
        return [f"{row[name] * (1 if 'd-prime' in row['metric'] else 100):{sign}.1f}" for name in names]

    lines = ["Percent (d-prime: as it is) with 95 % intervals. Differences to the first run or group of seeds, paired "
             "by person; in bold where the interval leaves out 0. Seed SD: between runs that differ in the seed alone.",
             "",
             "| split | metric | runs | value | seed SD | difference | count | protocol |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in table:
        lead = ""
        if row["difference"] is not None:
            lead = "{} [{}, {}]".format(*show(row, "difference", "difference_low", "difference_high", sign="+"))
            lead = f"**{lead}**" if row["difference_low"] > 0 or row["difference_high"] < 0 else lead
        spread = "" if row["seed_sd"] is None else show(row, "seed_sd")[0]
        value = "{} [{}, {}]".format(*show(row, "value", "low", "high"))
        name, metric, runs, protocol = map(report.literal, (f"{row['domain']}/{row['split']}", row["metric"],
                                                            row["runs"], row["protocol"]))
        cells = [name, metric, f"{runs} ({row['weights']})", value, spread, lead, f"{row['count']:,}", protocol]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- leaks

LEAK = ("split", "row", "key", "identity", "cosine", "train_split", "train_key", "train_identity")  # leaks.csv


def find_leaks(embed: Embedder, splits: list[Split], training: list[Split],
               threshold: float) -> tuple[list[dict], list[tuple[Tile, Tile]]]:
    """The images of test splits whose nearest training image, of any domain, is as near as the threshold.

    Returns:
        A row for each, the nearest first, and the two images of each, to draw.
    """
    nearest: dict = {}  # by test split, row: cosine, training split, its row
    for source in training:
        y = embed(source)
        for split in splits:
            rows, cosines = (found[:, 0] for found in nearest_rows(embed(split), y, device=embed.device))
            for row in np.flatnonzero(cosines >= threshold):
                key = (f"{split.domain}/{split.name}", int(row))
                if key not in nearest or cosines[row] > nearest[key][0]:
                    nearest[key] = (float(cosines[row]), source, int(rows[row]))

    def describe(split: Split, row: int) -> tuple[str, str]:
        return split.jpeg(row)[0], split.classes[split.labels[row]] if split.labels[row] >= 0 else ""

    by_name, table, images = {f"{split.domain}/{split.name}": split for split in splits}, [], []
    for (name, row), (cosine, source, other) in sorted(nearest.items(), key=lambda leak: -leak[1][0]):
        (key, identity), (train_key, train_identity) = describe(by_name[name], row), describe(source, other)
        values = name, row, key, identity, cosine, f"{source.domain}/{source.name}", train_key, train_identity
        table.append(dict(zip(LEAK, values, strict=True)))
        images.append(((by_name[name], row, MISS, f"{key}  {cosine:.3f}"), (source, other, "#000000", train_key)))
    return table, images


def score_without(embed: Embedder, splits: list[Split], root: dict, run: Run, draws: int, seed: int, flip: bool,
                  without: dict[str, list[int]], how: str) -> tuple[list[Row], list[Row]]:
    """The rows of the splits that leaks touch, of all images and without the leaked ones.

    Touched is also a shifted split of whose clean images some leaked, for its gaps.

    Args:
        splits: test splits.
        without: leaked rows by "domain/split".
        how: the leaks were found, for the protocol.
    """
    def count(split: Split | None, left_out: dict) -> int:
        return len(left_out.get(f"{split.domain}/{split.name}", [])) if split else 0

    by_name, tables = {f"{split.domain}/{split.name}": split for split in splits}, ([], [])
    clean = {name: clean_of(split, splits) for name, split in by_name.items()}
    touched = [split for name, split in by_name.items() if count(split, without) + count(clean[name], without)]
    for table, left_out in zip(tables, ({}, without), strict=True):
        figures, _ = score(embed, touched, root, run, draws, seed, Readouts({}, 0, run.config, []), left_out, splits)
        for row, _ in make_rows(run.folder.name, touched, {"tuned": figures}, flip):
            name = f"{row.domain}/{row.split}"
            own = count(by_name[name], left_out)
            others = count(clean[name], left_out) if row.metric.startswith(("gap of ", "clean ")) else 0
            if own or others:
                row.protocol += f", without {own} leaked" + f" and {others} of the clean" * (others > 0) + f" {how}"
            if own or others or table is tables[0]:  # what lacks nothing is told once
                table.append(row)
    return tables


# ---------------------------------------------------------------- a user's own pictures


@dataclass
class Pictures:
    """Image files that are read as a split is, so that `embed_rows` takes either: each becomes what its shard held."""

    paths: list[Path]
    size: int  # pixels
    fit: str  # see `fit_image`, as is quality
    quality: int

    def image(self, row: int) -> torch.Tensor:
        """uint8 [3, size, size], RGB; BadImage where the file is none or is damaged."""
        from torchvision.io import ImageReadMode, decode_jpeg

        try:
            data = fit_image(self.paths[row].read_bytes(), self.size, self.fit, self.quality)
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except (OSError, RuntimeError) as error:
            raise BadImage(f"{self.paths[row]}: unreadable") from error


def find_pictures(places: tuple[Path, ...]) -> list[Path]:
    """The files named, and every image (by its name) below the folders named; each once."""
    found, endings = [], image_suffixes()
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: no such file or folder; name pictures, or a folder that holds some")
        inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in endings and p.is_file())
        if place.is_dir() and not inside:
            raise InputError(f"{place}: holds no images (looked for names that end in .jpg, .png and the like)")
        found += inside if place.is_dir() else [place]
    return list(dict.fromkeys(found))


def find_fitting(run: Run, domain: str | None) -> dict:
    """Size, fit and JPEG quality of the shards that a domain of a run was trained on."""
    domain = domain or run.config["domains"][0]
    if domain not in run.config["domains"]:
        raise InputError(f"--domain {domain}: the run was trained on {', '.join(run.config['domains'])}: take the one "
                         "whose images are prepared like yours")
    known = run.config.get("sources") or describe_sources(train.open_splits(run.config))
    print(f"fitted as {domain}: {known[domain]['size']} px, {known[domain]['fit']}")
    return {key: known[domain][key] for key in ("size", "fit", "quality")}


def write_embeddings(path: Path, names: list[str], x: np.ndarray) -> None:
    """`files` [M] and `embeddings` [M, D] as .npz, or a .csv with a line a file."""
    if path.suffix == ".csv":
        write_csv(path, [{"file": name} | {f"e{i}": f"{value:.9g}" for i, value in enumerate(row)}
                         for name, row in zip(names, x, strict=True)])
        return

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # given a name, savez would add .npz
            np.savez(file, files=np.array(names), embeddings=x)

    write_atomically(path, write)


# ---------------------------------------------------------------- the job


def make_embedder(load: Callable[[], Backbone], weights: str, folder: Path, options: dict,
                  ranks: Ranks = Ranks()) -> Embedder:
    """An embedder by the options that evaluate.py and analyze.py share; `folder`: of the run's results."""
    shared = bool(options["cache"]) and weights == "foundation"
    if shared:
        make_folder(Path(options["cache"]), "--cache")
    return Embedder(load(), weights, Path(options["cache"]) if shared else folder / "embeddings",
                    pick_device(options["device"]), options["batch"], options["workers"], options["flip"], shared,
                    ranks)


def choose_splits(root: dict[str, dict[str, Split]], names: str | None, where: str) -> list[Split]:
    """The test splits to score: all that have a protocol, or those named as domain/split."""
    everything = {f"{domain}/{name}": split for domain in root for name, split in root[domain].items()}
    scored = {key: split for key, split in everything.items() if split.protocol}
    if names:
        for name in names.split(","):
            if name not in everything:
                raise InputError(f"--splits: {where} has no split {name!r}; it has {', '.join(everything)}")
            if name not in scored:
                raise InputError(f"--splits: {name} is a training split: it has no protocol to be scored by")
        scored = {name: scored[name] for name in names.split(",")}
    for name, split in list(scored.items()):
        if split.protocol["name"] not in HEADLINE:
            print(f"  {name}: protocol {split.protocol['name']!r} is not scored yet: left out")
            del scored[name]
    if not scored:
        raise InputError(f"{where}: no test split to score: prepare one, `python -m data_prep SOURCE ... --part test`")
    return sorted(scored.values(), key=lambda s: (DOMAINS.index(s.domain), bool(s.protocol.get("ood")), s.name))


def add_references(splits: list[Split], root: dict[str, dict[str, Split]]) -> list[Split]:
    """Test splits and the splits that class means and neighbours of them come from, each once."""
    references = [root[split.domain].get(split.protocol.get("reference")) for split in splits]
    return list({split.folder: split for split in [*references, *splits] if split is not None}.values())


def leave(ranks: Ranks) -> None:
    """End a process of several at once: gloo's threads now and then abort an interpreter that is torn down."""
    if ranks.world > 1:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


def open_models(options: dict, given: set[str]
                ) -> tuple[str, Path, Run | None, dict[str, Callable[[], Backbone]], str, dict]:
    """Name, output folder, run (if any), loaders of the foundation and the tuned backbone, data root, its options.

    Args:
        options: all of them.
        given: names of those on the command line.
    """
    if options["run"]:
        for key in ("backbone", "size", "model", "weights", "image_size", "out"):
            if key in given:
                raise InputError(f"--{key.replace('_', '-')} describes an untouched backbone: leave it out with --run")
        if options["watch"]:
            watch(Path(options["run"]), options)  # then the run is complete
        run = load_run(Path(options["run"]), options["allow_partial"])
        models = {"foundation": lambda: load_foundation(run), "tuned": lambda: load_tuned(run)}
        if not options["foundation"]:
            del models["foundation"]
        return run.folder.name, run.folder, run, models, options["data"] or run.config["data"], run.config
    if not options["model"] and not options["backbone"]:
        raise InputError("what is to be scored? give --run RUN, or --model NAME for an untouched backbone")
    for name, used in (("--no-foundation", not options["foundation"]), ("--allow-partial", options["allow_partial"])):
        if used:
            raise InputError(f"{name} describes how a run is scored: give --run RUN, or leave it out")
    config = {key: options[key] for key in ("backbone", "size", "model", "weights", "image_size")}
    config |= {"embed_dim": 0, "seed": options["seed"]}
    backbones.resolve_backbone(config)  # refuses an unknown name before anything is read
    name = (options["model"] or f"{options['backbone']}-{options['size']}").replace("/", "_") + "-foundation"
    folder = Path(options["out"] or f"runs/{name}")
    models = {"foundation": lambda: backbones.load_backbone(config).eval()}
    return name, folder, None, models, options["data"] or "data", config


def watch(folder: Path, options: dict) -> None:
    """--watch: score every checkpoint that --keep leaves, once, as it appears, until the run is complete.

    RUN/eval/watch.csv gets their rows, each with its step (0: the untouched backbone), watch.png the headlines.
    """
    if not (folder / "config.json").is_file() or not (config := read_json(folder / "config.json")).get("keep"):
        raise InputError(f"--watch: {folder} is no run that keeps checkpoints: train it with --keep N")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: one line, and what is written stays
    out, data = folder / "eval", options["data"] or config["data"]
    root, prompts, table = open_root(Path(data)), read_prompts(options["prompts"]), []
    splits = choose_splits(root, options["splits"], data)
    make_folder(out, "--run")
    if (out / "watch.csv").exists():  # stopped before: goes on
        with open(out / "watch.csv", newline="") as file:
            table = list(csv.DictReader(file))
    complete = False
    while not complete:
        complete = (folder / "done.json").exists()  # asked first: what came before it is still scored
        known = {int(row["step"]) for row in table}
        there = {step: place for step, place in kept_steps(folder).items() if step not in known}
        if options["foundation"] and there and 0 not in known:
            there = {0: next(iter(there.values())), **there}
        for step, place in there.items():
            try:
                run = load_run(place)
                model = load_tuned(run) if step else load_foundation(run)
            except InputError:
                if not place.exists():  # older than --keep allows by now
                    continue
                raise
            name = "watched" if step else "foundation"
            embed = make_embedder(lambda model=model: model, name, out, options)
            readouts = Readouts(prompts, options["probe"], run.config, run.classes.get("object", []))
            figures, _ = score(embed, splits, root, run if step else None, options["bootstrap"], options["seed"],
                               readouts)
            rows = [row for row, _ in make_rows(folder.name, splits, {"tuned" if step else "foundation": figures},
                                                options["flip"])]
            table += [{"step": step} | asdict(row) for row in rows]
            write_csv(out / "watch.csv", table)
            draw_watch(out / "watch.png", table)
            print(f"step {step}: " + "   ".join(f"{'/'.join(key)} {show_value(next(iter(pair.values())))}"
                                                for key, pair in headlines(rows).items()), flush=True)
        if not complete:
            time.sleep(PATIENCE)


def draw_watch(path: Path, table: list[dict]) -> None:
    """The headline of every split over the steps of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for line in sorted(table, key=lambda line: int(line["step"])):
        row = Row(**{key: value for key, value in line.items() if key != "step"})
        if row.headline:
            label = f"{row.domain}/{row.split}", row.metric
            points.setdefault(label, []).append((int(line["step"]), 100 * float(row.value)))
    figure, ax = plt.subplots(figsize=(7, 4))
    drawn: list[str] = []  # a domain's second split is dashed, its third dotted
    for (name, metric), values in points.items():
        domain = name.split("/")[0]
        ax.plot(*zip(*dict(reversed(values)).items(), strict=True), marker=".", label=f"{name}, {metric}",
                color=DOMAIN_COLOURS[domain], ls=("-", "--", ":")[drawn.count(domain) % 3])
        drawn.append(domain)
    ax.set(xlabel="step", ylabel="percent")
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png",
                                                                 bbox_inches="tight"))
    plt.close(figure)


def model_options(command):
    """The options that evaluate.py and analyze.py share."""
    for option in reversed([
        click.option("--run", metavar="RUN", help="Folder of a finished run."),
        click.option("--data", metavar="DIR", help="Data root (default: the run's own)."),
        click.option("--allow-partial", is_flag=True, help="Accept a run that has not finished."),
        click.option("--flip/--no-flip", default=True, help="Add the embedding of the mirrored image."),
        click.option("--batch", type=click.IntRange(1), default=64, help="Images per forward pass."),
        click.option("--workers", type=click.IntRange(0), default=LOADERS, help="Loader processes."),
        click.option("--cache", metavar="DIR",
                     help="Keep the embeddings of untouched backbones here, for all runs that share one (default: with "
                          "each run)."),
        click.option("--device", default="auto",
                     help="auto, cpu or cuda; evaluate.py under torchrun: each process takes its own."),
        click.option("--seed", type=click.IntRange(0), default=0, help="Of every random draw."),
        click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error."),
    ]):
        command = option(command)
    return command


@click.group(invoke_without_command=True, context_settings={"show_default": True, "max_content_width": 120},
             help=__doc__.split("\n\n")[0])
@model_options
@click.option("--splits", metavar="NAMES",
              help="Comma-separated domain/split: the results then hold these alone (default: all).")
@click.option("--foundation/--no-foundation", default=True, help="Score the untouched backbone too.")
@click.option("--watch", is_flag=True,
              help="Score the checkpoints of train.py --keep as they appear (watch.csv, watch.png), then the run.")
@click.option("--backbone", type=click.Choice(list(backbones.BACKBONES)), help="Without --run: an untouched backbone.")
@click.option("--size", type=click.Choice(backbones.SIZES), default="large", help="Its size.")
@click.option("--model", metavar="NAME", help="Any timm or open_clip model instead of --backbone.")
@click.option("--weights", default="pretrained", metavar="WHICH", help="'pretrained', 'none' or a FILE.")
@click.option("--image-size", type=click.IntRange(16), help="Input side in pixels.")
@click.option("--out", metavar="DIR", help="Without --run: folder for the results (default: runs/NAME-foundation).")
@click.option("--bootstrap", type=click.IntRange(2), default=500, help="Resamplings for the intervals.")
@click.option("--prompts", default="1,7,80", metavar="SETS",
              help="Zero-shot classification by CLIP: shipped sets of prompts, by number, or files with a template a "
                   "line, {} for the class name; '' for none.")
@click.option("--probe", type=click.IntRange(0), default=50_000, metavar="N",
              help="Fit the linear probe to at most N images of a reference split (0: no probe).")
@click.option("--sheet", is_flag=True,
              help="Draw probes of each split with the ten images nearest to them: sheet-DOMAIN-SPLIT.png.")
@click.option("--crowd", type=click.IntRange(0), default=5000,
              help="Probes of a domain that are searched among all domains at once (0: none).")
@click.option("--humans", type=click.Path(path_type=Path), multiple=True, metavar="FILE.csv",
              help="Ratings of people (split,left_key,right_key,rater,rating), e.g. from the page of `data_prep "
                   "trials`; may be given again.")
@click.option("--published", multiple=True, metavar="SPLIT=DATASET",
              help="Data set of a split whose name is not the set's, e.g. object/val=imagenet: its published figures "
                   "stand beside the run's (SPLIT= for none); may be given again.")
@click.pass_context
def main(context: click.Context, **options) -> int | None:
    if context.invoked_subcommand:
        refuse_options(context)
        return None
    if options["watch"] and not options["run"]:
        raise InputError("--watch follows a run: give --run RUN")
    given = {key for key in options if context.get_parameter_source(key) == click.core.ParameterSource.COMMANDLINE}
    name, folder, run, models, data, config = open_models(options, given)
    trained = run.classes.get("object", []) if run else []
    readouts = Readouts(read_prompts(options["prompts"]), options["probe"], config, trained)
    root = open_root(Path(data))
    splits = choose_splits(root, options["splits"], data)
    by_name = {f"{split.domain}/{split.name}": split for split in splits}
    published = report.read_published()
    datasets = report.datasets_of(list(by_name), options["published"], published)
    ratings = read_ratings(list(options["humans"]), by_name) if options["humans"] else []
    ranks, out = join_ranks(options), folder / "eval"
    make_folder(out, "--run" if run else "--out")
    embedders = {weights: make_embedder(load, weights, out, options, ranks) for weights, load in models.items()}
    for embed in embedders.values():  # all of it first, by all ranks: what follows is the first one's alone
        for split in add_references(splits, root):
            embed.prepare(split)
        embed.ranks = Ranks()
    if ranks.rank:
        leave(ranks)
    figures, curves, unified, people = {}, {}, {}, {}
    crowd = choose_crowd(splits) if options["crowd"] else []
    for weights, embed in embedders.items():
        found = score(embed, splits, root, run if weights == "tuned" else None, options["bootstrap"], options["seed"],
                      readouts)
        figures[weights], curves[weights] = found
        if crowd:
            members = make_members(crowd, [embed(split) for split in crowd], options["crowd"], options["seed"])
            unified[weights] = score_unified(members, options["bootstrap"], options["seed"], embed.device)
        if ratings:
            rated = {name: embed(by_name[name]) for name in {rating.split for rating in ratings}}
            people[weights] = score_humans(ratings, by_name, rated, options["bootstrap"], options["seed"])
    results = make_rows(name, splits, figures, options["flip"])
    results += make_unified_rows(name, crowd, unified, options["flip"], options["crowd"], options["seed"])
    results += make_human_rows(name, ratings, by_name, people, options["flip"])
    rows = [row for row, _ in results]
    write_rows(out, rows)
    write_draws(out, results, options["seed"])
    for path in [*(out / f"{name}.png" for name in ("roc", "cmc", "scores", "stages")), *out.glob("sheet-*.png")]:
        path.unlink(missing_ok=True)  # of an evaluation of other splits; a sheet shows people
    others = report.beside(rows, datasets, published)
    middle = [line for title, file in draw_figures(out, rows, curves, splits, others)
              for line in ("", f"![{title}]({file})")]
    middle += show_humans(rows) + report.show_published(others)
    if run and run.config["schedule"] == "sequential":
        stages = report.read_stages(folder, run.config)
        middle += report.show_stages(stages, run.config)
        if stages:
            report.draw_stages(out / "stages.png", stages)
            middle += ["", "![AUC after each stage](stages.png)"]
    report.write_report(out, make_report(rows, splits, options["flip"], middle))
    for split in splits if options["sheet"] else []:
        draw_search(out, split, embed(split), options["seed"])
    for (domain, split), pair in headlines(rows).items():
        print(f"{domain + '/' + split:22s} {next(iter(pair.values())).metric:20s} "
              + "   ".join(f"{weights} {show_value(row)}" for weights, row in pair.items()))
    for row in rows:
        if row.domain == "all":
            print(f"{'everything':22s} {row.metric:30s} {row.weights} {show_value(row)}")
    for (domain, split), by_weights in human_rows(rows).items():
        for weights, found in by_weights.items():
            lead = found["model minus human AUC"]
            name = "everything" if domain == "all" else f"{domain}/{split}"
            print(f"{name:22s} {lead.metric:30s} {weights} {show_value(lead)}: "
                  f"{human_verdict(lead)}")
    print(f"written: {out}/report.html, report.md, results.json, results.csv and figures"
          + (f"; next: python analyze.py --run {folder}" if run else ""))
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
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
@click.pass_context
def compare(context: click.Context, runs: tuple[Path, ...], weights: str | None, splits: str | None, experts: bool,
            delta: float, out: Path) -> int:
    if context.get_parameter_source("delta") == click.core.ParameterSource.COMMANDLINE and not experts:
        raise InputError("--delta is the margin of non-inferiority to experts: give --experts too")
    if experts and weights == "foundation":
        raise InputError("--weights foundation: with --experts the tuned weights are compared; leave it out")
    folders = list(dict.fromkeys(folder.resolve() for folder in runs))
    if len(folders) < len(runs):
        raise InputError("a run is named twice: name each once")
    if experts:
        scored = [read_scored(folder, "tuned") for folder in runs]
    elif len(runs) == 1:
        if weights:
            raise InputError("--weights chooses between the figures of several runs: leave it out with one run")
        scored = [read_scored(runs[0], which) for which in ("foundation", "tuned")]
    else:
        scored = [read_scored(folder, weights) for folder in runs]
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.recipe, []).append(one)
    first, *others = groups.values()
    chosen = set(splits.split(",")) if splits else set()
    if experts and not others:
        raise InputError("--experts: want RUN and at least one expert of its domains")
    refuse_unshared(chosen, [first, *others], experts)
    table = compare_experts(first, others, chosen, delta) if experts else compare_groups([first, *others], chosen)
    make_folder(out, "--out")
    text = show_experts(table, first[0].config["domains"]) if experts else show_comparison(table)
    if experts:
        draw_experts(out / "comparison.png", table)
    else:
        shown = [row.weights for row, _ in first[0].found.values()]
        untouched = [row for row in read_rows(first[0].folder / "eval") if row.weights == "foundation"]
        draw_comparison(out / "comparison.png", table, untouched if "foundation" not in shown else [])
    write_atomically(out / "comparison.json", lambda path: path.write_text(json.dumps(table, indent=1) + "\n"))
    write_csv(out / "comparison.csv", table)
    write_atomically(out / "comparison.md", lambda path: path.write_text(text))
    if not experts:  # every figure is in the files; a terminal gets those that stand for their protocols
        text = show_comparison([row for row in table if row["headline"]] or table)
    print(text + f"written: {out}/comparison.md, .csv, .json and .png")
    return 0


@main.command(help="Test images that training images nearly repeat, and the figures without them: RUN/eval/leaks.csv "
                   "and leaks.json.")
@model_options
@click.option("--splits", metavar="NAMES", help="Comma-separated domain/split (default: all test splits).")
@click.option("--threshold", type=Number(-1, 1), default=0.95,
              help="Cosine to the nearest training image from which on a test image counts as leaked.")
@click.option("--by", type=click.Choice(["foundation", "tuned"]), default="foundation",
              help="Whose embeddings find the leaks: fine-tuning draws together what is merely alike.")
@click.option("--bootstrap", type=click.IntRange(2), default=500, help="Resamplings for the intervals.")
@click.option("--sheet", is_flag=True, help="Draw the nearest pairs, test image and training image: leaks-sheet.png.")
def leaks(**options) -> int:
    if not options["run"]:
        raise InputError("whose training images? give --run RUN")
    run = load_run(Path(options["run"]), options["allow_partial"])
    data, out = options["data"] or run.config["data"], run.folder / "eval"
    root = open_root(Path(data))
    splits = choose_splits(root, options["splits"], data)
    training = [root[domain]["train"] for domain in run.config["domains"] if "train" in root.get(domain, {})]
    if not training:
        raise InputError(f"{data}: none of the run's training splits is there: name the data root that holds them")

    def embedder(weights: str) -> Embedder:
        load = load_foundation if weights == "foundation" else load_tuned
        return make_embedder(lambda: load(run), weights, out, options)

    found, images = find_leaks(embedder(options["by"]), splits, training, options["threshold"])
    make_folder(out, "--run")
    for name in ("leaks.json", "leaks-sheet.png"):  # of other leaks than leaks.csv will list
        (out / name).unlink(missing_ok=True)
    write_csv(out / "leaks.csv", found, LEAK)
    if not found:
        print(f"no test image has a training image at a cosine of {options['threshold']:g} or more")
        return 0
    without: dict[str, list[int]] = {}
    for leak in found:
        without.setdefault(leak["split"], []).append(leak["row"])
    if options["sheet"]:  # the nearest 96, four pairs a line
        draw_sheet(out / "leaks-sheet.png", [[tile for pair in images[i : i + 4] for tile in (*pair, None)]
                                             for i in range(0, min(len(images), 96), 4)])
    tables = score_without(embedder("tuned"), splits, root, run, options["bootstrap"], options["seed"],
                           options["flip"], without, f"at {options['threshold']:g} by {options['by']}")
    write_atomically(out / "leaks.json", lambda path: path.write_text(
        json.dumps([asdict(row) for row in chain(*tables)], indent=1) + "\n"))
    heads = [headlines(table) for table in tables]
    for name, rows in without.items():
        key = tuple(name.split("/"))
        pair = [show_value(of[key]["tuned"]) for of in heads if key in of]
        print(f"{name:22s} {len(rows):,} leaked"
              + ("; all {}   without them {}".format(*pair) if len(pair) == 2 else ""))
    print(f"written: {out}/leaks.csv, leaks.json")
    return 0


@main.command(help="Time and memory of the largest cases beside plain numpy and scikit-learn, on generated embeddings.")
@click.option("--cases", default="reid,pairs,curve,search,million", metavar="NAMES",
              help="Which: re-identification, listed pairs of templates, ROC, and 1:N in 100,000 or 1,000,000.")
@click.option("--scale", type=Number(0.001, 1), default=1.0, help="Of all sizes.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Turns that the ways of a case take; of the median.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the result there, too.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
def bench(cases: str, scale: float, rounds: int, path: Path | None) -> int:
    import evaluate_bench  # here, because it builds on this module

    names = cases.split(",")
    if unknown := [name for name in names if name not in evaluate_bench.CASES]:
        raise InputError(f"--cases {unknown[0]}: there are {', '.join(evaluate_bench.CASES)}")
    return evaluate_bench.bench(names, scale, rounds, path)


@main.command(help="Write unit embeddings of your own pictures, prepared and embedded as evaluation does it.")
@click.argument("pictures", nargs=-1, required=True, metavar="IMAGE...|FOLDER", type=click.Path(path_type=Path))
@click.option("--run", metavar="RUN", required=True, help="Folder of a finished run.")
@click.option("--domain", type=click.Choice(DOMAINS),
              help="Fit pictures as this domain's training images were (default: the run's first).")
@click.option("--out", type=click.Path(path_type=Path), default="embeddings.npz", metavar="FILE",
              help="A .npz (arrays files and embeddings) or .csv to write.")
@click.option("--allow-partial", is_flag=True, help="Accept a run that has not finished.")
@click.option("--flip/--no-flip", default=True, help="Add the embedding of the mirrored image.")
@click.option("--batch", type=click.IntRange(1), default=64, help="Images per forward pass.")
@click.option("--workers", type=click.IntRange(0), default=LOADERS, help="Loader processes.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
def embed(pictures: tuple[Path, ...], run: str, domain: str | None, out: Path, allow_partial: bool, flip: bool,
          batch: int, workers: int, device: str) -> int:
    if out.suffix not in (".npz", ".csv"):
        raise InputError(f"--out {out}: want a file that ends in .npz or .csv")
    if out.exists():
        raise InputError(f"{out} exists: remove it, or choose another --out")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: {out.parent}: no such folder; make it, or choose another --out")
    paths, opened, where = find_pictures(pictures), load_run(Path(run), allow_partial), pick_device(device)
    files = Pictures(paths, **find_fitting(opened, domain))
    model = load_tuned(opened).to(where)
    rows, parts = [], []
    with tqdm(total=len(paths), desc="embed", unit="img", disable=None) as bar:
        for good, x in train.embed_rows(model, files, np.arange(len(paths)), where, batch, workers, flip):
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
    return 0


if __name__ == "__main__":
    run_command(main)
