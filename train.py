"""Fine-tune one backbone on objects, faces (high and low quality) and bodies at once, in one embedding space.

    python train.py --backbone clip --schedule B                                  # one GPU, data/ prepared before
    python train.py --backbone eva02 --schedule A --batch 256 --micro-batch 64    # bounded memory
    python train.py --backbone clip --schedule B --domains face_hq                # a domain expert
    python train.py --backbone clip --size tiny --weights none --data demo/data --image-size 64 --batch 64 --images 6400
    torchrun --nproc-per-node 8 train.py --backbone clip --schedule B --shard-head   # eight GPUs
    python train.py --config runs/NAME/config.json --seed 1                       # replay a run with another seed
    python train.py ... --out runs/NAME --resume                                  # continue, or start
    python train.py export --run runs/NAME --to onnx                              # export, with a model card

A schedule is three numbers: domains per batch, images per batch, batches per optimiser step. In every schedule a step
minimises L = sum_i w_d(i) l_i / (K n_d(i)). docs/training.md lists the files in runs/NAME.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data_prep import (
    DOMAIN_LIST, DOMAINS, MIX_RAMP, SEVERITY, GroupedHelp, InputError, MixRamp, Number, add_options, append, as_texts,
    lock_folder, make_folder, option, per_domain, progress, refuse_options, replay_config,
    run_command, write_atomically, write_json, writing,
)
from data_prep.format import Split, matched_pairs, named_splits, open_root, open_training, ordered_tests
from data_prep.loaders import LOADERS, batch_too_large, enough_loaders, too_large
from data_prep.stream import Feed, Stream, decode_split
from models import runs
from models.adapt import (
    RETAIN_TYPE, AutocastModel, LayerwiseAdamW, Retention, RetainWeights, RunningAverage, add_drop_path, add_low_rank,
    uses_bf16,
)
from models.backbones import BACKBONES, RECIPES, SIZES, Backbone, Network, embed_rows, load_backbone, resolve_backbone
from models.head import LOSS_TYPE, MANY_CLASSES, HeadSettings, Loss, MarginHead, starting_weights
from models.runs import Ranks, join_ranks, pick_device
from reports.training import (
    Tally, add_to_totals, check_health, describe_run, draw_samples, empty_totals, write_line, write_report,
)

MIN_RATE = 0.01  # end of the cosine, as a fraction of the peak learning rate
CLIP = 1.0  # largest gradient norm
MOST_STEPS = 10_000_000  # the plan of a run is held in memory
# ---------------------------------------------------------------- options


@dataclass
class Options:
    """The options of a run. Precedence: default < recipe of the backbone < --config < command line."""

    data: str = option("data", "data", str, "Data root; training reads DIR/<domain>/train.", metavar="DIR")
    domains: list[str] | None = option("data", None, DOMAIN_LIST, "Domains to train on (default: all four); "
                                       "--schedule sequential visits them in this order.")
    crop_scale: dict[str, float] = option("data", "object=0.35,face_hq=0.8,face_lq=0.8,body=0.8", per_domain(0.01, 1),
                                          "Smallest area of the random crop, per domain; 1: no crop.")
    erase: dict[str, float] = option("data", "0", per_domain(0, 1), "Probability of random erasing, per domain; "
                                     "usual in re-identification: body=0.5.")
    degrade: tuple[float, float] | None = option(
        "data", None, SEVERITY, "Degrade the sharp crops of face_lq/train online. SEVERITY[@RAMP]: full severity, and "
        "the fraction of training over which it is reached (no value: 1@0.3).", is_flag=False, flag_value="1@0.3")
    cache: str = option("data", "none", click.Choice(["none", "ram", "gpu"]), "Decode every image once and keep it.")
    workers: int = option("data", LOADERS, click.IntRange(0, 1024), "Number of data loader processes.")

    backbone: str | None = option("model", None, click.Choice(list(BACKBONES)), "Backbone family; if weights are "
                                  "loaded, its recipe sets the options that are not given.")
    size: str = option("model", "large", click.Choice(SIZES), "Size within the family.")
    model: str | None = option("model", None, str, "Any timm or open_clip NAME (or NAME/TAG) instead of --backbone.")
    weights: str = option("model", "pretrained", str, "'pretrained' (downloads), 'none' (random), FILE or FILE:NAME.")
    image_size: int | None = option("model", None, click.IntRange(16, 4096), "Pixels per side (default: the model's).")
    embed_dim: int = option("model", 0, click.IntRange(0, 65536), "Width of an added linear layer; 0: none.")
    lora: int = option("model", 0, click.IntRange(0, 4096), "LoRA: rank of the updates of the attention projections, "
                       "which are trained instead of the network; 0: off.")
    drop_path: float = option("model", 0.0, Number(0, 1, max_open=True), "Stochastic depth: drop probability of the "
                              "top block, decreasing linearly to 0 at the lowest.")

    schedule: str = option("schedule", "B", click.Choice(["A", "B", "alternate", "sequential"]),
                           "A: one domain per batch, one step per round of the domains. B: all domains in every batch.")
    batch: int = option("schedule", 256, click.IntRange(1, 1 << 36), "Images per optimiser step.")
    micro_batch: int | None = option("schedule", None, click.IntRange(1), "Largest number of images per forward pass.")
    images: int | None = option("schedule", None, click.IntRange(1, 1 << 48), "Length of the run, in images.")
    epochs: float | None = option("schedule", None, Number(0, 1e9, min_open=True), "Or passes over the largest domain "
                                   "(neither given: 10 passes).")
    mix: float | dict[str, float] = option(
        "schedule", "0.5", per_domain(0, 1e12, spread=False), "Shares of schedule B: one number T for shares ∝ "
        "(images)^T (0: equal, 1: proportional), or object=1,face_hq=2,...")
    mix_ramp: MixRamp | None = option("schedule", None, MIX_RAMP, "Change a share linearly, e.g. object:1.0->0.25@0.3 "
                                      "over the first 0.3 of training.")
    replay: float = option("schedule", 0.0, Number(0, 1, max_open=True), "Share of each batch of --schedule sequential "
                           "that comes from the earlier domains.")

    loss: dict[str, Loss] = option(
        "loss", "object=softmax;face_hq=cosface;face_lq=cosface;body=cosface", LOSS_TYPE, "softmax, cosface, arcface, "
        "adaface or combined, per domain, e.g. face_hq=arcface:m=0.5,s=64;body=cosface; s: scale, e: smoothing, w: "
        "weight of the domain.")
    coupling: str = option("loss", "domain", click.Choice(["domain", "sample", "pcgrad"]), "Loss of a step: mean over "
                           "domains of their mean losses, or mean over samples; pcgrad: as domain, with projection of "
                           "conflicting gradients (schedule A).")
    negatives: str = option("loss", "own", click.Choice(["own", "all"]), "Softmax over the domain's classes, or all.")
    sample_classes: float | dict[str, float] = option(
        "loss", "1", per_domain(1e-6, 1, spread=False), "Partial FC: fraction of the class weights drawn in each step; "
        f"one number applies to domains of {MANY_CLASSES:,} classes or more; 1: all.")
    retain: RetainWeights | None = option(
        "loss", None, RETAIN_TYPE, "Penalty on the distance to the untouched backbone: l2sp=W, of weights; features=W, "
        "of embeddings (one more forward pass).", metavar="NAME=W,...")
    margin_ramp: float = option("loss", 0.1, Number(0, 1), "Margins grow from 0 over this fraction of training.")
    head_init: str = option("loss", "means", click.Choice(["means", "text", "text-frozen", "random"]), "Initial "
                            "class weights: class means; CLIP text embeddings of objects (text-frozen: not trained).")
    head_warmup: float = option("loss", 0.02, Number(0, 1), "Initial fraction of steps that trains only class weights.")
    shard_head: bool = option("loss", False, bool, "Each process (torchrun) holds a slice of the class weights.")

    lr: float = option("optimiser", 2e-5, Number(0), "Peak learning rate of the backbone's top layer.")
    head_lr: float = option("optimiser", 1e-3, Number(0, infinite=True), "Peak learning rate of the class weights.")
    layer_decay: float = option("optimiser", 0.8, Number(0, 1), "Factor on the learning rate per layer below the top.")
    weight_decay: float = option("optimiser", 0.05, Number(0), "AdamW weight decay of the backbone's matrices.")
    warmup: float = option("optimiser", 0.05, Number(0, 1), "Fraction of the steps over which the learning rate rises.")
    ema: float = option("optimiser", 0.0, Number(0, 1, max_open=True), "EMA decay; the average is saved; 0: off.")
    seed: int = option("optimiser", 0, click.IntRange(0, 2**62 - 1), "Seed of weights, data order, augmentation.")

    device: str = option("machine", "auto", str, "auto, cpu or cuda; under torchrun each process takes its own GPU.")
    precision: str = option("machine", "auto", click.Choice(["auto", "fp32", "bf16"]), "auto: bf16 if the GPU has it.")
    compile: bool = option("machine", False, bool, "torch.compile: takes minutes, then steps are faster.")
    grad_checkpointing: bool = option("machine", False, bool, "Recompute activations in backward: less memory, slower.")

    out: str | None = option("logging", None, str, "Run folder (default: runs/{backbone}-{size}-{schedule}-{domains}-"
                             "s{seed}).", metavar="DIR")
    resume: bool = option("logging", False, bool, "Continue the run in --out, or start it.")
    log_every: int = option("logging", 10, click.IntRange(1), "Steps between lines of log.jsonl.")
    eval_every: int = option("logging", 0, click.IntRange(0), "Steps between quick evaluations: same/different AUC of "
                             "2,000 fixed images per domain; 0: never.")
    splits: str | None = option("logging", None, str, "domain/split,... for --eval-every (default: one per domain).")
    save_every: int = option("logging", 500, click.IntRange(1), "Steps between checkpoints.")
    keep: int = option("logging", 0, click.IntRange(0), "Number of newest checkpoints kept in RUN/checkpoints, one "
                       "per --eval-every (else --save-every), besides the best by --eval-every.")
    conflict_every: int = option("logging", 0, click.IntRange(0), "Steps between measured gradient conflicts; 0: off.")

    @property
    def trained(self) -> list[str]:
        """The domains of the run, in the order of DOMAINS."""
        return [name for name in DOMAINS if name in (self.domains or DOMAINS)]

    def per_domain(self, name: str) -> list:
        """The values of an option, one per domain of the run."""
        return [getattr(self, name)[domain] for domain in self.trained]


def settle_options(context: click.Context, values: dict) -> tuple[Options, dict[str, float]]:
    """The checked options of a run, and those among them that the backbone's recipe set."""
    sources = {name: context.get_parameter_source(name) for name in values}
    given = {name: source.name if source else "DEFAULT" for name, source in sources.items()}
    for name, rival in (("images", "epochs"), ("epochs", "images"), ("backbone", "model"), ("model", "backbone")):
        if given[name] == "COMMANDLINE" and given[rival] == "DEFAULT_MAP":  # replaces the other form in --config
            values[rival] = None
    recipe: dict[str, float] = {}
    if values["backbone"] and values["weights"] != "none":
        for name in (values["backbone"], f"{values['backbone']}-{values['size']}", "lora" if values["lora"] else ""):
            recipe |= RECIPES.get(name, {})
    recipe = {name: value for name, value in recipe.items() if given[name] == "DEFAULT"}
    options = Options(**values | recipe)
    check_options(options, {name for name, source in given.items() if source == "COMMANDLINE"})
    return options, recipe


