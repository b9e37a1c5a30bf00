"""How many bits each of several tensors gets, under a budget."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Final

WIDTHS: Final = (1, 2, 4, 8)


def allocate(tensors: Mapping[str, tuple[int, float]], average: float) -> dict[str, int]:
    """Bits of each tensor: the sum of sensitivity / (2^bits - 1)^2 is small, and the average bits within the budget.

    Greedy: all begin at 1 bit; the step up that gains most for a bit of storage is taken while the budget allows it.

    Args:
        tensors: name -> (numbers, sensitivity).
        average: bits of a number, from 1.
    """
    left = (average - WIDTHS[0]) * sum(size for size, _ in tensors.values())
    chosen = dict.fromkeys(tensors, WIDTHS[0])
    heap: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        bits = chosen[name]
        if bits < WIDTHS[-1]:
            size, sensitivity = tensors[name]
            gain = sensitivity * (error(bits) - error(2 * bits)) / (bits * size)
            heapq.heappush(heap, (-gain, name))

    for name in tensors:
        offer(name)
    while heap:
        _, name = heapq.heappop(heap)
        cost = chosen[name] * tensors[name][0]
        if cost <= left:
            left -= cost
            chosen[name] *= 2
            offer(name)
    return chosen


def error(bits: int) -> float:
    """Variance of stochastic rounding, in units of the range squared."""
    return 1.0 / (2**bits - 1) ** 2
