# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What is simulated for each published value: functions of a machine and of a reference's inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from scrimp.machines.accelerators.architecture import ARRAY, Accelerator, accelerator
from scrimp.machines.accelerators.dataflows import gpu, matmul, outerspace, sanger, vitcod
from scrimp.machines.accelerators.engine import cycles
from scrimp.machines.accelerators.report import Report, reported, simulate
from scrimp.machines.accelerators.traces import AttentionTrace, MatmulTrace, ProductTrace

DEIT_TINY: Final = (
    (1, 2244), (1, 392), (70, 2479), (1, 936), (1, 1389), (20, 1785), (17, 1333), (1, 1551), (1, 454), (9, 771),
    (10, 1039), (31, 602),
)  # fmt: skip
"""Dense columns and other scores of each layer of the released masks of DeiT-Tiny; a tenth of all scores is kept."""
UNIFORM: Final = (
    (4986, 198882, 7975976, 7.608e-3), (9987, 199480, 3984096, 3.652e-3), (19937, 198742, 1987858, 2.530e-3),
    (39888, 206837, 1072202, 1.791e-3), (79730, 197063, 488667, 1.715e-3),
)  # fmt: skip
"""Rows, entries of A, scalar products, and OuterSPACE's published seconds, of uniform random matrices."""


# ViTCoD


def deit(share: str = "") -> list[vitcod.Layer]:
    """The layers of DeiT-Tiny: as released, `dense` without pruning, or `pruned` without reordering."""
    layers = [vitcod.Layer(dense, sparse, 197, 3, 64) for dense, sparse in DEIT_TINY]
    if share == "dense":
        return [replace(layer, globals=197, sparse=0) for layer in layers]
    if share == "pruned":
        return [replace(layer, globals=0, sparse=layer.sparse + 197 * layer.globals) for layer in layers]
    return layers


def vitcod_golden(machine: Accelerator, part: str) -> float:
    """Cycles of a part, or of all."""
    report = reported(vitcod.attention(deit(), machine), machine)
    if part == "products":
        return report.parts["scores"] + report.parts["values"]
    return report.cycles if part == "total" else report.parts[part]


def vitcod_ffn(machine: Accelerator, tokens: int, width: int, head: int, heads: int, layers: int) -> float:
    """Cycles of projections and MLPs."""
    return vitcod.feed_forward(tokens, width, head, heads, layers, machine)


def vitcod_ratio(machine: Accelerator, without: str) -> float:
    """How many times more cycles it takes without pruning, or without reordering."""
    other, own = (cycles(vitcod.attention(deit(which), machine), machine) for which in (without, ""))
    return other / own


def vitcod_against(machine: Accelerator, seconds: float, scale: float = 1.0) -> float:
    """Speed-up over a measured time, the machine scaled up so many times."""
    return seconds * scale / reported(vitcod.attention(deit(), machine), machine).seconds


# Sanger


def sanger_layer(machine: Accelerator, density: float, share: float, tokens: int) -> float:
    """Milliseconds of a layer of 768 numbers."""
    return 1e3 * sum(sanger.released(density, share, tokens, 768, machine).values())


def sanger_rate(machine: Accelerator, density: float, tokens: int, per: float = 1.0) -> float:
    """Effective GOP/s of 128 multipliers at 1 GHz on a mask that keeps keys by chance, over another's."""
    share = sanger.drawn(density, tokens, machine.count("segment"), machine.array.columns)
    return sanger.effective(density, share, 128) / per


def sanger_ablation(machine: Accelerator, step: str, density: float, tokens: int) -> float:
    """What a step of the design brings, on a mask that keeps keys by chance, by cycles of its arrays.

    Args:
        step: predict (what it costs, as a share of dense products), stationary, packed, or all of them.
    """
    mask = np.random.default_rng(0).random((12, tokens, tokens)) < density
    trace, side = AttentionTrace.of(mask, head_width=64), machine.count("segment")
    dense = 2 * mask.size * 64 / machine.array.macs
    predicting = sanger.prediction(trace, side)
    stationary = sanger.unpacked(trace, side, machine.array.columns) * 2 * 64
    packed = sanger.rounds(trace, machine) * 2 * 64
    return {"predict": predicting / dense, "stationary": (dense + predicting) / stationary,
            "packed": stationary / packed, "all": dense / packed}[step]  # fmt: skip


# SpAtten


def spatten_layer(machine: Accelerator, tokens: int, heads: int) -> float:
    """Cycles of a layer without pruning."""
    return simulate([AttentionTrace.dense(heads, tokens, tokens, 64)], machine).cycles


# OuterSPACE


def outerspace_traffic(machine: Accelerator, products: int, least: int) -> float:
    """Bytes of partial products over those of A, B and C."""
    return 2 * outerspace.ENTRY * products / least


def outerspace_time(machine: Accelerator, case: int, left_out: bool) -> float:
    """Milliseconds of a uniform matrix by waiting that was fitted on all, or on the others."""
    rows, entries, products, seconds = (np.array(column) for column in zip(*UNIFORM, strict=True))
    others = np.arange(len(UNIFORM)) != case
    if not left_out:
        by = [machine.setting(f"{name}_ns") * 1e-9 for name in ("product", "element", "row")]
    else:
        by = outerspace.fit(rows[others], entries[others], products[others], seconds[others])
    return 1e3 * float(by[0] * products[case] + by[1] * entries[case] + by[2] * rows[case])


