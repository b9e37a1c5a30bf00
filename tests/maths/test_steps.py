"""What happens to a batch and to gradients: accumulation, clipping, SAM, loss scaling."""

from __future__ import annotations

import math

import pytest
import torch

from scrimp.errors import UserError
from scrimp.run import Run
from tiny import example, recipe, run_of, step


def gradients(run: Run, holes: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of the first batch; with `holes` most targets of the first samples do not count."""
    assert run.backward is not None
    batch = run.batch(0)
    if holes:
        batch = batch | {"targets": batch["targets"].clone()}
        batch["targets"][:2, 3:] = -100
    run.backward(batch, run.task.count(batch))
    return {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulation_equals_the_whole_batch_for_uneven_tokens(parts: int) -> None:
    whole = gradients(run_of(recipe(dtype="float64")), holes=True)
    cut = gradients(run_of(recipe(example("accumulate", parts=parts), dtype="float64")), holes=True)
    assert max(float((whole[n] - cut[n]).abs().max()) for n in whole) < 1e-15


def test_accumulation_tells_the_mean_loss() -> None:
    losses = []
    for techniques in ((), (example("accumulate"),)):
        run = run_of(recipe(*techniques, dtype="float64"))
        assert run.backward is not None
        batch = run.batch(0)
        losses.append(float(run.backward(batch, run.task.count(batch))))
    assert losses[0] == pytest.approx(losses[1], abs=1e-14)


def test_more_parts_than_samples_are_refused() -> None:
    with pytest.raises(UserError, match="a batch of 4 cannot be"):
        run_of(recipe(example("accumulate", parts=5)))


@pytest.mark.parametrize("norm", [0.01, 1e6])
def test_clipping_shortens_and_keeps_the_direction(norm: float) -> None:
    run = run_of(recipe(example("clip", norm=norm), dtype="float64"))
    before = gradients(run)
    length = math.sqrt(sum(float((g**2).sum()) for g in before.values()))
    assert run.step is not None
    run.step()
    factor = min(1.0, norm / (length + 1e-6))
    for name, p in run.model.named_parameters():
        assert p.grad is not None
        assert torch.allclose(p.grad, before[name] * factor, rtol=1e-12, atol=0)


def test_sam_on_a_quadratic_by_hand() -> None:
    """L = w'Aw / 2 with A = diag(10, 1, 0.1), w = 1, rho = 0.05: the gradient there is A (w + rho Aw / |Aw|)."""
    a = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
    run = run_of(recipe(example("sam", rho=0.05), dtype="float64"))
    run.model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    w = run.model.weight
    torch.nn.init.ones_(w)

    def backward(batch: dict, count: torch.Tensor) -> torch.Tensor:
        loss = (a * w * w).sum() / 2
        loss.backward()
        return loss.detach()

    sam = run.order.slots["backward"][0]
    loss = sam.backward(backward, run)({}, torch.tensor(1))
    g = a.clone()
    assert w.grad is not None
    assert torch.allclose(w.grad[0], a * (1 + 0.05 * g / (g.norm() + 1e-12)), atol=1e-14)
    assert float(w.grad[0, 0]) == pytest.approx(10.49749, abs=1e-5)
    assert torch.equal(w, torch.ones_like(w))
    assert float(loss) == pytest.approx(5.55)


def test_sam_runs_the_model_twice_with_the_same_dropout() -> None:
    run = run_of(recipe(example("sam")))
    seen: list[torch.Tensor] = []
    run.model.get_submodule("blocks.0.dropout").register_forward_hook(lambda m, i, o: seen.append((o == 0).clone()))
    step(run)
    assert len(seen) == 2
    assert torch.equal(*seen)


def test_an_overflow_skips_the_update_and_halves_the_scale() -> None:
    run = run_of(recipe(example("autocast", dtype="float16", scale=1024.0)))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    gradients(run)
    grad = run.model.get_parameter("embed.weight").grad
    assert grad is not None
    grad[0, 0] = math.inf
    assert run.step is not None
    assert run.step() is False
    assert all(torch.equal(before[n], p) for n, p in run.model.named_parameters())
    assert all(p.grad is None for p in run.model.parameters())
    assert float(run.memories["autocast"]["scale"]) == 512
    assert run.optimizer is not None
    assert not run.optimizer.state


def test_the_scale_doubles_after_enough_good_steps() -> None:
    run = run_of(recipe(example("autocast", dtype="float16", scale=64.0, patience=3)))
    for _ in range(3):
        step(run)
    assert float(run.memories["autocast"]["scale"]) == 128
    assert float(run.memories["autocast"]["streak"]) == 0


def test_scaled_gradients_come_back_unscaled() -> None:
    plain = gradients(run_of(recipe()))
    run = run_of(recipe(example("autocast", dtype="float16", scale=1024.0)))
    assert run.backward is not None
    assert run.step is not None
    batch = run.batch(0)
    loss = run.backward(batch, run.task.count(batch))
    assert float(loss) < 5
    run.step()
    for name, p in run.model.named_parameters():
        assert p.grad is not None
        assert torch.allclose(p.grad, plain[name], atol=2e-3)


def test_bfloat16_products_and_float32_weights() -> None:
    run = run_of(recipe(example("autocast")))
    kinds: list[torch.dtype] = []
    run.model.get_submodule("blocks.0.mlp.up").register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    step(run)
    assert kinds == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
