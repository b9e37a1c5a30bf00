"""Warm-up, stable, decay: a constant rate that falls only at the end.

    factor(p) = min(1, (p + s) / w)                           while p < w
    factor(p) = 1                                             while p < 1 - d
    factor(p) = floor + (1 - floor) f((1 - p) / d)            afterwards, with f(x) = x or 1 - sqrt(1 - x)

p is progress before the step and s the progress of one step: the first step already moves, and the floor is reached
where the run ends. Papers: Hu et al., "MiniCPM", arXiv 2404.06395; the square root: Hägele et al., "Scaling Laws and
Compute-Optimal Training Beyond Fixed Training Durations", arXiv 2405.18392.

Saves: a run can be extended from any point before its decay, and one long run serves many budgets. Costs: the decay
is still needed for a good final loss. Not for: short runs of a fixed budget, where a cosine does as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scrimp.clock import Duration
from scrimp.errors import UserError
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

    def __post_init__(self) -> None:
        Duration.parse(self.warmup, "warmup")
        Duration.parse(self.decay, "decay")
        if not 0 <= self.floor <= 1:
            raise UserError(f"floor must be between 0 and 1, not {self.floor}.")

    def schedule(self, factor: Callable[[float], float], run: Run) -> Callable[[float], float]:
        """progress before the step -> factor."""
        w = run.clock.share(self.warmup, "warm-up", run.where(self, "warmup"))
        d, s = run.clock.fraction(self.decay), run.clock.fraction("1 step")
        if w + d > 1 + 1e-9:
            what = f"the warm-up ({self.warmup}) and the decay ({self.decay}) together are longer than the run."
            raise UserError(what, run.where(self), "Shorten one of them, or give them as fractions of the run.")

        def shape(p: float) -> float:
            if p < w:
                return min(1.0, (p + s) / w)
            left = min(1.0, max(0.0, 1 - p) / d) if d else 1.0
            fall = left if self.shape == "linear" else 1 - math.sqrt(1 - left)
            return self.floor + (1 - self.floor) * fall

        return shape
