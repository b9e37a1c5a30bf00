# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""OuterSPACE: products of sparse matrices as sums of outer products, in two phases.

    multiply: for each k, an entry of A's column k times B's row k is one task; it makes a partial row of C
    merge:    each row of C is merged from as many partial rows as A's row has entries
    bytes:    12 (nnzA + nnzB) + 12 P written, then 12 P read + 12 nnzC written, P the number of scalar products
    An element that merges holds the head of every partial row: 170 of them in 2 kB. A row of C with more of them is
    merged in several passes, and what one pass has merged is written and read once more.

Tasks go to the processing element that is free first; half of them merge. Memory is the limit of both phases by these
rules, and the published times are 3 to 10 times longer. `outerspace` therefore takes three calibrated numbers,
nanoseconds of a scalar product, of an entry of A, and of a row: they stand for waiting that no source describes.
`outerspace_events` has none of them.

Paper: Pal et al., HPCA 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from scrimp.machines.accelerators.architecture import Accelerator
from scrimp.machines.accelerators.engine import MEMORY, Flow, Group, Stage, makespan, sequence
from scrimp.machines.accelerators.traces import ProductTrace

Numbers = np.ndarray[Any, Any]
ENTRY: Final = 12
"""Bytes of an index and a number of 64 bits."""


def outerspace(traces: Sequence[ProductTrace], machine: Accelerator) -> Flow:
    """Some products."""
    return sequence(*(product(trace, machine) for trace in traces))


def product(trace: ProductTrace, machine: Accelerator) -> Group:
    """Multiply, then merge."""
    elements, merging = machine.array.macs, machine.count("merging")
    left, right = trace.entries
    partial = ENTRY * trace.products
    # Half a column's tasks have the same cost: one of an entry of A takes as many cycles as B's row is long.
    tasks = np.repeat(np.maximum(trace.right, 1), trace.left)
    # Popping the smallest of `ways` heads costs a comparison for each level of the sorted heads.
    levels = np.ceil(np.log2(np.maximum(trace.ways, 2)))
    again = 2 * ENTRY * merged_again(trace, machine)
    nanosecond = machine.clock * 1e-9
    waiting = nanosecond * (machine.setting("element_ns") * left + machine.setting("row_ns") * len(trace.ways))
    multiply = max(makespan(tasks.tolist(), elements), waiting)
    merge = max(makespan((trace.merged * levels).tolist(), merging),
                nanosecond * machine.setting("product_ns") * trace.products)  # fmt: skip
    return sequence(
        Stage(name="multiply", resource="array", work=trace.products, cycles=multiply,
              bytes={MEMORY: ENTRY * (left + right) + partial}),
        Stage(name="merge", resource="mergers", work=trace.products, cycles=merge,
              bytes={MEMORY: partial + again + ENTRY * trace.nonzeros}),
    )  # fmt: skip


def merged_again(trace: ProductTrace, machine: Accelerator) -> int:
    """Entries that are merged, written and read for another pass, since not all heads of a row's lists fit."""
    if "scratchpad" not in machine.buffers:
        return 0
    heads = machine.buffers["scratchpad"].bytes // ENTRY
    passes = np.ceil(np.log(np.maximum(trace.ways, 2)) / np.log(heads) - 1e-9)
    return int((trace.merged * (passes - 1)).sum())


def bytes_moved(trace: ProductTrace, order: str, reuse: float = 0.0) -> float:
    """Bytes of a product by the order of its loops.

    Args:
        order: outer, row (Gustavson's, row by row), or inner.
        reuse: of `row`: share of the rows of B that are found on the chip when they are needed again.
    """
    (left, right), rows = trace.entries, len(trace.ways)
    if order == "outer":
        return ENTRY * (left + right + 2 * trace.products + trace.nonzeros)
    if order == "row":
        again = max(trace.products - right, 0) * (1 - reuse)
        return ENTRY * (left + right + again + trace.nonzeros)
    columns = rows  # Each row of A meets each column of B, and is read again for it; matrices are square here.
    return ENTRY * (columns * left + rows * right + trace.nonzeros)


def fit(rows: Numbers, entries: Numbers, products: Numbers, seconds: Numbers) -> Numbers:
    """Seconds of a product, an entry and a row, by least squares of relative errors."""
    terms = np.stack([products, entries, rows], 1).astype(float)
    weights = 1 / seconds.astype(float)
    return np.linalg.lstsq(terms * weights[:, None], np.ones(len(seconds)), rcond=None)[0]
