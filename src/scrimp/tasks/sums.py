"""Validation of tasks whose scores follow from sums over items, which ranks can share.

Such a task has `sums(model, batch)`, tensors of a batch that are added over batches and ranks, and `scores(sums)`, what
they say. Other tasks look at all items at once, and each rank computes theirs in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Sums = dict[str, Tensor]


class Summing(Protocol):
    """What a task offers."""

    def sums(self, model: nn.Module, batch: dict[str, Tensor]) -> Sums:
        """Sums over a batch."""
        ...

    def scores(self, sums: Sums) -> dict[str, float]:
        """What sums over all batches say."""
        ...


def shareable(task: Any) -> bool:
    """Whether a task's scores follow from sums."""
    return hasattr(task, "sums") and hasattr(task, "scores")


@torch.no_grad()
def evaluated(
    task: Summing,
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, float]:
    """The scores over some batches, and over those of other ranks.

    Args:
        total: sums of this rank -> of all.
    """
    found: Sums = {}
    for batch in batches:
        for name, value in task.sums(model, batch).items():
            found[name] = found[name] + value.double() if name in found else value.double()
    return task.scores({name: total(value) for name, value in found.items()})


def of_tokens(loss: Tensor, targets: Tensor, likeliest: Tensor | None = None) -> Sums:
    """A summed loss, how many targets it sums over, and how many of them were the likeliest."""
    found = {"loss": loss, "count": (targets != -100).sum()}
    return found if likeliest is None else found | {"right": (likeliest == targets).sum()}


def per_token(sums: Sums) -> dict[str, float]:
    """loss (nats a token), perplexity and, where it was counted, accuracy."""
    count = max(float(sums["count"]), 1.0)
    mean = float(sums["loss"]) / count
    found = {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
    return found | ({"accuracy": float(sums["right"]) / count} if "right" in sums else {})
