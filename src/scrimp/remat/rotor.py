"""The cheapest schedule of a chain within a budget of bytes, by dynamic programming.

    C(i, k, m): least cost of running blocks i..k and going back through them, with x_i held and m bytes beside it

    C(i, i, m) = again_i                                                        if m >= full_i
    C(i, k, m) = least of  cost_i + C(i+1, k, m - pack_i - x_{i+1})             keep the pack of i
                           cost_i + .. + cost_{j-1} + C(j, k, m - x_j) + C(i, j-1, m)   hold x_j, start again from x_i

Paper: Herrmann et al., "Optimal checkpointing for heterogeneous chains", arXiv 1911.13214. On a chain of equal blocks
of which one pack fits, the second line is the binomial checkpointing of Griewank and Walther.

m counts slots of budget / 1000 bytes. What a block needs is rounded up, so that a schedule never exceeds the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scrimp.remat.chain import Piece, Schedule, Step

SLOTS = 1000


def optimal(pieces: Sequence[Piece], budget: int, slots: int = SLOTS) -> Schedule | None:
    """The cheapest schedule that holds at most `budget` bytes, x_0 included; None where none does."""
    room = budget - pieces[0].input
    if room <= 0:
        return None
    table = Table(pieces, room, slots)
    if not np.isfinite(table.cost[0, len(pieces) - 1][-1]):
        return None
    return table.schedule()


def least(pieces: Sequence[Piece], slots: int = SLOTS) -> int:
    """The smallest budget that suffices, up to rounding."""
    top = 2 * sum(p.input + p.full for p in pieces)
    room = top - pieces[0].input
    table = Table(pieces, room, slots)
    first = int(np.argmax(np.isfinite(table.cost[0, len(pieces) - 1])))
    return pieces[0].input + first * table.size


class Table:
    """C(i, k, m) and the choice behind each entry.

    Args:
        room: bytes beside x_0.
        slots: into how many they are divided, at most.
    """

    def __init__(self, pieces: Sequence[Piece], room: int, slots: int) -> None:
        self.pieces, self.size = pieces, -(-room // slots)
        self.slots = room // self.size
        self.cost: dict[tuple[int, int], np.ndarray] = {}
        self.choice: dict[tuple[int, int], np.ndarray] = {}
        for length in range(len(pieces)):
            for i in range(len(pieces) - length):
                self._fill(i, i + length)

    def _fill(self, i: int, k: int) -> None:
        p, m = self.pieces, np.arange(self.slots + 1)
        if i == k:
            self.cost[i, k] = np.where(m >= self._up(p[i].full), p[i].again, np.inf)
            self.choice[i, k] = np.zeros(len(m), np.int16)
            return
        best = p[i].cost + self._less(self.cost[i + 1, k], self._up(p[i].pack + p[i + 1].input))
        best[m < self._up(p[i].full)] = np.inf
        choice = np.zeros(len(m), np.int16)
        need, forward = 0, 0.0
        for j in range(i + 1, k + 1):
            need = max(need, p[j - 1].full + (p[j - 1].input if j - 1 > i else 0))
            forward += p[j - 1].cost
            split = forward + self._less(self.cost[j, k], self._up(p[j].input)) + self.cost[i, j - 1]
            split[m < self._up(need)] = np.inf
            better = split < best
            best[better], choice[better] = split[better], j
        self.cost[i, k], self.choice[i, k] = best, choice

    def _up(self, size: int) -> int:
        """Slots that so many bytes take."""
        return -(-size // self.size)

    def _less(self, cost: np.ndarray, taken: int) -> np.ndarray:
        """Costs when so many slots are taken."""
        moved = np.full(len(cost), np.inf)
        if taken < len(cost):
            moved[taken:] = cost[: len(cost) - taken]
        return moved

    def schedule(self) -> Schedule:
        """The schedule of the best entry."""
        count = len(self.pieces)
        before: list[tuple[Step, ...]] = [()] * count
        forward: list[Step] = []
        todo = [(0, count - 1, self.slots, -1)]
        while todo:
            start, end, room, last = todo.pop()
            row = forward if last < 0 else []
            i = start
            while i <= end:
                j = int(self.choice[i, end][room])
                if j:
                    todo.append((i, j - 1, room, j - 1))
                    row += [Step(n, False, n == j - 1) for n in range(i, j)]
                    i, room = j, room - self._up(self.pieces[j].input)
                else:
                    row.append(Step(i, True, i < end))
                    i += 1
                    if i <= end:
                        room -= self._up(self.pieces[i - 1].pack + self.pieces[i].input)
            if last >= 0:
                before[last] = tuple(row)
        return Schedule(tuple(forward), tuple(before))
