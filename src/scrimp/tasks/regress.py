"""Regression: a number for each item.

    loss = sum over items of (output - score)^2

The model's `classes` head has one output. Everything in a batch but the scores goes to the model by its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from scrimp.tasks.classify import read
from scrimp.tasks.metrics import correlated


@dataclass(frozen=True, kw_only=True)
class Regress:
    """Loss: squared error, summed over items."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    needs: ClassVar[tuple[str, ...]] = ("scores",)
    head: ClassVar[str] = "classes"
    trains: ClassVar[tuple[str, ...]] = ("head.*", "pooler.*")

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """The items as they are, with `scores`, float32 [B], and the samples' numbers in the run, [B]."""
        return {name: torch.from_numpy(value) for name, value in items.items()} | {"sample": torch.from_numpy(sample)}

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many items the summed loss sums over: int64, a scalar."""
        return torch.tensor(len(batch["scores"]))

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """How many tokens of text a batch has; items where there are none."""
        return read(batch)

    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The model's numbers, [B]."""
        return model(**{name: value for name, value in batch.items() if name != "scores"})[:, 0]

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss."""
        outputs = self.outputs(model, batch)
        return (outputs - batch["scores"].to(outputs.dtype)).square().sum()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean squared error, and Pearson's and Spearman's correlation, over all items."""
        pairs = [(self.outputs(model, batch).double(), batch["scores"].double()) for batch in batches]
        outputs, scores = (torch.cat(side).cpu().numpy() for side in zip(*pairs, strict=True))
        return {"loss": float(np.square(outputs - scores).mean()), **correlated(outputs, scores)}
