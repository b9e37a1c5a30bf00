"""LoRA: starts as the base, trains only its own, merges exactly, two ranks side by side, any module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import scrimp
from scrimp.errors import UserError
from scrimp.registry import technique_class
from scrimp.run import exported
from tiny import example, recipe, run_of, step

LoRA = technique_class("lora")


def test_it_begins_as_the_base_bit_by_bit() -> None:
    base, tuned = run_of(recipe()), run_of(recipe(example("lora")))
    tokens = base.batch(0)["tokens"]
    base.model.eval()
    tuned.model.eval()
    assert torch.equal(base.model(tokens), tuned.model(tokens))


def test_only_adapters_move_and_the_merge_is_exact() -> None:
    run = run_of(recipe(example("lora", targets="attention.*|mlp.*"), dtype="float64"))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in range(5):
        step(run)
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved
    assert all(".lora." in n for n in moved)
    plain = exported(run)
    assert set(plain) == set(run.base)
    merged = run_of(recipe(dtype="float64"), source={"model": plain})
    tokens = run.batch(0)["tokens"]
    run.model.eval()
    merged.model.eval()
    assert torch.allclose(run.model(tokens), merged.model(tokens), atol=1e-12)


def test_two_ranks_on_disjoint_patterns() -> None:
    run = run_of(recipe(LoRA(rank=2, targets="attention.qkv"), LoRA(rank=4, targets="mlp.up")))
    block = run.model.blocks[0]
    assert block.attention.qkv.lora.a.shape[0] == 2
    assert block.mlp.up.lora.a.shape[0] == 4


def test_two_ranks_on_one_layer_are_refused() -> None:
    with pytest.raises(UserError, match="already has a `lora`"):
        run_of(recipe(LoRA(rank=2, targets="attention.qkv"), LoRA(rank=4, targets="attention.*")))


def test_a_frozen_layer_keeps_nothing_but_the_adapters_input() -> None:
    layer = scrimp.apply(nn.Sequential(nn.Linear(8, 8)), [LoRA(rank=1, targets="0")])
    kept: list[torch.Size] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.shape)
        return t

    x = torch.randn(5, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert kept.count(torch.Size([5, 8])) <= 1


def test_apply_works_on_any_module() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    before = mlp(x)
    names = {n for n, _ in mlp.named_parameters()}
    tuned = scrimp.apply(mlp, [LoRA(rank=2, targets="*")])
    assert torch.equal(tuned(x), before)
    assert names < {n for n, _ in tuned.named_parameters()}
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    tuned(x).pow(2).sum().backward()
    optimizer.step()
    assert not torch.equal(tuned(x), before)


def test_apply_refuses_what_needs_the_trainer() -> None:
    with pytest.raises(UserError, match="acts in `backward`"):
        scrimp.apply(nn.Linear(2, 2), [example("accumulate")])
