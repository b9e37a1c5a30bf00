"""Masked language modeling: predict tokens that were hidden from those around them.

Of the tokens that are no special ones, a share of 15 % is chosen, at least one. Of the chosen, 80 % become the mask
token, 10 % a random token, and 10 % stay, so that the model cannot know which it is asked about:

    loss = - sum over chosen positions of log p(token | what is left)

Papers: Devlin et al., "BERT", arXiv 1810.04805, section 3.1; Liu et al., "RoBERTa", arXiv 1907.11692, whose dynamic
masking is used here: the choice is a function of the sample's number in the run, hence another one in each epoch, and
the same after a resume or in other micro-batches. Held-out items have fixed numbers, so that their masks are fixed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.tasks.sums import Sums, evaluated, of_tokens, per_token

SALT: Final = 0x6D61736B
"""Sets these draws apart from others that are keyed by sample."""


@dataclass(frozen=True, kw_only=True)
class MaskedLM:
    """Loss: cross entropy of hidden tokens, summed over them. Needs a tokenizer with a mask token."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    head: ClassVar[str] = "mlm"
    share: float = 0.15
    """Of the tokens that are predicted."""
    masked: float = 0.8
    """Share of these that become the mask token."""
    random: float = 0.1
    """Share of these that become another token, any with the same chance."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the vocabulary, in training only."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"share must be above 0 and at most 1, not {self.share}.")
        if min(self.masked, self.random) < 0 or self.masked + self.random > 1:
            raise UserError("masked and random must be at least 0 and together at most 1.")

    def prepared(self, data: Any) -> Masking:
        """The task, knowing the data's special tokens.

        Raises:
            UserError: if the data have no plain texts, or their tokenizer no mask token.
        """
        gives = set(getattr(data, "gives", ("tokens",)))
        if not {"tokens", "texts"} & gives or "targets" in gives:
            raise UserError("the data have no plain texts.", "data", "Choose `text` or `labelled`.")
        tokenizer = data.tokenizer
        if getattr(tokenizer, "mask", None) is None:
            fix = "Set `data.mask: true`, or give a tokenizer.json that has [MASK] or <mask>."
            raise UserError("the tokenizer has no token that hides others.", "data.tokenizer", fix)
        special = np.array(sorted({*tokenizer.special, tokenizer.mask}), dtype=np.int64)
        return Masking(self, tokenizer.mask, special, np.setdiff1d(np.arange(tokenizer.vocab), special))


@dataclass(frozen=True)
class Masking:
    """Masked language modeling with a tokenizer's ids.

    Attributes:
        mask: id of the mask token.
        special: ids that are never hidden. ordinary: all others.
    """

    settings: MaskedLM
    mask: int
    special: np.ndarray
    ordinary: np.ndarray
    trains: ClassVar[tuple[str, ...]] = ("head_transform.*", "head.bias")

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """A batch of hidden tokens and what they were, [B, T].

        Args:
            items: `tokens`, [B, T] with `attended` where texts were filled up, or windows of a stream, [B, T + 1],
                whose last token is left out; `segments` and `documents` where there are several.
            sample: numbers of the samples in the run, [B].
        """
        whole = "attended" in items
        tokens = items["tokens"] if whole else items["tokens"][:, :-1]
        free = ~np.isin(tokens, self.special) & (items["attended"] if whole else True)
        hidden, targets = tokens.copy(), np.full_like(tokens, -100)
        for row, number in enumerate(sample):
            draw = np.random.default_rng([SALT, int(number)])
            self._hide(hidden[row], targets[row], np.flatnonzero(free[row]), draw)
        batch = {"tokens": hidden, "targets": targets, "sample": np.asarray(sample, dtype=np.int64)}
        batch |= {name: items[name] for name in ("attended", "segments") if name in items}
        batch |= {name: items[name][:, : tokens.shape[1]] for name in ("documents",) if name in items}
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _hide(self, hidden: np.ndarray, targets: np.ndarray, places: np.ndarray, draw: np.random.Generator) -> None:
        """Hide some of a row's places, in place."""
        if not len(places):
            return
        chosen = draw.permutation(places)[: max(1, round(self.settings.share * len(places)))]
        targets[chosen] = hidden[chosen]
        kind = draw.random(len(chosen))
        others = draw.choice(self.ordinary, len(chosen))
        masked, random = self.settings.masked, self.settings.masked + self.settings.random
        hidden[chosen] = np.where(kind < masked, self.mask, np.where(kind < random, others, hidden[chosen]))

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many hidden tokens the summed loss sums over: int64, a scalar; at least 1, where all texts are empty."""
        return (batch["targets"] != -100).sum().clamp(min=1)

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """How many tokens a batch has, without those that fill it up: int64, a scalar."""
        attended = batch.get("attended")
        return torch.tensor(batch["tokens"].numel()) if attended is None else attended.sum()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss."""
        smoothing = self.settings.label_smoothing if model.training else 0.0
        return model(batch["tokens"], batch["targets"], smoothing=smoothing, **_seen(batch))

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of the vocabulary at each token, [B, T, V]."""
        return model(batch["tokens"], **_seen(batch))

    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss (nats a hidden token), its exponential, and the share of hidden tokens that were guessed."""
        return evaluated(self, model, batches)

    def sums(self, model: nn.Module, batch: dict[str, Tensor]) -> Sums:
        """What scores follow from."""
        rows = batch["targets"] != -100
        # Only the hidden tokens' logits, since those of all tokens are many times as large.
        states: Any = model.states(batch["tokens"], **_seen(batch))  # type: ignore[operator]
        logits = model.head(model.head_transform(states[rows]))  # type: ignore[operator]
        targets = batch["targets"][rows]
        return of_tokens(F.cross_entropy(logits, targets, reduction="sum"), targets, logits.argmax(-1))

    def scores(self, sums: Sums) -> dict[str, float]:
        """What sums over all batches say."""
        return per_token(sums)


def _seen(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("sample", "attended", "segments", "documents") if name in batch}
