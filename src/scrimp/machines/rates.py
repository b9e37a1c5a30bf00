# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What `scrimp probe` measured, and how long an operator takes by it.

    product:     seconds = FLOPs / rate(m, n, k, layout, dtype)
    attention:   seconds = FLOPs / rate(T, D, direction, dtype)
    all others:  seconds = bytes moved / rate(family, bytes)
    and for each: + bytes of fresh large blocks / rate(size) + overhead

Rates are interpolated between the points of the probe, in logarithms; outside of them the nearest point counts.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from scrimp.ops import Op

FAMILIES: Final[dict[str, str]] = {
    "aten.gelu": "gelu", "aten.gelu_backward": "gelu_backward",
    "aten.exp": "exp", "aten.silu": "exp", "aten.silu_backward": "exp", "aten.sigmoid": "exp", "aten.tanh": "exp",
    "aten.log": "exp", "aten.softmax": "softmax", "aten._softmax": "softmax", "aten._log_softmax": "softmax",
    "aten._softmax_backward_data": "softmax", "aten._log_softmax_backward_data": "softmax",
    "aten.native_layer_norm": "norm", "aten.native_layer_norm_backward": "norm_backward",
    "aten._fused_rms_norm": "norm", "aten._fused_rms_norm_backward": "norm_backward",
    "aten.embedding": "gather", "aten.index_select": "gather", "aten.gather": "gather",
    "aten.embedding_dense_backward": "scatter", "aten.scatter_add": "scatter", "aten.index_put": "scatter",
    "aten.nll_loss_forward": "gather", "aten.nll_loss_backward": "fill",
    "aten.sum": "reduce", "aten.mean": "reduce", "aten.amax": "reduce", "aten.linalg_vector_norm": "reduce",
    "aten._foreach_norm": "reduce", "aten.cat": "copy", "aten.clone": "copy", "aten.copy": "copy",
    "aten._to_copy": "cast", "aten.pow": "exp", "aten._fused_adamw": "update", "aten._fused_adam": "update",
    "aten.zeros": "fill", "aten.zeros_like": "fill", "aten.fill": "fill", "aten.zero": "fill", "aten.ones": "fill",
    "aten.new_zeros": "fill", "aten.full": "fill", "aten.new_full": "fill", "aten._foreach_zero": "fill",
}  # fmt: skip
"""Which measured family an operator belongs to; all others are elementwise."""
OWN: Final = frozenset({"norm", "norm_backward", "scatter"})
"""Families that were measured with fresh outputs; attention was too."""
LARGE: Final = 1 << 20
"""Bytes from which the C library asks the system for a block, whose pages are then fresh."""


