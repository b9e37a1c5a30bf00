"""LoRA against peft, in float64: outputs, gradients, a trajectory, and merged weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn

import scrimp
from scrimp.techniques.tuning.lora import LoRA
from tiny import keep


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def both(mine: list[LoRA], **theirs: Any) -> tuple[nn.Module, Any, dict[str, Any], dict[str, Any]]:
    """The same network under each, with peft's A and a random B in both; and their trained parameters, alike named."""
    ours = scrimp.apply(mlp(), mine)
    reference = peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["0", "2"], **theirs))  # type: ignore[arg-type]
    named: dict[str, Any] = {}
    with torch.no_grad():
        for i in ("0", "2"):
            layer: Any = reference.base_model.model.get_submodule(i)  # type: ignore[operator]
            named[f"{i}.lora.a"], named[f"{i}.lora.b"] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            named[f"{i}.lora.b"].normal_()
        own: dict[str, Any] = {n: p for n, p in ours.named_parameters() if p.requires_grad}
        assert own.keys() == named.keys()
        for name, p in own.items():
            p.copy_(named[name])
    return ours, reference, own, named


CASES = [
    pytest.param([LoRA(rank=2, alpha=6.0, targets="*")], {"r": 2, "lora_alpha": 6}, id="plain"),
    pytest.param(
        [LoRA(rank=4, alpha=6.0, targets="*", rank_stabilized=True)],
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        id="rank-stabilized",
    ),
    pytest.param(
        [LoRA(rank=2, alpha=6.0, targets="0"), LoRA(rank=3, alpha=1.5, targets="2")],
        {"r": 2, "lora_alpha": 6, "rank_pattern": {"2": 3}, "alpha_pattern": {"2": 1.5}},
        id="two-ranks",
    ),
]


@pytest.mark.parametrize(("mine", "theirs"), CASES)
def test_outputs_gradients_and_a_trajectory_agree(
    mine: list[LoRA], theirs: dict[str, Any], record_property: Callable[[str, object], None]
) -> None:
    ours, reference, own, named = both(mine, **theirs)
    torch.manual_seed(1)
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    rules = [torch.optim.SGD(list(params.values()), lr=0.01) for params in (own, named)]
    worst = 0.0
    for _ in range(20):
        outputs = [ours(x), reference(x)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
        worst = max(worst, float((outputs[0] - outputs[1]).detach().abs().max()))
        for rule, output in zip(rules, outputs, strict=True):
            rule.zero_grad()
            (output - y).pow(2).mean().backward()
        for name, p in own.items():
            assert p.grad is not None
            assert p.grad.any()
            torch.testing.assert_close(p.grad, named[name].grad, rtol=0, atol=1e-12)
        for rule in rules:
            rule.step()
    keep(record_property, "lora", "peft", worst)


@pytest.mark.parametrize(("mine", "theirs"), CASES)
def test_merged_weights_agree(mine: list[LoRA], theirs: dict[str, Any]) -> None:
    ours, reference, _, _ = both(mine, **theirs)
    plain = {n: p.detach() for n, p in ours.named_parameters()}
    given: Any = SimpleNamespace(model=ours)
    for technique in mine:
        plain = technique.export(plain, given)
    merged = reference.merge_and_unload().state_dict()
    assert plain.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(plain[name], tensor, rtol=0, atol=1e-13)
    assert not torch.equal(plain["0.weight"], mlp().get_parameter("0.weight"))


def test_first_values_have_the_same_distribution() -> None:
    wide = nn.Sequential(nn.Linear(4096, 4))
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(4096, 4)), peft.LoraConfig(r=8, target_modules=["0"]))  # type: ignore[arg-type]
    layer: Any = theirs.base_model.model.get_submodule("0")  # type: ignore[operator]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    mine: Any = scrimp.apply(wide, [LoRA(rank=8, targets="*")]).get_submodule("0.lora")
    for statistic in (torch.std, torch.max, torch.min):
        assert float(statistic(mine.a.detach())) == pytest.approx(float(statistic(a)), rel=0.02)
    assert torch.equal(mine.b, b)
