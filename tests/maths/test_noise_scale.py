"""The gradient noise scale: of hand-made gradients, of noise that is known, and without touching the gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.errors import RecipeError, UserError
from scrimp.run import Run
from scrimp.splitting import compared
from scrimp.training import train
from scrimp.world import ALONE
from tiny import assert_equal, example, flat, recipe, run_of, step


class Rows(nn.Module):
    """A weight whose gradient is the mean of the batch's rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width, dtype=torch.float64))


def found(x: Tensor, parts: int) -> tuple[float, float]:
    """(v, m) of rows in parts."""
    model = Rows(x.shape[1])

    def inner(batch: dict[str, Tensor], count: Tensor) -> Tensor:
        loss = (batch["x"] @ model.w).sum() / count
        loss.backward()
        return loss.detach()

    pieces = [{"x": piece} for piece in x.tensor_split(parts)]
    run: Any = SimpleNamespace(world=ALONE, more_parts=False)
    _, variance, square = compared(inner, pieces, torch.tensor(len(x)), [model.w], run)
    return float(variance), float(square)


def test_two_parts_by_hand() -> None:
    """Parts' gradients (4, 2) and (2, 2): v = 2 (14 - 13), m = 13 - 2 / 2."""
    x = torch.tensor([[5.0, 2], [3, 2], [2, 0], [2, 4]], dtype=torch.float64)
    assert found(x, 2) == pytest.approx((2.0, 12.0), abs=1e-12)


def test_known_noise_is_found() -> None:
    """Rows N(g, Sigma) with tr(Sigma) / |G|^2 = 6 * 4 / (6 * 0.25) = 16, from parts of 5 rows."""
    generator = torch.Generator().manual_seed(0)
    v = m = 0.0
    for _ in range(1000):
        x = 0.5 + 2 * torch.randn(20, 6, dtype=torch.float64, generator=generator)
        one = found(x, 4)
        v, m = v + one[0], m + one[1]
    assert 5 * v / m == pytest.approx(16, rel=0.05)


def averages(run: Run) -> tuple[float, float]:
    memory = run.memories["noise_scale"]
    return float(memory["variance"]), float(memory["square"])


def test_averages_are_kept_apart_and_their_ratio_is_shown() -> None:
    run = run_of(recipe(example("noise_scale", decay=0.75), dtype="float64", batch=16))
    v = m = 0.0
    for _ in range(3):
        batch = run.batch(run.clock.step)
        grads = []
        for rows in (slice(0, 8), slice(8, 16)):
            part = {n: t[rows] for n, t in batch.items()}
            assert run.loss
            loss = run.loss(run.model, part) / run.task.count(part)
            own = [p for p in run.model.parameters() if p.requires_grad]
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, own)]))
        one, two = grads
        half, whole = float((one.square().sum() + two.square().sum()) / 2), float(((one + two) / 2).square().sum())
        # McCandlish et al., appendix A.1, with batches of 8 and 16.
        v = 0.75 * v + 0.25 * (half - whole) / (1 / 8 - 1 / 16)
        m = 0.75 * m + 0.25 * (16 * whole - 8 * half) / (16 - 8)
        step(run)
        assert averages(run) == pytest.approx((v / 8, m), rel=1e-9)
    assert run.gauges["noise_scale_b_simple"] == pytest.approx(v / m, rel=1e-9)
    assert run.gauges["noise_scale_recommended_batch"] == max(1, round(v / m))
    assert f"a batch of about {max(1, round(v / m)):,};" in run.findings["noise_scale"]


@pytest.mark.parametrize(("parts", "every"), [(2, 1), (4, 2)])
def test_trains_bitwise_as_accumulation(parts: int, every: int) -> None:
    plain = train(recipe(example("accumulate", parts=parts), example("adamw")), save=False)
    tried = train(recipe(example("noise_scale", parts=parts, every=every), example("adamw")), save=False)
    tried.run.memories.clear()
    assert_equal(flat(plain.run.state()), flat(tried.run.state()))
    assert plain.validation == tried.validation


def test_measures_every_so_many_steps_and_once_a_step() -> None:
    run = run_of(recipe(example("noise_scale", every=2), example("sam"), dtype="float64"))
    other = run_of(recipe(example("noise_scale", every=2), dtype="float64"))
    seen: list[Any] = []
    for _ in range(3):
        step(run)
        seen.append(averages(run))
    step(other)
    assert seen[0] == seen[1] != seen[2]
    # The first pass of two: at the weights themselves.
    assert seen[0] == averages(other)


def test_a_gradient_that_is_not_finite_is_passed_over() -> None:
    run = run_of(recipe(example("noise_scale")))
    step(run)
    before = averages(run)
    batch = run.batch(1)
    run.loss = lambda model, batch: torch.inf * model.get_parameter("embed.weight").sum()
    assert run.backward
    run.backward(batch, run.task.count(batch))
    assert averages(run) == before


def test_faults() -> None:
    with pytest.raises(UserError, match=r"techniques.noise_scale.parts: a batch of 4 does not divide into 3"):
        run_of(recipe(example("noise_scale", parts=3)))
    with pytest.raises(UserError, match="cannot be split into 8 parts"):
        run_of(recipe(example("noise_scale", parts=8)))
    with pytest.raises(UserError, match="at least 2"):
        example("noise_scale", parts=1)
    with pytest.raises(RecipeError, match="both set the parts of a batch"):
        run_of(recipe(example("noise_scale"), example("accumulate")))
