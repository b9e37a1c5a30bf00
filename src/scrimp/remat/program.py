"""A chain of blocks as a program for `checkmate.py`, and the schedule that its solution says.

Operators 0..L-1 are the forward passes, L..2L-1 the backward ones, last block first. A forward pass makes the block's
output and its pack, which holds the block's input. Gradients are not counted, as no schedule changes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scrimp.remat.chain import Piece, Schedule, Step
from scrimp.remat.checkmate import Operator, Solution, Value, solve


def cheapest(pieces: Sequence[Piece], budget: int, seconds: float = 60.0) -> Schedule | None:
    """The cheapest of all schedules within a budget; None where none fits.

    Raises:
        UserError: if scipy is missing, or nothing was found in time.
    """
    if budget < pieces[0].input:
        return None
    count = len(pieces)
    values = [Value(i - 1, p.input) for i, p in enumerate(pieces)]
    values += [Value(i, p.pack, holds=i) for i, p in enumerate(pieces)]
    operators: list[Operator] = []
    for i, piece in enumerate(pieces):
        output = pieces[i + 1].input if i + 1 < count else 0
        operators.append(Operator(piece.cost, (i,), max(piece.full - piece.pack - output, 0)))
    operators += [Operator(0.0, (i, count + i), once=True) for i in reversed(range(count))]
    costs = np.tile([op.cost for op in operators], (2 * count, 1))
    for i, piece in enumerate(pieces):
        costs[2 * count - 1 - i, i] = piece.again
    solution = solve(operators, values, budget, costs, seconds)
    return None if solution is None else schedule(solution, count)


def schedule(solution: Solution, count: int) -> Schedule:
    """A block's pack is kept in its last run before its backward pass; an output is held if it is used in a later row
    before the block runs that makes it anew."""
    runs = solution.runs
    # All forward stages are one row; each backward pass is preceded by one.
    rows = [list(range(count))] + [[i for i in range(count) if runs[t, i]] for t in range(count, 2 * count)]
    made: list[tuple[Step, ...]] = []
    for number, row in enumerate(rows):
        steps: list[Step] = []
        for i in row:
            later = [n for n in range(number + 1, len(rows)) if i in rows[n]]
            # Block i goes backward after row count - i.
            pack = not any(n <= count - i for n in later) and number <= count - i
            uses = [n for n in range(number + 1, len(rows)) if i + 1 in rows[n]]
            output = bool(uses) and not any(n <= uses[0] for n in later)
            steps.append(Step(i, pack, output))
        made.append(tuple(steps))
    return Schedule(made[0], tuple(made[count - i] for i in range(count)))
