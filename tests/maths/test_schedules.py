"""Learning-rate schedules at hand-computed points."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from scrimp.clock import Clock, Duration
from scrimp.registry import technique_class


def factors(name: str, duration: str = "10 step", **settings: Any) -> list[float]:
    """The factor of each step of a run of ten."""
    clock = Clock.plan(Duration.parse(duration), batch=2, tokens=4, items=100)
    run = SimpleNamespace(clock=clock, where=lambda t, s="": s)
    shape = technique_class(name)(**settings).schedule(lambda p: 1.0, run)  # type: ignore[arg-type]
    return [shape(i / 10) for i in range(10)]


def test_cosine() -> None:
    got = factors("warmup_cosine", warmup="2 step", floor=0.1)
    assert got[:2] == pytest.approx([0.5, 1.0])
    assert got[5] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2)
    assert got[9] == pytest.approx(0.1)


def test_linear() -> None:
    assert factors("warmup_linear", warmup=0.2) == pytest.approx([0.5, 1.0, *[(8 - i) / 8 for i in range(1, 9)]])


def test_inverse_square_root() -> None:
    got = factors("inverse_sqrt", warmup=0.4)
    assert got[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert got[8] == pytest.approx(math.sqrt(4 / 9))


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_warmup_stable_decay(shape: str, middle: float) -> None:
    got = factors("wsd", warmup="1 step", decay=0.4, shape=shape)
    assert got[:6] == pytest.approx([1.0] * 6)
    assert got[7] == pytest.approx(middle)
    assert got[9] == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["warmup_cosine", "warmup_linear", "inverse_sqrt", "wsd"])
def test_a_run_measured_in_tokens_has_the_same_schedule(name: str) -> None:
    assert factors(name, "80 tok", warmup=0.3) == pytest.approx(factors(name, warmup=0.3))


@pytest.mark.parametrize("name", ["warmup_cosine", "warmup_linear", "inverse_sqrt", "wsd"])
def test_the_first_step_is_not_lost(name: str) -> None:
    assert factors(name, warmup=0.5)[0] > 0
