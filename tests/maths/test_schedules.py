"""Learning-rate schedules at hand-computed points."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrimp.clock import Clock, Duration
from scrimp.errors import UserError
from scrimp.registry import technique_class
from scrimp.run import Run
from scrimp.techniques.optimizers.sgd import SGD
from scrimp.techniques.schedules.warmup_linear import WarmupLinear
from scrimp.training import train
from tiny import recipe

NAMES = ["warmup_cosine", "warmup_linear", "inverse_sqrt", "wsd"]


def shape_of(name: str, duration: str, **settings: Any) -> Callable[[float], float]:
    """A technique's factor, for a run of some length with 8 tokens a step."""
    clock = Clock.plan(Duration.parse(duration), batch=2, tokens=4, items=100)
    nothing: Any = None
    run = SimpleNamespace(clock=clock, where=partial(Run.where, nothing))
    return technique_class(name)(**settings).schedule(lambda p: 1.0, run)  # type: ignore[arg-type]


def factors(name: str, duration: str = "10 step", **settings: Any) -> list[float]:
    """The factor of each step of a run of ten."""
    shape = shape_of(name, duration, **settings)
    return [shape(i / 10) for i in range(10)]


def test_cosine() -> None:
    got = factors("warmup_cosine", warmup="2 step", floor=0.1)
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert got == pytest.approx([0.5, 1.0, *cosine])
    assert got[6] == pytest.approx(0.55)


def test_linear() -> None:
    assert factors("warmup_linear", warmup=0.2) == pytest.approx([0.5, 1.0, *[(8 - i) / 8 for i in range(8)]])
    assert factors("warmup_linear", warmup=0, floor=0.5) == pytest.approx([1 - i / 20 for i in range(10)])


def test_inverse_square_root() -> None:
    got = factors("inverse_sqrt", warmup=0.4)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0, *[math.sqrt(4 / t) for t in range(5, 11)]])


def test_inverse_square_root_without_a_warmup() -> None:
    got = factors("inverse_sqrt", warmup=0, decay="3 step")
    assert got == pytest.approx([math.sqrt(3 / (3 + t)) for t in range(10)])
    assert got[0] == 1.0


@pytest.mark.parametrize(("shape", "fall"), [("linear", lambda x: 1 - x), ("sqrt", lambda x: 1 - math.sqrt(x))])
def test_warmup_stable_decay(shape: str, fall: Callable[[float], float]) -> None:
    got = factors("wsd", warmup="2 step", decay=0.4, shape=shape)
    assert got == pytest.approx([0.5, *[1.0] * 5, *[fall(i / 4) for i in range(4)]])
    floored = factors("wsd", warmup="2 step", decay=0.4, shape=shape, floor=0.2)
    assert floored[6:] == pytest.approx([0.2 + 0.8 * fall(i / 4) for i in range(4)])
    assert factors("wsd", warmup=0, decay=0) == [1.0] * 10


@pytest.mark.parametrize(("name", "floor"), [("warmup_cosine", 0.25), ("warmup_linear", 0.25), ("wsd", 0.25)])
def test_the_floor_is_where_the_run_ends(name: str, floor: float) -> None:
    assert shape_of(name, "10 step", floor=floor)(1.0) == pytest.approx(floor)
    assert shape_of(name, "10 step", floor=1.0, warmup=0)(0.7) == pytest.approx(1.0)


@pytest.mark.parametrize("name", NAMES)
@given(steps=st.integers(1, 300), share=st.floats(0.001, 0.7))
def test_no_step_is_lost_and_none_exceeds_the_rate(name: str, steps: int, share: float) -> None:
    shape = shape_of(name, f"{steps} step", warmup=share)
    got = [shape(i / steps) for i in range(steps)]
    assert all(0 < f <= 1 for f in got)
    peak = got.index(max(got))
    assert got[: peak + 1] == sorted(got[: peak + 1])
    assert all(a >= b - 1e-12 for a, b in zip(got[peak:], got[peak + 1 :], strict=False))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0.3, "3 step", "24 tok", "0.06 epoch"])
def test_a_run_measured_in_tokens_has_the_same_schedule(name: str, warmup: str | float) -> None:
    plain = factors(name, warmup=0.3)
    assert factors(name, "80 tok", warmup=warmup) == pytest.approx(plain)
    assert factors(name, "20 sample", warmup=warmup) == pytest.approx(plain)


@pytest.mark.parametrize("name", ["warmup_cosine", "warmup_linear", "wsd"])
def test_a_warmup_as_long_as_the_run_only_rises(name: str) -> None:
    settings: dict[str, Any] = {"decay": 0} if name == "wsd" else {}
    assert factors(name, warmup=1.0, **settings) == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_the_rate_of_a_run_follows_it() -> None:
    rates: list[float] = []

    def observe(event: str, fields: dict[str, Any]) -> None:
        if event == "step":
            rates.append(fields["lr"])

    rule = SGD(lr=0.5)
    made = recipe(rule, WarmupLinear(warmup="2 step"), duration="512 tok")
    train(made, save=False, observe=observe)
    assert rates == pytest.approx([0.25, 0.5, *[0.5 * (6 - i) / 6 for i in range(6)]])


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("warmup_cosine", {"floor": 1.5}, "floor must be between 0 and 1"),
        ("warmup_linear", {"floor": -0.1}, "floor must be between 0 and 1"),
        ("wsd", {"floor": 2.0}, "floor must be between 0 and 1"),
        ("warmup_cosine", {"warmup": "5 minutes"}, "not a duration"),
        ("warmup_linear", {"warmup": -1}, "not a duration"),
        ("wsd", {"decay": "soon"}, "not a duration"),
        ("inverse_sqrt", {"warmup": 0}, "decay must be more than 0"),
        ("inverse_sqrt", {"decay": "5 step"}, "without a warm-up"),
    ],
)
def test_settings_without_meaning_are_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        technique_class(name)(**settings)


def test_a_warmup_and_a_decay_must_fit_into_the_run() -> None:
    with pytest.raises(UserError, match=r"techniques.wsd: the warm-up \(8 step\) and the decay \(0.3\) together"):
        factors("wsd", warmup="8 step", decay=0.3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("warmup", "length"), [("11 step", "10 step"), ("90 tok", "80 tok"), (12, "10 step")])
def test_a_warmup_longer_than_the_run_is_refused(name: str, warmup: str | float, length: str) -> None:
    with pytest.raises(UserError) as error:
        shape_of(name, length, warmup=warmup)
    text = f"techniques.{name}.warmup: a warm-up of `{warmup}` is longer than the run: the run has {length}. Shorten it"
    assert text in str(error.value)
