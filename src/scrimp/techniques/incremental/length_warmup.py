"""Sequence-length warm-up: short sequences first, long ones later.

    length = context (start + (1 - start) n / levels) while n of the `levels` equal parts of the warm-up have passed

Paper: Li et al., "The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for Training GPT Models",
arXiv 2108.06084. Sequences are truncated, so that what is cut off is not seen in that step. `until` in another unit
than the run's is converted at the full length's tokens per step.

Saves: time and activation memory of early steps, and it steadies large learning rates. Costs: early steps hold fewer
tokens, hence measure the run in tokens when comparing. Not for: short contexts, where attention is a small part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scrimp.clock import Duration
from scrimp.errors import UserError
from scrimp.models.subsets import shortened
from scrimp.technique import Card, Technique, above_zero, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch


@dataclass(frozen=True, kw_only=True)
class LengthWarmup(Technique):
    """Short sequences first, long ones later."""

    card = Card(
        paper="arXiv:2108.06084",
        section="Incremental learning",
        saves="time and activation memory of early steps",
        costs="early steps hold fewer tokens",
        sets=("length schedule",),
        phase={"batch": "length"},
        example={"start": 0.5, "until": 0.5, "levels": 2},
        neutral={"start": 1.0},
    )
    start: float = 0.25
    """First length, as a share of the context."""
    until: str | float = 0.3
    """Duration until the full length."""
    levels: int = 4
    """How many times the length grows."""
    multiple: int = 8
    """Lengths are rounded up to a multiple of this."""

    def __post_init__(self) -> None:
        at_least(1, self, "levels", "multiple")
        above_zero(self, "start")
        Duration.parse(self.until, "until")

    def stages(self) -> tuple[str | float, ...]:
        """The points at which the length grows: at each the run is rebuilt, hence planned for its own length."""
        if self.start == 1:
            return ()
        return Duration.parse(self.until).evenly(self.levels)

    def batch(self, batch: Callable[[int], Batch], run: Run) -> Callable[[int], Batch]:
        """Truncate what has the context's length."""
        context = getattr(run.data.train, "context", 0)
        if context < 2:
            raise UserError("the data has no sequences to shorten.", run.where(self), "Drop it.")
        share = self.start + (1 - self.start) * run.clock.passed(self.stages()) / self.levels
        length = min(context, -(-round(share * context) // self.multiple) * self.multiple)
        if length == context or self.start == 1:
            return batch
        return lambda step: shortened(batch(step), context, length)
