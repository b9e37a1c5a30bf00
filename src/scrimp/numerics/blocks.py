# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Groups of numbers in few bits, each group with a scale and a least value of its own.

    q = r((x - low) / scale),   x' = low + scale q,   q in 0 .. 2^bits - 1,   r: stochastic rounding

    bytes a number:  bits / 8 + 4 / group          scale and low are bfloat16

Scale and low are rounded to what is stored before anything is divided by them: with other values on the way back the
result would be wrong on average. Both are rounded outwards, so that every number lies inside the grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from scrimp.numerics.packing import packed, unpacked
from scrimp.numerics.rounding import noise

GROUP: Final = 256
"""Numbers that share a scale."""
PIECE: Final = 1 << 16
"""Least numbers treated at once, and at most `PIECES` times: bounds the transient copies."""
PIECES: Final = 16
LEAST: Final = 2.0**-120
"""Scales below it are 0: their inverse would not be finite."""


@dataclass(frozen=True)
class Grid:
    """How a tensor was quantized."""

    bits: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int = GROUP

    @property
    def count(self) -> int:
        """Numbers of the tensor."""
        size = 1
        for n in self.shape:
            size *= n
        return size


@torch.no_grad()
def quantize(x: Tensor, bits: int, key: Tensor | int, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor, Grid]:
    """(codes, scales, lows, grid) of a tensor.

    Shapes: with n groups, the last one filled up: codes uint8 [n, group bits / 8], scales and lows bfloat16 [n].

    Args:
        bits: 1, 2, 4 or 8.
        key: of the rounding.
    """
    flat = x.detach().reshape(-1)
    groups = -(-flat.numel() // group)
    codes = torch.empty(groups, group * bits // 8, dtype=torch.uint8, device=x.device)
    scales = torch.empty(groups, dtype=torch.bfloat16, device=x.device)
    lows = torch.empty_like(scales)
    for begin, end in _pieces(groups, group):
        rows = _rows(flat, begin, end, group)
        least, most = rows.aminmax(dim=1)
        low = (least - least.abs() * 2.0**-8).to(torch.bfloat16)
        step = ((most - low.to(rows.dtype)) * ((1 + 2.0**-7) / (2**bits - 1))).to(torch.bfloat16)
        step = torch.where(step < LEAST, 0.0, step)
        wide = step.to(rows.dtype)
        inverse = torch.where(wide == 0, 0.0, 1 / wide)
        q = (rows - low.to(rows.dtype)[:, None]).mul_(inverse[:, None])
        q.add_(noise(q.numel(), key, x.device, begin * group).view(q.shape)).floor_().clamp_(0, 2**bits - 1)
        codes[begin:end] = packed(q.to(torch.uint8), bits)
        scales[begin:end], lows[begin:end] = step, low
    return codes, scales, lows, Grid(bits, tuple(x.shape), x.dtype, group)


@torch.no_grad()
def dequantize(codes: Tensor, scales: Tensor, lows: Tensor, grid: Grid) -> Tensor:
    """The tensor again, contiguous, with each number on its group's grid."""
    out = torch.empty(len(codes) * grid.group, dtype=grid.dtype, device=codes.device)
    wide = torch.promote_types(grid.dtype, torch.float32)
    for begin, end in _pieces(len(codes), grid.group):
        x = unpacked(codes[begin:end], grid.bits).to(wide)
        x.mul_(scales[begin:end, None].to(wide)).add_(lows[begin:end, None].to(wide))
        out[begin * grid.group : end * grid.group] = x.view(-1)
    out = out[: grid.count]
    # The graph may hold the result: what only filled up the last group must not stay with it.
    return (out if out.numel() == len(codes) * grid.group else out.clone()).view(grid.shape)


def stored_bytes(count: int, bits: int, group: int = GROUP) -> int:
    """Bytes of so many numbers."""
    groups = -(-count // group)
    return groups * (group * bits // 8 + 4)


def _pieces(groups: int, group: int) -> Iterator[tuple[int, int]]:
    """Ranges of groups that are treated at once."""
    size = max(1, PIECE // group, -(-groups // PIECES))
    for begin in range(0, groups, size):
        yield begin, min(begin + size, groups)


def _rows(flat: Tensor, begin: int, end: int, group: int) -> Tensor:
    """Groups in at least float32: [end - begin, group]; the last one is filled up with the last number."""
    piece = flat[begin * group : end * group]
    missing = (end - begin) * group - piece.numel()
    if missing:
        piece = torch.cat([piece, piece[-1:].expand(missing)])
    return piece.to(torch.promote_types(flat.dtype, torch.float32)).view(-1, group)
