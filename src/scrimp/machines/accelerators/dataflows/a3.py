# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A3: candidates from sorted columns of the keys, exact scores of these, values of those whose weight matters.

    base:         a key a cycle; a query takes n cycles in each of three stages, and 3 n + 27 until its result
    approximate:  max(M, C, K) cycles a query: M iterations over sorted columns, C candidates, K that are kept

Sorting takes d n log2 n comparisons of a head, done before; `count_sorting` of them can be put into the time, at
`sorter` comparisons a cycle. For self-attention every sequence has new keys.

It holds the keys and values of a head on the chip, 320 of 64 numbers as published, and does no more.

Paper: Ham et al., HPCA 2020, arXiv 2002.10941.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2

import numpy as np

from scrimp.machines.accelerators.architecture import ARRAY, Accelerator
from scrimp.machines.accelerators.buffers import check
from scrimp.machines.accelerators.engine import MEMORY, Flow, Stage, overlap, sequence
from scrimp.machines.accelerators.traces import AttentionTrace


def a3(traces: Sequence[AttentionTrace], machine: Accelerator) -> Flow:
    """Heads one after another, whose queries are pipelined."""
    return sequence(*(layer(trace.trimmed(), machine) for trace in traces))


def layer(trace: AttentionTrace, machine: Accelerator) -> Flow:
    """All heads of a layer."""
    n, s, d, heads = trace.queries, trace.keys, trace.width, trace.heads
    check(machine, s, d, machine.array.columns, "keys", "values")
    share = machine.setting("iterations")
    if share:
        iterations = ceil(share * s)
        asked = trace.rows if trace.candidates is None else trace.candidates
        each = np.maximum(np.maximum(asked, trace.rows), iterations)
        # A query's way through search, scores, exponentials and values; the next one follows as soon as it can.
        fill = iterations + each.max(1) + 2 * trace.rows.max(1) + machine.setting("drain")
        scores, values = int(asked.sum()) * d, trace.kept * d
    else:
        each = np.full((heads, n), s)
        fill = np.full(heads, 3 * s + machine.setting("drain"))
        scores = values = heads * n * s * d
    taken = float(each.sum() + (fill - each.max(1)).sum())
    parts: list[Flow] = []
    if share and machine.setting("count_sorting"):
        parts.append(Stage(name="sorting", resource="sorter", work=heads * d * s * log2(max(s, 2))))
    products = Stage(name="attention", resource=ARRAY, work=scores + values, cycles=taken)
    moved = Stage(name="traffic", bytes={MEMORY: heads * (2 * n + 2 * s) * d * machine.array.bits / 8})
    return sequence(*parts, overlap(products, moved, name="attention"))
