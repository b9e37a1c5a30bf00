"""Linear warm-up, then a straight line down to a floor.

    factor(p) = p / w                                    while p < w
    factor(p) = floor + (1 - floor) (1 - p) / (1 - w)    afterwards

p is progress at the end of the step. Paper: Devlin et al., "BERT", arXiv 1810.04805; warm-up: Goyal et al., arXiv
1706.02677.

Saves: diverging starts. Costs: the length of the run must be known beforehand. Not for: runs of open length (wsd).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class WarmupLinear(Technique):
    """Linear warm-up, then a straight line."""

    card = Card(
        paper="arXiv:1810.04805",
        section="Optimization",
        saves="diverging starts",
        costs="the length must be known",
        sets=("learning-rate schedule",),
        replaces=("schedule",),
        phase={"schedule": "shape"},
        example={"warmup": 0.25},
    )
    warmup: str | float = 0.1
    """Duration of the warm-up."""
    floor: float = 0.0
    """Factor at the end of the run."""

    def schedule(self, factor: Callable[[float], float], run: Run) -> Callable[[float], float]:
        """progress before the step -> factor."""
        w, step = run.clock.fraction(self.warmup), run.clock.fraction("1 step")

        def shape(progress: float) -> float:
            p = min(progress + step, 1.0)
            return p / w if p < w else self.floor + (1 - self.floor) * (1 - p) / max(1 - w, 1e-12)

        return shape
