"""Sequence to sequence: read one text, write another.

    loss = - sum over target tokens t of log p(t | the tokens before it, the source)

The decoder begins with the end token, as BART's does, and the target ends with it. Padding counts nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np

IGNORED = -100
"""Target that does not count."""


@dataclass(frozen=True, kw_only=True)
class Seq2Seq:
    """Pairs of texts. Loss: cross entropy of the target, summed over its tokens."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    needs: ClassVar[tuple[str, ...]] = ("source", "target")
    models: ClassVar[tuple[str, ...]] = ("encoder_decoder",)
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the vocabulary, in training only."""

    def prepared(self, data: Any) -> PairsTask:
        """The task, with the token that the decoder begins with."""
        return PairsTask(data.tokenizer.end, self.label_smoothing)


@dataclass(frozen=True)
class PairsTask:
    """`Seq2Seq` in use.

    Attributes:
        start: id that the decoder begins with.
    """

    start: int
    label_smoothing: float = 0.0

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """A batch from `source` [B, S] and `target` [B, T], each with `_length` [B], and the samples' numbers [B]."""
        arrays = {name: torch.from_numpy(array) for name, array in items.items()}
        return pair_batch(**arrays, start=self.start, sample=torch.from_numpy(sample))

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many targets the summed loss sums over: int64, a scalar."""
        return (batch["targets"] != IGNORED).sum()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss."""
        return summed(model, batch, self.label_smoothing)

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of the vocabulary at each token to write, [B, T, V]."""
        return model(batch["tokens"], batch["decoder_tokens"], attended=batch["attended"], sample=batch["sample"])

    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss (nats a token), perplexity, and the share of tokens that were the likeliest, over the batches."""
        return measured(model, batches)


def pair_batch(
    source: Tensor, source_length: Tensor, target: Tensor, target_length: Tensor, start: int, sample: Tensor
) -> dict[str, Tensor]:
    """What the model reads, what the decoder sees, and what it must write.

    Args:
        source: ids, [B, S]. target: ids, [B, T]. Lengths: [B].
        start: id that the decoder begins with.
    """
    written = torch.arange(target.shape[1]) < target_length[:, None]
    begin = torch.full((len(target), 1), start, dtype=target.dtype)
    return {
        "tokens": source,
        "attended": torch.arange(source.shape[1]) < source_length[:, None],
        "decoder_tokens": torch.cat([begin, target[:, :-1]], 1),
        "targets": target.where(written, IGNORED),
        "sample": sample,
    }


def summed(model: nn.Module, batch: dict[str, Tensor], smoothing: float) -> Tensor:
    """The summed loss of a batch from `pair_batch`."""
    return model(
        batch["tokens"],
        batch["decoder_tokens"],
        batch["targets"],
        batch["attended"],
        batch["sample"],
        smoothing if model.training else 0.0,
    )


@torch.no_grad()
def measured(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Mean loss (nats a token), perplexity, and the share of tokens that were the likeliest; also of `gaps` [B, T]."""
    total, right, count, filled, gaps = 0.0, 0, 0, 0, 0
    for batch in batches:
        logits = model(batch["tokens"], batch["decoder_tokens"], attended=batch["attended"])
        targets = batch["targets"]
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        hit = logits.argmax(-1) == targets
        right += int(hit.sum())
        count += int((targets != IGNORED).sum())
        if "gaps" in batch:
            filled += int(hit[batch["gaps"]].sum())
            gaps += int(batch["gaps"].sum())
    mean = total / count
    found = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": right / count}
    return found | ({"gap_accuracy": filled / gaps} if gaps else {})
