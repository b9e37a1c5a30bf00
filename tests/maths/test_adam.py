"""Adam's equations, step by step in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from scrimp.errors import UserError
from scrimp.groups import Group, moments
from scrimp.techniques.optimizers.adam import Adam
from tiny import recipe, run_of, step

W = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
GRADS = [torch.tensor(g, dtype=torch.float64) for g in ([0.5, -2.0, 1.0], [-1.0, -1.0, 3.0], [0.25, 4.0, -1.0])]


def rule(params: dict[str, nn.Parameter], **settings: Any) -> Optimizer:
    """The technique's optimizer over one group."""
    return Adam(**settings).optimizer(None, None)([Group(params, 1.0, 1.0)])  # type: ignore[arg-type]


def by_hand(grads: list[torch.Tensor], lr: float, wd: float, b1: float, b2: float, eps: float) -> torch.Tensor:
    """W after some updates, by the paper's equations."""
    w, m, v = W.clone(), torch.zeros_like(W), torch.zeros_like(W)
    for t, raw in enumerate(grads, 1):
        g = raw + wd * w
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    return w


# With so large an eps, adding it before the bias correction or under the root would show.
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_the_equations(eps: float) -> None:
    w = nn.Parameter(W.clone())
    optimizer = rule({"w": w}, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, eps=eps)
    for g in GRADS:
        w.grad = g.clone()
        optimizer.step()
    assert torch.allclose(w, by_hand(GRADS, 0.01, 0.1, 0.9, 0.95, eps), rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_the_first_step_has_the_length_of_the_rate_whatever_the_gradient(scale: float) -> None:
    w = nn.Parameter(W.clone())
    w.grad = GRADS[0] * scale
    rule({"w": w}, lr=0.125, eps=1e-12).step()
    assert torch.allclose((w - W).abs(), torch.full_like(W, 0.125), rtol=0, atol=1e-8)


def test_each_weight_counts_its_own_steps() -> None:
    early, late = nn.Parameter(W.clone()), nn.Parameter(W.clone())
    optimizer = rule({"early": early, "late": late}, lr=0.01)
    early.grad = GRADS[0].clone()
    optimizer.step()
    assert torch.equal(late, W)
    early.grad, late.grad = GRADS[1].clone(), GRADS[1].clone()
    optimizer.step()
    assert torch.allclose(late, by_hand(GRADS[1:2], 0.01, 0.0, 0.9, 0.98, 1e-8), rtol=0, atol=1e-15)
    assert torch.allclose(early, by_hand(GRADS[:2], 0.01, 0.0, 0.9, 0.98, 1e-8), rtol=0, atol=1e-15)


def test_state_is_two_tensors_a_weight_and_a_counter_and_comes_with_the_first_step() -> None:
    run = run_of(recipe(Adam(lr=1e-3)))
    assert run.optimizer is not None
    names = dict(run.model.named_parameters())
    assert moments(run.optimizer, names) == {}
    step(run)
    kept = moments(run.optimizer, names)
    assert set(kept) == {"optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step"}
    assert all(kept["optimizer.exp_avg"][n].shape == p.shape for n, p in names.items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"lr": -1.0}, "at least 0"), ({"eps": -1e-8}, "at least 0"), ({"weight_decay": -1.0}, "at least 0"),
     ({"betas": (0.9, 1.0)}, r"in \[0, 1\)")],
)  # fmt: skip
def test_settings_without_meaning_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Adam(**settings)
