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

from scrimp.splitting import accumulated, check_parts, split
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward


@dataclass(frozen=True, kw_only=True)
class Accumulate(Technique):
    """A batch in parts, one update."""

    card = Card(
        paper="arXiv:1706.02677",
        section="Large batch training",
        saves="activations, to 1/parts",
        costs="time, when parts are small",
        sets=("parts of a batch",),
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
        check_parts(self.parts, run.recipe.batch, run.where(self, "parts"))
        return lambda batch, count: accumulated(backward, split(batch, self.parts), count, run)
