"""Durations and the clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrimp.clock import Clock, Duration
from scrimp.errors import UserError


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("2000 step", 2000, "step"), ("5e6 tok", 5e6, "tok"), ("1 epoch", 1, "epoch"), ("0.25", 0.25, "run"),
     (0.5, 0.5, "run"), (300, 300, "step"), ("2_000 steps", 2000, "step"), ("1e4tokens", 1e4, "tok")],
)  # fmt: skip
def test_durations_are_read(text: str | float, value: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize("text", ["5 minutes", "-1 step", "fast", "1.5", "", "nan", "1e999 tok"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="duration|no unit"):
        Duration.parse(text)


def test_units_convert_by_the_nominal_step() -> None:
    clock = Clock.plan(Duration.parse("8000 tok"), batch=4, tokens=20, items=50)
    assert clock.length == 8000
    assert clock.at("10 step") == 800
    assert clock.at("1 epoch") == 1000
    assert clock.at(0.25) == 2000
    assert clock.steps("0.1") == 10
    assert Clock.plan(Duration.parse("2 epoch"), 4, 20, 50).length == 100  # samples


def test_extending_moves_schedules_and_not_cuts() -> None:
    clock = Clock.plan(Duration.parse("100 step"), 1, 1, 1)
    clock.end = 200
    clock.step = 50
    assert clock.at(0.5) == 50
    assert clock.progress == 0.25


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_a_fraction_is_within_the_run(length: int, share: float) -> None:
    clock = Clock.plan(Duration.parse(f"{length} step"), 1, 1, 1)
    assert 0 <= clock.at(share) <= length
    assert clock.passed([share]) == (clock.at(share) == 0)


def test_the_clock_survives_json() -> None:
    clock = Clock.plan(Duration.parse("100 step"), 2, 3, 4)
    clock.tick(2, 6)
    assert Clock(**clock.state()) == clock
