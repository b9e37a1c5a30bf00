"""Sequence to sequence: read one text, write another.

    loss = - sum over target tokens t of log p(t | the tokens before it, the source)

The decoder begins with the end token, as BART's does, and the target ends with it. Padding counts nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.tasks.sums import Sums, evaluated, of_tokens, per_token

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
        return evaluated(self, model, batches)

    def sums(self, model: nn.Module, batch: dict[str, Tensor]) -> Sums:
        """What scores follow from."""
        return counted(model, batch)

    def scores(self, sums: Sums) -> dict[str, float]:
        """What sums over all batches say."""
        return with_gaps(sums)


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


def counted(model: nn.Module, batch: dict[str, Tensor]) -> Sums:
    """The sums of tokens of a batch; also of its `gaps` [B, T]."""
    logits = model(batch["tokens"], batch["decoder_tokens"], attended=batch["attended"])
    targets, likeliest = batch["targets"], logits.argmax(-1)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    found = of_tokens(loss, targets, likeliest)
    if "gaps" not in batch:
        return found
    gaps = batch["gaps"]
    return found | {"filled": (likeliest == targets)[gaps].sum(), "gaps": gaps.sum()}


def with_gaps(sums: Sums) -> dict[str, float]:
    """Mean loss (nats a token), perplexity, and the share of tokens that were the likeliest; also of gaps."""
    gaps = float(sums["gaps"]) if "gaps" in sums else 0.0
    return per_token(sums) | ({"gap_accuracy": float(sums["filled"]) / gaps} if gaps else {})
