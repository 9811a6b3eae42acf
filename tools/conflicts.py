"""How the domains' gradients on the shared backbone lie to each other, and what is done about it."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn

from models.runs import append
from train import Job


def add_gradients(gradients: list[torch.Tensor], loss: torch.Tensor, model: nn.Module, head: torch.Tensor,
                  keep: bool) -> None:
    """Add the gradient of a loss: of the trainable parameters to `gradients` (may be empty), of the head to `.grad`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [*parameters, head], retain_graph=keep, materialize_grads=True, allow_unused=True)
    head.grad = found[-1] if head.grad is None else head.grad + found[-1]
    gradients[:] = torch._foreach_add(gradients, found[:-1]) if gradients else found[:-1]


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
