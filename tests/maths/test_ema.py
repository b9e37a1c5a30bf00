"""The moving average: its equation, when it moves, and where it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.run import Run, build, exported
from scrimp.techniques.optimizers.ema import EMA
from scrimp.training import train
from tiny import assert_equal, example, flat, recipe, run_of, step

if TYPE_CHECKING:
    from scrimp.technique import State

NAME = "blocks.0.mlp.up.weight"


def weights(run: Run) -> dict[str, Tensor]:
    """Copies of the model's parameters."""
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}


@pytest.mark.parametrize("warmup", [True, False])
def test_the_equation(warmup: bool) -> None:
    run = run_of(recipe(example("ema", decay=0.3, warmup=warmup), dtype="float64"))
    average = weights(run)
    for t in range(1, 6):
        step(run)
        d = min(0.3, (1 + t) / (10 + t)) if warmup else 0.3
        average = {n: d * average[n] + (1 - d) * w for n, w in weights(run).items()}
    memory = run.memories["ema"]
    assert all(torch.allclose(memory[n], a, rtol=0, atol=1e-15) for n, a in average.items())
    assert memory.keys() - average.keys() == {"#updates"}
    assert float(memory["#updates"]) == 5


def test_it_stands_still_when_an_update_is_skipped() -> None:
    run = run_of(recipe(example("ema")))
    step(run)
    with torch.no_grad():
        run.model.get_parameter(NAME).add_(1.0)
    before = {n: t.clone() for n, t in run.memories["ema"].items()}
    assert run.step
    assert run.step() is False
    assert_equal(before, run.memories["ema"])


def copied(run: Run) -> State:
    """What a checkpoint of the run holds."""
    return {kind: {n: t.detach().clone() for n, t in tensors.items()} for kind, tensors in run.state().items()}


def seen(run: Run) -> dict[str, Tensor]:
    """The weights that an evaluation sees."""
    assert run.evaluate
    return run.evaluate(lambda model: {n: p.detach().clone() for n, p in model.named_parameters()})


def test_evaluation_sees_the_average_and_leaves_every_bit() -> None:
    run = run_of(recipe(example("ema")))
    step(run)
    step(run)
    before, held = flat(run.state()), {id(p): p.data_ptr() for p in run.model.parameters()}
    memory = {n: t.clone() for n, t in run.memories["ema"].items() if n != "#updates"}
    assert_equal(seen(run), memory)
    assert not torch.equal(memory[NAME], before[f"model/{NAME}"])
    assert_equal(flat(run.state()), before)
    assert {id(p): p.data_ptr() for p in run.model.parameters()} == held


def test_the_weights_come_back_after_an_error() -> None:
    run = run_of(recipe(example("ema")))
    step(run)
    before = flat(run.state())
    assert run.evaluate

    def job(model: nn.Module) -> Any:
        raise KeyError("no such metric")

    with pytest.raises(KeyError):
        run.evaluate(job)
    assert_equal(flat(run.state()), before)


def test_validation_measures_the_average_and_training_is_the_plain_one() -> None:
    plain = train(recipe(), save=False)
    averaged = train(recipe(EMA(decay=0.99, warmup=False)), save=False)
    assert_equal(weights(plain.run), weights(averaged.run))
    assert plain.validation["loss"] != averaged.validation["loss"]
    with torch.no_grad():
        for name, p in averaged.run.model.named_parameters():
            p.copy_(averaged.run.memories["ema"][name])
    by_hand, data = averaged.run.model.eval(), averaged.run.data.validation
    halves = np.arange(8).reshape(2, 4)
    batches = [averaged.run.task.batch(data.read(ids), ids) for ids in halves]
    with torch.no_grad():
        loss = averaged.run.task.evaluate(by_hand, batches)["loss"]
    assert loss == averaged.validation["loss"]


def test_export_gives_the_average() -> None:
    run = run_of(recipe(example("ema")))
    step(run)
    step(run)
    named = exported(run)
    assert named.keys() == run.state()["model"].keys()
    memory = run.memories["ema"]
    assert all(torch.equal(t, memory[n]) for n, t in named.items() if n in memory)
    assert not torch.equal(named[NAME], run.model.get_parameter(NAME))


def test_only_trained_weights_are_averaged_and_merging_uses_the_average() -> None:
    run = run_of(recipe(example("ema", decay=0.5), example("lora"), dtype="float64"))
    for _ in range(3):
        step(run)
    memory = run.memories["ema"]
    trained = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert memory.keys() - {"#updates"} == trained
    assert all(".lora." in n for n in trained)
    named = exported(run)
    with torch.no_grad():
        for name in trained:
            run.model.get_parameter(name).copy_(memory[name])
    assert_equal(exported(run), named)


def test_sixteen_bits_are_averaged_in_float32() -> None:
    run = run_of(recipe(example("ema", decay=0.999, warmup=False), dtype="bfloat16"))
    start = run.memories["ema"][NAME].clone()
    assert start.dtype == torch.float32
    with torch.no_grad():
        run.model.get_parameter(NAME).add_(0.5)
    moved = run.model.get_parameter(NAME).detach().float()
    step(run)
    now = run.model.get_parameter(NAME).detach().float()
    assert float((now - moved).abs().max()) < 0.1
    assert torch.allclose(run.memories["ema"][NAME] - start, 0.001 * (now - start), rtol=1e-3, atol=1e-7)
    assert seen(run)[NAME].dtype == torch.bfloat16
    assert {t.dtype for t in exported(run).values() if t.is_floating_point()} == {torch.bfloat16}


def test_it_grows_with_the_model() -> None:
    made = recipe(example("ema"), example("stack", at=(0.5,), zero_new=False))
    shallow = run_of(made)
    for _ in range(3):
        step(shallow)
    last = copied(shallow)
    shallow.clock.cuts.append(4)
    shallow.clock.stage = 1
    deep = build(made, made.data.open(), shallow.clock, last=last)
    memory, before = deep.memories["ema"], last["memory.ema"]
    assert {n for n, _ in deep.model.named_parameters()} == memory.keys() - {"#updates"}
    assert torch.equal(memory["blocks.2.mlp.up.weight"], before["blocks.0.mlp.up.weight"])
    assert torch.equal(memory["blocks.1.mlp.up.weight"], before["blocks.1.mlp.up.weight"])
    assert float(memory["#updates"]) == 3
    step(deep)
    assert float(memory["#updates"]) == 4


def test_resuming_goes_on_with_the_average() -> None:
    made = recipe(example("ema"))
    run = run_of(made)
    step(run)
    step(run)
    state = copied(run)
    again = run_of(made, last=state)
    again.clock.step, again.clock.sample, again.clock.tok = run.clock.step, run.clock.sample, run.clock.tok
    for each in (run, again):
        step(each)
    assert_equal(flat(run.state()), flat(again.state()))
    assert_equal(seen(run), seen(again))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match=r"decay must be in \[0, 1\)"):
        EMA(decay=decay)
