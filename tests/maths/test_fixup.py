"""Fixup: factors against the formulas, zeros, shifts, and what learns first."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.normless import fill, stacks
from scrimp.techniques.initialization.fixup import Fixup
from tiny import MODEL, example, recipe, run_of, step
from tiny_normless import KINDS, made

ATTENTION, MLP = r"(attention\.qkv|cross\.q|cross\.kv)\.weight", r"mlp\.up\.weight"
ZERO = r".*(attention\.proj|cross\.proj|mlp\.down)\.weight"


def branches(count: int, inside: str = r"") -> list[tuple[str, float]]:
    """Factors of a stack of so many branches."""
    return [(rf"{inside}blocks\.\d+\.{ATTENTION}", count ** (-1 / 6)), (rf"{inside}blocks\.\d+\.{MLP}", count**-0.5)]


FACTORS: dict[str, list[tuple[str, float]]] = {
    "causal-lm": branches(8),
    "masked-lm": branches(8),
    "classify, images": [*branches(8), (r"head\.weight", 0.0)],
    "seq2seq": branches(8 + 12, r"(en|de)coder\."),
    "masked-image": [*branches(8 + 2, r"(decoder\.)?"), (r"decoder\.predict\.weight", 0.0)],
    "contrastive": branches(8, r"(text|image)\."),
}


@pytest.mark.parametrize("entry", KINDS)
def test_factors(entry: str) -> None:
    """Every weight is the standard draw times the factor of the first pattern that its name matches."""
    run = made(entry, Fixup())
    first = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    fill(run.model, run.seed, "fixup")
    hit: set[str] = set()
    for name, p in run.model.named_parameters():
        rules = [(ZERO, 0.0), *FACTORS[entry]]
        pattern, factor = next(((w, f) for w, f in rules if re.fullmatch(w, name)), ("", 1.0))
        hit.add(pattern)
        torch.testing.assert_close(first[name], factor * p.detach(), rtol=1e-6, atol=0, msg=name)
        if factor == 0 and name.replace("weight", "bias") in first:
            assert not first[name.replace("weight", "bias")].any()
    assert {pattern for pattern, _ in FACTORS[entry]} <= hit


def test_a_gate_is_a_third_layer() -> None:
    run = run_of(recipe(Fixup(), model=MODEL | {"activation": "swiglu", "bias": False}))
    first = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    fill(run.model, run.seed, "fixup")
    for child in ("gate", "up"):
        name = f"blocks.1.mlp.{child}.weight"
        torch.testing.assert_close(first[name], 8**-0.25 * run.model.get_parameter(name).detach())
    assert not first["blocks.1.mlp.down.weight"].any()


def test_numbers_are_where_the_seams_allow() -> None:
    """A scale a branch, a shift before each of its linear layers; before the activation only where no bias is."""

    def names(**model: Any) -> set[str]:
        run = run_of(recipe(Fixup(), model=MODEL | model))
        return {n.removeprefix("blocks.0.") for n, _ in run.model.named_parameters()
                if n.startswith("blocks.0.") and n.endswith(("shift", "alpha"))}  # fmt: skip

    layers = ("attention.qkv", "attention.proj", "mlp.up", "mlp.down")
    usual = {"attention_scale.alpha", "mlp_scale.alpha", *(f"{layer}.fixup_shift.shift" for layer in layers)}
    assert names() == usual
    assert names(bias=False) == usual | {"mlp.up.fixup_bias.shift"}
    gated = usual | {"mlp.gate.fixup_shift.shift"}
    assert names(activation="swiglu") == gated
    assert names(activation="swiglu", bias=False) == gated | {"mlp.gate.fixup_bias.shift"}


def test_a_block_by_hand() -> None:
    run: Any = run_of(recipe(Fixup(), model=MODEL | {"dropout": 0.0, "bias": False}, dtype="float64"))
    block = run.model.blocks[1]
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    mlp, inside = block.mlp, dict(block.named_parameters())

    def linear(name: str, y: Tensor) -> Tensor:
        return (y + inside[f"{name}.fixup_shift.shift"]) @ inside[f"{name}.weight"].T

    q, k, v = (part.view(2, 5, 2, 16).transpose(1, 2) for part in linear("attention.qkv", x).split(32, -1))
    scores = (q @ k.transpose(2, 3) / 4).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 32)
    middle = x + inside["attention_scale.alpha"] * linear("attention.proj", mixed)
    up = torch.nn.functional.gelu(linear("mlp.up", middle) + inside["mlp.up.fixup_bias.shift"])
    expected = middle + inside["mlp_scale.alpha"] * linear("mlp.down", up)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    assert mlp.up.fixup_shift.shift is inside["mlp.up.fixup_shift.shift"]


@pytest.mark.parametrize("entry", KINDS)
def test_every_stack_begins_as_the_identity(entry: str) -> None:
    """And of its branches only the last layers have a gradient, and those only if the head is not zero."""
    for zero in (True, False):
        run = made(entry, Fixup(zero_head=zero))
        ends: dict[str, list[Tensor]] = {}
        for stack in stacks(run.model):
            seen = ends.setdefault(stack.path, [])
            stack.branches[0].block.register_forward_pre_hook(lambda m, x, seen=seen: seen.append(x[0].detach()))
            stack.branches[-1].block.register_forward_hook(lambda m, x, y, seen=seen: seen.append(y.detach()))
        batch = run.batch(0)
        assert run.backward
        run.backward(batch, run.task.count(batch))
        assert all(torch.equal(x, y) for x, y in ends.values())
        moved = {n for n, p in run.model.named_parameters() if p.grad is not None and p.grad.any()}
        heads = {n for n in moved if n.startswith(("head.", "decoder.predict."))}
        if zero and entry in ("classify, images", "masked-image"):
            assert heads and moved == heads
            continue
        last = {b.output for stack in stacks(run.model) for b in stack.branches}
        # What an encoder says is heard by the attention of its decoder, which is still closed.
        deaf = {"seq2seq": "encoder.", "masked-image": "blocks."}.get(entry, "none")
        wanted = {f"{path}.{kind}" for path in last if not path.startswith(deaf) for kind in ("weight", "bias")}
        assert {n for n in moved if ".blocks." in f".{n}"} == wanted


def test_a_classifier_begins_with_equal_logits() -> None:
    quiet = {"dropout": 0.0}
    run = made("classify, images", Fixup(), model=quiet)
    assert not run.model(run.batch(0)["images"]).any()
    kept = made("classify, images", Fixup(zero_head=False), model=quiet)
    assert kept.model(kept.batch(0)["images"]).any()


def test_a_tied_head_is_left_and_the_run_says_so() -> None:
    tied, untied = (run_of(recipe(Fixup(), model=MODEL | {"tied": t})) for t in (True, False))
    assert tied.model.get_parameter("embed.weight").any()
    assert len(tied.remarks) == 1 and "`head.weight` is the embedding's weight" in tied.remarks[0]
    assert not untied.model.get_parameter("head.weight").any() and untied.remarks == []
    assert run_of(recipe(Fixup(zero_head=False))).remarks == []


def test_numbers_learn_more_slowly_and_without_decay() -> None:
    run = run_of(recipe(Fixup(), example("adamw", lr=1e-2, weight_decay=0.5)))
    assert run.optimizer
    own = {id(p) for n, p in run.model.named_parameters() if n.endswith(("alpha", "shift"))}
    groups = [g for g in run.optimizer.param_groups if any(id(p) in own for p in g["params"])]
    assert [len(g["params"]) for g in groups] == [4 * 6]
    assert groups[0]["lr"] == pytest.approx(1e-3) and groups[0]["weight_decay"] == 0
    rest = [g for g in run.optimizer.param_groups if g is not groups[0]]
    assert {round(g["lr"], 9) for g in rest} == {1e-2}


def test_all_learn_after_a_few_steps() -> None:
    run = run_of(recipe(Fixup(), example("adam", lr=1e-2), model=MODEL | {"tied": False}))
    first = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in range(4):
        step(run)
    assert not [n for n, p in run.model.named_parameters() if torch.equal(p, first[n])]
