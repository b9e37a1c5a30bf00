"""Every two techniques work together, and an order that no card declares does not matter.

A fixed sample of the grid; `make pairs-full` tests all of it, and `benchmarks/pairs.py` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from pairs import grid
from scrimp.arrange import order
from scrimp.technique import Technique
from tiny import example

FITTING = [pair for pair in grid.together() if "compile" not in pair]
"""Compiled code is not seen operator by operator, so that its plan is an upper bound only."""


def cases(found: Iterable[tuple[str, ...]]) -> list[Any]:
    """Named test cases."""
    return [pytest.param(*case, id="-".join(case)) for case in found]


@pytest.mark.parametrize(("slot", "a", "b"), cases(grid.pairs()))
def test_an_undeclared_order_does_not_matter(slot: str, a: str, b: str) -> None:
    numbers, bytes_ = grid.differences(slot, grid.tried(a), grid.tried(b))
    assert numbers == 0, f"{a} and {b} do not commute in `{slot}`: declare their phases"
    assert bytes_ == 0, f"the order of {a} and {b} in `{slot}` changes the peak: declare their phases"


@pytest.mark.parametrize(("a", "b"), cases(FITTING))
def test_two_train_together_and_are_planned_to_the_byte(a: str, b: str) -> None:
    planned, measured = grid.planned_and_measured(grid.planned_recipe(grid.tried(a), grid.tried(b)))
    assert planned == measured > 0


@pytest.mark.parametrize(
    ("slot", "one", "two"),
    [
        ("backward", example("accumulate"), example("sam")),
        ("step", example("autocast", dtype="float16"), example("clip", norm=0.1)),
        ("export", example("ema"), example("lora")),
    ],
    ids=["backward", "step", "export"],
)
def test_the_comparison_sees_an_order_that_matters(slot: str, one: Technique, two: Technique) -> None:
    """The tests above can fail: these orders are declared because they change numbers and memory."""
    numbers, bytes_ = grid.differences(slot, one, two)
    assert numbers > 0
    assert (bytes_ != 0) == (slot == "backward")


def test_gradients_are_unscaled_then_clipped_then_averaged() -> None:
    inside_out = order("step", [example("autocast", dtype="float16"), example("clip"), example("ema")])
    assert [t.name for t in inside_out] == ["ema", "clip", "autocast"]
