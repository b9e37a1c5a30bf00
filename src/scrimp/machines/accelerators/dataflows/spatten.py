# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""SpAtten: tokens and heads are ranked by their cumulated weights and pruned; what is left is dense.

    a query: ceil(kept / (multipliers / d)) cycles of scores, and as many of values on a second array meanwhile
    a head:  a ranking of n / 4 + 4 cycles, and the last query's drain

Paper: Wang et al., HPCA 2021, arXiv 2012.09852; cycles as its released model of BERT counts them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scrimp.machines.accelerators.architecture import ARRAY, Accelerator
from scrimp.machines.accelerators.engine import MEMORY, Flow, Stage, overlap, sequence
from scrimp.machines.accelerators.traces import AttentionTrace


def spatten(traces: Sequence[AttentionTrace], machine: Accelerator) -> Flow:
    """Attention of some layers; heads follow one another."""
    return sequence(*(layer(trace.trimmed(), machine) for trace in traces))


def layer(trace: AttentionTrace, machine: Accelerator) -> Flow:
    """All heads of a layer."""
    n, s, d, heads = trace.queries, trace.keys, trace.width, trace.heads
    at_once = max(machine.array.columns / d, 1e-9)
    scores = np.ceil(trace.rows / at_once)
    ranking = s / machine.setting("ranked") + 4
    taken = float(scores.sum() + heads * (ranking + machine.setting("drain")))
    products = Stage(name="attention", resource=ARRAY, work=2 * trace.kept * d, cycles=taken)
    used = int((trace.columns > 0).sum())
    moved = Stage(name="traffic", bytes={MEMORY: (2 * heads * n + 2 * used) * d * machine.array.bits / 8})
    return overlap(products, moved, name="attention")
