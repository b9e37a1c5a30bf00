"""Early-bird tickets: the cut model is the masked model, and what is carried over the cut is what belongs to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scrimp.arrange import clash
from scrimp.clock import Clock
from scrimp.errors import UserError
from scrimp.recipe import Recipe
from scrimp.run import Run, build, exported
from scrimp.slimming import Cut, cut_state, keep_largest
from scrimp.stages import new_clock
from scrimp.techniques.sparsity.early_bird import TAIL, EarlyBird, coefficients
from scrimp.training import train
from tiny import MODEL, TinyData, assert_equal, example, flat, recipe, run_of, step
from tiny_tasks import TINY, Memory

if TYPE_CHECKING:
    from scrimp.technique import State

GROUPED = {**MODEL, "heads": 4, "kv_heads": 2, "activation": "swiglu", "qk_norm": True, "positions": "rotary",
           "norm": "rmsnorm", "hidden": 48}  # fmt: skip
KINDS = {"decoder": "causal-lm", "grouped": "causal-lm", "encoder": "masked-lm", "vision": "classify, images",
         "encoder_decoder": "seq2seq", "two_towers": "contrastive"}  # fmt: skip


def made_for(kind: str, *techniques: Any) -> Recipe:
    entry = KINDS[kind]
    model = GROUPED if kind == "grouped" else dict(TINY[entry].model)
    return recipe(*techniques, model=model, data=Memory(entry), task=TINY[entry].name or entry, dtype="float64")


def crossed(run: Run) -> tuple[Run, dict[str, Tensor]]:
    """The next stage, built as training builds it, and its state before the first step."""
    clock, order = run.clock, run.order
    run.signals.append("early_bird: ended by the test")
    decisions = {order.key(t): t.decide(run) for t in order.slots["decide"]}
    clock.cuts.append(clock.position)
    clock.stage += 1
    state: State = {kind: {n: t.detach().clone() for n, t in tensors.items()} for kind, tensors in run.state().items()}
    after = build(run.recipe, run.data, clock, state, decisions=decisions)
    return after, flat(after.state())


@torch.no_grad()
def shuffled(run: Run) -> None:
    """Coefficients that rank heads and neurons at random, some of them negative."""
    chance = torch.Generator().manual_seed(3)
    for _, c in coefficients(run.model):
        c.copy_(torch.randn(c.shape, generator=chance, dtype=c.dtype))


def output(run: Run) -> Tensor:
    assert run.evaluate
    batch = run.batch(0)
    return run.evaluate(lambda model: run.task.loss(model, batch)) / run.task.count(batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranked", ["layerwise", "global"])
def test_the_cut_model_is_the_masked_model(kind: str, ranked: Any) -> None:
    technique = EarlyBird(heads=0.5, neurons=0.4, ranked=ranked, rewind="continue")
    run = run_of(made_for(kind, technique))
    shuffled(run)
    whole = output(run)
    size = sum(p.numel() for p in run.model.parameters())
    masks = {name: c.detach().clone() for name, c in coefficients(run.model)}
    after, _ = crossed(run)
    with torch.no_grad():
        for path, kept in after.decisions["early_bird"]["blocks"].items():
            for seam, key in (("attention.proj", "units"), ("mlp.down", "neurons")):
                c = run.model.get_parameter(f"{path}.{seam}{TAIL}")
                gone = [i for i in range(len(c)) if i not in kept[key]]
                c[gone] = 0.0
                if key == "units" or ranked == "layerwise":
                    threshold = masks[f"{path}.{seam}{TAIL}"].abs().sort().values[len(gone)]
                    assert all(masks[f"{path}.{seam}{TAIL}"].abs()[gone] < threshold)
    masked = output(run)
    assert abs(masked - output(after)) < 1e-12
    assert abs(masked - whole) > 1e-9
    assert sum(p.numel() for p in after.model.parameters()) < 0.9 * size
    if kind == "encoder_decoder":
        assert after.model.get_parameter("decoder.blocks.0.cross.q.weight").shape == (32, 32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rewind", ["start", "continue"])
def test_what_is_exported_is_the_recipes_model_with_zeros(kind: str, rewind: Any) -> None:
    run = run_of(made_for(kind, EarlyBird(heads=0.5, rewind=rewind)))
    shuffled(run)
    plain = run_of(made_for(kind))
    for stage in (run, crossed(run)[0]):
        expected = output(stage)
        plain.model.load_state_dict(exported(stage), strict=False)
        assert exported(stage).keys() == exported(plain).keys()
        assert abs(output(plain) - expected) < 1e-12


def test_moments_and_averages_are_cut_like_their_weights() -> None:
    technique = EarlyBird(heads=0.5, rewind="continue", ranked="layerwise")
    run = run_of(recipe(example("adamw"), example("ema"), technique, dtype="float64"))
    for _ in range(3):
        step(run)
    before = flat(run.state())
    after, state = crossed(run)
    kept = after.decisions["early_bird"]["blocks"]["blocks.2"]
    head, neurons = kept["units"][0], kept["neurons"]
    assert (len(kept["units"]), len(neurons), kept["of_neurons"]) == (1, 77, 128)
    rows = [part * 32 + head * 16 + i for part in range(3) for i in range(16)]
    for kind in ("optimizer.exp_avg", "optimizer.exp_avg_sq"):
        for name, index, dim in (("attention.qkv.weight", rows, 0), ("attention.qkv.bias", rows, 0),
                                 ("attention.proj.weight", rows[:16], 1), ("mlp.up.weight", neurons, 0),
                                 ("mlp.up.bias", neurons, 0), ("mlp.down.weight", neurons, 1)):  # fmt: skip
            whole = before[f"{kind}/blocks.2.{name}"]
            assert torch.equal(state[f"{kind}/blocks.2.{name}"], whole.index_select(dim, torch.tensor(index)))
        assert torch.equal(state[f"{kind}/blocks.2.mlp.down.bias"], before[f"{kind}/blocks.2.mlp.down.bias"])
    for kind in ("model", "memory.ema"):
        c = before[f"{kind}/blocks.2.mlp.down{TAIL}"]
        whole = before[f"{kind}/blocks.2.mlp.down.weight"] * c
        assert torch.equal(state[f"{kind}/blocks.2.mlp.down.weight"], whole[:, neurons])
    assert float(state["optimizer.step/blocks.2.mlp.up.weight"]) == 3


def test_a_moment_of_another_size_begins_anew() -> None:
    cuts = {"w": Cut(0, [0, 2], 4)}
    blocked = {"optimizer.codes": {"w": torch.zeros(3)}, "optimizer.step": {"w": torch.tensor(7.0)},
               "model": {"w": torch.arange(4.0)}}  # fmt: skip
    left = cut_state(blocked, cuts)
    assert left["optimizer.codes"] == left["optimizer.step"] == {}
    assert left["model"]["w"].tolist() == [0, 2]


def test_rewinding_goes_on_with_the_first_weights_and_a_new_schedule() -> None:
    run = run_of(recipe(example("adamw"), example("ema"), example("warmup_linear"), EarlyBird(heads=0.5)))
    first = flat(run.state())
    for _ in range(3):
        step(run)
    after, state = crossed(run)
    kept = after.decisions["early_bird"]["blocks"]["blocks.1"]["neurons"]
    assert torch.equal(state["model/blocks.1.mlp.up.weight"], first["model/blocks.1.mlp.up.weight"][kept])
    assert torch.equal(state["model/blocks.1.mlp.down.weight"], first["model/blocks.1.mlp.down.weight"][:, kept])
    assert torch.equal(state["model/embed.weight"], first["model/embed.weight"])
    assert not [n for n in state if n.startswith(("optimizer.", "memory.early_bird")) or n.endswith(TAIL)]
    assert torch.equal(state["memory.ema/embed.weight"], first["model/embed.weight"])
    # 3 of 8 steps are gone: the middle of what is left is at 5.5.
    assert after.factor(3 / 8) == run.factor(0.0)
    assert after.factor(5.5 / 8) == pytest.approx(run.factor(0.5))


def test_weights_that_a_run_starts_from_are_what_it_rewinds_to() -> None:
    made = recipe(EarlyBird(heads=0.5), dtype="float64")
    given = {n: t + 0.5 for n, t in exported(run_of(recipe(dtype="float64"))).items()}
    run = run_of(made, source={"model": given})
    step(run)
    after, state = crossed(run)
    kept = after.decisions["early_bird"]["blocks"]["blocks.0"]["neurons"]
    assert torch.equal(state["model/blocks.0.mlp.up.bias"], given["blocks.0.mlp.up.bias"][kept])


def test_the_search_ends_when_the_newest_mask_is_like_all_four_before() -> None:
    technique = EarlyBird(heads=0.5, neurons=0.5, every="1 step", until="99 step", distance=0.02, ranked="layerwise")
    run = run_of(recipe(technique, duration="100 step"))
    turn = technique.step(lambda: True, run)
    neurons = [c for name, c in coefficients(run.model) if "mlp" in name]

    def draw(moved: int) -> None:
        """Of 128 neurons of the first block, so many others stay than at first; those are 512 in all."""
        with torch.no_grad():
            for c in neurons:
                c.copy_(torch.arange(128.0) >= 64)
            neurons[0][:moved], neurons[0][64 : 64 + moved] = 1.0, 0.0
        turn()
        run.clock.tick(4, 4)

    for moved in (8, 0, 0, 0, 0):
        draw(moved)
    # The fifth mask differs from the first in 16 of 512 places.
    assert run.gauges["early_bird_distance"] == pytest.approx(16 / 512)
    assert run.signals == []
    draw(3)
    # The first has left: 6 places of 512.
    assert run.gauges["early_bird_distance"] == pytest.approx(6 / 512)
    assert len(run.signals) == 1


def test_heads_that_still_change_prolong_the_search() -> None:
    technique = EarlyBird(heads=0.5, every="1 step", until="99 step")
    run = run_of(recipe(technique, duration="100 step"))
    turn = technique.step(lambda: True, run)
    for i in range(6):
        with torch.no_grad():
            run.model.get_parameter(f"blocks.0.attention.proj{TAIL}").copy_(torch.tensor([i % 2, 0.5]))
        turn()
        run.clock.tick(4, 4)
    # Two of the eight heads' places, though no neuron changed.
    assert run.gauges["early_bird_distance"] == 0.25
    assert run.signals == []


def test_the_mean_loss_gets_the_penalty() -> None:
    run, other = (run_of(recipe(EarlyBird(heads=0.5, l1=l1), dtype="float64")) for l1 in (1e-2, 0.0))
    assert run.backward and other.backward
    shuffled(run)
    shuffled(other)
    batch = run.batch(0)
    total = sum(float(c.detach().abs().sum()) for _, c in coefficients(run.model))
    got = run.backward(batch, run.task.count(batch)) - other.backward(batch, other.task.count(batch))
    assert float(got) == pytest.approx(1e-2 * total, rel=1e-12)


def test_a_share_of_all_leaves_each_layer_one() -> None:
    scores = [torch.tensor([0.1, 0.2, 0.3]), torch.tensor([5.0, 4.0, 0.05, 6.0])]
    assert [m.tolist() for m in keep_largest(scores, 0.4, layerwise=True)] == [[0, 1, 1], [1, 1, 0, 1]]
    assert [m.tolist() for m in keep_largest(scores, 0.6, layerwise=False)] == [[0, 0, 1], [1, 1, 0, 1]]


@pytest.mark.parametrize(("rewind", "cuts"), [("start", (4,)), ("continue", (5,))])
def test_a_cut_by_the_signal_is_resumed_bitwise(rewind: Any, cuts: tuple[int], tmp_path: Path) -> None:
    technique = EarlyBird(heads=0.5, every="1 step", until="7 step", distance=2.0, rewind=rewind)
    made = recipe(example("adamw"), technique, out=str(tmp_path), name="whole",
                  checkpoint={"every": "1 step", "keep": 99})  # fmt: skip
    whole = train(made, data=TinyData().open())
    assert whole.run.clock.cuts == [5, 7]
    assert whole.run.model.get_parameter("blocks.0.attention.qkv.weight").shape == (48, 32)
    for cut in cuts:
        copy = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "whole", copy)
        raw = yaml.safe_load((copy / "recipe.yaml").read_text()) | {"data": "text"}
        (copy / "recipe.yaml").write_text(yaml.safe_dump(raw))
        resumed = train(resume=copy / f"checkpoints/step-{cut:09d}", data=TinyData().open())
        assert_equal(flat(whole.run.state()), flat(resumed.run.state()))


def test_the_ticket_is_told_once() -> None:
    notes: list[str] = []
    technique = EarlyBird(heads=0.5, every="1 step", until="7 step", distance=2.0)
    made = recipe(example("adamw"), technique)
    result = train(made, data=TinyData().open(), save=False,
                   observe=lambda e, f: notes.append(f["text"]) if e == "note" else None)  # fmt: skip
    assert result.run.clock.cuts == [5, 7]
    assert len([note for note in notes if "early_bird keeps" in note]) == 1


def flops(run: Run) -> int:
    """Of a forward and backward pass."""
    assert run.backward
    batch = run.batch(0)
    with FlopCounterMode(display=False) as counter:
        run.backward(batch, run.task.count(batch))
    return counter.get_total_flops()


def test_a_step_after_the_cut_has_fewer_flops() -> None:
    run = run_of(recipe(EarlyBird(heads=0.5, neurons=0.5, ranked="layerwise")))
    before, after = flops(run), flops(crossed(run)[0])
    # Each layer of a block halves; the head of 32 by 32 is as it was.
    head = 3 * 2 * 4 * 16 * 32 * 32
    core = before - head - 4 * 3 * 2 * 4 * 16 * 32 * (96 + 32 + 128 + 128)
    assert after == head + (before - head - core) // 2 + core // 2


def test_another_stage_that_ends_is_no_ticket() -> None:
    technique = EarlyBird(heads=0.5, until="6 step")
    run = run_of(recipe(technique))
    for _ in range(3):
        step(run)
    assert technique.decide(run) == {}


def test_what_does_not_fit_is_refused() -> None:
    assert "begins them anew" in clash(EarlyBird(), example("lora"))
    with pytest.raises(UserError, match="cut nothing"):
        EarlyBird(heads=0, neurons=0)
    with pytest.raises(UserError, match="more than 0"):
        EarlyBird(every=0.0)


def test_a_clock_knows_nothing_of_it() -> None:
    """The decision is all that a later stage is built from: a fresh build with it has the cut shapes."""
    run = run_of(recipe(EarlyBird(heads=0.5)))
    decisions = crossed(run)[0].decisions
    clock = Clock(**new_clock(run.recipe, run.data).state())
    again = build(run.recipe, run.data, clock, decisions=decisions)
    assert again.model.get_parameter("blocks.3.mlp.up.weight").shape[1] == 32
    assert not coefficients(again.model)


def test_shares_that_cut_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="less than one of each"):
        run_of(recipe(example("early_bird", heads=0.3, neurons=0.0)))
    run_of(recipe(example("early_bird", heads=0.5, neurons=0.0)))


def test_a_search_too_short_to_compare_masks_is_remarked() -> None:
    said = [run_of(recipe(example("early_bird", distance=0.1, until=f"{n} step"))).remarks for n in (4, 5)]
    assert [any("compares 5" in remark for remark in remarks) for remarks in said] == [True, False]
