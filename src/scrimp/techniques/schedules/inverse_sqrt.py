"""Linear warm-up, then the inverse square root of time.

    factor(p) = p / w           while p < w
    factor(p) = sqrt(w / p)     afterwards

p is progress at the end of the step. Paper: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762.

Saves: knowing the length of the run. Costs: the rate never falls to zero, and a decayed end is usually better.
Not for: runs of a fixed budget (warmup_cosine).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scrimp.errors import UserError
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Technique):
    """Linear warm-up, then the inverse square root of time."""

    card = Card(
        paper="arXiv:1706.03762",
        section="Optimization",
        saves="knowing the length of the run",
        costs="a rate that never falls to zero",
        sets=("learning-rate schedule",),
        replaces=("schedule",),
        phase={"schedule": "shape"},
        example={"warmup": 0.25},
    )
    warmup: str | float = 0.1
    """Duration of the warm-up; more than 0."""

    def schedule(self, factor: Callable[[float], float], run: Run) -> Callable[[float], float]:
        """progress before the step -> factor."""
        w, step = run.clock.fraction(self.warmup), run.clock.fraction("1 step")
        if w <= 0:
            raise UserError("the warm-up must be longer than 0.", run.where(self, "warmup"))

        def shape(progress: float) -> float:
            p = progress + step
            return p / w if p < w else math.sqrt(w / p)

        return shape
