"""Gradient accumulation equals the whole batch, however the counted targets are spread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scrimp.errors import UserError
from scrimp.run import Run
from tiny import example, recipe, run_of


def sparse(run: Run) -> tuple[dict[str, Tensor], Tensor]:
    """A batch whose samples have 16, 15, 3 and 0 counted targets."""
    batch = run.batch(0)
    targets = batch["targets"].clone()
    targets[1, 0] = targets[2, 3:] = targets[3] = -100
    batch["targets"] = targets
    return batch, run.task.count(batch)


def outcome(*techniques: object) -> tuple[Tensor, dict[str, Tensor]]:
    run = run_of(recipe(*techniques, dtype="float64"))  # type: ignore[arg-type]
    assert run.backward
    loss = run.backward(*sparse(run))
    return loss, {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_equals_the_whole_batch(parts: int) -> None:
    loss, grads = outcome()
    split_loss, split_grads = outcome(example("accumulate", parts=parts))
    assert abs(float(loss - split_loss)) < 1e-12
    assert grads.keys() == split_grads.keys()
    assert max(float((grads[n] - split_grads[n]).abs().max()) for n in grads) < 1e-12


def test_is_not_a_mean_of_means() -> None:
    """The counts above would tell the two apart."""
    run = run_of(recipe(dtype="float64"))
    batch, count = sparse(run)
    assert run.backward
    whole = run.backward(batch, count)
    halves = [{n: t[i : i + 2] for n, t in batch.items()} for i in (0, 2)]
    means = [run.backward(half, run.task.count(half)) for half in halves]
    assert abs(float(whole - (means[0] + means[1]) / 2)) > 1e-3


def test_parts_cover_the_batch_without_empty_ones() -> None:
    seen: list[Tensor] = []

    def inner(batch: dict[str, Tensor], count: Tensor) -> Tensor:
        assert int(count) == 99
        seen.append(batch["x"])
        return torch.ones(())

    run = run_of(recipe())
    backward = example("accumulate", parts=3).backward(inner, run)
    loss = backward({"x": torch.arange(4), "y": torch.zeros(4, 2)}, torch.tensor(99))
    assert [len(x) for x in seen] == [2, 1, 1]
    assert torch.cat(seen).tolist() == [0, 1, 2, 3]
    assert float(loss) == 3
    backward({"x": torch.arange(2)}, torch.tensor(99))
    assert [len(x) for x in seen[3:]] == [1, 1]


def test_refuses_more_parts_than_samples() -> None:
    with pytest.raises(UserError, match=r"techniques.accumulate.parts: a batch of 4 cannot be split into 5"):
        run_of(recipe(example("accumulate", parts=5)))
    with pytest.raises(UserError, match="at least 1"):
        example("accumulate", parts=0)
