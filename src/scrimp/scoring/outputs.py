"""What scores are computed from: items in batches, and a model's logits beside what it should have said.

Legend of shapes: B batch, T targets of an item, N classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.plain import to_device

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch

IGNORED = -100
"""A target that does not count."""


def check_classes(task: Any, where: str) -> None:
    """Whether a task predicts classes.

    Raises:
        UserError: if it does not.
    """
    if not hasattr(task, "logits"):
        what = "the task predicts no classes, whose probabilities this needs."
        raise UserError(what, where, "Use it with classify, causal-lm, masked-lm or seq2seq.")


def logits_and_targets(task: Any, model: nn.Module, batch: Batch, where: str) -> tuple[Tensor, Tensor]:
    """Logits [B, T, N] and targets [B, T], -100 where nothing counts; T is 1 where an item has one class.

    Raises:
        UserError: if the task predicts no classes.
    """
    check_classes(task, where)
    logits = task.logits(model, batch)
    targets = batch["labels"][:, None] if "labels" in batch else batch["targets"]
    return (logits[:, None] if logits.ndim == 2 else logits), targets


def squared_errors(logits: Tensor, targets: Tensor) -> Tensor:
    """||softmax(logits) - onehot(target)||^2 of each target: [B, T], 0 where nothing counts."""
    counts = targets != IGNORED
    chances = logits.softmax(-1)
    own = chances.gather(-1, targets.where(counts, 0)[..., None])[..., 0]
    return (chances.square().sum(-1) - 2 * own + 1).clamp(min=0) * counts


def losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy summed over each item's targets: [B]."""
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing)
    return each.view(targets.shape).sum(1)


def over_items(run: Run, measure: Callable[[nn.Module, Batch], Tensor]) -> np.ndarray:
    """A number for each item of the training set, measured as validation is: without dropout.

    Args:
        measure: (model, batch) -> [B].
    Returns:
        float64, [items].
    """
    assert run.evaluate is not None
    return run.evaluate(lambda model: np.concatenate([measure(model, b).double().cpu().numpy() for b in items(run)]))


def items(run: Run) -> Iterator[Batch]:
    """All items of the training set, in order, without augmentation."""
    train, size = run.data.train, run.recipe.batch
    for first in range(0, len(train), size):
        ids = np.arange(first, min(first + size, len(train)))
        yield to_device(run.task.batch(train.read(ids), ids), run.device)


def one(batch: Batch, place: int) -> Batch:
    """A batch of one of the items."""
    return {name: value[place : place + 1] for name, value in batch.items()}


def counted(targets: Tensor) -> Tensor:
    """How many targets of each item count, at least 1: [B]."""
    return (targets != IGNORED).sum(1).clamp(min=1)


def mean_states(model: nn.Module, forward: Callable[[], Any], where: str) -> Tensor:
    """The mean over tokens of what the model's last norm gives while `forward` runs: [B, C].

    Raises:
        UserError: if the model has no norm after its blocks.
    """
    named = dict(model.named_modules())
    last = next((named[n] for n in ("norm", "encoder.norm", "image.norm", "image_tower.norm") if n in named), None)
    if last is None:
        raise UserError(f"{type(model).__name__} has no norm after its blocks.", where, "Use a house model.")
    seen = list[Tensor]()

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output)

    handle = last.register_forward_hook(see)
    try:
        forward()
    finally:
        handle.remove()
    states = seen[0]
    return states.mean(1) if states.ndim == 3 else states
