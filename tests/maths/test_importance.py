"""Importance sampling: unbiased weights, variance, and when it is switched on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scrimp.run import Run
from scrimp.techniques.importance_sampling.importance import Importance, joined
from tiny import example, recipe, run_of, step
from tiny_tasks import TINY, Memory


def built(entry: str = "classify", **settings: Any) -> Run:
    model = dict(TINY[entry].model) | {"dropout": 0.0}
    return run_of(recipe(example("importance", **settings), model=model, data=Memory(entry), task=entry,
                         dtype="float64"))  # fmt: skip


def gradient(run: Run, batch: dict[str, Tensor], count: Tensor) -> Tensor:
    run.model.zero_grad()
    assert run.loss is not None
    (run.loss(run.model, batch) / count).backward()
    return torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("entry", ["classify", "causal-lm"])
def test_the_weighted_gradient_is_unbiased(entry: str) -> None:
    """Exactly: the sum over items of chance times weighted gradient is the gradient of the mean over candidates."""
    run = built(entry)
    technique = next(t for t in run.order.techniques if isinstance(t, Importance))
    batch = run.batch(0)
    count, size = run.task.count(batch), 8
    chances = technique._chances(run, batch)
    assert float(chances.sum()) == pytest.approx(1, abs=1e-12)
    whole = gradient(run, batch, count)
    expected = torch.zeros_like(whole)
    for place in range(size):
        one = {name: value[place : place + 1] for name, value in batch.items()}
        one["weights"] = 1 / (size * chances[place : place + 1])
        expected += chances[place] * gradient(run, one, count / size)
    torch.testing.assert_close(expected, whole, rtol=0, atol=1e-12)


def test_less_variance_than_uniform_sampling() -> None:
    """Of one drawn item: sum of g_i |w_i grad_i|^2 over items against the mean of |grad_i|^2, with unequal items."""
    run = built()
    technique = next(t for t in run.order.techniques if isinstance(t, Importance))
    for _ in range(100):
        step(run)
    batch = run.batch(0)
    chances, size = technique._chances(run, batch), 8
    norms = torch.stack([
        gradient(run, {n: v[i : i + 1] for n, v in batch.items()}, torch.tensor(1)).square().sum() for i in range(size)
    ])  # fmt: skip
    uniform, chosen = norms.mean(), (norms / (size**2 * chances)).sum()
    assert chosen < uniform


def test_tau_is_one_for_equal_items_and_decides() -> None:
    run = built(threshold=1e6)
    step(run)
    key = next(k for k in run.memories if k == "importance")
    tau = float(run.memories[key]["tau"])
    assert 1 <= tau < 2 and run.gauges["importance_sampling"] == 0
    run = built(threshold=1.0)
    step(run)
    assert run.gauges["importance_sampling"] == 1


def test_chances_follow_the_error_and_draws_follow_the_chances() -> None:
    run = built(pool=4)
    technique = next(t for t in run.order.techniques if isinstance(t, Importance))
    batch = run.batch(0)
    run.model.eval()
    with torch.no_grad():
        chance = run.task.logits(run.model, batch).softmax(-1)
    error = (chance - torch.nn.functional.one_hot(batch["labels"], 3)).norm(dim=1)
    torch.testing.assert_close(technique._chances(run, batch), error / error.sum(), rtol=1e-5, atol=0)


def test_candidates_of_several_widths_are_filled_up() -> None:
    narrow = {"tokens": torch.ones(2, 3), "targets": torch.ones(2, 3), "labels": torch.ones(2)}
    wide = {"tokens": torch.ones(1, 5), "targets": torch.ones(1, 5), "labels": torch.ones(1)}
    found = joined([narrow, wide])
    assert found["tokens"].shape == (3, 5) and found["tokens"][0].tolist() == [1, 1, 1, 0, 0]
    assert found["targets"][0].tolist() == [1, 1, 1, -100, -100] and found["labels"].tolist() == [1, 1, 1]


def test_a_run_draws_other_items_at_each_step() -> None:
    run = built(pool=4)
    a, b = run.batch(0)["sample"].numpy(), run.batch(1)["sample"].numpy()
    assert len(a) == 16 and not np.intersect1d(a, b).size
