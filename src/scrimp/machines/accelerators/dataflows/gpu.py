# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""GPUs and CPUs: a roofline of each operator, and attention in tiles that stay on the chip.

    gpu:    scores, softmax and values one after another, each max(products / peak, bytes / bandwidth); scores and
            weights go to memory and come back: 4 n^2 + 4 n d numbers of a head, as wide as the run's own; masks save
            nothing, padding counts
    flash:  Bc = ceil(M / 4 d) keys a block for M numbers on the chip, T = ceil(s / Bc) blocks of the s keys:
            2 s d + T (3 n d + 4 n) numbers forward, 4 s d + T (5 n d + 2 n) backward

`efficiency` is the share of the peak that the kernels of some measurement got; 1 is the roofline. No first principle
gives it.

Paper of flash: Dao et al., arXiv 2205.14135.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from scrimp.errors import UserError
from scrimp.machines.accelerators.architecture import ARRAY, Accelerator
from scrimp.machines.accelerators.engine import MEMORY, Flow, Stage, overlap, sequence
from scrimp.machines.accelerators.traces import AttentionTrace


def gpu(traces: Sequence[AttentionTrace], machine: Accelerator) -> Flow:
    """Attention of some layers, without masks."""
    return sequence(*(layer(trace, machine) for trace in traces))


def layer(trace: AttentionTrace, machine: Accelerator) -> Flow:
    """Three operators, each of which begins when the one before is done."""
    n, s, d, heads, item = trace.queries, trace.keys, trace.width, trace.heads, trace.bits / 8
    share, array = machine.setting("efficiency"), f"{ARRAY}{trace.bits}"
    macs, scores, inputs = heads * n * s * d, heads * n * s * item, heads * (n + s) * d * item

    def operator(name: str, work: float, moved: float) -> Stage:
        # An inefficient kernel gets that share of the bandwidth too, which no bytes are counted for.
        waits = moved / machine.bandwidth(MEMORY) / share
        return Stage(name=name, resource=array, work=work, bytes={MEMORY: moved},
                     cycles=max(work / machine.rate(array) / share, waits))  # fmt: skip

    return sequence(operator("scores", macs, inputs + scores), operator("softmax", 0.0, 2 * scores),
                    operator("values", macs, scores + inputs))  # fmt: skip


def flash(traces: Sequence[AttentionTrace], machine: Accelerator) -> Flow:
    """Attention of some layers, forward."""
    parts: list[Flow] = []
    share = machine.setting("efficiency")
    for trace in traces:
        item, n, d = trace.bits / 8, trace.queries, trace.width
        fits = int(machine.buffer("sram").bytes / item)
        if fits < 4 * d:
            what = f"a query, a key, a value and an output of {d:,} numbers are more than `buffers.sram` holds."
            raise UserError(what, machine.name, "Use narrower heads.")
        moved = trace.heads * flash_numbers(n, d, fits, keys=trace.keys) * item
        products = Stage(name="products", resource=f"{ARRAY}{trace.bits}", work=2 * trace.heads * n * trace.keys * d,
                         utilization=share)  # fmt: skip
        parts.append(overlap(products, Stage(name="traffic", bytes={MEMORY: moved}), name="attention"))
    return sequence(*parts)


def standard_numbers(n: int, d: int, backward: bool = False, dropout: bool = False) -> int:
    """Numbers that a head reads and writes where scores go to memory; masks and dropout pass over them 7 times more."""
    forward = 4 * n * n + 4 * n * d
    return forward + (7 * n * n + 8 * n * d if backward else 0) + (7 * n * n if dropout else 0)


def flash_numbers(n: int, d: int, fits: int, backward: bool = False, keys: int = 0) -> int:
    """Numbers that a head reads and writes where `fits` of them stay on the chip; keys: 0 for as many as queries."""
    s = keys or n
    blocks = ceil(s / ceil(fits / (4 * d)))
    forward = 2 * s * d + blocks * (3 * n * d + 4 * n)
    return forward + (4 * s * d + blocks * (5 * n * d + 2 * n) if backward else 0)
