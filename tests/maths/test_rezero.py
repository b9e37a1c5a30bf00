"""ReZero: the identity at first, one number a block, and its layer written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.normless import stacks
from scrimp.techniques.initialization.rezero import ReZero
from tiny import MODEL, example, recipe, run_of, step
from tiny_normless import KINDS, made

QUIET = MODEL | {"dropout": 0.0}


class Layer(nn.Module):
    """A ReZero layer by hand: post-sum order, no norm, one alpha for both branches, dropout after the scale."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True, dtype=torch.float64)
        own = self.attention
        own.in_proj_weight, own.in_proj_bias = block.attention.qkv.weight, block.attention.qkv.bias
        own.out_proj.weight, own.out_proj.bias = block.attention.proj.weight, block.attention.proj.bias
        self.up, self.down, self.alpha = block.mlp.up, block.mlp.down, block.attention_scale.alpha

    def forward(self, x: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.alpha * self.attention(x, x, x, attn_mask=later, need_weights=False)[0]
        hidden = F.gelu(F.linear(x, self.up.weight, self.up.bias))
        return x + self.alpha * F.linear(hidden, self.down.weight, self.down.bias)


def test_blocks_are_the_layer_by_hand() -> None:
    run: Any = run_of(recipe(ReZero(), model=QUIET, dtype="float64"))
    block = run.model.blocks[1]
    with torch.no_grad():
        block.attention_scale.alpha.fill_(0.7)
        block.attention.qkv.bias.normal_()
        block.mlp.down.bias.normal_()
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    ours, theirs = block(x), Layer(block)(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    weights = [block.attention.qkv.weight, block.mlp.up.weight, block.attention_scale.alpha]
    for a, b in zip(*(torch.autograd.grad(y.pow(2).sum(), weights) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_it_begins_as_the_head_over_the_embeddings() -> None:
    model: Any = run_of(recipe(ReZero(), model=QUIET)).model
    tokens = torch.arange(16)[None]
    expected = model.head(model.embed(tokens) + model.positions(torch.arange(16)))
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("entry", KINDS)
def test_every_stack_begins_as_the_identity(entry: str) -> None:
    """To the last bit, with dropout; and only what stands outside the branches has a gradient at first."""
    run = made(entry, ReZero())
    ends: dict[str, list[Tensor]] = {}
    for stack in stacks(run.model):
        first, last = stack.branches[0].block, stack.branches[-1].block
        seen = ends.setdefault(stack.path, [])
        first.register_forward_pre_hook(lambda m, given, seen=seen: seen.append(given[0].detach()))
        last.register_forward_hook(lambda m, given, y, seen=seen: seen.append(y.detach()))
    batch = run.batch(0)
    assert run.backward
    run.backward(batch, run.task.count(batch))
    for x, y in ends.values():
        assert torch.equal(x, y)
    inside = tuple(f"{branch.path}." for stack in stacks(run.model) for branch in stack.branches)
    # What an encoder says is heard by the attention of its decoder, which is still closed.
    deaf = {"seq2seq": "encoder.", "masked-image": "blocks."}.get(entry, "none")
    for name, p in run.model.named_parameters():
        if name.startswith(inside) and (not name.endswith("alpha") or name.startswith(deaf)):
            assert p.grad is None or not p.grad.any(), name
        elif name.endswith("alpha"):
            assert p.grad is not None and p.grad.any(), name


def test_one_number_a_block() -> None:
    run = made("seq2seq", ReZero())
    found = {n: p for n, p in run.model.named_parameters() if "scale" in n}
    assert list(found) == [
        f"{side}.blocks.{i}.attention_scale.alpha" for side in ("encoder", "decoder") for i in range(4)
    ]
    for block in run.model.decoder.blocks:  # type: ignore[union-attr]
        assert block.attention_scale is block.cross_scale is block.mlp_scale
    assert all(p.shape == () and p.item() == 0 for p in found.values())


def test_gradient_of_a_number_is_the_sum_over_its_branches() -> None:
    """x + a f(x), then + a g(x + a f(x)): at a = 0 the derivative is f(x) + g(x)."""
    run: Any = run_of(recipe(ReZero(), model=QUIET, dtype="float64"))
    block = run.model.blocks[0]
    x, weight = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 5, 32, dtype=torch.float64)
    (block(x) * weight).sum().backward()
    expected = ((block.attention(x, None, None, None) + block.mlp(x)) * weight).sum()
    torch.testing.assert_close(block.attention_scale.alpha.grad, expected.detach(), rtol=1e-12, atol=1e-12)


def test_numbers_have_a_rate_of_their_own_and_no_decay() -> None:
    run = run_of(recipe(ReZero(scale_lr=3.0), example("adamw", lr=1e-2, weight_decay=0.5)))
    assert run.optimizer
    scales = {id(p) for n, p in run.model.named_parameters() if n.endswith("alpha")}
    groups = [g for g in run.optimizer.param_groups if any(id(p) in scales for p in g["params"])]
    assert [len(g["params"]) for g in groups] == [4]
    assert groups[0]["lr"] == pytest.approx(3e-2) and groups[0]["weight_decay"] == 0


def test_frozen_numbers_are_no_mistake() -> None:
    run = run_of(recipe(ReZero(), example("lora")))
    assert not any(p.requires_grad for n, p in run.model.named_parameters() if n.endswith("alpha"))


def test_blocks_open_in_the_second_step() -> None:
    run = run_of(recipe(ReZero(), example("adam", lr=1e-2), model=QUIET))
    weight = run.model.get_parameter("blocks.3.mlp.up.weight")
    before = weight.detach().clone()
    step(run)
    assert torch.equal(weight, before)
    step(run)
    assert not torch.equal(weight, before)
    alphas = [float(p.detach()) for n, p in run.model.named_parameters() if n.endswith("alpha")]
    assert all(math.isfinite(a) and a != 0 for a in alphas)
