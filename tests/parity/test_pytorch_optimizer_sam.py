"""SAM against pytorch_optimizer's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import example

library = pytest.importorskip("pytorch_optimizer")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def test_equals_pytorch_optimizer() -> None:
    """Momentum and weight decay act on the gradient at w + e, at the weights as they were."""
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    x, y = torch.randn(20, 8, dtype=torch.float64), torch.randint(0, 3, (20,))
    theirs, ours = network(), network()
    reference = library.SAM(theirs.parameters(), base_optimizer=torch.optim.SGD, rho=0.1, adaptive=False, **settings)
    rule = torch.optim.SGD(ours.parameters(), **settings)  # type: ignore[arg-type]

    def inner(batch: dict[str, Tensor], count: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(ours(batch["x"]), batch["y"], reduction="sum") / count
        loss.backward()
        return loss.detach()

    run: Any = SimpleNamespace(model=ours)
    backward = example("sam", rho=0.1).backward(inner, run)
    for _ in range(20):
        nn.functional.cross_entropy(theirs(x), y).backward()
        reference.first_step(zero_grad=True)
        nn.functional.cross_entropy(theirs(x), y).backward()
        reference.second_step(zero_grad=True)
        backward({"x": x, "y": y}, torch.tensor(20))
        rule.step()
        rule.zero_grad()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        # Theirs holds the norm of the gradient in float32.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
