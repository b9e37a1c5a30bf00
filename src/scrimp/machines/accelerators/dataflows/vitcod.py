# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""ViTCoD: columns that most queries keep go to a denser engine, all other scores to a sparser one, side by side.

    G columns are kept by more than `threshold` of the queries, S scores lie elsewhere; both engines share W lines of m
    multipliers, of which the denser gets W G n / (S + G n). H heads are done at once, so that each has m / H of a line.
    scores:  max(G ceil(n / dense) t, ceil(S / sparse) t),  t = ceil(d / (m / H))
    values:  max(ceil(n d G / (dense m / H)), ceil(S d / (sparse m / H)))
    Queries and keys come from memory as h' = H ratio heads and are decoded; loads overlap with all of that. Of a model
    that does not mix its heads, all of them are loaded, and nothing is decoded.
    So many heads are done at once as the buffers hold. Heads that are not done together are stored unmixed, since each
    would need all h' again. Where not even the keys of one head fit, they are done in parts, and the queries are loaded
    again for each.

Paper: You et al., arXiv 2210.09573. `vitcod_released` is the simulator its authors released, to the cycle: its lines
have 64 multipliers in attention, and 8 elsewhere; only head 0 decides; softmax takes no time; buffers hold anything.
`vitcod` has the paper's 512 multipliers everywhere, and looks at every head and at its buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

from scrimp.machines.accelerators.architecture import ARRAY, Accelerator
from scrimp.machines.accelerators.buffers import held
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
    ratio: float = 2 / 3
    """Heads of queries and of keys that come from memory, over its own; 1 where they are not mixed."""
    parts: int = 1
    """Of its keys, if they do not fit at once."""


def vitcod(traces: Sequence[AttentionTrace], machine: Accelerator) -> Flow:
    """Attention of some layers."""
    return attention([layer for trace in traces for layer in split(trace, machine)], machine)


def split(trace: AttentionTrace, machine: Accelerator) -> list[Layer]:
    """A layer, or one for each sequence where the trace has several: at most `heads` heads are done at once."""
    sequence_heads = min(machine.count("heads") or trace.heads, trace.heads)
    at_once, parts = fitting(trace, sequence_heads, machine)
    ratio = mixed(trace, machine) if at_once == sequence_heads else 1.0
    layers: list[Layer] = []
    for first in range(0, trace.heads, at_once):
        columns = trace.columns[first : first + (1 if machine.setting("head_zero") else at_once)]
        dense = columns > machine.setting("threshold") * trace.queries
        heads = min(at_once, trace.heads - first)
        layers.append(Layer(round(float(dense.sum(1).mean())), round(float((columns * ~dense).sum(1).mean())),
                            trace.queries, heads, trace.width, ratio, parts))  # fmt: skip
    return layers


def mixed(trace: AttentionTrace, machine: Accelerator) -> float:
    """Heads that are stored, over all: what the core says, the machine's own for its masks, 1 for other models."""
    own = machine.setting("ratio") if trace.predictor.kind == "vitcod" else 1.0
    return trace.predictor.ratio or own


def fitting(trace: AttentionTrace, heads: int, machine: Accelerator) -> tuple[int, int]:
    """How many heads are done at once, and in how many parts of the keys."""
    if not machine.setting("fits"):
        return heads, 1
    limits = [held(machine, name, trace.width) for name in ("queries", "keys", "values")]
    fits = min((limit for limit in limits if limit is not None), default=heads * trace.keys)
    return min(max(fits // trace.keys, 1), heads), max(-(-trace.keys // fits), 1)


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
    n, heads, ratio = layer.tokens, layer.heads, layer.ratio
    token = _cycles(machine, heads * ratio * layer.width)
    weights = _cycles(machine, heads * ratio, 1 / heads) if ratio < 1 else 0
    queries = layer.parts * n * token + weights
    if not layer.globals:  # Without columns that keep them on the chip, queries are loaded again for the keys.
        queries = layer.parts * layer.sparse / n * n * token + weights
    dense = layer.globals * token + weights if layer.globals else 0.0
    return dense + queries + (n - layer.globals) * token + weights + n * _cycles(machine, heads * layer.width)


def _bytes(layer: Layer, machine: Accelerator) -> float:
    """Keys and values once, queries for each part of the keys."""
    numbers = (layer.parts + 1) * layer.ratio + 1
    return layer.tokens * layer.width * layer.heads * numbers * machine.array.bits / 8


def _decode(layer: Layer, machine: Accelerator) -> Stage:
    """Heads h' -> H of every query and key, where they are mixed."""
    if layer.ratio == 1:
        return Stage(name="decode")
    compressed = layer.heads * layer.ratio * layer.width
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
