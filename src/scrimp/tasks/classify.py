"""Classification: one of N classes for each item, whatever an item is.

    loss = - sum over items of log softmax(logits)[label]

Everything in a batch but the labels goes to the model by its name: `tokens`, `attended` and `segments` of texts, or
`images`. With label smoothing e, a share e of the target's probability is spread evenly over the classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.tasks.metrics import tabled
from scrimp.tasks.sums import Sums, evaluated


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Loss: cross entropy of the class, summed over items."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    needs: ClassVar[tuple[str, ...]] = ("labels",)
    head: ClassVar[str] = "classes"
    trains: ClassVar[tuple[str, ...]] = ("head.*", "pooler.*")
    """What tuning methods leave to the task: the head begins anew, so that it is always trained."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the classes, in training only."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must be at least 0 and less than 1, not {self.label_smoothing}.")

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """The items as they are, with `labels`, int64 [B], and the samples' numbers in the run, [B]."""
        return {name: torch.from_numpy(value) for name, value in items.items()} | {"sample": torch.from_numpy(sample)}

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many items the summed loss sums over: int64, a scalar."""
        return torch.tensor(len(batch["labels"]))

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """How many tokens of text a batch has; items where there are none."""
        return read(batch)

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of the classes, [B, N]."""
        return model(**{name: value for name, value in batch.items() if name != "labels"})

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss."""
        smoothing = self.label_smoothing if model.training else 0.0
        logits = self.logits(model, batch)
        return F.cross_entropy(logits, batch["labels"], reduction="sum", label_smoothing=smoothing)

    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss (nats an item), accuracy, macro F1 and Matthews' correlation over all items."""
        return evaluated(self, model, batches)

    def sums(self, model: nn.Module, batch: dict[str, Tensor]) -> Sums:
        """What scores follow from."""
        logits, labels = self.logits(model, batch), batch["labels"]
        classes = logits.shape[-1]
        table = torch.bincount(labels * classes + logits.argmax(-1), minlength=classes * classes)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss, "table": table.view(classes, classes)}

    def scores(self, sums: Sums) -> dict[str, float]:
        """What sums over all batches say."""
        table = sums["table"].long().cpu().numpy()
        return {"loss": float(sums["loss"]) / int(table.sum()), **tabled(table)}


def read(batch: dict[str, Tensor]) -> Tensor:
    """How many tokens of text a batch has, without those that fill it up; items where there is no text."""
    if "attended" in batch:
        return batch["attended"].sum()
    return torch.tensor(batch["tokens"].numel() if "tokens" in batch else len(next(iter(batch.values()))))
