"""Causal language modeling: predict each token from those before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.tasks.sums import Sums, evaluated, of_tokens, per_token

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

    def fitted(self, config: Any) -> CausalLM:
        """The task, if the model is one for it.

        Raises:
            UserError: if each token sees those after it, which are what it should predict.
        """
        if not getattr(config, "causal", True):
            what = "the task `causal-lm` predicts the next token, which this model sees."
            raise UserError(what, "model.causal", "Leave it out, or use the task `masked-lm`.")
        return self

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """A batch of inputs and targets, [B, T].

        Args:
            items: `tokens` [B, T + 1], each the target of the one before. Or `tokens` [B, T] beside `targets` [B, T],
                -100 where nothing is learned. `documents`, at least [B, T], says which inputs see each other.
            sample: numbers of the samples in the run, [B].
        """
        given = {name: torch.from_numpy(value) for name, value in items.items()}
        tokens, targets = given["tokens"], given.get("targets")
        if targets is None:
            tokens, targets = tokens[:, :-1], tokens[:, 1:]
        batch = {"tokens": tokens, "targets": targets, "sample": torch.from_numpy(sample)}
        if "documents" in given:
            batch["documents"] = given["documents"][:, : tokens.shape[1]]
        return batch

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many targets the summed loss sums over: int64, a scalar.

        At least 1: a batch whose targets were all cut off, as by length_warmup, trains nothing.
        """
        return (batch["targets"] != -100).sum().clamp(min=1)

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """How many tokens the model sees, padding and prompts too: int64, a scalar."""
        return torch.tensor(batch["tokens"].numel())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss."""
        smoothing = self.label_smoothing if model.training else 0.0
        more = {"documents": batch["documents"]} if "documents" in batch else {}
        return model(batch["tokens"], batch["targets"], batch["sample"], smoothing, **more)

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of the vocabulary at each token, [B, T, V]."""
        more = {"documents": batch["documents"]} if "documents" in batch else {}
        return model(batch["tokens"], None, batch["sample"], **more)

    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss (nats a token) and perplexity over the batches."""
        return evaluated(self, model, batches)

    def sums(self, model: nn.Module, batch: dict[str, Tensor]) -> Sums:
        """What scores follow from."""
        return of_tokens(self.loss(model, batch), batch["targets"])

    def scores(self, sums: Sums) -> dict[str, float]:
        """What sums over all batches say."""
        return per_token(sums)
