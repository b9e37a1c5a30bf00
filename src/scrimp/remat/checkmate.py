"""Which operators of a program run in which stage, and what is kept between stages, as an integer program.

    R[t, i]  operator i runs in stage t        least sum of cost[t, i] R[t, i]
    S[t, v]  value v is kept from stage t - 1 to stage t

Stage t ends with operator t for the first time: R[t, t] = 1, and nothing after it runs. A value is at hand in stage t
if it was kept or its operator runs; F[t, v, i] says that it is freed right after operator i, which may be its maker or
one that reads it. The bytes at hand after every operator stay within the budget, and so do those while it runs.

Paper: Jain et al., "Checkmate: Breaking the Memory Wall with Optimal Tensor Rematerialization", MLSys 2020,
arXiv 1910.02653. An operator here may make several values, such as an output and what its backward pass needs.

Solved by scipy's HiGHS. It is exact, and exponential: a few dozen operators take seconds to minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scrimp.errors import UserError


@dataclass(frozen=True)
class Value:
    """What an operator makes."""

    maker: int
    """Number of the operator; -1 for an input of the program, which is at hand from the start."""
    size: int
    holds: int = -1
    """A value whose memory it shares: as long as this one is kept, so is that."""


@dataclass(frozen=True)
class Operator:
    """An operator, in an order in which they can run."""

    cost: float
    reads: tuple[int, ...] = ()
    """Values, by number."""
    work: int = 0
    """Bytes that it needs beside its values while it runs."""
    once: bool = False
    """Whether it must not run again, as one that accumulates gradients."""


@dataclass
class Solution:
    """Matrices of zeros and ones: R is [operators, operators], S is [operators, values]."""

    runs: np.ndarray
    kept: np.ndarray
    cost: float


@dataclass
class Program:
    """Rows of an integer program, gathered one at a time: low <= sum of coefficients * variables <= high."""

    count: int = 0
    rows: list[dict[int, float]] = field(default_factory=list[dict[int, float]])
    low: list[float] = field(default_factory=list[float])
    high: list[float] = field(default_factory=list[float])

    def variables(self, *shape: int) -> np.ndarray:
        """Numbers of new variables."""
        made = np.arange(self.count, self.count + int(np.prod(shape))).reshape(shape)
        self.count += made.size
        return made

    def row(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        """Add one; terms of one variable add up."""
        row: dict[int, float] = {}
        for variable, factor in terms:
            row[int(variable)] = row.get(int(variable), 0.0) + factor
        self.rows.append(row)
        self.low.append(low)
        self.high.append(high)


def solve(
    operators: Sequence[Operator], values: Sequence[Value], budget: int, costs: np.ndarray | None = None,
    seconds: float = 60.0,
) -> Solution | None:  # fmt: skip
    """The cheapest run of a program within a budget; None if there is none.

    Args:
        costs: of operator i in stage t, where they differ by stage.
        seconds: after which the best that was found is taken.
    Raises:
        UserError: if scipy is missing, or nothing was found in time.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix
    except ImportError:
        fix = "pip install 'scrimp[milp]', or set mode to optimal."
        raise UserError("an integer program needs scipy.", "mode", fix) from None
    count = len(operators)
    costs = np.tile([op.cost for op in operators], (count, 1)) if costs is None else costs
    program = Program()
    runs, kept = program.variables(count, count), program.variables(count, len(values))
    upper = np.ones(program.count)
    lower = np.zeros(program.count)
    _shape(program, operators, values, runs, kept, lower, upper)
    _memory(program, operators, values, runs, kept, budget)
    size, objective = program.count, np.zeros(program.count)
    objective[runs.ravel()] = costs.ravel() / max(costs.max(), 1e-9)
    lower, upper = np.pad(lower, (0, size - len(lower))), np.pad(upper, (0, size - len(upper)), constant_values=1.0)
    places = [(i, v, f) for i, row in enumerate(program.rows) for v, f in row.items()]
    at, columns, factors = zip(*places, strict=True)
    matrix = csr_matrix((factors, (at, columns)), shape=(len(program.rows), size))
    # scipy's stubs know scalar bounds only.
    bounds: Any = Bounds(lower, upper)  # pyright: ignore[reportArgumentType]
    constraints: Any = LinearConstraint(matrix, program.low, program.high)  # pyright: ignore[reportArgumentType]
    found = milp(
        objective, integrality=np.ones(size), bounds=bounds, constraints=constraints, options={"time_limit": seconds},
    )  # fmt: skip
    if found.x is None:
        if found.status == 2:
            return None
        raise UserError("the integer program found no schedule in time.", "mode", "Set mode to optimal.")
    chosen = np.round(found.x).astype(int)
    return Solution(chosen[runs], chosen[kept], float((costs * chosen[runs]).sum()))