def check_options(options: Options, typed: set[str]) -> None:
    """Refuse contradictions, and `typed` options that do nothing, before any work; set options that follow."""
    domains = options.trained
    for one in fields(options):
        value = getattr(options, one.name)
        if isinstance(value, dict) and (missing := [name for name in domains if name not in value]):
            raise InputError(f"--{one.name.replace('_', '-')}: no value for {missing[0]}")
    if options.weights not in ("pretrained", "none"):
        options.weights = os.path.abspath(options.weights)  # runs are also read from other working directories
    if not options.model and not options.backbone:
        raise InputError("which backbone? give --backbone clip|eva02|dinov3 or --model NAME (of timm or open_clip)")
    # not an error, because scripts pass the same options to many runs
    if options.conflict_every and (len(domains) == 1 or not (options.schedule in ("A", "B") or options.replay)):
        print("  --conflict-every is off: every step has a single domain, so no gradients conflict")
        options.conflict_every = 0
    is_clip = resolve_backbone(Network.of(options))[0] == "open_clip"
    for wrong, why in (
        (options.images and options.epochs, "--images and --epochs both set the length of training: give one of them"),
        (options.model and options.backbone, "--backbone and --model both name the network: give one of them"),
        (options.head_init.startswith("text") and (not is_clip or options.embed_dim),
         "--head-init text needs CLIP's text tower and its own width: only CLIP models, no --embed-dim"),
        (options.head_init == "text-frozen" and "object" not in domains,
         "--head-init text-frozen freezes the object classes, but object is not among --domains"),
        (options.degrade and options.cache != "none",
         "--degrade changes the images in every pass, but --cache stores them once: give one of them"),
        (options.cache == "gpu" and pick_device(options.device).type != "cuda",
         "--cache gpu needs a CUDA device: use --cache ram"),
        (options.coupling == "pcgrad" and options.schedule != "A",
         "--coupling pcgrad needs one backward pass per domain: use --schedule A"),
        (options.shard_head and options.negatives == "all",
         "--shard-head slices each domain separately: it excludes --negatives all"),
        (options.retain and (options.coupling == "pcgrad" or options.conflict_every),
         "--retain excludes --coupling pcgrad and --conflict-every: give one of them"),
        (options.retain and options.retain.l2sp and options.lora,
         "--retain l2sp acts on the network's weights, which --lora freezes: use features=W"),
        (options.degrade and "face_lq" not in domains, "--degrade acts on face_lq, which is not among --domains"),
        (isinstance(options.mix, float) and options.mix > 1, "--mix: one number is a temperature: want 0 to 1"),
        ("size" in typed and not options.backbone, "--size is a size of --backbone: leave it out"),
        ("mix" in typed and options.schedule != "B",
         "--mix sets the shares of schedule B; others have equal shares: leave it out"),
        ("mix_ramp" in typed and options.schedule != "B", "--mix-ramp changes the shares of schedule B: leave it out"),
        ("replay" in typed and options.schedule != "sequential",
         "--replay mixes the batches of --schedule sequential: leave it out"),
        ("splits" in typed and not options.eval_every, "--splits chooses the splits of --eval-every: leave it out"),
    ):
        if wrong:
            raise InputError(why)
    if options.head_init == "text" and "object" not in domains:
        print("  --head-init text: no object among --domains; class weights start at class means")
        options.head_init = "means"
    if not options.out:
        names = "all" if len(domains) == len(DOMAINS) else "+".join(domains)
        options.out = f"runs/{Network.of(options).name}-{options.schedule}-{names}-s{options.seed}"


