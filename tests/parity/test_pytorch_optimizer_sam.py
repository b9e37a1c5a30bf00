"""The sharpness-aware family against pytorch-optimizer, in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

from tiny import example, keep, stand_in

STEPS = 50
TOLERANCE = 1e-13
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2}),
}


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their norm of all gradients, which is in single precision, in double; otherwise paths part by about 1e-8."""

    def square(groups: list[dict[str, Any]], weight_adaptive: bool = False) -> Tensor:
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        return torch.stack([g.square().sum() for g in grads]).sum().reshape(1)

    for kind in (pytorch_optimizer.SAM, pytorch_optimizer.LookSAM):
        monkeypatch.setattr(sys.modules[kind.__module__], "get_global_gradient_norm", square)


def made() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A small regression, and its backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)

    def backward() -> Tensor:
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss.detach()

    return model, backward


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def ours(name: str, base: str, **settings: Any) -> list[Tensor]:
    model, inner = made()
    kind, rates = BASES[base]
    optimizer, clock, memory = (
        kind(model.parameters(), **rates),
        SimpleNamespace(step=0, position=1, begun=0),
        dict[str, Tensor](),
    )
    run: Any = stand_in(model=model, clock=clock, memory=lambda technique: memory)
    backward = example(name, **settings).backward(lambda batch, count: inner(), run)
    path: list[Tensor] = []
    for clock.step in range(STEPS):
        backward({}, torch.tensor(1))
        optimizer.step()
        optimizer.zero_grad()
        path.append(weights(model))
    return path


def theirs(kind: Any, base: str, **settings: Any) -> list[Tensor]:
    model, backward = made()
    rule, rates = BASES[base]
    optimizer = kind(model.parameters(), rule, **settings, **rates)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward()

    path: list[Tensor] = []
    for _ in range(STEPS):
        closure()
        optimizer.step(closure)
        path.append(weights(model))
    return path


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference of a weight in all steps."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("base", BASES)
def test_sam_agrees(base: str, record_property: Callable[[str, object], None]) -> None:
    difference = apart(ours("sam", base, rho=0.1), theirs(pytorch_optimizer.SAM, base, rho=0.1))
    keep(record_property, "sam", "pytorch-optimizer", difference)
    assert difference <= TOLERANCE


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_looksam_agrees(base: str, k: int, record_property: Callable[[str, object], None]) -> None:
    a = ours("looksam", base, rho=0.1, k=k, alpha=0.7)
    b = theirs(pytorch_optimizer.LookSAM, base, rho=0.1, k=k, alpha=0.7)
    keep(record_property, "looksam", "pytorch-optimizer", apart(a, b))
    assert apart(a, b) <= TOLERANCE
    assert apart(a, ours("sam", base, rho=0.1)) > (1e-3 if k > 1 else -1.0), "it is not just sam"
