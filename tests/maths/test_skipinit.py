"""SkipInit: one number a branch, and what each starts with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.normless import stacks
from scrimp.techniques.initialization.rezero import ReZero
from scrimp.techniques.initialization.skipinit import SkipInit
from tiny import MODEL, example, recipe, run_of
from tiny_normless import KINDS, Bare, made

COUNTS = {"causal-lm": [8], "masked-lm": [8], "classify, images": [8], "seq2seq": [8, 12], "masked-image": [8, 2],
          "contrastive": [8, 8]}  # fmt: skip
"""Branches of each stack."""


@pytest.mark.parametrize("entry", KINDS)
def test_first_values(entry: str) -> None:
    """0, or the root of one over the branches of the stack; each branch has its own number."""
    for initial in ("zero", "depth"):
        run = made(entry, SkipInit(initial=initial))
        found = stacks(run.model)
        assert [len(stack.branches) for stack in found] == COUNTS[entry]
        scales = [getattr(b.block, f"{b.kind}_scale") for stack in found for b in stack.branches]
        assert len({id(scale.alpha) for scale in scales}) == sum(COUNTS[entry])
        expected = [count**-0.5 if initial == "depth" else 0.0 for count in COUNTS[entry] for _ in range(count)]
        assert [float(scale.alpha.detach()) for scale in scales] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("entry", KINDS)
def test_every_stack_begins_as_the_identity(entry: str) -> None:
    run = made(entry, SkipInit())
    ends: dict[str, list[Tensor]] = {}
    for stack in stacks(run.model):
        seen = ends.setdefault(stack.path, [])
        stack.branches[0].block.register_forward_pre_hook(lambda m, x, seen=seen: seen.append(x[0].detach()))
        stack.branches[-1].block.register_forward_hook(lambda m, x, y, seen=seen: seen.append(y.detach()))
    batch = run.batch(0)
    assert run.backward
    run.backward(batch, run.task.count(batch))
    assert all(torch.equal(x, y) for x, y in ends.values())
    inside = tuple(f"{branch.path}." for stack in stacks(run.model) for branch in stack.branches)
    inner = {n: p for n, p in run.model.named_parameters() if n.startswith(inside) and not n.endswith("alpha")}
    assert not [n for n, p in inner.items() if p.grad is not None and p.grad.any()]


def test_a_branch_is_scaled_and_the_stream_is_not() -> None:
    run: Any = run_of(recipe(SkipInit(), model=MODEL | {"dropout": 0.0}, dtype="float64"))
    block = run.model.blocks[2]
    with torch.no_grad():
        block.attention_scale.alpha.fill_(0.5)
        block.mlp_scale.alpha.fill_(-2.0)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    middle = x + 0.5 * block.attention(x, None, None, None)
    torch.testing.assert_close(block(x), middle - 2 * block.mlp(middle), rtol=0, atol=1e-13)


def test_it_begins_as_rezero_does() -> None:
    """Same function at first; two numbers a block instead of one."""
    one, two = run_of(recipe(ReZero())), run_of(recipe(SkipInit()))
    names = [{n for n, _ in run.model.named_parameters()} for run in (one, two)]
    assert names[1] - names[0] == {f"blocks.{i}.mlp_scale.alpha" for i in range(4)}
    assert not names[0] - names[1]


def test_the_stream_keeps_its_size_over_depth() -> None:
    """Without norms and numbers it grows exponentially; with 1 / sqrt(d) by no more than a few times."""
    deep = {"layers": 24, "width": 32, "heads": 2}
    sizes = {}
    for name, technique in (("bare", Bare()), ("zero", SkipInit()), ("depth", SkipInit(initial="depth"))):
        model: Any = run_of(recipe(technique, model=deep)).model.eval()
        seen: list[float] = []
        for block in (model.blocks[0], model.norm):
            block.register_forward_pre_hook(lambda m, x, seen=seen: seen.append(float(x[0].detach().std())))
        model(torch.arange(16)[None])
        sizes[name] = seen[1] / seen[0]
    assert sizes["zero"] == 1
    assert 1 < sizes["depth"] < 4
    assert sizes["bare"] > 50


def test_numbers_have_a_rate_of_their_own_and_no_decay() -> None:
    run = run_of(recipe(SkipInit(scale_lr=0.5), example("adamw", lr=1e-2, weight_decay=0.5)))
    assert run.optimizer
    scales = {id(p) for n, p in run.model.named_parameters() if n.endswith("alpha")}
    groups = [g for g in run.optimizer.param_groups if any(id(p) in scales for p in g["params"])]
    assert [len(g["params"]) for g in groups] == [8]
    assert groups[0]["lr"] == pytest.approx(5e-3) and groups[0]["weight_decay"] == 0
