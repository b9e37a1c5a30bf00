# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""ELSA: signs of projections tell which keys may matter to a query; only these are scored.

    head = 3 n + sum over queries of max(3, n / (banks selectors), most candidates in a bank, d / division)
    base = n (n / banks), without hashing

Keys lie in banks by turns, each with an attention module that scores a key a cycle; a query waits for the fullest bank.
Several ELSAs share the heads. Each holds the keys and values of its head, 512 of 64 numbers as published, and no more.

Paper: Ham et al., ISCA 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np

from scrimp.machines.accelerators.architecture import ARRAY, Accelerator
from scrimp.machines.accelerators.buffers import check
from scrimp.machines.accelerators.engine import MEMORY, Flow, Stage, makespan, overlap, sequence
from scrimp.machines.accelerators.traces import AttentionTrace


def elsa(traces: Sequence[AttentionTrace], machine: Accelerator) -> Flow:
    """Attention of some layers; padding is skipped."""
    return sequence(*(layer(trace.trimmed(), machine) for trace in traces))


def layer(trace: AttentionTrace, machine: Accelerator) -> Flow:
    """All heads of a layer, on all copies."""
    n, s, d, heads = trace.queries, trace.keys, trace.width, trace.heads
    # A module multiplies a key and a value at a time, with half of its multipliers each.
    check(machine, s, d, machine.array.columns // 2, "keys", "values")
    hashing = machine.setting("hashing") > 0
    work = (2 * trace.kept if hashing else 2 * heads * n * s) * d
    costs = head_cycles(trace, machine) if hashing else np.full(heads, n * ceil(s / machine.count("banks")))
    # The copies work on different heads: a head takes all of its own copy and 1 / copies of the machine.
    taken = makespan(costs.tolist(), machine.count("copies"))
    products = Stage(name="attention", resource=ARRAY, work=work, cycles=taken)
    parts: list[Flow] = [products]
    if hashing:
        hashed = heads * (n + s) * machine.setting("hash_products")
        parts.append(Stage(name="hashes", resource="hash", work=hashed))
        parts.append(Stage(name="selection", resource="selector", work=heads * n * s))
    parts.append(Stage(name="traffic", bytes={MEMORY: heads * (2 * n + 2 * s) * d * machine.array.bits / 8}))
    return overlap(*parts, name="attention")


def head_cycles(trace: AttentionTrace, machine: Accelerator) -> np.ndarray[Any, Any]:
    """Cycles of each head, [H]."""
    banks = machine.count("banks")
    select = trace.keys / (banks * machine.setting("selectors"))
    least = max(machine.setting("hash_cycles"), select, trace.width / machine.setting("division"))
    each = np.maximum(trace.banks(banks).max(2), least)
    return machine.setting("hash_cycles") * trace.keys + each.sum(1)
