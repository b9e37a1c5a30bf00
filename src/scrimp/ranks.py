# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Plans of many devices: a process group that only pretends, and what its collectives would send.

Of N ranks each sends, for a tensor of S bytes in all:

    all-reduce 2 (N - 1) / N S        all-gather, reduce-scatter, all-to-all (N - 1) / N S        others S

Time is volume over the link's speed, without overlap with computation.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from scrimp.errors import UserError

if TYPE_CHECKING:
    from scrimp.trace import Op


@contextmanager
def pretended(ranks: int) -> Generator[None]:
    """A process group of so many ranks of which only this one exists; nothing is sent.

    Raises:
        UserError: inside a real process group.
    """
    if ranks == 1:
        yield
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("a process group is running already.", "--ranks", "Plan outside of torchrun.")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sent(ops: Sequence[Op], ranks: int) -> int:
    """Bytes that each rank sends in a step."""
    found = [op for op in ops if op.name.startswith(("c10d.", "_c10d_functional."))] if ranks > 1 else []
    return int(sum(volume(op, ranks) for op in found))


def volume(op: Op, ranks: int) -> float:
    """Bytes that each rank sends for one collective."""
    size = max(op.read, op.written)
    if "allreduce" in op.name or "all_reduce" in op.name:
        return 2 * (ranks - 1) / ranks * size
    if any(word in op.name for word in ("gather", "scatter", "alltoall", "all_to_all")):
        return (ranks - 1) / ranks * size
    return 0.0 if any(word in op.name for word in ("wait", "barrier", "recv")) else float(size)
