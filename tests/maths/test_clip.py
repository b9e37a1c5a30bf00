"""Clipping by the global norm."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from scrimp.errors import UserError
from tiny import example, stand_in


def clipped(norm: float, *grads: list[float] | None) -> list[nn.Parameter]:
    """Parameters with these gradients after one clipped step."""
    parameters = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in grads]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = None if g is None else torch.tensor(g, dtype=torch.float64)
    run: Any = stand_in(optimizer=SimpleNamespace(param_groups=[{"params": [p]} for p in parameters]))
    assert example("clip", norm=norm).step(lambda: True, run)()
    return parameters


def test_one_norm_over_all_groups() -> None:
    a, b, c = clipped(6.5, [3.0, 4.0], [0.0, 12.0], None)
    factor = 6.5 / (13 + 1e-6)
    torch.testing.assert_close(a.grad, torch.tensor([3.0, 4.0], dtype=torch.float64) * factor, rtol=1e-15, atol=0)
    torch.testing.assert_close(b.grad, torch.tensor([0.0, 12.0], dtype=torch.float64) * factor, rtol=1e-15, atol=0)
    assert c.grad is None


def test_a_short_gradient_keeps_every_bit() -> None:
    (p,) = clipped(5.1, [3.0, 4.0])
    assert p.grad is not None
    assert p.grad.tolist() == [3.0, 4.0]


def test_a_norm_that_is_no_number_is_not_hidden() -> None:
    a, b = clipped(1.0, [math.nan, 1.0], [1.0, 1.0])
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.isnan().all()
    assert b.grad.isnan().all()


def test_no_gradients_no_clipping() -> None:
    run: Any = stand_in(optimizer=SimpleNamespace(param_groups=[{"params": [nn.Parameter(torch.zeros(2))]}]))
    assert example("clip").step(lambda: False, run)() is False


def test_refuses_a_norm_that_is_not_positive() -> None:
    for norm in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="positive"):
            example("clip", norm=norm)


def test_infinity_is_the_step_itself() -> None:
    def step() -> bool:
        return True

    assert example("clip", norm=math.inf).step(step, None) is step  # type: ignore[arg-type]
