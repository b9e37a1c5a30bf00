# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""DOTA: a detector of low rank and few bits says which scores to omit; queries share the keys that they keep.

    detector: n d k + 2 n k^2 + n^2 k products of 4 bits for a head, k = sigma d
    scores and values: 2 d products of 16 bits for each kept key, of T queries at a time
    A step gives each of the T queries one key at most; each key is fetched once for all T. Keys that most of them keep
    go first, and keys of disjoint queries share a step.
    Keys and values of the head at work stay on the chip as far as half of its memory goes, since the other half is
filled meanwhile. The rest is fetched again for every T queries that need it.

Paper: Qu et al., ASPLOS 2022. How much faster products of 4 bits are, is not settled: `array.gain` says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scrimp.machines.accelerators.architecture import ARRAY, Accelerator
from scrimp.machines.accelerators.buffers import held
from scrimp.machines.accelerators.engine import MEMORY, Flow, Group, Stage, overlap, sequence
from scrimp.machines.accelerators.traces import AttentionTrace, Bits


@dataclass(frozen=True)
class Issue:
    """What an order of keys costs."""

    steps: int
    fetched: int
    """Keys read."""
    apart: int
    """Keys that would be read if each query read its own."""


def dota(traces: Sequence[AttentionTrace], machine: Accelerator) -> Flow:
    """Attention of some layers."""
    return sequence(*(layer(trace.trimmed(), machine) for trace in traces))


def layer(trace: AttentionTrace, machine: Accelerator) -> Group:
    """Detection, then what was detected, beside the traffic."""
    n, s, d, heads = trace.queries, trace.keys, trace.width, trace.heads
    group, few = machine.count("parallel"), width_of(machine, trace.predictor.bits)
    k = trace.predictor.rank or max(round(machine.setting("sigma") * d), 1)
    needed = heads * (s * d * k + (n + s) * k * k + n * s * k) if machine.setting("detect") else 0
    detect = Stage(name="detector", resource=few, work=needed)
    # Each step is `group` queries with a key each; keys that are not kept by all leave lanes without work.
    order = issued(trace.full(), group)
    used = trace.kept / (order.steps * group) if order.steps else 1.0
    products = Stage(name="products", resource=ARRAY, work=2 * trace.kept * d, utilization=used)
    exps = Stage(name="softmax", resource="exp", work=trace.kept)
    item = machine.array.bits / 8
    inner = Stage(name="keys", bytes={"sram": 2 * order.fetched * d * item})
    fits = held(machine, "sram", 2 * d)  # a key and its value
    stays = s if fits is None else min(fits, s)
    again = order.fetched * (1 - stays / s)
    outer = Stage(name="traffic", bytes={MEMORY: (heads * (2 * n + 2 * stays) + 2 * again) * d * item})
    return overlap(sequence(detect, overlap(products, exps, name="attention")), inner, outer)


def width_of(machine: Accelerator, bits: int) -> str:
    """The array at the detector's bits, or at the narrowest that it has and that holds them; 0 for its own."""
    known = [width for width in machine.array.gain if width >= (bits or machine.count("detector_bits"))]
    return f"{ARRAY}{min(known, default=machine.array.bits)}"


def issued(mask: Bits, group: int) -> Issue:
    """The greedy order of keys of all groups of queries.

    Args:
        mask: [H, N, S].
    """
    _, queries, keys = mask.shape
    padded = np.pad(mask, ((0, 0), (0, -queries % group), (0, 0)))
    lanes = padded.reshape(-1, group, keys).transpose(0, 2, 1)
    # A key's pattern is the number whose bits are the queries that need it.
    patterns = (lanes << np.arange(group)).sum(2)
    size = 1 << group
    steps = fetched = 0
    for row in patterns:
        counts = np.bincount(row, minlength=size)[:size].tolist()
        fetched += sum(counts[1:])
        steps += steps_of(counts, group)
    return Issue(steps, fetched, int(mask.sum()))


def steps_of(counts: list[int], group: int) -> int:
    """Steps of one group, from how many keys have each pattern; the list is used up."""
    order = sorted(range(1, len(counts)), key=lambda pattern: (-pattern.bit_count(), pattern))
    steps = 0
    for first in order:
        while counts[first]:
            chosen, taken = [first], first
            for other in order:
                if not other & taken and counts[other]:
                    chosen.append(other)
                    taken |= other
            many = min(counts[pattern] for pattern in chosen)
            for pattern in chosen:
                counts[pattern] -= many
            steps += many
    return steps
