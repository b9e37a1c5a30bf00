"""Train large, then compress: what stays is what matters most, under the names and in the sizes of the recipe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scrimp.arrange import clash
from scrimp.errors import UserError
from scrimp.recipe import Recipe
from scrimp.run import Run, build, exported
from scrimp.techniques.overparameterization.train_large import TrainLarge, importance
from scrimp.training import train
from tiny import MODEL, TinyData, assert_equal, example, flat, recipe, run_of, step
from tiny_tasks import TINY, Memory

if TYPE_CHECKING:
    from scrimp.technique import State

GROUPED = {**MODEL, "heads": 4, "kv_heads": 2, "activation": "swiglu", "qk_norm": True, "positions": "rotary",
           "norm": "rmsnorm", "hidden": 48}  # fmt: skip
KINDS = {"decoder": "causal-lm", "grouped": "causal-lm", "encoder": "masked-lm", "vision": "classify, images",
         "encoder_decoder": "seq2seq", "two_towers": "contrastive", "autoencoder": "masked-image"}  # fmt: skip


def made_for(kind: str, *techniques: Any) -> Recipe:
    entry = KINDS[kind]
    model = GROUPED if kind == "grouped" else dict(TINY[entry].model)
    return recipe(*techniques, model=model, data=Memory(entry), task=TINY[entry].name or entry, dtype="float64")


def crossed(run: Run) -> tuple[Run, dict[str, Tensor]]:
    """The next stage, built as training builds it, and its state before the first step."""
    clock, order = run.clock, run.order
    clock.step = max(clock.step, 4)
    decisions = {order.key(t): t.decide(run) for t in order.slots["decide"]}
    clock.cuts.append(clock.position)
    clock.stage += 1
    state: State = {kind: {n: t.detach().clone() for n, t in tensors.items()} for kind, tensors in run.state().items()}
    after = build(run.recipe, run.data, clock, state, decisions=decisions)
    return after, flat(after.state())


def output(run: Run) -> Tensor:
    assert run.evaluate
    batch = run.batch(0)
    return run.evaluate(lambda model: run.task.loss(model, batch)) / run.task.count(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_ends_with_the_recipes_model_and_an_export_always_is_it(kind: str) -> None:
    # The image tower says how many heads it has, not how wide they are.
    technique = TrainLarge(hidden=1.5, heads=1.0 if kind == "two_towers" else 2.0, layers=2, until="4 step")
    run = run_of(made_for(kind, technique))
    plain = run_of(made_for(kind))
    sizes = {n: p.shape for n, p in plain.model.named_parameters()}
    assert sum(p.numel() for p in run.model.parameters()) > 1.5 * sum(s.numel() for s in sizes.values())
    early = exported(run)
    after, _ = crossed(run)
    assert {n: p.shape for n, p in after.model.named_parameters()} == sizes
    assert_equal(early, exported(after))
    plain.model.load_state_dict(early, strict=False)
    assert output(plain) == output(after)


@pytest.mark.parametrize("kind", ["decoder", "grouped", "encoder_decoder"])
def test_what_stays_computes_as_the_wide_model_without_the_rest(kind: str) -> None:
    run = run_of(made_for(kind, TrainLarge(hidden=1.5, heads=2.0, until="4 step")))
    after, _ = crossed(run)
    with torch.no_grad():
        for path, kept in after.decisions["train_large"]["blocks"].items():
            out, down = (run.model.get_parameter(f"{path}.{n}.weight") for n in ("attention.proj", "mlp.down"))
            columns = out.unflatten(1, (kept["of_units"], -1))
            for unit in set(range(kept["of_units"])) - set(kept["units"]):
                columns[:, unit] = 0.0
            if "cross" in kept:
                columns = run.model.get_parameter(f"{path}.cross.proj.weight").unflatten(1, (kept["of_cross"], -1))
                columns[:, [u for u in range(kept["of_cross"]) if u not in kept["cross"]]] = 0.0
            down[:, [n for n in range(kept["of_neurons"]) if n not in kept["neurons"]]] = 0.0
    assert abs(output(run) - output(after)) < 1e-12


def test_the_importance_is_a_product_of_norms() -> None:
    run = run_of(recipe(TrainLarge(), model={**MODEL, "activation": "swiglu", "hidden": 4}, dtype="float64"))
    block = run.model.get_submodule("blocks.1")
    named = {f"x.{n}": torch.zeros_like(p) for n, p in block.named_parameters()}
    named["x.mlp.up.weight"][2, :2] = torch.tensor([3.0, 4.0])
    named["x.mlp.gate.weight"][2, 5] = 2.0
    named["x.mlp.down.weight"][7, 2] = 0.5
    # Rows of v are the last 32 of 96; head 1 has the last 16 of them, and the last 16 columns of proj.
    named["x.attention.qkv.weight"][80, 0], named["x.attention.qkv.weight"][95, 1] = 6.0, 8.0
    named["x.attention.qkv.weight"][10, 0] = 100.0
    named["x.attention.proj.weight"][3, 16] = 0.1
    heads, neurons = importance("x", block, named)
    assert heads.tolist() == pytest.approx([0.0, 1.0])
    assert neurons.tolist() == pytest.approx([0, 0, 5.0 * 2.0 * 0.5, 0, 0, 0, 0, 0])


def test_the_most_important_neurons_and_spread_blocks_stay_with_their_moments() -> None:
    technique = TrainLarge(hidden=2.0, layers=3, until="4 step")
    run = run_of(recipe(example("adamw"), example("ema"), technique, dtype="float64"))
    for _ in range(4):
        step(run)
    with torch.no_grad():
        run.model.get_parameter("blocks.2.mlp.down.weight")[:, 100:228] *= 100
    before = flat(run.state())
    after, state = crossed(run)
    blocks = after.decisions["train_large"]["blocks"]
    assert [kept["from"] for kept in blocks.values()] == ["blocks.0", "blocks.2", "blocks.4", "blocks.6"]
    assert blocks["blocks.1"]["neurons"] == list(range(100, 228))
    for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq", "memory.ema"):
        got, wide = (table[f"{kind}/blocks.{i}.mlp.up.weight"] for table, i in ((state, 1), (before, 2)))
        assert torch.equal(got, wide[100:228])
        name = "attention_norm.weight"
        assert torch.equal(state[f"{kind}/blocks.3.{name}"], before[f"{kind}/blocks.6.{name}"])
    assert not [n for n in state if "blocks.4" in n]


@pytest.mark.parametrize("kind", ["decoder", "encoder", "vision", "encoder_decoder"])
def test_the_loss_gets_the_divergence_from_the_wide_model(kind: str) -> None:
    technique = TrainLarge(hidden=2.0, until="4 step", distill=0.5)
    run = run_of(made_for(kind, technique))
    with torch.no_grad():
        for p in run.model.parameters():
            p.mul_(4)
    after, state = crossed(run)
    plain = run_of(made_for(kind))
    plain.model.load_state_dict(exported(after), strict=False)
    assert after.loss
    assert plain.loss
    for made in (run, after, plain):
        made.model.eval()
    batch = after.batch(0)
    logits: list[Tensor] = []
    with torch.no_grad():
        for made in (run, plain):
            hook = made.model.head.register_forward_hook(lambda m, i, o: logits.append(o.flatten(0, -2)))  # type: ignore
            base = made.task.loss(made.model, batch)
            hook.remove()
        got = float(after.loss(after.model, batch) - base)
    wide, small = (F.softmax(each, -1) for each in logits)
    rows = (wide * (wide / small).log()).sum(-1)
    if "targets" in batch and len(rows) == batch["targets"].numel():
        rows = rows[batch["targets"].flatten() != -100]
    assert got == pytest.approx(0.5 * float(rows.sum()), rel=1e-4)
    assert float(rows.sum()) > 1e-3
    kept = [n for n in state if n.startswith("memory.train_large/teacher/")]
    assert len(kept) == len(list(run.model.parameters()))
    assert all(torch.equal(state[n], run.model.get_parameter(n.partition("teacher/")[2])) for n in kept)
    assert not [n for n, _ in after.model.named_parameters() if "teacher" in n]


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_the_cut_is_resumed_bitwise_through_files(distill: float, tmp_path: Path) -> None:
    technique = TrainLarge(hidden=1.5, heads=2.0, layers=1, until="3 step", distill=distill)
    made = recipe(example("adamw"), technique, out=str(tmp_path), name="whole", duration="6 step",
                  checkpoint={"every": "1 step", "keep": 99})  # fmt: skip
    whole = train(made, data=TinyData().open())
    for cut in (2, 5):
        copy = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "whole", copy)
        raw = yaml.safe_load((copy / "recipe.yaml").read_text()) | {"data": "text"}
        (copy / "recipe.yaml").write_text(yaml.safe_dump(raw))
        resumed = train(resume=copy / f"checkpoints/step-{cut:09d}", data=TinyData().open())
        assert_equal(flat(whole.run.state()), flat(resumed.run.state()))


def flops(run: Run) -> int:
    """Of a forward and backward pass."""
    assert run.backward
    batch = run.batch(0)
    with FlopCounterMode(display=False) as counter:
        run.backward(batch, run.task.count(batch))
    return counter.get_total_flops()


def test_a_step_after_the_cut_has_fewer_flops() -> None:
    wide = run_of(recipe(TrainLarge(hidden=2.0, layers=4, until="4 step", distill=0.1)))
    before, plain = flops(wide), flops(run_of(recipe()))
    taught = flops(crossed(wide)[0])
    assert plain < taught < before
    assert flops(crossed(run_of(recipe(TrainLarge(until="4 step"))))[0]) == plain


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="nothing is larger"):
        TrainLarge(hidden=1.0)
    with pytest.raises(UserError, match="not as large as its model"):
        run_of(recipe(TrainLarge()), source={"model": exported(run_of(recipe()))})
    with pytest.raises(UserError, match="would be narrower"):
        run_of(made_for("two_towers", TrainLarge(heads=2.0)))
    assert "no weights to freeze" in clash(TrainLarge(), example("lora"))
    with pytest.raises(UserError, match="logits are never computed"):
        run_of(recipe(TrainLarge(distill=1.0, until="4 step"), example("fused_loss")))


def test_sizes_that_round_to_the_recipes_are_refused() -> None:
    with pytest.raises(UserError, match=r"nothing is larger"):
        run_of(recipe(TrainLarge(hidden=1.001, heads=1.4)))


def test_a_wide_model_that_another_technique_changes_teaches_nothing() -> None:
    with pytest.raises(UserError, match=r"changes the wide model \(`blocks.0.attention_norm"):
        run_of(recipe(example("train_large", distill=0.5), example("t_fixup")))
    run_of(recipe(example("train_large"), example("t_fixup")))
