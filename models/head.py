"""MarginHead: the class weights of all domains and the losses on them, as one module."""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep import DOMAINS, Parsed, check_domain, progress
from data_prep.format import Split
from kernels.margin_loss import Shard, margin_loss, merge_over, sample_classes
from models.backbones import Backbone, embed_rows, text_weights
from models.runs import Ranks

MANY_CLASSES = 10_000  # a domain with fewer classes is not sampled unless --sample-classes names it

# ---------------------------------------------------------------- the loss of a domain


@dataclass(frozen=True)
class Loss:
    """Softmax cross-entropy over scaled cosines with margins, of one domain: what `margin_loss` takes for it."""

    scale: float  # s
    additive: float = 0.0  # CosFace's margin on the cosine, 0..2
    angular: float = 0.0  # ArcFace's margin in radians, 0..pi
    concentration: float = 0.0  # AdaFace's h: how much the margins follow the embedding's length; 0: fixed
    smoothing: float = 0.0  # label smoothing, 0..1
    weight: float = 1.0  # of the domain in the sum over domains


# name: {parameter: (field of Loss, default)}; the default of s depends on the domain
COMMON = {"s": ("scale", None), "e": ("smoothing", 0.0), "w": ("weight", 1.0)}
LOSSES = {
    "softmax": COMMON,  # normalised softmax, no margin
    "cosface": {"m": ("additive", 0.35)} | COMMON,  # arXiv 1801.09414, section 4.1
    "arcface": {"m": ("angular", 0.5)} | COMMON,  # arXiv 1801.07698, section 3.1
    "adaface": {"m": ("additive", 0.4), "h": ("concentration", 0.333)} | COMMON,  # arXiv 2204.00964, section 4.1
    "combined": {"m2": ("angular", 0.3), "m3": ("additive", 0.2)} | COMMON,  # arXiv 1801.07698, eq. 4, with m1 = 1
}
RANGES = {"scale": (1e-3, 1e6), "additive": (0, 2), "angular": (0, math.pi), "concentration": (0, 10),
          "smoothing": (0, 1), "weight": (0, 1e6)}
DEFAULTS = {domain: ("softmax", 30.0) if domain == "object" else ("cosface", 64.0) for domain in DOMAINS}  # name, s


def parse_loss(text: str, scale: float) -> Loss:
    """`NAME[:PARAMETER=NUMBER,...]` -> Loss; `scale` where s is not given."""
    name, _, rest = text.partition(":")
    if name not in LOSSES:
        raise ValueError(f"no loss {name!r}; the losses are {', '.join(LOSSES)}")
    parameters = LOSSES[name]
    values = dict(parameters.values()) | {"scale": scale}
    for item in filter(None, rest.split(",")):
        key, _, number = (word.strip() for word in item.partition("="))
        if key not in parameters or not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", number):
            raise ValueError(f"{item.strip()!r} is not a parameter of {name}; want "
                             f"{', '.join(f'{key}=NUMBER' for key in parameters)}")
        field, _ = parameters[key]
        low, high = RANGES[field]
        if not low <= float(number) <= high:
            raise ValueError(f"{name}: {key} is {number}; want {low:g} to {high:g}")
        values[field] = float(number)
    if values.get("concentration") and not values["additive"]:
        raise ValueError("adaface with m=0 has no margin to adapt: take softmax")
    return Loss(**values)


def parse_losses(text: str) -> dict[str, Loss]:
    """`[DOMAIN=]LOSS;...` -> the loss of every domain; a loss without a domain applies to those not named."""
    given: dict[str, str] = {}
    for part in text.split(";"):
        domain, equals, loss = (word.strip() for word in part.partition("="))
        if not equals or ":" in domain:  # arcface:m=0.5
            domain, loss = "", part.strip()
        else:
            check_domain(domain)
        if domain in given:
            raise ValueError(f"{domain or 'every domain'} has two losses")
        given[domain] = loss
    return {domain: parse_loss(given.get(domain, given.get("", name)), scale)
            for domain, (name, scale) in DEFAULTS.items()}


