# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How long a step takes on a machine: operator by operator, by what was measured or by the roofline of a data sheet.

seconds = max(FLOPs / products' rate, bytes moved / bandwidth)           operators of a machine nobody probed
step    = sum of them, but on a GPU at least the time to launch them all
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from scrimp.machines.machine import PRODUCTS, STREAM, Machine
from scrimp.ops import Op
from scrimp.technique import Cost


def step_seconds(ops: Sequence[Op], machine: Machine, fused: bool = False) -> tuple[float, list[tuple[str, float]]]:
    """Seconds of one step, and those of its operators, the slowest first.

    Args:
        fused: whether a compiler joins neighboring memory-bound operators.
    """
    ops = fuse(ops) if fused else ops
    rates = machine.rates
    known: dict[tuple[object, ...], float] = {}
    spent = Counter[str]()
    for op in ops:
        key = (op.name, op.shape, op.layout, op.dtype, op.read, op.written, op.fresh)
        if key not in known:
            known[key] = rates.seconds(op) if rates is not None else roofline(op, machine)
        spent[op.name] += known[key]  # pyright: ignore[reportArgumentType]
    total = float(sum(spent.values()))
    if rates is not None:
        total = total * rates.factor + rates.step
    elif machine.device != "cpu":
        total = max(total, len(ops) * machine.overhead)
    return total, [(name, float(time)) for name, time in spent.most_common(8)]


def waiting(ops: Sequence[Op], machine: Machine, cost: Cost) -> float:
    """Seconds of a step in which a rank waits for others: a share of its passes, not of its update."""
    passes = [op for op in ops if op.phase != "update"] if cost.idle else []
    return step_seconds(passes, machine, cost.fused)[0] * cost.idle / (1 - cost.idle) if passes else 0.0


def roofline(op: Op, machine: Machine) -> float:
    """Seconds of an operator by a data sheet."""
    dtype = str(op.dtype).removeprefix("torch.")
    peak = machine.flops.get(dtype) or machine.flops["float32"]
    time = max(op.flops / (PRODUCTS * peak), (op.read + op.written) / (STREAM * machine.bandwidth))
    return time if machine.device != "cpu" else time + machine.overhead


FUSED: Final = ("forward", "backward", "recompute")
"""Phases that a compiler sees; the update of the optimizer is none of them."""


def fuse(ops: Sequence[Op]) -> list[Op]:
    """Neighboring memory-bound operators of one phase within one block become one.

    What the chain itself made is not read again; of what it makes, the last is written.
    """
    fused: list[Op] = []
    for op in ops:
        last = fused[-1] if fused else None
        if last is not None and _joins(last, op):
            read = last.read + max(op.read - last.written, 0)
            fused[-1] = replace(last, read=read, written=op.written or last.written, fresh=op.fresh or last.fresh)
        else:
            fused.append(op)
    return fused


def _joins(a: Op, b: Op) -> bool:
    """Whether two neighbors are in one block, in one phase, and bound by memory."""
    block = a.module.split(".")[:2]
    inside = len(block) == 2 and b.module.split(".")[:2] == block
    return inside and a.phase == b.phase and a.phase in FUSED and not a.flops and not b.flops
