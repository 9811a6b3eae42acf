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
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import train_report
from backbones import Backbone, choose_trained, load_backbone, resolve_backbone
from data_prep import DOMAINS, InputError, Number, progress, run_command
from data_prep.shards import Split, lock_folder, named_splits, open_root, ordered_tests
from data_prep.stream import Batches
from kernels.margin_loss import margin_loss
from run_folder import (
    RUN_ROLES,
    STOPPED,
    StopRequest,
    append,
    averaged,
    find_run,
    forget_after,
    keep_checkpoint,
    load_checkpoint,
    load_run,
    make_folder,
    provenance,
    save_checkpoint,
    write_json,
    writing,
)
from train_coupling import add_gradients, couple
from train_input import check_cache, check_memory, load, load_steps, make_stream, receive
from train_options import (
    MANY_CLASSES,
    MARGINS,
    check_options,
    class_shares,
    describe_losses,
    per_domain,
    refuse_options,
    run_options,
    settle_options,
)
from train_ranks import GatherSamples, Ranks, gather_rows, head_slices, join_ranks, pick_device
from train_schedule import make_schedule, parse_shares, plan_batches, ramp, rate

MOST_STEPS = 10_000_000  # of a run, which is planned whole: beyond it the plan alone takes gigabytes

# ---------------------------------------------------------------- loss and optimiser


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
                     "shard": shard if sharded else None}


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
    return {"sample_margin_angular": angular - additive * z, "sample_margin_additive": additive + additive * z}


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
            values = {} if norms is None else adaptive_margins(
                lengths_of(own), options["margin_angular"][of], options["margin_additive"][of], adaptive[of], norms[of])
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


def gradient_norm(parameters: list[nn.Parameter], head: nn.Parameter, sharded: bool, ranks: Ranks) -> torch.Tensor:
    """Length of the gradient of the backbone and of the whole head, the same on every rank."""
    own = head.grad.square().sum()
    if sharded:
        ranks.sum(own)
    gradients = [p.grad for p in parameters if p.grad is not None and p is not head]
    return (nn.utils.get_total_norm(gradients).to(own) ** 2 + own).sqrt() if gradients else own.sqrt()


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


# ---------------------------------------------------------------- embeddings, and the class weights to start from


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
    """What --eval-every looks at: the test splits of --splits, else one a domain and one out of distribution."""
    root = open_root(Path(config["data"]), DOMAINS if config["splits"] else config["domains"])
    if config["splits"]:
        return named_splits(root, config["splits"], config["data"])
    chosen, others = [], {domain: list(root.get(domain, {}).values()) for domain in config["domains"]}
    for domain, splits in others.items():
        chosen += (tests := ordered_tests(splits)[:1])
        if not tests:
            print(f"  --eval-every: {domain} has no test split (--part test prepares one), so it is not looked at")
    chosen += ordered_tests(others.get("object", []), ood=True)[:1]
    names = ", ".join(f"{split.domain}/{split.name}" for split in chosen)
    print(f"  --eval-every looks at {names or 'nothing'} (--splits chooses)")
    return chosen


def probe(job: "Job", splits: list[Split], count: int = 2000) -> dict[str, float]:
    """Same/different AUC of `count` fixed images of each split, on matched numbers of random pairs; chance is 0.5."""
    from sklearn.metrics import roc_auc_score

    scores = {}
    for split in splits:
        rows = np.flatnonzero(split.labels >= 0)
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:count])
        if not len(rows):
            continue
        parts = list(embed_rows(job.model, split, rows, job.device, job.config["micro_batch"] or 64,
                                job.config["workers"]))
        used, x = np.concatenate([r for r, _ in parts]), F.normalize(torch.cat([x for _, x in parts]), dim=1)
        pairs = matched_pairs(split.labels[used], 5000, seed=0)
        if len(pairs):
            same, score = np.arange(len(pairs)) < len(pairs) // 2, (x[pairs[:, 0]] * x[pairs[:, 1]]).sum(1)
            scores[f"{split.domain}/{split.name}"] = float(roc_auc_score(same, score.cpu().numpy()))
    return scores


