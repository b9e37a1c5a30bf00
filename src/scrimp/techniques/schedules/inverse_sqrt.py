"""Linear warm-up, then the inverse square root of time; or the square root alone, without a warm-up.

    factor(p) = min(t / w, sqrt(w / t))        with a warm-up of w
    factor(p) = sqrt(d / (d + p))              without one, with a decay of time scale d

p is progress before the step and t = p + s, with s the progress of one step: steps count from 1 in the first formula
and from 0 in the second, as in their papers, and the first step already moves. Papers: Vaswani et al., "Attention Is
All You Need", NeurIPS 2017, arXiv 1706.03762; without warm-up: Huang et al., "Improving Transformer Optimization
Through Better Initialization", ICML 2020, PMLR 119 (there d is 4000 steps).

Saves: knowing the length of the run. Costs: the rate never falls to zero, and a decayed end is usually better.
Not for: runs of a fixed budget (warmup_cosine). Give `warmup` or `decay` in steps or tokens for a factor that does not
depend on the run's length.
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
    """Duration of the warm-up; 0 for none, with a decay."""
    decay: str | float = 0
    """Time scale of the decay without a warm-up, after which the factor is sqrt(1/2)."""

    def __post_init__(self) -> None:
        warmup, decay = (Duration.parse(getattr(self, n), n).value for n in ("warmup", "decay"))
        if warmup and decay:
            raise UserError("decay is for a run without a warm-up.", "", "Set warmup to 0, or drop decay.")
        if not warmup and not decay:
            raise UserError("without a warm-up, decay must be more than 0.", "", "Set decay, such as `4000 step`.")

    def schedule(self, factor: Callable[[float], float], run: Run) -> Callable[[float], float]:
        """progress before the step -> factor."""
        w = run.clock.share(self.warmup, "warm-up", run.where(self, "warmup"))
        d, s = run.clock.fraction(self.decay), run.clock.fraction("1 step")

        def shape(p: float) -> float:
            t = p + s
            return min(t / w, math.sqrt(w / t)) if w else math.sqrt(d / (d + p))

        return shape
