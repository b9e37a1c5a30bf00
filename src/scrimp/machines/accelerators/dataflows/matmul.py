# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Dense products: on a systolic array, output-stationary, and on tensor cores that skip 2 of every 4 weights.

    systolic: (R + C + K - 2) ceil(M / R) ceil(N / C) cycles for [M, K] x [K, N] on R x C elements
    2:4:      half the products; of every 4 weights 2 are stored, with 2 bits of index each

Small products are bound by bytes, where 2:4 saves at most what the weights take.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from scrimp.machines.accelerators.architecture import ARRAY, Accelerator
from scrimp.machines.accelerators.engine import MEMORY, Flow, Stage, sequence
from scrimp.machines.accelerators.traces import MatmulTrace


def systolic(traces: Sequence[MatmulTrace], machine: Accelerator) -> Flow:
    """Products one after another; an array of this kind gains nothing by 2:4."""
    return sequence(*(Stage(name="product", resource=ARRAY, work=trace.macs, bytes={MEMORY: moved(trace)},
                            cycles=systolic_cycles(trace, machine)) for trace in traces))  # fmt: skip


def systolic_cycles(trace: MatmulTrace, machine: Accelerator) -> int:
    """Of the array alone."""
    rows, columns = machine.array.rows, machine.array.columns
    return trace.count * (rows + columns + trace.inner - 2) * ceil(trace.rows / rows) * ceil(trace.columns / columns)


def tensor_cores(traces: Sequence[MatmulTrace], machine: Accelerator) -> Flow:
    """Products one after another, each bound by the array or by memory."""
    return sequence(*(stage(trace, machine) for trace in traces))


def stage(trace: MatmulTrace, machine: Accelerator) -> Stage:
    """One product."""
    work = trace.macs / (machine.setting("sparse_gain") if trace.two_four else 1.0)
    return Stage(name="product", resource=ARRAY, work=work, utilization=machine.setting("efficiency"),
                 bytes={MEMORY: moved(trace)})  # fmt: skip


def moved(trace: MatmulTrace) -> float:
    """Bytes: both matrices and the product, once."""
    numbers = trace.rows * (trace.inner + trace.columns) * trace.count
    return (numbers * trace.bits + trace.weight_bits()) / 8
