"""Linear warm-up, then half a cosine down to a floor.

    factor(p) = min(1, (p + s) / w)                                               while p < w
    factor(p) = floor + (1 - floor) (1 + cos(pi (p - w) / (1 - w))) / 2           afterwards

p is progress before the step and s the progress of one step: the first step already moves, and the floor is reached
where the run ends. Paper: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017,
arXiv 1608.03983 (without the restarts); warm-up: Goyal et al., arXiv 1706.02677.

Saves: diverging starts. Costs: the length of the run must be known beforehand. Not for: runs of open length (wsd).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scrimp.clock import Duration
from scrimp.errors import UserError
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

    def __post_init__(self) -> None:
        Duration.parse(self.warmup, "warmup")
        if not 0 <= self.floor <= 1:
            raise UserError(f"floor must be between 0 and 1, not {self.floor}.")

    def schedule(self, factor: Callable[[float], float], run: Run) -> Callable[[float], float]:
        """progress before the step -> factor."""
        w, s = run.clock.share(self.warmup, "warm-up", run.where(self, "warmup")), run.clock.fraction("1 step")

        def shape(p: float) -> float:
            if p < w:
                return min(1.0, (p + s) / w)
            done = min(1.0, (p - w) / (1 - w)) if w < 1 else 1.0
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2

        return shape
