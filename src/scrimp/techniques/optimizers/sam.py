"""Sharpness-aware minimization: the gradient is taken where the loss nearby is highest.

    e  = rho g / (||g|| + 1e-12),  g the gradient at w, ||g|| over all trained weights together
    g' = gradient at w + e, on the same batch with the same dropout
    the update rule gets g' at w

Paper: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", arXiv 2010.01412.

Saves: nothing in a step; it buys generalization. Costs: a second forward and backward, and a copy of the weights
between them. Not for: runs bound by time on plenty of data, as in most language-model pre-training. Decay belongs to
the update rule alone, and clipping acts on g'. The weights are restored from a copy, since subtracting e would
leave rounding behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import get_total_norm

from scrimp.errors import UserError
from scrimp.groups import trainable
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from torch import Tensor

    from scrimp.run import Run
    from scrimp.technique import Backward, Batch


@dataclass(frozen=True, kw_only=True)
class SAM(Technique):
    """Sharpness-aware minimization."""

    card = Card(
        paper="arXiv:2010.01412",
        section="Optimization",
        saves="nothing in a step: it buys generalization",
        costs="a second forward and backward",
        sets=("gradient point",),
        phase={"backward": "perturbed"},
        example={"rho": 0.05},
        neutral={"rho": 0.0},
    )
    rho: float = 0.05
    """Length of the perturbation; the paper's values reach from 0.05 to 0.2."""

    def __post_init__(self) -> None:
        if self.rho < 0:
            raise UserError(f"rho must be at least 0, not {self.rho}.")

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Gradient, perturbation, gradient, restoration."""
        if not self.rho:
            return backward

        def perturbed(batch: Batch, count: Tensor) -> Tensor:
            loss = backward(batch, count)
            moved = [p for p in trainable(run.model).values() if p.grad is not None]
            grads = [p.grad for p in moved]
            with torch.no_grad():
                saved = [p.detach().clone() for p in moved]
                factor = self.rho / (get_total_norm(grads) + 1e-12)
                torch._foreach_add_(moved, torch._foreach_mul(grads, factor))
            for p in moved:
                p.grad = None
            backward(batch, count)
            with torch.no_grad():
                torch._foreach_copy_(moved, saved)
            return loss

        return perturbed
