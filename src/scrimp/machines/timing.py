# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How long a step takes on a machine: operator by operator, by what was measured or by the roofline of a data sheet.

seconds = max(FLOPs / products' rate, bytes moved / bandwidth)           operators of a machine nobody probed
step    = sum of them, but on a GPU at least the time to launch them all
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from scrimp.machines.machine import PRODUCTS, STREAM, Machine
from scrimp.trace import Op


def seconds(ops: Sequence[Op], machine: Machine, fused: bool = False) -> tuple[float, list[tuple[str, float]]]:
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
    if machine.device == "cpu":
        total = total * rates.factor + rates.step if rates is not None else total + 0.001
    else:
        total = max(total, len(ops) * machine.overhead)
    return total, [(name, float(time)) for name, time in spent.most_common(8)]


def roofline(op: Op, machine: Machine) -> float:
    """Seconds of an operator by a data sheet."""
    dtype = str(op.dtype).removeprefix("torch.")
    peak = machine.flops.get(dtype) or machine.flops["float32"]
    time = max(op.flops / (PRODUCTS * peak), (op.read + op.written) / (STREAM * machine.bandwidth))
    return time if machine.device != "cpu" else time + machine.overhead


def fuse(ops: Sequence[Op]) -> list[Op]:
    """Neighboring memory-bound operators of one phase and block become one that reads and writes once."""
    fused: list[Op] = []
    for op in ops:
        last = fused[-1] if fused else None
        joined = last is not None and not last.flops and not op.flops and last.phase == op.phase
        if joined and last is not None and last.module.split(".")[:2] == op.module.split(".")[:2]:
            fused[-1] = replace(last, written=op.written or last.written, fresh=op.fresh or last.fresh)
        else:
            fused.append(op)
    return fused
