"""AdaScale: the gain of hand-made gradients, and time that passes as fast."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.errors import RecipeError, UserError
from scrimp.run import Run
from scrimp.techniques.large_batch.adascale import gain
from tiny import example, flat, recipe, run_of, stand_in, step


class Point(nn.Module):
    """Weights whose gradient is the batch's rows, summed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(width - 1, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.idle = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def gained(steps: list[list[list[float]]], **settings: Any) -> list[float]:
    """The gain after each step; a step is a list of gradients, one for each part."""
    model, parts, memory = Point(len(steps[0][0])), len(steps[0]), dict[str, Tensor]()
    run: Any = stand_in(
        model=model, recipe=SimpleNamespace(batch=parts), clock=SimpleNamespace(step=0), where=lambda *_: "here",
        memory=lambda _: memory, device="cpu",
    )  # fmt: skip

    def inner(batch: dict[str, Tensor], count: Tensor) -> Tensor:
        loss = (batch["x"] @ torch.cat([model.a, model.b])).sum() / count
        loss.backward()
        return loss.detach()

    backward = example("adascale", parts=parts, **settings).backward(inner, run)
    found: list[float] = []
    for i, gradients in enumerate(steps):
        run.clock.step = i
        backward({"x": torch.tensor(gradients, dtype=torch.float64)}, torch.tensor(parts))
        found.append(float(memory["gain"]))
        model.zero_grad()
    return found


def test_parts_that_agree_gain_nothing() -> None:
    assert gained([[[3.0, -4.0]] * 4]) == pytest.approx([1.0], abs=1e-12)


def test_pure_noise_gains_a_factor_for_each_part() -> None:
    assert gained([[[1.0, 0.0], [-1.0, 0.0]]]) == pytest.approx([2.0], abs=1e-12)
    assert gained([[[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]]) == pytest.approx([4.0], abs=1e-12)


def test_a_gain_by_hand() -> None:
    """(4, 2) and (2, 2): mean of squares 14, square of the mean 13; v = 2 (14 - 13) = 2, m = 13 - 1 = 12.

    r = 14 / 13. With (0, 2) and (2, 0) after it (v = 4, m = 0), averages keep 0.998 of themselves.
    """
    v, m = 0.998 * 2 + 4, 0.998 * 12
    assert gained([[[4.0, 2.0], [2.0, 2.0]], [[0.0, 2.0], [2.0, 0.0]]]) == pytest.approx(
        [14 / 13, (v + m) / (v / 2 + m)], abs=1e-12
    )


def test_averages_are_in_the_ratio_of_the_reference() -> None:
    """fairscale, with debiased averages: both are divided by the same number, which the gain does not see."""
    torch.manual_seed(0)
    steps = torch.randn(5, 4, 3, dtype=torch.float64) + 0.3
    keep, v, m, weight = 1 - 4 / 1000, 0.0, 0.0, 0.0
    wanted: list[float] = []
    for g in steps:
        # As fairscale writes it: local = sum ||g_i||^2, total = ||mean||^2, S = cN = 4.
        local, total = float(g.square().sum()), float(g.mean(0).square().sum())
        variance = local / 3 - total * 4 / 3
        true = total - variance / 4
        v, m, weight = keep * v + (1 - keep) * variance, keep * m + (1 - keep) * max(true, 0), keep * weight + 1 - keep
        v_, m_ = v / weight, m / weight
        wanted.append((v_ + m_) / (v_ / 4 + m_))
    assert gained(steps.tolist()) == pytest.approx(wanted, abs=1e-12)
    assert 1 < wanted[-1] < 4


def test_no_gradient_gains_nothing() -> None:
    zero = torch.zeros((), dtype=torch.float64)
    assert float(gain(zero, zero, 2)) == 1.0
    assert gained([[[4.0, 2.0], [2.0, 2.0]], [[float("inf"), 2.0], [2.0, 0.0]]])[1] == pytest.approx(14 / 13)


def weights(run: Run) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}


def test_a_step_is_as_much_larger_and_time_passes_as_fast() -> None:
    plain: dict[str, Any] = {"dtype": "float64", "batch": 16}
    sgd = example("sgd", momentum=0.0)
    base = run_of(recipe(sgd, example("accumulate"), example("warmup_linear", warmup=0), **plain))
    tried = run_of(recipe(sgd, example("adascale"), example("warmup_linear", warmup=0), **plain))
    start = weights(base)
    step(base)
    step(tried)
    memory = tried.memories["adascale"]
    r = float(memory["gain"])
    assert 1 < r < 2
    assert float(memory["time"]) == r
    for name, end in weights(tried).items():
        torch.testing.assert_close(end - start[name], r * (weights(base)[name] - start[name]), rtol=1e-9, atol=1e-14)
    assert tried.gauges["adascale_gain"] == r
    assert tried.optimizer
    assert tried.optimizer.param_groups[0]["lr"] == base.optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]


@pytest.mark.parametrize(("scale", "length"), [(0.0, 16), (1.5, 12)])
def test_the_schedule_follows_time(scale: float, length: int) -> None:
    run = run_of(recipe(example("adascale", scale=scale), example("warmup_linear", warmup=0)))
    memory = run.memories["adascale"]
    for tau, whole in ((0.0, 0), (2.75, 2), (9.0, 9), (40.0, length)):
        memory["time"] = torch.tensor(tau, dtype=torch.float64)
        assert run.factor(0.99) == pytest.approx(1 - whole / length, abs=1e-12)


def test_a_skipped_step_takes_no_time() -> None:
    run = run_of(recipe(example("adascale")))
    assert run.step
    assert not run.step()
    assert float(run.memories["adascale"]["time"]) == 0


def test_accumulates_bitwise_and_leaves_no_hook() -> None:
    grads = []
    for name in ("accumulate", "adascale"):
        run = run_of(recipe(example(name)))
        batch = run.batch(0)
        assert run.backward
        loss = run.backward(batch, run.task.count(batch))
        grads.append(flat({"g": {n: p.grad for n, p in run.model.named_parameters()}, "l": {"": loss}}))
        assert not any(p._backward_hooks for p in run.model.parameters())
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_what_it_refuses_and_remarks() -> None:
    with pytest.raises(UserError, match="4 does not divide into 3 parts"):
        run_of(recipe(example("adascale", parts=3)))
    with pytest.raises(UserError, match="parts must be at least 2"):
        example("adascale", parts=1)
    with pytest.raises(RecipeError, match="not at a point nearby"):
        run_of(recipe(example("adascale"), example("sam")))
    with pytest.raises(RecipeError, match="both set the parts of a batch"):
        run_of(recipe(example("adascale"), example("accumulate")))
    for other in ("lottery", "early_bird"):
        with pytest.raises(RecipeError, match="both set the schedule's time"):
            run_of(recipe(example("adascale"), example(other)))
    assert any("under AdamW" in remark for remark in run_of(recipe(example("adascale"), example("adamw"))).remarks)
    assert not run_of(recipe(example("adascale"))).remarks
