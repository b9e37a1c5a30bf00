"""Mixed precision and its loss scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.meter import LiveBytes
from scrimp.run import Run
from tiny import MODEL, assert_equal, example, flat, recipe, run_of, stand_in, step


def scale_of(run: Run) -> Tensor:
    return run.memories["autocast"]["scale"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_are_in_16_bits_and_weights_are_not(dtype: str) -> None:
    run = run_of(recipe(example("autocast", dtype=dtype)))
    seen: list[torch.dtype] = []
    layer = run.model.get_submodule("blocks.0.mlp.up")
    layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    batch = run.batch(0)
    assert run.backward
    loss = run.backward(batch, run.task.count(batch))
    assert seen == [getattr(torch, dtype)]
    assert loss.dtype == torch.float32
    for p in run.model.parameters():
        assert p.dtype == torch.float32
        assert p.grad is not None
        assert p.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_is_near_float32(dtype: str) -> None:
    runs = [run_of(recipe(*t)) for t in ((), (example("autocast", dtype=dtype),))]
    losses, norms = [], []
    for run in runs:
        batch = run.batch(0)
        assert run.backward
        losses.append(float(run.backward(batch, run.task.count(batch))))
        scale = float(scale_of(run)) if run.memories else 1.0
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in run.model.parameters() if p.grad is not None)))
        norms[-1] /= scale
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.02
    assert abs(norms[0] / norms[1] - 1) < 0.02


def test_a_small_gradient_survives_only_with_the_scale() -> None:
    """1e-8 is below float16's least positive number, 6e-8."""
    kept = {}
    for scale in (1.0, 65536.0):
        run: Any = stand_in(memories={}, device=torch.device("cpu"), read=lambda t, worst: float(t))
        run.memory = lambda t, run=run: run.memories.setdefault("autocast", {})
        weight = nn.Parameter(torch.ones(()))
        run.model = nn.ParameterDict({"w": weight})
        technique = example("autocast", dtype="float16", scale=scale)
        loss = technique.loss(lambda model, batch: model.get_parameter("w").half().float() * batch["x"], run)

        def inner(batch: dict[str, Tensor], count: Tensor, run: Any = run, loss: Any = loss) -> Tensor:
            value = loss(run.model, batch) / count
            value.backward()
            return value.detach()

        value = technique.backward(inner, run)({"x": torch.tensor(1e-8)}, torch.tensor(1))
        assert abs(float(value) - 1e-8) < 1e-15
        assert technique.step(lambda: True, run)()
        assert weight.grad is not None
        kept[scale] = float(weight.grad)
    assert kept[1.0] == 0.0
    assert abs(kept[65536.0] / 1e-8 - 1) < 1e-3


def test_an_overflow_skips_the_update_and_halves_the_scale() -> None:
    run = run_of(recipe(example("autocast", dtype="float16"), example("adamw"), example("clip")))
    step(run)
    before = {n: t for n, t in flat(run.state()).items() if not n.startswith("memory")}
    batch = run.batch(1)
    assert run.backward
    assert run.step
    run.backward(batch, run.task.count(batch))
    broken = next(p for p in run.model.parameters() if p.grad is not None)
    assert broken.grad is not None
    broken.grad.view(-1)[3] = math.inf
    assert run.step() is False
    assert all(p.grad is None for p in run.model.parameters())
    assert float(scale_of(run)) == 32768
    assert int(run.memories["autocast"]["streak"]) == 0
    assert_equal(before, {n: t for n, t in flat(run.state()).items() if not n.startswith("memory")})


def test_the_scale_doubles_after_good_steps_in_a_row() -> None:
    run = run_of(recipe(example("autocast", dtype="float16", scale=8.0, patience=3)))
    scales = []
    for _ in range(7):
        step(run)
        scales.append(float(scale_of(run)))
    assert scales == [8, 8, 16, 16, 16, 32, 32]


def test_the_scale_survives_a_resume() -> None:
    made = recipe(example("autocast", dtype="float16", scale=8.0, patience=3))
    whole = run_of(made)
    for _ in range(5):
        step(whole)
    state = {kind: {n: t.detach().clone() for n, t in tensors.items()} for kind, tensors in whole.state().items()}
    resumed = run_of(made, last=state)
    resumed.clock.step = 5
    for run in (whole, resumed):
        step(run)
        assert float(scale_of(run)) == 32
    assert_equal(flat(whole.state()), flat(resumed.state()))


def test_gradients_are_unscaled_before_clipping() -> None:
    """With a scale of a power of two, the update is that of another scale, bit for bit."""
    ends = []
    for scale in (2.0, 64.0):
        run = run_of(recipe(example("autocast", dtype="float16", scale=scale), example("clip", norm=0.1)))
        run.model.eval()
        batch = run.batch(0)
        assert run.backward
        assert run.step
        run.backward(batch, run.task.count(batch))
        run.step()
        ends.append(math.sqrt(sum(float(p.grad.square().sum()) for p in run.model.parameters() if p.grad is not None)))
    assert abs(ends[0] - 0.1) < 1e-4
    assert abs(ends[1] - 0.1) < 1e-4


def test_a_scale_that_cannot_help_is_an_error() -> None:
    run = run_of(recipe(example("autocast", dtype="float16", scale=2.0**-13)))
    assert run.step
    for p in run.model.parameters():
        p.grad = torch.full_like(p, math.inf)
    assert run.step() is False
    for p in run.model.parameters():
        p.grad = torch.full_like(p, math.nan)
    with pytest.raises(UserError, match="overflow float16"):
        run.step()


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_recompute_sees_the_same_casts(mode: str) -> None:
    grads = []
    for extra in ((), (example("recompute", mode=mode),)):
        run = run_of(recipe(example("autocast"), *extra))
        batch = run.batch(0)
        assert run.backward
        run.backward(batch, run.task.count(batch))
        grads.append({n: p.grad for n, p in run.model.named_parameters() if p.grad is not None})
    assert_equal(*grads)


def test_casts_do_not_outlive_a_recomputed_block() -> None:
    """The forward pass then peaks a 16-bit copy of every block's 12 C^2 weights lower than with a cache of casts."""
    peaks = []
    for layers in (4, 5):
        run = run_of(
            recipe(example("autocast"), example("recompute"), model=MODEL | {"layers": layers, "dropout": 0.0})
        )
        batch = run.batch(0)
        meter = LiveBytes()
        meter.register([*run.model.parameters(), *batch.values()])
        before = meter.live
        assert run.loss
        with meter:
            run.loss(run.model, batch)
        peaks.append(meter.peak - before)
    assert peaks[1] - peaks[0] == 4 * 16 * 32 * 4, "one more block costs its input, in float32"


def test_refuses_weights_that_are_in_16_bits_already() -> None:
    with pytest.raises(UserError, match=r"dtype: autocast keeps its weights in float32"):
        run_of(recipe(example("autocast"), dtype="bfloat16"))
