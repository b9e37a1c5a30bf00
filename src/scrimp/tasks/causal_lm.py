"""Causal language modeling: predict each token from those before it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """Loss: cross entropy of the next token, summed over tokens whose target is not -100."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    models: ClassVar[tuple[str, ...]] = ("transformer",)
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the vocabulary, in training only."""

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """A batch from windows of tokens, [B, T + 1], and the samples' numbers in the run, [B]."""
        tokens = torch.from_numpy(items["tokens"])
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "sample": torch.from_numpy(sample)}

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many targets the summed loss sums over: int64, a scalar."""
        return (batch["targets"] != -100).sum()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss."""
        smoothing = self.label_smoothing if model.training else 0.0
        return model(batch["tokens"], batch["targets"], batch["sample"], smoothing)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss (nats a token) and perplexity over the batches."""
        total, count = 0.0, 0
        for batch in batches:
            total += float(self.loss(model, batch))
            count += int(self.count(batch))
        mean = total / count
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
