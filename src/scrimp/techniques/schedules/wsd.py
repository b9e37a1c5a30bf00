"""Warm-up, stable, decay: a constant rate that falls only at the end.

    factor(p) = p / w                                 while p < w
    factor(p) = 1                                     while p < 1 - d
    factor(p) = floor + (1 - floor) f((1 - p) / d)    afterwards, f(x) = x or 1 - sqrt(1 - x)

p is progress at the end of the step. Paper: Hu et al., "MiniCPM", arXiv 2404.06395.

Saves: a run can be extended from any point before its decay, and one long run serves many budgets. Costs: the decay
is still needed for a good final loss. Not for: short runs of a fixed budget, where a cosine does as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class WSD(Technique):
    """Warm-up, stable, decay."""

    card = Card(
        paper="arXiv:2404.06395",
        section="Optimization",
        saves="deciding the length beforehand",
        costs="a decay before every use",
        sets=("learning-rate schedule",),
        replaces=("schedule",),
        phase={"schedule": "shape"},
        example={"warmup": 0.25, "decay": 0.5},
    )
    warmup: str | float = 0.05
    """Duration of the warm-up."""
    decay: str | float = 0.2
    """Duration of the decay at the end."""
    shape: Literal["linear", "sqrt"] = "linear"
    """How the rate falls."""
    floor: float = 0.0
    """Factor at the end of the run."""

    def schedule(self, factor: Callable[[float], float], run: Run) -> Callable[[float], float]:
        """progress before the step -> factor."""
        w, d, step = (run.clock.fraction(x) for x in (self.warmup, self.decay, "1 step"))

        def shape(progress: float) -> float:
            p = min(progress + step, 1.0)
            if p < w:
                return p / w
            left = min((1 - p) / d, 1.0) if d else 1.0
            fall = left if self.shape == "linear" else 1 - math.sqrt(1 - left)
            return self.floor + (1 - self.floor) * fall

        return shape
