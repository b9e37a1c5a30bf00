# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What a run does in each slot before any technique changes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.world import SAMPLES

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch, Evaluate, Step


def batches(run: Run) -> Callable[[int], Batch]:
    """step -> batch: a function of (seed, step)."""
    from scrimp.data.order import items_at, places_by_length

    # Samples are numbered over the run; mixed with the seed, the number keys dropout.
    salt = generator(run.seed, "dropout").initial_seed() & 0xFFFFFFFF
    size, stretch = run.recipe.batch, getattr(run.data.train, "stretch", 1)

    def batch(step: int) -> Batch:
        places = np.arange(step * size, (step + 1) * size)
        if stretch > 1:
            places = places_by_length(run.index, run.data.train.lengths, run.seed, step, size, stretch)
        ids, sample = items_at(run.index, run.seed, places), places ^ salt
        return to_device(run.task.batch(run.data.train.read(ids, sample), sample), run.device)

    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch on the device."""
    return batch if device.type == "cpu" else {k: v.to(device, non_blocking=True) for k, v in batch.items()}


def constant(progress: float) -> float:
    """The schedule of a run that has none."""
    return 1.0


def plain_backward(run: Run) -> Backward:
    """Forward, one division, backward."""

    def backward(batch: Batch, count: Tensor) -> Tensor:
        assert run.loss is not None
        loss = run.loss(run.model, batch) / count
        loss.backward()
        return loss.detach()

    return backward


def plain_step(run: Run) -> Step:
    """Update, unless every gradient is None."""

    def step() -> bool:
        assert run.optimizer is not None
        if all(p.grad is None for group in run.optimizer.param_groups for p in group["params"]):
            return False
        run.optimizer.step()
        return True

    return step


def plain_evaluate(run: Run) -> Evaluate:
    """Without dropout and without gradients."""

    def evaluate(job: Callable[[nn.Module], Any]) -> Any:
        training = run.model.training
        run.model.eval()
        try:
            with torch.no_grad():
                return job(run.model)
        finally:
            run.model.train(training)

    return evaluate


def counted(run: Run, batch: Batch) -> tuple[Tensor, int]:
    """What the loss sums over, and the tokens that are trained on, in the parts of a batch that all ranks have."""
    count, tokens = run.task.count(batch), tokens_of(run.task, batch)
    if run.world.size == 1:
        return count, tokens
    return run.world.total(count), int(run.world.total(torch.tensor(tokens, device=count.device), *SAMPLES))


def share(run: Run, batch: Callable[[int], Batch]) -> Callable[[int], Batch]:
    """step -> this rank's samples of the batch.

    Raises:
        UserError: if the ranks cannot share it evenly.
    """
    ranks, place, size = run.world.ranks(*SAMPLES), run.world.place(*SAMPLES), run.recipe.batch
    if ranks == 1:
        return batch
    if size % ranks:
        raise UserError(f"a batch of {size} cannot be shared by {ranks} ranks.", "batch", "Choose a multiple of them.")
    part = slice(place * size // ranks, (place + 1) * size // ranks)
    return lambda step: {name: value[part] for name, value in batch(step).items()}


def tokens_of(task: Any, batch: Batch) -> int:
    """Tokens that a batch trains on; for a task that does not say, what its loss sums over."""
    return int(getattr(task, "tokens", task.count)(batch))


def is_plain(function: Callable[..., object]) -> bool:
    """Whether a slot's value is this file's: no technique has changed it."""
    return function.__module__ == __name__
