# pyright: reportPrivateImportUsage=false
"""Tensors of many parameters, a cache's worth at a time: how update rules stay fast without copies of whole weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, Final

import torch
from torch import Tensor

from scrimp.sharding import sharded, whole

CHUNK: Final = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Weights updated together: few enough for a core's cache, enough to fill a GPU. Bounds the transient copy."""


def chunks(rows: Sequence[tuple[Tensor, ...]]) -> Iterator[list[list[Tensor]]]:
    """(weight, gradient, states ...) of each parameter -> the same as lists of about `CHUNK` weights at a time.

    Tensors of a row have the weight's shape, or no dimension: such a scalar goes with every piece of its parameter.
    """
    chunk: list[tuple[Tensor, ...]] = []
    size = 0
    for row in rows:
        limit = CHUNK.get(row[0].device.type, CHUNK["cuda"])
        for piece in _pieces(row, limit):
            if chunk and size + piece[0].numel() > limit:
                yield [list(tensors) for tensors in zip(*chunk, strict=True)]
                chunk, size = [], 0
            chunk.append(piece)
            size += piece[0].numel()
    if chunk:
        yield [list(tensors) for tensors in zip(*chunk, strict=True)]


def _pieces(row: tuple[Tensor, ...], limit: int) -> Iterator[tuple[Tensor, ...]]:
    """Rows of a large parameter, as views. A sharded one stays whole: its rows lie on other machines."""
    weight = row[0]
    if weight.numel() <= limit or sharded(weight):
        return iter([row])
    lines = max(1, limit * weight.shape[0] // weight.numel())
    count = -(-weight.shape[0] // lines)
    return zip(*(tensor.split(lines) if tensor.ndim else (tensor,) * count for tensor in row), strict=True)


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each tensor, a scalar in at least float32; of a sharded tensor over all its shards."""
    if not tensors:
        return []
    wide = reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    found: Sequence[Any] = torch._foreach_norm(list(tensors), 2.0, dtype=wide)
    return [whole(norm) for norm in found]
