"""Sharpness-aware minimization: descend with the gradient at the worst nearby point.

    e = rho g / (||g|| + 1e-12),   g = grad L(w),   ||g|| over all parameters together
    update w with grad L(w + e), on the same batch

Paper: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021,
arXiv 2010.01412.

Saves: data, as flat minima generalize better; nothing in computation. Costs: a second forward and backward pass, and a
copy of the weights between them. Not for: runs that see every sample once, where there is little to overfit.

Both passes see the same batch and drop the same activations. The weights are restored from the copy, as subtracting e
would leave rounding errors. Weight decay is the update rule's alone. The loss returned is that at w. With float16 both
gradients are scaled, which e does not notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from scrimp.perturbing import perturb, restore, with_gradients
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch


@dataclass(frozen=True, kw_only=True)
class SAM(Technique):
    """Sharpness-aware minimization: descend with the gradient at the worst nearby point."""

    card = Card(
        paper="arXiv:2010.01412",
        section="Optimization",
        saves="data: flat minima generalize better",
        costs="a second forward and backward pass; a copy of the weights",
        sets=("gradient point",),
        phase={"backward": "perturbed"},
        example={"rho": 0.05},
        neutral={"rho": 0.0},
    )
    rho: float = 0.05
    """Radius of the neighborhood, in the norm of all weights together."""

    def __post_init__(self) -> None:
        at_least(0, self, "rho")

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Backward at w, then at w + e, leaving the second gradient."""
        if self.rho == 0:
            return backward

        def perturbed(batch: Batch, count: Tensor) -> Tensor:
            loss = backward(batch, count)
            held = list(with_gradients(run).values())
            copies = perturb(run, held, self.rho)
            try:
                backward(batch, count)
            finally:
                restore(held, copies)
            return loss

        return perturbed
