"""What the initializations without norms share, on every model of ours."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.layers import Norm
from scrimp.normless import Scale, put_scale, stacks
from scrimp.run import exported
from scrimp.technique import Technique
from scrimp.techniques.tuning.lora import LoRA
from scrimp.training import train
from tiny import MODEL, example, recipe, run_of, step
from tiny_normless import KINDS, Bare, made

FAMILY = ("fixup", "rezero", "skipinit", "t_fixup")


@pytest.mark.parametrize("norm_at", ["pre", "post"])
@pytest.mark.parametrize("entry", KINDS)
def test_no_norm_is_left(entry: str, norm_at: str) -> None:
    """And each block is x + branch(x), wherever its norms were."""
    model = {"norm_at": norm_at, "dropout": 0.0}
    run = made(entry, Bare(), model=model)
    assert any(isinstance(m, Norm) for m in made(entry, model=model).model.modules())
    left = [name for name, m in run.model.named_modules() if isinstance(m, Norm)]
    assert left == (["head_transform.norm"] if entry == "masked-lm" else [])
    for stack in stacks(run.model):
        block: Any = stack.branches[0].block
        x, states = (torch.randn(2, 5, block.mlp.up.weight.shape[1], dtype=torch.float64) for _ in range(2))
        assert block.pre
        middle = x + block.attention(x, None, None, None)
        if block.cross is not None:
            middle = middle + block.cross(middle, states, None)
        torch.testing.assert_close(block(x, states=states), middle + block.mlp(middle), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("entry", "given"), [("masked-lm", {"embed_norm": True}), ("seq2seq", {"embed_norm": True}), ("contrastive", {})]
)
def test_norms_of_embeddings_go_too(entry: str, given: dict[str, Any]) -> None:
    names = {n for n, _ in made(entry, model=given).model.named_parameters()}
    assert any("embed_norm" in n or "pre_norm" in n for n in names)
    names = {n for n, _ in made(entry, Bare(), model=given).model.named_parameters()}
    assert not any("embed_norm" in n or "pre_norm" in n for n in names)


def test_norms_of_queries_and_keys_stay_unless_asked_for() -> None:
    for technique, stay in (("rezero", True), ("skipinit", True), ("t_fixup", True), ("fixup", False)):
        run: Any = run_of(recipe(example(technique), model=MODEL | {"qk_norm": True}))
        attention = run.model.blocks[0].attention
        assert (attention.q_norm is not None) is (attention.k_norm is not None) is stay


def test_stacks_are_those_of_the_model() -> None:
    def seen(entry: str) -> list[tuple[str, int, int, bool]]:
        return [(s.path, s.depth, len(s.branches), s.causal) for s in stacks(made(entry).model)]

    assert seen("causal-lm") == [("", 4, 8, True)]
    assert seen("classify, images") == [("", 4, 8, False)]
    assert seen("seq2seq") == [("encoder", 4, 8, False), ("decoder", 4, 12, True)]
    assert seen("masked-image") == [("", 4, 8, False), ("decoder", 1, 2, False)]
    assert sorted(seen("contrastive")) == [("image", 4, 8, False), ("text", 4, 8, True)]


@pytest.mark.parametrize("entry", KINDS)
def test_standard_weights(entry: str) -> None:
    """Xavier for matrices, those of q, k and v each by its own sizes; embeddings d^(-1/2); patches by their values."""
    run: Any = made(entry, Bare(), model={"layers": 1, "kv_heads": 1})
    for name, p in run.model.named_parameters():
        weight = p.detach()
        if name.endswith("bias") or "norm" in name or name == "logit_scale":
            continue
        parts = [weight]
        if name.endswith("attention.qkv.weight"):
            rows, width = weight.shape
            parts = list(weight.split((width, (rows - width) // 2, (rows - width) // 2)))
        elif name.endswith("cross.kv.weight"):
            parts = list(weight.split((16, 16)))
        normal = any(word in name for word in ("positions", "patches", "_token")) or name.endswith("embed.weight")
        if normal and name != "decoder.embed.weight":
            off = 5 / math.sqrt(2 * weight.numel())
            assert float(weight.square().mean().sqrt()) == pytest.approx(weight.shape[-1] ** -0.5, rel=off), name
            continue
        for part in parts:
            bound = math.sqrt(6 / sum(part.shape))
            assert (1 - 8 / part.numel()) * bound < float(part.abs().max()) <= bound * (1 + 1e-6), name
            assert float(part.square().mean().sqrt()) == pytest.approx(bound / math.sqrt(3), rel=0.2), name


def change_of_one_step(technique: Technique | None, rule: Technique) -> float:
    """Root mean square of what one update changes in the logits of 16 layers."""
    deep = {"layers": 16, "width": 32, "heads": 2, "dropout": 0.0}
    run = run_of(recipe(rule, *([technique] if technique else []), model=deep))
    tokens = run.batch(0)["tokens"]
    before = run.model(tokens).detach()
    step(run)
    return float((run.model(tokens).detach() - before).pow(2).mean().sqrt())


def test_the_first_update_changes_deep_models_little() -> None:
    """Far less than that of the network without norms, and less than with them."""
    rule = example("adam", lr=1e-3)
    bare, normed = change_of_one_step(Bare(), rule), change_of_one_step(None, rule)
    for name in FAMILY:
        change = change_of_one_step(example(name), rule)
        assert change < bare / 20, name
        assert change < normed / 2, name


@pytest.mark.parametrize("name", ["fixup", "rezero", "skipinit"])
@pytest.mark.parametrize("entry", KINDS)
def test_exported_weights_are_the_same_function(entry: str, name: str) -> None:
    """Without a scale or a shift, and with what LoRA added."""
    more = {"bias": False, "activation": "swiglu"} if entry == "causal-lm" else {}
    technique = example(name, **({"initial": "depth"} if name == "skipinit" else {}))
    run = made(entry, technique, LoRA(rank=2, targets="mlp.*"), model={"dropout": 0.0, **more})
    with torch.no_grad():
        for i, p in enumerate(run.model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(i)))
    batch = run.batch(0)
    with torch.no_grad():
        wanted = float(run.task.loss(run.model.eval(), batch))
    plain = exported(run)
    assert not [n for n in plain if "alpha" in n or "shift" in n or "lora" in n]
    bare = made(entry, Bare(), model={"dropout": 0.0, **more, "bias": True})
    own = dict(bare.model.named_parameters())
    with torch.no_grad():
        for n, p in own.items():
            p.copy_(plain[n]) if n in plain else p.zero_()
        assert plain.keys() <= own.keys()
        assert float(bare.task.loss(bare.model.eval(), batch)) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("name", FAMILY)
def test_weights_trained_with_norms_are_refused(name: str) -> None:
    source: Any = {"model": dict(run_of(recipe()).model.named_parameters())}
    with pytest.raises(UserError, match=rf"techniques\.{name}: .* trained with norms, such as `blocks\.0\.att"):
        run_of(recipe(example(name)), source=source)


@pytest.mark.parametrize("name", FAMILY)
def test_weights_to_start_from_are_kept(name: str) -> None:
    first = train(recipe(example(name)), save=False).run.model
    source: Any = {"model": {n: p.detach().clone() for n, p in first.named_parameters()}}
    again = run_of(recipe(example(name)), source=source).model
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in first.named_parameters())


def test_growth_says_that_nothing_scales_the_copies_anew() -> None:
    run = run_of(recipe(example("t_fixup"), example("stack")))
    assert any("which nothing scales anew" in remark for remark in run.remarks)
    assert not run_of(recipe(example("t_fixup"))).remarks


@pytest.mark.parametrize("name", ["fixup", "rezero"])
def test_growth_copies_what_is_added(name: str) -> None:
    run = train(recipe(example(name), example("stack", at=(0.5,))), save=False).run
    assert len(stacks(run.model)[0].branches) == 8


@pytest.mark.parametrize("name", FAMILY)
def test_models_of_others_are_refused_by_the_seam_they_lack(name: str) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    given: Any = SimpleNamespace(where=lambda technique: f"techniques.{name}", remarks=[])
    with pytest.raises(UserError, match=rf"techniques\.{name}: `layers\.0` has no `attention_norm` to remove"):
        example(name).model(Plain(), given)


def test_a_seam_is_taken_once() -> None:
    run = run_of(recipe())
    branch = stacks(run.model)[0].branches[1]
    put_scale(branch, Scale(0.0, torch.zeros(())))
    with pytest.raises(UserError, match=r"`blocks\.0\.mlp_scale` is taken"):
        put_scale(branch, Scale(0.0, torch.zeros(())))


def test_draws_depend_on_seed_and_name_only() -> None:
    def weights(*techniques: Any, **settings: Any) -> dict[str, Tensor]:
        return dict(run_of(recipe(Bare(), *techniques, **settings)).model.named_parameters())

    plain, tuned, other = weights(), weights(LoRA(rank=2)), weights(seed=1)
    assert all(torch.equal(plain[n], tuned[n]) for n in plain)
    assert not torch.equal(plain["embed.weight"], other["embed.weight"])
    deeper = weights(model=MODEL | {"layers": 8})
    assert all(torch.equal(plain[n], deeper[n]) for n in plain)