def init_head(model: Backbone, splits: list[Split], config: dict, device: torch.device,
              ranks: Ranks = Ranks(), rows: torch.Tensor | None = None) -> torch.Tensor:
    """Class weights [C, D] to start from: unit class means of the untouched backbone, prompts, or random.

    `rows`: these alone, this rank's part of a sharded head, which no GPU need hold whole.
    """
    place = device if rows is None else torch.device("cpu")
    if config["head_init"] == "random":
        generator = torch.Generator().manual_seed(config["seed"])
        count = sum(len(split.classes) for split in splits)
        whole = F.normalize(torch.randn(count, model.dim, generator=generator), dim=1)
        return (whole if rows is None else whole[rows.cpu()]).to(device)
    blocks = []
    for split in splits:
        if config["head_init"] == "text" and split.domain == "object":
            blocks.append(text_weights(model, config, split.names, device).to(place))
            continue
        order = np.argsort(split.labels, kind="stable")  # the first images of each class
        number = np.arange(len(order)) - np.searchsorted(split.labels[order], split.labels[order])
        own = np.sort(order[number < config["head_init_images"]])[ranks.rank :: ranks.world]
        total = torch.zeros(len(split.classes), model.dim, device=place)
        parts = embed_rows(model, split, own, device, config["micro_batch"] or 64, config["workers"])
        with progress(total=len(own), desc=f"class means {split.domain}", unit="img", disable=ranks.rank > 0) as bar:
            for used, x in parts:
                total.index_add_(0, torch.from_numpy(split.labels[used]).to(place), F.normalize(x, dim=1).to(place))
                bar.update(len(used))
        blocks.append(F.normalize(ranks.sum(total), dim=1))
    whole = torch.cat(blocks)
    return whole if rows is None else whole[rows.cpu()].to(device)


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


# ---------------------------------------------------------------- the job


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
        if len(split.classes) < 2:
            raise InputError(f"{split.folder}: one class, {split.classes[0][:60]!r}, has nothing to be told from: "
                             "prepare it again with --src the folder that holds the class folders")
        splits.append(split)
    return splits


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
    fixed: list[Split] = field(default_factory=list)  # what --eval-every looks at
    first: int = 0  # the next step
    saved: int | None = None  # the step that the checkpoint in `last` starts from
    begun: float = field(default_factory=time.monotonic)  # when the seconds of `tally` began
    bad: int = 0  # damaged images of this rank since the last log line

    @property
    def steps(self) -> int:
        return len(self.plan)

    @property
    def half(self) -> bool:
        """Whether the backbone computes in bfloat16 (--precision)."""
        precision, cuda = self.config["precision"], self.device.type == "cuda"
        # emulated, on cards before Ampere, it is slower than float32 and no more exact
        has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        return precision == "bf16" or (precision == "auto" and has_bf16)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained; the class weights come last."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def save(self, step: int) -> None:
        """Checkpoint: the state that step `step` starts from; not within a streak of steps that were not finite."""
        if not self.health[1]:
            save_checkpoint(self, step)


def set_up(config: dict) -> Job | None:
    """From options to a run that is ready to go; None: it is complete. Refuses before it builds anything."""
    begun = time.monotonic()
    check_options(config)
    splits = open_splits(config)
    schedule = make_schedule(config["schedule"], len(splits), config["batch"])
    shares, mix_ramp = parse_shares(config, splits)
    sizes = np.array([len(split) for split in splits])
    largest = int(np.where(shares > 0, sizes, 0).argmax())
    images = config["images"] or (config["epochs"] or 10.0) * sizes[largest] / shares[largest]
    steps = max(round(images / config["batch"]), 1)
    if steps > MOST_STEPS:
        raise InputError(f"a run of {steps:,} steps: at most {MOST_STEPS:,} are planned: raise --batch, or lower "
                         "--images or --epochs")
    plan, folder = plan_batches(config, schedule, steps, shares, mix_ramp), Path(config["out"])
    if (context := click.get_current_context(silent=True)) and not int(os.environ.get("RANK", 0)):
        context.with_resource(lock_folder(folder, "--out"))
    found = find_run(config, splits)
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
    fixed = probe_splits(config) if config["eval_every"] else []
    model = load_backbone(config)
    choose_trained(model, config)
    if config["grad_checkpointing"]:
        try:
            model.net.set_grad_checkpointing(True)
        except AssertionError as error:  # timm's way to say so
            raise InputError(f"--grad-checkpointing: {resolve_backbone(config)[1]} has none: leave it out") from error
    check_memory(config, splits, model.image_size, ranks.world)
    model = model.to(device, memory_format=torch.channels_last)
    for split in splits:
        if model.image_size > split.size:
            print(f"  {split.domain}/{split.name}: images of {split.size} px are enlarged to {model.image_size} px")
    if config["cache"] != "none":
        check_cache(config["cache"], splits, device, ranks)
    if found == "nothing" and ranks.rank == 0:
        role = RUN_ROLES[1 if len(splits) == 1 else 2 if config["schedule"] == "sequential" else 0]
        make_folder(folder, "--out")
        write_json(folder / "config.json",
                   config | {"role": role, "steps": steps, "counts": counts, **provenance(splits, config["weights"])})
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
              optimizer, tally, torch.zeros(2, dtype=torch.int64, device=device), fixed=fixed, begun=begun)
    if any(per_domain(config, "margin_adaptive")):
        job.norms = torch.zeros(len(splits), 3, dtype=torch.float64, device=device)
    if config["ema"]:
        job.ema = [p.detach().float().clone() for p in job.parameters]
    if (folder / "last" / "state.pt").exists():
        job.first = load_checkpoint(job)
        job.begun -= job.tally["seconds"]
    else:
        head.data.copy_(init_head(model, splits, config, device, ranks, rows))
        if job.ema is not None:
            job.ema[-1].copy_(head.data)
    if ranks.rank == 0:
        forget_after(folder, job.first or -1)  # -1: a run that was killed before its first checkpoint
    return job


