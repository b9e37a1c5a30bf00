"""Adapters: their equations and places, first values, what they train, and what a block keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scrimp
from scrimp.errors import UserError
from scrimp.techniques.tuning.adapter import Adapter
from tiny import example, recipe, run_of, step
from tiny_tuning import kept_more, made, outputs, shaken


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_outputs_by_the_equation(placement: Any) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Sequential(nn.Linear(5, 6)).double()
    weight, bias = (p.detach().clone() for p in layer[0].parameters())
    technique = Adapter(placement=placement, bottleneck=3, activation="relu", scale=4.0, targets="0")
    tuned: Any = scrimp.apply(layer, [technique]) if placement != "houlsby" else None
    if tuned is None:  # it would train norms, of which this has none, and trains the adapter all the same
        tuned = scrimp.apply(layer, [technique])
    shaken(tuned)
    ad = tuned[0].adapter
    x = torch.randn(4, 5, dtype=torch.float64)
    y = x @ weight.T + bias
    z, factor = (x, 4.0) if placement == "parallel" else (y, 1.0)
    wanted = y + factor * (F.relu(z @ ad.down.T + ad.down_bias) @ ad.up.T + ad.up_bias)
    torch.testing.assert_close(tuned(x), wanted, rtol=0, atol=1e-13)
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == {
        f"0.adapter.{n}" for n in ("down", "down_bias", "up", "up_bias")
    }


def test_places_and_what_is_trained() -> None:
    found: dict[str, set[str]] = {}
    norms: dict[str, bool] = {}
    for placement in ("houlsby", "pfeiffer", "parallel"):
        run = made(Adapter(placement=placement, bottleneck=2))
        names = {n for n, p in run.model.named_parameters() if p.requires_grad}
        found[placement] = {n.split(".adapter.")[0] for n in names if ".adapter." in n}
        norms[placement] = "norm.weight" in names and "blocks.1.mlp_norm.bias" in names
        assert all(".adapter." in n or "norm" in n for n in names)
    branches = {f"blocks.{i}.{branch}" for i in (0, 1) for branch in ("attention", "mlp")}
    mlps = {name for name in branches if name.endswith("mlp")}
    assert found == {"houlsby": branches, "pfeiffer": mlps, "parallel": mlps}
    assert norms == {"houlsby": True, "pfeiffer": False, "parallel": False}


def test_first_values() -> None:
    plain = outputs(made())
    assert torch.equal(outputs(made(Adapter(placement="parallel", bottleneck=2))), plain)
    assert torch.equal(outputs(made(Adapter(placement="houlsby", bottleneck=2, std=1e-30))), plain)
    near = made(Adapter(placement="houlsby", bottleneck=8))
    change = float((outputs(near) - plain).abs().max())
    assert 0 < change < 1e-2 * float(plain.abs().max())
    down = near.model.blocks[0].mlp.adapter.down.detach()
    assert 0.015 < float(down.abs().max()) <= 0.02
    assert not near.model.blocks[0].mlp.adapter.up_bias.any()
    assert not torch.equal(down, near.model.blocks[1].mlp.adapter.down)


def test_only_what_it_names_moves() -> None:
    run = made(Adapter(placement="pfeiffer", bottleneck=2))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in range(2):
        step(run)
    assert {n for n, p in run.model.named_parameters() if not torch.equal(before[n], p)} == {
        n for n in before if ".adapter." in n
    }


@pytest.mark.parametrize(
    ("technique", "more"),
    [
        (Adapter(placement="pfeiffer", bottleneck=8), 1 + 2 * 8 / 32),  # its input, before and after the activation
        (Adapter(placement="houlsby", bottleneck=8), 2 + 4 * 8 / 32),
        (Adapter(placement="parallel", bottleneck=8), 1 + 2 * 8 / 32),
    ],
)
def test_what_a_block_keeps(technique: Adapter, more: float) -> None:
    assert kept_more(technique) == more


def test_what_takes_no_adapter_is_refused() -> None:
    with pytest.raises(UserError, match="`blocks` .* takes no step"):
        made(Adapter(targets="blocks"))
    with pytest.raises(UserError, match="already has a `adapter`"):
        scrimp.apply(scrimp.apply(nn.Sequential(nn.Linear(2, 2)), [Adapter(targets="0")]), [Adapter(targets="0")])
    with pytest.raises(UserError, match="holds no linear layer"):
        made(Adapter(targets="attention_norm"))


def test_zeros_in_both_matrices_are_refused() -> None:
    with pytest.raises(UserError, match="std must be above 0"):
        Adapter(std=0.0)


@pytest.mark.parametrize("name", ["adapter", "compacter"])
def test_norms_that_are_not_there_are_told(name: str) -> None:
    def remarks(*names: str) -> list[str]:
        return [r for r in run_of(recipe(*map(example, names))).remarks if "trains no norms" in r]

    assert not remarks(name)
    assert len(remarks("fixup", name)) == 1
