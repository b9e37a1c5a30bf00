"""The arithmetic of stages, against values computed by hand, against brute force, and in what must always hold."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scrimp.machines.accelerators.architecture import Energy, accelerator
from scrimp.machines.accelerators.engine import (
    MEMORY,
    Flow,
    Stage,
    busy,
    cycles,
    makespan,
    overlap,
    pipeline,
    scheduled,
    sequence,
    traffic,
    work,
)
from scrimp.machines.accelerators.report import reported


@dataclass
class Toy:
    """Ten operations a cycle of anything, four bytes a cycle, memory that answers after twenty cycles."""

    rates: dict[str, float] = field(default_factory=dict)

    def rate(self, resource: str) -> float:
        return self.rates.get(resource, 10.0)

    def bandwidth(self, level: str) -> float:
        return 4.0

    def latency(self) -> float:
        return 20.0


TOY = Toy()


def test_a_stage_takes_what_its_slowest_part_takes() -> None:
    assert cycles(Stage(name="a", resource="array", work=100), TOY) == 10
    assert cycles(Stage(name="a", resource="array", work=100, utilization=0.25), TOY) == 40
    assert cycles(Stage(name="a", resource="array", work=100, bytes={MEMORY: 60}), TOY) == 15
    assert cycles(Stage(name="a", resource="array", work=100, accesses=3, parallel=2), TOY) == 30
    assert cycles(Stage(name="a", resource="array", work=100, cycles=7), TOY) == 7
    assert cycles(Stage(name="a"), TOY) == 0


def test_compositions_by_hand() -> None:
    a, b = Stage(name="a", resource="x", work=30), Stage(name="b", resource="y", work=50)
    assert cycles(sequence(a, b, count=4), TOY) == 4 * (3 + 5)
    assert cycles(overlap(a, b), TOY) == 5
    assert cycles(pipeline(a, b, count=4), TOY) == 3 + 5 + 3 * 5
    # Parts that need the same unit, or the same bandwidth, take turns.
    assert cycles(overlap(a, a), TOY) == 6
    loads = Stage(name="l", bytes={MEMORY: 16})
    assert cycles(overlap(a, loads, loads), TOY) == 8
    assert cycles(pipeline(a, a, count=4), TOY) == 6 + 3 * 6
    assert busy(sequence(a, overlap(a, b), count=2), TOY) == {"x": 12.0, "y": 10.0}
    assert work(sequence(a, overlap(a, b), count=2)) == {"x": 120.0, "y": 100.0}
    assert traffic(pipeline(loads, count=3)) == {MEMORY: 48.0}


def stages() -> st.SearchStrategy[Stage]:
    number = st.floats(0, 1e6)
    return st.builds(
        lambda resource, work, moved, accesses: Stage(name="s", resource=resource, work=work, bytes={MEMORY: moved},
                                                      accesses=accesses),
        st.sampled_from("xyz"), number, number, st.floats(0, 100),
    )  # fmt: skip


def grouped(children: st.SearchStrategy[Flow]) -> st.SearchStrategy[Flow]:
    parts = st.lists(children, min_size=1, max_size=3)
    return st.one_of(
        parts.map(lambda p: overlap(*p)),
        st.builds(lambda p, n: sequence(*p, count=n), parts, st.integers(1, 5)),
        st.builds(lambda p, n: pipeline(*p, count=n), parts, st.integers(1, 5)),
    )


FLOWS = st.recursive(stages(), grouped, max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(FLOWS, stages())
def test_more_work_never_takes_fewer_cycles(flow: Flow, more: Stage) -> None:
    least = cycles(flow, TOY) * (1 - 1e-9)
    for larger in (sequence(flow, more), overlap(flow, more), pipeline(flow, more, count=2)):
        assert cycles(larger, TOY) >= least
    # Nothing is faster than its busiest resource allows, or slower than one thing after another.
    assert cycles(flow, TOY) >= max(held for name, held in busy(flow, TOY).items() if name != "latency") * (1 - 1e-9)


@settings(max_examples=25, deadline=None)
@given(FLOWS, FLOWS)
def test_work_traffic_and_energy_add_up(one: Flow, two: Flow) -> None:
    table = Energy(node=28, picojoules={"x": 1.0, "y": 2.0, MEMORY: 30.0})
    both = sequence(one, two)
    apart = sum(table.joules(work(flow), traffic(flow)) for flow in (one, two))
    assert table.joules(work(both), traffic(both)) == pytest.approx(apart)
    assert traffic(both)[MEMORY] == pytest.approx(traffic(one)[MEMORY] + traffic(two)[MEMORY])


def test_energy_by_hand() -> None:
    table = Energy(node=90, volts=1.8, picojoules={"x": 2.0, MEMORY: 30.0})
    # On the chip twice the node and four times the square of the voltage; memory as it is.
    assert table.joules({"x": 10, "unknown": 5}, {MEMORY: 3}) == pytest.approx((10 * 2 * 8 + 90) * 1e-12)
    elsa = accelerator("elsa")
    report = reported(Stage(name="s", resource="array", work=1e9, bytes={MEMORY: 1e6}), elsa)
    assert report.joules_by_power == pytest.approx(17.928 * report.seconds)
    assert report.joules_by_events == pytest.approx((1e9 * 0.3 * 40 / 45 + 1e6 * 31.2) * 1e-12)


def by_the_clock(costs: list[int], workers: int) -> list[int]:
    """The same rule, one cycle after another."""
    waiting, left, held = list(costs), [0] * workers, [0] * workers
    while waiting or any(left):
        for worker in range(workers):
            if not left[worker] and waiting:
                left[worker] = waiting.pop(0)
                held[worker] += left[worker]
        left = [max(cost - 1, 0) for cost in left]
    return held


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 6), max_size=7), st.integers(1, 3))
def test_list_scheduling_equals_brute_force(costs: list[int], workers: int) -> None:
    assert sorted(scheduled(costs, workers)) == sorted(by_the_clock(costs, workers))
    best = min((max(sum(c for c, w in zip(costs, who, strict=True) if w == worker) for worker in range(workers))
                for who in itertools.product(range(workers), repeat=len(costs))), default=0)  # fmt: skip
    assert best <= makespan(costs, workers) <= (2 - 1 / workers) * best + 1e-9


def test_idle_workers_have_no_work() -> None:
    assert scheduled([5.0], 3) == [5.0, 0.0, 0.0]
    assert np.sum(scheduled([1.0, 2.0, 3.0, 4.0], 2)) == 10
