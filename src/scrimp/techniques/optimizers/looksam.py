"""LookSAM: sharpness-aware minimization whose second pass is made every k steps, and remembered in between.

    every k steps:    g_s = grad L(w + rho g / ||g||),   g_v = g_s - (g_s . g / ||g||^2) g,   update with g_s
    other steps:      update with g + alpha ||g|| / ||g_v|| g_v                  g_v and norms of each tensor

Paper: Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022, arXiv 2203.02714. g_v is
the part of the sharpness-aware gradient that is orthogonal to the plain one, which changes slowly. The paper writes it
for all weights together; as the authors' code does, it is taken apart tensor by tensor here. The first step of a stage
makes a second pass too.

Saves: most of sam's second passes: 1/k of them are left. Costs: what sam costs every k steps, and one more tensor a
weight, g_v. Not for: short runs and the first steps of training, in which gradients turn fast: a stale direction of
alpha times the gradient's size can then do harm. Refresh more often (`k`), or use sam, which k = 1 is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scrimp.groups import trainable
from scrimp.perturbing import perturb, restore, with_gradients
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch


@dataclass(frozen=True, kw_only=True)
class LookSAM(Technique):
    """Sharpness-aware minimization whose second pass is remembered for k steps."""

    card = Card(
        paper="arXiv:2203.02714",
        section="Optimization",
        claim="trains a ViT from scratch in minutes with batches of 64K (abstract of 2203.02714)",
        saves="most of sam's second passes",
        costs="one more tensor a weight; a second pass every k steps",
        sets=("gradient point",),
        phase={"backward": "perturbed"},
        example={"rho": 0.05, "k": 3},
        neutral={"rho": 0.0},
    )
    rho: float = 0.05
    """Radius of the neighborhood, in the norm of all weights together."""
    k: int = 5
    """Steps from one second pass to the next; 1 is sam."""
    alpha: float = 0.7
    """Size of the remembered direction, in that of the gradient."""

    def __post_init__(self) -> None:
        at_least(0, self, "rho", "alpha")
        at_least(1, self, "k")

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Backward at w, then at w + e or along what is remembered of it."""
        if self.rho == 0:
            return backward
        memory = run.memory(self)
        if self.k > 1:
            memory.update({name: torch.zeros_like(p) for name, p in trainable(run.model).items()})

        def perturbed(batch: Batch, count: Tensor) -> Tensor:
            loss = backward(batch, count)
            named = with_gradients(run)
            # A stage may begin with other weights or masks, of which no direction is known.
            if run.clock.step % self.k and run.clock.position != run.clock.begun:
                lean(named, memory, self.alpha)
                return loss
            keep(named, memory)
            held = list(named.values())
            copies = perturb(run, held, self.rho)
            try:
                backward(batch, count)
            finally:
                restore(held, copies)
            remember(named, memory)
            return loss

        return perturbed


@torch.no_grad()
def lean(named: Mapping[str, nn.Parameter], memory: Mapping[str, Tensor], alpha: float) -> None:
    """g <- g + alpha ||g|| / ||g_v|| g_v, where there is a g_v."""
    for name, p in named.items():
        assert p.grad is not None
        direction = memory[name]
        # As in the authors' code; a g_v of zeros adds nothing.
        factor = alpha * p.grad.norm() / (direction.norm() + 1e-8)
        p.grad.addcmul_(direction, factor)


@torch.no_grad()
def keep(named: Mapping[str, nn.Parameter], memory: Mapping[str, Tensor]) -> None:
    """g in the memory of g_v, until g_s is there; zeros where there is no gradient."""
    for name, kept in memory.items():
        grad = named[name].grad if name in named else None
        if grad is None:
            kept.zero_()
        else:
            kept.copy_(grad)


@torch.no_grad()
def remember(named: Mapping[str, nn.Parameter], memory: Mapping[str, Tensor]) -> None:
    """g_v <- g_s - (g_s . g / ||g||^2) g, with g in the memory."""
    for name, kept in memory.items():
        p = named.get(name)
        if p is None or p.grad is None:
            kept.zero_()
            continue
        along, square = torch.linalg.vecdot(p.grad.flatten(), kept.flatten()), kept.norm().square()
        kept.mul_(torch.where(square > 0, -along / square, 0.0)).add_(p.grad)
        # Gradients that overflow float16 are not for keeping; their update is skipped.
        torch.nan_to_num_(kept, 0.0, 0.0, 0.0)
