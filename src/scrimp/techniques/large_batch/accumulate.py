"""Gradient accumulation: a batch in parts, one update.

    g = sum over parts of grad(summed loss of the part) / count of the whole batch

The denominator is the whole batch's, so that parts with few targets weigh little: the gradient is that of the whole
batch, not a mean of means. Dropout does not depend on the split either.

Source: Goyal et al., "Accurate, Large Minibatch SGD", arXiv 1706.02677, which warns of the denominator (section 3.3).

Saves: activations, to about 1/parts of theirs. Costs: time where the parts become too small to keep the machine busy.
Not for: batches that fit anyway, or a loss that compares all items of the batch (contrastive), where it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from scrimp.errors import UserError
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch


@dataclass(frozen=True, kw_only=True)
class Accumulate(Technique):
    """A batch in parts, one update."""

    card = Card(
        paper="arXiv:1706.02677",
        section="Large batch training",
        saves="activations, to 1/parts",
        costs="time, when parts are small",
        micro_batches=True,
        phase={"backward": "accumulated"},
        example={"parts": 2},
        remedies=({"parts": 2}, {"parts": 4}, {"parts": 16}),
        neutral={"parts": 1},
    )
    parts: int = 2
    """Micro-batches a step; the last ones are a sample smaller where the batch does not divide."""

    def __post_init__(self) -> None:
        at_least(1, self, "parts")

    def backward(self, backward: Backward, run: Run) -> Backward:
        """The inner backward over every part, with the count of the whole batch."""
        if self.parts == 1:
            return backward
        if self.parts > run.recipe.batch:
            what = f"a batch of {run.recipe.batch} cannot be split into {self.parts} parts."
            raise UserError(what, run.where(self, "parts"), "Raise `batch`, or lower `parts`.")

        def accumulated(batch: Batch, count: Tensor) -> Tensor:
            first, *rest = split(batch, self.parts)
            loss = backward(first, count)
            for part in rest:
                loss = loss + backward(part, count)
            return loss

        return accumulated


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch in parts along its first dimension, as even as possible; never an empty one."""
    size = len(next(iter(batch.values())))
    pieces = {name: value.tensor_split(min(parts, size)) for name, value in batch.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(min(parts, size))]
