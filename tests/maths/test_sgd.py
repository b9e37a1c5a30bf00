"""SGD's equations, step by step in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scrimp.errors import UserError
from scrimp.groups import Group
from scrimp.techniques.optimizers.sgd import SGD
from tiny import assert_equal, flat, recipe, run_of, step

W = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
GRADS = [torch.tensor(g, dtype=torch.float64) for g in ([0.5, -2.0, 0.0], [-1.0, -1.0, 3.0], [0.25, 4.0, -1.0])]


def rule(params: dict[str, nn.Parameter], **settings: Any) -> Optimizer:
    """The technique's optimizer over one group."""
    return SGD(**settings).optimizer(None, None)([Group(params, 1.0, 1.0)])  # type: ignore[arg-type]


def trained(**settings: Any) -> Tensor:
    """W after three updates."""
    w = nn.Parameter(W.clone())
    optimizer = rule({"w": w}, **settings)
    for grad in GRADS:
        w.grad = grad.clone()
        optimizer.step()
    return w.detach()


def test_momentum_starts_undamped_and_decay_enters_the_gradient() -> None:
    w, v = W.clone(), torch.zeros_like(W)
    for g in GRADS:
        v = 0.9 * v + (g + 0.01 * w)
        w = w - 0.1 * v
    assert torch.allclose(trained(lr=0.1, momentum=0.9, weight_decay=0.01), w, rtol=0, atol=1e-15)


def test_nesterov_looks_ahead() -> None:
    w, v = W.clone(), torch.zeros_like(W)
    for g in GRADS:
        v = 0.9 * v + g
        w = w - 0.1 * (g + 0.9 * v)
    assert torch.allclose(trained(lr=0.1, nesterov=True), w, rtol=0, atol=1e-15)


def test_dampening_spares_the_first_gradient_however_late() -> None:
    early, late = nn.Parameter(W.clone()), nn.Parameter(W.clone())
    optimizer = rule({"early": early, "late": late}, lr=0.1, momentum=0.8, dampening=0.25, weight_decay=0.01)
    found: dict[str, list[Tensor]] = {"early": [], "late": []}
    for n, grad in enumerate(GRADS):
        early.grad, late.grad = grad.clone(), grad.clone() if n else None
        optimizer.step()
        found["early"].append(early.detach().clone())
        found["late"].append(late.detach().clone())
    for name, grads in (("early", GRADS), ("late", GRADS[1:])):
        w, v = W.clone(), torch.zeros_like(W)
        for n, g in enumerate(grads):
            v = 0.8 * v + 0.75 * (g + 0.01 * w) if n else g + 0.01 * w
            w = w - 0.1 * v
        assert torch.allclose(found[name][-1], w, rtol=0, atol=1e-15)
    assert torch.equal(found["late"][0], W)


def test_without_momentum_it_is_plain_descent_and_keeps_nothing() -> None:
    assert torch.allclose(trained(lr=0.1, momentum=0.0), W - 0.1 * sum(GRADS), rtol=0, atol=1e-15)
    w = nn.Parameter(W.clone())
    optimizer = rule({"w": w}, momentum=0.0)
    w.grad = GRADS[0].clone()
    optimizer.step()
    assert not optimizer.state[w]


def test_the_rate_multiplies_the_momentum_and_is_not_inside_it() -> None:
    w = nn.Parameter(W.clone())
    optimizer = rule({"w": w}, lr=0.1)
    w.grad = GRADS[0].clone()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    w.grad = GRADS[1].clone()
    optimizer.step()
    want = W - 0.1 * GRADS[0] - 0.01 * (0.9 * GRADS[0] + GRADS[1])
    assert torch.allclose(w, want, rtol=0, atol=1e-15)


def test_a_first_gradient_may_come_late() -> None:
    early, late = nn.Parameter(W.clone()), nn.Parameter(W.clone())
    optimizer = rule({"early": early, "late": late}, lr=0.1, weight_decay=0.01)
    early.grad = GRADS[0].clone()
    optimizer.step()
    assert torch.equal(late, W)
    assert late not in optimizer.state or not optimizer.state[late]
    before = early.detach().clone()
    early.grad, late.grad = GRADS[1].clone(), GRADS[1].clone()
    optimizer.step()
    assert torch.allclose(late, W - 0.1 * (GRADS[1] + 0.01 * W), rtol=0, atol=1e-15)
    v = 0.9 * (GRADS[0] + 0.01 * W) + GRADS[1] + 0.01 * before
    assert torch.allclose(early, before - 0.1 * v, rtol=0, atol=1e-15)


def test_momentum_needs_about_the_root_of_the_steps_on_a_long_valley() -> None:
    def steps(momentum: float, lr: float) -> int:
        w = nn.Parameter(torch.ones(2, dtype=torch.float64))
        curvature = torch.tensor([1.0, 100.0], dtype=torch.float64)
        optimizer = rule({"w": w}, lr=lr, momentum=momentum)
        for n in range(2000):
            if float(w.detach().norm()) < 1e-6:
                return n
            w.grad = curvature * w.detach()
            optimizer.step()
        return 2000

    # The best rates and momentum for a condition number of 100: rates of convergence 99/101 and 9/11.
    assert steps(0.0, 2 / 101) > 5 * steps((9 / 11) ** 2, 4 / 121)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_weight_moves_in_every_type(dtype: torch.dtype, momentum: float) -> None:
    w = nn.Parameter(torch.ones(131, dtype=dtype))
    optimizer = rule({"w": w}, lr=0.5, momentum=momentum)
    w.grad = torch.full_like(w, 0.5)
    optimizer.step()
    assert torch.equal(w.detach(), torch.full_like(w, 0.75))


def test_two_equal_runs_are_equal() -> None:
    runs = [run_of(recipe(SGD(lr=0.05, nesterov=True))) for _ in range(2)]
    for run in runs:
        step(run)
        step(run)
    assert_equal(flat(runs[0].state()), flat(runs[1].state()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"lr": -1.0}, "at least 0"), ({"weight_decay": -1.0}, "at least 0"), ({"lr": float("nan")}, "at least 0"),
     ({"dampening": 1.5}, r"in \[0, 1\]"), ({"dampening": 0.5, "nesterov": True}, "undamped"),
     ({"dampening": 0.5, "momentum": 0.0}, "no momentum"),
     ({"momentum": 1.0}, r"in \[0, 1\)"), ({"momentum": 0.0, "nesterov": True}, "which is 0")],
)  # fmt: skip
def test_settings_without_meaning_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SGD(**settings)
