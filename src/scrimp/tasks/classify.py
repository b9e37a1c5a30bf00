"""Classification: cross entropy of a label."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Loss: cross entropy of the label, summed over items."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    needs: ClassVar[tuple[str, ...]] = ("labels",)
    head: ClassVar[str] = "classes"

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """A batch: what the data hold, and the samples' numbers in the run, [B]."""
        return {name: torch.from_numpy(value) for name, value in items.items()} | {"sample": torch.from_numpy(sample)}

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many items the summed loss sums over: int64, a scalar."""
        return torch.tensor(len(batch["labels"]))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss."""
        return F.cross_entropy(self._logits(model, batch), batch["labels"], reduction="sum")

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss and accuracy over the batches."""
        total, right, count = 0.0, 0, 0
        for batch in batches:
            logits = self._logits(model, batch)
            total += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
            right += int((logits.argmax(1) == batch["labels"]).sum())
            count += len(logits)
        return {"loss": total / count, "accuracy": right / count}

    def _logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**{name: value for name, value in batch.items() if name != "labels"})
