"""Factorized tables of tokens: sizes, the plain model that they equal, gradients, and what has no place for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.groups import trainable
from scrimp.machines.machine import Machine
from scrimp.meter import LiveBytes, flops_per_token
from scrimp.models.generate import generate
from scrimp.models.hub import write
from scrimp.models.transformer import TransformerConfig
from scrimp.planning import plan
from scrimp.restore import adopted
from scrimp.run import exported
from scrimp.technique import Technique
from scrimp.techniques.parallelism.share import Share
from scrimp.techniques.tuning.prompt import Prompt
from scrimp.training import train
from tiny import example, recipe, run_of, step

CPU = Machine(name="any", device="cpu", memory=1 << 34, flops={"float32": 1e11}, bandwidth=1e10, overhead=1e-5)
V, C, E = 32, 16, 6
SMALL: dict[str, Any] = {"layers": 2, "width": C, "heads": 2}
THIN = {**SMALL, "embed_width": E}


def net(**options: Any) -> Any:
    """A model in float64, all of its parameters random."""
    model = TransformerConfig(**{**SMALL, "vocab": V, "context": 8, **options}).build().double().eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, 0.0, 0.3, torch.Generator().manual_seed(sum(map(ord, name))))
    return model


def tokens() -> Tensor:
    return torch.arange(16).view(2, 8) * 5 % V


def whole(thin: Any) -> tuple[Any, Any, Any]:
    """The model with whole tables that equals a factorized one; its first table, [V, C], and its last."""
    config = thin.config
    plain = net(causal=config.causal, tied=False, head=config.head, classes=config.classes)
    with torch.no_grad():
        for name, p in thin.named_parameters():
            if name in dict(plain.named_parameters()) and plain.get_parameter(name).shape == p.shape:
                plain.get_parameter(name).copy_(p)
        plain.embed.weight.copy_(thin.embed.weight @ thin.embed_project.weight.T)
        if config.head == "lm":
            plain.head.weight.copy_(thin.head.weight @ thin.head_project.weight)
    return plain, plain.embed.weight, plain.head.weight


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_outputs_are_those_of_a_model_whose_tables_are_the_products(tied: bool) -> None:
    thin = net(embed_width=E, head="lm", tied=tied)
    plain, _, _ = whole(thin)
    torch.testing.assert_close(thin(tokens()), plain(tokens()), rtol=0, atol=1e-12)
    prompt = tokens()[0, :3]
    assert torch.equal(generate(thin, prompt, 4, temperature=0.0), generate(plain, prompt, 4, temperature=0.0))


def test_classes_are_those_of_a_model_whose_table_is_the_product() -> None:
    thin = net(embed_width=E, head="classes", classes=3, causal=False)
    assert not hasattr(thin, "head_project")
    torch.testing.assert_close(thin(tokens()), whole(thin)[0](tokens()), rtol=0, atol=1e-12)


def test_hidden_tokens_are_told_apart_by_the_same_table() -> None:
    thin = net(embed_width=E, head="mlm", causal=False)
    seen = thin.head_transform.dense(thin.states(tokens()))
    assert seen.shape[-1] == E
    seen = nn.functional.layer_norm(nn.functional.gelu(seen), (E,), thin.head_transform.norm.weight,
                                    thin.head_transform.norm.bias)  # fmt: skip
    wanted = seen @ thin.embed.weight.T + thin.head.bias
    torch.testing.assert_close(thin(tokens()), wanted, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_products() -> None:
    """Of a table W = T A^T: dT = dW A and dA = dW^T T; a tied table has the sum of both its uses."""
    thin = net(embed_width=E, head="lm")
    plain, first, last = whole(thin)
    for model in (thin, plain):
        model(tokens(), tokens().flip(1)).backward()
    table, into, out = thin.embed.weight, thin.embed_project.weight, thin.head_project.weight
    torch.testing.assert_close(table.grad, first.grad @ into + last.grad @ out.T, rtol=0, atol=1e-11)
    torch.testing.assert_close(into.grad, (table.T @ first.grad).T, rtol=0, atol=1e-11)
    torch.testing.assert_close(out.grad, table.T @ last.grad, rtol=0, atol=1e-11)


def test_what_is_saved_is_counted() -> None:
    for head, more in (("lm", C * E), ("classes", 0), ("mlm", -(C - E) * (C + 3))):
        thin, plain = (net(head=head, classes=3, causal=head == "lm", embed_width=e) for e in (E, 0))
        assert count(plain) - count(thin) == V * C - (V * E + E * C + more)
    thin, plain = net(embed_width=E, head="lm"), net(head="lm")
    assert flops_per_token(plain, 8) - flops_per_token(thin, 8) == 6 * (V * C - (V * E + 2 * E * C))


def test_first_states_are_as_large_as_without() -> None:
    wide = {"layers": 1, "width": 256, "heads": 2, "positions": "none"}
    models: Any = [run_of(recipe(model={**wide, "embed_width": e})).model for e in (0, 64)]
    plain, thin = (float(m.embed_project(m.embed(torch.arange(V))).detach().std()) for m in models)
    assert 0.9 < thin / plain < 1.1


@pytest.mark.parametrize("more", [(), (example("fused_loss"), example("recompute"), Share(distinct=1))])
def test_the_plan_is_right(more: tuple[Technique, ...], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(*more, example("adamw"), model=THIN, out=str(tmp_path))
    planned = plan(made, CPU, made.data.open())
    [stage] = planned.stages
    if not more:
        attention = 2 * 2 * 4 * 16 * 16 * C
        assert stage.flops()["forward"] == attention + 2 * 64 * (2 * 12 * C * C + 2 * E * C + V * E)
    assert stage.parameters == count(run_of(made).model)
    monkeypatch.setenv("SCRIMP_PRODUCTS", "default")
    with LiveBytes() as meter:
        train(made, data=made.data.open(), force=True)
    assert 0 <= meter.peak - planned.live <= 4096  # the batches, which a plan does not count


def test_with_one_shared_block_little_is_left() -> None:
    model: Any = run_of(recipe(Share(distinct=1), model=THIN)).model
    positions, norm = 16 * C, 2 * C
    assert count(model) == V * E + 2 * E * C + positions + norm + count(model.blocks[0])


def test_muon_leaves_the_matrices_to_adam_as_parts_of_tables() -> None:
    run: Any = run_of(recipe(example("muon"), model=THIN))
    muon, adam = run.optimizer.parts
    names = {id(p): n for n, p in trainable(run.model).items()}
    inside, outside = ({names[id(p)] for g in part.param_groups for p in g["params"]} for part in (muon, adam))
    assert inside == {n for n, p in trainable(run.model).items() if n.startswith("blocks.") and p.ndim == 2}
    assert {"embed.weight", "embed_project.weight", "head_project.weight"} <= outside


def test_a_language_models_weights_begin_a_classifier() -> None:
    given, config = net(embed_width=E, head="lm"), net(embed_width=E, head="classes", classes=3).config
    weights = adopted(dict(given.named_parameters()), given.config, config)
    assert {"embed.weight", "embed_project.weight"} <= set(weights)
    assert not [name for name in weights if name.startswith("head")]


def test_prompts_begin_as_embedded_tokens() -> None:
    run: Any = run_of(recipe(Prompt(length=5, start="text", text="ab"), model=THIN))
    ids = torch.tensor((run.data.tokenizer.encode("ab") * 3)[:5])
    assert run.model.prompts.weight.shape == (5, C)
    assert torch.equal(run.model.prompts.weight, run.model.embed_project(run.model.embed(ids)))
    given = run_of(recipe(model=THIN, seed=9))
    run = run_of(recipe(Prompt(length=5, start="text", text="ab"), model=THIN), source=given.state())
    wanted: Any = given.model
    torch.testing.assert_close(run.model.prompts.weight, wanted.embed_project(wanted.embed(ids)))


@pytest.mark.parametrize("names", [("fixup",), ("rezero",), ("widen",), ("train_large",), ("early_bird",), ("ladder",),
                                   ("lora", "quantized_base"), ("compound_grow",)])  # fmt: skip
def test_techniques_that_do_not_know_of_it_train_and_export_it(names: tuple[str, ...]) -> None:
    made = recipe(*(example(name) for name in names), model={**THIN, "layers": 4})
    run = run_of(made)
    step(run)
    assert all(torch.isfinite(t).all() for t in exported(run).values())


def test_what_has_no_place_for_it_is_refused(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="derived for one table"):
        run_of(recipe(example("t_fixup"), model=THIN))
    for width in (C, -1):
        with pytest.raises(UserError, match="embed_width"):
            TransformerConfig(**SMALL, embed_width=width)
    with pytest.raises(UserError, match="is one table"):
        TransformerConfig(**THIN, source="folder")
    llama = {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False}
    bert = {"causal": False, "norm_at": "post", "embed_norm": True, "segments": 2, "head": "mlm"}
    for options in ({}, llama, bert):
        model = net(embed_width=E, **options)
        with pytest.raises(UserError, match=f"cannot hold a model with `embed_width: {E}`"):
            write(tmp_path / "folder", model.config, dict(model.named_parameters()))
