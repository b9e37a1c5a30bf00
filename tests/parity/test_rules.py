"""Update rules against reference libraries, in float64, bit by bit where both add in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lion_pytorch
import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.optim import Optimizer

from scrimp.groups import Group
from scrimp.registry import technique_class
from tiny import example, recipe, run_of


def trajectory(make: Callable[[list[nn.Parameter]], Optimizer], steps: int = 50) -> torch.Tensor:
    """Weights of a small regression after some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    optimizer = make(list(model.parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def ours(name: str, **settings: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
    technique = technique_class(name)(**settings)
    return lambda params: technique.optimizer(None, None)([Group({str(i): p for i, p in enumerate(params)}, 1.0, 1.0)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mine", "reference", "tolerance"),
    [
        (ours("lion", lr=1e-3, weight_decay=0.1), lambda p: lion_pytorch.Lion(p, lr=1e-3, weight_decay=0.1), 1e-14),
        (ours("lion", lr=1e-3, weight_decay=0.1), lambda p: pytorch_optimizer.Lion(p, 1e-3, weight_decay=0.1), 1e-14),
        (ours("sgd", lr=0.1, weight_decay=0.01), lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01), 1e-14),
        (ours("adam", lr=1e-2), lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.98)), 1e-13),
        (ours("adamw", lr=1e-2), lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1), 1e-13),
    ],
    ids=["lion-pytorch", "pytorch-optimizer-lion", "torch-sgd", "torch-adam", "torch-adamw"],
)  # fmt: skip
def test_trajectories_agree(mine: Any, reference: Any, tolerance: float) -> None:
    assert float((trajectory(mine) - trajectory(reference)).abs().max()) <= tolerance


def test_sam_agrees_with_pytorch_optimizer() -> None:
    run = run_of(recipe(example("sam", rho=0.05), technique_class("sgd")(lr=0.1, momentum=0.0), dtype="float64"))
    torch.manual_seed(0)
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    weights = []
    for reference in (False, True):
        torch.manual_seed(1)
        run.model = nn.Linear(6, 3).double()
        params = list(run.model.parameters())

        def backward(batch: dict, count: torch.Tensor) -> torch.Tensor:
            loss = nn.functional.mse_loss(run.model(x), y)
            loss.backward()
            return loss.detach()

        if reference:
            sam = pytorch_optimizer.SAM(params, torch.optim.SGD, rho=0.05, lr=0.1)
            for _ in range(20):
                backward({}, torch.tensor(1))
                sam.first_step(zero_grad=True)
                backward({}, torch.tensor(1))
                sam.second_step(zero_grad=True)
        else:
            plain = torch.optim.SGD(params, lr=0.1)
            slot = run.order.slots["backward"][0].backward(backward, run)
            for _ in range(20):
                slot({}, torch.tensor(1))
                plain.step()
                plain.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in params]))
    # Theirs sums the norm in float32.
    assert float((weights[0] - weights[1]).abs().max()) < 1e-8


def test_lora_agrees_with_peft() -> None:
    import peft

    import scrimp

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    copy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    copy.load_state_dict(base.state_dict())
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], lora_dropout=0.0)
    theirs = peft.get_peft_model(copy, config)
    mine = scrimp.apply(base, [technique_class("lora")(rank=2, alpha=6.0, targets="*")])
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        for i in ("0", "2"):
            layer = theirs.base_model.model.get_submodule(i)
            layer.lora_B["default"].weight.normal_()
            mine.get_submodule(i).lora.a.copy_(layer.lora_A["default"].weight)
            mine.get_submodule(i).lora.b.copy_(layer.lora_B["default"].weight)
    a, b = mine(x), theirs(x)
    assert torch.allclose(a, b, atol=1e-12)
    a.pow(2).sum().backward()
    b.pow(2).sum().backward()
    for i in ("0", "2"):
        layer = theirs.base_model.model.get_submodule(i)
        assert torch.allclose(mine.get_submodule(i).lora.a.grad, layer.lora_A["default"].weight.grad, atol=1e-12)
        assert torch.allclose(mine.get_submodule(i).lora.b.grad, layer.lora_B["default"].weight.grad, atol=1e-12)