def _shape(
    program: Program, operators: Sequence[Operator], values: Sequence[Value], runs: np.ndarray, kept: np.ndarray,
    lower: np.ndarray, upper: np.ndarray,
) -> None:  # fmt: skip
    """What must be at hand for what."""
    count = len(operators)
    for t in range(count):
        lower[runs[t, t]] = 1
        upper[runs[t, t + 1 :]] = 0
        for i, op in enumerate(operators[: t + 1]):
            if op.once and i < t:
                upper[runs[t, i]] = 0
            for v in op.reads:
                maker = values[v].maker
                made = [(runs[t, maker], -1.0)] if maker >= 0 else []
                program.row([(runs[t, i], 1.0), (kept[t, v], -1.0), *made], -np.inf, 0)
        for v, value in enumerate(values):
            if t == 0:
                upper[kept[0, v]] = value.maker < 0
                lower[kept[0, v]] = value.maker < 0
                continue
            made = [(runs[t - 1, value.maker], -1.0)] if value.maker >= 0 else []
            program.row([(kept[t, v], 1.0), (kept[t - 1, v], -1.0), *made], -np.inf, 0)
            if value.holds >= 0:
                program.row([(kept[t, v], 1.0), (kept[t, value.holds], -1.0)], -np.inf, 0)


def _memory(
    program: Program, operators: Sequence[Operator], values: Sequence[Value], runs: np.ndarray, kept: np.ndarray,
    budget: int,
) -> None:  # fmt: skip
    """Bytes at hand, operator by operator, as a running sum of what is made and freed. In units of the budget."""
    count = len(operators)
    readers = [[i for i, op in enumerate(operators) if v in op.reads] for v in range(len(values))]
    for t in range(count):
        held: dict[int, float] = {int(kept[t, v]): value.size / budget for v, value in enumerate(values)}
        for i in range(t + 1):
            op = operators[i]
            for value in values:
                if value.maker == i:
                    held[int(runs[t, i])] = held.get(int(runs[t, i]), 0.0) + value.size / budget
            program.row([*held.items(), (runs[t, i], op.work / budget)], -np.inf, 1)
            for v, value in enumerate(values):
                if value.maker == i or v in op.reads:
                    freed = program.variables(1)[0]
                    held[int(freed)] = -value.size / budget
                    _free(program, freed, t, i, v, readers[v], runs, kept)


def _free(
    program: Program, freed: int, t: int, i: int, v: int, readers: Sequence[int], runs: np.ndarray, kept: np.ndarray
) -> None:
    """v is freed after operator i of stage t only if i runs, no later one reads it, and the next stage lacks it."""
    program.row([(freed, 1.0), (runs[t, i], -1.0)], -np.inf, 0)
    for later in readers:
        if i < later <= t:
            program.row([(freed, 1.0), (runs[t, later], 1.0)], -np.inf, 1)
    if t + 1 < len(runs):
        program.row([(freed, 1.0), (kept[t + 1, v], 1.0)], -np.inf, 1)
