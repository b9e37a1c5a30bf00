# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""SpAtten: tokens and heads are ranked by their cumulated weights and pruned; what is left is dense.

    u keys of a head are left: those that any of its n queries keeps; p = multipliers / d of them make a line
    load:     2 u d numbers of a head, in whole lines
    products: n ceil(u / p) cycles of a head: scores, and values on a second array meanwhile
    drain:    a layer's last query, and its ceil(u / p) scores in a queue
    ranking:  of a head that lost keys: the u largest of s sums by quickselect, some of them a cycle

One after another, as the released model of BERT counts them, which draws the ranking's pivots; here are their averages
(Knuth 1971). It holds 2048 keys and values of a head as released, and does no more.

Paper: Wang et al., HPCA 2021, arXiv 2012.09852.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from scrimp.machines.accelerators.architecture import ARRAY, Accelerator
from scrimp.machines.accelerators.buffers import check
from scrimp.machines.accelerators.engine import MEMORY, Flow, Stage, sequence
from scrimp.machines.accelerators.traces import AttentionTrace


def spatten(traces: Sequence[AttentionTrace], machine: Accelerator) -> Flow:
    """Attention of some layers."""
    return sequence(*(layer(trace.trimmed(), machine) for trace in traces))


def layer(trace: AttentionTrace, machine: Accelerator) -> Flow:
    """All heads of a layer."""
    d = trace.width
    left = [int(count) for count in (trace.columns > 0).sum(1)]
    check(machine, max(left), d, machine.count("widest"), "keys", "values")
    at_once = max(machine.array.columns // d, 1)
    lines = [ceil(count / at_once) for count in left]
    fetched = [count * at_once * d * machine.count("fetched_bits") / 8 for count in lines]
    ranking = sum(ranked(trace.keys, count, at_once, machine) for count in left)
    load = Stage(name="load", bytes={MEMORY: 2 * sum(fetched)})  # a line of 64 numbers is a burst of each channel
    products = Stage(name="attention", resource=ARRAY, work=2 * trace.kept * d, cycles=trace.queries * sum(lines))
    drain = Stage(name="drain", resource=ARRAY, cycles=machine.setting("drain") + lines[-1])
    return sequence(load, products, drain, Stage(name="ranking", resource=ARRAY, cycles=ranking))


def ranked(keys: int, left: int, at_once: int, machine: Accelerator) -> float:
    """Cycles to find the largest of some sums; none where all of them, or none, are left."""
    if not 0 < left < keys:
        return 0.0
    passes, seen = selected(keys, left)
    filled = ceil(keys / at_once) + ceil(left / at_once)
    return filled + seen / machine.setting("ranked") + 4 * passes


def selected(count: int, rank: int) -> tuple[float, float]:
    """(passes, numbers looked at) of quickselect for the number of a rank, on average over its pivots."""
    harmonic = [0.0]
    for i in range(1, count + 1):
        harmonic.append(harmonic[-1] + 1 / i)
    other = count + 1 - rank
    passes = harmonic[rank] + harmonic[other] - 1
    compared = 2 * ((count + 1) * harmonic[count] - (other + 2) * harmonic[other] - (rank + 2) * harmonic[rank]
                    + count + 3)  # fmt: skip
    return passes, compared + passes
