"""Schedules of a chain: dynamic programming and integer programs against exhaustive search, eviction against bounds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import comb, inf, sqrt

import numpy as np
import pytest

from scrimp.remat.chain import Piece, Schedule, Step, best_segment, every, everything, plain, segments, simulate
from scrimp.remat.checkmate import Operator, Value, solve
from scrimp.remat.eviction import FullError, feed_forward
from scrimp.remat.eviction import Operator as Line
from scrimp.remat.eviction import simulate as evicted
from scrimp.remat.program import cheapest
from scrimp.remat.rotor import least, optimal

BLOCK = Piece(1.0, 0.75, 1, 15, 17)
"""A Transformer's, in units of its input."""


def uneven(count: int, seed: int) -> list[Piece]:
    draw = np.random.default_rng(seed).integers
    packs = [int(draw(5, 40)) for _ in range(count)]
    costs = [int(draw(1, 9)) for _ in range(count)]
    return [Piece(float(c), c / 2, int(draw(1, 6)), p, p + int(draw(6, 12))) for c, p in zip(costs, packs, strict=True)]


Row = tuple[Step, ...]


def trees(i: int, k: int) -> Iterator[tuple[Row, dict[int, Row]]]:
    """All ways to go through blocks i..k: the first row, and the rows before backward passes."""
    if i == k:
        yield (Step(i, True, False),), {}
        return
    for row, rows in trees(i + 1, k):
        yield (Step(i, True, True), *row), rows
    for j in range(i + 1, k + 1):
        head = tuple(Step(n, False, n == j - 1) for n in range(i, j))
        for (row, rows), (again, more) in product(trees(j, k), list(trees(i, j - 1))):
            yield head + row, rows | more | {j - 1: again}


def exhaustive(pieces: list[Piece], budget: int) -> float:
    count, best = len(pieces), inf
    for row, rows in trees(0, count - 1):
        held, cost = simulate(pieces, Schedule(row, tuple(rows.get(i, ()) for i in range(count))))
        best = min(best, cost if held <= budget else inf)
    return best


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_optimal_is_the_best_of_all(count: int) -> None:
    for seed in range(3):
        pieces = uneven(count, seed)
        for share in (0.3, 0.45, 0.6, 0.8, 1.1, 1.3):
            budget = int(share * everything(pieces))
            found = optimal(pieces, budget, slots=budget)
            held, cost = (0, inf) if found is None else simulate(pieces, found)
            assert held <= budget
            assert cost == exhaustive(pieces, budget)


@pytest.mark.parametrize(("count", "snapshots"), [(4, 1), (6, 2), (10, 2), (10, 3), (20, 3), (15, 4)])
def test_optimal_on_equal_blocks_is_binomial(count: int, snapshots: int) -> None:
    """Griewank's count of forward steps beside those that go backward at once: r l - C(s + r, r - 1), for the least r
    with C(s + r, s) >= l."""
    pieces = [Piece(1.0, 1.0, 1, 1000, 1001)] * count
    # The snapshots, the input of the block that runs, and one pack.
    budget = snapshots + 1002
    found = optimal(pieces, budget, slots=budget)
    assert found is not None
    r = next(r for r in range(1, 99) if comb(snapshots + r, snapshots) >= count)
    assert simulate(pieces, found)[1] == r * count - comb(snapshots + r, r - 1)


def test_a_coarse_table_never_exceeds_the_budget() -> None:
    pieces = uneven(12, 5)
    for share in (0.4, 0.6, 0.9):
        budget = int(share * everything(pieces))
        found = optimal(pieces, budget, slots=60)
        assert found is None or simulate(pieces, found)[0] <= budget
    enough = least(pieces, slots=10**6)
    assert optimal(pieces, enough, slots=enough) is not None
    assert optimal(pieces, enough - 1, slots=enough) is None


def test_segments_of_a_transformer_are_single_blocks_up_to_sixteen() -> None:
    assert [best_segment([BLOCK] * count) for count in (4, 8, 12, 16)] == [1, 1, 1, 1]
    assert [best_segment([BLOCK] * count) for count in (48, 144)] == [2, 3]
    held = {size: simulate([BLOCK] * 16, segments(16, size))[0] for size in (1, 4)}
    # Inputs and the packs of a segment, the last with what it holds while it runs.
    assert held == {1: 16 + 17, 4: 4 + 3 * 16 + 17}


