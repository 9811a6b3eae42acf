"""How a backbone is trained: LoRA, stochastic depth, AdamW, running averages of its weights, bfloat16.

Copy with it: models/backbones.py.
"""

import contextlib
import math
import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from data_prep import InputError
from models.backbones import Backbone


class LowRank(nn.Module):
    """A matrix [out, in] plus a product of two thin ones that starts at 0: W + 16/√r · up @ down (rsLoRA).

    Source: arXiv 2106.09685 (LoRA), 2312.03732 (the √r); FRoundation's alpha of 16. As a parametrisation of torch's it
    reaches the fused projections of every library alike, nn.MultiheadAttention's too, which hold no Linear to wrap.
    """

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.scale = 16 / math.sqrt(rank)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # in bf16 it would not be the matrix that is exported
            return weight + self.scale * (self.up @ self.down)


def add_low_rank(model: Backbone, rank: int) -> None:
    """Freeze the network but for low-rank updates of its attention's query, key and value projections (--lora)."""
    projection = re.compile(r".*\.(in_proj_weight|(qkv|[qkv]_proj)\.weight)")
    found = [name for name, p in model.net.named_parameters() if p.requires_grad and projection.fullmatch(name)]
    model.net.requires_grad_(False)
    for name in found:
        path, _, weight = name.rpartition(".")
        module = model.net.get_submodule(path)
        nn.utils.parametrize.register_parametrization(module, weight, LowRank(getattr(module, weight), rank))
    if not found:
        raise InputError(f"--lora {rank}: this network has no attention projections to adapt: take a transformer, or "
                         "leave it out")


def add_drop_path(model: Backbone, rate: float) -> None:
    """Stochastic depth: in training a residual branch is left out for a sample, the more often the higher it lies.

    Source: arXiv 1603.09382, linear from 0 at the lowest block to `rate` at the top one. open_clip's towers have no
    such option; the place of their layer scale, empty in the published models, is the end of the branch.
    """
    from timm.layers import DropPath

    tower = model.net.visual if model.library == "open_clip" else model.net
    ends = ("drop_path", "drop_path1", "drop_path2", "ls_1", "ls_2")
    blocks = [(module, [end for end in ends if isinstance(getattr(module, end, None), nn.Identity | DropPath)])
              for module in tower.modules()]
    blocks = [(module, found) for module, found in blocks if found]
    if not blocks:
        raise InputError(f"--drop-path {rate:g}: this network has no residual branches to drop: leave it out")
    for (module, found), probability in zip(blocks, np.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for end in found:
            setattr(module, end, DropPath(probability))


class LayerwiseAdamW(torch.optim.AdamW):
    """torch's fused AdamW to the bit, in a third of its time on the CPU: layer-wise rates make dozens of groups.

    The kernel has one learning rate a call, so a call a group remains. What else a step does, it does once.

    Attributes: found_inf, float32 scalar on the device: where it is 1 the step is left out, without asking the CPU.
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
        every = [one for *_, steps in states for one in steps]
        torch._foreach_add_(every, 1)
        for (group, parameters), (first, second, steps) in zip(groups, states, strict=True):
            if parameters:
                torch._fused_adamw_(parameters, [p.grad for p in parameters], first, second, [], steps, lr=group["lr"],
                                    beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"], amsgrad=False,
                                    weight_decay=group["weight_decay"], maximize=False, found_inf=self.found_inf)
        torch._foreach_sub_(every, [self.found_inf] * len(every))


class RunningAverage:
    """Exponential running average (EMA) of parameters, whose decay warms up: min(decay, (1 + t) / (10 + t)).

    Source of the warm-up: Karras et al., arXiv 2312.02696, and TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = [p.detach().float().clone() for p in parameters]

    @torch.no_grad()
    def update(self, t: torch.Tensor, taken: torch.Tensor) -> None:
        """After step number t (from 1, not counting skipped ones); `taken`: 0 where this one was skipped."""
        pull = (1 - ((1 + t) / (10 + t)).clamp(max=self.decay)) * taken
        away = torch._foreach_sub([p.detach() for p in self.parameters], self.values)
        torch._foreach_mul_(away, pull.to(away[0].dtype))
        torch._foreach_add_(self.values, away)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the parameters are their averages."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange the parameters and their averages."""
        for parameter, average in zip(self.parameters, self.values, strict=True):
            parameter.data, average.data = average.data, parameter.data


class AutocastModel(nn.Module):
    """The model's forward pass in the precision of --precision, embeddings included: some networks end in float32."""

    def __init__(self, model: Backbone, bf16: bool, device: torch.device) -> None:
        super().__init__()
        self.model, self.bf16, self.device = model, bf16, device.type

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            x = self.model(images)
        return x.bfloat16() if self.bf16 else x
