"""Training a backbone: LoRA, stochastic depth, averaged weights (EMA), bfloat16.

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
        raise InputError(f"--lora {rank}: this network has no attention projections; take a transformer")


def add_drop_path(model: Backbone, rate: float) -> None:
    """Stochastic depth (arXiv 1603.09382): the drop probability grows linearly from 0 to `rate` at the top block.

    open_clip has no such option; DropPath replaces its layer scale, which is the identity in the published models.
    """
    from timm.layers import DropPath

    tower = model.net.visual if model.library == "open_clip" else model.net
    ends = ("drop_path", "drop_path1", "drop_path2", "ls_1", "ls_2")
    blocks = [(module, [end for end in ends if isinstance(getattr(module, end, None), nn.Identity | DropPath)])
              for module in tower.modules()]
    blocks = [(module, places) for module, places in blocks if places]
    if not blocks:
        raise InputError(f"--drop-path {rate:g}: this network has no residual branches to drop: leave it out")
    for (module, places), probability in zip(blocks, np.linspace(0, rate, len(blocks)).tolist(), strict=True):
        for end in places:
            setattr(module, end, DropPath(probability))


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
        pull = (1 - ((1 + t) / (10 + t)).clamp(max=self.decay)) * taken
        away = torch._foreach_sub([p.detach() for p in self.parameters], self.values)
        torch._foreach_mul_(away, pull.to(away[0].dtype))
        torch._foreach_add_(self.values, away)

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


class AutocastModel(nn.Module):
    """The model in the precision of --precision; embeddings are cast, too, because some networks end in float32."""

    def __init__(self, model: Backbone, bf16: bool, device: torch.device) -> None:
        super().__init__()
        self.model, self.bf16, self.device = model, bf16, device.type

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            x = self.model(images)
        return x.bfloat16() if self.bf16 else x
