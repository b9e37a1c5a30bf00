"""Gradient accumulation: a batch in micro-batches, one update.

    g = sum over micro-batches of d(summed loss) / d w / (tokens of the whole batch)

The denominator is known before the first forward, so that the result is that of the whole batch however the counted
tokens are spread: a mean of micro-batch means would weight sparse micro-batches too much.

Saves: activation memory, by the number of parts. Costs: smaller matrix products, and a buffer of gradients that lives
through the whole step. Not for: memory that is taken by weights and states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scrimp.errors import UserError
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from torch import Tensor

    from scrimp.run import Run
    from scrimp.technique import Backward, Batch


@dataclass(frozen=True, kw_only=True)
class Accumulate(Technique):
    """A batch in micro-batches."""

    card = Card(
        paper="Goyal et al., arXiv:1706.02677",
        section="Large batch training",
        saves="activation memory, by the number of parts",
        costs="smaller matrix products",
        phase={"backward": "accumulated"},
        example={"parts": 2},
        neutral={"parts": 1},
    )
    parts: int = 2
    """Micro-batches a batch."""

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise UserError(f"parts must be at least 1, not {self.parts}.")

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Sum gradients and losses over the parts."""
        if self.parts > run.recipe.batch:
            what = f"a batch of {run.recipe.batch} cannot be cut into {self.parts} parts."
            raise UserError(what, run.where(self, "parts"), "Lower it, or raise `batch`.")

        def accumulated(batch: Batch, count: Tensor) -> Tensor:
            pieces = [t.chunk(self.parts) for t in batch.values()]
            losses = [backward(dict(zip(batch, piece, strict=True)), count) for piece in zip(*pieces, strict=True)]
            total = losses[0]
            for loss in losses[1:]:
                total = total + loss
            return total

        return accumulated
