"""A chain of blocks as schedules see it, a schedule, and what following one costs and holds.

    x_0 -> block 0 -> x_1 -> block 1 -> ... -> x_L

The backward pass of block l needs what its forward pass kept, its pack. A pack that was dropped is made again by
running the block from its input x_l; an input that was dropped, by running the block before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """What one block of a chain costs and holds. Bytes but the input's are on top of the input."""

    cost: float
    """Of its forward pass, in units of an operation."""
    again: float
    """Of running it until its pack is whole, which needs no output."""
    input: int
    """Bytes of its input."""
    pack: int
    """Bytes that it keeps for the backward pass."""
    full: int
    """Most bytes while it runs: the pack, the output, and what it holds only in between."""


@dataclass(frozen=True)
class Step:
    """One run of a block."""

    block: int
    pack: bool
    """Whether its pack is kept."""
    output: bool
    """Whether its output is held until the next block's backward pass, or may go when the next block has run."""


@dataclass(frozen=True)
class Schedule:
    """Which blocks run when. Row `before[l]` runs before the backward pass of block l and ends with it, or is empty."""

    forward: tuple[Step, ...]
    before: tuple[tuple[Step, ...], ...]


def everything(pieces: Sequence[Piece]) -> int:
    """Bytes that a chain holds when nothing is dropped."""
    return sum(p.input + p.pack for p in pieces)


def plain(length: int) -> Schedule:
    """Keep everything."""
    return Schedule(tuple(Step(i, True, True) for i in range(length)), ((),) * length)


def segments(length: int, size: int) -> Schedule:
    """Keep the input of every segment of so many blocks, and run a segment again as a whole."""
    forward = tuple(Step(i, False, (i + 1) % size == 0) for i in range(length))
    before: list[tuple[Step, ...]] = [()] * length
    for start in range(0, length, size):
        end = min(start + size, length)
        before[end - 1] = tuple(Step(i, True, i < end - 1) for i in range(start, end))
    return Schedule(forward, tuple(before))


def every(length: int, step: int) -> Schedule:
    """Run every so-many-th block again, from the first, and keep all of the others."""
    chosen = [i % step == 0 for i in range(length)]
    return Schedule(
        tuple(Step(i, not again, True) for i, again in enumerate(chosen)),
        tuple((Step(i, True, False),) if again else () for i, again in enumerate(chosen)),
    )


def best_segment(pieces: Sequence[Piece]) -> int:
    """Blocks a segment at which the least is held: about sqrt(L input / (input + pack)), at least 1.

    L / g inputs wait while one segment's g packs are there. A block's pack is many times its input (16 times for a
    Transformer's), so that segments of sqrt(L) blocks hold far more than the least.
    """
    count = len(pieces)
    return min(range(1, count + 1), key=lambda size: simulate(pieces, segments(count, size))[0])


def simulate(pieces: Sequence[Piece], schedule: Schedule) -> tuple[int, float]:
    """(most bytes held, cost of all that runs beyond one forward pass) of a schedule.

    Raises:
        ValueError: if a block would run without its input, or go backward without its pack.
    """
    walk = Walk(pieces)
    walk.row(schedule.forward)
    extra = sum(p.cost for p in pieces)
    for block in reversed(range(len(pieces))):
        walk.row(schedule.before[block], last=block)
        walk.backward(block)
    return walk.most, walk.cost - extra


class Walk:
    """The state of a simulated schedule."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces, self.most, self.cost = pieces, 0, 0.0
        self.inputs, self.packs = {0}, set[int]()

    def row(self, steps: Sequence[Step], last: int = -1) -> None:
        """Run the steps; the input of each is held, or the output of the one before."""
        current = -1
        for step in steps:
            block, piece = step.block, self.pieces[step.block]
            if block not in self.inputs and block != current:
                raise ValueError(f"block {block} runs without its input.")
            held = self.held() + (0 if block in self.inputs else piece.input)
            self.most = max(self.most, held + piece.full)
            self.cost += piece.again if block == last else piece.cost
            if step.pack:
                # A pack holds the input, which is among what a block's first operators keep.
                self.packs.add(block)
                self.inputs.add(block)
            current = block + 1
            if step.output and current < len(self.pieces):
                self.inputs.add(current)

    def backward(self, block: int) -> None:
        """Use a pack up."""
        if block not in self.packs:
            raise ValueError(f"block {block} goes backward without its pack.")
        self.packs.discard(block)
        self.inputs.discard(block)

    def held(self) -> int:
        """Bytes between two runs."""
        return sum(self.pieces[i].input for i in self.inputs) + sum(self.pieces[i].pack for i in self.packs)
