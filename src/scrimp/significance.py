# pyright: strict
"""Paired comparison of few runs: Student's t over the differences of each seed.

t = mean(d) / (sd(d) / sqrt(n))        p = P(|T| > |t|), T of n - 1 degrees of freedom
95 % interval of the mean difference: mean(d) +- q sd(d) / sqrt(n)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LEVEL: Final = 0.05
"""p below which a difference is called one."""


@dataclass(frozen=True)
class Difference:
    """A mean difference of pairs."""

    mean: float
    low: float
    """Of the 95 % interval; -inf with one pair."""
    high: float
    p: float | None
    """None with one pair."""

    @property
    def seen(self) -> bool:
        """Whether it is more than chance."""
        return self.p is not None and self.p < LEVEL


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """How much a is above b, pair by pair.

    Raises:
        ValueError: if there are no pairs or lengths differ.
    """
    found = [x - y for x, y in zip(a, b, strict=True)]
    if not found:
        raise ValueError("there are no pairs")
    mean, n = statistics.fmean(found), len(found)
    if n == 1:
        return Difference(mean, -math.inf, math.inf, None)
    error = statistics.stdev(found) / math.sqrt(n)
    if error == 0.0:
        return Difference(mean, mean, mean, 1.0 if mean == 0.0 else 0.0)
    half = quantile(1 - LEVEL / 2, n - 1) * error
    return Difference(mean, mean - half, mean + half, 2 * (1 - distribution(abs(mean / error), n - 1)))


def distribution(t: float, freedom: int) -> float:
    """P(T <= t), by Simpson's rule on the density in the angle atan(t / sqrt(freedom)), where it is smooth."""
    if t < 0:
        return 1 - distribution(-t, freedom)
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    angle, steps = math.atan(t / math.sqrt(freedom)), 2000
    width = angle / steps
    heights = [math.cos(i * width) ** (freedom - 1) for i in range(steps + 1)]
    total = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    return 0.5 + math.exp(log) * total * width / 3


def quantile(share: float, freedom: int) -> float:
    """The t that a share of the distribution lies below, for shares above one half."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle, freedom) < share else (low, middle)
    return high
