# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""From live bytes to what the system sees: resident memory of a process, and the segments of CUDA's caching allocator.

CPU. With the thresholds of `scrimp.allocator` freed blocks go back at once, so that a process holds what is live, what
it held before there was a model, and a little that is lost between blocks.

CUDA. torch asks the driver for segments and cuts them: blocks up to 1 MiB come from segments of 2 MiB, larger ones from
20 MiB, and those of 10 MiB or more get segments of their own in steps of 2 MiB. `reserved` replays every allocation of
a trace through these rules. The context and cuBLAS take more, which is not torch's.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

import torch

from scrimp.allocator import can_be_lean
from scrimp.ops import Op
from scrimp.trace import Block

MIB: Final = 1 << 20
RESIDENT: Final = 340 * MIB
"""Bytes a process holds before it has a model, where nobody probed: the interpreter, torch, the tokenizer."""
LOST: Final = 0.02
"""Share of live bytes that is lost between blocks on a CPU."""
LOST_IN_HEAPS: Final = 0.33
"""The same where the C library keeps freed blocks: the most that was measured of glibc's own thresholds."""
CONTEXT: Final = 600 * MIB
"""Bytes that a CUDA context and cuBLAS's workspace take on a data-center GPU; a guess, and a plan says so."""


def resident(live: int, before: int | None = None) -> int:
    """Bytes that a process on a CPU will hold.

    Args:
        live: bytes of live tensors.
        before: what it held without them.
    """
    return (RESIDENT if before is None else before) + int(live * (1 + (LOST if can_be_lean() else LOST_IN_HEAPS)))


def on_cuda(size: int, op: Op | None, output: int) -> int:
    """What a storage that fake tensors of the CPU made would take on CUDA, where kernels keep other things.

    LayerNorm keeps statistics in float32. Attention in float32 with fewer heads of keys than of queries, and all of it
    in float64, has no fused kernel there: the weights [B * H, T, S] and copies of keys and values are kept.
    """
    if (
        op is not None
        and op.name == "aten.native_layer_norm"
        and output
        and op.dtype in (torch.bfloat16, torch.float16)
    ):
        size *= 2
    if op is not None and op.name.endswith("flash_attention_for_cpu") and output == 1:
        item = torch.finfo(op.dtype).bits // 8
        if op.dtype == torch.float64 or (op.dtype == torch.float32 and op.grouped):
            rows, tokens, keys, width = op.shape
            size += item * rows * keys * (tokens + 2 * width)
    return rounded(size, op, output)


def rounded(size: int, op: Op | None, output: int) -> int:
    """Bytes that CUDA's allocator gives for so many."""
    return -(-size // 512) * 512


def reserved(blocks: list[Block]) -> tuple[int, int]:
    """(most bytes of segments in use, bytes reserved) of CUDA's allocator while these blocks lived and died.

    Empty segments stay reserved until memory runs out; then torch gives them back. What a run needs are those in use.
    """
    events = sorted([(b.born, True, i) for i, b in enumerate(blocks)]
                    + [(b.died, False, i) for i, b in enumerate(blocks) if b.died >= 0])  # fmt: skip
    cache = CachingAllocator()
    for _, born, i in events:
        if born and blocks[i].size:
            cache.take(i, blocks[i].size)
        elif not born and blocks[i].size:
            cache.give(i)
    return cache.most, cache.reserved


class CachingAllocator:
    """torch's caching allocator, without streams: blocks are cut from segments and merged with free neighbors.

    Attributes:
        reserved: bytes of all segments.
        most: the most bytes of segments that held something at one time.
    """

    def __init__(self) -> None:
        self.reserved = self.most = 0
        self._used = self._next = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        """Small or large -> (size, address) of free blocks, the smallest first."""
        self._taken: dict[int, tuple[bool, int, int]] = {}
        """key -> (small, address, size)."""
        self._ends: dict[int, tuple[int, int]] = {}
        """End of a free block -> its (size, address), to merge neighbors."""
        self._starts: dict[int, tuple[int, int]] = {}
        self._segments: dict[int, int] = {}
        """Address of a segment -> its size."""

    def take(self, key: int, size: int) -> None:
        """Allocate under a key."""
        size = -(-size // 512) * 512
        small = size <= MIB
        free = self._free[small]
        at = bisect_left(free, (size, -1))
        if at < len(free):
            found, address = free[at]
            self._remove(small, found, address)
        else:
            found = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            # Segments are apart, so that blocks of two never merge.
            address = self._next = self._next + 1
            self._next = address + found
            self._segments[address] = found
            self.reserved += found
        self._used += found if self._segments.get(address) == found else 0
        self.most = max(self.most, self._used)
        rest = found - size
        if rest >= 512 if small else rest > MIB:
            self._insert(small, rest, address + size)
            found = size
        self._taken[key] = (small, address, found)

    def give(self, key: int) -> None:
        """Free; neighbors that are free become one block, and a segment that is one block is empty."""
        small, address, size = self._taken.pop(key)
        before, after = self._ends.get(address), self._starts.get(address + size)
        if before is not None:
            self._remove(small, *before)
            address, size = before[1], size + before[0]
        if after is not None:
            self._remove(small, *after)
            size += after[0]
        self._insert(small, size, address)
        self._used -= size if self._segments.get(address) == size else 0

    def _insert(self, small: bool, size: int, address: int) -> None:
        insort(self._free[small], (size, address))
        self._starts[address] = self._ends[address + size] = (size, address)

    def _remove(self, small: bool, size: int, address: int) -> None:
        free = self._free[small]
        del free[bisect_left(free, (size, address))]
        del self._starts[address], self._ends[address + size]
