"""Other executions of the same program: recomputation, compilation, the fused loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import MODEL, example, recipe, run_of

from scrimp.errors import UserError
from scrimp.meter import LiveBytes
from scrimp.run import Run
from scrimp.techniques.attention.fused_loss import ChunkedCrossEntropy


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
    run.model.blocks[1].attention.register_forward_hook(lambda m, i, o: calls.append(1))
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


def exact(rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    return F.cross_entropy(rows @ weight.t(), targets, reduction="sum", label_smoothing=smoothing)


@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([0.0, 0.2]), st.booleans())
def test_the_fused_loss_is_exact_in_any_chunks(rows: int, chunk: int, smoothing: float, holes: bool) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 7, (rows,))
    if holes:
        target[rows // 2 :] = -100
    results = []
    for loss in (exact(x, w, target, smoothing),
                 ChunkedCrossEntropy.apply(x, w, target, smoothing, chunk, torch.float64, (True, True))):  # fmt: skip
        results.append((loss.detach(), *torch.autograd.grad(3 * loss, (x, w))))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-13)


def test_the_fused_loss_survives_logits_that_underflow() -> None:
    x = torch.tensor([[1000.0, 0.0]])
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = ChunkedCrossEntropy.apply(x, w, torch.tensor([1]), 0.0, 4, torch.float32, (False, False))
    assert float(loss) == 1000


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 and later")
def test_torch_kernel_gives_the_same() -> None:
    ours, _ = gradients(run_of(recipe(example("fused_loss"), dtype="float64")))
    theirs, _ = gradients(run_of(recipe(example("fused_loss", kernel="torch"), dtype="float64")))
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-13) for n in ours)


def test_the_fused_loss_never_holds_the_logits() -> None:
    big = {"vocab": 4096, "layers": 1, "width": 8, "heads": 1}
    _, high = gradients(run_of(recipe(model=big)))
    _, low = gradients(run_of(recipe(example("fused_loss", chunk=8), model=big)))
    logits = 4 * 4 * 16 * 4096
    assert high - low > logits


def test_the_fused_loss_under_autocast_is_close_and_sums_wide() -> None:
    plain, _ = gradients(run_of(recipe()))
    fused, _ = gradients(run_of(recipe(example("fused_loss"), example("autocast"))))
    assert all(torch.allclose(plain[n], fused[n], atol=3e-3) for n in plain)


def test_a_frozen_head_costs_no_gradient() -> None:
    grads, _ = gradients(run_of(recipe(example("fused_loss"), example("lora"))))
    assert all("lora" in n for n in grads)


def test_an_adapter_on_the_head_is_refused_by_name() -> None:
    run = run_of(recipe(example("fused_loss"), example("lora", targets="head")))
    with pytest.raises(UserError, match="the head is changed on its output"):
        gradients(run)
