# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""ViTCoD: columns that most queries keep go to a denser engine, all other scores to a sparser one, side by side.

    G columns are kept by more than `threshold` of the queries, S scores lie elsewhere; both engines share W lines of m
    multipliers, of which the denser gets W G n / (S + G n). H heads are done at once, so that each has m / H of a line.
    scores:  max(G ceil(n / dense) t, ceil(S / sparse) t),  t = ceil(d / (m / H))
    values:  max(ceil(n d G / (dense m / H)), ceil(S d / (sparse m / H)))
    Queries and keys come from memory as h' = H ratio heads and are decoded; loads overlap with all of that.

Paper: You et al., arXiv 2210.09573. `vitcod_released` is the simulator its authors released, to the cycle: its lines
have 64 multipliers in attention, and 8 elsewhere; only head 0 decides; softmax takes no time. `vitcod` has the paper's
512 multipliers everywhere, and looks at every head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

from scrimp.machines.accelerators.architecture import ARRAY, Accelerator
from scrimp.machines.accelerators.engine import MEMORY, Flow, Stage, overlap, sequence
from scrimp.machines.accelerators.traces import AttentionTrace


@dataclass(frozen=True)
class Layer:
    """What the machine needs to know of a layer's mask."""

    globals: int
    """Columns of the denser engine."""
    sparse: int
    """Scores of the sparser one, of a head."""
    tokens: int
    heads: int
    width: int


def vitcod(traces: Sequence[AttentionTrace], machine: Accelerator) -> Flow:
    """Attention of some layers."""
    return attention([layer for trace in traces for layer in split(trace, machine)], machine)


def split(trace: AttentionTrace, machine: Accelerator) -> list[Layer]:
    """A layer, or one for each sequence where the trace has several: at most `heads` heads are done at once."""
    at_once = min(machine.count("heads") or trace.heads, trace.heads)
    layers: list[Layer] = []
    for first in range(0, trace.heads, at_once):
        columns = trace.columns[first : first + (1 if machine.setting("head_zero") else at_once)]
        dense = columns > machine.setting("threshold") * trace.queries
        layers.append(Layer(round(float(dense.sum(1).mean())), round(float((columns * ~dense).sum(1).mean())),
                            trace.queries, min(at_once, trace.heads - first), trace.width))  # fmt: skip
    return layers


def attention(layers: Sequence[Layer], machine: Accelerator) -> Flow:
    """Loads of all layers beside decoding and products of all layers."""
    loads: list[Flow] = []
    computed: list[Flow] = []
    for layer in layers:
        needed = _loads(layer, machine)
        moved = {MEMORY: _bytes(layer, machine)}
        loads.append(Stage(name="load", resource="port", work=needed, cycles=needed, bytes=moved))
        computed += [_decode(layer, machine), *_products(layer, machine)]
    return overlap(sequence(*loads, name="loads"), sequence(*computed))


def _cycles(machine: Accelerator, numbers: float, share: float = 1.0) -> int:
    """To load so many numbers of 8 bits by themselves over a share of the bandwidth."""
    return ceil(numbers * machine.array.bits / (machine.memory.bandwidth * 8 * share) * machine.clock)


def _loads(layer: Layer, machine: Accelerator) -> float:
    """Compressed keys and queries with the decoder's weights, then values; each token is loaded by itself."""
    n, heads, ratio = layer.tokens, layer.heads, machine.setting("ratio")
    token = _cycles(machine, heads * ratio * layer.width)
    weights = _cycles(machine, heads * ratio, 1 / heads)
    queries = n * token + weights
    if not layer.globals:  # Without columns that keep them on the chip, queries are loaded again for the keys.
        queries = layer.sparse / n * n * token + weights
    dense = layer.globals * token + weights if layer.globals else 0.0
    return dense + queries + (n - layer.globals) * token + weights + n * _cycles(machine, heads * layer.width)


def _bytes(layer: Layer, machine: Accelerator) -> float:
    """Queries, keys and values, once."""
    ratio = machine.setting("ratio")
    return layer.tokens * layer.width * layer.heads * (2 * ratio + 1) * machine.array.bits / 8


def _decode(layer: Layer, machine: Accelerator) -> Stage:
    """Heads h' -> H of every query and key."""
    compressed = layer.heads * machine.setting("ratio") * layer.width
    each = ceil(compressed / floor(machine.array.macs / layer.heads))
    work = 2 * layer.tokens * compressed * layer.heads
    return Stage(name="decode", resource=ARRAY, work=work, cycles=2 * layer.tokens * each)


def _products(layer: Layer, machine: Accelerator) -> list[Stage]:
    """Scores, and sums of values, on the two engines."""
    lines, own = machine.array.rows, machine.array.columns / layer.heads
    n, d, many = layer.tokens, layer.width, layer.globals * layer.tokens
    if not many + layer.sparse:
        return []
    dense = floor(lines * many / (layer.sparse + many))
    # A line at least, where an engine has anything to do.
    dense = min(max(dense, 1 if many else 0), lines - 1 if layer.sparse else lines)
    sparse, steps = lines - dense, ceil(d / own)
    scores, values = [0.0], [0.0]
    if many:
        scores.append(layer.globals * ceil(n / dense) * steps)
        values.append(ceil(many * d / max(floor(dense * own), 1)))
    if layer.sparse:
        scores.append(ceil(layer.sparse / sparse) * steps)
        values.append(ceil(layer.sparse * d / max(floor(sparse * own), 1)))
    work = (many + layer.sparse) * d * layer.heads
    return [Stage(name="scores", resource=ARRAY, work=work, cycles=max(scores)),
            Stage(name="values", resource=ARRAY, work=work, cycles=max(values))]  # fmt: skip


def feed_forward(tokens: int, width: int, head: int, heads: int, layers: int, machine: Accelerator) -> int:
    """Cycles of all projections and MLPs of a network on lines of `line` multipliers."""
    macs = machine.array.rows * machine.count("line")
    mine = floor(macs / heads)
    projections = 3 * tokens * floor(width * head / mine) + floor(tokens * width * head / mine)
    return layers * (projections + 2 * floor(tokens * width * 4 * width / macs))