def test_costs_of_simple_schedules() -> None:
    pieces = [BLOCK] * 4
    assert simulate(pieces, plain(4)) == (3 * 16 + 1 + 17, 0.0)
    assert simulate(pieces, every(4, 1)) == (4 + 17, 4 * 0.75)
    assert simulate(pieces, every(4, 2))[1] == 2 * 0.75
    assert simulate(pieces, segments(4, 2))[1] == 2 * (1 + 0.75)
    with pytest.raises(ValueError, match="without its input"):
        simulate(pieces, Schedule(plain(4).forward[1:], plain(4).before))
    with pytest.raises(ValueError, match="without its pack"):
        simulate(pieces, Schedule(every(4, 1).forward, plain(4).before))


def brute(operators: list[Operator], values: list[Value], budget: int) -> float:
    """Least cost over all orders of running operators and dropping values, by search over states."""
    count = len(operators)
    best: dict[tuple[int, frozenset[int]], float] = {(0, frozenset()): 0.0}
    todo = [(0.0, 0, frozenset[int]())]
    while todo:
        todo.sort(key=lambda x: x[0])
        cost, done, there = todo.pop(0)
        if done == count:
            return cost
        if best[done, there] < cost:
            continue
        for i in range(done + 1):
            if not set(operators[i].reads) <= there or (operators[i].once and i < done):
                continue
            made = there | {v for v, value in enumerate(values) if value.maker == i}
            if sum(values[v].size for v in made) + operators[i].work > budget:
                continue
            after = max(done, i + 1)
            for bits in range(1 << len(made)):
                left = frozenset(v for n, v in enumerate(sorted(made)) if bits >> n & 1)
                if cost + operators[i].cost < best.get((after, left), inf):
                    best[after, left] = cost + operators[i].cost
                    todo.append((cost + operators[i].cost, after, left))
    return inf


@pytest.mark.parametrize("seed", range(4))
def test_integer_programs_find_the_least_of_any_graph(seed: int) -> None:
    draw = np.random.default_rng(seed)
    operators: list[Operator] = []
    for i in range(6):
        reads = sorted({int(n) for n in draw.integers(0, i, 2)} | {i - 1}) if i else []
        operators.append(Operator(float(draw.integers(1, 6)), tuple(reads)))
    values = [Value(i, int(draw.integers(1, 5))) for i in range(6)]
    found = []
    for budget in (7, 9, 12, 16):
        solution = solve(operators, values, budget)
        found.append(inf if solution is None else solution.cost)
        assert found[-1] == brute(operators, values, budget)
    assert found == sorted(found, reverse=True)


def test_integer_programs_are_no_dearer_than_dynamic_programming() -> None:
    pieces = uneven(4, 1)
    for share in (0.5, 0.7):
        budget = int(share * everything(pieces))
        by_table, by_program = optimal(pieces, budget, slots=budget), cheapest(pieces, budget)
        assert (by_table is None) == (by_program is None)
        if by_table is not None and by_program is not None:
            held, cost = simulate(pieces, by_program)
            assert held <= budget
            assert cost <= simulate(pieces, by_table)[1]


@pytest.mark.parametrize("count", [64, 256, 1024])
def test_eviction_on_a_chain_needs_few_operators_more(count: int) -> None:
    ran, most = evicted(feed_forward(count), int(2 * sqrt(count)))
    assert most <= 2 * sqrt(count)
    assert ran < 1.6 * 2 * count


def test_eviction_does_nothing_where_all_fits_and_heeds_the_neighborhood() -> None:
    assert evicted(feed_forward(20), 50)[0] == 40
    ran = {name: evicted(feed_forward(64), 16, name)[0] for name in ("eq", "local")}
    assert ran["eq"] < 0.1 * ran["local"]


def test_what_was_evicted_is_made_again_with_what_it_needs() -> None:
    """Line 1 has to go for line 3. Line 5 reads it, and it is made again from line 0, which nobody kept either."""
    lines = [Line((), 1, 1), Line((0,), 1, 4), Line((0,), 1, 1), Line((2,), 1, 5), Line((3,), 1, 1), Line((1, 4), 1, 1)]
    assert evicted(lines, 10)[0] == 6
    assert evicted(lines, 8)[0] == 8
    with pytest.raises(FullError):
        evicted(lines, 5)


@pytest.mark.parametrize("budget", [0, 1])
def test_a_budget_below_the_input_has_no_schedule(budget: int) -> None:
    piece = Piece(1.0, 1.0, 2, 3, 4)
    assert cheapest([piece], budget) is None
    assert optimal([piece], budget) is None