@dataclass(frozen=True)
class Rates:
    """Measured rates of one machine."""

    machine: dict[str, Any]
    """What was measured on: processor, cores, threads, torch."""
    products: list[tuple[str, str, int, int, int, float]]
    """(dtype, layout, m, n, k, FLOP/s)."""
    attention: list[tuple[str, str, int, int, float]]
    """(dtype, forward or backward, T, D, FLOP/s)."""
    stream: list[tuple[str, int, float]]
    """(family, bytes moved, bytes/s)."""
    fresh: list[tuple[int, float]]
    """(bytes of a block, bytes/s at which its pages are touched for the first time)."""
    overhead: float
    """Seconds per operator."""
    step: float
    """Seconds a step takes besides: its batch, its record."""
    resident: int
    """Bytes that a process holds before it has a model."""
    factor: float = 1.0
    """By how much a step takes longer than its operators one by one."""

    @classmethod
    def read(cls, path: Path) -> Rates | None:
        """From a file, or None if it holds none."""
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            known = {f.name for f in fields(cls)}
            values: dict[str, Any] = {
                k: [tuple(row) for row in v] if isinstance(v, list) else v for k, v in raw.items()
            }
            return cls(**values) if set(values) == known else None
        except (OSError, ValueError, TypeError):
            return None

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=0)

    def flops(self) -> dict[str, float]:
        """dtype -> the best rate of a product."""
        best: dict[str, float] = {}
        for dtype, _, _, _, _, rate in self.products:
            best[dtype] = max(best.get(dtype, 0.0), rate)
        return best

    def bandwidth(self) -> float:
        """Bytes/s of large elementwise operators."""
        return max((size, rate) for family, size, rate in self.stream if family == "elementwise")[1]

    def seconds(self, op: Op) -> float:
        """How long an operator takes."""
        time = self.overhead
        family = FAMILIES.get(op.name, "elementwise")
        if op.fresh >= LARGE and self.fresh and family not in OWN and "attention" not in op.name:
            time += op.fresh / interpolated({(size,): rate for size, rate in self.fresh}, (op.fresh,))
        dtype = str(op.dtype).removeprefix("torch.")
        if op.flops and "attention" in op.name:
            return time + op.flops / self._attention(op, dtype)
        if op.flops and op.layout:
            return time + op.flops / self._product(op, dtype)
        moved = op.read + op.written
        streamed = moved / self._stream(family, moved) if moved else 0.0
        # Other products, such as convolutions, were not measured: at best they run as a large matrix product does.
        best = self.flops()
        return time + max(streamed, op.flops / (best.get(dtype) or best["float32"]))

    def _product(self, op: Op, dtype: str) -> float:
        batch, m, n, k = op.shape
        layout = op.layout
        known = {(d, lay) for d, lay in self._grids}
        if (dtype, layout) not in known:
            layout = "nn"
        grid = self._grids.get((dtype, layout)) or self._grids[("float32", "nn")]
        # A batch of small products runs as many at once as there are cores: as one with so many more rows.
        return interpolated(grid, (m * min(batch, 64) if batch > 1 else m, n, k))

    def _attention(self, op: Op, dtype: str) -> float:
        direction = "backward" if "backward" in op.name else "forward"
        grid = self._heads.get((dtype, direction)) or self._heads[("float32", direction)]
        return interpolated(grid, (op.shape[1], op.shape[3]))

    def _stream(self, family: str, moved: int) -> float:
        return interpolated(self._lines.get(family) or self._lines["elementwise"], (moved,))

    @cached_property
    def _grids(self) -> dict[tuple[str, str], dict[tuple[int, ...], float]]:
        grids: dict[tuple[str, str], dict[tuple[int, ...], float]] = {}
        for dtype, layout, m, n, k, rate in self.products:
            grids.setdefault((dtype, layout), {})[(m, n, k)] = rate
        return grids

    @cached_property
    def _heads(self) -> dict[tuple[str, str], dict[tuple[int, ...], float]]:
        grids: dict[tuple[str, str], dict[tuple[int, ...], float]] = {}
        for dtype, direction, tokens, width, rate in self.attention:
            grids.setdefault((dtype, direction), {})[(tokens, width)] = rate
        return grids

    @cached_property
    def _lines(self) -> dict[str, dict[tuple[int, ...], float]]:
        lines: dict[str, dict[tuple[int, ...], float]] = {}
        for family, size, rate in self.stream:
            lines.setdefault(family, {})[(size,)] = rate
        return lines


def interpolated(grid: Mapping[tuple[int, ...], float], point: Sequence[float]) -> float:
    """A value between the points of a full grid: multilinear in logarithms; outside it the nearest edge counts."""
    weights: list[list[tuple[int, float]]] = []
    for axis, value in enumerate(point):
        ticks = sorted({key[axis] for key in grid})
        value = min(max(value, ticks[0]), ticks[-1])
        high = min(bisect_left(ticks, value), len(ticks) - 1)
        low = max(high - 1, 0)
        span = math.log(ticks[high] / ticks[low]) if high != low else 1.0
        share = math.log(value / ticks[low]) / span if high != low else 0.0
        weights.append([(ticks[low], 1 - share), (ticks[high], share)])
    total = 0.0
    for corner in product(*weights):
        weight = math.prod(w for _, w in corner)
        if weight:
            total += weight * math.log(grid[tuple(tick for tick, _ in corner)])
    return math.exp(total)
