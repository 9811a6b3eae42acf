"""Fine-tune one backbone on objects, faces (high and low quality) and bodies at once, in one embedding space.

    python train.py --backbone clip --schedule B                                  # one GPU, data/ prepared before
    python train.py --backbone eva02 --schedule A --batch 256 --micro-batch 64    # bounded memory
    python train.py --backbone clip --schedule B --domains face_hq                # a domain expert
    python train.py --backbone clip --size tiny --weights none --data demo/data --image-size 64 --batch 64 --images 6400
    torchrun --nproc-per-node 8 train.py --backbone clip --schedule B --shard-head   # eight GPUs
    python train.py --config runs/NAME/config.json --seed 1                       # replay a run with another seed
    python train.py ... --out runs/NAME --resume                                  # continue; start if nothing is there
    python train.py export --run runs/NAME --to onnx                              # a model for others, with its card

A schedule is three numbers (domains per batch, images per batch, batches per optimiser step); every step minimises
L = sum_i w_d(i) l_i / (K n_d(i)), whatever the schedule. What is written into runs/NAME: see README, "A run folder".
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from backbones import (
    BACKBONES,
    RECIPES,
    SIZES,
    Backbone,
    choose_trained,
    fill_weights,
    library_state,
    load_backbone,
    resolve_backbone,
)
from data_prep import DOMAINS, InputError, Number, run_command
from data_prep.shards import Split, open_root
from data_prep.stream import Batches, Chunk, Stream
from kernels.gather import gather_interleaved
from kernels.margin_loss import Shard, margin_loss, merge_over, sample_classes

ROLES = ("unified", "expert", "sequential")  # of a run, for `analyze.py claims`
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
LOADERS = min(16, max(CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, 1))  # default number of loader processes
MANY_CLASSES = 10_000  # from so many on a domain's classes are sampled where --sample-classes names no domain
LOGS = ("log.jsonl", "probe.jsonl", "conflict.jsonl")  # of a run, one record a line, each with its step
COLOURS = {"object": "#0072B2", "face_hq": "#D55E00", "face_lq": "#E69F00", "body": "#009E73"}  # Okabe and Ito's
STOPPED = 75  # exit code of a run that was stopped with a checkpoint (EX_TEMPFAIL: a scheduler may requeue it)

# ---------------------------------------------------------------- schedule


@dataclass(frozen=True)
class Schedule:
    """Three numbers make a schedule; `plan_batches` says which domains' images the batches hold."""

    domains_per_batch: int
    images_per_batch: int
    batches_per_step: int