# ---------------------------------------------------------------- schedule: images of each domain in each batch


def shares_at(progress: float, shares: np.ndarray, ramp: tuple[int, float, float, float] | None) -> np.ndarray:
    """Shares [K] of schedule B after `progress` of training; ramp: domain number, first and last share, fraction."""
    if ramp is None:
        return shares
    k, first, last, fraction = ramp
    ramped = first + (last - first) * min(progress / fraction, 1.0)
    others = np.where(np.arange(len(shares)) == k, 0.0, shares)
    mixed = others / others.sum() * (1.0 - ramped)  # rescaled, so that all shares sum to 1
    mixed[k] = ramped
    return mixed


def blend_counts(shares: Iterable[np.ndarray], batch: int) -> np.ndarray:
    """Images per batch and domain [batches, K]. Remainders carry over, so that the long-run shares are exact."""
    counts, credit = [], 0.0
    for share in shares:
        credit = credit + batch * share
        images = np.floor(np.maximum(credit, 0.0)).astype(np.int64)
        while (missing := batch - images.sum()) != 0:
            # while a ramp changes a share by less than one image per batch, the floors can sum to one image too many
            k = np.argmax(credit - images) if missing > 0 else np.argmin(np.where(images > 0, credit - images, np.inf))
            images[k] += np.sign(missing)
        credit = credit - images
        counts.append(images)
    return np.array(counts)


