# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Sanger: a dense array of 4 bits predicts the mask, whose rows are cut, packed and split for a sparse array.

    A row of the mask is cut into runs of 64 keys; empty runs are dropped, and a run of c > 16 kept keys is split into
    ceil(c / 16). A sub-row holds a row of 16 multipliers for d cycles of scores, the exponentials, d cycles of values.
    balance = sum(c / 16) / sum(ceil(c / 16))

Prediction goes on meanwhile, d cycles a tile of 64 x 64 scores, one after another; the array fills and drains once.
Queries stay on the chip, 64 at a time, and all keys and values are streamed for them, as the released model has it.

`sanger` counts that for a mask. `sanger_released` is the authors' cost model of a whole layer with its projections, in
two versions, which asks for density and balance only; it divides the output projection by them as well, though that
product is dense.

Paper: Lu et al., MICRO 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from scrimp.machines.accelerators.architecture import ARRAY, Accelerator
from scrimp.machines.accelerators.engine import MEMORY, Flow, Group, Stage, overlap, sequence
from scrimp.machines.accelerators.traces import AttentionTrace, Counts


def sanger(traces: Sequence[AttentionTrace], machine: Accelerator) -> Flow:
    """Attention of some layers; each predicts while it computes what was predicted before."""
    return sequence(*(layer(trace.trimmed(), machine) for trace in traces))


def layer(trace: AttentionTrace, machine: Accelerator) -> Group:
    """Prediction beside scores, exponentials and values."""
    n, s, d, heads = trace.queries, trace.keys, trace.width, trace.heads
    side = machine.count("segment")
    predicted = Stage(name="predict", resource="predictor", work=heads * n * s * d, cycles=prediction(trace, side))
    taken = rounds(trace, machine)
    exps = machine.unit("exp")
    products = Stage(name="products", resource=ARRAY, work=2 * trace.kept * d, cycles=taken * 2 * d)
    softmax = Stage(name="softmax", resource="exp", work=trace.kept, cycles=taken * ceil(
        machine.array.macs / exps.rate) + exps.latency)  # fmt: skip
    item = machine.array.bits / 8
    moved = Stage(name="traffic", bytes={MEMORY: heads * (2 * n + 2 * s * ceil(n / side)) * d * item})
    return overlap(predicted, sequence(products, softmax), moved)


def rounds(trace: AttentionTrace, machine: Accelerator) -> int:
    """How often the array is filled with packed and split sub-rows, head by head."""
    held = subrows(trace, machine.count("segment"), machine.array.columns).sum((1, 2))
    return sum(ceil(int(count) / machine.array.rows) for count in held)


def prediction(trace: AttentionTrace, side: int) -> int:
    """Cycles of the dense array of a few bits, whose tiles of scores follow one another."""
    tiles = trace.heads * ceil(trace.queries / side) * ceil(trace.keys / side)
    return tiles * trace.width + 2 * side


def unpacked(trace: AttentionTrace, side: int, width: int) -> int:
    """Rounds of the array without packing and splitting: every tile takes as many as its fullest row."""
    rows = subrows(trace, side, width)
    tiles = np.pad(rows, ((0, 0), (0, -trace.queries % side), (0, 0))).reshape(trace.heads, -1, side, rows.shape[2])
    return int(tiles.max(2).sum())


def subrows(trace: AttentionTrace, segment: int, width: int) -> Counts:
    """Sub-rows of each run of keys, [H, N, runs]."""
    return -(-trace.segments(segment) // width)


def balance(trace: AttentionTrace, segment: int, width: int) -> float:
    """Share of the sub-rows' multipliers that have a score."""
    held = int(subrows(trace, segment, width).sum())
    return trace.kept / width / held if held else 1.0


def sanger_released(traces: Sequence[AttentionTrace], machine: Accelerator) -> Flow:
    """Layers by the released cost model: queries, keys and values, attention, output."""
    parts: list[Flow] = []
    for trace in traces:
        share = balance(trace, machine.count("segment"), 16)
        hidden = trace.heads * trace.width
        seconds = released(trace.density, share, trace.queries, hidden, machine)
        parts += [Stage(name=name, resource="whole", work=amount * machine.clock) for name, amount in seconds.items()]
    return sequence(*parts)


def released(density: float, share: float, tokens: int, hidden: int, machine: Accelerator) -> dict[str, float]:
    """Seconds of the parts of a layer.

    Args:
        share: the balance; density / share is the part of the dense time that attention takes.
    """
    rate = 2.0 * machine.array.macs * machine.clock
    sparse = density / share
    seconds = {"projections": 6 * tokens * hidden**2 / rate, "output": 2 * tokens * hidden**2 * sparse / rate}
    if machine.setting("version") == 1:
        return seconds | {"attention": 4 * tokens**2 * hidden * sparse / rate}
    lines = sparse / 0.25 * tokens  # sub-rows of a run of keys, for all queries
    tile = (hidden + 64) + (lines + 64)
    demand = 64 * 2  # bytes a cycle: a number of 16 bits of each key of a tile
    slower = max(1.0, demand / machine.bandwidth(MEMORY))
    return seconds | {"attention": lines / 64 * (tokens / 64) * tile * slower / machine.clock}


def effective(density: float, share: float, macs: float) -> float:
    """GOP/s of the dense product, of so many multipliers at 1 GHz that skip what is not kept."""
    return 2.0 * macs * share / density


def drawn(density: float, tokens: int, segment: int, width: int) -> float:
    """The balance of a mask that keeps keys by chance."""
    generator = np.random.default_rng(0)
    mask = generator.random((4, tokens, tokens)) < density
    return balance(AttentionTrace.of(mask, head_width=64), segment, width)
