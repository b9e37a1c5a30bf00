# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Plans of many devices: a process group that only pretends, and what its collectives would send.

Of N ranks each sends, for a tensor of S bytes in all:

    all-reduce 2 (N - 1) / N S        all-gather, reduce-scatter, all-to-all (N - 1) / N S        others S

where N are the ranks of the collective's group. Time is volume over the speed of the links between them, without
overlap with computation.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from scrimp.errors import UserError

if TYPE_CHECKING:
    from scrimp.machines.machine import Machine
    from scrimp.ops import Op


@contextmanager
def pretended(ranks: int, rank: int = 0) -> Generator[None]:
    """A process group of so many ranks of which only one exists; nothing is sent.

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
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sent(ops: Sequence[Op]) -> int:
    """Bytes that each rank sends in a step."""
    return int(sum(volume(op) for op in ops))


def sending(ops: Sequence[Op], on: Machine) -> float:
    """Seconds that a rank sends in a step; links whose speed is not known take none."""
    moved = [(volume(op), on.speed(op.peers, op.stride, alone=op.name.endswith(".send"))) for op in ops if op.peers > 1]
    return sum(size / speed for size, speed in moved if speed)


def volume(op: Op) -> float:
    """Bytes that each rank sends for one collective."""
    size, others = max(op.read, op.written), (op.peers - 1) / op.peers
    if "allreduce" in op.name or "all_reduce" in op.name:
        return 2 * others * size
    if any(word in op.name for word in ("gather", "scatter", "alltoall", "all_to_all")):
        return others * size
    unsent = any(word in op.name for word in ("wait", "barrier", "recv"))
    return 0.0 if op.peers == 1 or unsent else float(size)


def links(on: Machine, ranks: int) -> list[str]:
    """What is not known of the links that so many ranks send over: sentences."""
    free = "communication takes no time in this plan."
    if ranks == 1:
        return []
    if not on.link:
        return [f"The speed of the links of `{on.name}` is not known: {free}"]
    if not on.node:
        return [f"How many {on.name} a machine holds is not known: links are taken to be those inside of one."]
    if ranks > on.node and not on.network:
        return [f"The speed of the links between machines of `{on.name}` is not known: there {free}"]
    return []
