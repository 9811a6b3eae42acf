"""Subspaces: how well the leading components of one task serve another, at every k, beside controls.

Copy with it: data_prep/, kernels/gather.py, kernels/gather_triton.py, models/, protocols/.
"""

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from data_prep import progress
from protocols.bootstrap import Estimate, bootstrap_counts, finite, minus, show, unit
from protocols.results import Pair, Serving, Transfer
from protocols.tasks import Task, vectors_of

# numbers of components at which controls are measured; the claim itself is measured at every one
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 99, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
LEVELS = (0.99, 0.95)  # k* is the number of components that keeps this share of (score - chance)
RANDOM_SEEDS = 10
TIE = 1e-6  # cosines that differ by less are equal: far above rounding in float32, far below what a score can show
FITTED = 20  # most images per dimension that are fitted: more cost time and hardly change a covariance


def principal_components(x: np.ndarray, device: torch.device | str = "cpu"
                         ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [D], components as columns [D, D] by falling variance, variances [D] of rows x [n, D] (float64)."""
    rows = torch.as_tensor(x, device=device).double()
    mean = rows.mean(0)
    rows = rows - mean
    variances, vectors = torch.linalg.eigh(rows.T @ rows / max(len(rows) - 1, 1))
    return mean.cpu().numpy(), vectors.flip(1).cpu().numpy(), variances.flip(0).clamp(min=0).cpu().numpy()


def determined(variances: np.ndarray, n: int) -> int:
    """How many components n images determine: n - 1, or fewer where images repeat or dimensions are dead.

    Nothing varies along the others: their basis is an accident of rounding, so no figure may depend on it.
    """
    rounding = variances[0] * len(variances) * np.finfo(np.float64).eps
    return max(min(n - 1, int((variances > rounding).sum())), 1)


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
        # centred first: else the rounding error of a large mean would enter every small coordinate
        return (to_device(self.x[rows], self.device) - self.mean) @ self.basis


Vectors = np.ndarray | torch.Tensor | Turned


def hits_one_by_one(probe: np.ndarray, gallery: np.ndarray, task: Task, ks: list[int]) -> np.ndarray:
    """Whether each probe's nearest gallery vector is a mate with the first k coordinates, bool [len(ks), n].

    The definition, as a full evaluation for every k of `ks`; `hits_by_k` gives the same. A mate must be nearer than
    every other vector by more than a TIE: with one coordinate every cosine is 1 or -1, and rounding must not choose
    among them. `probe`, `gallery`: coordinates [n, D] and [m, D], largest component first.
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
    """`hits_one_by_one`, `ks` rising, at the cost of one evaluation of scores and, per k, three passes over a block.

    With one coordinate more, S += q_k g_kᵀ and |g|² += g_k². `size`: see `sweep`.
    """
    columns, edges = torch.tensor(ks, device=device) - 1, [0, *ks]

    def sums(products: torch.Tensor) -> torch.Tensor:
        return products.cumsum(1, dtype=torch.float64)[:, columns]

    def advance(i: int, scores: torch.Tensor, x: torch.Tensor, g: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
        a, b = edges[i : i + 2]
        return scores.addr_(x[a], g[a]) if b == a + 1 else scores.addmm_(x[a:b].T, g[a:b])

    return sweep(probe, gallery, task, len(ks), sums, advance, device, size)


def sweep(probe: Vectors, gallery: Vectors, task: Task, steps: int, sums: Callable[[torch.Tensor], torch.Tensor],
          advance: Callable[..., torch.Tensor], device: torch.device | str, size: int | None) -> np.ndarray:
    """Whether the nearest vector of each probe is a mate in one subspace after another, bool [steps, n].

    The nearest vector has the largest S / |g|: a probe's length changes no order. The few scores of mates are kept
    apart, so that S holds only wrong ones and the largest of a row is enough. Scores are made in blocks that stay in
    the cache. Memory: the probes, a block of the gallery twice with its inverse lengths [block, steps], the best scores
    [steps, n] of mates and of others, and for each of torch's threads two blocks of scores.

    Args:
        probe, gallery: coordinates, [n, D] and [m, D].
        steps: number of subspaces.
        sums: products of coordinates [b, D] -> what they sum to in each subspace, float64 [b, steps].
        advance: number of the step, scores [b, m] (0 before the first step, which it may change: -inf stays so),
            coordinates [D, b] and [D, m], a spare block -> the scores of that step.
        size: scores held at once (default: what fits the cache of a core; on a GPU 2**26).
    """
    size = size or (1 << 19 if torch.device(device).type == "cpu" else 1 << 26)
    q = torch.as_tensor(probe[:], device=device)
    # of a block of the gallery: for scores of 32 probes, so that reading it costs little beside them
    width = min(len(gallery), max(size // 32, 1), 1 << 18)
    block = max(1, min(size // width, len(q)))
    best, wrong = (torch.full((steps, len(q)), -torch.inf, dtype=q.dtype, device=device) for _ in range(2))
    many, flat = np.array([len(mates) for mates in task.mates]), np.concatenate(task.mates)
    places = (many.cumsum() - many)[:, None] + np.minimum(np.arange(many.max()), many[:, None] - 1)
    mates = torch.as_tensor(flat[places], device=device)  # [n, most]; padded with the last one
    owner = np.repeat(np.arange(len(many)), many + np.array([len(out) for out in task.ignored]))  # rising
    apart = np.concatenate([part for pair in zip(task.mates, task.ignored, strict=True) for part in pair])
    apart = torch.as_tensor(np.stack([owner, apart]), device=device)  # vectors that are not wrong

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
        not_wrong = apart[:, slice(*np.searchsorted(owner, [first, first + block]))] - torch.tensor(
            [[first], [start]], device=device)
        not_wrong = not_wrong[:, (not_wrong[1] >= 0) & (not_wrong[1] < len(g))]
        scores[not_wrong[0], not_wrong[1]] = -torch.inf
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
        # one thread a block: the threads of such short operations would mostly wait for each other
        torch.set_num_threads(1 if q.device.type == "cpu" else threads)
        try:
            with ThreadPoolExecutor(threads if q.device.type == "cpu" else 1, initializer=torch.set_num_threads,
                                    initargs=(torch.get_num_threads(),)) as pool:
                list(pool.map(work, range(0, len(q), block)))
        finally:
            torch.set_num_threads(threads)
    lead = torch.cat([sums(part.square()).clamp(min=0).sqrt().to(q.dtype) for part in q.split(4096)]).T * TIE
    return (best - lead > wrong).cpu().numpy()


def show_needed(figure: Estimate, limit: int) -> dict[str, float | None]:
    """A k* for JSON; a value or an end of its interval that lies beyond the limit is null, and "above" is the limit."""
    draws = figure.draws[~np.isnan(figure.draws)]
    if math.isnan(figure.value) or not len(draws):
        return dict.fromkeys(("value", "low", "high"))
    # the ends are resampled values: nothing lies between a number and "beyond"
    ends = [figure.value, *np.quantile(draws, [0.025, 0.975], method="inverted_cdf")]
    named = dict(zip(("value", "low", "high"), map(finite, ends), strict=True))
    return named | ({"above": limit} if None in named.values() else {})


def kept(scores: np.ndarray, full: np.ndarray | float, chance: float) -> np.ndarray:
    """(score - chance) / (full - chance); NaN where the full space is not above chance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(full > chance, (scores - chance) / (full - chance), np.nan)


def components_needed(share: np.ndarray, ks: list[int], level: float) -> np.ndarray:
    """k*: the smallest of ks from which on every larger one keeps at least `level`; infinite: not even the largest.

    `share`: what is kept, [..., len(ks)]. Float [...]; NaN where a share is unknown.
    """
    short = ~(np.asarray(share) >= level)
    after = np.where(short.any(-1), len(ks) - short[..., ::-1].argmax(-1), 0)  # one after the last that is short
    return np.where(np.isnan(share).any(-1), np.nan, np.append(np.asarray(ks, dtype=float), np.inf)[after])


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
    full: Estimate  # the score of all D coordinates
    number: int | None = None  # of a random basis

    def at(self, k: int) -> Estimate:
        """What k coordinates keep."""
        i = self.ks.index(k)
        return Estimate(float(self.kept[i]), self.draws[:, i])

    def interval(self) -> np.ndarray:
        """95 % of what is kept, [2, len(ks)]; NaN where unknown."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a column of NaN has no quantile
            return np.nanquantile(self.draws, [0.025, 0.975], axis=0)


class Trial:
    """A task to be scored in one subspace after another, on a device.

    `vectors`: of its probes and gallery, [n, D] and [m, D]; `counts` [resamplings, n]: how often each probe is drawn.
    """

    def __init__(self, task: Task, vectors: tuple[np.ndarray, np.ndarray], counts: np.ndarray,
                 device: torch.device | str = "cpu") -> None:
        self.task, self.device, self.counts = task, device, to_device(counts, device)
        self.vectors = tuple(to_device(x, device) for x in vectors)

    @classmethod
    def of(cls, task: Task, embedded: tuple[np.ndarray, np.ndarray], draws: int, seed: int,
           device: torch.device | str) -> "Trial":
        """From the unit embeddings of the task's two splits, resampled by identity."""
        counts = np.array(list(bootstrap_counts(task.target, draws, seed)), dtype=np.float32)
        return cls(task, vectors_of(task, embedded), counts.reshape(draws, len(task.probe)), device)

    def turned(self, mean: np.ndarray, basis: np.ndarray) -> list[Turned]:
        """The vectors, centred by a mean [D], as coordinates in orthonormal columns [D, k]."""
        return [Turned(x, mean, basis, self.device) for x in self.vectors]

    def curve(self, kind: str, fit: str, mean: np.ndarray, basis: np.ndarray, ks: list[int],
              number: int | None = None) -> Curve:
        """The score with the first k coordinates of a basis [D, D] for every k of ks, and with all D for reference."""
        D, many = len(mean), len(ks)
        hits = hits_by_k(*self.turned(mean, basis), self.task, ks if ks[-1:] == [D] else [*ks, D], self.device)
        score, drawn = self.resample(hits)
        chance = self.task.chance()
        return Curve(kind, fit, self.task.domain, ks, score[:many], kept(score, score[-1], chance)[:many],
                     kept(drawn, drawn[:, -1:], chance)[:, :many], Estimate(float(score[-1]), drawn[:, -1]),
                     number)

    def resample(self, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Share of hits [steps, n], and of each resampling: float64 [steps] and [resamplings, steps]."""
        hits = to_device(hits, self.device)
        drawn = self.counts @ hits.T / self.counts.sum(1, keepdim=True)  # exact sums: whole numbers below 2**24
        return hits.mean(1, dtype=torch.float64).cpu().numpy(), drawn.cpu().numpy()


def to_device(x: np.ndarray | torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A float32 tensor on the device, without a copy if it already is one."""
    return torch.as_tensor(x, dtype=torch.float32, device=device)


Basis = tuple[np.ndarray, np.ndarray, np.ndarray]  # mean [D], components as columns [D, D], variances [D]


def draw_fits(tasks: list[Task], dim: int, seed: int) -> dict[str, np.ndarray]:
    """By domain, equally many rows of every task's training split, to fit components on."""
    rng, n = np.random.default_rng(seed), min(FITTED * dim, *(len(task.fit) for task in tasks))
    return {task.domain: rng.permutation(task.fit)[:n] for task in tasks}


def transfer(embedded: dict[str, tuple[np.ndarray, np.ndarray]], tasks: list[Task], headline: int, draws: int,
             seed: int, foundation: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
             device: torch.device | str = "cpu") -> tuple[Transfer, list[Curve], dict[str, Basis]]:
    """Components of every task, used by every task, beside random subspaces and the untouched backbone's components.

    Returns what each pair of tasks keeps, the curves, and the components by domain.

    Args:
        embedded: domain -> unit embeddings of its training and of its test split.
        headline: the k of the claim, lowered to the number of determined components.
        draws: resamplings, by identity.
        foundation: embeddings of the untouched backbone, whose components are also used on `embedded`.
    """
    D = next(iter(embedded.values()))[0].shape[1]
    chosen = draw_fits(tasks, D, seed)
    n = len(next(iter(chosen.values())))
    fits = {domain: principal_components(embedded[domain][0][rows], device) for domain, rows in chosen.items()}
    untouched = {}
    if foundation and next(iter(foundation.values()))[0].shape[1] == D:
        untouched = {domain: principal_components(foundation[domain][0][rows], device)
                     for domain, rows in chosen.items()}
    limit = min(determined(variances, n) for *_, variances in [*fits.values(), *untouched.values()])
    headline, every = min(headline, limit), list(range(1, limit + 1))
    grid, turns = control_grid(headline, limit), [random_basis(D, seed, i) for i in range(RANDOM_SEEDS)]
    curves, pairs, stars = [], [], {}
    bar = progress(total=len(tasks) ** 2, desc="transfer", unit="pair")
    for task in tasks:
        trial = Trial.of(task, embedded[task.domain], draws, seed, device)
        raw = trial.curve("raw", "", np.zeros(D), np.eye(D), [D]).full.value
        for fit, (mean, basis, _) in fits.items():
            # controls use the same mean, or they would also differ in their centring
            curve = trial.curve("components", fit, mean, basis, every)
            random = [trial.curve("random", fit, mean, turn, grid, number) for number, turn in enumerate(turns)]
            curves += curve, *random
            at_k, by_chance = curve.at(headline), combine(np.mean, [c.at(headline) for c in random])
            k99, k95 = (Estimate(float(components_needed(curve.kept, every, level)),
                                 components_needed(curve.draws, every, level)) for level in LEVELS)
            stars.setdefault(fit, []).append((k99, k95))
            coarse = [finite(components_needed(of, grid, level)) for of in (
                curve.kept[np.array(grid) - 1], np.mean([c.kept for c in random], axis=0)) for level in LEVELS]
            pairs.append(Pair(
                fit, task.domain, len(np.unique(task.target)), task.chance(), raw, curve.full.value, curve.full.low,
                curve.full.high, headline, *show(at_k).values(), show(by_chance), show(minus(at_k, by_chance)),
                show_needed(k99, limit), show_needed(k95, limit), *coarse))
            if untouched:
                curves.append(trial.curve("foundation", fit, mean, untouched[fit][1], grid))
                of_untouched = curves[-1].at(headline)
                pairs[-1].foundation, pairs[-1].over_foundation = show(of_untouched), show(minus(at_k, of_untouched))
            bar.update()
    bar.close()
    all_tasks = [Serving(fit, *(show_needed(combine(np.max, figures), limit) for figures in zip(*of, strict=True)))
                 for fit, of in stars.items()]
    return Transfer(pairs, all_tasks, n, n < 5 * D, D, limit), curves, fits


def control_grid(headline: int, limit: int) -> list[int]:
    """Numbers of components at which controls are measured: some up to the limit, and that of the claim."""
    return sorted({k for k in GRID if k < limit} | {headline, limit})


def random_basis(dim: int, seed: int, number: int) -> np.ndarray:
    """One of the random bases, orthonormal columns [D, D]."""
    return np.linalg.qr(np.random.default_rng((seed, number)).standard_normal((dim, dim)))[0]


def combine(how: Callable, figures: list[Estimate]) -> Estimate:
    """np.mean or np.max of several figures with equal numbers of resamplings; NaN where one is NaN."""
    return Estimate(float(how([f.value for f in figures])), how([f.draws for f in figures], axis=0))
