"""Linear warm-up, then half a cosine down to a floor.

    factor(p) = p / w                                            while p < w
    factor(p) = floor + (1 - floor) (1 + cos(pi (p - w) / (1 - w))) / 2   afterwards

p is progress at the end of the step, so that the first step is not lost and the last one reaches the floor.
Paper: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv 1608.03983 (without the
restarts); warm-up: Goyal et al., arXiv 1706.02677.

Saves: diverging starts. Costs: the length of the run must be known beforehand. Not for: runs of open length (wsd).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(Technique):
    """Linear warm-up, then half a cosine."""

    card = Card(
        paper="arXiv:1608.03983",
        section="Optimization",
        saves="diverging starts",
        costs="the length must be known",
        sets=("learning-rate schedule",),
        replaces=("schedule",),
        phase={"schedule": "shape"},
        example={"warmup": 0.25},
    )
    warmup: str | float = 0.05
    """Duration of the warm-up."""
    floor: float = 0.1
    """Factor at the end of the run."""

    def schedule(self, factor: Callable[[float], float], run: Run) -> Callable[[float], float]:
        """progress before the step -> factor."""
        w, step = run.clock.fraction(self.warmup), run.clock.fraction("1 step")

        def shape(progress: float) -> float:
            p = min(progress + step, 1.0)
            if p < w:
                return p / w
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * (p - w) / max(1 - w, 1e-12))) / 2

        return shape
