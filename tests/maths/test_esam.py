"""Efficient sharpness-aware minimization: which tensors are perturbed, and which samples see them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.techniques.optimizers.esam import left_out, losses, steepest
from tiny import assert_equal, example, flat, recipe, run_of, stand_in, step
from tiny_tasks import tried

A = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)


class Rows(nn.Module):
    """0.5 sum_i s_i w'Aw + t_i u, with w in three parameters, over samples (s, t)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(3)])
        self.forwards: list[tuple[int, bool]] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.forwards.append((len(batch["s"]), torch.is_grad_enabled()))
        return (0.5 * batch["s"] * (A * torch.cat(list(self.w)).square()).sum() + batch["t"]).sum()


class Trial:
    """The technique on these samples."""

    def __init__(self, **settings: Any) -> None:
        self.model, self.counts = Rows(), list[int]()
        self.task = SimpleNamespace(count=lambda batch: torch.tensor(len(batch["s"])))
        self.run: Any = stand_in(model=self.model, task=self.task, seed=0, clock=SimpleNamespace(step=0))
        self.run.loss = lambda model, batch: model(batch)
        self.backward = example("esam", **settings).backward(self.inner, self.run)

    def inner(self, batch: Any, count: Any) -> Tensor:
        self.counts.append(int(count))
        loss = self.model(batch) / count
        loss.backward()
        return loss.detach()

    def gradient(self, s: list[float], t: list[float] | None = None) -> Tensor:
        batch = {"s": torch.tensor(s, dtype=torch.float64), "t": torch.tensor(t or [0.0] * len(s), dtype=torch.float64)}
        self.backward(batch, self.task.count(batch))
        return torch.cat([p.grad for p in self.model.w if p.grad is not None])


def test_the_quadratic_case() -> None:
    """With all tensors and all samples it is sam's: A (w + rho A w / |A w|)."""
    trial = Trial(rho=0.05, beta=1.0, gamma=1.0)
    found = trial.gradient([1.0, 1.0])
    torch.testing.assert_close(found, A * (1 + 0.05 * A / A.norm()), rtol=1e-12, atol=0)
    assert abs(float(found[0]) - 10.49749) < 1e-5
    assert trial.model.forwards == [(2, True)] * 2


def test_perturbed_tensors_move_by_one_over_beta_and_the_others_stay() -> None:
    seen: set[frozenset[int]] = set()
    for at in range(12):
        trial = Trial(rho=0.05, beta=0.5, gamma=1.0)
        trial.run.clock.step = at
        still = left_out(trial.run, 3, 0.5)
        moved = torch.tensor([0.0 if i in still else 1.0 for i in range(3)], dtype=torch.float64)
        want = A * (1 + moved * 0.05 / 0.5 * A / A.norm())
        torch.testing.assert_close(trial.gradient([1.0, 1.0]), want, rtol=1e-12, atol=0)
        assert all(float(p.detach()) == 1.0 for p in trial.model.w)
        seen.add(still)
    assert len(seen) > 3


def test_a_tensor_is_perturbed_with_probability_beta() -> None:
    run: Any = stand_in(seed=3, clock=SimpleNamespace(step=0))
    assert abs(len(left_out(run, 10000, 0.6)) - 4000) < 150
    assert not left_out(run, 10000, 1.0)
    again = left_out(run, 100, 0.6)
    assert again == left_out(run, 100, 0.6)
    run.clock.step = 1
    assert again != left_out(run, 100, 0.6)


def test_the_samples_that_rise_most_make_the_second_gradient() -> None:
    """The rise of a sample is s_i times the same; t_i is in its loss, not in its rise."""
    trial = Trial(rho=0.05, beta=1.0, gamma=0.5)
    s, t = [1.0, 5.0, -2.0, 3.0, 0.5], [100.0, -7.0, 50.0, 0.0, 900.0]
    found = trial.gradient(s, t)
    mean = sum(s) / 5
    sharp = A * (1 + 0.05 * A * mean / (A * mean).norm())
    torch.testing.assert_close(found, sharp * (5.0 + 3.0 + 1.0) / 3, rtol=1e-12, atol=0)
    assert trial.counts == [5, 3]
    assert trial.model.forwards == [(1, False)] * 5 + [(5, True)] + [(1, False)] * 5 + [(3, True)]


def test_the_steepest_are_those_that_sorting_finds() -> None:
    torch.manual_seed(0)
    for gamma, count in ((0.01, 1), (0.3, 4), (0.5, 6), (1.0, 11)):
        rises = torch.randn(11)
        found = steepest({"x": torch.arange(11), "y": torch.arange(22).reshape(11, 2)}, rises, gamma)
        want = sorted(sorted(range(11), key=lambda i: -float(rises[i]))[:count])
        assert found["x"].tolist() == want
        assert found["y"].tolist() == [[2 * i, 2 * i + 1] for i in want]


def test_single_losses_add_up_to_the_batchs() -> None:
    """With dropout on: a sample drops the same activations alone as in its batch."""
    run = run_of(recipe(dtype="float64"))
    batch = run.batch(0)
    assert run.loss
    found, whole = losses(run, batch), run.loss(run.model, batch).detach()
    assert found.shape == (4,)
    torch.testing.assert_close(found.sum(), whole, rtol=1e-12, atol=0)


def test_all_tensors_and_all_samples_are_sam_to_the_last_bit() -> None:
    runs = [run_of(recipe(example("sam", rho=0.3))), run_of(recipe(example("esam", rho=0.3, beta=1.0, gamma=1.0)))]
    for run in runs:
        for _ in range(3):
            step(run)
    assert_equal(flat(runs[0].state()), flat(runs[1].state()))


def test_weights_come_back_when_the_second_pass_fails() -> None:
    trial = Trial(gamma=1.0)

    def fails(batch: Any, count: Any) -> Tensor:
        if trial.counts:
            raise KeyboardInterrupt
        return trial.inner(batch, count)

    with pytest.raises(KeyboardInterrupt):
        example("esam", gamma=1.0).backward(fails, trial.run)(
            {"s": torch.ones(2, dtype=torch.float64), "t": torch.zeros(2)}, torch.tensor(2)
        )
    assert all(float(p.detach()) == 1.0 for p in trial.model.w)


@pytest.mark.parametrize("entry", ["contrastive", "embed"])
def test_a_loss_that_compares_samples_is_refused(entry: str) -> None:
    found = tried(entry, "esam")
    assert found["verdict"] == "refused"
    assert "techniques.esam" in found["reason"]


def test_settings_without_meaning_are_refused() -> None:
    for settings in ({"rho": -0.1}, {"beta": 0.0}, {"gamma": 1.5}):
        with pytest.raises(UserError, match="must be"):
            example("esam", **settings)