# ---------------------------------------------------------------- the step


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
    try:
        yield
    finally:
        weight[rows] = job.head.data
        for key in [key for key, v in state.items() if v.ndim]:
            moments = whole[key] if key in whole else torch.zeros_like(weight)  # none before the first step
            moments[rows] = state[key]
            state[key] = moments
        job.head.data = weight


class Precise(nn.Module):
    """The model's forward pass in the precision of --precision, embeddings included: some networks end in float32."""

    def __init__(self, model: Backbone, half: bool, device: torch.device) -> None:
        super().__init__()
        self.model, self.half, self.device = model, half, device.type

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            x = self.model(images)
        return x.bfloat16() if self.half else x


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


# ---------------------------------------------------------------- the loop


def look_at_fixed_images(job: Job, board, step: int) -> None:
    """--eval-every: AUC of fixed images into probe.jsonl; a task that falls below its start is named."""
    if job.ranks.rank == 0:
        job.model.eval()
        with averaged(job):
            scores = probe(job, job.fixed)
        job.model.train()
        append(job.folder / "probe.jsonl", {"step": step, "auc": scores})
        start = job.tally.setdefault("start", scores)
        with writing(job.folder / "tensorboard"):
            for name, score in scores.items():
                board.add_scalar(f"auc/{name}", score, step)
        for name, score in scores.items():
            if score < start.get(name, 0) - 0.01:
                tqdm.write(f"WARNING: step {step}: {name} has fallen below its start: same/different AUC {score:.3f}, "
                           f"was {start[name]:.3f}", file=sys.stderr)
    job.ranks.wait()


def run_steps(job: Job) -> int:
    """The training loop; returns the exit code."""
    config, steps, tally, ranks = job.config, job.steps, job.tally, job.ranks
    stream = make_stream(job)
    passes = stream.per_batch * job.plan.shape[1]
    chunks = load_steps(job, stream, job.first * passes)
    board = None
    if ranks.rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        with writing(job.folder / "tensorboard"):
            board = SummaryWriter(str(job.folder / "tensorboard"), purge_step=job.first)
        if not job.first:
            train_report.draw_samples(job.folder / "samples.png", stream, job.model, job.cache)
    options = loss_options(config, [len(split.classes) for split in job.splits], job.device, ranks)
    if job.fixed and not job.first:
        look_at_fixed_images(job, board, 0)
    stop, window = StopRequest(job.folder, ranks), []
    forward, ending = make_forward(job), False

    forward.train()
    tally["logged"] = time.monotonic() - job.begun
    bar = progress(range(job.first, steps), initial=job.first, total=steps, unit="step", desc="train",
                   disable=ranks.rank > 0)
    for step in bar:
        batches, now = receive(job, chunks, step, options, passes)
        window.append(take_step(job, forward, batches, step, now, passes))
        tally["seconds"], done = time.monotonic() - job.begun, step + 1
        ending = ranks.any(bool(stop)) and done < steps
        saving = ending or done % config["save_every"] == 0 or done == steps
        if done % config["log_every"] == 0 or saving:  # so no line after a resume averages fewer steps than it would
            record = train_report.log_window(job, board, window, done)
            train_report.check_health(job, done)
            if "loss" in record:
                bar.set_postfix(loss=f"{record['loss']:.3f}", img_s=f"{record['images_per_second']:.0f}")
            window = []
        if job.fixed and (done % config["eval_every"] == 0 or done == steps):
            look_at_fixed_images(job, board, done)
            forward.train()
        if config["keep"] and (done % (config["eval_every"] or config["save_every"]) == 0 or done == steps):
            keep_checkpoint(job, done)
        if saving:
            job.save(done)
        if ending:
            print(f"stopped by {stop.reason or 'another process'} after step {done} of {steps}; continue with --resume")
            break
    if board:
        with writing(job.folder / "tensorboard"):
            board.close()
    if ending:
        return STOPPED
    if streak := int(job.health[1]):
        raise InputError(f"{job.folder}: the last {streak} steps were not finite, so the run is not done; "
                         f"{train_report.describe_saved(job)}: lower --lr or raise --warmup")
    tally["seconds"] = time.monotonic() - job.begun
    if ranks.rank == 0:
        train_report.write_report(job)
        write_json(job.folder / "done.json", {"steps": steps, "images": steps * config["batch"], **tally})
    print(f"done: {job.folder} in {tally['seconds']:.0f} s; next: python evaluate.py --run {job.folder}")
    ranks.wait()
    return 0


# ---------------------------------------------------------------- options


@click.group(invoke_without_command=True, context_settings={"show_default": True, "max_content_width": 120},
             help=__doc__.split("\n\n")[0])
@run_options
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
        context.close()  # its lock
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
