"""Other executions of the same program: recomputation, compilation, the fused loss."""

from __future__ import annotations

import pytest
import torch

from scrimp.meter import LiveBytes
from scrimp.run import Run
from tiny import MODEL, example, recipe, run_of


def gradients(run: Run) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of the first batch, and the peak of live bytes."""
    assert run.backward is not None
    batch = run.batch(0)
    with LiveBytes() as meter:
        run.backward(batch, run.task.count(batch))
    return {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}, meter.peak


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_recomputed_gradients_are_bitwise_the_same_and_the_peak_falls(mode: str) -> None:
    wide = {"model": MODEL | {"width": 64, "layers": 6}}
    plain, high = gradients(run_of(recipe(**wide)))
    again, low = gradients(run_of(recipe(example("recompute", mode=mode), **wide)))
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    assert low < high


def test_block_mode_runs_each_block_twice_and_validation_once() -> None:
    run = run_of(recipe(example("recompute")))
    calls: list[int] = []
    run.model.get_submodule("blocks.1.attention").register_forward_hook(lambda m, i, o: calls.append(1))
    gradients(run)
    assert len(calls) == 2
    assert run.evaluate is not None
    run.evaluate(lambda model: run.task.loss(model, run.batch(0)))
    assert len(calls) == 3


def test_adapters_get_gradients_under_recomputation() -> None:
    grads, _ = gradients(run_of(recipe(example("recompute"), example("lora"))))
    assert grads
    assert all("lora" in n for n in grads)
    assert all(float(g.abs().sum()) > 0 for n, g in grads.items() if n.endswith(".b"))


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients() -> None:
    plain, _ = gradients(run_of(recipe()))
    fused, _ = gradients(run_of(recipe(example("compile", backend="inductor"))))
    assert all(torch.allclose(plain[n], fused[n], atol=1e-6) for n in plain)
