"""A random mask that stays as it is: the control that every method of sparse training must beat.

    w <- w * m,  g <- g * m,   m drawn once, with exactly the asked number of weights a layer

ERK allocation: arXiv 1707.04780, as used in Evci et al., "Rigging the Lottery", ICML 2020, arXiv 1911.11134.

Saves: FLOPs and bytes on hardware with sparse products; no seconds on a CPU or GPU, where masks are stored dense.
Costs: a pass over gradients and weights, and accuracy, the more the lower the density.
Not for: models that are to be used: it tells what a method that chooses its weights is worth. Biases are not pruned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scrimp.sparse.allocation import counts
from scrimp.sparse.masks import (
    MASK,
    begun,
    full,
    masked_backward,
    masked_evaluate,
    masked_export,
    masked_step,
    prunable,
    random_mask,
    shapes,
)
from scrimp.technique import Card, Technique, above_zero

if TYPE_CHECKING:
    from torch import Tensor

    from scrimp.run import Run
    from scrimp.technique import Backward, Evaluate, State, Step


@dataclass(frozen=True, kw_only=True)
class StaticSparse(Technique):
    """A random mask that stays as it is."""

    card = Card(
        paper="arXiv:1707.04780",
        section="Sparse training",
        saves="FLOPs on sparse hardware; no seconds on a CPU or GPU: masks are stored dense",
        costs="accuracy; a pass over gradients and weights",
        sets=("sparsity",),
        phase={"carry": "masked", "backward": "masked", "step": "masked", "evaluate": "masked", "export": "merged"},
        refuses={
            "frozen weights": "masks are of weights that are trained, and tuning freezes them.",
            "width schedule": "masks have the shapes of their weights, which it changes.",
        },
        whole="masks are of whole weights.",
        example={"density": 0.5},
        neutral={"density": 1.0},
    )
    density: float = 0.2
    """Share of all prunable weights together that remains."""
    allocation: Literal["erk", "uniform", "first_dense"] = "erk"
    """erk leaves small matrices denser; first_dense keeps the first layer whole and treats the others alike."""
    params: str = "blocks.*"
    """Pattern of the linear layers' weights to prune."""

    def __post_init__(self) -> None:
        above_zero(self, "density")

    def carry(self, state: State, run: Run) -> State:
        """Draw the masks; a run that begins begins masked."""
        weights = prunable(run, self, self.params)
        memory = full(run, self, weights)
        kept = counts(shapes(weights), self.density, self.allocation)
        for name, shape in shapes(weights).items():
            memory[name + MASK] = random_mask(shape, kept[name], run.seed, name, run.device)
        return begun(state, run, self, weights)

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Mask the gradients."""
        return masked_backward(backward, run, self, prunable(run, self, self.params))

    def step(self, step: Step, run: Run) -> Step:
        """Mask the weights."""
        return masked_step(step, run, self, prunable(run, self, self.params))

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        """Mask averaged weights."""
        return masked_evaluate(evaluate, run, self, prunable(run, self, self.params))

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Masked."""
        return masked_export(named, run, self)
