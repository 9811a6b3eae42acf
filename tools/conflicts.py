"""Conflicts between the domains' gradients of the backbone, and PCGrad: a hook into the step of train.py."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data_prep import append
from models.backbones import Backbone
from models.head import HeadLoss, MarginHead


def add_gradients(gradients: list[Tensor], loss: Tensor, model: nn.Module, head: Tensor, keep: bool) -> None:
    """Add the gradient of a loss in the trainable parameters to `gradients` (may be empty), in the head to `.grad`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    added = torch.autograd.grad(loss, [*parameters, head], retain_graph=keep, materialize_grads=True, allow_unused=True)
    head.grad = added[-1] if head.grad is None else head.grad + added[-1]
    gradients[:] = torch._foreach_add(gradients, added[:-1]) if gradients else added[:-1]


def conflicts(by_domain: list[list[Tensor]], depth: list[int]) -> tuple[Tensor, Tensor]:
    """Norms and pairwise cosines of the domains' gradients, for the whole backbone and per layer.

    Args:
        by_domain: K lists of gradients, one tensor per parameter.
        depth: layer 0..L-1 of each parameter.

    Returns:
        Norms [L + 1, K] and cosines [L + 1, K, K]; the last row is the whole backbone. Cosines of zero gradients: NaN.
    """
    K, L = len(by_domain), max(depth) + 1
    inner = torch.zeros(L + 1, K, K, dtype=torch.float64, device=by_domain[0][0].device)
    for layer, gradients in zip(depth, zip(*by_domain, strict=True), strict=True):
        rows = torch.stack([g.flatten() for g in gradients]).double()
        inner[layer] += rows @ rows.T
    inner[L] = inner[:L].sum(0)
    norms = inner.diagonal(dim1=1, dim2=2).sqrt()
    return norms, inner / (norms[:, :, None] * norms[:, None, :])


def project_conflicts(by_domain: list[list[Tensor]], seed: int, step: int) -> list[Tensor]:
    """PCGrad: the sum of the domains' gradients after projecting each off those with which it conflicts.

    Source: Yu et al., arXiv 2001.06782, algorithm 1. The random order of the domains depends on (seed, step).
    """
    K, rng = len(by_domain), np.random.default_rng((seed, step))

    def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()

    length = [dot(g, g) for g in by_domain]
    total = [torch.zeros_like(g) for g in by_domain[0]]
    for i in range(K):
        projected = [g.clone() for g in by_domain[i]]
        for j in rng.permutation(K):
            if j != i:
                # clamped instead of a branch, which would synchronise
                share = (dot(projected, by_domain[j]).clamp(max=0) / length[j].clamp(min=1e-30)).to(projected[0].dtype)
                torch._foreach_sub_(projected, torch._foreach_mul(by_domain[j], share))
        torch._foreach_add_(total, projected)
    return total


@dataclass
class DomainGradients:
    """Runs the backward passes of a step domain by domain, to log conflicts or to apply PCGrad."""

    model: Backbone
    head: MarginHead
    domains: list[str]
    folder: Path
    pcgrad: bool  # apply PCGrad (--coupling pcgrad)
    every: int  # steps between lines of conflict.jsonl (--conflict-every); 0: none
    seed: int
    sums_ranks = True  # sums each domain's gradient over the ranks, so that DDP must not

    def logs(self, step: int) -> bool:
        """Whether the step writes a line of conflict.jsonl."""
        return self.every > 0 and step % self.every == 0

    def acts(self, step: int) -> bool:
        """Whether the hook runs the backward passes of the step."""
        return self.pcgrad or self.logs(step)

    def begin(self) -> None:
        self.by_domain: list[list[Tensor]] = [[] for _ in self.domains]

    def backward(self, result: HeadLoss, images: Tensor, batch: tuple, present: list[int]) -> None:
        """Replaces `result.loss.backward()`; `batch`: arguments of the head, `present`: domains in the batch."""
        x, labels, domains, *more = batch
        for k in present:
            loss = result.loss if len(present) == 1 else \
                self.head(x, torch.where(domains == k, labels, -1), domains, *more).loss
            add_gradients(self.by_domain[k], loss, self.model, self.head.weight, keep=k != present[-1])

    def finish(self, step: int) -> None:
        """After the last micro-batch: set the gradient of the backbone, summed over the ranks."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        ranks = self.head.ranks
        for k, gradients in enumerate(self.by_domain):
            if not gradients:  # no image in this step
                self.by_domain[k] = gradients = [torch.zeros_like(p) for _, p in named]
            if ranks.world > 1:  # one large sum: many small ones would each wait for the network
                whole = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients])) / ranks.world
                parts = whole.split([gradient.numel() for gradient in gradients])
                for part, gradient in zip(parts, gradients, strict=True):
                    gradient.copy_(part.view_as(gradient))  # keeps the memory layout, which fused AdamW needs
        whole = project_conflicts(self.by_domain, self.seed, step) if self.pcgrad else \
            [sum(parts) for parts in zip(*self.by_domain, strict=True)]
        for (_, parameter), gradient in zip(named, whole, strict=True):
            parameter.grad = gradient
        if self.logs(step) and ranks.rank == 0:
            self.write(step, [name for name, _ in named])

    def figures(self) -> dict[str, float]:
        """Figures for log.jsonl: none, because conflict.jsonl holds them."""
        return {}

    def write(self, step: int, names: list[str]) -> None:
        layers, domains = self.model.layers(), self.domains
        norms, cosines = (v.cpu() for v in conflicts(self.by_domain, [layers[name] for name in names]))
        pairs = {f"{a}~{b}": (i, j) for (i, a), (j, b) in itertools.combinations(enumerate(domains), 2)}
        append(self.folder / "conflict.jsonl", {
            "step": step + 1, "norm": dict(zip(domains, norms[-1].tolist(), strict=True)),
            "cosine": {name: float(cosines[-1, i, j]) for name, (i, j) in pairs.items()},
            "cosine_by_layer": {name: cosines[:-1, i, j].tolist() for name, (i, j) in pairs.items()}})
