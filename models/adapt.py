"""Training of a backbone: LoRA, stochastic depth, averaged weights (EMA), penalties on forgetting, bfloat16."""

import contextlib
import copy
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from data_prep import InputError, Parsed
from models.backbones import Backbone


class LowRank(nn.Module):
    """Low-rank update of a weight [out, in]: W + 16/√r · up @ down (rsLoRA), with up = 0 at the start.

    A torch parametrisation, because fused projections such as nn.MultiheadAttention's contain no Linear to wrap.

    Source: arXiv 2106.09685 (LoRA), 2312.03732 (the √r); alpha = 16 as in FRoundation.
    """

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.scale = 16 / math.sqrt(rank)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # the exported matrix is computed in fp32, too
            return weight + self.scale * (self.up @ self.down)


def add_low_rank(model: Backbone, rank: int) -> None:
    """Freeze the network and add low-rank updates to its query, key and value projections (--lora)."""
    projection = re.compile(r".*\.(in_proj_weight|(qkv|[qkv]_proj)\.weight)")
    names = [name for name, p in model.net.named_parameters() if p.requires_grad and projection.fullmatch(name)]
    model.net.requires_grad_(False)
    for name in names:
        path, _, weight = name.rpartition(".")
        module = model.net.get_submodule(path)
        nn.utils.parametrize.register_parametrization(module, weight, LowRank(getattr(module, weight), rank))
    if not names:
        raise InputError(f"--lora {rank}: this network has no attention projections; use a transformer")


def add_drop_path(model: Backbone, rate: float) -> None:
    """Stochastic depth (arXiv 1603.09382): the drop probability grows linearly from 0 to `rate` at the top block.

    open_clip has no such option; DropPath replaces its layer scale, which is the identity in the published models.
    """
    from timm.layers import DropPath

    tower = model.net.visual if model.library == "open_clip" else model.net
    names = ("drop_path", "drop_path1", "drop_path2", "ls_1", "ls_2")
    blocks = [(module, branches) for module in tower.modules() if (branches := [
        name for name in names if isinstance(getattr(module, name, None), nn.Identity | DropPath)])]
    if not blocks:
        raise InputError(f"--drop-path {rate:g}: this network has no residual branches to drop: leave it out")
    for (module, branches), probability in zip(blocks, np.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for name in branches:
            setattr(module, name, DropPath(probability))


class LayerwiseAdamW(torch.optim.AdamW):
    """torch's fused AdamW, bit-identical, in a third of its time on a CPU with dozens of layer-wise groups.

    The kernel takes one learning rate per call and is called per group; all else is done once for all groups.

    Attributes: found_inf, float32 scalar on the device: if 1, the step is skipped, without synchronisation.
    """

    found_inf: torch.Tensor

    @torch.no_grad()
    def step(self) -> None:
        """One update of the parameters that have a gradient."""
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for p in (p for _, parameters in groups for p in parameters if not self.state[p]):
            self.state[p].update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                                 exp_avg_sq=torch.zeros_like(p))
        columns = ("exp_avg", "exp_avg_sq", "step")
        states = [[[self.state[p][name] for p in parameters] for name in columns] for _, parameters in groups]
        counters = [step for *_, steps in states for step in steps]
        torch._foreach_add_(counters, 1)
        for (group, parameters), (first, second, steps) in zip(groups, states, strict=True):
            if parameters:
                torch._fused_adamw_(parameters, [p.grad for p in parameters], first, second, [], steps, lr=group["lr"],
                                    beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"], amsgrad=False,
                                    weight_decay=group["weight_decay"], maximize=False, found_inf=self.found_inf)
        torch._foreach_sub_(counters, [self.found_inf] * len(counters))


class RunningAverage:
    """Exponential moving average (EMA) of parameters with decay min(decay, (1 + t) / (10 + t)).

    Source of the warm-up: Karras et al., arXiv 2312.02696, and TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = [p.detach().float().clone() for p in parameters]

    @torch.no_grad()
    def update(self, t: torch.Tensor, taken: torch.Tensor) -> None:
        """After step t (from 1, skipped steps not counted); `taken`: 0 where this step was skipped."""
        rate = (1 - ((1 + t) / (10 + t)).clamp(max=self.decay)) * taken
        change = torch._foreach_sub([p.detach() for p in self.parameters], self.values)
        torch._foreach_mul_(change, rate.to(change[0].dtype))
        torch._foreach_add_(self.values, change)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """A context in which the parameters are replaced by their averages."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        for parameter, average in zip(self.parameters, self.values, strict=True):
            parameter.data, average.data = average.data, parameter.data