def make_schedule(name: str, num_domains: int, batch: int) -> Schedule:
    """A (accumulate), B (blend), alternate or sequential at `batch` images per optimiser step."""
    if name == "A":
        if batch % num_domains:
            raise InputError(f"--batch {batch} cannot be dealt to {num_domains} domains by schedule A: "
                             f"take {max(batch // num_domains, 1) * num_domains}")
        return Schedule(1, batch // num_domains, num_domains)
    return Schedule(num_domains if name == "B" else 1, batch, 1)


def shares_at(progress: float, shares: np.ndarray, ramp: tuple[int, float, float, float] | None) -> np.ndarray:
    """Shares [K] of the blended pool when a fraction `progress` of training is over, with the --mix-ramp applied.

    The ramp is (domain, first share, last share, fraction of training); the other shares are rescaled to sum to 1.
    """
    if ramp is None:
        return shares
    k, first, last, fraction = ramp
    own = first + (last - first) * min(progress / fraction, 1.0)
    rest = np.where(np.arange(len(shares)) == k, 0.0, shares)
    mixed = rest / rest.sum() * (1.0 - own)
    mixed[k] = own
    return mixed


def blend_counts(shares: Iterable[np.ndarray], batch: int) -> np.ndarray:
    """Images per batch and domain [batches, K], replayed from batch 0 so that the long-run shares are exact.

    Every domain carries its remainder from batch to batch; the places of a batch go to the largest credits.
    """
    counts, credit = [], 0.0
    for share in shares:
        credit = credit + batch * share
        places = np.floor(np.maximum(credit, 0.0)).astype(np.int64)
        while (left := batch - places.sum()) != 0:
            # while a ramp moves a share through less than one image, a floor can hand out one place too many
            k = np.argmax(credit - places) if left > 0 else np.argmin(np.where(places > 0, credit - places, np.inf))
            places[k] += np.sign(left)
        credit = credit - places
        counts.append(places)
    return np.array(counts)


def plan_batches(config: dict, schedule: Schedule, steps: int, shares: np.ndarray, ramp=None) -> np.ndarray:
    """Images of each domain in each batch of the run: int64 [steps * batches_per_step, K]."""
    K, batch = len(shares), schedule.images_per_batch
    if schedule.domains_per_batch == K:
        return blend_counts((shares_at(s / max(steps, 1), shares, ramp) for s in range(steps)), batch)
    if config["schedule"] == "sequential":
        order = [config["domains"].index(name) for name in config["order"] or config["domains"]]
        which = [order[s * K // steps] for s in range(steps)]
    else:
        which = np.arange(steps * schedule.batches_per_step) % K
    return batch * np.eye(K, dtype=np.int64)[which]


def quiet_worker(_: int) -> None:
    """Loader workers leave signals to the main process, which ends the run after the current step."""
    for number in (signal.SIGINT, signal.SIGTERM):  # terminals and schedulers signal the whole group
        signal.signal(number, signal.SIG_IGN)


def as_it_is(item):
    """No conversion: the loader's own would turn row numbers into tensors."""
    return item


def load(dataset: torch.utils.data.Dataset, first: int, workers: int, pin: bool) -> Iterator:
    """The items of a data set from number `first` on, decoded ahead by worker processes."""
    return iter(torch.utils.data.DataLoader(
        dataset, batch_size=None, sampler=range(first, len(dataset)), num_workers=workers, pin_memory=pin,
        worker_init_fn=quiet_worker, prefetch_factor=4 if workers else None, collate_fn=as_it_is,
    ))


class Finished(torch.utils.data.Dataset):
    """The chunks of a stream with their finished images, for a step on the CPU: made by the loader processes."""

    def __init__(self, stream: Stream, cache: list[torch.Tensor] | None, model: Backbone) -> None:
        self.stream, self.cache = stream, cache
        self.look = SimpleNamespace(image_size=model.image_size, mean=model.mean, std=model.std)

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, c: int) -> Chunk:
        chunk = self.stream[c]
        if self.cache is not None:
            chunk = dataclasses.replace(chunk, banks=self.cache)
        return dataclasses.replace(chunk, banks=[], images=to_images(chunk, self.look, torch.device("cpu")))


def to_images(chunk: Chunk, model: Backbone, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The interleaved, augmented, normalised batch [B, 3, S, S] of a chunk."""
    banks = [bank.to(device, non_blocking=True) for bank in chunk.banks]
    images = gather_interleaved(banks, chunk.domain, chunk.row, size=model.image_size, mean=model.mean, std=model.std,
                                boxes=chunk.boxes, flip=chunk.flip, dtype=dtype)
    return chunk.augment(images, model.mean, model.std)


# ---------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started for the run; alone it is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    control: object = None  # gloo group, for what the CPUs tell each other while the GPUs work

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; every rank has to ask."""
        if self.world == 1:
            return flag
        told = torch.tensor(int(flag))
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=self.control)
        return bool(told)

    def wait(self) -> None:
        """Go on when every rank is here."""
        self.any(False)


def join_ranks(config: dict) -> Ranks:
    """The ranks of torchrun's environment; a process group where there are several."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Ranks()
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise InputError(f"WORLD_SIZE is {world} and {missing[0]} is not set: start several processes by torchrun, or "
                         "unset WORLD_SIZE")
    device = pick_device(config["device"])
    if device.type == "cuda":
        config["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(pick_device(config["device"]))
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = Ranks(torch.distributed.get_rank(), world, torch.distributed.new_group(backend="gloo"))
    if ranks.rank:  # one voice
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return ranks


def head_slices(class_counts: list[int], rank: int, world: int) -> tuple[torch.Tensor, list[tuple[int, int]], Shard]:
    """A near-equal slice of EVERY domain's classes for one rank.

    Returns:
        rows of the whole head (int64), class ranges within them, and where the slices lie, for margin_loss.
    """
    rows, ranges, start, first, end = [], [], [], 0, 0
    for count in class_counts:
        low, high = count * rank // world, count * (rank + 1) // world
        rows.append(torch.arange(first + low, first + high))
        ranges.append((end, end + high - low))
        start.append(low)
        first, end = first + count, end + high - low
    return torch.cat(rows), ranges, Shard(tuple(start), tuple(class_counts), merge_over())


def own_draw(drawn: torch.Tensor, ranges: list[tuple[int, int]], class_counts: list[int], rank: int,
             world: int) -> tuple[torch.Tensor, list[tuple[int, int]], Shard]:
    """What lies in this rank's slices of the classes that a step draws: Partial FC with a sharded head.

    Every rank draws the same classes of the whole head, so that a step does not depend on the number of ranks.

    Args:
        drawn: int64 [C'] rows of the whole head, ascending in every domain.
        ranges: of every domain, within `drawn`.

    Returns:
        As `head_slices`, for the drawn classes; the rows count within this rank's part of the head.
    """
    rows, own, start, whole, here, end = [], [], [], 0, 0, 0
    for (first, last), count in zip(ranges, class_counts, strict=True):
        low, high = count * rank // world, count * (rank + 1) // world
        numbers = drawn[first:last] - whole
        i, j = torch.searchsorted(numbers, torch.tensor([low, high])).tolist()
        rows.append(numbers[i:j] - low + here)
        own.append((end, end + j - i))
        start.append(i)
        whole, here, end = whole + count, here + high - low, end + j - i
    return torch.cat(rows), own, Shard(tuple(start), tuple(b - a for a, b in ranges), merge_over())


class GatherSamples(torch.autograd.Function):
    """Embeddings [b, D] of every rank, one after the other [world b, D]; their gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks, ctx.rows = ranks, slice(ranks.rank * len(x), (ranks.rank + 1) * len(x))
        return gather_rows(x, ranks)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.ranks.sum(gradient.contiguous())[ctx.rows], None


def gather_rows(x: torch.Tensor, ranks: Ranks, group=None) -> torch.Tensor:
    """Tensors [b, ...] of equal shape from every rank as one [world b, ...]."""
    if ranks.world == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks.world)]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


# ---------------------------------------------------------------- loss and optimiser


def ramp(progress: float, fraction: float) -> float:
    """0 -> 1, linear over the first `fraction` of training (0: no ramp)."""
    return min(progress / fraction, 1.0) if fraction > 0 else 1.0


LIMITS = {"scale": (1e-3, 1e6), "margin_additive": (0, 2), "margin_angular": (0, math.pi), "margin_adaptive": (0, 10),
          "label_smoothing": (0, 1), "domain_weight": (0, 1e6), "crop_scale": (0.01, 1), "flip": (0, 1),
          "color": (0, 1), "erase": (0, 1), "mix": (0, 1e12),
          "sample_classes": (1e-6, 1)}  # of options with a value per domain
# The losses that --loss knows by name, as their authors set them: parameter -> (option that it stands for, value).
# What is not named is 0; the scale stays as --scale has it unless s says otherwise.
LOSSES = {
    "softmax": {},  # normalised softmax: no margin
    "cosface": {"m": ("margin_additive", 0.35)},  # arXiv 1801.09414, section 4.1
    "arcface": {"m": ("margin_angular", 0.5)},  # arXiv 1801.07698, section 3.1
    "adaface": {"m": ("margin_additive", 0.4), "h": ("margin_adaptive", 0.333)},  # arXiv 2204.00964, section 4.1
}
MARGINS = ("margin_additive", "margin_angular", "margin_adaptive")


def per_domain(config: dict, key: str) -> list[float]:
    """An option given as one number or as `object=0,face_hq=0.35,...`, as one value per domain of the run."""
    option, text = f"--{key.replace('_', '-')}", str(config[key])
    if "=" not in text:
        text = ",".join(f"{name}={text}" for name in DOMAINS)
    try:
        values = {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise InputError(f"{option} {config[key]!r}: want a number or NAME=NUMBER,...") from error
    if unknown := set(values) - set(DOMAINS):
        raise InputError(f"{option}: no domain {sorted(unknown)[0]!r}; the domains are {', '.join(DOMAINS)}")
    if missing := [name for name in config["domains"] if name not in values]:
        raise InputError(f"{option} {config[key]!r}: no value for {missing[0]}")
    low, high = LIMITS[key]
    if wrong := [name for name in config["domains"] if not low <= values[name] <= high]:
        raise InputError(f"{option}: {wrong[0]} is {values[wrong[0]]:g}; want {low:g} to {high:g}")
    return [values[name] for name in config["domains"]]


def name_losses(config: dict) -> None:
    """Turn --loss into the numbers that it stands for: they are what the run reads, keeps and replays.

    Grammar: one loss for every domain, or several separated by ";": [DOMAIN=]NAME[:PARAMETER=NUMBER,...].
    """
    values = {key: dict(zip(config["domains"], per_domain(config, key), strict=True)) for key in ("scale", *MARGINS)}
    said: dict[str, tuple[str, dict[str, float]]] = {}
    for part in config["loss"].split(";"):
        match = re.fullmatch(r"(?:(\w+)=)?(\w+)(?::(.*))?", part.strip())
        if not match or match[2] not in LOSSES:
            raise InputError(f"--loss {part.strip()!r}: want [DOMAIN=]NAME[:m=NUMBER,s=NUMBER], several separated by "
                             f"';'; the names are {', '.join(LOSSES)}")
        domain, name, known = match[1] or "", match[2], {"s": ("scale", 0.0)} | LOSSES[match[2]]
        if domain not in ("", *DOMAINS):
            raise InputError(f"--loss: no domain {domain!r}; the domains are {', '.join(DOMAINS)}")
        if domain in said:
            raise InputError(f"--loss {config['loss']!r}: {domain or 'every domain'} has two losses: give it one")
        numbers = dict.fromkeys(MARGINS, 0.0) | {option: value for option, value in LOSSES[name].values()}
        for item in filter(None, (match[3] or "").split(",")):
            key, _, text = (word.strip() for word in item.partition("="))
            if key not in known or not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", text):
                raise InputError(f"--loss {part.strip()!r}: {item.strip()!r} is no parameter of {name}; want "
                                 f"{' or '.join(f'{key}=NUMBER' for key in known)}")
            option, (low, high) = known[key][0], LIMITS[known[key][0]]
            if not low <= float(text) <= high:
                raise InputError(f"--loss {part.strip()!r}: {key} is {text}; want {low:g} to {high:g}")
            numbers[option] = float(text)
        said[domain] = numbers
    for domain in config["domains"]:
        for option, value in said.get(domain, said.get("", {})).items():
            values[option][domain] = value
    config |= {key: ",".join(f"{d}={v!r}" for d, v in found.items()) for key, found in values.items()} | {"loss": None}


def describe_losses(config: dict) -> list[str]:
    """The loss of every domain in words, for the start of a run."""
    lines = []
    for s, add, angular, h in zip(*(per_domain(config, key) for key in ("scale", *MARGINS)), strict=True):
        parts = [f"AdaFace m={add:g} h={h:g}" if h else f"CosFace m={add:g}" if add else ""]
        parts += [f"ArcFace m={angular:g}" if angular else ""]
        lines.append(f"{' + '.join(filter(None, parts)) or 'normalised softmax'}, s={s:g}")
    return lines


def loss_options(config: dict, class_counts: list[int], device: torch.device, ranks: Ranks = Ranks()) -> dict:
    """What margin_loss is told about the domains of a run: its keyword arguments that no step changes."""
    sharded = ranks.world > 1 and config["shard_head"]
    _, ranges, shard = head_slices(class_counts, ranks.rank if sharded else 0, ranks.world if sharded else 1)
    values = {name: torch.tensor(per_domain(config, name), device=device)
              for name in ("scale", *MARGINS, "domain_weight", "label_smoothing")}
    reduction = "sample" if config["coupling"] == "sample" else "domain"
    first = torch.tensor([start for start, _ in ranges], device=device)
    return values | {"rows": None, "class_ranges": ranges, "first": first, "num_domains": len(class_counts),
                     "reduction": reduction, "gradient": config["margin_gradient"].replace("-", "_"),
                     "extension": config["margin_extension"], "shard": shard if sharded else None}


def lengths_of(x: torch.Tensor) -> torch.Tensor:
    """Detached lengths [B] of embeddings [B, D], in float32 or better."""
    return torch.linalg.vector_norm(x.detach(), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


def adaptive_margins(length: torch.Tensor, angular: torch.Tensor, additive: torch.Tensor, h: torch.Tensor,
                     norms: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdaFace's margins: long embeddings (sharp images) get a harder additive and an easier angular margin.

        z = clip(h (|x| - mean) / std, -1, 1)       m_ang = angular - m z       m_add = m + m z,  m = additive

    Args:
        length: [N] of the embeddings; the other ones [N] too, of each sample's domain.
        h: concentration; 0: the margins stay as they are.
        norms: [N, 3], see `Job.norms`. Until two lengths of a domain are known z is 0, which is CosFace.

    Source: arXiv 2204.00964, eq. 6-8, and the authors' code for the 1e-3.
    """
    n, total, squares = norms.unbind(1)
    mean = total / n.clamp(min=1e-9)
    std = (squares / n.clamp(min=1e-9) - mean.square()).clamp(min=0).sqrt()
    z = (h * (length - mean) / (std + 1e-3)).clamp(-1, 1)
    z = torch.where(n > 1, z, 0.0)
    return {"margin_angular": angular - additive * z, "margin_additive": additive + additive * z}


def learn_norms(job: "Job", sums: torch.Tensor, taken: torch.Tensor) -> None:
    """After a step: its (n, sum, sum of squares) of lengths [K, 3], of this rank, enter the running ones of AdaFace.

    Decayed sums and not a decayed mean and deviation: a single sample of a domain then needs no deviation of its own,
    and every sample weighs the same whatever batch it came in. 0.99 is the authors' t_alpha = 0.01.
    """
    if job.norms is not None:
        sums = job.ranks.sum(sums.clone())
        counts = (sums[:, :1] > 0) & (taken > 0)  # a domain that was not drawn, or a skipped step, changes nothing
        job.norms.copy_(torch.where(counts, 0.99 * job.norms + sums, job.norms))


def accumulate(model: nn.Module, head: torch.Tensor, batches: Iterable[tuple], counts: torch.Tensor, options: dict, *,
               margin: float = 1.0, negatives: str = "own", tune_backbone: bool = True, ranks: Ranks = Ranks(),
               passes: int = 1, by_domain: list[list[torch.Tensor]] | None = None,
               there: list[list[int]] | None = None, norms: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Add the gradients of one optimiser step, batch by batch, to `.grad` of the backbone and of the class weights.

    With several ranks every one of them holds the gradients of the whole step afterwards (of a sharded head: of its own
    rows): n_d counts the samples of all ranks, so what the ranks add up is exact.

    Args:
        model: images [B, 3, S, S] -> embeddings [B, D]; with several ranks a DistributedDataParallel.
        head: class weights [C, D], requires grad.
        batches: (images, labels [B], domains [B]) of the step: any split of it gives the same gradients to rounding.
            Label -1 counts for nothing.
        counts: [K] samples per domain in the whole step, the denominators n_d.
        options: from `loss_options`, or for the classes of this step from `draw_classes`.
        margin: factor on both margins, 0..1.
        negatives: "own" (softmax over the domain's classes) or "all" (over every row of the head).
        tune_backbone: False trains the class weights alone.
        ranks: the processes of the run.
        passes: number of `batches`; the ranks add up their gradients in the last one.
        by_domain: K lists; they are filled with each domain's own gradient of the model's trainable parameters, by a
            backward pass for each, and `.grad` of the backbone is left alone.
        there: the domains that each of the `batches` may hold (None: all): others need no backward pass.
        norms: [K, 3] statistics from before the step, where a domain has AdaFace's margins; see `Job.norms`.

    Returns:
        Detached sums over this rank's samples: loss; cos, correct, count [K]; direction [D], of unit embeddings;
        norms [K, 3], (n, sum, sum of squares) of their lengths.
    """
    K, device, shard = len(counts), head.device, options.get("shard")
    options = options | {name: options[name] * margin for name in ("margin_angular", "margin_additive")}
    adaptive, _ = options.pop("margin_adaptive"), options.pop("rows")
    first = options.pop("first")
    if negatives == "all":
        options["class_ranges"] = [(0, len(head))] * K
    total = {"loss": torch.zeros((), device=device), "direction": torch.zeros(head.shape[1], device=device)}
    total |= {name: torch.zeros(K, device=device) for name in ("loss_by_domain", "cos", "correct", "count")}
    total["norms"] = torch.zeros(K, 3, dtype=torch.float64, device=device)
    for number, (images, labels, domains) in enumerate(batches, 1):
        last = (number == passes and by_domain is None) or ranks.world == 1 or not tune_backbone
        with contextlib.nullcontext() if last else model.no_sync():
            with torch.set_grad_enabled(tune_backbone):
                x = model(images)
            mine, valid = slice(0, len(labels)), labels >= 0
            target, of, own = labels, domains, x
            if negatives == "all":
                target = torch.where(valid, labels + first[domains], -1)
            if shard is not None:
                mine = slice(ranks.rank * len(labels), (ranks.rank + 1) * len(labels))
                own = GatherSamples.apply(x, ranks)
                target, of = gather_rows(labels, ranks), gather_rows(domains, ranks)
            # one value a sample: with as many samples as domains a vector [K] would be taken for one
            values = {name: options[name][of] for name in ("scale", "margin_angular", "margin_additive")}
            if norms is not None:
                values |= adaptive_margins(lengths_of(own), values["margin_angular"], values["margin_additive"],
                                           adaptive[of], norms[of])
            result = margin_loss(own, head, target, of, domain_count=counts, **options | values)
            if by_domain is None or not tune_backbone:
                (result.loss * ranks.world).backward()  # DistributedDataParallel averages over the ranks
            else:
                some = range(K) if there is None else there[number - 1]
                for k in some:
                    part = result.loss if len(some) == 1 else margin_loss(
                        own, head, torch.where(of == k, target, -1), of, domain_count=counts, **options | values).loss
                    add_gradients(by_domain[k], part * ranks.world, model, head, keep=k != some[-1])
        share = 1.0 if shard is None else 1.0 / ranks.world  # a sharded head gives every rank the loss of all
        total["loss"] += result.loss.detach() * share
        total["loss_by_domain"] += result.per_domain.nan_to_num(0.0) * share
        total["cos"].index_add_(0, domains, result.target_cos[mine].float().nan_to_num(0.0))
        total["correct"].index_add_(0, domains, result.correct[mine].float())
        total["count"].index_add_(0, domains, valid.float())
        length = lengths_of(x).double()
        powers = torch.stack([torch.ones_like(length), length, length.square()], 1)
        total["norms"].index_add_(0, domains, torch.where(valid[:, None], powers, 0.0))
        total["direction"] += (F.normalize(x.detach().float(), dim=1) * valid[:, None]).sum(0)
    if ranks.world > 1:
        head.grad /= ranks.world
        if shard is None:
            ranks.sum(head.grad)
    return total


def add_gradients(gradients: list[torch.Tensor], loss: torch.Tensor, model: nn.Module, head: torch.Tensor,
                  keep: bool) -> None:
    """Add the gradient of a loss: of the trainable parameters to `gradients` (may be empty), of the head to `.grad`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [*parameters, head], retain_graph=keep, materialize_grads=True, allow_unused=True)
    head.grad = found[-1] if head.grad is None else head.grad + found[-1]
    gradients[:] = torch._foreach_add(gradients, found[:-1]) if gradients else found[:-1]


def gradient_norm(parameters: list[nn.Parameter], head: nn.Parameter, sharded: bool, ranks: Ranks) -> torch.Tensor:
    """Length of the gradient of the backbone and of the whole head, the same on every rank."""
    own = head.grad.square().sum()
    if sharded:
        ranks.sum(own)
    gradients = [p.grad for p in parameters if p.grad is not None and p is not head]
    return (nn.utils.get_total_norm(gradients).to(own) ** 2 + own).sqrt() if gradients else own.sqrt()


def conflicts(by_domain: list[list[torch.Tensor]], depth: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """How the domains' gradients lie to each other, in the whole backbone and per depth.

    Args:
        by_domain: K lists of gradients, one tensor per parameter.
        depth: layer 0..L-1 of each parameter.

    Returns:
        Norms [L + 1, K] and pairwise cosines [L + 1, K, K]; the last row is the whole backbone. Zero gradients: NaN.
    """
    K, L = len(by_domain), max(depth) + 1
    inner = torch.zeros(L + 1, K, K, dtype=torch.float64, device=by_domain[0][0].device)
    for layer, gradients in zip(depth, zip(*by_domain, strict=True), strict=True):
        rows = torch.stack([g.flatten() for g in gradients]).double()
        inner[layer] += rows @ rows.T
    inner[L] = inner[:L].sum(0)
    norms = inner.diagonal(dim1=1, dim2=2).sqrt()
    return norms, inner / (norms[:, :, None] * norms[:, None, :])


def project_conflicts(by_domain: list[list[torch.Tensor]], seed: int, step: int) -> list[torch.Tensor]:
    """The sum of the domains' gradients, each first freed of what points against another one's (PCGrad).

    Source: Yu et al., Gradient Surgery for Multi-Task Learning, arXiv 2001.06782, algorithm 1; the random order of the
    other domains is a function of (seed, step).
    """
    K, rng = len(by_domain), np.random.default_rng((seed, step))

    def dot(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()

    length = [dot(g, g) for g in by_domain]
    total = [torch.zeros_like(g) for g in by_domain[0]]
    for i in range(K):
        own = [g.clone() for g in by_domain[i]]
        for j in rng.permutation(K):
            if j != i:
                # no branch on the value: the CPU need not know it
                share = (dot(own, by_domain[j]).clamp(max=0) / length[j].clamp(min=1e-30)).to(own[0].dtype)
                torch._foreach_sub_(own, torch._foreach_mul(by_domain[j], share))
        torch._foreach_add_(total, own)
    return total


def mean_pairwise_cosine(direction: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Mean cosine over all pairs of n > 1 embeddings, from the sum of their unit vectors [D]."""
    return (direction.square().sum() - n) / (n * (n - 1)).clamp(min=1)


def make_optimizer(model: Backbone, head: nn.Parameter, config: dict) -> torch.optim.AdamW:
    """AdamW with layer-wise learning rates lr * decay^(distance from the top) and no weight decay on vectors.

    Every group's `scale` times the rate of the step is its learning rate; the class weights have their own.
    """
    layers = model.layers()
    deepest, groups = max(layers.values()), {}
    skip = {f"net.{name}" for name in getattr(model.net, "no_weight_decay", set)()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim < 2 or name in skip else config["weight_decay"]
            scale = config["lr"] * config["layer_decay"] ** (deepest - layers[name])
            groups.setdefault((scale, decay), []).append(parameter)
    parameters = [{"params": p, "weight_decay": decay, "scale": scale} for (scale, decay), p in groups.items()]
    # cosines do not see the length of a class weight: decaying it would only raise its effective learning rate
    parameters.append({"params": [head], "weight_decay": 0.0, "scale": config["head_lr"]})
    # fused: one launch, and a step that is not finite is left out on the device (`found_inf`), without asking the CPU
    return torch.optim.AdamW(parameters, lr=config["lr"], betas=(0.9, 0.999), fused=True)


def rate(step: int, steps: int, warmup: float, floor: float) -> float:
    """Factor on every learning rate at a step: linear warm-up over a fraction of the steps, then cosine to `floor`."""
    rising = (step + 1) / max(warmup * steps, 1.0)
    falling = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
    return min(rising, 1.0) * falling


@torch.no_grad()
def embed_rows(model: Backbone, split: Split, rows: np.ndarray, device: torch.device, batch: int, workers: int = 0,
               flip: bool = False) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield (rows [b], embeddings [b, D] float32) of whole images of a split; unreadable ones are left out.

    `flip`: the embedding of the mirrored image is added.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    model.eval()
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (model.mean, model.std))
    size, mode = [model.image_size] * 2, InterpolationMode(model.interpolation)
    for good, images in load(Batches(split, rows, batch), 0, workers, device.type == "cuda"):
        if len(good):
            x = resize(images.to(device, non_blocking=True).float(), size, interpolation=mode, antialias=True)
            x = (x.clamp(0, 255) / 255 - mean) / std
            yield good, (model(x) + model(x.flip(3)) if flip else model(x)).float()


def matched_pairs(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` pairs of one identity and as many of two, [2 count, 2] rows, drawn at random (labels -1 left out)."""
    rng = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    ids, start, size = np.unique(labels[order], return_index=True, return_counts=True)
    several = np.flatnonzero(size > 1)
    if len(ids) < 2 or not len(several):
        return np.empty((0, 2), dtype=np.int64)
    i = rng.choice(several, count, p=size[several] / size[several].sum())
    a = (rng.random(count) * size[i]).astype(int)
    b = (a + 1 + (rng.random(count) * (size[i] - 1)).astype(int)) % size[i]
    same = np.stack([order[start[i] + a], order[start[i] + b]], 1)
    left, right = rng.integers(len(order), size=(2, 4 * count))
    apart = labels[order[left]] != labels[order[right]]
    different = np.stack([order[left], order[right]], 1)[apart][:count]
    return np.concatenate([same[: len(different)], different])


def probe_splits(config: dict) -> list[Split]:
    """What --eval-every looks at: a split per domain (the training one at need), and one out of distribution."""

    def shifted(split: Split) -> bool:
        return bool((split.index["protocol"] or {}).get("ood"))

    root, found = open_root(Path(config["data"]), config["domains"]), []
    for domain in config["domains"]:
        others = [split for name, split in root[domain].items() if name != "train" and not shifted(split)]
        found += [split for split in [*others, root[domain]["train"]] if (split.labels >= 0).sum() > 1][:1]
    return found + [split for split in root.get("object", {}).values() if shifted(split)][:1]


def probe(job: "Job", splits: list[Split], count: int = 2000) -> dict[str, float]:
    """Same/different AUC of `count` fixed images of each split, on matched numbers of random pairs; chance is 0.5."""
    from sklearn.metrics import roc_auc_score

    scores = {}
    for split in splits:
        rows = np.flatnonzero(split.labels >= 0)
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:count])
        parts = list(embed_rows(job.model, split, rows, job.device, job.config["micro_batch"] or 64,
                                job.config["workers"]))
        used, x = np.concatenate([r for r, _ in parts]), F.normalize(torch.cat([x for _, x in parts]), dim=1)
        pairs = matched_pairs(split.labels[used], 5000, seed=0)
        if len(pairs):
            same, score = np.arange(len(pairs)) < len(pairs) // 2, (x[pairs[:, 0]] * x[pairs[:, 1]]).sum(1)
            scores[f"{split.domain}/{split.name}"] = float(roc_auc_score(same, score.cpu().numpy()))
    return scores


def init_head(model: Backbone, splits: list[Split], config: dict, device: torch.device,
              ranks: Ranks = Ranks()) -> torch.Tensor:
    """Class weights [C, D] to start from: unit class means of the untouched backbone, prompts, or random."""
    if config["head_init"] == "random":
        generator = torch.Generator().manual_seed(config["seed"])
        rows = sum(len(split.classes) for split in splits)
        return F.normalize(torch.randn(rows, model.dim, generator=generator), dim=1).to(device)
    blocks = []
    for split in splits:
        if config["head_init"] == "text" and split.domain == "object":
            blocks.append(text_weights(model, config, split.names, device))
            continue
        order = np.argsort(split.labels, kind="stable")  # the first images of each class
        place = np.arange(len(order)) - np.searchsorted(split.labels[order], split.labels[order])
        rows = np.sort(order[place < config["head_init_images"]])[ranks.rank :: ranks.world]
        total = torch.zeros(len(split.classes), model.dim, device=device)
        parts = embed_rows(model, split, rows, device, config["micro_batch"] or 64, config["workers"])
        with tqdm(total=len(rows), desc=f"class means {split.domain}", unit="img",
                  disable=True if ranks.rank else None) as bar:
            for used, x in parts:
                total.index_add_(0, torch.from_numpy(split.labels[used]).to(device), F.normalize(x, dim=1))
                bar.update(len(used))
        blocks.append(F.normalize(ranks.sum(total), dim=1))
    return torch.cat(blocks)


@torch.no_grad()
def text_weights(model: Backbone, config: dict, names: list[str], device: torch.device,
                 templates: Sequence[str] = ("a photo of a {}.",)) -> torch.Tensor:
    """Unit CLIP embeddings [C, D] of class names: each the mean of those of its prompts, {} being the name."""
    import open_clip

    name = resolve_backbone(config)[1]
    tokenizer = open_clip.get_tokenizer("ViT-B-32" if name == "tiny" else name)
    prompts = tokenizer([text.replace("{}", name.replace("_", " ")) for text in templates for name in names])
    x = torch.cat([model.net.encode_text(part.to(device)).float() for part in prompts.split(256)])
    return F.normalize(F.normalize(x, dim=1).view(len(templates), len(names), -1).mean(0), dim=1)


# ---------------------------------------------------------------- run folder


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, sync it, rename it: the old one stays whole until the new one is."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors would keep its files from everybody else
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # torch and safetensors report a full disk in ways of their own, or not at all
        free = shutil.disk_usage(path.parent).free >> 20 if path.parent.is_dir() else 0
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}; {free:,} MiB free there); what was saved before is "
                         "intact") from error


def make_folder(path: Path, option: str) -> None:
    """Make a folder for results, where it is not there; InputError names the option that asked for it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be made a folder ({error.strerror}): choose another, or move "
                         "away what is there") from error


def write_json(path: Path, value: dict) -> None:
    """Write JSON for people: indented, atomic."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path: Path) -> dict:
    """An object that write_json wrote; InputError where the file is damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}): restore it, or run the stage that wrote it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged (no JSON object): restore it, or run the stage that wrote it again")
    return value


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file of a run; InputError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors raises a kind of its own
        raise InputError(f"{path}: damaged ({error}): restore it, or continue the run with --resume") from error


def save_weights(folder: Path, model: Backbone, head: torch.Tensor, splits: list[Split]) -> None:
    """Write model.safetensors (the library's own keys) and head.safetensors (class names in its metadata)."""
    net = library_state(model.net)
    write_atomically(folder / "model.safetensors", lambda path: save_file(net, path))
    tensors = {"weight": head.detach().contiguous()}
    if model.project is not None:
        tensors["project"] = model.project.weight.detach().contiguous()
    classes = {"classes": json.dumps({split.domain: split.classes for split in splits})}
    write_atomically(folder / "head.safetensors", lambda path: save_file(tensors, path, metadata=classes))


@dataclass
class Run:
    """A finished run, as later stages read it."""

    folder: Path
    config: dict
    head: torch.Tensor  # float32 [C, D]
    classes: dict[str, list[str]]  # per trained domain
    class_ranges: dict[str, tuple[int, int]]  # rows of the head


def load_run(folder: Path, allow_partial: bool = False) -> Run:
    """Read a run folder.

    Raises:
        InputError: no run there, or (unless allow_partial) one that has not finished.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no run: it has no config.json; train one with `python train.py --out {folder}`")
    whole = (folder / "done.json").is_file() or folder.resolve().parent.name == "checkpoints"  # of --keep
    if not whole and not allow_partial:
        raise InputError(f"{folder} has not finished (no done.json): continue it with --resume or pass --allow-partial")
    config = read_json(folder / "config.json")
    if missing := {"backbone", "model", "size", "image_size", "embed_dim", "seed", "domains", "data",
                   "counts", "steps", "shards", "versions", "git_commit"} - set(config):
        raise InputError(f"{folder}/config.json lacks {min(missing)!r}: restore it, or train the run again")
    if not (folder / "head.safetensors").is_file():
        raise InputError(f"{folder} holds no weights yet (no head.safetensors): continue it with `train.py --resume`")
    tensors, metadata = read_tensors(folder / "head.safetensors")
    head, classes = tensors["weight"], json.loads(metadata["classes"])
    ends = np.cumsum([len(names) for names in classes.values()])
    ranges = {d: (int(end) - len(classes[d]), int(end)) for d, end in zip(classes, ends, strict=True)}
    return Run(folder, config, head, classes, ranges)


def load_tuned(run: Run) -> Backbone:
    """The fine-tuned backbone of a run, in eval mode."""
    model, path = load_backbone(run.config | {"weights": "none"}), run.folder / "model.safetensors"
    fill_weights(model.net, model.library, read_tensors(path)[0], path)
    if model.project is not None:
        model.project.weight.data.copy_(read_tensors(run.folder / "head.safetensors")[0]["project"])
    return model.eval()


def load_foundation(run: Run) -> Backbone:
    """The untouched backbone that a run started from (without the run's own linear layer), in eval mode."""
    return load_backbone(run.config | {"embed_dim": 0}).eval()


def pick_device(name: str) -> torch.device:
    """The device of --device: `auto` takes CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: want auto, cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    device = torch.device(name)
    if (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    return device


# ---------------------------------------------------------------- checkpoints


def whole_head(tensor: torch.Tensor, job: "Job") -> torch.Tensor | None:
    """A tensor with one row per class of this rank's slice, with the rows of all ranks.

    Of a sharded head on rank 0 alone, in the memory of its CPU: no GPU need hold what was sharded for its size.
    """
    if job.rows is None:
        return tensor
    own, ranks, counts = tensor.cpu(), job.ranks, [len(split.classes) for split in job.splits]
    if ranks.rank:
        torch.distributed.send(own, 0, group=ranks.control)
        return None
    whole = torch.empty(sum(counts), *own.shape[1:], dtype=own.dtype)
    for rank in range(ranks.world):
        rows = head_slices(counts, rank, ranks.world)[0]
        part = own if rank == 0 else torch.empty(len(rows), *own.shape[1:], dtype=own.dtype)
        if rank:
            torch.distributed.recv(part, rank, group=ranks.control)
        whole[rows] = part
    return whole


@contextlib.contextmanager
def averaged(job: "Job") -> Iterator[None]:
    """Inside, the trainable parameters are their running averages, where --ema keeps any."""
    swap = [] if job.ema is None else list(zip(job.parameters, job.ema, strict=True))
    for parameter, average in swap:
        parameter.data, average.data = average.data, parameter.data
    yield
    for parameter, average in swap:
        parameter.data, average.data = average.data, parameter.data


def export_weights(job: "Job", folder: Path) -> None:
    """Write what the run is for: its weights, or their running averages."""
    with averaged(job):
        head = whole_head(job.head.detach(), job)
        if job.ranks.rank == 0:
            save_weights(folder, job.model, head, job.splits)


def kept_steps(run: Path) -> dict[int, Path]:
    """The checkpoints that --keep left in a run, by step."""
    found = ((folder.name.removeprefix("step-"), folder) for folder in (run / "checkpoints").glob("step-*"))
    return dict(sorted((int(step), folder) for step, folder in found if step.isdigit()))


def keep_checkpoint(job: "Job", step: int) -> None:
    """--keep: RUN/checkpoints/step-NNNNNNNN, a run folder of its own. What is too old goes when it is complete.

    The newest ones stay, and the best by the mean AUC of --eval-every, to which the link `best` leads.
    """
    folder = job.folder / "checkpoints" / f"step-{step:08d}"
    scratch = folder.with_suffix(".tmp")
    if job.ranks.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    try:
        export_weights(job, scratch)
        if job.ranks.rank == 0:
            counts = dict(zip(job.config["domains"], job.plan[:step].sum((0, 1)).tolist(), strict=True))
            config = read_json(job.folder / "config.json") | {"steps": step, "counts": counts}
            write_json(scratch / "config.json", config)
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it could write its state
            os.replace(scratch, folder)
            drop_checkpoints(job.folder, job.config["keep"])
    finally:
        if job.ranks.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    job.ranks.wait()


def drop_checkpoints(run: Path, keep: int) -> None:
    """Leave the newest `keep` checkpoints of a run and the best one, and point `best` at that."""
    steps, link = kept_steps(run), run / "checkpoints" / "best"
    scores = {look["step"]: np.mean([*look["auc"].values()]) for look in read_lines(run / "probe.jsonl") if look["auc"]}
    best = max((step for step in steps if step in scores), key=scores.get, default=None)
    if best is not None:
        (fresh := link.with_suffix(".tmp")).unlink(missing_ok=True)
        fresh.symlink_to(steps[best].name)
        os.replace(fresh, link)
    for step in [step for step in list(steps)[:-keep] if step != best]:
        shutil.rmtree(steps[step])


def save_checkpoint(job: "Job", step: int) -> None:
    """Write the weights, then last/state.pt: everything that step `step` starts from, whatever the number of ranks.

    In this order a run that is killed in between repeats the steps since the former state, and ends with both.
    """
    folder, ranks, state = job.folder, job.ranks, job.optimizer.state_dict()
    last = max(state["state"], default=None)  # the class weights: last group, last number
    if last is not None:
        state["state"][last] = {key: whole_head(v, job) if v.ndim else v for key, v in state["state"][last].items()}
    head = whole_head(job.head.detach(), job)
    average = None if job.ema is None else [*job.ema[:-1], whole_head(job.ema[-1], job)]
    export_weights(job, folder)
    if ranks.rank == 0:
        (folder / "last").mkdir(exist_ok=True)
        state = {"step": step, "model": job.model.state_dict(), "head": head, "optimizer": state,
                 "tally": job.tally, "health": job.health, "ema": average, "norms": job.norms}
        write_atomically(folder / "last" / "state.pt", lambda path: torch.save(state, path))
    ranks.wait()


def load_checkpoint(job: "Job") -> int:
    """Restore what save_checkpoint wrote; returns the next step."""
    path = job.folder / "last" / "state.pt"
    rows = slice(None) if job.rows is None else job.rows.cpu()
    try:
        # of a sharded head every rank reads its own rows alone
        state = torch.load(path, "cpu", weights_only=True, mmap=job.rows is not None)
    except Exception as error:  # a damaged zip, a foreign pickle
        what = type(error).__name__
        raise InputError(f"{path}: damaged ({what}): restore it, or start anew in another --out") from error
    job.model.load_state_dict(state["model"])
    job.head.data.copy_(state["head"][rows])
    if moments := state["optimizer"]["state"]:
        last = max(moments)
        moments[last] = {key: v[rows] if v.ndim else v for key, v in moments[last].items()}
    job.optimizer.load_state_dict(state["optimizer"])
    if job.ema is not None:
        for average, saved in zip(job.ema, [*state["ema"][:-1], state["ema"][-1][rows]], strict=True):
            average.copy_(saved)
    job.health.copy_(state["health"])
    if job.norms is not None:
        job.norms.copy_(state["norms"])
    job.tally.update(state["tally"])
    return state["step"]


def forget_after(folder: Path, step: int) -> None:
    """Cut what a run left about steps after `step`, where it goes on: they come again."""
    for log in (folder / name for name in LOGS if (folder / name).exists()):
        kept = []
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut
                kept += [line] if json.loads(line)["step"] <= step else []
        write_atomically(log, lambda path, kept=kept: path.write_text("".join(f"{line}\n" for line in kept)))
    for late in [place for number, place in kept_steps(folder).items() if number > step]:
        shutil.rmtree(late)


class StopRequest:
    """Set by SIGTERM, SIGINT or a file RUN/STOP: the run ends after the current step. A second signal exits at once."""

    def __init__(self, folder: Path, ranks: Ranks = Ranks()) -> None:
        self.file, self.reason = folder / "STOP" if ranks.rank == 0 else None, ""  # one looks and tells the others
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, _frame) -> None:
        if self.reason:
            os._exit(128 + number)
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if not self.reason and self.file and self.file.exists():
            self.reason = "file STOP"
        return bool(self.reason)


# ---------------------------------------------------------------- the job


def check_options(config: dict) -> None:
    """Refuse contradictions before any work; fills what follows from other options (domains, order, out)."""
    config["domains"] = sort_domains(config["domains"], "--domains") if config["domains"] else list(DOMAINS)
    if config["order"]:
        order = config["order"].split(",") if isinstance(config["order"], str) else config["order"]
        if sorted(order) != sorted(config["domains"]):
            raise InputError(f"--order {','.join(order)} must name each of {','.join(config['domains'])} once")
        config["order"] = order
    if config["weights"] not in ("pretrained", "none"):
        config["weights"] = str(Path(config["weights"]).resolve())  # a run is read from other folders too
    if config["images"] and config["epochs"]:
        raise InputError("--images and --epochs both say how long to train: give one of them")
    if config["model"] and config["backbone"]:
        raise InputError("--backbone and --model both name the network: give one of them")
    if not config["model"] and not config["backbone"]:
        raise InputError("which backbone? give --backbone clip|eva02|dinov3 or --model NAME (of timm or open_clip)")
    library = resolve_backbone(config)[0]
    if config["head_init"] == "text" and (library != "open_clip" or config["embed_dim"]):
        raise InputError("--head-init text needs CLIP's text tower and its own width: only CLIP models, no --embed-dim")
    if config["freeze_text_head"] and (config["head_init"] != "text" or "object" not in config["domains"]):
        raise InputError("--freeze-text-head freezes the object classes of --head-init text: give both, with object")
    if (config["mix"] and config["schedule"] != "B") or (config["mix_ramp"] and config["schedule"] != "B"):
        raise InputError("--mix and --mix-ramp set the shares of schedule B; the other schedules deal equally")
    if config["degrade"] and config["cache"] != "none":
        raise InputError("--degrade makes another image each time, --cache keeps the decoded ones: give one of them")
    if config["cache"] == "gpu" and pick_device(config["device"]).type != "cuda":
        raise InputError("--cache gpu needs a CUDA device: take --cache ram")
    if config["coupling"] == "pcgrad" and config["schedule"] != "A":
        raise InputError("--coupling pcgrad goes through the domains one by one: it needs --schedule A")
    if config["shard_head"] and config["negatives"] == "all":
        raise InputError("--shard-head deals out every domain's classes by themselves: not with --negatives all")
    if config["degrade"] and "face_lq" not in config["domains"]:
        raise InputError("--degrade acts on face_lq, which is not among --domains")
    # what the runs of a batch may share is no error where it has nothing to do
    if config["conflict_every"] and (len(config["domains"]) == 1 or config["schedule"] in ("alternate", "sequential")):
        print("  --conflict-every: every step has one domain here: nothing conflicts, so it is off")
        config["conflict_every"] = 0
    if config["head_init"] == "text" and "object" not in config["domains"]:
        print("  --head-init text: no object among the domains; the others start at class means")
        config["head_init"] = "means"
    if config["loss"]:
        name_losses(config)
    for name in LIMITS:
        if config[name] is not None:
            per_domain(config, name)
    check_margins(config)
    if not config["out"]:
        name = config["model"].replace("/", "_") if config["model"] else f"{config['backbone']}-{config['size']}"
        domains = "all" if len(config["domains"]) == len(DOMAINS) else "+".join(config["domains"])
        config["out"] = f"runs/{name}-{config['schedule']}-{domains}-s{config['seed']}"


def check_margins(config: dict) -> None:
    """Refuse margins that contradict each other."""
    margins = dict(zip(config["domains"], zip(*(per_domain(config, key) for key in MARGINS), strict=True), strict=True))
    for domain, (additive, angular, h) in margins.items():
        if h and not additive:
            raise InputError(f"--margin-adaptive: {domain} has no additive margin that could adapt: give "
                             f"--margin-additive {domain}=0.4,... or say --loss {domain}=adaface")
        if angular and config["margin_extension"] == "clamp":
            # one value per call of the loss; domains without an angular margin hardly notice it, this one would
            raise InputError(f"--margin-extension clamp is AdaFace's: {domain} has a fixed angular margin, whose "
                             "gradient it would cut off: take linear")
    if config["margin_extension"] == "clamp" and not any(h for *_, h in margins.values()):
        raise InputError("--margin-extension clamp is AdaFace's and no domain has its margins: leave it out, or say "
                         "--loss adaface")


def sort_domains(text: str | list[str], option: str) -> list[str]:
    """The named domains in the house order."""
    names = text.split(",") if isinstance(text, str) else text
    for name in names:
        if name not in DOMAINS:
            raise InputError(f"{option}: no domain {name!r}; the domains are {', '.join(DOMAINS)}")
    return [name for name in DOMAINS if name in names]


def open_splits(config: dict) -> list[Split]:
    """The training split of every domain of the run."""
    try:
        root = open_root(Path(config["data"]), config["domains"], "train")
    except InputError as error:
        if ": no shards there" not in error.message or config["weights"] != "pretrained":
            raise
        _, name, tag = resolve_backbone(config)
        raise InputError(
            f"{error.message}; the weights of {name} are "
            + ("downloaded at the first start (without network: --weights FILE, or --weights none for a random start)"
               if tag is not None else "not published: give --weights none")
        ) from error
    splits = []
    for domain in config["domains"]:
        if "train" not in root.get(domain, {}):
            folder = f"{config['data']}/{domain}/train"
            raise InputError(f"{folder}: no shards; make them: `python -m data_prep SOURCE --src PATH --out {folder}`, "
                             f"or leave {domain} out with --domains")
        split = root[domain]["train"]
        if not len(split) or (split.labels < 0).any():
            raise InputError(f"{split.folder}: a training split needs images with labels; prepare it with --part train")
        splits.append(split)
    return splits


def parse_shares(config: dict, splits: list[Split]) -> tuple[np.ndarray, tuple | None]:
    """Shares [K] of the images that each domain gets, and the --mix-ramp (domain, first, last, fraction) if any."""
    K = len(splits)
    if config["schedule"] != "B":
        return np.full(K, 1.0 / K), None
    sizes = np.array([len(split) for split in splits], dtype=float)
    shares = np.array(per_domain(config, "mix")) if config["mix"] else sizes ** config["mix_temperature"]
    if shares.sum() <= 0:
        raise InputError(f"--mix {config['mix']}: at least one share must be above 0")
    shares, mix_ramp = shares / shares.sum(), None
    if config["mix_ramp"]:
        number = r"(\d+(?:\.\d*)?)"
        match = re.fullmatch(rf"(\w+):{number}->{number}(?:@{number})?", config["mix_ramp"])
        first, last, fraction = (float(x) for x in (*match.groups()[1:3], match[4] or 0.3)) if match else (2, 2, 2)
        if not match or match[1] not in config["domains"] or max(first, last, fraction) > 1 or not fraction:
            raise InputError(f"--mix-ramp {config['mix_ramp']!r}: want DOMAIN:FIRST->LAST[@FRACTION], shares in 0..1, "
                             "FRACTION of training above 0 and up to 1")
        mix_ramp = (config["domains"].index(match[1]), first, last, fraction)
        if shares.sum() - shares[mix_ramp[0]] <= 0:
            raise InputError("--mix-ramp needs another domain with a share above 0")
    for progress in (0.0, 1.0):
        for name, share in zip(config["domains"], shares_at(progress, shares, mix_ramp), strict=True):
            if share and config["batch"] * share < 1:
                raise InputError(f"--batch {config['batch']} gives {name} {config['batch'] * share:.2f} images each: "
                                 f"raise --batch to {math.ceil(1 / share)} or set its share with --mix")
    return shares, mix_ramp


def describe_plan(config: dict, splits: list[Split], plan: np.ndarray, steps: int) -> dict[str, int]:
    """Print what will be seen, before anything is; returns the images per domain."""
    counts = dict(zip(config["domains"], plan.sum(0).tolist(), strict=True))
    print(f"{config['out']}: schedule {config['schedule']}, {steps} steps of {config['batch']} images")
    if config.get("recipe"):
        print(f"  recipe of {config['backbone']}: " + ", ".join(f"{k}={v:g}" for k, v in config["recipe"].items()))
    shares = class_shares(config, [len(split.classes) for split in splits])
    for split, loss, share in zip(splits, describe_losses(config), shares, strict=True):
        seen = counts[split.domain]
        loss += f" over {share:g} of the classes a step" if share < 1 else ""
        passes = seen / len(split)
        warning = "  WARNING: above 50 passes, expect memorisation" if passes > 50 else ""
        print(f"  {split.domain:8s} {len(split):9,d} images of {len(split.classes):7,d} classes: {seen:10,d} drawn, "
              f"{passes:.1f} passes; {loss}{warning}")
    print(f"  learning rate {config['lr']:g} at the top of the backbone, x {config['layer_decay']:g} per layer "
          f"downwards, class weights {config['head_lr']:g}; warm-up {config['warmup']:.0%}, cosine to x "
          f"{config['min_lr']:g}; not scaled with the batch or the number of processes")
    if "=" not in str(config["sample_classes"]) and float(config["sample_classes"]) < min(shares):
        print(f"  --sample-classes: no domain has {MANY_CLASSES:,} classes, all are used; to draw from fewer name the "
              "domains: object=1,...")
    return counts


def provenance(splits: list[Split]) -> dict:
    """Versions and commit of the code, and which shards: for config.json."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    packages = ("torch", "torchvision", "timm", "open_clip_torch", "numpy")
    return {"git_commit": commit or None, "argv": sys.argv[1:],
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            "shards": {split.domain: split.index["provenance"]["plan"] for split in splits},
            "sources": describe_sources(splits)}


def describe_sources(splits: list[Split]) -> dict[str, dict]:
    """Where the images of each domain come from and how they became square: the shards may be gone one day."""
    return {split.domain: {"source": split.index["provenance"]["source"], "images": len(split),
                           "classes": len(split.classes), "size": split.size,
                           **{key: split.index.get(key) for key in ("fit", "quality")}} for split in splits}


NOT_OPTIONS = {"recipe", "role", "steps", "counts", "git_commit", "argv", "versions", "shards",
               "sources"}  # of config.json
FREE_ON_RESUME = {"workers", "device", "cache", "compile", "grad_checkpointing", "shard_head", "log_every",
                  "save_every", "keep", "resume", "data", "out", "max_skipped", "max_bad", "config", "recipe"}


def find_run(config: dict, splits: list[Split]) -> str:
    """What the output folder holds: "nothing", "unfinished" or "complete"; InputError where it may not be continued."""
    folder = Path(config["out"])
    if not (folder / "config.json").exists():
        return "nothing"
    if not config["resume"]:
        raise InputError(f"{folder} already holds a run: continue it with --resume, or choose another --out")
    old = read_json(folder / "config.json")
    if differing := [key for key, value in config.items() if key not in FREE_ON_RESUME and old.get(key) != value]:
        key = differing[0]
        raise InputError(f"--resume {folder}: --{key.replace('_', '-')} was {old.get(key)!r} and is now "
                         f"{config[key]!r}; give what the run was started with (see its config.json)")
    for split in splits:
        if old["shards"][split.domain] != split.index["provenance"]["plan"]:
            raise InputError(f"--resume {folder}: {split.folder} is not the split that the run was started with")
    return "complete" if (folder / "done.json").exists() else "unfinished"


@dataclass
class Job:
    """A run that is ready to take its next step."""

    config: dict
    folder: Path
    device: torch.device
    ranks: Ranks
    splits: list[Split]
    plan: np.ndarray  # int64 [steps, batches per step, K]: images of each domain
    counts: torch.Tensor  # int64 [steps, K] on the device: the same of whole steps
    model: Backbone
    head: nn.Parameter  # [C, D]; with --shard-head this rank's rows
    rows: torch.Tensor | None  # int64, which these are; None: all
    optimizer: torch.optim.AdamW
    tally: dict  # what accumulates over resumptions
    health: torch.Tensor  # int64 [2] on the device: steps that were not finite, of these the last ones in a row
    ema: list[torch.Tensor] | None = None  # running averages of `parameters`
    norms: torch.Tensor | None = None  # float64 [K, 3]: running n, sum, sum of squares of embedding lengths (AdaFace)
    cache: list[torch.Tensor] | None = None  # per domain, every image of its split
    first: int = 0  # the next step
    bad: int = 0  # damaged images of this rank since the last log line

    @property
    def steps(self) -> int:
        return len(self.plan)

    @property
    def half(self) -> bool:
        """Whether the backbone computes in bfloat16 (--precision)."""
        precision, cuda = self.config["precision"], self.device.type == "cuda"
        return precision == "bf16" or (precision == "auto" and cuda and torch.cuda.is_bf16_supported())

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained; the class weights come last."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def save(self, step: int) -> None:
        """Checkpoint: the state that step `step` starts from."""
        save_checkpoint(self, step)


def set_up(config: dict) -> Job | None:
    """From options to a run that is ready to go; None: it is complete. Refuses before it builds anything."""
    check_options(config)
    splits = open_splits(config)
    schedule = make_schedule(config["schedule"], len(splits), config["batch"])
    shares, mix_ramp = parse_shares(config, splits)
    sizes = np.array([len(split) for split in splits])
    largest = int(np.where(shares > 0, sizes, 0).argmax())
    images = config["images"] or (config["epochs"] or 10.0) * sizes[largest] / shares[largest]
    steps = max(round(images / config["batch"]), 1)
    plan = plan_batches(config, schedule, steps, shares, mix_ramp)
    folder, found = Path(config["out"]), find_run(config, splits)
    if found == "complete":
        print(f"{folder} is complete")
        return None

    asked = config["device"]
    ranks = join_ranks(config)
    device, config["device"] = pick_device(config["device"]), asked
    if ranks.rank == 0 and (folder / "STOP").exists():  # of an earlier start; one that comes from now on counts
        (folder / "STOP").unlink()
    if schedule.images_per_batch < ranks.world:
        raise InputError(f"batches of {schedule.images_per_batch} images cannot be dealt to {ranks.world} processes: "
                         "raise --batch or start fewer")
    if device.index:
        torch.cuda.set_device(device)  # kernels and generators go by the current device
    torch.set_float32_matmul_precision("high")
    counts = describe_plan(config, splits, plan, steps)
    model = load_backbone(config)
    choose_trained(model, config)
    if config["grad_checkpointing"]:
        try:
            model.net.set_grad_checkpointing(True)
        except AssertionError as error:  # timm's way to say so
            raise InputError(f"--grad-checkpointing: {resolve_backbone(config)[1]} has none: leave it out") from error
    model = model.to(device, memory_format=torch.channels_last)
    for split in splits:
        if model.image_size > split.size:
            print(f"  {split.domain}/{split.name}: images of {split.size} px are enlarged to {model.image_size} px")
    if found == "nothing" and ranks.rank == 0:
        role = ROLES[1 if len(splits) == 1 else 2 if config["schedule"] == "sequential" else 0]
        make_folder(folder, "--out")
        write_json(folder / "config.json",
                   config | {"role": role, "steps": steps, "counts": counts, **provenance(splits)})
    classes = [len(split.classes) for split in splits]
    sharded = config["shard_head"] and ranks.world > 1
    if config["shard_head"] and not sharded:
        print("  --shard-head: one process holds all class weights")
    rows = head_slices(classes, ranks.rank, ranks.world)[0].to(device) if sharded else None
    head = nn.Parameter(torch.zeros(len(rows) if sharded else sum(classes), model.dim, device=device))
    optimizer = make_optimizer(model, head, config)
    tally = {"skipped": 0, "bad": 0, "collapsed_at": None, "seconds": 0.0}
    plan = plan.reshape(steps, schedule.batches_per_step, len(splits))
    job = Job(config, folder, device, ranks, splits, plan, torch.from_numpy(plan.sum(1)).to(device), model, head, rows,
              optimizer, tally, torch.zeros(2, dtype=torch.int64, device=device))
    if any(per_domain(config, "margin_adaptive")):
        job.norms = torch.zeros(len(splits), 3, dtype=torch.float64, device=device)
    if config["ema"]:
        job.ema = [p.detach().float().clone() for p in job.parameters]
    if (folder / "last" / "state.pt").exists():
        job.first = load_checkpoint(job)
    else:
        whole = init_head(model, splits, config, device, ranks)
        head.data.copy_(whole if rows is None else whole[rows])
        if job.ema is not None:
            job.ema[-1].copy_(head.data)
    if ranks.rank == 0:
        forget_after(folder, job.first or -1)  # -1: a run that was killed before its first checkpoint
    return job


def free_bytes(device: torch.device) -> int:
    """Memory that is left on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, IndexError, ValueError):  # what Linux would give back counts as free
        free[0] = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError):  # a limit of the job's own (SLURM, a container)
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(min(free), 0)


def fill_cache(job: Job) -> list[np.ndarray]:
    """Decode every image once and keep it (--cache); returns per domain which rows could be read."""
    place = job.device if job.config["cache"] == "gpu" else torch.device("cpu")
    need, have = sum(len(split) * 3 * split.size**2 for split in job.splits), free_bytes(place)
    copies = 1 if place.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if job.ranks.any(need * copies > 0.8 * have):  # nobody begins before all have looked
        each = f" for each of {copies} processes here" * (copies > 1)
        raise InputError(f"--cache {job.config['cache']}: the images take {need / 2**30:.1f} GiB decoded{each} and "
                         f"{have / 2**30:.1f} GiB are free: leave --cache out, or prepare smaller images (--size)")
    job.cache, readable = [], []
    for split in job.splits:
        bank = torch.zeros(len(split), split.size, split.size, 3, dtype=torch.uint8, device=place)
        good = np.zeros(len(split), dtype=bool)
        parts = load(Batches(split, np.arange(len(split)), 256), 0, job.config["workers"], False)
        with tqdm(total=len(split), desc=f"cache {split.domain}", unit="img",
                  disable=True if job.ranks.rank else None) as bar:
            for rows, images in parts:
                bank[torch.from_numpy(rows).to(place)] = images.permute(0, 2, 3, 1).to(place)
                good[rows] = True
                bar.update(len(rows))
        job.cache.append(bank)
        readable.append(good)
    return readable


def from_cache(job: Job, chunk: Chunk) -> Chunk:
    """The chunk with its banks: the cache itself where it lies on the device, else the rows that the chunk names."""
    if job.cache[0].device == job.device:
        return dataclasses.replace(chunk, banks=job.cache)
    banks, row = [], torch.empty_like(chunk.row)
    for d, bank in enumerate(job.cache):
        places = (chunk.domain == d).nonzero().flatten()
        banks.append(bank[chunk.row[places]].pin_memory())
        row[places] = torch.arange(len(places))
    return dataclasses.replace(chunk, banks=banks, row=row)


def class_shares(config: dict, class_counts: list[int]) -> list[float]:
    """Share of each domain's class weights that a step draws (--sample-classes); one number: of domains with many."""
    named = "=" in str(config["sample_classes"])
    return [share if named or count >= MANY_CLASSES else 1.0
            for share, count in zip(per_domain(config, "sample_classes"), class_counts, strict=True)]


def draw_classes(job: Job, chunks: list[Chunk], step: int, sharded: bool) -> dict:
    """Partial FC: the step's classes, as what `loss_options` says of all; renumbers the labels of the step's chunks.

    One draw for the whole step, whose samples all find their class in it: micro-batches and ranks change nothing. On
    the CPU, where the labels are, before anything is sent to the device.
    """
    counts, ranks = [len(split.classes) for split in job.splits], job.ranks
    ends = itertools.accumulate(counts)
    labels, domains = (gather_rows(torch.cat([getattr(chunk, name) for chunk in chunks]), ranks, ranks.control)
                       for name in ("label", "domain"))
    valid = labels >= 0
    rows, labels[valid], ranges = sample_classes(
        labels[valid], domains[valid], [(end - count, end) for count, end in zip(counts, ends, strict=True)],
        class_shares(job.config, counts), seed=job.config["seed"], step=step, minimum=0)
    own = labels.chunk(ranks.world)[ranks.rank].split([len(chunk.label) for chunk in chunks])
    for chunk, label in zip(chunks, own, strict=True):
        chunk.label = label
    rows, ranges, shard = own_draw(rows, ranges, counts, *((ranks.rank, ranks.world) if sharded else (0, 1)))
    # unpinned, a copy of this size would wait for the device
    first = torch.tensor([start for start, _ in ranges])
    rows, first = (v.pin_memory() if job.device.type == "cuda" else v for v in (rows, first))
    return {"rows": rows.to(job.device, non_blocking=True), "first": first.to(job.device, non_blocking=True),
            "class_ranges": ranges, "shard": shard if sharded else None}


@contextlib.contextmanager
def drawn(job: Job, rows: torch.Tensor | None) -> Iterator[None]:
    """Inside, the class weights and their moments are those of `rows` alone: the others neither decay nor move.

    The number of steps in Adam's bias correction is that of the run, as in torch's SparseAdam.
    """
    if rows is None:
        yield
        return
    weight, state = job.head.data, job.optimizer.state[job.head]
    whole = {key: v for key, v in state.items() if v.ndim}
    job.head.data = weight[rows]
    state.update({key: v[rows] for key, v in whole.items()})
    yield
    weight[rows] = job.head.data
    for key in [key for key, v in state.items() if v.ndim]:
        moments = whole[key] if key in whole else torch.zeros_like(weight)  # none before the first step
        moments[rows] = state[key]
        state[key] = moments
    job.head.data = weight


def receive(job: Job, chunks: Iterator[Chunk], step: int, options: dict, passes: int) -> tuple[Iterator[tuple], dict]:
    """The next `passes` micro-batches, see `to_device`, and the loss's options with the classes of this step."""
    part = itertools.islice(chunks, passes)
    if min(class_shares(job.config, [len(split.classes) for split in job.splits])) < 1:
        part = list(part)
        options = options | draw_classes(job, part, step, options["shard"] is not None)
    return to_device(job, part), options


def to_device(job: Job, chunks: Iterable[Chunk]) -> Iterator[tuple]:
    """Micro-batches on the device, one by one: (images, labels, domains)."""
    for chunk in chunks:
        for line in chunk.bad:
            tqdm.write(f"damaged image replaced: {line}", file=sys.stderr)
        job.bad += len(chunk.bad)
        if chunk.images is None:
            chunk = chunk if job.cache is None else from_cache(job, chunk)
            # what autocast would make of them; colours are changed in float32
            half = job.half and chunk.color is None
            chunk.images = to_images(chunk, job.model, job.device, torch.bfloat16 if half else torch.float32)
        yield chunk.images, *(v.to(job.device, non_blocking=True) for v in (chunk.label, chunk.domain))


def make_stream(job: Job) -> Stream:
    """The micro-batches of the run, for this rank."""
    config = job.config
    progress = np.repeat(np.arange(job.steps) / job.steps, job.plan.shape[1])
    severity = config["degrade_severity"] * np.array([ramp(p, config["degrade_ramp"]) for p in progress])
    readable = fill_cache(job) if config["cache"] != "none" else None
    return Stream(job.splits, job.plan.reshape(-1, len(job.splits)), seed=config["seed"],
                  window=config["shuffle_window"], micro_batch=config["micro_batch"],
                  crop=per_domain(config, "crop_scale"), severity=severity if config["degrade"] else None,
                  rank=job.ranks.rank, world=job.ranks.world, readable=readable,
                  **{name: per_domain(config, name) for name in ("flip", "color", "erase")})


def load_steps(job: Job, stream: Stream, first: int) -> Iterator[Chunk]:
    """The chunks of the run from number `first` on."""
    on_gpu = job.device.type == "cuda"  # there the device makes the images, of fewer bytes
    return load(stream if on_gpu else Finished(stream, job.cache, job.model), first, job.config["workers"], on_gpu)


def make_forward(job: Job) -> nn.Module:
    """The backbone in the precision of the run, compiled and spread over the ranks where that is asked for."""
    forward = Precise(job.model, job.half, job.device)
    if job.ranks.world > 1:
        # what never gets a gradient must not be waited for
        images = torch.zeros(1, 3, *[job.model.image_size] * 2, device=job.device)
        forward(images).sum().backward()
        for parameter in job.model.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        job.optimizer.zero_grad(set_to_none=True)
    if job.config["compile"]:
        if job.config["conflict_every"] or job.config["coupling"] == "pcgrad":
            torch._functorch.config.donated_buffer = False  # their backward passes keep the graph
        forward.compile(dynamic=False)  # batches have one size, but for a smaller last part
    if job.ranks.world > 1:
        forward = nn.parallel.DistributedDataParallel(
            forward, device_ids=[job.device] if job.device.type == "cuda" else None, broadcast_buffers=False)
    return forward


@torch.no_grad()
def update(job: Job, norm: torch.Tensor) -> torch.Tensor:
    """Take the optimiser step unless the gradient is not finite; decided on the device, nobody waits for it.

    Returns 1 for a step that was taken, else 0.
    """
    finite = torch.isfinite(norm)
    job.optimizer.found_inf = (~finite).float()
    job.optimizer.step()
    job.health[0] += ~finite
    job.health[1] = (job.health[1] + 1) * ~finite
    return finite.float()


@torch.no_grad()
def follow(job: Job, step: int, taken: torch.Tensor) -> None:
    """--ema: the running averages take up the weights after a step, unless it was skipped."""
    if job.ema is not None:
        t = step + 1 - job.health[0]  # steps taken; decay as Karras et al. warm it up
        pull = (1 - ((1 + t) / (10 + t)).clamp(max=job.config["ema"])) * taken
        away = torch._foreach_sub([p.detach() for p in job.parameters], job.ema)
        torch._foreach_mul_(away, pull.to(away[0].dtype))
        torch._foreach_add_(job.ema, away)


def take_step(job: Job, forward: nn.Module, batches: Iterable[tuple], step: int, options: dict,
              passes: int) -> dict[str, torch.Tensor]:
    """One optimiser step: gradients of its batches, clipping, update. Nothing in it waits for the device."""
    config, frozen = job.config, slice(*options["class_ranges"][0]) if job.config["freeze_text_head"] else slice(0)
    # dropped paths are keyed by (seed, step, rank), so that no state of a generator has to be kept
    key = int(np.random.SeedSequence((config["seed"], step, job.ranks.rank)).generate_state(1)[0])
    torch.default_generator.manual_seed(key)  # torch.manual_seed formats a stack for each kind of GPU that is not there
    if job.device.type == "cuda":
        torch.cuda.manual_seed(key)
    factor = rate(step, job.steps, config["warmup"], config["min_lr"])
    for group in job.optimizer.param_groups:
        group["lr"] = factor * group["scale"]
    tune_backbone = step >= round(config["head_warmup"] * job.steps)
    look = tune_backbone and config["conflict_every"] > 0 and step % config["conflict_every"] == 0
    by_domain = [[] for _ in job.splits] if tune_backbone and (look or config["coupling"] == "pcgrad") else None
    counts = job.counts[step]
    per_batch = passes // len(job.plan[step])
    there = [np.flatnonzero(images).tolist() for images in job.plan[step] for _ in range(per_batch)]
    with drawn(job, options["rows"]):
        total = accumulate(forward, job.head, batches, counts, options, negatives=config["negatives"], ranks=job.ranks,
                           margin=ramp(step / job.steps, config["margin_ramp"]), tune_backbone=tune_backbone,
                           passes=passes, by_domain=by_domain, there=there, norms=job.norms)
        if by_domain is not None:
            couple(job, by_domain, step, look)
        job.head.grad[frozen].zero_()  # --freeze-text-head: object comes first
        total["grad_norm"] = gradient_norm(job.parameters, job.head, options["shard"] is not None, job.ranks)
        nn.utils.clip_grads_with_norm_(job.parameters, config["clip"] or math.inf, total["grad_norm"])
        total["finite"] = update(job, total["grad_norm"])
        job.optimizer.zero_grad(set_to_none=True)
    follow(job, step, total["finite"])
    learn_norms(job, total["norms"], total["finite"])
    return total


def couple(job: Job, by_domain: list[list[torch.Tensor]], step: int, look: bool) -> None:
    """From each domain's gradient to the step's: their sum, or PCGrad's; `look`: write down how they conflict."""
    named = [(name, p) for name, p in job.model.named_parameters() if p.requires_grad]
    for k, gradients in enumerate(by_domain):
        if not gradients:  # a domain without an image in this step
            by_domain[k] = gradients = [torch.zeros_like(p) for _, p in named]
        if job.ranks.world > 1:  # all at once: hundreds of small sums would each wait for the network
            whole = job.ranks.sum(torch.cat([gradient.flatten() for gradient in gradients])) / job.ranks.world
            parts = whole.split([gradient.numel() for gradient in gradients])
            for part, gradient in zip(parts, gradients, strict=True):
                gradient.copy_(part.view_as(gradient))  # in its own memory layout, which fused AdamW goes by
    if job.config["coupling"] == "pcgrad":
        whole = project_conflicts(by_domain, job.config["seed"], step)
    else:
        whole = [sum(parts) for parts in zip(*by_domain, strict=True)]
    for (_, parameter), gradient in zip(named, whole, strict=True):
        parameter.grad = gradient
    if look and job.ranks.rank == 0:
        layers = job.model.layers()
        norms, cosines = (v.cpu() for v in conflicts(by_domain, [layers[name] for name, _ in named]))
        pairs = {f"{a}~{b}": (i, j) for (i, a), (j, b) in itertools.combinations(enumerate(job.config["domains"]), 2)}
        append(job.folder / "conflict.jsonl", {
            "step": step + 1, "norm": dict(zip(job.config["domains"], norms[-1].tolist(), strict=True)),
            "cosine": {name: float(cosines[-1, i, j]) for name, (i, j) in pairs.items()},
            "cosine_by_layer": {name: cosines[:-1, i, j].tolist() for name, (i, j) in pairs.items()}})


def append(path: Path, record: dict) -> None:
    """Add a line to a .jsonl file of the run; NaN has no place in JSON and becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    try:
        with open(path, "a") as file:
            file.write(json.dumps(plain(record)) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); the last checkpoint is intact: make room, then "
                         "continue with --resume") from error


def look_at_fixed_images(job: Job, splits: list[Split], board, step: int) -> None:
    """--eval-every: AUC of fixed images into probe.jsonl; a task that falls below its start is named."""
    if job.ranks.rank == 0:
        job.model.eval()
        with averaged(job):
            scores = probe(job, splits)
        job.model.train()
        append(job.folder / "probe.jsonl", {"step": step, "auc": scores})
        start = job.tally.setdefault("start", scores)
        for name, score in scores.items():
            board.add_scalar(f"auc/{name}", score, step)
            if score < start.get(name, 0) - 0.01:
                tqdm.write(f"WARNING: step {step}: {name} has fallen below its start: same/different AUC {score:.3f}, "
                           f"was {start[name]:.3f}", file=sys.stderr)
    job.ranks.wait()


def run_steps(job: Job) -> int:
    """The training loop; returns the exit code."""
    import train_report  # here, because it builds on this module

    config, steps, tally, ranks = job.config, job.steps, job.tally, job.ranks
    stream = make_stream(job)
    passes = stream.per_batch * job.plan.shape[1]
    chunks = load_steps(job, stream, job.first * passes)
    board = None
    if ranks.rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(job.folder / "tensorboard"), purge_step=job.first)
        if not job.first:
            train_report.draw_samples(job.folder / "samples.png", stream, job.model, job.cache)
    options = loss_options(config, [len(split.classes) for split in job.splits], job.device, ranks)
    fixed = probe_splits(config) if config["eval_every"] else []
    if fixed and not job.first:
        look_at_fixed_images(job, fixed, board, 0)
    stop, window, started = StopRequest(job.folder, ranks), [], time.time() - tally["seconds"]
    forward, ending = make_forward(job), False

    forward.train()
    bar = tqdm(range(job.first, steps), initial=job.first, total=steps, unit="step", desc="train",
               disable=True if ranks.rank else None)
    for step in bar:
        batches, now = receive(job, chunks, step, options, passes)
        window.append(take_step(job, forward, batches, step, now, passes))
        tally["seconds"], done = time.time() - started, step + 1
        ending = ranks.any(bool(stop)) and done < steps
        if done % config["log_every"] == 0 or done == steps or ending:
            record = log_window(job, board, window, done)
            check_health(job, done)
            if "loss" in record:
                bar.set_postfix(loss=f"{record['loss']:.3f}", img_s=f"{record['images_per_second']:.0f}")
            window = []
        if fixed and (done % config["eval_every"] == 0 or done == steps):
            look_at_fixed_images(job, fixed, board, done)
            forward.train()
        if config["keep"] and (done % (config["eval_every"] or config["save_every"]) == 0 or done == steps):
            keep_checkpoint(job, done)
        if ending or done % config["save_every"] == 0 or done == steps:
            job.save(done)
        if ending:
            print(f"stopped by {stop.reason or 'another process'} after step {done} of {steps}; continue with --resume")
            break
    if board:
        board.close()
    if ending:
        return STOPPED
    if ranks.rank == 0:
        train_report.write_report(job)
        write_json(job.folder / "done.json", {"steps": steps, "images": steps * config["batch"], **tally})
    print(f"done: {job.folder} in {tally['seconds']:.0f} s; next: python evaluate.py --run {job.folder}")
    ranks.wait()
    return 0


class Precise(nn.Module):
    """The model's forward pass in the precision of --precision."""

    def __init__(self, model: Backbone, half: bool, device: torch.device) -> None:
        super().__init__()
        self.model, self.half, self.device = model, half, device.type

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            return self.model(images)


def check_health(job: Job, done: int) -> None:
    """Stop a run whose steps or images are bad; its last checkpoint stays."""
    config, seen = job.config, done * job.config["batch"]
    job.tally["skipped"], in_a_row = job.health.tolist()
    if in_a_row > config["max_skipped"]:
        raise InputError(f"{job.folder}: {in_a_row} steps in a row were not finite; the last good checkpoint is in "
                         f"{job.folder}/last: lower --lr or raise --warmup")
    if job.tally["bad"] > config["max_bad"] * max(seen, 1000):
        raise InputError(f"{job.tally['bad']} damaged images among {seen} exceed --max-bad: check the shards with "
                         "`python -m data_prep verify DIR`")


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
    bad = torch.tensor(job.bad)
    if job.ranks.world > 1:
        torch.distributed.all_reduce(bad, group=job.ranks.control)
    job.tally["bad"], job.bad = job.tally["bad"] + int(bad), 0
    record |= {key: value for key, value in job.tally.items() if key != "start"}
    if board is not None:
        append(job.folder / "log.jsonl", record)
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


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file of a run; none where it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------- options


def refuse_options(context: click.Context) -> None:
    """Options given before a subcommand's name would be parsed and ignored."""
    for parameter in context.command.params:
        if context.get_parameter_source(parameter.name).name == "COMMANDLINE":
            raise InputError(f"{parameter.opts[0]} before {context.invoked_subcommand}: give options after the "
                             f"command's name (see `{context.invoked_subcommand} --help`)")


def settle_options(context: click.Context, config: dict) -> None:
    """Default < recipe < --config < command line; two options that say the same thing are refused."""
    said = {name: context.get_parameter_source(name).name for name in config}
    for name, rival in (("images", "epochs"), ("epochs", "images"), ("backbone", "model"), ("model", "backbone"),
                        ("domains", "order")):
        if said.get(name) == "COMMANDLINE" and said.get(rival) == "DEFAULT_MAP":  # what --config says in another way
            config[rival] = None
    refuse_two_voices(config, said)
    refuse_idle(config, said)
    fill_recipe(config, said)


def fill_recipe(config: dict, said: dict[str, str]) -> None:
    """Fill what nobody gave from RECIPES; what that was is kept under "recipe"."""
    recipe = {}
    if config["backbone"] and config["weights"] != "none":
        names = [config["backbone"], f"{config['backbone']}-{config['size']}", *(["lora"] if config["lora"] else [])]
        for name in names:
            recipe |= RECIPES.get(name, {})
    config["recipe"] = {key: value for key, value in recipe.items() if said[key] == "DEFAULT"}
    config |= config["recipe"]


def refuse_two_voices(config: dict, said: dict[str, str]) -> None:
    """--loss and the options that it stands for: only what a --config said before may be overruled."""
    for name in ("scale", *MARGINS):
        overruled = said[name] == "DEFAULT" or (said[name] == "DEFAULT_MAP" and said["loss"] == "COMMANDLINE")
        if config["loss"] and not overruled and (name != "scale" or re.search(r"\bs\s*=", config["loss"])):
            raise InputError(f"--loss and --{name.replace('_', '-')} both set {name.split('_')[0]}s: say it all in one "
                             "of them")


def refuse_idle(config: dict, said: dict[str, str]) -> None:
    """Options on the command line that would do nothing."""
    for name, idle, why in (
        ("order", config["schedule"] != "sequential", "orders the blocks of --schedule sequential"),
        ("degrade_severity", not config["degrade"], "goes with --degrade"),
        ("degrade_ramp", not config["degrade"], "goes with --degrade"),
        ("size", bool(config["model"]) and not config["backbone"], "is a size of --backbone"),
        ("head_init_images", config["head_init"] == "random", "counts the images of class means"),
        ("mix_temperature", bool(config["mix"]), "makes the shares that --mix gives"),
    ):
        if idle and said[name] == "COMMANDLINE":
            raise InputError(f"--{name.replace('_', '-')} {why}: leave it out")


def read_config(context: click.Context, _parameter, path: str | None) -> str | None:
    """--config FILE: its options become the defaults, so that the command line still wins."""
    if path is None:
        return None
    try:
        values = json.loads(Path(path).read_text())
        assert isinstance(values, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise InputError(f"--config {path}: not a readable JSON file of options; take a run's config.json") from error
    known = {parameter.name for parameter in context.command.params}
    if unknown := set(values) - known - NOT_OPTIONS:
        raise InputError(f"--config {path}: no option {sorted(unknown)[0]!r}")
    for key, value in values.items():
        if isinstance(value, list) and key in known and not all(isinstance(part, str) for part in value):
            raise InputError(f"--config {path}: {key} is {value}: want text as on the command line")
    joined = {key: ",".join(value) if isinstance(value, list) and key in known else value
              for key, value in values.items()}
    context.default_map = {key: joined[key] for key in known & set(joined) - {"out", "resume", "config"}}
    return path


PEOPLE = "object=0,face_hq={0},face_lq={0},body={0}".format


@click.group(invoke_without_command=True, context_settings={"show_default": True, "max_content_width": 120},
             help=__doc__.split("\n\n")[0])
@click.option("--config", is_eager=True, callback=read_config, metavar="FILE",
              help="Replay a run's config.json; options given here win over it.")
@click.option("--backbone", type=click.Choice(list(BACKBONES)),
              help="Foundation model family; where weights are loaded, its recipe fills what is not given.")
@click.option("--size", type=click.Choice(SIZES), default="large",
              help="Size within the family.")
@click.option("--model", metavar="NAME",
              help="Any timm or open_clip model instead of --backbone; open_clip: NAME or NAME/TAG.")
@click.option("--weights", default="pretrained", metavar="WHICH",
              help="'pretrained' (downloads), 'none' (random start) or a safetensors/pt FILE.")
@click.option("--image-size", type=click.IntRange(16),
              help="Input side in pixels (default: 224, DINOv3 256, --model: its own).")
@click.option("--embed-dim", type=click.IntRange(0), default=0,
              help="Width of one linear layer after the backbone; 0: none.")
@click.option("--data", default="data", metavar="DIR", help="Data root: DIR/<domain>/train holds the shards.")
@click.option("--out", metavar="DIR", help="Run folder (default: runs/{backbone}-{size}-{schedule}-{domains}-s{seed}).")
@click.option("--resume", is_flag=True,
              help="Continue the run in --out; starts afresh where there is nothing to continue.")
@click.option("--schedule", type=click.Choice(["A", "B", "alternate", "sequential"]), default="B",
              help="A: one domain a batch, a step after each round. B: every batch blended.")
@click.option("--domains", metavar="NAMES",
              help="Comma-separated subset of object,face_hq,face_lq,body (default: all).")
@click.option("--order", metavar="NAMES",
              help="Order of the blocks of --schedule sequential (default: the order above).")
@click.option("--batch", type=click.IntRange(1), default=256, help="Images per optimiser step.")
@click.option("--micro-batch", type=click.IntRange(1),
              help="At most so many images per forward pass (default: the batch).")
@click.option("--images", type=click.IntRange(1), help="Length of the run in images, all domains together.")
@click.option("--epochs", type=Number(0, min_open=True),
              help="Length as passes over the largest domain (default: 10).")
@click.option("--mix", metavar="SHARES", help="Shares of schedule B, e.g. object=1,face_hq=2,face_lq=1,body=1.")
@click.option("--mix-temperature", type=Number(0, 1), default=0.5,
              help="Shares of schedule B ∝ (images)^T; 0: equal, 1: proportional.")
@click.option("--mix-ramp", metavar="RAMP",
              help="Let a share move, e.g. 'object:1.0->0.25@0.3' over the first 0.3 of training.")
@click.option("--coupling", type=click.Choice(["domain", "sample", "pcgrad"]), default="domain",
              help="What a step averages over first: each domain, or all samples; pcgrad: each domain, its gradient "
                   "freed of what points against another's (schedule A, a backward pass per domain).")
@click.option("--conflict-every", type=click.IntRange(0), default=0,
              help="Steps between looks at how the domains' gradients conflict (conflict.png); 0: never.")
@click.option("--domain-weight", default="1", metavar="NUMBERS",
              help="Weight of a domain in the loss: one number or NAME=NUMBER,...")
@click.option("--negatives", type=click.Choice(["own", "all"]), default="own",
              help="Softmax over the domain's own classes or over every class.")
@click.option("--sample-classes", default="1", metavar="NUMBERS",
              help="Partial FC: share of the class weights that a step draws, those of its samples among them; one "
                   f"number: of domains with {MANY_CLASSES:,} classes or more; 1: all.")
@click.option("--loss", metavar="LOSSES",
              help="arcface, cosface, adaface or softmax, per domain: 'face_hq=arcface:m=0.5,s=64;body=cosface'.")
@click.option("--scale", default="object=30,face_hq=64,face_lq=64,body=64", metavar="NUMBERS",
              help="Scale s of the logits, per domain.")
@click.option("--margin-additive", default=PEOPLE(0.35), metavar="NUMBERS",
              help="CosFace margin m on the cosine, per domain.")
@click.option("--margin-angular", default="0", metavar="NUMBERS", help="ArcFace margin in radians, per domain.")
@click.option("--margin-adaptive", default="0", metavar="NUMBERS",
              help="AdaFace: how much a longer embedding hardens its additive margin (its h), per domain; 0: not.")
@click.option("--margin-gradient", type=click.Choice(["exact", "straight-through"]), default="exact",
              help="Gradient of the target's logit: exact, or 1 as arcface_torch trains.")
@click.option("--margin-extension", type=click.Choice(["linear", "clamp"]), default="linear",
              help="Angles beyond 0..π: go on linearly, or clamped without a gradient as AdaFace's own code has it.")
@click.option("--label-smoothing", default="0", metavar="NUMBERS", help="Label smoothing 0..1, per domain.")
@click.option("--margin-ramp", type=Number(0, 1), default=0.1,
              help="Margins grow from 0 over this fraction of training; 0: off.")
@click.option("--degrade", is_flag=True,
              help="Degrade face_lq/train online: for sets of sharp crops, not for natively low-quality ones.")
@click.option("--degrade-severity", type=Number(0, 1), default=1.0, help="Largest severity of --degrade.")
@click.option("--degrade-ramp", type=Number(0, 1), default=0.3,
              help="Severity grows from 0 over this fraction of training; 0: off.")
@click.option("--crop-scale", default="object=0.35,face_hq=0.8,face_lq=0.8,body=0.8", metavar="NUMBERS",
              help="Least area of the random crop, per domain; 1: none.")
@click.option("--flip", default="0.5", metavar="NUMBERS", help="Chance of a mirror image, per domain.")
@click.option("--color", default="0", metavar="NUMBERS",
              help="Largest change of brightness, contrast and saturation, 0..1, per domain.")
@click.option("--erase", default="0", metavar="NUMBERS",
              help="Chance of erasing a patch, per domain; re-identification takes body=0.5.")
@click.option("--head-init", type=click.Choice(["means", "text", "random"]), default="means",
              help="Class weights start at class means, prompt embeddings (objects) or at random.")
@click.option("--head-init-images", type=click.IntRange(1), default=20,
              help="At most so many images per class for the means.")
@click.option("--freeze-text-head", is_flag=True, help="Keep the object rows of --head-init text as they are.")
@click.option("--head-warmup", type=Number(0, 1), default=0.02,
              help="Fraction of the steps that train the class weights alone, first.")
@click.option("--lr", type=Number(0), default=2e-5,
              help="Peak learning rate of the top layer of the backbone.")
@click.option("--head-lr", type=Number(0, infinite=True), default=1e-3, help="Peak learning rate of the class weights.")
@click.option("--layer-decay", type=Number(0, 1), default=0.8,
              help="Factor on the learning rate per layer downwards; 1: none.")
@click.option("--freeze-blocks", type=click.IntRange(0), default=0,
              help="Lowest blocks that stay as they are, with all below them.")
@click.option("--lora", type=click.IntRange(0), default=0, metavar="RANK",
              help="Train low-rank updates of the attention's projections instead of the network; 0: off.")
@click.option("--drop-path", type=Number(0, 1, max_open=True), default=0.0,
              help="Stochastic depth: chance of dropping the top block's branches, falling to 0 at the lowest.")
@click.option("--weight-decay", type=Number(0), default=0.05,
              help="AdamW weight decay of the backbone's matrices.")
@click.option("--warmup", type=Number(0, 1), default=0.05,
              help="Fraction of the steps over which the learning rate rises.")
@click.option("--min-lr", type=Number(0, 1), default=0.01,
              help="Last learning rate as a fraction of the peak.")
@click.option("--clip", type=Number(0), default=1.0,
              help="Gradient norm above which a step is scaled down; 0: never.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto",
              help="bf16 autocast of the backbone; auto: where CUDA has it.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0,
              help="Seed of the start, the data order and every draw.")
@click.option("--shuffle-window", type=click.IntRange(1), default=8,
              help="Shards among which the order of an epoch is shuffled.")
@click.option("--workers", type=click.IntRange(0), default=LOADERS, help="Loader processes.")
@click.option("--device", default="auto", help="auto, cpu or cuda; under torchrun each process takes its own GPU.")
@click.option("--cache", type=click.Choice(["none", "ram", "gpu"]), default="none",
              help="Decode every image once, at the start, and keep it there.")
@click.option("--compile", is_flag=True, help="torch.compile the backbone: minutes at the start, then faster steps.")
@click.option("--grad-checkpointing", is_flag=True, help="Recompute activations in backward: less memory, slower.")
@click.option("--shard-head", is_flag=True,
              help="torchrun: every process holds a slice of each domain's class weights.")
@click.option("--ema", type=Number(0, 1, max_open=True), default=0.0, metavar="DECAY",
              help="Export the running average of the weights, e.g. 0.9998; 0: off.")
@click.option("--log-every", type=click.IntRange(1), default=10, help="Steps between lines of log.jsonl.")
@click.option("--eval-every", type=click.IntRange(0), default=0,
              help="Steps between same/different AUCs of 2,000 fixed images per domain; 0: never.")
@click.option("--save-every", type=click.IntRange(1), default=500, help="Steps between checkpoints.")
@click.option("--keep", type=click.IntRange(0), default=0,
              help="Checkpoints of the weights that stay in RUN/checkpoints, one per --eval-every (else --save-every): "
                   "the newest, and besides the best by --eval-every; 0: none.")
@click.option("--max-skipped", type=click.IntRange(0), default=10, help="Non-finite steps in a row that stop the run.")
@click.option("--max-bad", type=Number(0, 1), default=0.001,
              help="Share of damaged images above which the run stops.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
@click.pass_context
def main(context: click.Context, **config) -> int | None:
    if context.invoked_subcommand:
        refuse_options(context)
        return None
    settle_options(context, config)
    try:
        job = set_up(config)
        code = run_steps(job) if job else 0
    except torch.OutOfMemoryError as error:
        raise InputError(f"the GPU's memory is full ({str(error).partition('. ')[0]}): lower --micro-batch, or add "
                         "--grad-checkpointing; go on with --resume") from error
    if job and job.ranks.world > 1:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # all is written; gloo's threads now and then abort an interpreter that is torn down
    return code


@main.command(params=[p for p in main.params if p.name not in ("out", "resume", "epochs", "images")], help="""Where the
time of a step goes: real data, one batch on the device, the bare backbone. Takes the options of training.""")
@click.option("--rounds", type=click.IntRange(1), default=4, help="Turns of each kind.")
@click.option("--count", type=click.IntRange(1), default=8, help="Steps of a turn.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="Write the result there, too.")
@click.pass_context
def bench(context: click.Context, rounds: int, count: int, path: Path | None, **config) -> int:
    import train_bench  # here, because it builds on this module

    settle_options(context, config)  # the step that is timed is the step of training
    return train_bench.bench_run(config, rounds, count, path)


@main.command(help="Write a run's model for others: weights of timm or open_clip, or an ONNX graph; with a model card.")
@click.option("--run", metavar="RUN", required=True, help="Folder of a finished run.")
@click.option("--to", type=click.Choice(["safetensors", "onnx"]), required=True, help="Form of the model.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE",
              help="File to write, its card beside it (default: RUN/export/NAME.FORM).")
@click.option("--tolerance", type=Number(0), default=1e-4,
              help="Largest difference of a unit embedding's component; beyond it nothing is written (exit code 1).")
@click.option("--wise-ft", type=Number(0, 1), default=1.0, metavar="ALPHA",
              help="Mix with the foundation: ALPHA of the run's weights, the rest of those it started from; 1: none.")
@click.option("--allow-partial", is_flag=True, help="Accept a run that has not finished.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an input error.")
def export(run: str, to: str, out: Path | None, tolerance: float, wise_ft: float, allow_partial: bool) -> int:
    import train_export  # here, because it builds on this module

    return train_export.export_run(load_run(Path(run), allow_partial), to, out, tolerance, wise_ft)


if __name__ == "__main__":
    run_command(main)
