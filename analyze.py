"""What the embedding space of a run looks like, and whether the abstract's claims hold for a folder of runs.

    python analyze.py --run runs/NAME            # transfer of principal components, separability, sharing, a map
    python analyze.py claims runs                # one verdict per claim, from every evaluated run below runs/
    python analyze.py bench                      # how long the transfer takes on this machine

RUN/analysis/ then holds analysis.json, report.md, the tables transfer.csv, further.csv, importance.csv, dprime.csv and
map.csv, and the figures transfer, deletion, importance, separability, sharing, spectrum and map, each as .pdf and .png.
Principal components are fitted on training images whose identities are not among the tested ones.
"""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

import backbones
import evaluate
import report
import train
from data_prep import DOMAIN_COLOURS, DOMAINS, InputError, Number, run_command
from data_prep.degrade import degrade
from data_prep.shards import ROLES, Split, open_root
from evaluate_bootstrap import Figure, bootstrap_counts, intervals, weighted_mean
from evaluate_classes import class_means
from evaluate_compare import Scored, aggregate, as_many, margin, read_scored, start_of
from evaluate_embed import Embedder, make_embedder, normalise
from evaluate_pairs import roc, tar_at_far
from evaluate_results import HEADLINE, Row, read_rows, write_csv
from evaluate_search import average_precision, inverse_negative_penalty, mates_in, name_identities, search_gallery
from run_folder import RUN_ROLES, load_foundation, load_run, load_tuned, read_json, write_atomically, write_json
from train_options import refuse_options
from train_ranks import pick_device