def plan_batches(options: Options, splits: list[Split]) -> np.ndarray:
    """Images of each domain in each batch of the run: int64 [steps, batches per step, K]."""
    K, sizes = len(splits), np.array([len(split) for split in splits], dtype=float)
    batches_per_step = K if options.schedule == "A" else 1
    batch = options.batch // batches_per_step
    if options.batch % batches_per_step:
        raise InputError(f"--batch {options.batch} cannot be divided among {K} domains by schedule {options.schedule}: "
                         f"use {max(batch, 1) * K}")
    shares, ramp = blend_shares(options, sizes) if options.schedule == "B" else (np.full(K, 1.0 / K), None)
    largest = int(np.where(shares > 0, sizes, 0).argmax())
    images = options.images or (options.epochs or 10.0) * sizes[largest] / shares[largest]
    steps = max(round(images / options.batch), 1)
    if steps > MOST_STEPS:
        raise InputError(f"a run of {steps:,} steps: at most {MOST_STEPS:,} are possible: raise --batch, or lower "
                         "--images or --epochs")
    if options.schedule == "B":
        plan = blend_counts((shares_at(s / steps, shares, ramp) for s in range(steps)), batch)
    elif options.schedule == "sequential":
        order = [options.trained.index(name) for name in options.domains or DOMAINS]
        plan = blend_counts((stage_shares(order[: s * K // steps + 1], K, options.replay) for s in range(steps)), batch)
    else:  # A and alternate: one domain per batch, in turn
        plan = batch * np.eye(K, dtype=np.int64)[np.arange(steps * batches_per_step) % K]
    return plan.reshape(steps, batches_per_step, K)


def stage_shares(seen: list[int], K: int, replay: float) -> np.ndarray:
    """Shares [K] in a stage of `sequential`: --replay is divided among earlier domains; the last has the rest."""
    *earlier, current = seen
    shares = np.zeros(K)
    shares[earlier] = replay / max(len(earlier), 1)
    shares[current] = 1 - shares.sum()
    return shares


def blend_shares(options: Options, sizes: np.ndarray) -> tuple[np.ndarray, tuple[int, float, float, float] | None]:
    """Shares [K] of --mix, and the --mix-ramp as `shares_at` takes it."""
    shares, ramp = np.array(options.per_domain("mix")) if isinstance(options.mix, dict) else sizes**options.mix, None
    if shares.sum() <= 0:
        raise InputError("--mix: at least one share must be above 0")
    shares = shares / shares.sum()
    if options.mix_ramp:
        if options.mix_ramp.domain not in options.trained:
            raise InputError(f"--mix-ramp: {options.mix_ramp.domain} is not among --domains")
        ramp = (options.trained.index(options.mix_ramp.domain), *options.mix_ramp[1:])
        if shares.sum() - shares[ramp[0]] <= 0:
            raise InputError("--mix-ramp needs another domain with a share above 0")
    for end in (0.0, 1.0):
        for name, share in zip(options.trained, shares_at(end, shares, ramp), strict=True):
            if share and options.batch * share < 1:
                raise InputError(f"--batch {options.batch} gives {name} {options.batch * share:.2f} images: "
                                 f"raise --batch to {math.ceil(1 / share)} or set its share with --mix")
    return shares, ramp


def ramp_up(progress: float, fraction: float) -> float:
    """Linear from 0 to 1 over the first `fraction` of training (0: no ramp)."""
    return min(progress / fraction, 1.0) if fraction > 0 else 1.0


def rate(step: int, steps: int, warmup: float, stages: int = 1) -> float:
    """Factor on every learning rate: in each stage, linear warm-up over a fraction of it, then a cosine to MIN_RATE."""
    step -= math.ceil(min(step * stages // steps, stages - 1) * steps / stages)  # counted from the start of its stage
    steps /= stages
    falling = MIN_RATE + (1 - MIN_RATE) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
    return min((step + 1) / max(warmup * steps, 1.0), 1.0) * falling


# ---------------------------------------------------------------- model and optimiser


def make_optimizer(model: Backbone, head: MarginHead, options: Options) -> LayerwiseAdamW:
    """AdamW with layer-wise learning rates lr * decay^(distance from the top) and no weight decay on vectors.

    The learning rate of a group is its `scale` times `rate` of the step; the class weights are the last group.
    """
    layers = model.layers()
    deepest, groups = max(layers.values()), {}
    skip = {f"net.{name}" for name in getattr(model.net, "no_weight_decay", set)()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim < 2 or name in skip else options.weight_decay
            scale = options.lr * options.layer_decay ** (deepest - layers[name])
            groups.setdefault((scale, decay), []).append(parameter)
    parameters = [{"params": p, "weight_decay": decay, "scale": scale} for (scale, decay), p in groups.items()]
    # cosines ignore the norm of a class weight: decaying it would only raise its effective learning rate
    parameters.append({"params": [head.weight], "weight_decay": 0.0, "scale": options.head_lr})
    return LayerwiseAdamW(parameters, lr=options.lr, betas=(0.9, 0.999), fused=True)


def build_model(options: Options, device: torch.device) -> Backbone:
    """The backbone on its device, with LoRA, drop path and gradient checkpointing as the options say."""
    model = load_backbone(Network.of(options))
    if options.drop_path:
        add_drop_path(model, options.drop_path)
    if options.lora:
        add_low_rank(model, options.lora)
    if options.grad_checkpointing:
        try:
            model.net.set_grad_checkpointing(True)
        except AssertionError as error:  # timm: not supported
            raise InputError(f"--grad-checkpointing: {model.name} does not support it: leave it out") from error
    return model.to(device, memory_format=torch.channels_last)


def head_settings(options: Options, splits: list[Split]) -> HeadSettings:
    share = options.sample_classes
    shares = options.per_domain("sample_classes") if isinstance(share, dict) else \
        [share if len(split.classes) >= MANY_CLASSES else 1.0 for split in splits]
    coupling = "sample" if options.coupling == "sample" else "domain"
    return HeadSettings(options.per_domain("loss"), shares, coupling, options.negatives,
                        options.head_init == "text-frozen", options.seed)


# ---------------------------------------------------------------- the run


@dataclass
class Job:
    """The state of a run: everything that its steps read and change."""

    options: Options
    folder: Path
    device: torch.device
    ranks: Ranks
    splits: list[Split]  # of training, one per domain
    plan: np.ndarray  # int64 [steps, batches per step, K]: images of each domain
    counts: Tensor  # int64 [steps, K] on the device: images of each domain in each step
    model: Backbone
    head: MarginHead
    optimizer: LayerwiseAdamW
    health: Tensor  # int64 [2] on the device: number of non-finite steps, and length of the current streak of them
    tally: Tally = field(default_factory=Tally)
    average: RunningAverage | None = None  # --ema, of `parameters`
    hook: Any = None  # takes over the backward passes of some steps, e.g. tools.conflicts.DomainGradients
    fixed: list[Split] = field(default_factory=list)  # test splits of --eval-every
    first: int = 0  # step at which this process starts
    saved: int | None = None  # the step that the checkpoint in `last` starts from
    board: Any = None  # TensorBoard's writer, on the first rank
    begun: float = field(default_factory=time.monotonic)  # monotonic time from which `tally.seconds` counts

    @property
    def steps(self) -> int:
        return len(self.plan)

    def rate(self, step: int) -> float:
        stages = len(self.splits) if self.options.schedule == "sequential" else 1
        return rate(step, self.steps, self.options.warmup, stages)

    @property
    def bf16(self) -> bool:
        return uses_bf16(self.options.precision, self.device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters; the class weights come last."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


# ---------------------------------------------------------------- the step


def take_step(job: Job, forward: nn.Module, batches: Iterable[tuple], step: int, passes: int) -> dict[str, Tensor]:
    """One optimiser step: gradients of its micro-batches, clipping, update. No host synchronisation.

    Args:
        forward: images [B, 3, S, S] -> embeddings [B, D].
        batches: (images, labels [B], domains [B]); any partition of the step gives the same gradients to rounding.
        passes: number of batches; gradients are summed over the ranks in the last one.

    Returns:
        The sums of `add_to_totals`, grad_norm, and finite (0 where the step was skipped).
    """
    options, head, ranks = job.options, job.head, job.ranks
    set_rates_and_seed(job, step)
    margin = ramp_up(step / job.steps, options.margin_ramp)
    tune_backbone = step >= round(options.head_warmup * job.steps)  # before that, class weights only
    hook = job.hook if job.hook and tune_backbone and job.hook.acts(step) else None
    total = empty_totals(len(job.splits), job.model.dim, job.device)
    if hook:
        hook.begin()
    with head.drawn(job.optimizer):
        for number, (images, labels, domains) in enumerate(batches):
            sum_over_ranks = number == passes - 1 and not (hook and hook.sums_ranks)
            with contextlib.nullcontext() if sum_over_ranks or ranks.world == 1 or not tune_backbone else \
                    forward.no_sync():
                with torch.set_grad_enabled(tune_backbone):
                    x = forward(images)
                result = head(x, labels, domains, job.counts[step], margin)
                if hook:
                    present = np.flatnonzero(job.plan[step][number * len(job.plan[step]) // passes]).tolist()
                    hook.backward(result, images, (x, labels, domains, job.counts[step], margin), present)
                else:
                    result.loss.backward()
            add_to_totals(total, x, result, labels, domains)
        head.finish_gradient()
        if hook:
            hook.finish(step)
        total["grad_norm"] = gradient_norm(job)
        nn.utils.clip_grads_with_norm_(job.parameters, CLIP, total["grad_norm"])
        total["finite"] = update(job, total["grad_norm"])
        job.optimizer.zero_grad(set_to_none=True)
    if job.average:
        job.average.update(step + 1 - job.health[0], total["finite"])
    head.learn_lengths(total["norms"], total["finite"])
    return total


def set_rates_and_seed(job: Job, step: int) -> None:
    """Set learning rates and seed: dropped paths depend on (seed, step, rank) alone, so resuming needs no state."""
    key = int(np.random.SeedSequence((job.options.seed, step, job.ranks.rank)).generate_state(1)[0])
    torch.default_generator.manual_seed(key)  # torch.manual_seed formats a stack trace per absent GPU backend
    if job.device.type == "cuda":
        torch.cuda.manual_seed(key)
    factor = job.rate(step)
    for group in job.optimizer.param_groups:
        group["lr"] = factor * group["scale"]


def gradient_norm(job: Job) -> Tensor:
    """L2 norm of the gradient of the backbone and the whole head, the same on every rank."""
    square = job.head.squared_gradient()
    gradients = [p.grad for p in job.parameters[:-1] if p.grad is not None]
    return (nn.utils.get_total_norm(gradients).to(square) ** 2 + square).sqrt() if gradients else square.sqrt()


@torch.no_grad()
def update(job: Job, norm: Tensor) -> Tensor:
    """Take the optimiser step if the gradient is finite, decided on the device; returns 1 if taken, else 0."""
    finite = torch.isfinite(norm)
    job.optimizer.found_inf = (~finite).float()
    job.optimizer.step()
    job.health[0] += ~finite
    job.health[1] = (job.health[1] + 1) * ~finite
    return finite.float()


# ---------------------------------------------------------------- the loop


def run_steps(job: Job) -> int:
    """The training loop; returns the exit code."""
    options, steps, tally, ranks = job.options, job.steps, job.tally, job.ranks
    feed = make_feed(job)
    if ranks.rank == 0:
        job.board = open_board(job, feed)
    if job.fixed and not job.first:
        look_at_fixed_images(job, 0)
    stop, window, ending = runs.StopRequest(job.folder, ranks), [], False

    forward = make_forward(job).train()
    feed.start(job.first)
    tally.logged = time.monotonic() - job.begun
    bar = progress(range(job.first, steps), initial=job.first, total=steps, unit="step", desc="train",
                   disable=ranks.rank > 0)
    for step in bar:
        window.append(take_step(job, forward, feed.next_step(), step, feed.passes))
        tally.seconds, done = time.monotonic() - job.begun, step + 1
        ending = ranks.any(bool(stop)) and done < steps
        saving = ending or done % options.save_every == 0 or done == steps
        if done % options.log_every == 0 or saving:  # at checkpoints, so that a resumed run averages alike
            record = write_line(job, window, done, rates_of(job, step), feed.bad)
            check_health(job, done)
            bar.set_postfix(loss=f"{record.get('loss', math.nan):.3f}", img_s=f"{record['images_per_second']:.0f}")
            window, feed.bad = [], 0
        if job.fixed and (done % options.eval_every == 0 or done == steps):
            look_at_fixed_images(job, done)
            forward.train()
        keeping = options.keep and (done % (options.eval_every or options.save_every) == 0 or done == steps)
        if (keeping or saving) and not job.health[1]:  # never within a streak of non-finite steps
            if keeping:
                runs.keep_checkpoint(job, done, export_weights)
            if saving:
                save_checkpoint(job, done)
        if ending:
            print(f"stopped by {stop.reason or 'another process'} after step {done} of {steps}; continue with --resume")
            break
    if job.board:
        with writing(job.folder / "tensorboard"):
            job.board.close()
    if ending:
        return runs.STOPPED
    tally.seconds = time.monotonic() - job.begun
    if ranks.rank == 0:
        write_report(job)
        write_json(job.folder / "done.json", {"steps": steps, "images": steps * options.batch, **vars(tally)})
    print(f"done: {job.folder} in {tally.seconds:.0f} s; next: python evaluate.py --run {job.folder}")
    ranks.wait()
    return 0


def rates_of(job: Job, step: int) -> dict:
    """Learning rates and margin of a step, for log.jsonl."""
    factor, options = job.rate(step), job.options
    return {"lr": factor * options.lr, "head_lr": factor * options.head_lr,
            "margin": ramp_up(step / job.steps, options.margin_ramp),
            "backbone": step >= round(options.head_warmup * job.steps)} | (job.hook.figures() if job.hook else {})


def make_forward(job: Job) -> nn.Module:
    """The backbone in the precision of the run, compiled (--compile) and replicated over the ranks."""
    forward = AutocastModel(job.model, job.bf16, job.device)
    if job.ranks.world > 1:
        # DDP would wait for parameters that never receive a gradient
        images = torch.zeros(1, 3, *[job.model.image_size] * 2, device=job.device)
        forward(images).sum().backward()
        for parameter in job.model.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        job.optimizer.zero_grad(set_to_none=True)
    if job.options.compile:
        if job.hook:
            torch._functorch.config.donated_buffer = False  # the hook retains the graph
        forward.compile(dynamic=False)  # only the last micro-batch may be smaller
    if job.ranks.world > 1:
        forward = nn.parallel.DistributedDataParallel(
            forward, device_ids=[job.device] if job.device.type == "cuda" else None, broadcast_buffers=False)
    return forward


# ---------------------------------------------------------------- input


def make_feed(job: Job) -> Feed:
    """The micro-batches of the run, for this rank."""
    options, cache, readable, severity = job.options, None, None, None
    if options.cache != "none":
        place = job.device if options.cache == "gpu" else torch.device("cpu")
        parts = [decode_split(split, place, options.workers, bool(job.ranks.rank)) for split in job.splits]
        cache, readable = [bank for bank, _ in parts], [good for _, good in parts]
    if options.degrade:
        progress = np.repeat(np.arange(job.steps) / job.steps, job.plan.shape[1])
        severity = options.degrade[0] * np.array([ramp_up(p, options.degrade[1]) for p in progress])
    stream = Stream(job.splits, job.plan.reshape(-1, len(job.splits)), seed=options.seed, severity=severity,
                    micro_batch=options.micro_batch, crop=options.per_domain("crop_scale"), readable=readable,
                    erase=options.per_domain("erase"), rank=job.ranks.rank, world=job.ranks.world)
    return Feed(stream, job.plan.shape[1], job.model.look, job.device, bf16=job.bf16, workers=options.workers,
                cache=cache, draw=job.head.draw_classes if job.head.samples_classes else None)


# ---------------------------------------------------------------- quick evaluation


def probe_splits(options: Options) -> list[Split]:
    """The test splits of --eval-every: --splits, else one per domain and one out of distribution."""
    root = open_root(Path(options.data), DOMAINS if options.splits else options.trained)
    if options.splits:
        return named_splits(root, options.splits, options.data)
    chosen, others = [], {domain: list(root.get(domain, {}).values()) for domain in options.trained}
    for domain, splits in others.items():
        chosen += (tests := ordered_tests(splits)[:1])
        if not tests:
            print(f"  --eval-every leaves out {domain}, which has no test split (--part test prepares one)")
    chosen += ordered_tests(others.get("object", []), ood=True)[:1]
    names = ", ".join(f"{split.domain}/{split.name}" for split in chosen)
    print(f"  --eval-every evaluates {names or 'nothing'} (--splits chooses)")
    return chosen


def probe(job: Job, count: int = 2000) -> dict[str, float]:
    """Same/different AUC of `count` fixed images of each test split, on as many genuine as impostor pairs."""
    from sklearn.metrics import roc_auc_score

    scores = {}
    for split in job.fixed:
        rows = np.flatnonzero(split.labels >= 0)
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:count])
        if not len(rows):
            continue
        parts = list(embed_rows(job.model, split, rows, job.device, job.options.micro_batch or 64, job.options.workers))
        used, x = np.concatenate([r for r, _ in parts]), F.normalize(torch.cat([x for _, x in parts]), dim=1)
        finite = x.isfinite().all(1)  # a run that diverges is ended by its losses
        used, x = used[finite.cpu().numpy()], x[finite]
        pairs = matched_pairs(split.labels[used], 5000, seed=0)
        if len(pairs):
            same, score = np.arange(len(pairs)) < len(pairs) // 2, (x[pairs[:, 0]] * x[pairs[:, 1]]).sum(1)
            scores[f"{split.domain}/{split.name}"] = float(roc_auc_score(same, score.cpu().numpy()))
    return scores


def look_at_fixed_images(job: Job, step: int) -> None:
    """Quick evaluation: append the AUCs to probe.jsonl, and warn if one is more than 0.01 below its initial value."""
    if job.ranks.rank == 0:
        job.model.eval()
        with averaged(job):
            scores = probe(job)
        job.model.train()
        append(job.folder / "probe.jsonl", {"step": step, "auc": scores})
        start = job.tally.start = job.tally.start or scores
        with writing(job.folder / "tensorboard"):
            for name, score in scores.items():
                job.board.add_scalar(f"auc/{name}", score, step)
        for name, score in scores.items():
            if score < start.get(name, 0) - 0.01:
                tqdm.write(f"WARNING: step {step}: {name} has fallen below its start: same/different AUC {score:.3f}, "
                           f"initially {start[name]:.3f}", file=sys.stderr)
    job.ranks.wait()


# ---------------------------------------------------------------- checkpoint and resume


def averaged(job: Job) -> contextlib.AbstractContextManager:
    """With --ema, a context in which the parameters are replaced by their running averages."""
    return job.average.swapped_in() if job.average else contextlib.nullcontext()


def export_weights(job: Job, folder: Path) -> None:
    """Write the weights of the run (with --ema, their running averages)."""
    with averaged(job):
        head = job.head.whole(job.head.weight.detach())
        if job.ranks.rank == 0:
            runs.save_weights(folder, job.model, head, {split.domain: split.classes for split in job.splits})


def save_checkpoint(job: Job, step: int) -> None:
    """Write the weights, then last/state.pt: the state before step `step`, for any number of ranks.

    In this order, a run killed between the two repeats the steps since the previous state, then writes both.
    """
    head, optimizer = job.head, job.optimizer.state_dict()
    last = max(optimizer["state"], default=None)  # the class weights: last group, last number
    if last is not None:
        optimizer["state"][last] = {key: head.whole(v) if v.ndim else v for key, v in optimizer["state"][last].items()}
    whole, average = head.whole(head.weight.detach()), job.average and job.average.values
    average = average and [*average[:-1], head.whole(average[-1])]
    export_weights(job, job.folder)
    if job.ranks.rank == 0:
        (job.folder / "last").mkdir(exist_ok=True)
        state = {"step": step, "model": job.model.state_dict(), "head": whole, "optimizer": optimizer,
                 "tally": vars(job.tally), "health": job.health, "ema": average, "norms": head.statistics}
        write_atomically(job.folder / "last" / "state.pt", lambda path: torch.save(state, path))
    job.saved = step
    job.ranks.wait()


def load_checkpoint(job: Job) -> None:
    """Restore the state that `save_checkpoint` wrote."""
    head, average, state = job.head, job.average, runs.read_state(job)
    job.model.load_state_dict(state["model"])
    head.set_whole(state["head"])
    if moments := state["optimizer"]["state"]:
        last = max(moments)
        moments[last] = {key: head.part_of(v) if v.ndim else v for key, v in moments[last].items()}
    # the groups follow from the options, which --resume requires to be unchanged
    job.optimizer.load_state_dict(job.optimizer.state_dict() | {"state": moments})
    if average:
        for value, saved in zip(average.values, [*state["ema"][:-1], head.part_of(state["ema"][-1])], strict=True):
            value.copy_(saved)
    job.health.copy_(state["health"])
    if head.statistics is not None:
        head.statistics.copy_(state["norms"])
    vars(job.tally).update({key: state["tally"][key] for key in vars(job.tally) if key in state["tally"]})
    job.first = job.saved = state["step"]
    job.begun -= job.tally.seconds


# ---------------------------------------------------------------- setting up a run


def set_up(options: Options, recipe: dict[str, float]) -> Job | None:
    """Build the run that the options describe, or continue it; None if it is complete. Checks come first."""
    begun, splits = time.monotonic(), open_training(options.data, options.trained)
    plan, folder, texts = plan_batches(options, splits), Path(options.out), as_texts(options)
    if (context := click.get_current_context(silent=True)) and not int(os.environ.get("RANK", 0)):
        context.with_resource(lock_folder(folder, "--out"))
    state = runs.find_run(folder, texts, splits)
    if state == "complete":
        print(f"{folder} is complete")
        return None
    ranks, device = join_ranks(options.device)
    if ranks.rank == 0 and (folder / "STOP").exists():  # left by an earlier start
        (folder / "STOP").unlink()
    if plan[0][0].sum() < ranks.world:
        raise InputError(f"batches of {plan[0][0].sum()} images cannot be divided among {ranks.world} processes: raise "
                         "--batch or start fewer")
    if device.index:
        torch.cuda.set_device(device)  # kernels and generators use the current device
    torch.set_float32_matmul_precision("high")
    settings = head_settings(options, splits)
    describe_run(options, recipe, splits, plan, settings.class_share, MIN_RATE)
    fixed = probe_splits(options) if options.eval_every else []
    model = build_model(options, device)
    check_memory(options, splits, model.image_size, device, ranks)
    for split in splits:
        if model.image_size > split.size:
            print(f"  {split.domain}/{split.name}: images of {split.size} px are enlarged to {model.image_size} px")
    if options.shard_head and ranks.world == 1:
        print("  --shard-head: one process holds all class weights")
    if state == "nothing" and ranks.rank == 0:
        make_folder(folder, "--out")
        counts = dict(zip(options.trained, plan.sum((0, 1)).tolist(), strict=True))
        runs.write_config(folder, texts, splits, len(plan), counts, recipe)
    head = MarginHead([len(split.classes) for split in splits], model.dim, settings, ranks=ranks,
                      shard=options.shard_head, device=device)
    job = Job(options, folder, device, ranks, splits, plan, torch.from_numpy(plan.sum(1)).to(device), model, head,
              make_optimizer(model, head, options), torch.zeros(2, dtype=torch.int64, device=device), fixed=fixed,
              begun=begun)
    return start_or_resume(job)


def check_memory(options: Options, splits: list[Split], image_size: int, device: torch.device, ranks: Ranks) -> None:
    """Refuse a batch or --cache that does not fit in memory; reduce the number of loader processes to what fits."""
    images = min(options.micro_batch or options.batch, -(-options.batch // ranks.world))
    if why := batch_too_large(splits, images, image_size):
        raise InputError(f"--batch {options.batch}: {why}: lower --micro-batch or --batch")
    pixels = max(split.size for split in splits) ** 2 if device.type == "cuda" else 4 * image_size**2
    options.workers = enough_loaders(options.workers, images * 3 * pixels)
    if options.cache != "none":
        why = too_large(splits, device if options.cache == "gpu" else torch.device("cpu"))
        if ranks.any(bool(why)):  # collective: every rank must call it
            raise InputError(f"--cache {options.cache}: {why or 'another process has too little memory'}: leave "
                             "--cache out, or prepare smaller images (--size)")


def start_or_resume(job: Job) -> Job:
    """Load the last checkpoint, or initialise the class weights by --head-init."""
    options, head, folder = job.options, job.head, job.folder
    if options.ema:
        job.average = RunningAverage(job.parameters, options.ema)
    if options.retain:
        job.hook = Retention(job.model, options.retain, job.bf16, job.ranks.world)
    elif options.coupling == "pcgrad" or options.conflict_every:
        from tools.conflicts import DomainGradients
        job.hook = DomainGradients(job.model, head, options.trained, folder, pcgrad=options.coupling == "pcgrad",
                                   every=options.conflict_every, seed=options.seed)
    if (folder / "last" / "state.pt").exists():
        load_checkpoint(job)
    else:
        head.set_whole(starting_weights(
            job.model, job.splits, options.head_init, seed=options.seed, batch=options.micro_batch or 64,
            workers=options.workers, ranks=job.ranks, device="cpu" if head.sharded else job.device))
        if job.average:
            job.average.values[-1].copy_(head.weight.data)
    if job.ranks.rank == 0:
        runs.forget_after(folder, job.first or -1)  # -1: no checkpoint yet, drop all
    return job


def open_board(job: Job, feed: Feed) -> Any:
    """TensorBoard's writer; a new run also draws samples.png."""
    from torch.utils.tensorboard import SummaryWriter

    if not job.first:
        draw_samples(job.folder / "samples.png", feed)
    path = job.folder / "tensorboard"
    with writing(path), writing(path, "the path is not UTF-8: PYTHONUTF8=1, or rename it", errors=UnicodeEncodeError):
        return SummaryWriter(str(path), purge_step=job.first)


# ---------------------------------------------------------------- command line

CONFIG = click.option("--config", is_eager=True, expose_value=False, callback=replay_config, metavar="FILE",
                      help="Replay a run's config.json; options given here override it.")
DEBUG = click.option("--debug", is_flag=True, expose_value=False, hidden=True,
                     help="Show the traceback of an input error.")


@click.group(cls=GroupedHelp, invoke_without_command=True, help=__doc__.split("\n\n")[0],
             context_settings={"show_default": True, "max_content_width": 120})
@CONFIG
@add_options(Options)
@DEBUG
@click.pass_context
def main(context: click.Context, **values) -> int | None:
    if context.invoked_subcommand:
        refuse_options(context)
        return None
    options, recipe = settle_options(context, values)
    try:
        job = set_up(options, recipe)
        code = run_steps(job) if job else 0
    except torch.OutOfMemoryError as error:
        raise InputError(f"the GPU's memory is full ({str(error).partition('. ')[0]}): lower --micro-batch, or add "
                         "--grad-checkpointing; continue with --resume") from error
    if job and job.ranks.world > 1:
        context.close()  # releases the lock
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # gloo's threads sometimes abort an interpreter that shuts down
    return code


@main.command(help="""Time a training step and its parts: real data, one batch on the device, the bare backbone.
Takes the options of training.""")
@CONFIG
@add_options(Options, leave_out=("out", "resume", "epochs", "images"))
@click.option("--rounds", type=click.IntRange(1), default=4, help="Rounds; each kind of step is timed in every round.")
@click.option("--count", type=click.IntRange(1), default=8, help="Steps per kind and round.")
@click.option("--json", "path", type=click.Path(path_type=Path), metavar="FILE", help="File for the result, as JSON.")
@DEBUG
@click.pass_context
def bench(context: click.Context, rounds: int, count: int, path: Path | None, **values) -> int:
    from tools.bench_train import bench_run
    options, _ = settle_options(context, {"out": None, "resume": False, "epochs": None, "images": None} | values)
    return bench_run(sys.modules[__name__], options, rounds, count, path)


@main.command(help="Export a run's model as weights for timm or open_clip, or as an ONNX graph, with a model card.")
@click.option("--run", metavar="RUN", required=True, help="Folder of a finished run.")
@click.option("--to", type=click.Choice(["safetensors", "onnx"]), required=True, help="File format.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE",
              help="File to write; the card is written beside it (default: RUN/export/NAME.FORMAT).")
@click.option("--tolerance", type=Number(0), default=1e-4,
              help="Largest accepted difference in a component of a unit embedding; above it, exit code 1.")
@click.option("--wise-ft", type=Number(0, 1), default=1.0, metavar="ALPHA",
              help="Interpolate: ALPHA x fine-tuned + (1 - ALPHA) x untouched weights; 1: fine-tuned only.")
@click.option("--allow-partial", is_flag=True, help="Accept an unfinished run.")
@DEBUG
def export(run: str, to: str, out: Path | None, tolerance: float, wise_ft: float, allow_partial: bool) -> int:
    from tools.export import export_run
    return export_run(runs.load_run(Path(run), allow_partial), to, out, tolerance, wise_ft)


if __name__ == "__main__":
    run_command(main)