def outerspace_schedule(machine: Accelerator, case: int) -> float:
    """Milliseconds of a uniform matrix by schedules of its tasks and by bandwidth."""
    rows, entries, products, _ = UNIFORM[case]
    counts = [np.random.default_rng(seed).multinomial(entries, np.full(rows, 1 / rows)) for seed in (0, 1)]
    nonzeros = round(-math.expm1(-products / rows**2) * rows**2)
    trace = ProductTrace(left=counts[0], right=counts[1], ways=counts[0], merged=counts[0] * products // entries,
                         nonzeros=nonzeros)  # fmt: skip
    return 1e3 * simulate([trace], machine).seconds


# FlashAttention and 2:4


def attention_bytes(machine: Accelerator, tokens: int, width: int, heads: int, tiled: bool) -> float:
    """GB of attention forward and backward, in half precision."""
    fits = machine.buffer("sram").bytes // 2 if tiled else 0
    numbers = (gpu.flash_numbers(tokens, width, fits, backward=True) if tiled
               else gpu.standard_numbers(tokens, width, backward=True, dropout=True))  # fmt: skip
    return 2e-9 * heads * numbers


def attention_time(machine: Accelerator, tokens: int, width: int, heads: int, tiled: bool,
                   standard: float = 0.0) -> float:  # fmt: skip
    """Milliseconds of the same: two products forward and four backward, or five with tiles, and the traffic.

    Args:
        standard: milliseconds that attention without tiles was measured to take; its share of the roofline is then
            taken for this one.
    """
    seconds = attention_bytes(machine, tokens, width, heads, tiled) * 1e9 / machine.memory.bandwidth
    macs = (7 if tiled else 6) * heads * tokens * tokens * width
    roofline = 1e3 * max(seconds, macs / machine.rate(ARRAY) / machine.clock)
    return roofline * standard / attention_time(machine, tokens, width, heads, False) if standard else roofline


def storage(machine: Accelerator, bits: int) -> float:
    """Bits of a matrix with 2 of every 4 numbers, over those of all numbers."""
    matrix = MatmulTrace(rows=1, inner=64, columns=64, bits=bits, two_four=True)
    return matrix.weight_bits() / replace(matrix, two_four=False).weight_bits()


def two_four_mlp(machine: Accelerator, rows: int, width: int, hidden: int) -> float:
    """Speed-up of an MLP forward and backward: products by the weights are sparse, their gradients' are not."""

    def seconds(sparse: bool) -> float:
        by_weights = [MatmulTrace(rows=rows, inner=a, columns=b, two_four=sparse, count=2)
                      for a, b in ((width, hidden), (hidden, width))]  # fmt: skip
        gradients = [MatmulTrace(rows=width, inner=rows, columns=hidden, count=2)]
        return simulate([*by_weights, *gradients], machine).seconds

    return seconds(False) / seconds(True)


def gemm(machine: Accelerator, rows: int, inner: int, columns: int) -> float:
    """Cycles of a dense product."""
    return matmul.systolic_cycles(MatmulTrace(rows=rows, inner=inner, columns=columns), machine)


# A3, ELSA, DOTA


def attended(machine: Accelerator, kept: float, tokens: int = 512, heads: int = 16) -> Report:
    """Attention of a layer in single precision whose queries keep a share of keys, drawn by chance."""
    made = (AttentionTrace.dense(heads, tokens, tokens, 64) if kept == 1
            else AttentionTrace.random(heads, tokens, tokens, 64, kept))  # fmt: skip
    return simulate([replace(made, bits=32)], machine)


def times(machine: Accelerator, over: str, kept: float, tokens: int = 512, heads: int = 12, over_kept: float = 1.0,
          factor: float = 1.0) -> float:  # fmt: skip
    """Speed-up over another machine; 12 heads are one for each of twelve ELSAs."""
    other = attended(accelerator(over), over_kept, tokens, heads)
    return factor * attended(machine, kept, tokens, heads).speedup(other)


def efficiency(bars: Sequence[float], tokens: int = 512, heads: int = 12) -> float:
    """Share of a V100's roofline that its kernels got, from the speed-ups of ELSA without approximation over it."""
    mean = math.prod(bars) ** (1 / len(bars))
    return times(accelerator("elsa_base"), "v100", 1.0, tokens, heads) / mean


def over_gpu(machine: Accelerator, kept: float, bars: Sequence[float], tokens: int = 512, heads: int = 12) -> float:
    """Speed-up over a V100 whose efficiency is fitted on speed-ups of ELSA without approximation."""
    fast = times(machine, "v100", kept, tokens, heads)
    return fast / efficiency(bars, tokens, heads)


def energy_over_gpu(machine: Accelerator, kept: float, bars: Sequence[float], watts: float) -> float:
    """How many times less energy than such a V100 of so many watts, by published powers."""
    assert machine.power is not None
    return over_gpu(machine, kept, bars) * watts / machine.power.value


MODELS: Final[dict[str, Callable[..., Any]]] = {
    f.__name__: f
    for f in (vitcod_golden, vitcod_ffn, vitcod_ratio, vitcod_against, sanger_layer, sanger_rate, sanger_ablation,
              spatten_layer, outerspace_traffic,
              outerspace_time, outerspace_schedule, attention_bytes, attention_time, storage, two_four_mlp, gemm, times,
              over_gpu, energy_over_gpu)
}  # fmt: skip
"""Functions that references name."""