# numbers of components at which controls are measured; the claim itself is measured at every one
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 99, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
LEVELS = (0.99, 0.95)  # k* is the number of components that keeps so much of what is above chance
RANDOM_SEEDS = 10
TIE = 1e-6  # cosines that differ by less are equal: far above rounding in float32, far below what a score can show
FURTHER, FURTHER_PROBES, FURTHER_RANDOM = (10, 30), 2000, 3  # other metrics: ks beside the claim's and D; probes; bases
FITTED = 20  # at most so many images per dimension are fitted on: more do not change a covariance, only take time
ROWS = 1 << 16  # vectors handled at once
FEW = 20  # identities below which the bootstrap's intervals are too narrow
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (  # Okabe-Ito
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
GREY = "#999999"
SPACE_COLOURS = {"tuned": BLUE, "foundation": GREY, "pixels": GREEN}

# ---------------------------------------------------------------- tasks


@dataclass
class Task:
    """What one domain contributes: rows to fit on, and a test on other identities.

    A projection is scored by the share of probes whose nearest gallery vector is a mate. The gallery vectors are single
    images for people, and class means for objects.
    """

    domain: str
    split: Split  # the test split
    train: Split
    fit: np.ndarray  # rows of the training split, identities disjoint from the tested ones
    probe: np.ndarray  # rows of the test split, [n]
    gallery: np.ndarray  # rows of the test split (people) or of the training split (objects)
    group: np.ndarray  # [gallery] the gallery vector 0..m-1 that a row is averaged into; all different for people
    target: np.ndarray  # [n] identity of each probe
    mates: list[np.ndarray]  # [n] gallery vectors that are right, at least one
    ignored: list[np.ndarray]  # [n] gallery vectors that do not count: the probe itself, its identity under its camera

    @property
    def vectors(self) -> int:
        """Number of gallery vectors, m."""
        return int(self.group.max()) + 1

    def chance(self) -> float:
        """Expected share of hits of a random nearest vector."""
        m = self.vectors
        return float(np.mean([len(right) / (m - len(out))
                              for right, out in zip(self.mates, self.ignored, strict=True)]))


def find_splits(splits: dict[str, Split], test: Split | None = None) -> tuple[Split, Split] | None:
    """Training split and test split (default: the first in distribution) of a domain, or None where it lacks one."""
    tests = [test] if test else [s for s in splits.values() if s.protocol and not s.protocol.get("ood")]
    return (splits["train"], tests[0]) if "train" in splits and tests else None


def choose_pairs(root: dict[str, dict[str, Split]], domains: list[str], names: str | None, where: str
                 ) -> tuple[dict[str, tuple[Split, Split]], dict[str, str]]:
    """Training and test split of each domain; and of the domains that are left out, why.

    Args:
        root, where: the data root and its name.
        domains: of the run.
        names: of --splits; a domain that it does not name is tested on its first split in distribution.
    """
    chosen: dict[str, Split] = {}
    for split in evaluate.choose_splits(root, names, where) if names else []:
        if split.domain not in domains:
            raise InputError(f"--splits: {split.domain}/{split.name}: the run has no {split.domain}; it has "
                             f"{', '.join(domains)}")
        if split.domain in chosen:
            raise InputError(f"--splits: two of {split.domain}: one test split of a domain is analysed")
        chosen[split.domain] = split
    pairs, left_out = {}, {}
    for domain in domains:
        splits = root.get(domain, {})
        if pair := find_splits(splits, chosen.get(domain)):
            pairs[domain] = pair
            if rest := [s.name for s in splits.values() if s.protocol and s.folder != pair[1].folder]:
                print(f"  {domain}: tested on {pair[1].name}, not on {', '.join(rest)} (--splits chooses)")
        else:
            left_out[domain] = "no test split in distribution" if "train" in splits else "no training split"
    return pairs, left_out


class Degraded(Split):
    """A training split as `train.py --degrade` shows it: each image degraded by up to `severity`, always alike."""

    def __init__(self, folder: Path, severity: float, seed: int) -> None:
        super().__init__(folder)
        self.severity, self.seed = severity, seed
        self.name += f"-degraded{100 * severity:g}-{seed}"  # its embeddings are kept apart

    def __reduce__(self):
        return Degraded, (self.folder, self.severity, self.seed)

    def image(self, row: int) -> torch.Tensor:
        rng = np.random.default_rng((self.seed, DOMAINS.index(self.domain), row))
        return degrade(super().image(row), self.severity * rng.random(), rng)[0]


def make_task(base: Split, test: Split, readable: tuple[np.ndarray, np.ndarray], limit: int, seed: int) -> Task | None:
    """The task of a domain, or None where too little is left to fit or to test.

    Classes that are in both splits (objects) are divided: every second one is fitted on, the others are tested.
    Identities that other tasks test are still among its rows to fit on: see `drop_tested`.

    Args:
        base: the training split.
        test: the test split.
        readable: bool, rows of either split that may be used.
        limit: at most so many probes.
        seed: of their choice.

    Raises:
        InputError: one identity alone is tested.
    """
    domain, rng = base.domain, np.random.default_rng((seed, DOMAINS.index(base.domain)))
    shared = sorted(set(test.classes) & set(base.classes))
    for_fit, for_test = set(shared[::2]), set(shared[1::2])
    tested = np.array([name not in for_fit for name in test.classes])
    fitted = np.array([name not in for_test for name in base.classes])
    fit = np.flatnonzero(fitted[base.labels] & readable[0])
    rows = np.flatnonzero(np.where(test.labels >= 0, tested[test.labels], True) & readable[1])

    if domain == "object":
        place = {name: i for i, name in enumerate(base.classes)}
        label = np.array([place.get(name, -1) for name in test.classes])[test.labels]
        probe = rng.permutation(rows[label[rows] >= 0])[:limit]
        found = np.unique(label[probe])
        gallery = np.flatnonzero(np.isin(base.labels, found) & readable[0])
        group = np.searchsorted(found, base.labels[gallery])
        if len(fit) < 2 or not len(found) or len(np.unique(group)) < len(found):
            return None
        refuse_one(test, found)
        mates = list(np.searchsorted(found, label[probe])[:, None])
        return Task(domain, test, base, fit, probe, gallery, group, label[probe], mates, [mates[0][:0]] * len(probe))

    roles, cameras, labels = test.optional("role"), test.optional("camera"), np.array(test.labels)
    gallery = rows[roles[rows] != ROLES.index("probe")]
    probe = rows[roles[rows] <= ROLES.index("probe")]  # without roles every image is a probe and in the gallery
    probe = rng.permutation(probe[labels[probe] >= 0])[:limit]
    same, kept, mates, ignored = mates_in(labels[gallery]), [], [], []
    for row in probe:
        places = same(labels[row])
        out = gallery[places] == row
        if test.protocol["name"] == "reid":
            out |= cameras[gallery[places]] == cameras[row]
        if not out.all():
            kept.append(row)
            mates.append(places[~out])
            ignored.append(places[out])
    if len(fit) < 2 or not kept:
        return None
    probe = np.array(kept)
    refuse_one(test, labels[probe])
    return Task(domain, test, base, fit, probe, gallery, np.arange(len(gallery)), labels[probe], mates, ignored)


def refuse_one(test: Split, target: np.ndarray) -> None:
    """Intervals are over identities: of one alone every resampling is the same, and the interval has no width."""
    if len(np.unique(target)) < 2:
        raise InputError(f"{test.folder}: one identity alone can be tested, want at least 2: name another split of "
                         f"{test.domain} with --splits")


def drop_tested(tasks: list[Task], most: int, seed: int) -> None:
    """Take from the rows that each task is fitted on every identity that ANY task tests: people may be in several.

    Args:
        tasks: changed in place.
        most: rows a task at most, drawn at random: more would not be used, and each costs a read.
        seed: of the draw.
    """
    tested = set()
    for task in tasks:
        rows = task.probe if task.domain == "object" else np.union1d(task.probe, task.gallery)
        tested.update(name_identities(task.split, rows).tolist())
    known = np.array(sorted(tested - {""}))
    for task in tasks:
        rows = np.sort(np.random.default_rng((seed, DOMAINS.index(task.domain))).permutation(task.fit)[:most])
        task.fit = rows[~np.isin(name_identities(task.train, rows), known)]


def vectors_of(task: Task, embedded: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Probe vectors [n, D] and gallery vectors [m, D] of a task, from the unit embeddings of its two splits.

    An object class is the mean of its unit embeddings in the full space, as in `class_means`, and is centred
    and projected as an image is. (Normalising every image anew in each subspace before averaging would weigh it by how
    little of it the subspace holds, and would cost a pass over the training set for every k. So projecting the mean is
    the mean of the projections, and one sweep serves people and objects.)
    """
    base, test = embedded
    x, m = base if task.domain == "object" else test, task.vectors
    if m == len(task.gallery):  # single images: a million of them are gigabytes, and are not held in float64 as well
        return test[task.probe], x[task.gallery[np.argsort(task.group)]]
    means = np.zeros((m, x.shape[1]))
    for start in range(0, len(task.gallery), ROWS):  # by blocks: a copy of a million images would be gigabytes
        part = slice(start, start + ROWS)
        means += class_means(x[task.gallery[part]], task.group[part], m)
    return test[task.probe], means / np.bincount(task.group)[:, None]


class Embeddings:
    """Unit embeddings [M, D] in their file: rows are read when they are asked for, since a million are gigabytes."""

    def __init__(self, path: Path) -> None:
        self.raw = np.load(path, mmap_mode="r", allow_pickle=False)
        self.shape = self.raw.shape

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """float32 [rows, D]; NaN in those of unreadable images."""
        return normalise(np.array(self.raw[rows]))


def read_embeddings(embedder: Embedder, split: Split) -> Embeddings:
    """The embeddings of a split, computed where they are not there."""
    return Embeddings(embedder.prepare(split))


# ---------------------------------------------------------------- subspaces


def principal_components(x: np.ndarray, device: torch.device | str = "cpu"
                         ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [D], components as columns [D, D] by falling variance, variances [D] of rows x [n, D] (float64)."""
    rows = torch.as_tensor(x, device=device).double()
    mean = rows.mean(0)
    rows = rows - mean
    variances, vectors = torch.linalg.eigh(rows.T @ rows / max(len(rows) - 1, 1))
    return mean.cpu().numpy(), vectors.flip(1).cpu().numpy(), variances.flip(0).clamp(min=0).cpu().numpy()


class Turned:
    """Vectors [m, D], centred and turned into a basis whenever a block of them is read: no second copy is held."""

    def __init__(self, x: np.ndarray | torch.Tensor, mean: np.ndarray, basis: np.ndarray, device: torch.device | str
                 ) -> None:
        self.x, self.device = x, device
        self.mean, self.basis = (to_device(np.ascontiguousarray(part), device) for part in (mean, basis))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Coordinates of some rows, float32 [rows, columns of the basis]."""
        # centred before they are turned: afterwards the rounding of a large mean would be in every small coordinate
        return (to_device(self.x[rows], self.device) - self.mean) @ self.basis


Vectors = np.ndarray | torch.Tensor | Turned


def hits_one_by_one(probe: np.ndarray, gallery: np.ndarray, task: Task, ks: list[int]) -> np.ndarray:
    """For projected vectors, whether each probe's nearest gallery vector is a mate with the first k coordinates.

    The definition, as a full evaluation for every k; `hits_by_k` gives the same. A mate must be nearer than every other
    vector by more than a TIE: with one coordinate every cosine is 1 or -1, and rounding must not choose among them.

    Args:
        probe: [n, D] coordinates, largest component first.
        gallery: [m, D] likewise.
        task: its mates and ignored vectors.
        ks: numbers of coordinates, rising.

    Returns:
        bool [len(ks), n].
    """
    hits = np.empty((len(ks), len(probe)), dtype=bool)
    for row, k in zip(hits, ks, strict=True):
        scores = unit(probe[:, :k]) @ unit(gallery[:, :k]).T
        for i, (right, out) in enumerate(zip(task.mates, task.ignored, strict=True)):
            wrong = np.delete(scores[i], np.concatenate([right, out]))
            row[i] = scores[i, right].max() - wrong.max(initial=-np.inf) > TIE
    return hits


def hits_by_k(probe: Vectors, gallery: Vectors, task: Task, ks: list[int],
              device: torch.device | str = "cpu", size: int | None = None) -> np.ndarray:
    """`hits_one_by_one` at the cost of one evaluation of scores and, per k, three passes over a block in the cache.

    With one coordinate more, S += q_k g_kᵀ and |g|² += g_k².

    Args:
        device: of the computation.
        size: see `sweep`.
    """
    columns, edges = torch.tensor(ks, device=device) - 1, [0, *ks]

    def sums(products: torch.Tensor) -> torch.Tensor:
        return products.cumsum(1, dtype=torch.float64)[:, columns]

    def advance(i: int, scores: torch.Tensor, x: torch.Tensor, g: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
        a, b = edges[i : i + 2]
        return scores.addr_(x[a], g[a]) if b == a + 1 else scores.addmm_(x[a:b].T, g[a:b])

    return sweep(probe, gallery, task, len(ks), sums, advance, device, size)


def hits_without_each(probe: Vectors, gallery: Vectors, task: Task, count: int,
                      device: torch.device | str = "cpu", size: int | None = None) -> np.ndarray:
    """Whether each probe's nearest gallery vector is a mate when one of the first `count` coordinates is left out.

    One product of all coordinates, and per coordinate S - q_i g_iᵀ and |g|² - g_i²: `hits_one_by_one` of what is left
    gives the same.

    Args:
        probe: [n, D] coordinates.
        gallery: [m, D] likewise.
        task: its mates and ignored vectors.
        count: coordinates that are left out, each alone.
        device: of the computation.
        size: see `sweep`.

    Returns:
        bool [count, n].
    """
    def sums(products: torch.Tensor) -> torch.Tensor:
        return products.sum(1, keepdim=True, dtype=torch.float64) - products[:, :count]

    def advance(i: int, scores: torch.Tensor, x: torch.Tensor, g: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
        if i == 0:
            scores.addmm_(x.T, g)
        return torch.addr(scores, x[i], g[i], alpha=-1, out=spare)

    return sweep(probe, gallery, task, count, sums, advance, device, size)


def sweep(probe: Vectors, gallery: Vectors, task: Task, steps: int, sums: Callable[[torch.Tensor], torch.Tensor],
          advance: Callable[..., torch.Tensor], device: torch.device | str, size: int | None) -> np.ndarray:
    """Score every probe in one subspace after another, by blocks of scores that stay in the cache.

    The nearest vector is the largest S / |g|, since a probe's own length changes no order. The scores of mates are kept
    apart (there are few), so that S holds the wrong ones alone and the largest of a row is enough. Memory: the probes,
    a block of the gallery twice with its inverse lengths [block, steps], the best scores [steps, n] of mates and of
    others, and for each of torch's threads two blocks of scores.

    Args:
        probe, gallery: coordinates, [n, D] and [m, D].
        task: its mates and ignored vectors.
        steps: number of subspaces.
        sums: products of coordinates [b, D] -> what they sum to in each subspace, float64 [b, steps].
        advance: number of the step, scores [b, m] (0 before the first step, which it may change: -inf stays so),
            coordinates [D, b] and [D, m], a spare block -> the scores of that step.
        device: of the computation.
        size: scores held at once (default: what fits the cache of a core; on a GPU 2**26).

    Returns:
        bool [steps, n].
    """
    size = size or (1 << 19 if torch.device(device).type == "cpu" else 1 << 26)
    q = torch.as_tensor(probe[:], device=device)
    # of a block of the gallery: scores of 32 probes, so that what is read of the gallery is little beside them
    width = min(len(gallery), max(size // 32, 1), 1 << 18)
    block = max(1, min(size // width, len(q)))
    best, wrong = (torch.full((steps, len(q)), -torch.inf, dtype=q.dtype, device=device) for _ in range(2))
    many, flat = np.array([len(mates) for mates in task.mates]), np.concatenate(task.mates)
    places = (many.cumsum() - many)[:, None] + np.minimum(np.arange(many.max()), many[:, None] - 1)
    mates = torch.as_tensor(flat[places], device=device)  # [n, most]; who has fewer has the last once more
    owner = np.repeat(np.arange(len(many)), many + np.array([len(out) for out in task.ignored]))  # rising
    apart = np.concatenate([part for pair in zip(task.mates, task.ignored, strict=True) for part in pair])
    apart = torch.as_tensor(np.stack([owner, apart]), device=device)  # vectors that are no wrong ones

    def score(first: int, start: int, g: torch.Tensor, by_coordinate: torch.Tensor, inverse: torch.Tensor) -> None:
        rows = slice(first, first + block)
        x = q[rows]
        for place in range(many[rows].max()):  # the probes' first mates, second mates, ...
            right = mates[rows, place] - start
            inside = (right >= 0) & (right < len(g))
            right = right.clamp(0, len(g) - 1)
            cosine = sums(x * g[right]).to(x.dtype).T * inverse[:, right]
            best[:, rows] = torch.where(inside, torch.maximum(best[:, rows], cosine), best[:, rows])
        x = x.T.contiguous()
        scores = torch.zeros(x.shape[1], len(g), dtype=x.dtype, device=device)
        mine = apart[:, slice(*np.searchsorted(owner, [first, first + block]))] - torch.tensor(
            [[first], [start]], device=device)
        mine = mine[:, (mine[1] >= 0) & (mine[1] < len(g))]
        scores[mine[0], mine[1]] = -torch.inf
        cosine, highest = torch.empty_like(scores), torch.empty_like(best[:, rows])
        for i in range(steps):
            torch.mul(advance(i, scores, x, by_coordinate, cosine), inverse[i], out=cosine)
            torch.amax(cosine, 1, out=highest[i])
        wrong[:, rows] = torch.maximum(wrong[:, rows], highest)

    threads = torch.get_num_threads()
    for start in range(0, len(gallery), width):
        g = torch.as_tensor(gallery[start : start + width], device=device)
        inverse = torch.cat([sums(part.square()).clamp(min=1e-24).rsqrt().to(g.dtype)
                             for part in g.split(4096)]).T.contiguous()  # [steps, width]
        work = partial(score, start=start, g=g, by_coordinate=g.T.contiguous(), inverse=inverse)
        # a thread a block: operations as short as these would spend their time waiting for one another's threads
        torch.set_num_threads(1 if q.device.type == "cpu" else threads)
        try:
            with ThreadPoolExecutor(threads if q.device.type == "cpu" else 1, initializer=torch.set_num_threads,
                                    initargs=(torch.get_num_threads(),)) as pool:
                list(pool.map(work, range(0, len(q), block)))
        finally:
            torch.set_num_threads(threads)
    lead = torch.cat([sums(part.square()).clamp(min=0).sqrt().to(q.dtype) for part in q.split(4096)]).T * TIE
    return (best - lead > wrong).cpu().numpy()


def unit(x: np.ndarray) -> np.ndarray:
    """Rows divided by their lengths."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def finite(value: float) -> float | None:
    """A number for JSON, which knows no NaN."""
    return float(value) if math.isfinite(value) else None


def show(figure: Figure) -> dict[str, float | None]:
    """A figure for JSON."""
    return {"value": finite(figure.value), "low": finite(figure.low), "high": finite(figure.high)}


def kept(scores: np.ndarray, full: np.ndarray | float, chance: float) -> np.ndarray:
    """(score - chance) / (full - chance); NaN where the full space is not above chance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(full > chance, (scores - chance) / (full - chance), np.nan)


def components_needed(share: np.ndarray, ks: list[int], level: float) -> np.ndarray:
    """k*: the smallest of ks from which on every larger one keeps at least `level`; NaN: not even the largest.

    Args:
        share: what is kept, [..., len(ks)].

    Returns:
        float [...].
    """
    short = ~(np.asarray(share) >= level)  # NaN is short, too
    after = np.where(short.any(-1), len(ks) - short[..., ::-1].argmax(-1), 0)  # one behind the last that is short
    return np.append(np.asarray(ks, dtype=float), np.nan)[after]


@dataclass
class Curve:
    """How well the first k coordinates of some basis serve a task."""

    kind: str  # components, own mean, bottom, deleted, pooled, foundation, random
    fit: str  # the task whose components these are, or whose mean a random basis is used with
    test: str
    ks: list[int]
    score: np.ndarray  # [len(ks)]
    kept: np.ndarray  # [len(ks)]
    draws: np.ndarray  # of `kept`, [resamplings, len(ks)]
    full: np.ndarray | None = None  # draws of the score of all components, [resamplings]
    number: int | None = None  # of a random basis

    def at(self, k: int) -> Figure:
        """What k coordinates keep."""
        i = self.ks.index(k)
        return Figure(float(self.kept[i]), self.draws[:, i])


def measure_curve(kind: str, fit: str, task: Task, vectors: tuple[np.ndarray | torch.Tensor, ...], mean: np.ndarray,
                  basis: np.ndarray, ks: list[int], counts: np.ndarray | torch.Tensor, device: torch.device | str
                  ) -> Curve:
    """Centre, rotate, and score the first k coordinates for every k of ks, the last of which is D.

    Args:
        vectors: probe and gallery vectors; tensors on the device are not copied.
        mean: [D], subtracted from both.
        basis: [D, D], orthonormal columns.
        counts: [resamplings, n], how often each probe is drawn.
    """
    turned = (Turned(x, mean, basis, device) for x in vectors)
    score, drawn = resample(hits_by_k(*turned, task, ks, device), counts, device)
    chance = task.chance()
    return Curve(kind, fit, task.domain, ks, score, kept(score, score[-1], chance), kept(drawn, drawn[:, -1:], chance),
                 drawn[:, -1])


def resample(hits: np.ndarray, counts: np.ndarray | torch.Tensor, device: torch.device | str
             ) -> tuple[np.ndarray, np.ndarray]:
    """Share of hits [steps, n], and the same for each resampling: float64 [steps] and [resamplings, steps]."""
    hits, counts = to_device(hits, device), to_device(counts, device)
    drawn = counts @ hits.T / counts.sum(1, keepdim=True)  # exact sums: whole numbers below 2**24
    return hits.mean(1, dtype=torch.float64).cpu().numpy(), drawn.cpu().numpy()


def measure_importance(task: Task, vectors: tuple[np.ndarray | torch.Tensor, ...], mean: np.ndarray, basis: np.ndarray,
                       full: Curve, count: int, counts: np.ndarray | torch.Tensor, device: torch.device | str
                       ) -> dict[str, list[float]]:
    """What each of the first `count` components is worth: score without it alone - score of all of them.

    Args:
        vectors, mean, basis, counts: see `measure_curve`.
        full: a curve of the same mean whose last k is D.

    Returns:
        "change" by component, with "low" and "high", paired by resampling.
    """
    turned = (Turned(x, mean, basis, device) for x in vectors)
    score, drawn = resample(hits_without_each(*turned, task, count, device), counts, device)
    low, high = np.quantile(drawn - full.full[:, None], [0.025, 0.975], axis=0)
    named = {"change": score - full.score[-1], "low": low, "high": high}
    return {name: np.round(values, 6).tolist() for name, values in named.items()}


def measure_further(task: Task, vectors: tuple[np.ndarray | torch.Tensor, ...], mean: np.ndarray, basis: np.ndarray,
                    ks: list[int], draws: int, seed: int, device: torch.device | str) -> dict[tuple[int, str], Figure]:
    """A task's other metrics with the first k coordinates, as evaluate.py computes them, by (k, metric).

    Of people rank-5, mAP and mINP; of objects the top 5 class means; of both AUC and TAR at 1 % FAR of equally many
    random pairs of test images of one identity and of two.

    Args:
        vectors, mean, basis: see `measure_curve`.
        ks: numbers of coordinates.
        draws, seed: of the bootstrap over identities.
    """
    target, every, found = task.target[:FURTHER_PROBES], np.arange(len(vectors[1])), {}
    pairs = train.matched_pairs(target, 5000, seed)
    for k in ks:
        probe, gallery = (Turned(x, mean, basis[:, :k], device) for x in vectors)
        q, g = unit(probe[:FURTHER_PROBES].cpu().numpy()), np.empty((len(gallery), k), dtype=np.float32)
        for start in range(0, len(g), ROWS):
            part = slice(start, start + ROWS)
            g[part] = unit(gallery[part].cpu().numpy())
        search = search_gallery(q, np.arange(len(q)), every, lambda i: (task.mates[i], task.ignored[i]),
                                         other=g, device=device)
        values = {"nearest-mean top-5": search.first <= 5} if task.domain == "object" else {
            "rank-5": search.first <= 5, "mAP": average_precision(search.ranks),
            "mINP": inverse_negative_penalty(search.ranks)}
        figures = intervals(
            lambda w, values=values: {name: weighted_mean(of, w) for name, of in values.items()},
            bootstrap_counts(target, draws, seed))
        if len(pairs):
            scores, same = (q[pairs[:, 0]] * q[pairs[:, 1]]).sum(1), np.arange(len(pairs)) < len(pairs) // 2
            order = np.argsort(-scores)  # once here: each resampling sorts them anew, and what is sorted goes faster
            scores, same, (left, right) = scores[order], same[order], pairs[order].T

            def accept(weights: np.ndarray | None, scores=scores, same=same) -> dict[str, float]:
                far, tar = roc(scores, same, weights)
                return {"pair auc": float(np.trapezoid(tar, far)), "tar@far=0.01": tar_at_far(far, tar, 0.01)}

            figures |= intervals(accept, (np.where(same, w[left], w[left] * w[right]) for w in
                                                   bootstrap_counts(target, draws, seed)))
        found |= {(k, name): figure for name, figure in figures.items()}
    return found


def to_device(x: np.ndarray | torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A float32 tensor on the device; one that is already there as it is."""
    return torch.as_tensor(x, dtype=torch.float32, device=device)


def transfer(embedded: dict[str, tuple[np.ndarray, np.ndarray]], tasks: list[Task], headline: int, draws: int,
             seed: int, *, foundation: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
             delete: tuple[int, int] = (0, 0), importance: int = 0, controls: bool = True,
             device: torch.device | str = "cpu") -> dict:
    """Components of every task, used by every task, beside the controls.

    Args:
        embedded: domain -> unit embeddings of its training and of its test split.
        tasks: the tasks.
        headline: the k of the claim.
        draws: bootstrap resamplings, by identity.
        seed: of the sub-sampling and the random subspaces.
        foundation: embeddings of the untouched backbone, whose components are then used on `embedded`, too.
        delete: components a <= i < b that are left out, for one more figure (counted from 0; a = b: none).
        importance: so many of the first components are left out, each alone; 0: none.
        controls: measure all of them; else random subspaces alone.
        device: of the sweeps.

    Returns:
        "curves": dictionaries of `Curve`; "pairs": one per (fit, test): kept at the headline k with its interval, k*
        for each level with its interval (and on the k of the controls, beside that of random subspaces), the raw score
        (not centred) and that of all components, identities that are tested, and the controls; "all_tasks": for each
        fit the k* from which on EVERY task keeps that much;
        "images_per_task", "rank_limited", "dim", "bases": (mean, components, variances) by domain.
    """
    rng, D = np.random.default_rng(seed), next(iter(embedded.values()))[0].shape[1]
    n = min(FITTED * D, *(len(task.fit) for task in tasks))
    chosen = {task.domain: rng.permutation(task.fit)[:n] for task in tasks}
    fits = {domain: principal_components(embedded[domain][0][rows], device) for domain, rows in chosen.items()}
    pooled = principal_components(np.concatenate([embedded[domain][0][rows[: max(n // len(tasks), 2)]]
                                                  for domain, rows in chosen.items()]), device)
    turns = [np.linalg.qr(np.random.default_rng((seed, i)).standard_normal((D, D)))[0] for i in range(RANDOM_SEEDS)]
    untouched = {}
    if foundation and next(iter(foundation.values()))[0].shape[1] == D:
        untouched = {domain: principal_components(foundation[domain][0][rows], device)[1]
                     for domain, rows in chosen.items()}
    every, grid = list(range(1, D + 1)), sorted({k for k in GRID if k < D} | {headline, D})
    backwards = sorted({*grid, *(D - k for k in grid if k < D)})
    curves, pairs, every_k = [], [], {}
    per_task = len(tasks) * (1 + 2 * controls + bool(untouched) + RANDOM_SEEDS) + controls
    bar = tqdm(total=len(tasks) * per_task, desc="transfer", unit="sweep", disable=None)
    for task in tasks:
        vectors = tuple(to_device(x, device) for x in vectors_of(task, embedded[task.domain]))
        counts = np.array(list(bootstrap_counts(task.target, draws, seed)), dtype=np.float32)
        counts = to_device(counts.reshape(draws, len(task.probe)), device)
        identity, chance = np.eye(D), task.chance()

        def measure(kind: str, fit: str, mean: np.ndarray, basis: np.ndarray, ks: list[int], task=task,
                    vectors=vectors, counts=counts) -> Curve:
            bar.update()
            return measure_curve(kind, fit, task, vectors, mean, basis, ks, counts, device)

        raw = measure_curve("raw", "", task, vectors, np.zeros(D), identity, [D], counts, device).score[0]
        own = fits[task.domain][0]
        if controls:
            curves.append(measure("pooled", "all", pooled[0], pooled[1], grid))
            pool = curves[-1].at(headline)
        for other in tasks:
            mean, basis, _ = fits[other.domain]
            curve = measure("components", other.domain, mean, basis, every)
            curves.append(curve)
            found = curve.at(headline)
            # with the same mean as the components: else the control would differ in its centring, too
            random = [measure("random", other.domain, mean, turn, grid) for turn in turns]
            for number, one in enumerate(random):
                one.number = number
            curves += random
            chance_level = Figure(float(np.mean([c.at(headline).value for c in random])),
                                  np.mean([c.at(headline).draws for c in random], axis=0))
            mean_random, coarse = np.mean([c.kept for c in random], axis=0), take(curve, "", grid).kept
            pair = {"fit": other.domain, "test": task.domain, "identities": len(np.unique(task.target)),
                    "chance": chance, "raw": raw, "full": curve.score[-1], "k": headline,
                    "full_low": float(np.quantile(curve.full, 0.025)),
                    "full_high": float(np.quantile(curve.full, 0.975)),
                    "kept": finite(found.value), "low": finite(found.low), "high": finite(found.high),
                    "random": show(chance_level), "over_random": show(minus(found, chance_level))}
            for level in LEVELS:
                needed = Figure(float(components_needed(curve.kept, every, level)),
                                components_needed(curve.draws, every, level))
                pair[f"k{100 * level:g}"] = show(needed)
                every_k.setdefault(other.domain, {}).setdefault(f"k{100 * level:g}", []).append(needed)
                pair[f"k{100 * level:g}_grid"] = finite(components_needed(coarse, grid, level))
                pair[f"k{100 * level:g}_random"] = finite(components_needed(mean_random, grid, level))
            if untouched:
                curves.append(measure("foundation", other.domain, mean, untouched[other.domain], grid))
                theirs = curves[-1].at(headline)
                pair |= {"foundation": show(theirs), "over_foundation": show(minus(found, theirs))}
            if controls:
                few = sorted({k for k in FURTHER if k < D} | {headline, D})
                further = measure_further(task, vectors, mean, basis, few, draws, seed, device)
                # all of D random coordinates are the whole space: the same as all components
                by_chance = [measure_further(task, vectors, mean, turn, [k for k in few if k < D], 0, seed, device)
                             for turn in turns[:FURTHER_RANDOM]]
                pair["further"] = [{"metric": metric, "k": k, **show(figure), "random": finite(
                    np.mean([one[k, metric].value for one in by_chance])) if k < D else None}
                    for (k, metric), figure in further.items()]
                pair["pooled"] = show(pool)
                bottom = measure("bottom", other.domain, mean, basis[:, ::-1], backwards)
                curves += [take(bottom, "bottom", grid), reverse(bottom, grid)]
                pair["bottom"] = show(bottom.at(headline))
                curves.append(measure("own mean", other.domain, own, basis, grid))
                pair["own_mean"] = show(curves[-1].at(headline))
            if delete[1] > delete[0]:
                a, b = delete
                rest = np.concatenate([basis[:, :a], basis[:, b:], basis[:, a:b]], axis=1)
                less = measure_curve("", "", task, vectors, mean, rest, [D - (b - a), D], counts, device)
                pair["deleted"] = {"from": a, "to": b} | show(less.at(D - (b - a)))
            if importance and D > 1:
                pair["importance"] = measure_importance(task, vectors, mean, basis, curve, min(importance, D), counts,
                                                        device)
            pairs.append(pair)
    bar.close()
    return {"curves": curves, "pairs": pairs, "all_tasks": [
        {"fit": fit} | {name: show(largest(found)) for name, found in of.items()} for fit, of in every_k.items()],
            "images_per_task": n, "rank_limited": n < 5 * D, "dim": D, "bases": fits}


def largest(figures: list[Figure]) -> Figure:
    """The largest of several figures with as many resamplings; NaN where one of them is."""
    return Figure(float(np.max([f.value for f in figures])), np.max([f.draws for f in figures], axis=0))


def minus(a: Figure, b: Figure) -> Figure:
    """The difference of two figures with paired resamplings."""
    return Figure(a.value - b.value, a.draws - b.draws, a.count)


def take(curve: Curve, kind: str, ks: list[int]) -> Curve:
    """A curve at some of its ks."""
    at = [curve.ks.index(k) for k in ks]
    return Curve(kind, curve.fit, curve.test, ks, curve.score[at], curve.kept[at], curve.draws[:, at])


def reverse(bottom: Curve, grid: list[int]) -> Curve:
    """Deleting the first k components is keeping the last D - k."""
    D = grid[-1]
    ks = [k for k in grid if k < D]
    curve = take(bottom, "deleted", [D - k for k in ks])
    curve.ks = ks
    return curve


# ---------------------------------------------------------------- what tasks share


def participation_ratio(variances: np.ndarray) -> float:
    """(Σ λ)² / Σ λ²: how many dimensions carry the variance."""
    return float(variances.sum() ** 2 / np.square(variances).sum())


def principal_angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angles between two subspaces, degrees, rising; a and b hold orthonormal columns [D, k]."""
    return np.degrees(np.arccos(np.clip(np.linalg.svd(a.T @ b, compute_uv=False), 0, 1)))


def subspace_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """|AᵀB|² / k of orthonormal columns [D, k]: the mean squared cosine of the principal angles; by chance k / D."""
    return float(np.square(a.T @ b).sum() / a.shape[1])


def debiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of two embeddings [n, D] and [n, E] of the same n > 3 images.

    Source: Kornblith et al. 2019 with the unbiased HSIC of Song et al. 2012: 0, not a positive number, is expected of
    unrelated embeddings. A few outliers can dominate it (Davari et al. 2023).
    """
    n, grams = len(x), []
    for z in (x.astype(np.float64), y.astype(np.float64)):
        gram = z @ z.T
        np.fill_diagonal(gram, 0)
        grams.append(gram)

    def hsic(k: np.ndarray, l: np.ndarray) -> float:
        return ((k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ l.sum(0)) / (n - 2))

    k, l = grams
    return float(hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l)))


def scatter_ratio(x: np.ndarray, labels: np.ndarray) -> float:
    """Scatter of class means about the mean, over scatter of images about their class mean; x [n, D]."""
    labels = np.unique(labels, return_inverse=True)[1]
    size = np.bincount(labels)
    means = class_means(x, labels, len(size)) / size[:, None]
    between = (size * np.square(means - x.mean(0, dtype=np.float64)).sum(1)).sum()
    return float(between / np.square(x - means[labels]).sum())


def d_primes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(mean a - mean b) / √((var a + var b) / 2) of each column of [n, D] and [m, D]; NaN where nothing varies."""
    spread = np.sqrt((a.var(0) + b.var(0)) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, (a.mean(0) - b.mean(0)) / spread, np.nan)


def measure_components(embedded: dict, tasks: list[Task], bases: dict, seed: int, pairs: int = 4000) -> list[dict]:
    """What each single component of each task says about the tasks and about identities.

    Returns:
        Rows fit, component (from 1), test, variance (share), task d' (probes of `test` against those of the others) and
        identity d' (products of coordinates, a component's part of the cosine, of pairs of one person and of two).
    """
    rows = []
    drawn = {task.domain: train.matched_pairs(task.target, pairs, seed) for task in tasks}
    for fit, (mean, basis, variances) in bases.items():
        z = {task.domain: (embedded[task.domain][1][task.probe] - mean) @ basis for task in tasks}
        for test, own in z.items():
            rest = [other for name, other in z.items() if name != test]
            apart = d_primes(own, np.concatenate(rest)) if rest else np.full(len(mean), np.nan)
            left, right = own[drawn[test][:, 0]], own[drawn[test][:, 1]]
            half = len(left) // 2
            known = d_primes(*np.split(left * right, [half])) if half else np.full(len(mean), np.nan)
            rows += [{"fit": fit, "component": i + 1, "test": test, "variance": v, "task_dprime": finite(t),
                      "identity_dprime": finite(p)}
                     for i, (v, t, p) in enumerate(zip(variances / variances.sum(), apart, known, strict=True))]
    return rows


def measure_sharing(embedded: dict, tasks: list[Task], bases: dict, headline: int) -> dict:
    """Overlap, angles, explained variance and mean cosines of every pair of tasks; spectrum and scatter of each."""
    table, by_task, means = [], {}, {}
    for task in tasks:
        _, _, variances = bases[task.domain]
        x = embedded[task.domain][1][task.probe]
        total = np.cumsum(variances) / variances.sum()
        means[task.domain] = x.mean(0, dtype=np.float64)
        by_task[task.domain] = {
            "participation_ratio": participation_ratio(variances),
            **{f"components_for_{share}": int(np.searchsorted(total, share / 100) + 1) for share in (50, 90, 95)},
            "scatter_ratio": finite(scatter_ratio(x, task.target))}
    for a, (_, first, _) in bases.items():
        for b, (_, second, variances) in bases.items():
            u, v = first[:, :headline], second[:, :headline]
            angles = principal_angles(u, v)
            covered = (variances * np.square(u.T @ second).sum(0)).sum() / variances.sum()
            cosine = means[a] @ means[b] / np.linalg.norm(means[a]) / np.linalg.norm(means[b])
            table.append({"a": a, "b": b, "overlap": subspace_overlap(u, v), "smallest_angle": float(angles[0]),
                          "median_angle": float(np.median(angles)), "largest_angle": float(angles[-1]),
                          "explained": float(covered), "mean_cosine": float(cosine)})
    D = len(next(iter(bases.values()))[0])
    return {"k": headline, "chance": headline / D, "pairs": table, "tasks": by_task}


# ---------------------------------------------------------------- separability


def pixel_statistics(split: Split, rows: np.ndarray) -> np.ndarray:
    """A dozen statistics of colour, contrast, gradients and border of each image, float64 [n, 12].

    They know nothing of what an image shows: what they separate is how the sets were made.
    """
    result = np.empty((len(rows), 12))
    for i, row in enumerate(rows):
        x = split.image(int(row)).double().numpy() / 255
        grey = x.mean(0)
        dx, dy = np.abs(np.diff(grey, axis=1)).mean(), np.abs(np.diff(grey, axis=0)).mean()
        border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
        fine = np.abs(4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]).mean()
        chroma = np.ptp(x, axis=0).mean()
        result[i] = [*x.mean((1, 2)), *x.std((1, 2)), dx, dy, fine, border.mean(), border.std(), chroma]
    return result


def crop_padding(image: torch.Tensor, tolerance: float = 8, least: float = 0.5) -> torch.Tensor:
    """An image [3, H, W] without plain lines at its borders, such as padding; at least half of each side stays.

    Args:
        image: values 0..255.
        tolerance: standard deviation up to which a line of pixels is plain: padding is no longer exact after JPEG.
        least: share of either side that stays.
    """
    ends = []
    for axis in (1, 2):
        spread = image.float().std(3 - axis).amax(0)  # [lines]
        busy = torch.nonzero(spread > tolerance).flatten().tolist() or [0, len(spread) - 1]
        most = int(len(spread) * (1 - least) / 2)
        # two lines more: at the edge of what was padded, JPEG has mixed the two
        low = min(busy[0] + 2 * (busy[0] > 0), most)
        after = len(spread) - 1 - busy[-1]
        ends.append(slice(low, len(spread) - min(after + 2 * (after > 0), most)))
    return image[:, ends[0], ends[1]]


class Canon:
    """Rows of a split in the one format of the control: plain borders cropped, squashed, `side` pixels of detail.

    It is read as a split is. What still tells domains apart is not their aspect ratio, padding, size or sharpness (but
    for images that have less than `side` pixels of detail to begin with).
    """

    def __init__(self, split: Split, rows: np.ndarray, side: int, size: int = 128) -> None:
        self.split, self.rows, self.side, self.size = split, rows, side, size
        self.folder, self.domain = split.folder, split.domain
        chosen = hashlib.sha256(np.ascontiguousarray(rows, dtype=np.int64)).hexdigest()[:8]
        self.name = f"{split.name}-canon{side}-{chosen}"

    def __len__(self) -> int:
        return len(self.rows)

    def jpeg(self, row: int) -> tuple[str, bytes]:
        """Key and bytes of the split's own image."""
        return self.split.jpeg(int(self.rows[row]))

    def image(self, row: int) -> torch.Tensor:
        """uint8 [3, size, size]; BadImage where the split's own image is damaged."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2.functional import resize

        x = crop_padding(self.split.image(int(self.rows[row]))).float()
        small = resize(x, [self.side] * 2, antialias=True)
        return resize(small, [self.size] * 2, InterpolationMode.BICUBIC).clamp(0, 255).round().to(torch.uint8)


CLASSIFIERS = {"logistic": "logistic regression", "lda": "LDA", "svm": "linear SVM"}


def make_classifier(name: str):
    """A linear classifier on standardised features: "logistic" (multinomial), "lda" or "svm" (one against the rest)."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    # balanced: of a task with few images the classifier would else seldom think, whatever they look like
    models = {"logistic": LogisticRegression(max_iter=500, class_weight="balanced"),
              "lda": LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
              "svm": LinearSVC(class_weight="balanced", dual=False)}
    return make_pipeline(StandardScaler(), models[name])


def predict(name: str, fit: list[np.ndarray], test: list[np.ndarray]) -> list[np.ndarray]:
    """The task that a classifier fitted on `fit` ([n_d, D] per task) sees in each row of `test` ([m_d, D])."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "did not converge": the accuracy says what was reached
        model = make_classifier(name).fit(np.concatenate(fit).astype(np.float64),
                                          np.repeat(np.arange(len(fit)), [len(part) for part in fit]))
        found = model.predict(np.concatenate(test).astype(np.float64))
    return np.split(found, np.cumsum([len(part) for part in test])[:-1])


def balanced_accuracy(right: list[np.ndarray], ids: list[np.ndarray], draws: int, seed: int) -> Figure:
    """Mean over tasks of the share of right answers, resampled by identity.

    Args:
        right: bool [m_d] per task.
        ids: [m_d] per task, from `name_identities`: who is in two tasks is drawn, or not, in both.
    """
    names = np.unique(np.concatenate(ids), return_inverse=True)[1]
    ends = np.cumsum([len(part) for part in right])[:-1]

    def statistic(weights: np.ndarray | None) -> dict[str, float]:
        parts = [None] * len(right) if weights is None else np.split(weights, ends)
        return {"value": float(np.mean([weighted_mean(hit.astype(float), w)
                                        for hit, w in zip(right, parts, strict=True)]))}

    return intervals(statistic, bootstrap_counts(names, draws, seed), len(names))["value"]


def separability(fit: list[np.ndarray], test: list[np.ndarray], ids: list[np.ndarray], draws: int,
                 seed: int) -> dict[str, Figure]:
    """Balanced accuracy of telling the tasks apart, on unseen identities.

    Args:
        fit: per task [n_d, D].
        test: per task [m_d, D], of other identities.
        ids: per task [m_d], identities for the bootstrap (see `balanced_accuracy`).

    Returns:
        "logistic", "lda", "svm", and "a/b" for every pair of tasks by number (logistic).
    """
    result = {}
    for name in CLASSIFIERS:
        right = [found == k for k, found in enumerate(predict(name, fit, test))]
        result[name] = balanced_accuracy(right, ids, draws, seed)
    for a in range(len(fit)):
        for b in range(a + 1, len(fit)):
            found = predict("logistic", [fit[a], fit[b]], [test[a], test[b]])
            result[f"{a}/{b}"] = balanced_accuracy([found[0] == 0, found[1] == 1], [ids[a], ids[b]], draws, seed)
    return result


def sources_of(split: Split, rows: np.ndarray) -> np.ndarray:
    """Where each image comes from, [n] names: the source that its JSON names.

    Out of distribution the split's name is part of it: photographs and sketches that one adapter prepared are two.
    """
    source = split.index["provenance"]["source"]
    names = [split.fields(int(row))["source"] for row in rows] if source == "merge" else [source] * len(rows)
    mark = f" ({split.name})" if split.protocol and split.protocol.get("ood") else ""
    return np.array([name + mark for name in names])


Features = Callable[[Split, np.ndarray], np.ndarray]  # a split and rows of it -> [n, D]


def unseen_sources(features: dict[str, Features], fitted: dict[str, list[np.ndarray]],
                   tested: dict[str, list[np.ndarray]], ids: list[np.ndarray], tasks: list[Task],
                   fits: list[np.ndarray], others: dict, n: int, draws: int, seed: int) -> list[dict]:
    """`separability` where the images of one domain are of a source never fitted on; for domains that have two.

    Args:
        features: by space.
        fitted: by space, per task: features of the rows `fits`.
        tested, ids: likewise of the test rows, and who is on them.
        tasks: the tasks.
        fits: per task, rows of the training split.
        others: domain -> its test splits and the rows of them that may be used.
        n: at most so many images a source.
        draws, seed: of the bootstrap.

    Returns:
        Rows domain, source, images, identities, and per space the balanced accuracy over all tasks (value, low, high)
        with the recall of the domain itself.
    """
    rng, table = np.random.default_rng(seed), []
    known = [sources_of(task.train, rows) for task, rows in zip(tasks, fits, strict=True)]
    people = [name_identities(task.train, rows) for task, rows in zip(tasks, fits, strict=True)]
    for d, task in enumerate(tasks):
        candidates: dict[str, tuple[Split, np.ndarray]] = {}
        for split, rows in others[task.domain]:
            rows = rng.permutation(rows)[:n]
            names = sources_of(split, rows)
            for name in np.unique(names):
                candidates.setdefault(name, (split, rows[names == name]))
        for name in np.unique(known[d]):
            candidates.setdefault(name, (task.train, fits[d][known[d] == name]))
        for name, (split, rows) in candidates.items():
            left, who = known[d] != name, name_identities(split, rows)
            seen = np.concatenate([part[left] if i == d else part for i, part in enumerate(people)])
            rows, who = rows[~np.isin(who, seen)], who[~np.isin(who, seen)]
            if len(candidates) < 2 or left.sum() < 2 or not len(rows):
                continue
            row = {"domain": task.domain, "source": name, "images": len(rows), "identities": len(np.unique(who)),
                   "spaces": {}}
            names = [who if i == d else part for i, part in enumerate(ids)]
            for space, of in features.items():
                parts = [part[left] if i == d else part for i, part in enumerate(fitted[space])]
                test = [of(split, rows) if i == d else part for i, part in enumerate(tested[space])]
                right = [found == i for i, found in enumerate(predict("logistic", parts, test))]
                row["spaces"][space] = show(balanced_accuracy(right, names, draws, seed)) | {
                    "recall": float(right[d].mean())}
            table.append(row)
    return table


def gather_sources(task: Task, fits: np.ndarray, others: list[tuple[Split, np.ndarray]], n: int,
                   rng: np.random.Generator) -> dict[str, list[tuple[Split, np.ndarray, np.ndarray]]]:
    """Images of each source of a domain: splits, rows, and who is on them.

    Args:
        task: of the domain.
        fits: rows of its training split.
        others: its test splits and the rows of them that may be used.
        n: at most so many images of a source and split.
        rng: of their choice.
    """
    found: dict[str, list[tuple[Split, np.ndarray, np.ndarray]]] = {}
    for split, rows in [(task.train, fits), *others]:
        rows = rng.permutation(rows)[:n]
        names, who = sources_of(split, rows), name_identities(split, rows)
        for name in np.unique(names):
            found.setdefault(name, []).append((split, rows[names == name], who[names == name]))
    return found


def hold_out(people: list[np.ndarray], rng: np.random.Generator) -> set[str]:
    """Half of the identities of each source, [images] per source: who is in several is held out of all, or of none."""
    known: dict[str, bool] = {}
    for names in sorted((np.unique(part) for part in people), key=len):
        fresh = rng.permutation([name for name in names if name not in known])
        missing = len(names) // 2 - sum(known.get(name, False) for name in names)
        known |= {name: i < missing for i, name in enumerate(fresh)}
    return {name for name, out in known.items() if out}


def tell_sources(features: dict[str, Features], tasks: list[Task], fits: list[np.ndarray], others: dict, n: int,
                 draws: int, seed: int) -> dict[str, dict]:
    """`separability` of the sources WITHIN each domain: what a space knows of how the images were made.

    A linear classifier that tells sources of one domain as well as it tells domains may have told the domains by their
    sources. Classifiers are fitted on half of the identities, and tested on the others.

    Args:
        features, tasks, fits, others, n, draws, seed: see `unseen_sources`.

    Returns:
        By domain: "images" and "identities" by source, "chance", and "spaces" with a figure for each of CLASSIFIERS; or
        "why" it was not measured.
    """
    rng, result = np.random.default_rng(seed), {}
    for task, rows in zip(tasks, fits, strict=True):
        found = gather_sources(task, rows, others[task.domain], n, rng)
        people = {name: np.concatenate([who for *_, who in parts]) for name, parts in found.items()}
        out = hold_out(list(people.values()), rng)
        halves = {name: np.isin(who, list(out)) for name, who in people.items()}
        usable = [name for name, held in halves.items() if held.any() and not held.all()]
        if len(usable) < 2:
            few = sorted(set(found) - set(usable))
            result[task.domain] = {"why": f"one source alone: {', '.join(found)}" if len(found) < 2 else
                                   f"too few identities of {', '.join(few)} to fit on some and test others"}
            continue
        ids, spaces = [people[name][halves[name]] for name in usable], {}
        for space, of in features.items():
            x = [np.concatenate([of(split, part) for split, part, _ in found[name]]) for name in usable]
            fit = [part[~halves[name]] for name, part in zip(usable, x, strict=True)]
            test = [part[halves[name]] for name, part in zip(usable, x, strict=True)]
            spaces[space] = {}
            for model in CLASSIFIERS:
                right = [answer == i for i, answer in enumerate(predict(model, fit, test))]
                spaces[space][model] = show(balanced_accuracy(right, ids, draws, seed))
        result[task.domain] = {"images": {name: len(people[name]) for name in usable},
                               "identities": {name: len(np.unique(people[name])) for name in usable},
                               "chance": 1 / len(usable), "spaces": spaces}
    return result


def measure_separability(features: dict[str, Features], tasks: list[Task], others: dict, draws: int, seed: int,
                         limit: int) -> dict:
    """`separability` in every space; chance is 1 / tasks.

    Args:
        features: by space: tuned, foundation, pixels, and the same with " canon".
        tasks: the tasks.
        others: see `unseen_sources`.
        draws, seed: of the bootstrap.
        limit: images a task at most.
    """
    rng = np.random.default_rng(seed)
    n = min(limit, *(len(task.fit) for task in tasks), *(len(task.probe) for task in tasks))
    fits = [rng.permutation(task.fit)[:n] for task in tasks]
    probes = [rng.permutation(task.probe)[:n] for task in tasks]
    ids = [name_identities(task.split, rows) for task, rows in zip(tasks, probes, strict=True)]
    found, fitted, tested = {}, {}, {}
    for name, of in tqdm(features.items(), desc="separability", unit="space", disable=None):
        fitted[name] = [of(task.train, rows) for task, rows in zip(tasks, fits, strict=True)]
        tested[name] = [of(task.split, rows) for task, rows in zip(tasks, probes, strict=True)]
        found[name] = separability(fitted[name], tested[name], ids, draws, seed)
    names = [task.domain for task in tasks]
    spaces = {}
    for name, figures in found.items():
        pairwise = {"/".join(names[int(i)] for i in key.split("/")): show(figure)
                    for key, figure in figures.items() if "/" in key}
        spaces[name] = {model: show(figures[model]) for model in CLASSIFIERS} | {"pairwise": pairwise}
        mine = "tuned canon" if name.endswith("canon") else "tuned"
        if name != mine:
            spaces[name]["lead_of_tuned"] = show(minus(found[mine]["logistic"], figures["logistic"]))
    plain = {name: of for name, of in features.items() if not name.endswith("canon")}
    return {"images_per_task": n, "chance": 1 / len(tasks), "spaces": spaces,
            "identities": {name: len(np.unique(part)) for name, part in zip(names, ids, strict=True)},
            "unseen_sources": unseen_sources(plain, fitted, tested, ids, tasks, fits, others, n, draws, seed),
            "sources": tell_sources(plain, tasks, fits, others, n, draws, seed)}


# ---------------------------------------------------------------- a map


def draw_up_map(embedded: dict, tasks: list[Task], method: str, seed: int, most: int = 500) -> list[dict]:
    """Two coordinates for test images of every task: rows x, y, task, identity (a number, -1: not among the shown).

    Up to half of a task's points are kept for its eight identities with the most images: else none could be seen.

    Args:
        embedded: domain -> unit embeddings of its training and of its test split.
        tasks: the tasks.
        method: "pca" (of the points themselves) or "tsne" (of their first 50 components; distances between clusters
            mean nothing there).
        seed: of the choice and of t-SNE.
        most: points a task.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rng, points, rows = np.random.default_rng(seed), [], []
    for task in tasks:
        count = np.bincount(task.target)
        known = np.argsort(-count, kind="stable")[:8]
        shown = np.concatenate([np.flatnonzero(task.target == identity)[: most // 16] for identity in known])
        others = rng.permutation(np.setdiff1d(np.arange(len(task.target)), shown))[: most - len(shown)]
        chosen = np.concatenate([shown, others])
        points.append(embedded[task.domain][1][task.probe[chosen]])
        for i in chosen:
            place = np.flatnonzero(known == task.target[i])
            rows.append({"task": task.domain, "identity": int(place[0]) if len(place) else -1})
    x = np.concatenate(points).astype(np.float64)
    if method == "tsne" and len(x) >= 10:
        x = PCA(min(50, *x.shape), random_state=seed).fit_transform(x)
        x = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=seed).fit_transform(x)
    else:
        x = PCA(2, random_state=seed).fit_transform(x)
    return [{"x": float(a), "y": float(b), **row} for (a, b), row in zip(x, rows, strict=True)]


# ---------------------------------------------------------------- figures


def percent(value: float | None) -> float:
    """100 times a fraction; NaN where it is not known."""
    return math.nan if value is None else 100 * value


def new_figure(rows: int, columns: int, size: tuple[float, float], **options):
    """A figure and its axes [rows, columns]; size in inches, as printed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # fonttype 42: text stays text in a PDF
    matplotlib.rcParams.update({"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 8,
                                "xtick.labelsize": 7, "ytick.labelsize": 7, "pdf.fonttype": 42,
                                "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def save_figure(figure, path: Path, handles: list | None = None, columns: int = 4) -> None:
    """Write PATH.pdf and PATH.png, with one legend above all axes."""
    import matplotlib.pyplot as plt

    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    for ending in (".pdf", ".png"):
        figure.savefig(path.with_name(path.name + ending), dpi=200)
    plt.close(figure)


def heat_map(ax, values: np.ndarray, names: list[str], title: str, limits: tuple[float, float], form: str) -> None:
    """A matrix with its numbers written in; NaN stays white."""
    ax.imshow(values, cmap="cividis", vmin=limits[0], vmax=limits[1])
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if np.isfinite(value):
                dark = value < limits[0] + 0.55 * (limits[1] - limits[0])
                ax.text(j, i, format(value, f"z{form}"), ha="center", va="center", color="white" if dark else "black")
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set_yticks(range(len(names)), names)
    ax.set_title(title)
    ax.spines[:].set_visible(False)


def find_measured(pairs: list[dict]) -> set[tuple[str, str]]:
    """The pairs of tasks (fit, test) whose full space is above chance: shares of the others are noise."""
    return {(pair["fit"], pair["test"]) for pair in pairs if above_chance(pair)}


def leave_empty(ax) -> None:
    """Say why nothing is drawn."""
    ax.text(0.5, 0.5, "all components are\nnot above chance", transform=ax.transAxes, ha="center", va="center",
            color="#666666")


def draw_transfer(path: Path, curves: list[dict], names: list[str], pairs: list[dict]) -> None:
    """The grid of transfer curves: rows are the task whose components are used, columns the task that uses them."""
    from matplotlib.lines import Line2D

    kinds = {"components": (BLUE, "-", "first k of the row's task"),
             "own": (BLACK, ":", "of the column's own"),
             "foundation": (GREY, "-", "of the untouched backbone"),
             "own mean": (SKY, "-", "centred by the column's mean"),
             "pooled": (GREEN, "-.", "of all tasks pooled"),
             "random": (RED, "--", f"random ({RANDOM_SEEDS}, range)"),
             "bottom": (PURPLE, (0, (3, 1, 1, 1)), "last k of the row's task")}
    K, measured = len(names), find_measured(pairs)
    # in a space without its first components a task may score more than in all of it
    most = max((percent(v) for c in curves if (c["fit"], c["test"]) in measured for v in c["kept"]), default=100)
    figure, axes = new_figure(K, K, (max(1.75 * K, 5), 1.6 * K + 1), sharex=True, sharey=True)
    for i, fit in enumerate(names):
        for j, test in enumerate(names):
            ax = axes[i][j]
            if (fit, test) not in measured:
                leave_empty(ax)
            for kind, (colour, style, _) in kinds.items() if (fit, test) in measured else ():
                of = {"own": ("components", test), "pooled": ("pooled", None)}
                name, origin = of.get(kind, (kind, fit))
                found = [c for c in curves if (c["kind"], c["test"]) == (name, test) and origin in (None, c["fit"])]
                if not found or (kind in ("own", "own mean") and fit == test):  # the same curve once more
                    continue
                many = np.array([[percent(v) for v in c["kept"]] for c in found])
                ax.plot(found[0]["ks"], many.mean(0), color=colour, ls=style, lw=1.4 if kind == "components" else 1)
                if kind == "random":
                    ax.fill_between(found[0]["ks"], many.min(0), many.max(0), color=colour, alpha=0.25, lw=0)
                if kind == "components":
                    band = [[percent(v) for v in found[0][end]] for end in ("low", "high")]
                    ax.fill_between(found[0]["ks"], *band, color=colour, alpha=0.2, lw=0)
            if (fit, test) in measured:
                ax.axhline(99, color="k", lw=0.6, ls=(0, (1, 2)))
                ax.axvline(100, color="k", lw=0.6, ls=(0, (1, 2)))
            ax.set(xscale="log", ylim=(-10, 5 + min(max(most, 107), 150)), xlim=(1, curves[0]["ks"][-1]))
            if i == 0:
                ax.set_title(f"used by {test}")
            if j == 0:
                ax.set_ylabel(f"components of\n{fit}")
    figure.supxlabel("number of components k (dotted: 100)", fontsize=8)
    figure.supylabel("kept of (score − chance), % (dotted: 99)", fontsize=8)
    save_figure(figure, path, [Line2D([], [], color=c, ls=s, label=label) for c, s, label in kinds.values()], 3)


def draw_deletion(path: Path, curves: list[dict], names: list[str], pairs: list[dict]) -> None:
    """What is left of each task without the first k components of each task."""
    from matplotlib.lines import Line2D

    measured = find_measured(pairs)
    figure, axes = new_figure(1, len(names), (max(1.75 * len(names), 4.5), 2.3), sharex=True, sharey=True)
    for ax, test in zip(axes[0], names, strict=True):
        found = [c for c in curves if (c["kind"], c["test"]) == ("deleted", test) and (c["fit"], test) in measured]
        for c in found:
            ax.plot(c["ks"], [percent(v) for v in c["kept"]], color=DOMAIN_COLOURS[c["fit"]], lw=1.2)
        if found:
            ax.axhline(100, color="k", lw=0.6, ls=(0, (1, 2)))
        else:
            leave_empty(ax)
        ax.set(xscale="log", title=f"scored: {test}", xlabel="first components deleted")
    axes[0][0].set_ylabel("kept of (score − chance), %")
    save_figure(figure, path, [Line2D([], [], color=DOMAIN_COLOURS[n], label=f"components of {n}") for n in names])


def draw_importance(path: Path, pairs: list[dict], names: list[str]) -> None:
    """What each task's score changes by without one component of each task."""
    from matplotlib.lines import Line2D

    figure, axes = new_figure(1, len(names), (max(1.75 * len(names), 4.5), 2.3), sharey=True)
    for ax, test in zip(axes[0], names, strict=True):
        for p in (p for p in pairs if p["test"] == test):
            change = 100 * np.array(p["importance"]["change"])
            ax.plot(np.arange(1, len(change) + 1), change, color=DOMAIN_COLOURS[p["fit"]], lw=1, marker=".", ms=2)
        ax.axhline(0, color="k", lw=0.6, ls=(0, (1, 2)))
        ax.set(xscale="log", title=f"scored: {test}", xlabel="the component left out")
    axes[0][0].set_ylabel("change of the score, points")
    save_figure(figure, path, [Line2D([], [], color=DOMAIN_COLOURS[n], label=f"components of {n}") for n in names])


def draw_separability(path: Path, result: dict, names: list[str]) -> None:
    """Balanced accuracy of telling the tasks apart: each space beside its controls; and every pair of tasks."""
    from matplotlib.patches import Patch

    spaces = result["spaces"]
    figure, axes = new_figure(1, 2, (7, 2.8), width_ratios=[1.5, 1])
    ax, labels, hatches = axes[0][0], [], (None, "////", "....")
    for i, (name, found) in enumerate(spaces.items()):
        base = name.removesuffix(" canon")
        for j, model in enumerate(CLASSIFIERS):
            v = found[model]
            error = [[100 * max(v["value"] - v["low"], 0)], [100 * max(v["high"] - v["value"], 0)]]
            ax.bar(i + 0.28 * (j - 1), 100 * v["value"], 0.26, yerr=error, capsize=1.5, color=SPACE_COLOURS[base],
                   hatch=hatches[j], edgecolor="white", error_kw={"lw": 0.8})
        base = {"pixels": "pixel\nstatistics", "foundation": "untouched"}.get(base, base)
        labels.append(base + ("\none format" if name.endswith("canon") else ""))
    ax.axhline(100 * result["chance"], color="k", ls=":", lw=1)
    ax.set_xticks(range(len(spaces)), labels, fontsize=6.5)
    ax.set(ylim=(0, 105), ylabel="balanced accuracy, %",
           title=f"all tasks (dotted: chance {100 * result['chance']:.0f})")
    matrix = np.full((len(names), len(names)), np.nan)
    for key, v in spaces["tuned"]["pairwise"].items():
        a, b = (names.index(name) for name in key.split("/"))
        matrix[a, b] = matrix[b, a] = 100 * v["value"]
    heat_map(axes[0][1], matrix, names, "pairs of tasks, tuned (logistic), %", (50, 100), ".1f")
    save_figure(figure, path, [Patch(facecolor="#666666", edgecolor="white", hatch=hatch, label=label)
                               for hatch, label in zip(hatches, CLASSIFIERS.values(), strict=True)])


def draw_sharing(path: Path, result: dict, names: list[str]) -> None:
    """Overlap of the tasks' subspaces, the variance that they explain of each other, the cosines of their means."""
    figure, axes = new_figure(1, 3, (7, 2.7))
    panels = {"overlap": f"overlap, k = {result['k']} (chance {result['chance']:.2f})",
              "explained": "variance of column\nexplained by row", "mean_cosine": "cosine of the task means"}
    for ax, (key, title) in zip(axes[0], panels.items(), strict=True):
        values = np.array([p[key] for p in result["pairs"]]).reshape(len(names), len(names))
        heat_map(ax, values, names, title, (-1 if key == "mean_cosine" else 0, 1), ".2f")
    save_figure(figure, path)


def draw_spectrum(path: Path, components: list[dict], names: list[str]) -> None:
    """Cumulative variance of each task; and what single components of a task say about its identities and the task."""
    from matplotlib.lines import Line2D

    figure, axes = new_figure(1, 3, (7, 2.6))
    for weights, style in (("foundation", ":"), ("tuned", "-")):
        for name in names:
            total = 100 * np.cumsum([r["variance"] for r in components
                                     if r["weights"] == weights and r["fit"] == r["test"] == name])
            axes[0][0].plot(np.arange(1, len(total) + 1), total, color=DOMAIN_COLOURS[name], ls=style, lw=1.2)
    axes[0][0].set(xscale="log", ylim=(0, 101), title="variance of the first k, %", xlabel="components k")
    for ax, key, title in ((axes[0][1], "identity_dprime", "d′ same − different identity"),
                           (axes[0][2], "task_dprime", "|d′| task − other tasks")):
        for name in names:
            of = [r for r in components if r["weights"] == "tuned" and r["fit"] == r["test"] == name]
            values = np.array([math.nan if r[key] is None else r[key] for r in of])
            values = np.abs(values) if key == "task_dprime" else values
            # single components are noisy: the mean over each of some thirty ranges of equal width on the axis
            edges = np.unique(np.geomspace(1, len(values) + 1, 31).astype(int))
            means = [values[a - 1 : b - 1].mean() for a, b in pairwise(edges)]
            ax.plot(np.sqrt(edges[:-1] * (edges[1:] - 1)), means, color=DOMAIN_COLOURS[name], lw=1.2)
        ax.set(xscale="log", title=title, xlabel="component of the task itself")
    handles = [Line2D([], [], color=DOMAIN_COLOURS[n], label=n) for n in names]
    handles += [Line2D([], [], color="k", ls="-", label="tuned"), Line2D([], [], color="k", ls=":", label="untouched")]
    save_figure(figure, path, handles, 6)


def draw_map(path: Path, points: list[dict], names: list[str], method: str) -> None:
    """The map coloured by task; beside it each task alone with its most frequent identities in colour."""
    from matplotlib.lines import Line2D

    title = {"tsne": "t-SNE", "pca": "PCA"}[method]
    K = len(names)
    figure, axes = new_figure(1, K + 1, (1.75 * (K + 1), 2.3), sharex=True, sharey=True)
    xy = np.array([(p["x"], p["y"]) for p in points])
    task, identity = np.array([p["task"] for p in points]), np.array([p["identity"] for p in points])
    colours, markers = [BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE], "o^sDvP*X"
    for name in names:
        axes[0][0].scatter(*xy[task == name].T, s=3, color=DOMAIN_COLOURS[name], lw=0)
    axes[0][0].set_title(f"{title}, by task")
    for ax, name in zip(axes[0][1:], names, strict=True):
        ax.scatter(*xy[task != name].T, s=1, color="#E5E5E5", lw=0)
        ax.scatter(*xy[(task == name) & (identity < 0)].T, s=2, color="#A0A0A0", lw=0)
        for i, (colour, marker) in enumerate(zip(colours, markers, strict=True)):
            ax.scatter(*xy[(task == name) & (identity == i)].T, s=9, color=colour, marker=marker, lw=0)
        ax.set_title(f"{name}, by identity")
    for ax in axes[0]:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    handles = [Line2D([], [], ls="", marker="o", ms=4, color=DOMAIN_COLOURS[n], label=n) for n in names]
    handles.append(Line2D([], [], ls="", marker="o", ms=3, color="#A0A0A0", label="further identities (colours and "
                          "shapes: eight)"))
    save_figure(figure, path, handles, K + 1)


# ---------------------------------------------------------------- report


def number(value: float | None) -> str:
    """A fraction in percent; "-" where it is not known."""
    return "-" if value is None else f"{100 * value:.1f}"


def interval(found: dict | None, form: str = ".1f", factor: float = 100) -> str:
    """A figure with its interval, in percent; "-" where there is none."""
    if not found or found["value"] is None:
        return "-"
    ends = [format(factor * found[end], form) if found[end] is not None else "-" for end in ("value", "low", "high")]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


def mistrust(identities: int) -> str:
    """What is to be said of an interval from so many identities; nothing if they are enough."""
    return f"{identities} identities: interval not to be trusted" if identities < FEW else ""


def report_tasks(analysis: dict) -> list[str]:
    """Lines about what was fitted on and tested, and what was not."""
    lines = ["| task | fitted on | tested on | remarks |", "| --- | --- | --- | --- |"]
    few = {pair["test"]: mistrust(pair["identities"]) for pair in analysis["transfer"]["tuned"]["pairs"]}
    for domain, (base, test) in analysis["splits"].items():
        severity = analysis["degraded"].get(domain)
        remarks = [few[domain], f"fitted on images degraded as in training (severity up to {severity:g})"
                   if severity is not None else ""]
        lines.append(f"| {domain} | {base} | {test} | {'; '.join(filter(None, remarks))} |")
    lines += [f"| {domain} | - | - | left out: {why} |" for domain, why in analysis["left_out"].items()]
    return [*lines, ""]


def report_transfer(result: dict, weights: str) -> list[str]:
    """Lines about the transfer of one set of weights."""
    headline = result["pairs"][0]["k"]
    note = f" **Rank-limited**: fewer than 5 x {result['dim']} images." if result["rank_limited"] else ""
    lines = [f"### {weights}", "",
             f"{result['images_per_task']} images a task, {result['dim']} dimensions, k = {headline}.{note}", ""]
    columns = {"random": "random", "foundation": "untouched PCs", "pooled": "pooled", "bottom": "last k",
               "own_mean": "own mean", "deleted": "range deleted"}
    there = {key: name for key, name in columns.items() if key in result["pairs"][0]}
    head = ["PCs of", "used by", "raw", "all", "kept at k", "k99", "k95", "k99 / random's", *there.values(),
            "lead over random", *(["lead over untouched PCs"] if "foundation" in there else [])]
    lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for p in result["pairs"]:
        coarse = [f"{p[key]:.0f}" if p[key] else "-" for key in ("k99_grid", "k99_random")]
        cells = [p["fit"], p["test"], f"{100 * p['raw']:.1f}", f"{100 * p['full']:.1f}",
                 interval({"value": p["kept"], "low": p["low"], "high": p["high"]}), interval(p["k99"], ".0f", 1),
                 interval(p["k95"], ".0f", 1), " / ".join(coarse),
                 *(number(p[key]["value"]) for key in there), interval(p["over_random"], "+.1f"),
                 *([interval(p["over_foundation"], "+.1f")] if "foundation" in there else [])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Components from which on every task keeps so much (-: not before all of them): "
              + "; ".join(f"of {row['fit']} " + ", ".join(f"{interval(row[f'k{100 * level:g}'], '.0f', 1)} for "
                                                          f"{100 * level:g} %" for level in LEVELS)
                          for row in result["all_tasks"]) + f"; of {result['dim']}."]
    few = {p["test"]: note for p in result["pairs"] if (note := mistrust(p["identities"]))}
    lines += ["", *(f"- used by {test}: {note}" for test, note in few.items())] if few else []
    if "further" in result["pairs"][0]:
        lines += ["", *report_further(result["pairs"], result["dim"])]
    if "importance" in result["pairs"][0]:
        lines += ["", *report_importance(result["pairs"])]
    if "deleted" in there:
        cut = result["pairs"][0]["deleted"]
        lines += ["", f"Range deleted: without components {cut['from'] + 1} to {cut['to']} of the fitted task."]
    return [*lines, ""]


def report_further(pairs: list[dict], dim: int) -> list[str]:
    """Lines about the tasks' other metrics in a few subspaces."""
    ks = sorted({row["k"] for row in pairs[0]["further"]})
    lines = ["Other metrics with k components, in percent (in brackets: k random dimensions, the mean of "
             f"{FURTHER_RANDOM}; intervals: further.csv). On an AUC a random subspace keeps nearly everything, so that "
             "it tells little here; no verdict rests on this table.", "",
             f"| PCs of | used by | metric | {' | '.join(f'k = {k}' if k < dim else 'all' for k in ks)} |",
             "| --- " * (len(ks) + 3) + "|"]
    for p in pairs:
        rows = {(row["metric"], row["k"]): row for row in p["further"]}
        for metric in dict.fromkeys(metric for metric, _ in rows):
            cells = [number(row["value"]) + f" ({number(row['random'])})" * (row["k"] < dim)
                     for row in (rows[metric, k] for k in ks)]
            lines.append(f"| {p['fit']} | {p['test']} | {metric} | {' | '.join(cells)} |")
    return lines


def report_importance(pairs: list[dict]) -> list[str]:
    """Lines about the components that a score rests on most, and those that it would be better without."""
    count = len(pairs[0]["importance"]["change"])
    lines = [f"One component left out at a time, of the first {count}: the three of the largest loss and of the "
             "largest gain, change of the score in points (intervals of all: importance.csv; the largest of many are "
             "large by chance, too).", "", "| PCs of | used by | losses: component (change) | gains |",
             "| --- | --- | --- | --- |"]
    for p in pairs:
        change = 100 * np.array(p["importance"]["change"])
        order = np.argsort(change, kind="stable")
        ends = [", ".join(f"{i + 1} ({change[i]:+.1f})" for i in part if change[i] * sign > 0) or "-"
                for part, sign in ((order[:3], -1), (order[::-1][:3], 1))]
        lines.append(f"| {p['fit']} | {p['test']} | {ends[0]} | {ends[1]} |")
    return lines


def report_separability(result: dict) -> list[str]:
    """Lines about the linear separability of the tasks."""
    lines = ["## Linear separability of the tasks", "",
             f"Balanced accuracy on unseen identities, {result['images_per_task']} images a task, chance "
             f"{100 * result['chance']:.0f}. Pixel statistics know nothing of what an image shows; \"canon\": all "
             "images brought to one format first. Only what the tuned space leads by, paired by identity, is its own.",
             "",
             f"| space | {' | '.join(CLASSIFIERS.values())} | lead of tuned (logistic) |",
             "| --- " * (len(CLASSIFIERS) + 2) + "|"]
    for space, found in result["spaces"].items():
        lines.append(f"| {space} | {' | '.join(interval(found[model]) for model in CLASSIFIERS)} | "
                     f"{interval(found.get('lead_of_tuned'), '+.1f')} |")
    few = {name: note for name, count in result["identities"].items() if (note := mistrust(count))}
    lines += ["", *(f"- {name}: {note}" for name, note in few.items())] if few else []
    pairwise = {key: v for key, v in result["spaces"]["tuned"]["pairwise"].items() if result["chance"] < 0.5}
    if pairwise:
        lines += ["", "Pairs of tasks, logistic regression:", "", f"| pair | {' | '.join(result['spaces'])} |",
                  "| --- " * (len(result["spaces"]) + 1) + "|"]
        lines += [f"| {key} | " + " | ".join(number(found["pairwise"][key]["value"])
                                            for found in result["spaces"].values()) + " |" for key in pairwise]
    if unseen := result["unseen_sources"]:
        names = list(unseen[0]["spaces"])
        lines += ["", "The same with a task's images from a source that the classifier was not fitted on (recall: of "
                  "these images):", "",
                  f"| task | source | images | {' | '.join(names)} |", "| --- " * (len(names) + 3) + "|"]
        for row in unseen:
            note = f" ({note})" if (note := mistrust(row["identities"])) else ""
            cells = [f"{interval(row['spaces'][name])}, recall {100 * row['spaces'][name]['recall']:.1f}"
                     for name in names]
            lines.append(f"| {row['domain']} | {row['source']}{note} | {row['images']:,} | {' | '.join(cells)} |")
    return [*lines, "", *report_sources(result["sources"], result["spaces"]), ""]


def report_sources(result: dict[str, dict], spaces: Iterable[str]) -> list[str]:
    """Lines about how well the sources within each task are told apart."""
    names = [name for name in spaces if not name.endswith("canon")]
    lines = ["The source of an image as the label, within each task, on unseen identities: "
             f"{' / '.join(CLASSIFIERS.values())}. Where sources are told apart as well as tasks are, tasks may be "
             "told by their sources.", "",
             f"| task | sources (images) | chance | {' | '.join(names)} |", "| --- " * (len(names) + 3) + "|"]
    for domain, found in result.items():
        if why := found.get("why"):
            lines.append(f"| {domain} | not measured ({why}) |{' - |' * (len(names) + 1)}")
            continue
        sources = [f"{name} ({count:,}" + (f"; {note})" if (note := mistrust(found["identities"][name])) else ")")
                   for name, count in found["images"].items()]
        cells = [" / ".join(interval(found["spaces"][name][model]) for model in CLASSIFIERS) for name in names]
        lines.append(f"| {domain} | {', '.join(sources)} | {100 * found['chance']:.0f} | {' | '.join(cells)} |")
    return lines


def report_sharing(result: dict[str, dict], cka: dict[str, float | None]) -> list[str]:
    """Lines about what the tasks share, before and after."""
    lines = ["## What the tasks share", "",
             "Participation ratio: how many dimensions carry the variance. Scatter: of class means about the mean, "
             "over images about their class mean. CKA: debiased, linear, of the same images before and after "
             "fine-tuning.",
             "", "| space | task | participation ratio | PCs for 50 / 90 / 95 % | scatter | CKA with the untouched |",
             "| --- | --- | --- | --- | --- | --- |"]
    for weights, found in result.items():
        for name, t in found["tasks"].items():
            counts = " / ".join(str(t[f"components_for_{share}"]) for share in (50, 90, 95))
            alike = f"{cka[name]:.2f}" if weights == "tuned" and cka.get(name) is not None else ""
            lines.append(f"| {weights} | {name} | {t['participation_ratio']:.1f} | {counts} | "
                         f"{t['scatter_ratio'] or math.nan:.2f} | {alike} |")
    found = result["tuned"]
    if len(found["tasks"]) > 1:
        lines += ["", f"The first {found['k']} components of two tasks, tuned; by chance their overlap is "
                  f"{found['chance']:.2f}:", "",
                  "| a | b | overlap | angles: smallest, median, largest | variance of b in a | cosine of means |",
                  "| --- | --- | --- | --- | --- | --- |"]
        lines += [f"| {p['a']} | {p['b']} | {p['overlap']:.2f} | {p['smallest_angle']:.0f}°, {p['median_angle']:.0f}°, "
                  f"{p['largest_angle']:.0f}° | {p['explained']:.2f} | {p['mean_cosine']:.2f} |"
                  for p in found["pairs"] if p["a"] != p["b"]]
    return [*lines, ""]


def write_analysis(folder: Path, analysis: dict, curves: dict[str, list[dict]], components: list[dict],
                   points: list[dict]) -> str:
    """analysis.json, the tables, report.md and the figures; returns the report.

    Args:
        folder: RUN/analysis.
        analysis: the summary, all of analysis.json.
        curves: by weights, what `to_row` made.
        components: what `measure_components` found, with the weights.
        points: of the map.
    """
    domains, pairs = analysis["domains"], analysis["transfer"]["tuned"]["pairs"]
    headline = pairs[0]["k"]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "analysis.json", analysis)
    write_csv(folder / "transfer.csv", [
        {"weights": weights, "kind": c["kind"], "fit": c["fit"], "number": c["number"], "test": c["test"], "k": k,
         "score": score, "kept": v, "low": low, "high": high} for weights, rows in curves.items() for c in rows
        for k, score, v, low, high in zip(*(c[key] for key in ("ks", "score", "kept", "low", "high")), strict=True)])
    write_csv(folder / "further.csv", [{"fit": p["fit"], "test": p["test"]} | row for p in pairs
                                                for row in p["further"]])
    write_csv(folder / "importance.csv", [
        {"fit": p["fit"], "test": p["test"], "component": i, "change": change, "low": low, "high": high}
        for p in pairs if "importance" in p
        for i, (change, low, high) in enumerate(zip(*p["importance"].values(), strict=True), 1)],
        ("fit", "test", "component", "change", "low", "high"))
    write_csv(folder / "dprime.csv", components)
    write_csv(folder / "map.csv", points)
    lines = [f"# {analysis['run']}", "", *report_tasks(analysis), "## Transfer of principal components", "",
             f"Share of (score - chance) that the first {headline} components of one task keep for another, in percent "
             "with 95 % intervals, resampled by identity; the score is rank-1 for people and the nearest class mean "
             "for objects, on identities that the components were not fitted on (-: even all components are not above "
             "chance). Vectors are centred by the mean of the task that was fitted on. All: every component; raw: "
             "without centring. k99 and k95: from so many components on 99 % and 95 % are kept; k99 / random's: "
             "the components' and that of random subspaces, both at the few k of the controls. Controls at k: random "
             "subspaces (centred as the components are), components of the untouched backbone, of all tasks pooled, "
             "the last k; own mean: centred by the mean of the task that is scored. A claim about components means "
             "something where they lead.", ""]
    for weights, result in analysis["transfer"].items():
        lines += report_transfer(result, weights)
    if analysis["separability"]:
        lines += report_separability(analysis["separability"])
        draw_separability(folder / "separability", analysis["separability"], domains)
    lines += report_sharing(analysis["sharing"], analysis["cka"])
    report = "\n".join(lines)
    write_atomically(folder / "report.md", lambda path: path.write_text(report))
    draw_transfer(folder / "transfer", curves["tuned"], domains, pairs)
    draw_deletion(folder / "deletion", curves["tuned"], domains, pairs)
    if "importance" in pairs[0]:
        draw_importance(folder / "importance", pairs, domains)
    draw_sharing(folder / "sharing", analysis["sharing"]["tuned"], domains)
    draw_spectrum(folder / "spectrum", components, domains)
    draw_map(folder / "map", points, domains, analysis["map"])
    return report


# ---------------------------------------------------------------- claims

HOLDS, FAILS, WIDE = "holds", "fails", "not measured (intervals too wide to decide)"
ORDER = ("fails", "not measured", "holds, but", "holds")  # of verdicts, the weakest first
CROSS = {(a, b) for a in DOMAINS for b in DOMAINS if a != b}  # pairs of tasks: components of one, used by another


@dataclass
class Finding:
    """One measured number behind a claim, and what it says about it."""

    what: str
    value: float | None
    low: float | None
    high: float | None
    verdict: str
    form: str = "+.1f"  # in percent
    note: str = ""
    threshold: float | None = None  # None: it decides nothing

    def __str__(self) -> str:
        figure = interval({"value": self.value, "low": self.low, "high": self.high}, self.form)
        return f"{self.what} {figure}{f' ({self.note})' if self.note else ''}"


@dataclass
class Claim:
    """One line of the claims table."""

    claim: str
    backbones: str  # those that were measured
    measured: str
    value: float | None  # of the finding that decided, with its interval and the threshold that it was held against
    low: float | None
    high: float | None
    threshold: float | None
    rule: str  # when the claim holds
    verdict: str  # "holds", "holds, but no better than ...", "fails" or "not measured (why)"
    seeds: int  # the fewest of any group behind the line
    findings: list[Finding]

    @property
    def told(self) -> str:
        """The verdict for readers."""
        return self.verdict + " (1 seed)" * (self.seeds == 1 and self.verdict.startswith((HOLDS, FAILS)))


@dataclass
class Measured:
    """A run with what evaluate.py and analyze.py found."""

    name: str
    config: dict
    found: dict[str, Scored]  # by weights: "tuned", "foundation"
    analysis: dict | None
    lost: dict[str, float] = field(default_factory=dict)  # AUC from the best stage to the end, by "domain/split"

    @property
    def family(self) -> str:
        """The backbone; one that began from random weights is nobody's foundation model."""
        name = self.config["backbone"] or self.config["model"]
        return name if self.config["weights"] != "none" else f"{name} from a random start"

    @property
    def start(self) -> tuple:
        return start_of(self.config)


@dataclass
class Group:
    """Runs that differ in their seed alone."""

    runs: list[Measured]

    @property
    def name(self) -> str:
        many = len(self.runs)
        return self.runs[0].name + (f" and {many - 1} more seed{'s' * (many > 2)}" if many > 1 else "")

    @property
    def config(self) -> dict:
        return self.runs[0].config

    @property
    def family(self) -> str:
        return self.runs[0].family

    @property
    def start(self) -> tuple:
        return self.runs[0].start

    @property
    def seeds(self) -> int:
        return len({run.config.get("seed") for run in self.runs})

    @property
    def last(self) -> str:
        """The domain that a sequential run learned last."""
        return (self.config.get("order") or self.config["domains"])[-1]

    @property
    def lost(self) -> dict[str, float]:
        """What every seed lost from its best stage to the end, averaged."""
        return {task: float(np.mean([run.lost[task] for run in self.runs])) for task in self.runs[0].lost
                if all(task in run.lost for run in self.runs)}

    def rows(self, weights: str, wanted: Callable[[Row], bool]) -> dict[tuple, Figure]:
        """Figures that all seeds have, averaged over them, by (domain, split, metric, protocol)."""
        tables = [run.found[weights] for run in self.runs if weights in run.found]
        if len(tables) < len(self.runs) or len({(t.seed, draws_of(t)) for t in tables}) > 1:
            return {}
        return {key: aggregate(tables, key) for key, (row, _) in tables[0].found.items()
                if wanted(row) and all(key in table.found for table in tables)}

    def headline(self, weights: str) -> dict[tuple, Figure]:
        """The figure that stands for each trained domain's test split, in distribution."""
        rows = self.rows(weights, lambda row: row.headline and not row.out_of_distribution
                         and row.domain in self.config["domains"])
        first: dict = {}  # the customary rule of a split comes first
        return {key: figure for key, figure in rows.items() if first.setdefault(key[:2], key) == key}

    def leads(self, other: "Group", mine: str = "tuned", theirs: str = "tuned") -> dict[tuple, Figure]:
        """By domain and split, how far this group is above another, paired by person; none if resampled differently."""
        a, b = self.headline(mine), other.headline(theirs)
        seeds = [group.runs[0].found[weights].seed for group, weights in ((self, mine), (other, theirs))
                 if weights in group.runs[0].found]
        return {key[:2]: minus(a[key], b[key]) for key in a
                if key in b and len(set(seeds)) == 1 and len(a[key].draws) == len(b[key].draws)}

    def analysed(self, of: Callable[[dict], dict | None]) -> dict | None:
        """A figure {"value", "low", "high"} of the analyses, averaged over the seeds; None where one lacks it."""
        found = [of(run.analysis) if run.analysis else None for run in self.runs]
        if any(f is None or None in f.values() for f in found):
            return None
        return {end: float(np.mean([f[end] for f in found])) for end in ("value", "low", "high")}


def draws_of(scored: Scored) -> int:
    """Number of resamplings."""
    return len(next(iter(scored.found.values()))[1])


def check_newer(path: Path, weights: Path, script: str) -> None:
    """InputError where a result is older than the weights that it is to be about, by more than a copy takes."""
    if weights.exists() and path.stat().st_mtime < weights.stat().st_mtime - 60:
        raise InputError(f"older than {weights.name}: run {script} on it again")


def check_numbers(found: dict, *names: str, kind: type = int | float | None) -> None:
    """TypeError or KeyError unless each is of that kind."""
    for name in names:
        if isinstance(found[name], bool) or not isinstance(found[name], kind):
            raise TypeError(f"{name!r} is no number")


def read_analysis(path: Path) -> dict:
    """RUN/analysis/analysis.json; InputError where it lacks what the claims rest on."""
    check_newer(path, path.parent.parent / "model.safetensors", "analyze.py")
    known, ends = read_json(path), ("value", "low", "high")
    try:
        transferred, separated = known["transfer"]["tuned"], known["separability"]
        check_numbers(transferred, "dim", "images_per_task", kind=int)
        for pair in transferred["pairs"]:
            check_numbers(pair, "k", kind=int)
            check_numbers({"full_low": None} | pair, "kept", "low", "high", "full_low")
            check_numbers(pair, "chance", "full", kind=int | float)
            for figure in (pair["k95"], pair["k99"], pair["over_random"], pair.get("over_foundation")):
                check_numbers(figure or dict.fromkeys(ends), *ends)
            if not {pair["fit"], pair["test"]} <= {*DOMAINS}:
                raise TypeError("a task is unknown")
        if separated is not None:
            tables = [space["logistic"] for space in separated["spaces"].values()]
            tables += [space["lead_of_tuned"] for space in separated["spaces"].values() if "lead_of_tuned" in space]
            for row in separated["unseen_sources"]:
                tables.append(row["spaces"]["tuned"])
                "/".join((row["domain"], row["source"]))  # TypeError unless both are text
            for figure in tables:
                check_numbers(figure, *ends)
            if not {*known["domains"]} <= {*DOMAINS} or "tuned" not in separated["spaces"]:
                raise TypeError("a task is unknown, or the tuned space missing")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"of another version or damaged: {error}; run analyze.py on {path.parent.parent} again") \
            from None
    return known


def read_lost(home: Path, config: dict) -> dict[str, float]:
    """AUC that a sequential run lost from its best stage to its last step, by "domain/split"."""
    try:
        stages = report.read_stages(home, config)
        if stages is None or stages.steps[-1] != config["steps"]:
            return {}
        scores = np.array(stages.scores, dtype=float)
        return {task: float(np.nanmax(column) - column[-1])
                for task, column in zip(stages.tasks, scores.T, strict=True) if math.isfinite(column[-1])}
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        print(f"left out: {home / 'probe.jsonl'} (damaged: {error})")
        return {}


def read_run(home: Path) -> Measured:
    """A run that evaluate.py has scored; InputError where it is not whole."""
    if not (home / "done.json").exists():
        raise InputError("not finished")
    config = read_json(home / "config.json")
    lacking = {"role", "backbone", "model", "weights", "domains", "schedule", "counts"} - set(config)
    if lacking:
        raise InputError(f"config.json lacks {min(lacking)!r}")
    if config["role"] not in RUN_ROLES:
        raise InputError(f"config.json: role {config['role']!r} is none of {', '.join(RUN_ROLES)}")
    if not isinstance(config["backbone"] or config["model"], str):
        raise InputError("config.json names no backbone")
    domains, counts = config["domains"], config["counts"]
    if not (isinstance(domains, list) and domains and all(d in DOMAINS for d in domains) and isinstance(counts, dict)
            and all(isinstance(counts.get(d), int | float) for d in domains)):
        raise InputError("config.json: domains and counts do not name tasks and their images")
    results = home / "eval" / "results.json"
    check_newer(results, home / "model.safetensors", "evaluate.py")
    rows = read_rows(results.parent)
    if not rows:
        raise InputError(f"{results} is empty; run evaluate.py again")
    try:
        found = {name: read_scored(home, name) for name in sorted({row.weights for row in rows})}
        if any(drawn.ndim != 1 or len(drawn) < 2 for scored in found.values() for _, drawn in scored.found.values()):
            raise ValueError("not one list of resamplings a row")
    except InputError:
        raise
    except Exception as error:  # a damaged archive raises many kinds
        raise InputError(f"{home}/eval/draws.npz is damaged ({error}); run evaluate.py again") from None
    known, path = None, home / "analysis" / "analysis.json"
    if path.exists():
        try:
            known = read_analysis(path)
        except InputError as error:
            print(f"left out: {path} ({error.format_message()})")
    return Measured(home.name, config, found, known, read_lost(home, config) if config["role"] == "sequential" else {})


def read_runs(folder: Path) -> list[Measured]:
    """Every evaluated run below a folder; one that cannot be used is named and left out."""
    runs = []
    for path in sorted(folder.glob("*/eval/results.json")):
        home = path.parent.parent
        if not (home / "config.json").exists():
            continue
        try:
            runs.append(read_run(home))
        except InputError as error:
            print(f"left out: {home} ({error.format_message()})")
    if not runs:
        raise InputError(f"{folder}: no evaluated run in it; train runs below it and call evaluate.py on each")
    if len({(table.seed, draws_of(table)) for run in runs for table in run.found.values()}) > 1:
        print("the runs were resampled differently, so that some cannot be paired: call evaluate.py on all of them "
              "with the same --seed and --bootstrap")
    return runs


def group_runs(runs: list[Measured]) -> list[Group]:
    """Runs of one recipe and different seeds together, in the order of the first."""
    groups: dict[str, list[Measured]] = {}
    for run in runs:
        groups.setdefault(next(iter(run.found.values())).recipe, []).append(run)
    return [Group(members) for members in groups.values()]


def decide(low: float | None, high: float | None, least: float) -> str:
    """Whether something is above `least`, by its 95 % interval."""
    if low is None or high is None or not math.isfinite(low + high):
        return "not measured (not above chance)"
    return HOLDS if low > least else FAILS if high <= least else WIDE


def judge(what: str, figure: Figure, least: float, form: str = "+.1f") -> Finding:
    """A finding that holds where the figure is above `least`."""
    return Finding(what, *show(figure).values(), decide(figure.low, figure.high, least), form, threshold=least)


def rank(verdict: str) -> int:
    """Place in ORDER."""
    return next(i for i, start in enumerate(ORDER) if verdict.startswith(start))


def join(verdicts: list[str]) -> str:
    """The weakest of several verdicts: one failure is enough, and what was not measured does not hold."""
    return min(verdicts, key=rank)


def for_information(findings: list[Finding]) -> list[Finding]:
    """The same, deciding nothing."""
    return [replace(f, verdict="", threshold=None, note=", ".join(filter(None, [f.note, "for information"])))
            for f in findings]


def only(tasks: Iterable[str]) -> list[str]:
    """A verdict where some of the four tasks are missing."""
    known = set(tasks)
    there = [domain for domain in DOMAINS if domain in known]
    return [f"not measured (only tasks {', '.join(there)})"] if len(there) < len(DOMAINS) else []


def make_claim(claim: str, rule: str, findings: list[Finding], further: list[str]) -> Claim:
    """A line from its findings. `further`: verdicts about several findings together, or about what is missing."""
    verdict = join([finding.verdict for finding in findings if finding.verdict] + further)
    deciding = [f for f in findings if f.threshold is not None and None not in (f.value, f.low, f.high)]
    if verdict != WIDE and not verdict.startswith((HOLDS, FAILS)):
        deciding = []
    weakest = min(deciding, key=lambda f: (rank(decide(f.low, f.high, f.threshold)), f.low - f.threshold), default=None)
    numbers = [getattr(weakest, name, None) for name in ("value", "low", "high", "threshold")]
    return Claim(claim, "", "; ".join(map(str, findings)) or "-", *numbers, rule, verdict, 0, findings)


def claim_backbones(imic: list[Group], families: list[str], delta: float) -> Claim:
    """In every family, people are recognised better than by the untouched backbone, and objects not worse."""
    findings = []
    absent = [family for family in families if all(group.family != family for group in imic)]
    missing = [f"not measured (no four-task run of {', '.join(absent)})"] if absent else []
    for group in imic:
        leads = group.leads(group, "tuned", "foundation")
        found = [judge(f"{group.name} {domain}/{split}", lead, -delta if domain == "object" else 0)
                 for (domain, split), lead in leads.items()]
        if not leads:
            missing.append("not measured (no foundation scores; run evaluate.py without --no-foundation)")
        elif thin := only(domain for domain, _ in leads):
            found, missing = for_information(found), missing + thin
        findings += found
    return make_claim(f"Works on {', '.join(families)}",
                      f"lead over the untouched backbone above 0 (objects: above -{100 * delta:g} points), paired",
                      findings, missing)


def kinds_of_match(group: Group, expert: Group, domain: str) -> list[str]:
    """How an expert's images match a unified run's, within a quarter: "exposure" (of its domain), "images" (of all)."""
    seen, counts = expert.config["counts"][domain], group.config["counts"]
    return [kind for kind, count in (("exposure", counts[domain]), ("images", sum(counts.values())))
            if as_many(seen, count)]


def claim_experts(imic: list[Group], experts: list[Group], delta: float) -> Claim:
    """A unified run is not worse than the expert of any task by more than `margin`.

    The verdict rests on experts that saw their domain as often as the unified run did, where there are any; else on
    those that saw as many images in all. Either is listed.
    """
    findings, missing = [], []
    for group in imic:
        domains = group.config["domains"]
        if len(domains) < len(DOMAINS):
            missing.append(f"not measured ({group.name} learned {len(domains)} of {len(DOMAINS)} tasks)")
        for domain in domains:
            rivals = [(kind, e) for e in experts if e.start == group.start and e.config["domains"] == [domain]
                      for kind in kinds_of_match(group, e, domain)]
            deciding = "exposure" if any(kind == "exposure" for kind, _ in rivals) else "images"
            found = []
            for kind, expert in rivals:
                theirs = {key[:2]: figure.value for key, figure in expert.headline("tuned").items()}
                for key, lead in group.leads(expert).items():
                    found.append(judge(f"{group.name} against {expert.name} {'/'.join(key)}", lead,
                                       -margin(theirs[key], delta)))
                    found[-1].note = f"matched in {kind}"
                    if kind != deciding:
                        found[-1:] = for_information(found[-1:])
            findings += found
            if not any(f.verdict for f in found):
                missing.append(f"not measured (no expert run, --domains {domain}, of the same backbone and number of "
                               "images, evaluated alike)")
    missing = missing or ([] if imic else ["not measured (no IMIC run)"])
    return make_claim("On par with domain experts on all four tasks at once",
                      f"lead above -{100 * delta:g} points (beside an expert above 90 %: at most a tenth of its error) "
                      "on every task, paired", findings, missing)


def claim_humans(imic: list[Group]) -> Claim:
    """The model is above the human raters of the same trials, over all four tasks together."""
    findings, missing = [], []
    for group in imic:
        rows = group.rows("tuned", lambda row: "minus human" in row.metric or "raters beaten" in row.metric)
        each = group.rows("tuned", lambda row: row.metric.startswith("AUC of rater "))
        raters = len({metric for domain, _, metric, _ in each if domain == "all"})
        tasks = {domain for domain, *_ in rows} - {"all"}
        worse = {key[0] for key, figure in rows.items() if "minus human" in key[2] and figure.high < 0}
        below = [domain for domain in DOMAINS if domain in worse]
        thin = only(tasks) if rows else []
        if rows and raters < 2:
            thin.append(f"not measured ({raters or 'no'} rater{'s' * (raters != 1)} of all tasks; two are the least)")
        for (domain, split, metric, _), figure in rows.items():
            overall = domain == "all" and "minus human" in metric
            finding = judge(f"{group.name} {domain} {metric}", figure, 0, "+.1f" if "minus" in metric else ".1f")
            if overall:
                finding.note = f"{raters} raters" + f", below people on {', '.join(below)}" * bool(below)
                if finding.verdict == HOLDS and below:
                    finding.verdict = f"holds, but below people on {' and '.join(below)}"
            if not overall or thin:  # single tasks and shares are told, and decide nothing
                finding.verdict, finding.threshold = "", None
            if not overall:
                finding.what = f"{group.name} {domain}/{split} {metric}"
            findings.append(finding)
        missing += thin
    if not missing and not any(f.verdict for f in findings):
        missing = ["not measured (no human trials: evaluate.py --humans)"]
    return make_claim("More accurate than humans at multi-tasking", "model minus humans, all four tasks together, of "
                      "at least two raters, above 0", findings, missing)


def claim_generalisation(imic: list[Group], least: float) -> Claim:
    """Retention on out-of-distribution splits, where the untouched backbone is above chance."""
    metric = f"retention of {HEADLINE['classification']}"
    findings = [judge(f"{group.name} {domain}/{split}", figure, least, ".0f") for group in imic
                for (domain, split, _, _), figure in
                group.rows("tuned", lambda row: row.out_of_distribution and row.metric == metric).items()]
    missing = [] if findings else ["not measured (no out-of-distribution split on which the foundation beats chance)"]
    return make_claim("Generalisation outside the training distribution is not substantially harmed",
                      f"retention above {100 * least:g} %", findings, missing)


def find_fallen(other: Group, early: dict[tuple, Figure], experts: list[Group], delta: float) -> dict[tuple, str]:
    """The earlier tasks that a sequential run lost, and what shows it; by domain and split.

    Lost is what ends by delta below the untouched backbone, below the run's own best stage, or (`margin`)
    below the expert that saw the domain as often. Intervals by Bonferroni over the earlier tasks.
    """
    own, top, fallen = other.leads(other, "tuned", "foundation"), 1 - 0.025 / max(len(early), 1), {}
    for key in early:
        signs = []
        if key in own and own[key].quantile(top) <= -delta:
            signs.append("the untouched backbone")
        if other.lost.get("/".join(key), 0) >= delta:
            signs.append("its best stage")
        for expert in experts:
            if (expert.start == other.start and expert.config["domains"] == [key[0]]
                    and "exposure" in kinds_of_match(other, expert, key[0])):
                lead = other.leads(expert).get(key)
                theirs = next((f.value for k, f in expert.headline("tuned").items() if k[:2] == key), 0)
                if lead and lead.quantile(top) <= -margin(theirs, delta):
                    signs.append(expert.name)
        if signs:
            fallen[key] = ", ".join(signs)
    return fallen


def claim_forgetting(imic: list[Group], sequential: list[Group], experts: list[Group], delta: float) -> Claim:
    """Sequential training lost a task that it learned before the last, and ends below IMIC there; IMIC falls on none.

    Where it lost nothing, nothing can be said about what the interleaved run prevents.
    """
    findings, further = [], []
    for group in imic:
        held = [judge(f"{group.name} over the untouched backbone {domain}/{split}", lead, -delta)
                for (domain, split), lead in group.leads(group, "tuned", "foundation").items()]
        others = [s for s in sequential if s.start == group.start and s.config["domains"] == group.config["domains"]]
        verdicts, compared, watched = [], False, False
        for other in others:
            early = {key: lead for key, lead in group.leads(other).items() if key[0] != other.last}
            own, fallen = other.leads(other, "tuned", "foundation"), find_fallen(other, early, experts, delta)
            compared, watched = compared or bool(early), watched or bool(own or other.lost)
            lower = {key: early[key].quantile(0.025 / len(early)) for key in fallen}
            best = max(lower, key=lower.get, default=None)  # one task that is forgotten is enough
            for key, lead in early.items():
                notes = [f"sequential over the untouched {interval(show(own[key]), '+.1f')}"] if key in own else []
                notes += [f"sequential below {fallen[key]}"] if key in fallen else []
                findings.append(Finding(f"{group.name} over {other.name} {'/'.join(key)}", *show(lead).values(), "",
                                        note="; ".join(notes), threshold=0 if key == best else None))
            if fallen:
                verdicts.append(HOLDS if lower[best] > 0 else
                                FAILS if all(early[key].high <= delta for key in fallen) else WIDE)
        if not others:
            verdicts = ["not measured (no run of --schedule sequential of the same backbone)"]
        elif not held:
            verdicts = ["not measured (no foundation scores)"]
        elif not compared:
            verdicts = ["not measured (no figure in common with the sequential run)"]
        elif thin := only(domain for domain, _ in group.leads(group, "tuned", "foundation")):
            verdicts = thin
        elif not verdicts:
            verdicts = ["not measured (the sequential run forgot nothing here)" if watched else
                        "not measured (the sequential run has neither foundation scores nor looks of --eval-every)"]
        else:
            findings, held = findings + held, []
        findings += for_information(held)
        further += verdicts
    return make_claim("Sequential fine-tuning forgets where the interleaved one does not",
                      f"an earlier task of the sequential run fell by {100 * delta:g} points (below the untouched "
                      "backbone, its own best stage or the expert matched in exposure) and is lower than IMIC's, "
                      "paired, Bonferroni; IMIC nowhere below the untouched backbone by as much", findings,
                      further or ["not measured (no IMIC run)"])


def claim_separable(imic: list[Group], least: float) -> Claim:
    """Logistic regression tells the tasks apart, better than format, sources and the untouched backbone explain."""
    findings, missing = [], []
    for group in imic:

        def accuracy(space: str, group=group) -> dict | None:
            return group.analysed(lambda a: a["separability"] and a["separability"]["spaces"].get(space, {})
                                  .get("logistic"))

        value = accuracy("tuned")
        if value is None:
            missing.append("not measured (no analysed run of two or more tasks; call analyze.py --run RUN)")
            continue
        finding = Finding(f"{group.name} balanced accuracy", *value.values(),
                          decide(value["low"], value["high"], least), ".1f", threshold=least)
        findings.append(finding)
        unbeaten, unknown = [], False
        controls = {"pixels": "pixel statistics", "foundation": "the untouched backbone",
                    "pixels canon": "pixel statistics in one format",
                    "foundation canon": "the untouched backbone in one format"}
        for key, name in controls.items():
            lead = group.analysed(lambda a, key=key: a["separability"]["spaces"].get(key, {}).get("lead_of_tuned"))
            if lead is None:
                unknown = True
                continue
            findings.append(Finding(f"lead over {name}", *lead.values(), ""))
            if not lead["low"] > 0:
                unbeaten.append(name)
        limits = [f"no better than {' or '.join(unbeaten)}"] if unbeaten else []
        plain = accuracy("tuned canon")
        unknown |= plain is None
        if plain is not None:
            findings.append(Finding("in one format", *plain.values(), "", ".1f"))
            limits += ["not in one format"] if not plain["low"] > least else []
        unseen = []
        for row in group.runs[0].analysis["separability"]["unseen_sources"]:
            place = (row["domain"], row["source"])
            recall = group.analysed(lambda a, place=place: next(
                (r["spaces"]["tuned"] for r in a["separability"]["unseen_sources"]
                 if (r["domain"], r["source"]) == place), None))
            if recall is not None:
                unseen.append(Finding(f"unseen source {'/'.join(place)}", *recall.values(), "", ".1f"))
        findings += unseen
        limits += ["not on unseen sources"] if any(not recall.low > least for recall in unseen) else []
        if finding.verdict == HOLDS:
            if limits:
                finding.verdict = f"holds, but {' and '.join(limits)}"
            elif unknown:
                finding.verdict = "not measured (no matched-format control; call analyze.py --run RUN --canon 32)"
        if thin := only(set.intersection(*(set(run.analysis["domains"]) for run in group.runs))):
            finding.verdict, finding.threshold, missing = "", None, missing + thin
    return make_claim("The tasks are linearly separable (beyond format)",
                      f"balanced accuracy of the four tasks above {100 * least:g} %, in one format and on unseen "
                      "sources too, leads over every control above 0, paired", findings,
                      missing or ([] if imic else ["not measured (no IMIC run)"]))


def above_chance(pair: dict) -> bool:
    """Whether the full space is above chance, so that a share of what it is above means something.

    An analysis of before that interval was kept ("full_low") must show it by far: with a share that is known within
    its own size, and a score of six times chance or halfway from there to perfect. In a gallery of 200 for 200 probes,
    noise hits once and six times in one case of 2000.
    """
    if None in (pair["kept"], pair["low"], pair["high"]):
        return False
    full, chance = pair["full"], pair["chance"]
    if (low := pair.get("full_low")) is not None:
        return low > chance
    return pair["high"] - pair["low"] < 1 and full - chance >= min(5 * chance, (1 - chance) / 2)


def claim_components(imic: list[Group], least: float) -> Claim:
    """Fewer than 100 components of any task keep every other task's score, and more than other subspaces do."""
    findings, further = [], []
    for group in imic:
        found = [run.analysis["transfer"]["tuned"] for run in group.runs if run.analysis]
        across = [(p["fit"], p["test"]) for p in found[0]["pairs"] if p["fit"] != p["test"]] if found else []
        if not across or len(found) < len(group.runs):
            further.append("not measured (no analysed run of two or more tasks; call analyze.py --run RUN)")
            continue
        ks, dim, images = {p["k"] for t in found for p in t["pairs"]}, found[0]["dim"], min(
            t["images_per_task"] for t in found)
        if len(ks) > 1:
            further.append(f"not measured (seeds of {group.name} analysed at k = {' and '.join(map(str, sorted(ks)))}; "
                           "call analyze.py on each with the same --components)")
            continue
        k, verdicts, unbeaten, shown = ks.pop(), [], {}, []
        for fit, test in across:

            def of(name: str | None, fit=fit, test=test) -> Callable[[dict], dict | None]:
                def get(analysis: dict) -> dict | None:
                    pair = next((p for p in analysis["transfer"]["tuned"]["pairs"]
                                 if (p["fit"], p["test"]) == (fit, test)), None)
                    if pair is None or not above_chance(pair):
                        return None
                    return pair.get(name) if name else {"value": pair["kept"], "low": pair["low"], "high": pair["high"]}
                return get

            value = group.analysed(of(None))
            if value is None:
                verdicts.append(f"not measured (the full space is not above chance: {fit} for {test})")
                continue
            verdicts.append(decide(value["low"], value["high"], least))
            needed = [f"{name} {interval(group.analysed(of(name)), '.0f', 1)}" for name in ("k95", "k99")]
            shown.append(Finding(f"{group.name}: {fit} for {test}, k = {k} of {dim}", *value.values(), "", ".1f",
                                 ", ".join(needed) + f"; few images for {dim} dimensions" * (images < 5 * dim)))
            for key, name in (("over_random", "random"), ("over_foundation", "foundation")):
                lead = group.analysed(of(key))
                if lead is None:
                    unbeaten.setdefault("unknown" if key == "over_foundation" else name, None)
                elif not lead["low"] > 0:
                    unbeaten.setdefault(name, None)
        verdict = join(verdicts)
        unmeasured = [v for v in verdicts if v != WIDE and v.startswith("not measured")]
        if dim <= 100:
            verdict = f"not measured (a space of {dim} dimensions: 100 components are all of it)"
        elif k >= 100:
            verdict = "not measured (analysed at 100 components or more; call analyze.py --components 99)"
        elif thin := only({task for pair in across for task in pair}):
            verdict = thin[0]
        elif set(across) != CROSS:
            verdict = f"not measured (only {len(set(across))} of {len(CROSS)} pairs of tasks)"
        elif images <= k + 1:
            verdict = f"not measured (rank-limited: {images} images of each task for {dim} dimensions)"
        elif unmeasured:
            verdict = unmeasured[0]
        elif verdict == FAILS and k < 99:
            verdict = f"not measured (k = {k} is too few, which says nothing of 99; call analyze.py --components 99)"
        elif verdict == HOLDS and (names := [n for n in unbeaten if n != "unknown"]):
            verdict = f"holds, but no better than {' or '.join(names)} {'subspaces' if names == ['random'] else 'PCs'}"
        elif verdict == HOLDS and unbeaten:
            verdict = "not measured (no foundation PCs of the same width)"
        further.append(verdict)
        if verdict == WIDE or verdict.startswith((HOLDS, FAILS)):
            shown = [replace(finding, threshold=least) for finding in shown]
        shown.sort(key=lambda f: f.value)
        findings += shown
    return make_claim("Fewer than 100 principal components of any task serve all the others",
                      f"above {100 * least:g} % of (score - chance) kept by each of the 12 pairs, leads over random "
                      "subspaces and foundation PCs above 0, paired", findings,
                      further or ["not measured (no IMIC run)"])


def make_table(runs: list[Measured], delta: float, retention: float, separable: float, keep: float) -> list[Claim]:
    """The claims about the paper's three backbones; then, for each other one, what was measured on it.

    Runs of all four tasks decide; those of fewer are listed for information.
    """
    groups, paper = group_runs(runs), list(backbones.BACKBONES)
    others = sorted({run.family for run in runs} - set(paper))
    table = []
    for families in (paper, *([name] for name in others)):
        here = [group for group in groups if group.family in families]
        by_role = {role: [g for g in here if g.config["role"] == role] for role in RUN_ROLES}
        unified = [g for g in by_role["unified"] if g.config["schedule"] in ("A", "B")]  # `alternate` is a baseline
        imic = [g for g in unified if set(g.config["domains"]) == set(DOMAINS)]
        fewer = [g for g in unified if g not in imic]
        if families is not paper and not unified:
            continue
        experts, sequential = by_role["expert"], by_role["sequential"]
        for claim_of, rivals in (
            (partial(claim_backbones, families=families, delta=delta), []),
            (partial(claim_experts, experts=experts, delta=delta), experts),
            (claim_humans, []),
            (partial(claim_generalisation, least=retention), []),
            (partial(claim_forgetting, sequential=sequential, experts=experts, delta=delta), sequential),
            (partial(claim_separable, least=separable), []),
            (partial(claim_components, least=keep), []),
        ):
            claim = claim_of(imic)
            there = [name for name in families if claim_of([g for g in imic if g.family == name]).findings]
            claim.seeds = min((group.seeds for group in imic + rivals), default=0)
            if fewer:
                claim.findings += for_information(claim_of(fewer).findings)
                claim.measured = "; ".join(map(str, claim.findings)) or "-"
                if not imic:
                    claim.verdict = only(max((g.config["domains"] for g in fewer), key=len))[0]
            claim.backbones = f"{families[0]} (not one of the paper's)" if families is not paper else \
                ", ".join(there) or f"none of {', '.join(families)}"
            table.append(claim)
    return table


# ---------------------------------------------------------------- the job


def to_row(curve: Curve) -> dict:
    """A curve for JSON, with 95 % intervals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a column of NaN has no quantile
        low, high = np.nanquantile(curve.draws, [0.025, 0.975], axis=0)
    row = {"kind": curve.kind, "fit": curve.fit, "number": curve.number, "test": curve.test, "ks": curve.ks}
    named = {"score": curve.score, "kept": curve.kept, "low": low, "high": high}
    return row | {name: [None if v is None else round(v, 6) for v in map(finite, values)]
                  for name, values in named.items()}


def analyse(options: dict) -> int:
    """Analyse one run and write RUN/analysis."""
    run = load_run(Path(options["run"]), options["allow_partial"])
    data, seed, draws = options["data"] or run.config["data"], options["seed"], options["bootstrap"]
    root, device = open_root(Path(data)), pick_device(options["device"])
    splits, left_out = choose_pairs(root, run.config["domains"], options["splits"], data)
    if not splits:
        raise InputError(f"{data}: none of {', '.join(run.config['domains'])} has both a training and a test split: "
                         "nothing to analyse")
    degraded = {}
    if run.config.get("degrade") and "face_lq" in splits:  # the network never saw these images as they are stored
        degraded["face_lq"] = run.config["degrade_severity"]
        base, test = splits["face_lq"]
        splits["face_lq"] = (Degraded(base.folder, degraded["face_lq"], seed), test)
    delete = parse_range(options["delete"])
    embedders = {weights: make_embedder(lambda load=load: load(run), weights, run.folder / "eval", options)
                 for weights, load in (("foundation", load_foundation), ("tuned", load_tuned))}
    dims = [embedder.model.dim for embedder in embedders.values()]
    check_range(delete, min(dims))
    embedded = {weights: {domain: tuple(read_embeddings(embedder, split) for split in pair)
                           for domain, pair in splits.items()}
                for weights, embedder in embedders.items()}
    tasks = []
    for domain, (base, test) in splits.items():
        readable = tuple(find_readable([spaces[domain][i] for spaces in embedded.values()]) for i in range(2))
        if bad := sum(int((~good).sum()) for good in readable):
            print(f"  {domain}: {bad} unreadable images left out")
        if task := make_task(base, test, readable, options["limit"], seed):
            tasks.append(task)
        else:
            left_out[domain] = "too few identities to fit on some and test others"
    drop_tested(tasks, FITTED * max(dims), seed)
    left_out |= {task.domain: "the identities of its training split are all tested" for task in tasks
                 if len(task.fit) < 2}
    tasks = [task for task in tasks if task.domain not in left_out]
    for domain, why in left_out.items():
        print(f"  {domain}: left out: {why}")
    if not tasks:
        raise InputError(f"{data}: no domain has enough identities to fit on some and test others: nothing to analyse")
    result: dict = {"run": run.folder.name, "domains": [task.domain for task in tasks],
                    "splits": {task.domain: [task.train.name, task.split.name] for task in tasks},
                    "left_out": left_out, "degraded": degraded, "transfer": {},
                    "separability": None, "sharing": {}, "cka": {}, "map": options["map"]}
    curves, components = {}, []
    for weights, spaces in embedded.items():
        headline = min(options["components"], next(iter(spaces.values()))[0].shape[1])
        tuned = weights == "tuned"
        found = transfer(spaces, tasks, headline, draws, seed, foundation=embedded["foundation"] if tuned else None,
                         delete=delete, importance=options["importance"] if tuned else 0, controls=tuned,
                         device=device)
        bases = found.pop("bases")
        curves[weights] = [to_row(curve) for curve in found.pop("curves")]
        result["transfer"][weights] = found
        result["sharing"][weights] = measure_sharing(spaces, tasks, bases, headline)
        components += [{"weights": weights, **row} for row in measure_components(spaces, tasks, bases, seed)]
    for task in tasks:
        before, after = (embedded[weights][task.domain][1][task.probe[:4000]] for weights in ("foundation", "tuned"))
        result["cka"][task.domain] = finite(debiased_cka(before, after)) if len(before) > 3 else None
    if len(tasks) > 1:
        features, others = make_features(embedders, embedded, splits, options["canon"]), {}
        for task in tasks:
            tests = [s for s in root[task.domain].values() if s.protocol and s.name != task.split.name]
            others[task.domain] = [(task.split, task.probe)] + [
                (s, np.flatnonzero(find_readable([read_embeddings(embed, s) for embed in
                                               embedders.values()]) & (s.labels >= 0)))
                for s in tests]
        result["separability"] = measure_separability(features, tasks, others, draws, seed, options["limit"])
    points = draw_up_map(embedded["tuned"], tasks, options["map"], seed)
    folder = run.folder / "analysis"
    print(write_analysis(folder, result, curves, components, points))
    print(f"written: {folder}/report.md, analysis.json, tables and figures; "
          f"next: python analyze.py claims {run.folder.parent}")
    return 0


def find_readable(spaces: list[np.ndarray]) -> np.ndarray:
    """Rows, bool [n], that are finite in all embeddings [n, D] of a split: images may have been repaired meanwhile."""
    return np.logical_and.reduce([np.concatenate([np.isfinite(x[i : i + ROWS][:, 0])
                                                  for i in range(0, max(len(x), 1), ROWS)]) for x in spaces])


def make_features(embedders: dict, embedded: dict, splits: dict, side: int) -> dict[str, Features]:
    """The spaces in which tasks are told apart: both backbones and pixel statistics, as they are and in one format."""

    def embeddings(weights: str) -> Features:
        known = {s.folder: x for domain, pair in splits.items()
                 for s, x in zip(pair, embedded[weights][domain], strict=True)}
        return lambda split, rows: (
            known[split.folder] if split.folder in known else read_embeddings(embedders[weights], split))[rows]

    def in_one_format(weights: str) -> Features:
        return lambda split, rows: embedders[weights](Canon(split, rows, side))

    def pixels_in_one_format(split: Split, rows: np.ndarray) -> np.ndarray:
        return pixel_statistics(Canon(split, rows, side), np.arange(len(rows)))

    spaces: dict[str, Features] = {weights: embeddings(weights) for weights in ("tuned", "foundation")}
    spaces["pixels"] = pixel_statistics
    if side:
        spaces |= {f"{weights} canon": in_one_format(weights) for weights in ("tuned", "foundation")}
        spaces["pixels canon"] = pixels_in_one_format
    return spaces


def parse_range(text: str) -> tuple[int, int]:
    """The a and b of "a:b", components from a (counted from 0) to before b."""
    try:
        a, b = map(int, text.split(":"))
    except ValueError:
        a, b = -1, -1
    if not 0 <= a <= b:
        raise InputError(f"--delete {text}: want A:B, components from A (counted from 0) to before B, such as 0:10")
    return a, b


def check_range(delete: tuple[int, int], dim: int) -> None:
    """Refuse components that a space of `dim` does not have, and to delete them all."""
    a, b = delete
    if b > dim:
        raise InputError(f"--delete {a}:{b}: the space has {dim} dimensions, so that the last is {dim - 1}")
    if b - a == dim:
        raise InputError(f"--delete {a}:{b}: these are all {dim} dimensions: nothing would be left")


@click.group(invoke_without_command=True, context_settings={"show_default": True, "max_content_width": 120},
             help=__doc__.split("\n\n")[0])
@evaluate.model_options
@click.option("--splits", metavar="NAMES",
              help="Comma-separated domain/split to test on, one a domain (default: a domain's first in distribution).")
@click.option("--components", type=click.IntRange(1), default=99, help="The k of the claim: fewer than 100.")
@click.option("--limit", type=click.IntRange(10), default=2000, help="At most so many probes per task.")
@click.option("--bootstrap", type=click.IntRange(2), default=500, help="Resamplings for the intervals.")
@click.option("--delete", default="0:10", metavar="A:B",
              help="Also score without the components A (from 0) to before B; 0:0: do not.")
@click.option("--importance", type=click.IntRange(0), default=100,
              help="Also score without each of so many first components, one at a time; 0: do not.")
@click.option("--canon", type=click.IntRange(0, 128), default=32,
              help="Pixels of detail of the matched-format control of separability; 0: leave it out.")
@click.option("--map", type=click.Choice(["tsne", "pca"]), default="tsne", help="How the map is drawn up.")
@click.pass_context
def main(context: click.Context, **options) -> int | None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("analyze.py runs as one process, not under torchrun (evaluate.py can embed on many devices)")
    if context.invoked_subcommand:
        refuse_options(context)
        return None
    if not options["run"]:
        raise InputError("what is to be analysed? give --run RUN, or `claims RUNS_FOLDER`")
    return analyse(options)


@main.command(help="Turn the runs of a folder into one verdict per claim of the paper's abstract.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--delta", type=Number(0, 1), default=0.01,
              help="Margin of non-inferiority: to experts, and to the untouched backbone.")
@click.option("--retention", type=Number(0), default=0.95, help="Least retention out of distribution.")
@click.option("--separable", type=Number(0, 1), default=0.95, help="Least balanced accuracy.")
@click.option("--keep", type=Number(0, 1), default=0.95, help="Least share that the components keep.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
def claims(folder: Path, delta: float, retention: float, separable: float, keep: float) -> int:
    table = make_table(read_runs(folder), delta, retention, separable, keep)
    lines = ["| claim | backbones | measured | threshold | verdict |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {c.claim} | {c.backbones} | {c.measured} | {c.rule} | {c.told} |" for c in table]
    rows = [asdict(claim) for claim in table]
    write_atomically(folder / "claims.json", lambda path: path.write_text(json.dumps(rows, indent=1) + "\n"))
    write_atomically(folder / "claims.md", lambda path: path.write_text("\n".join(lines) + "\n"))
    write_csv(folder / "claims.csv", [{k: v for k, v in row.items() if k != "findings"} for row in rows])
    for claim in table:
        print(f"{claim.claim} [{claim.backbones}]\n    {claim.told}\n    measured: {claim.measured}\n"
              f"    threshold: {claim.rule}")
    print(f"written: {folder}/claims.md, claims.json, claims.csv")
    return 0


@main.command(help="Time the transfer of four tasks, all controls, on random embeddings.")
@click.option("--probes", type=click.IntRange(10), default=10_000, help="Probes of a task, and its gallery.")
@click.option("--dim", type=click.IntRange(2), default=1024, help="Dimensions of the embeddings.")
@click.option("--shots", type=click.IntRange(2), default=10, help="Images of an identity.")
@click.option("--bootstrap", type=click.IntRange(2), default=500, help="Resamplings for the intervals.")
@click.option("--grid/--no-grid", default=True, help="Time the whole grid, too, and not its parts alone.")
@click.option("--slow", is_flag=True, help="Time the plain definition, too, at the largest k.")
@click.option("--device", default="auto", help="auto, cpu or cuda.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the embeddings.")
def bench(probes: int, dim: int, shots: int, bootstrap: int, grid: bool, slow: bool, device: str, seed: int) -> int:
    rng, where = np.random.default_rng(seed), pick_device(device)
    ids = np.arange(probes) // shots
    people, each, embedded, tasks = ids.max() + 1, np.arange(probes), {}, []
    mates = [np.setdiff1d(np.arange(i * shots, min((i + 1) * shots, probes)), [row]) for row, i in enumerate(ids)]
    if probes % shots == 1:
        raise InputError(f"--probes {probes} --shots {shots}: the last identity would have one image alone")
    for domain in DOMAINS:
        scale = 1 / np.sqrt(1 + np.arange(dim))  # a falling spectrum
        parts = [unit((rng.standard_normal((people, dim))[ids] + rng.standard_normal((probes, dim))) * scale)
                 for _ in range(2)]
        embedded[domain] = tuple(part.astype(np.float32) for part in parts)
        # scored as people are, objects too: a gallery of single images is the dearest case
        tasks.append(Task(domain + "*", None, None, each, each, each, each, ids, mates, list(each[:, None])))
    embedded = {f"{domain}*": parts for domain, parts in embedded.items()}
    task = tasks[0]
    vectors = embedded[task.domain][1].astype(np.float32)

    def clock(what: str, work: Callable[[], object]) -> None:
        start, busy = time.perf_counter(), time.process_time()
        work()
        print(f"{what}: {time.perf_counter() - start:.1f} s, {time.process_time() - busy:.1f} s of CPU", flush=True)

    print(f"{probes:,} probes x {probes:,} vectors, {dim} dimensions, on {where}, {torch.get_num_threads()} threads")
    every, controls = list(range(1, dim + 1)), sorted({k for k in GRID if k < dim} | {dim})
    clock("one sweep at every k", lambda: hits_by_k(vectors, vectors, task, every, where))
    clock(f"one at the {len(controls)} k of a control", lambda: hits_by_k(vectors, vectors, task, controls, where))
    if slow:
        clock(f"the plain definition at k = {dim}", lambda: hits_one_by_one(vectors, vectors, task, [dim]))
    mean, basis, few = np.zeros(dim), np.eye(dim), sorted({k for k in (*FURTHER, 99) if k < dim})
    clock(f"{min(100, dim)} components left out, each alone",
          lambda: hits_without_each(vectors, vectors, task, min(100, dim), where))
    clock("other metrics of a pair of tasks", lambda: measure_further(
        task, (vectors, vectors), mean, basis, [*few, dim], bootstrap, seed, where))
    clock("the same of a random subspace", lambda: measure_further(
        task, (vectors, vectors), mean, basis, few, 0, seed, where))
    if grid:
        clock("4 x 4 tasks with every control", lambda: transfer(
            embedded, tasks, min(99, dim), bootstrap, seed, foundation=embedded, delete=(0, 1), importance=100,
            device=where))
    return 0


if __name__ == "__main__":
    run_command(main)
