"""Sentence embeddings for retrieval: a text finds its partner among those of all pairs in the batch.

    a_i, b_i = mean of the states of each text of pair i, of unit length
    loss = - sum over pairs i of log softmax over j of (a_i . b_j / temperature) [j = i]

Paper: van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (InfoNCE), arXiv 1807.03748,
with the other pairs of the batch for negatives as in Henderson et al., "Efficient Natural Language Response
Suggestion", arXiv 1705.00652. Of equal texts in a batch, all but one are taken for negatives wrongly.

The loss of a pair depends on the whole batch, so that it does not decompose into parts: techniques that split batches
are refused, since fewer negatives are another loss. Ranks that share a batch gather the vectors of all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError

if TYPE_CHECKING:
    from scrimp.lanes import Ranks


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Loss: cross entropy of each text's partner among those of the batch, summed over pairs."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    needs: ClassVar[tuple[str, ...]] = ("texts", "pair_tokens")
    head: ClassVar[str] = "none"
    decomposes: ClassVar[bool] = False
    """Whether the loss is a sum over items that do not depend on each other."""
    gathers: ClassVar[bool] = True
    """Whether ranks that see other samples compare theirs with those of all."""
    temperature: float = 0.05
    """By which similarities, which are from -1 to 1, are divided."""
    pooling: Literal["mean", "first", "last"] = "mean"
    """Which states stand for a text: the mean of all, the first with the model's pooler if it has one, or the last."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature must be above 0, not {self.temperature}.")

    def among(self, peers: Ranks) -> EmbedAmong:
        """The task on one of several ranks, each of which has a part of the batch."""
        return EmbedAmong(self, peers)

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """The two texts of each pair, `tokens` [B, T] and `pair_tokens` [B, S], and which of them are attended."""
        names = ("tokens", "attended", "pair_tokens", "pair_attended")
        return {name: torch.from_numpy(items[name]) for name in names} | {"sample": torch.from_numpy(sample)}

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many pairs the summed loss sums over: int64, a scalar."""
        return torch.tensor(len(batch["tokens"]))

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """How many tokens of both texts, without those that fill them up: int64, a scalar."""
        return batch["attended"].sum() + batch["pair_attended"].sum()

    def embedded(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Both texts of each pair as vectors of unit length, [B, C] each."""
        sample = batch["sample"]
        a = model(tokens=batch["tokens"], attended=batch["attended"], sample=sample)
        # Dropout has another mask for the second text, which would else be disturbed in the same places.
        b = model(tokens=batch["pair_tokens"], attended=batch["pair_attended"], sample=~sample)
        return F.normalize(a, dim=-1), F.normalize(b, dim=-1)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss."""
        return self.contrast(*self.embedded(model, batch))

    def contrast(self, a: Tensor, b: Tensor, first: int = 0) -> Tensor:
        """The summed loss of texts a [B, C], whose partners stand in b [D, C] from the first one on."""
        own = first + torch.arange(len(a), device=a.device)
        return F.cross_entropy(a @ b.T / self.temperature, own, reduction="sum")

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss within batches, and recall_at_1: texts whose partner is the nearest of all in the set."""
        total, sides = 0.0, list[tuple[Tensor, Tensor]]()
        for batch in batches:
            a, b = self.embedded(model, batch)
            total += float(self.contrast(a, b))
            sides.append((a, b))
        a, b = (torch.cat(side) for side in zip(*sides, strict=True))
        rows = a.split(1024)  # so that not all similarities exist at once
        nearest = torch.cat([(part @ b.T).argmax(1) for part in rows])
        right = (nearest == torch.arange(len(a), device=a.device)).sum()
        return {"loss": total / len(a), "recall_at_1": int(right) / len(a)}


@dataclass(frozen=True, eq=False)
class EmbedAmong:
    """`Embed` on one of several ranks: its texts find their partners among those of all ranks."""

    alone: Embed
    peers: Ranks

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """As `Embed.batch`."""
        return self.alone.batch(items, sample)

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """As `Embed.count`."""
        return self.alone.count(batch)

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """As `Embed.tokens`."""
        return self.alone.tokens(batch)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss of this rank's pairs."""
        a, b = self.alone.embedded(model, batch)
        return self.alone.contrast(a, self.peers.rows(b), len(a) * self.peers.place)

    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """As `Embed.evaluate`."""
        return self.alone.evaluate(model, batches)