def show_loss(loss: Loss) -> str:
    """The notation of a loss, which `parse_loss` reads."""
    name = ("adaface" if loss.concentration else "combined" if loss.angular and loss.additive else
            "arcface" if loss.angular else "cosface" if loss.additive else "softmax")
    numbers = {key: getattr(loss, field) for key, (field, default) in LOSSES[name].items()
               if key not in ("e", "w") or getattr(loss, field) != default}
    return name + ":" + ",".join(f"{key}={repr(number).removesuffix('.0')}" for key, number in numbers.items())


LOSS_TYPE = Parsed("losses", parse_losses,
                   lambda losses: ";".join(f"{domain}={show_loss(loss)}" for domain, loss in losses.items()))


def adaptive_margins(length: Tensor, angular: Tensor, additive: Tensor, concentration: Tensor,
                     statistics: Tensor) -> dict[str, Tensor]:
    """AdaFace's margins: long embeddings (sharp images) get a harder additive and an easier angular margin.

        z = clip(h (|x| - mean) / std, -1, 1)       m_ang = angular - m z       m_add = m + m z,  m = additive

    Args:
        length: [N] of the embeddings; the others are [N] too, by each sample's domain.
        concentration: h; 0: the margins do not change.
        statistics: [N, 3], running (n, sum, sum of squares) of lengths. Until two lengths of a domain are known z is 0,
            which is CosFace.

    Returns:
        m_ang and m_add of each sample, as `margin_loss` takes them.

    Source: arXiv 2204.00964, eq. 6-8, and the authors' code for the 1e-3.
    """
    n, total, squares = statistics.unbind(1)
    mean = total / n.clamp(min=1e-9)
    std = (squares / n.clamp(min=1e-9) - mean.square()).clamp(min=0).sqrt()
    z = (concentration * (length - mean) / (std + 1e-3)).clamp(-1, 1)
    z = torch.where(n > 1, z, 0.0)
    return {"sample_margin_angular": angular - additive * z, "sample_margin_additive": additive + additive * z}


