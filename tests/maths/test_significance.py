"""Student's t, against the tables."""

from __future__ import annotations

import math

import pytest

from scrimp.significance import distribution, paired, quantile


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (30, 2.042)])
def test_quantiles_of_the_tables(freedom: int, value: float) -> None:
    assert quantile(0.975, freedom) == pytest.approx(value, abs=6e-4)
    assert distribution(value, freedom) == pytest.approx(0.975, abs=1e-4)
    assert distribution(-value, freedom) == pytest.approx(0.025, abs=1e-4)


def test_with_one_degree_it_is_cauchy() -> None:
    assert distribution(1.0, 1) == pytest.approx(0.75)
    assert distribution(0.0, 5) == pytest.approx(0.5)


def test_a_paired_difference_by_hand() -> None:
    found = paired([1.1, 2.3, 3.2], [1.0, 2.0, 3.0])
    error = 0.1 / math.sqrt(3)
    assert found.mean == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - 4.30265 * error, 0.2 + 4.30265 * error), abs=1e-4)
    assert found.p == pytest.approx(0.0742, abs=2e-4)
    assert not found.seen


def test_what_is_the_same_and_what_always_differs() -> None:
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired([2.0, 3.0], [1.0, 2.0]).seen
    one = paired([1.0], [2.0])
    assert one.p is None and not one.seen and one.low == -math.inf
    with pytest.raises(ValueError, match="no pairs"):
        paired([], [])
