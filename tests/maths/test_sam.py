"""Sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from tiny import example, recipe, run_of, stand_in

A = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)


class Quadratic(nn.Module):
    """0.5 w'Aw, with w in two parameters and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.b = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.c = nn.Parameter(torch.ones(1, dtype=torch.float64))


def backward_of(model: Quadratic, calls: list[Any]) -> Callable[[Any, Any], Tensor]:
    def backward(batch: Any, count: Any) -> Tensor:
        calls.append((batch, count))
        loss = 0.5 * (A * torch.cat([model.a, model.b]).square()).sum()
        loss.backward()
        return loss.detach()

    return backward


def test_the_quadratic_case() -> None:
    """The gradient at w + e is A (w + rho A w / |A w|), with one norm over all parameters."""
    model, calls = Quadratic(), []
    run: Any = stand_in(model=model)
    perturbed = example("sam", rho=0.05).backward(backward_of(model, calls), run)
    batch, count = {"x": torch.zeros(1)}, torch.tensor(1)
    loss = perturbed(batch, count)
    assert model.a.grad is not None
    assert model.b.grad is not None
    found = torch.cat([model.a.grad, model.b.grad])
    wanted = A * (1 + 0.05 * A / A.norm())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert abs(float(found[0]) - 10.49749) < 1e-5
    assert float(loss) == 0.5 * float(A.sum())
    assert len(calls) == 2
    assert all(b is batch and c is count for b, c in calls)
    assert model.c.grad is None


def test_weights_come_back_with_every_bit() -> None:
    run = run_of(recipe(example("sam", rho=0.7)))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    batch = run.batch(0)
    assert run.backward
    run.backward(batch, run.task.count(batch))
    assert all(torch.equal(before[n], p) for n, p in run.model.named_parameters())


def test_weights_come_back_when_the_second_pass_fails() -> None:
    model, calls = Quadratic(), []
    inner = backward_of(model, calls)

    def fails(batch: Any, count: Any) -> Tensor:
        if calls:
            raise KeyboardInterrupt
        return inner(batch, count)

    run: Any = stand_in(model=model)
    with pytest.raises(KeyboardInterrupt):
        example("sam").backward(fails, run)({}, torch.tensor(1))
    assert model.a.tolist() == [1.0, 1.0]


def test_both_passes_drop_the_same_activations() -> None:
    """With a tiny radius, the second gradient is the first: no other mask, no other batch."""
    grads = []
    for techniques in ((), (example("sam", rho=1e-9),)):
        run = run_of(recipe(*techniques, dtype="float64"))
        batch = run.batch(0)
        assert run.backward
        run.backward(batch, run.task.count(batch))
        grads.append({n: p.grad for n, p in run.model.named_parameters() if p.grad is not None})
    assert max(float((grads[0][n] - grads[1][n]).abs().max()) for n in grads[0]) < 1e-7


def test_a_vanishing_gradient_moves_nothing() -> None:
    model, calls = Quadratic(), []
    with torch.no_grad():
        model.a.zero_()
        model.b.zero_()
    run: Any = stand_in(model=model)
    example("sam").backward(backward_of(model, calls), run)({}, torch.tensor(1))
    assert model.a.grad is not None
    assert model.a.grad.tolist() == [0.0, 0.0]


def test_refuses_a_negative_radius() -> None:
    with pytest.raises(UserError, match="rho must be at least 0"):
        example("sam", rho=-0.1)