def embedding_norms(x: Tensor) -> Tensor:
    """Detached lengths [B] of embeddings [B, D], in float32 or better."""
    return torch.linalg.vector_norm(x.detach(), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------- the head


@dataclass(frozen=True)
class HeadSettings:
    """How a head computes its loss; every list has one entry a domain."""

    losses: list[Loss]
    class_share: list[float] | None = None  # Partial FC: share of the class weights that a step draws; None: all
    coupling: str = "domain"  # "domain": mean over each domain, then over domains; "sample": mean over samples
    negatives: str = "own"  # "own": softmax over the domain's classes; "all": over every class
    freeze_first: bool = False  # the first domain's class weights stay as they are
    seed: int = 0  # of Partial FC's draws


class HeadLoss(NamedTuple):
    """What the head returns for this rank's samples; everything but `loss` is detached."""

    loss: Tensor  # its backward pass gives the gradients of the whole step, over all ranks
    own_loss: Tensor  # this rank's share of the step's loss
    per_domain: Tensor  # [K] this rank's share of the mean loss of each domain, 0 where it has none
    target_cos: Tensor  # [B] cosine to the true class, without margin; 0 where the label is -1
    correct: Tensor  # [B] bool


class Rows(NamedTuple):
    """Class weights that take part in a step: all of this rank's, or the drawn ones."""

    rows: Tensor | None  # int64, of `MarginHead.weight`; None: all
    ranges: list[tuple[int, int]]  # of each domain, among them
    first: Tensor  # int64 [K], their starts
    shard: Shard | None


class MarginHead(nn.Module):
    """Class weights [C, D], every domain a contiguous range of rows, under the margin loss.

        L = sum_i w_d(i) l_i / (K n_d(i))     (kernels/margin_loss.py; w: Loss.weight)

    Over several ranks the head is replicated, or sharded: every rank then holds a slice of every domain's classes.

    Attributes:
        weight: Parameter [C, D], or this rank's rows of it.
        samples_classes: whether a step draws some of the classes (Partial FC).
        ranges: of the domains' classes in the whole head.
        rows: int64 on the CPU, which rows of the whole head these are (sharded); None: all.
        statistics: float64 [K, 3], running n, sum and sum of squares of embedding lengths (AdaFace); None: not needed.
    """

    def __init__(self, class_counts: list[int], width: int, settings: HeadSettings, *, ranks: Ranks = Ranks(),
                 shard: bool = False, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.class_counts, self.settings, self.ranks = class_counts, settings, ranks
        self.samples_classes = min(settings.class_share or [1.0]) < 1
        self.sharded = shard and ranks.world > 1
        self.place = (ranks.rank, ranks.world) if self.sharded else (0, 1)  # of its slices, and how many there are
        self.ranges = [(end - count, end) for count, end in zip(class_counts, accumulate(class_counts), strict=True)]
        rows, ranges, where = self.slice_rows(torch.arange(sum(class_counts)), self.ranges, *self.place)
        self.rows = rows if self.sharded else None
        self.weight = nn.Parameter(torch.zeros(len(rows), width, device=device))
        self.step_rows = Rows(None, ranges, torch.tensor([start for start, _ in ranges], device=device), where)
        losses = settings.losses
        self.values = {field: torch.tensor([getattr(loss, field) for loss in losses], device=device)
                       for field in ("scale", "angular", "additive", "concentration", "weight", "smoothing")}
        self.statistics = torch.zeros(len(losses), 3, dtype=torch.float64, device=device) \
            if any(loss.concentration for loss in losses) else None

    def forward(self, x: Tensor, labels: Tensor, domains: Tensor, counts: Tensor, margin: float = 1.0) -> HeadLoss:
        """The loss of this rank's samples.

        Args:
            x: [B, D] embeddings.
            labels: int64 [B], counted from the domain's first class; -1: the sample is ignored.
            domains: int64 [B].
            counts: [K] n_d, samples of each domain in the whole step, over all micro-batches and ranks.
            margin: factor 0..1 on the margins.
        """
        _, ranges, first, shard = self.step_rows
        ranks, vectors, target, domain, local = self.ranks, x, labels, domains, slice(None)
        if self.settings.negatives == "all":
            target = torch.where(labels >= 0, labels + first[domains], -1)
            ranges = [(0, len(self.weight))] * len(ranges)
        if shard is not None:
            local = slice(ranks.rank * len(labels), (ranks.rank + 1) * len(labels))
            vectors = GatherSamples.apply(x, ranks)
            target, domain = gather_rows(target, ranks), gather_rows(domains, ranks)
        angular, additive = (self.values[name] * margin for name in ("angular", "additive"))
        adaptive = {} if self.statistics is None else adaptive_margins(
            embedding_norms(vectors), angular[domain], additive[domain], self.values["concentration"][domain],
            self.statistics[domain])
        result = margin_loss(
            vectors, self.weight, target, domain, ranges, scale=self.values["scale"], margin_angular=angular,
            margin_additive=additive, domain_weight=self.values["weight"], domain_count=counts,
            num_domains=len(ranges), reduction=self.settings.coupling, label_smoothing=self.values["smoothing"],
            shard=shard, **adaptive)
        share = 1.0 if shard is None else 1.0 / ranks.world  # a sharded head gives every rank the loss of all
        # DistributedDataParallel averages gradients over the ranks
        return HeadLoss(result.loss * ranks.world, result.loss.detach() * share,
                        result.per_domain.nan_to_num(0.0) * share, result.target_cos[local].float().nan_to_num(0.0),
                        result.correct[local])

    def finish_gradient(self) -> None:
        """After the backward passes of a step: the gradient of the class weights over all ranks."""
        if self.ranks.world > 1:
            self.weight.grad /= self.ranks.world
            if not self.sharded:
                self.ranks.sum(self.weight.grad)
        if self.settings.freeze_first:
            self.weight.grad[slice(*self.step_rows.ranges[0])].zero_()

    def squared_gradient(self) -> Tensor:
        """The squared length of the gradient of the whole head, the same on every rank."""
        square = self.weight.grad.square().sum()
        return self.ranks.sum(square) if self.sharded else square

    @torch.no_grad()
    def learn_lengths(self, sums: Tensor, taken: Tensor) -> None:
        """After a step: its (n, sum, sum of squares) of embedding lengths [K, 3] enter AdaFace's statistics.

        Sums decay, not mean and deviation: a single sample of a domain then needs no deviation, and samples weigh the
        same in batches of any size. 0.99 is the authors' t_alpha = 0.01.
        """
        if self.statistics is not None:
            sums = self.ranks.sum(sums.clone())
            counts = (sums[:, :1] > 0) & (taken > 0)  # a domain without images, or a skipped step, changes nothing
            self.statistics.copy_(torch.where(counts, 0.99 * self.statistics + sums, self.statistics))

    # -------------------------------------------------------- Partial FC

    def draw_classes(self, step: int, labels: list[Tensor], domains: list[Tensor]
                     ) -> tuple[list[Tensor], Callable[[], None]]:
        """Partial FC: draw the classes of a step, one step ahead and in a thread.

        One draw contains the classes of all samples of the step, so it does not depend on micro-batches or ranks. It
        is made on the CPU, where the labels are. Returns the labels, numbered among the drawn classes, and a function
        that puts the draw into effect.

        Args:
            labels, domains: of each of this rank's micro-batches, on the CPU.
        """
        ranks, settings = self.ranks, self.settings
        targets, owners = (gather_rows(torch.cat(parts), ranks, ranks.draws) for parts in (labels, domains))
        valid = targets >= 0
        rows, targets[valid], ranges = sample_classes(targets[valid], owners[valid], self.ranges, settings.class_share,
                                                      seed=settings.seed, step=step, minimum=0)
        rows, ranges, shard = self.slice_rows(rows, ranges, *self.place)
        if self.sharded:
            rows = torch.searchsorted(self.rows, rows)
        first, device = torch.tensor([start for start, _ in ranges]), self.weight.device
        if device.type == "cuda":  # unpinned, a copy of this size would wait for the device
            rows, first = rows.pin_memory(), first.pin_memory()
        rows, first = rows.to(device, non_blocking=True), first.to(device, non_blocking=True)
        use_draw = functools.partial(setattr, self, "step_rows", Rows(rows, ranges, first, shard))
        return list(targets.chunk(ranks.world)[ranks.rank].split([len(part) for part in labels])), use_draw

    @contextlib.contextmanager
    def drawn(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside, weight and moments are of the drawn classes only: the others neither decay nor move.

        Adam's bias correction counts the steps of the run, as torch's SparseAdam does.
        """
        rows = self.step_rows.rows
        if rows is None:
            yield
            return
        weight, state = self.weight.data, optimizer.state[self.weight]
        whole = {key: v for key, v in state.items() if v.ndim}
        self.weight.data = weight[rows]
        state.update({key: v[rows] for key, v in whole.items()})
        try:
            yield
        finally:
            weight[rows] = self.weight.data
            for key in [key for key, v in state.items() if v.ndim]:
                moments = whole[key] if key in whole else torch.zeros_like(weight)  # none before the first step
                moments[rows] = state[key]
                state[key] = moments
            self.weight.data = weight

    # -------------------------------------------------------- whole heads, of which a rank may hold a part

    def slice_rows(self, rows: Tensor, ranges: list[tuple[int, int]], rank: int, world: int
                   ) -> tuple[Tensor, list[tuple[int, int]], Shard | None]:
        """Those of `rows` that one rank holds: a near-equal slice of EVERY domain's classes.

        Args:
            rows: int64 [C'] of the whole head, ascending in every domain: all, or those that every rank drew alike.
            ranges: of every domain, within `rows`.

        Returns:
            Rows of the whole head, the class ranges within them, and where the slices lie (`world` 1: None).
        """
        parts, slices, start, end = [], [], [], 0
        for (first, last), (low, high) in zip(ranges, self.ranges, strict=True):
            bounds = torch.tensor([low + (high - low) * r // world for r in (rank, rank + 1)])
            i, j = torch.searchsorted(rows[first:last], bounds).tolist()
            parts.append(rows[first + i : first + j])
            slices.append((end, end + j - i))
            start.append(i)
            end += j - i
        shard = Shard(tuple(start), tuple(last - first for first, last in ranges), merge_over()) if world > 1 else None
        return torch.cat(parts), slices, shard

    def set_whole(self, whole: Tensor) -> None:
        """Take over class weights [C, D] of the whole head."""
        self.weight.data.copy_(self.part_of(whole))

    def part_of(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor with one row a class."""
        return whole if self.rows is None else whole[self.rows]

    def whole(self, part: Tensor) -> Tensor | None:
        """A tensor with one row a class of this rank's slice -> the same with the rows of all ranks.

        Of a sharded head on rank 0 only and on the CPU: it may not fit a GPU.
        """
        if self.rows is None:
            return part
        part, ranks = part.cpu(), self.ranks
        if ranks.rank:
            torch.distributed.send(part, 0, group=ranks.control)
            return None
        whole = torch.empty(sum(self.class_counts), *part.shape[1:], dtype=part.dtype)
        for rank in range(ranks.world):
            rows = self.slice_rows(torch.arange(len(whole)), self.ranges, rank, ranks.world)[0]
            if rank:
                part = torch.empty(len(rows), *whole.shape[1:], dtype=whole.dtype)
                torch.distributed.recv(part, rank, group=ranks.control)
            whole[rows] = part
        return whole


# ---------------------------------------------------------------- where the class weights start

MEAN_IMAGES = 20  # most images of a class for its mean


def starting_weights(model: Backbone, splits: list[Split], how: str, *, seed: int, batch: int, workers: int,
                     ranks: Ranks = Ranks(), device: torch.device | str = "cpu") -> Tensor:
    """Class weights [C, D] to start from: unit vectors on `device`, which need not be the model's.

    Args:
        how: "means" (of the untouched backbone's embeddings of a class), "text" or "text-frozen" (CLIP's embeddings of
            prompts for object classes, means for the others) or "random".
        batch: images per forward pass.
    """
    if how == "random":
        generator = torch.Generator().manual_seed(seed)
        count = sum(len(split.classes) for split in splits)
        return F.normalize(torch.randn(count, model.dim, generator=generator), dim=1).to(device)
    place, blocks = next(model.parameters()).device, []
    for split in splits:
        if how.startswith("text") and split.domain == "object":
            blocks.append(text_weights(model, split.names, place).to(device))
            continue
        order = np.argsort(split.labels, kind="stable")  # the first images of each class
        number = np.arange(len(order)) - np.searchsorted(split.labels[order], split.labels[order])
        rows = np.sort(order[number < MEAN_IMAGES])[ranks.rank :: ranks.world]
        total = torch.zeros(len(split.classes), model.dim, device=device)
        with progress(total=len(rows), desc=f"class means {split.domain}", unit="img", disable=ranks.rank > 0) as bar:
            for used, x in embed_rows(model, split, rows, place, batch, workers):
                total.index_add_(0, torch.from_numpy(split.labels[used]).to(device), F.normalize(x, dim=1).to(device))
                bar.update(len(used))
        blocks.append(F.normalize(ranks.sum(total), dim=1))
    return torch.cat(blocks)


# ---------------------------------------------------------------- a head over several ranks


class GatherSamples(torch.autograd.Function):
    """Embeddings [b, D] of every rank, one after the other [world b, D]; their gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.rows = ranks, slice(ranks.rank * len(x), (ranks.rank + 1) * len(x))
        return gather_rows(x, ranks)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(gradient.contiguous())[ctx.rows], None


def gather_rows(x: Tensor, ranks: Ranks, group=None) -> Tensor:
    """Tensors [b, ...] of equal shape from every rank as one [world b, ...]."""
    if ranks.world == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.world)]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)
