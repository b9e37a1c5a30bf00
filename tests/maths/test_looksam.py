"""LookSAM: second passes every k steps, and what is remembered of them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from tiny import assert_equal, example, flat, recipe, run_of, stand_in, step

A = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)


class Quadratic(nn.Module):
    """0.5 w'Aw, with w in two parameters and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.b = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.c = nn.Parameter(torch.ones(1, dtype=torch.float64))


class Trial:
    """The technique on the quadratic."""

    def __init__(self, **settings: Any) -> None:
        self.model, self.calls, self.memory = Quadratic(), 0, dict[str, Tensor]()
        self.clock = SimpleNamespace(step=0, position=0, begun=0)
        run: Any = stand_in(model=self.model, clock=self.clock, memory=lambda technique: self.memory)
        self.backward = example("looksam", **settings).backward(self.inner, run)

    def inner(self, batch: Any, count: Any) -> Tensor:
        self.calls += 1
        loss = 0.5 * (A * torch.cat([self.model.a, self.model.b]).square()).sum()
        loss.backward()
        return loss.detach()

    def gradient(self, at: int) -> list[Tensor]:
        """What a step at this number leaves, of a and b."""
        self.clock.step = self.clock.position = at
        self.backward({}, torch.tensor(1))
        found = [p.grad for p in (self.model.a, self.model.b)]
        self.model.zero_grad()
        return found  # type: ignore[return-value]


def test_the_quadratic_case() -> None:
    trial = Trial(rho=0.05, k=2)
    found = torch.cat(trial.gradient(0))
    torch.testing.assert_close(found, A * (1 + 0.05 * A / A.norm()), rtol=1e-12, atol=0)
    assert abs(float(found[0]) - 10.49749) < 1e-5
    assert trial.calls == 2


def test_what_is_kept_is_orthogonal_to_the_gradient_in_every_tensor() -> None:
    trial = Trial(rho=0.5, k=2)
    sharp, plain = trial.gradient(0)[0], A[:2]
    kept = trial.memory["a"]
    assert abs(float(kept @ plain)) < 1e-12
    torch.testing.assert_close(kept, sharp - (sharp @ plain) / (plain @ plain) * plain, rtol=1e-12, atol=0)
    assert float(kept.norm()) > 0.04
    assert float(trial.memory["b"].abs()) < 1e-15, "a single weight has no direction but its gradient's"
    assert float(trial.memory["c"]) == 0.0


def test_other_steps_lean_by_alpha_of_the_gradients_size() -> None:
    trial = Trial(rho=0.5, k=2, alpha=0.25)
    trial.gradient(0)
    kept = trial.memory["a"].clone()
    found = trial.gradient(1)[0]
    want = A[:2] + 0.25 * A[:2].norm() / (kept.norm() + 1e-8) * kept
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
    assert float((found - A[:2]).norm()) == pytest.approx(0.25 * float(A[:2].norm()), rel=1e-6)
    assert torch.equal(trial.memory["a"], kept)


def test_before_the_first_second_pass_nothing_is_added() -> None:
    trial = Trial(rho=0.5, k=3)
    assert torch.equal(torch.cat(trial.gradient(1)), A)


def test_a_stage_begins_with_a_second_pass() -> None:
    trial = Trial(rho=0.5, k=3)
    trial.clock.begun = 4
    trial.gradient(4)
    assert trial.calls == 2
    assert trial.memory["a"].any()


@pytest.mark.parametrize("k", [2, 3, 5])
def test_one_backward_a_step_and_a_second_every_k(k: int) -> None:
    trial = Trial(k=k)
    for n in range(2 * k):
        trial.gradient(n)
    assert trial.calls == 2 * k * (1 + 1 / k)


def test_gradients_that_overflow_leave_no_trace() -> None:
    trial = Trial(k=2)
    with torch.no_grad():
        trial.model.a.fill_(math.inf)
    trial.gradient(0)
    assert all(bool(t.isfinite().all()) for t in trial.memory.values())


def test_k_of_one_is_sam_to_the_last_bit() -> None:
    runs = [run_of(recipe(example("sam", rho=0.3))), run_of(recipe(example("looksam", rho=0.3, k=1)))]
    for run in runs:
        for _ in range(3):
            step(run)
    assert_equal(flat(runs[0].state()), flat(runs[1].state()))
    assert not runs[1].memories["looksam"]


def test_weights_come_back_with_every_bit() -> None:
    run = run_of(recipe(example("looksam", rho=0.7)))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    batch = run.batch(0)
    assert run.backward
    run.backward(batch, run.task.count(batch))
    assert all(torch.equal(before[n], p) for n, p in run.model.named_parameters())


def test_settings_without_meaning_are_refused() -> None:
    for settings, words in ({"rho": -0.1}, "rho"), ({"k": 0}, "k must"), ({"alpha": -1.0}, "alpha"):
        with pytest.raises(UserError, match=words):
            example("looksam", **settings)
