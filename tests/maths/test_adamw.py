"""AdamW's equations, step by step in float64: Adam's, with the decay outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from scrimp.errors import UserError
from scrimp.groups import Group
from scrimp.registry import technique_class
from scrimp.techniques.optimizers.adamw import AdamW
from tiny import recipe, run_of, step

W = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
GRADS = [torch.tensor(g, dtype=torch.float64) for g in ([0.5, -2.0, 1.0], [-1.0, -1.0, 3.0], [0.25, 4.0, -1.0])]


def rule(params: dict[str, nn.Parameter], name: str = "adamw", **settings: Any) -> Optimizer:
    """The technique's optimizer over one group."""
    return technique_class(name)(**settings).optimizer(None, None)([Group(params, 1.0, 1.0)])  # type: ignore[arg-type]


# Decaying before or after the step differs by lr^2 wd, and so large a rate shows it.
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_the_equations(eps: float) -> None:
    w, m, v, lr, wd = W.clone(), torch.zeros_like(W), torch.zeros_like(W), 0.05, 0.5
    for t, g in enumerate(GRADS, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - lr * wd * w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + eps)
    got = nn.Parameter(W.clone())
    optimizer = rule({"w": got}, lr=lr, betas=(0.9, 0.95), weight_decay=wd, eps=eps)
    for g in GRADS:
        got.grad = g.clone()
        optimizer.step()
    assert torch.allclose(got, w, rtol=0, atol=1e-15)


def test_without_gradient_the_decay_is_the_closed_form_and_adam_is_not() -> None:
    found = {}
    for name in ("adamw", "adam"):
        w = nn.Parameter(W.clone())
        optimizer = rule({"w": w}, name, lr=0.01, weight_decay=0.5)
        for _ in range(7):
            w.grad = torch.zeros_like(w)
            optimizer.step()
        found[name] = w.detach()
    closed = W * (1 - 0.01 * 0.5) ** 7
    assert torch.allclose(found["adamw"], closed, rtol=0, atol=1e-15)
    assert not torch.allclose(found["adam"], closed, rtol=0, atol=1e-3)


def test_the_decay_follows_the_schedule() -> None:
    w = nn.Parameter(W.clone())
    optimizer = rule({"w": w}, lr=0.01, weight_decay=0.5)
    for lr in (0.01, 0.002):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.zeros_like(w)
        optimizer.step()
    assert torch.allclose(w, W * (1 - 0.01 * 0.5) * (1 - 0.002 * 0.5), rtol=0, atol=1e-15)


def test_a_skipped_update_does_not_decay() -> None:
    run = run_of(recipe(AdamW(lr=0.1, weight_decay=0.5)))
    assert run.step
    before = run.model.get_parameter("embed.weight").detach().clone()
    assert run.step() is False
    assert torch.equal(run.model.get_parameter("embed.weight"), before)
    step(run)
    assert not torch.equal(run.model.get_parameter("embed.weight"), before)


def test_moments_have_the_weights_type() -> None:
    run = run_of(recipe(AdamW(lr=1e-3), dtype="bfloat16"))
    step(run)
    state = run.state()
    assert {t.dtype for t in state["optimizer.exp_avg"].values()} == {torch.bfloat16}
    assert all(bool(t.isfinite().all()) for t in state["model"].values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"lr": -1.0}, "at least 0"), ({"eps": -1e-8}, "at least 0"), ({"weight_decay": -1.0}, "at least 0"),
     ({"betas": (-0.1, 0.9)}, r"in \[0, 1\)")],
)  # fmt: skip
def test_settings_without_meaning_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        AdamW(**settings)
