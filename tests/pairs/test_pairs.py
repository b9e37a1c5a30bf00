"""A sample of the grid; `make pairs-full` runs all of it."""

from __future__ import annotations

import pytest

from pairs import grid
from scrimp.arrange import order
from tiny import example

GRID = list(grid.pairs())


@pytest.mark.parametrize(("slot", "a", "b"), [p for p in GRID if len(GRID) < 40 or grid.sampled(p)], ids="-".join)
def test_an_undeclared_order_does_not_matter(slot: str, a: str, b: str) -> None:
    weights, bytes_ = grid.differences(slot, a, b)
    assert weights == 0, f"{a} and {b} do not commute in `{slot}`: declare their phases"
    assert bytes_ == 0, f"the order of {a} and {b} in `{slot}` changes the peak: declare their phases"


def test_a_declared_order_is_needed() -> None:
    """The test can fail: clipping before and after unscaling are not the same."""
    assert [t.name for t in order("step", [example("autocast", dtype="float16"), example("clip"), example("ema")])] == [
        "ema",
        "clip",
        "autocast",
    ]