class RetainWeights(NamedTuple):
    """Weights of the penalties on the distance to the untouched backbone; 0: off."""

    l2sp: float = 0.0
    features: float = 0.0


def parse_retain(text: str) -> RetainWeights:
    """`l2sp=W`, `features=W`, or both with a comma."""
    try:
        pairs = [part.split("=") for part in text.replace(" ", "").split(",")]
        values = {name: float(weight) for name, weight in pairs}
        if len(values) == len(pairs) and all(0 < weight < math.inf for weight in values.values()):
            return RetainWeights(**values)
    except (ValueError, TypeError):
        pass
    raise ValueError("want l2sp=W, features=W or l2sp=W,features=W, each W above 0")


RETAIN_TYPE = Parsed("penalties", parse_retain, lambda weights: ",".join(
    f"{name}={weight!r}" for name, weight in weights._asdict().items() if weight))


class Retention:
    """A hook into the step of train.py: penalties on the distance to the untouched backbone (--retain).

    l2sp adds W/2 |θ - θ₀|² over the trained weights θ of the network (arXiv 1802.01483, eq. 3, with the factor on new
    layers left to AdamW). features adds W mean_i (1 - cos(x_i, x⁰_i)) over the images i of a step, with x⁰ the
    untouched backbone's embedding of the same augmented image: learning without forgetting (arXiv 1606.09282) for
    embeddings, which needs no images of the earlier task. l2sp costs another copy of the trained weights; features one
    more forward pass of each image and another copy of the network.

    `model`: the backbone before its first step; `world`: number of processes, whose gradients DDP averages.
    """

    sums_ranks = False  # DDP averages the gradients

    def __init__(self, model: Backbone, weights: RetainWeights, bf16: bool, world: int) -> None:
        self.weights, self.world, self.device = weights, world, next(model.parameters()).device
        self.trained = [p for p in model.net.parameters() if p.requires_grad] if weights.l2sp else []
        self.start = [p.detach().clone() for p in self.trained]
        self.untouched = AutocastModel(copy.deepcopy(model).eval().requires_grad_(False), bf16, self.device) \
            if weights.features else None
        self.begin()

    def acts(self, step: int) -> bool:
        """Whether the hook is called in a step."""
        return True

    def begin(self) -> None:
        """Before the first micro-batch of a step."""
        self.distance, self.images = torch.zeros((), device=self.device), 0  # Σ (1 - cos) over this rank's images

    def backward(self, result: Any, images: torch.Tensor, batch: tuple, present: list[int]) -> None:
        """Replaces `result.loss.backward()`; `batch`: arguments of the head."""
        x, _, _, counts, _ = batch
        loss = result.loss
        if self.untouched:
            with torch.no_grad():
                target = self.untouched(images).to(x)
            distance = (1 - nn.functional.cosine_similarity(x.to(loss), target.to(loss))).sum()
            loss = loss + self.weights.features * self.world * distance / counts.sum()
            self.distance, self.images = self.distance + distance.detach(), self.images + len(x)
        loss.backward()

    @torch.no_grad()
    def finish(self, step: int) -> None:
        """After the last micro-batch: the gradient of the distance to the untouched weights."""
        for parameter, start in zip(self.trained, self.start, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self.weights.l2sp)

    def figures(self) -> dict[str, float]:
        """For a line of the log: |θ - θ₀|, and the mean 1 - cos of the last step's images of this process."""
        moved = [p.detach() - start for p, start in zip(self.trained, self.start, strict=True)]
        return ({"retain/weights": float(nn.utils.get_total_norm(moved))} if moved else {}) | (
            {"retain/features": float(self.distance) / self.images} if self.untouched and self.images else {})


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether the backbone computes in bfloat16; "auto": on GPUs that support it."""
    # GPUs before Ampere emulate bf16: slower than float32, and not more precise
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and
                                   torch.cuda.is_bf16_supported(including_emulation=False))


class AutocastModel(nn.Module):
    """The model in the precision of --precision; embeddings are cast, too, because some networks end in float32."""

    def __init__(self, model: Backbone, bf16: bool, device: torch.device) -> None:
        super().__init__()
        self.model, self.bf16, self.device = model, bf16, device.type

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            x = self.model(images)
        return x.bfloat16() if self.bf16 else x
