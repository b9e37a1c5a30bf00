"""Fragments: read a text with a gap, write what was in the gap.

    loss = - sum over tokens t of a fragment x[u:v] of log p(x[t] | x[u-1:t], the text without the fragment)

Of each window a contiguous fragment of half the tokens is hidden from the encoder: 80 % of its tokens become the mask
token, 10 % a random one, 10 % stay. It begins at the window's head (20 %), ends at its tail (20 %), or lies anywhere.
The decoder's inputs are the tokens before those that it writes; the first one of them, if the window does not begin
with the fragment, stands in front of it and is read by the encoder too. Tokens have the positions that they have in the
whole text. The decoder does not look at mask tokens.

The decoder runs over all places, with inputs outside the fragment masked out. Leaving those out computes the same from
fewer tokens, and is the technique `mass`.

Paper: Song et al., "MASS", ICML 2019, arXiv 1905.02450. The draws of a window are a function of its sample's number.
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
from scrimp.tasks.denoise import Denoise
from scrimp.tasks.seq2seq import IGNORED
from scrimp.tasks.sums import Sums, evaluated, of_tokens, per_token

SALT: Final = 0x4D415353
"""Keeps these draws apart from all others that are keyed by the sample's number."""


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Text with one gap. Loss: cross entropy of the tokens that were in it, summed over them."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    models: ClassVar[tuple[str, ...]] = ("encoder_decoder",)
    share: float = 0.5
    """Of a window's tokens that are in the fragment."""
    masked: float = 0.8
    """Share of the fragment that becomes the mask token."""
    random: float = 0.1
    """Share of the fragment that becomes another token, any with the same chance."""
    at_head: float = 0.2
    """Share of the fragments that begin their window."""
    at_tail: float = 0.2
    """Share of the fragments that end their window."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the vocabulary, in training only."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"share must be above 0 and below 1, not {self.share}.")
        for one, two in (("masked", "random"), ("at_head", "at_tail")):
            if min(getattr(self, one), getattr(self, two)) < 0 or getattr(self, one) + getattr(self, two) > 1:
                raise UserError(f"{one} and {two} must be at least 0 and together at most 1.")

    def mask(self, data: Any) -> int:
        """Id that hides a token: the tokenizer's own, else the one after its last."""
        own = getattr(data.tokenizer, "mask", None)
        return own if own is not None else Denoise().marks(data)[0]

    def adds(self, data: Any) -> int:
        """How many ids the task uses that the tokenizer does not have."""
        return max(0, self.mask(data) + 1 - data.tokenizer.vocab)

    def prepared(self, data: Any) -> FragmentTask:
        """The task, with the ids that it uses.

        Raises:
            UserError: if the data are conversations, whose padding would be taken for text.
        """
        if "targets" in getattr(data, "gives", ()):
            what = "the data's windows hold conversations and padding, and not one text."
            raise UserError(what, "data", "Choose the data set `text`.")
        special = {*getattr(data.tokenizer, "special", ()), self.mask(data), data.tokenizer.end}
        ordinary = np.setdiff1d(np.arange(data.tokenizer.vocab), sorted(special))
        return FragmentTask(self, data.tokenizer.end, self.mask(data), ordinary)


@dataclass(frozen=True, eq=False)
class FragmentTask:
    """`Fragment` in use.

    Attributes:
        start: id that the decoder begins with, where a fragment begins a window.
        mask: id that hides a token. ordinary: ids that may stand in for one.
    """

    settings: Fragment
    start: int
    mask: int
    ordinary: np.ndarray
    fragments: ClassVar[bool] = True

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """A batch from windows of tokens, [B, T + 1], of which the last token is left out, and samples' numbers [B].

        Returns:
            tokens, with the fragment hidden; read, which of them the decoder looks at; decoder_tokens; places, which
            they have; written, which take part; targets: all [B, T]. sample, [B].
        """
        windows = items["tokens"][:, :-1]
        rows, length = windows.shape
        hidden, written = windows.copy(), np.zeros(windows.shape, dtype=bool)
        for row, number in enumerate(sample):
            chance = np.random.default_rng([SALT, int(number)])
            begin, end = self.span(length, chance)
            hidden[row, begin:end] = self._hidden(windows[row, begin:end], chance)
            written[row, begin:end] = True
        begun = np.concatenate([np.full((rows, 1), self.start), windows[:, :-1]], 1)
        arrays = {
            "tokens": hidden, "read": hidden != self.mask, "decoder_tokens": begun, "written": written,
            "places": np.tile(np.arange(length), (rows, 1)), "targets": np.where(written, windows, IGNORED),
            "sample": np.asarray(sample),
        }  # fmt: skip
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    def span(self, length: int, chance: np.random.Generator) -> tuple[int, int]:
        """Where the fragment begins and ends; some of a window of two tokens or more is always left to be read."""
        count = min(max(1, round(self.settings.share * length)), max(1, length - 1))
        where = chance.random()
        begin = int(chance.integers(0, length - count + 1))
        if where < self.settings.at_head:
            begin = 0
        elif where < self.settings.at_head + self.settings.at_tail:
            begin = length - count
        return begin, begin + count

    def _hidden(self, tokens: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        """What the encoder gets instead of a fragment."""
        kind, others = chance.random(len(tokens)), chance.choice(self.ordinary, len(tokens))
        masked, random = self.settings.masked, self.settings.masked + self.settings.random
        return np.where(kind < masked, self.mask, np.where(kind < random, others, tokens))

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many targets the summed loss sums over: int64, a scalar; at least 1, where all fragments were cut off."""
        return (batch["targets"] != IGNORED).sum().clamp(min=1)

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """Tokens that are read."""
        return torch.tensor(batch["tokens"].numel())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss."""
        return outputs(model, batch, batch["targets"], self.settings.label_smoothing if model.training else 0.0)

    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss (nats a token), perplexity, and the share of hidden tokens that were the likeliest."""
        return evaluated(self, model, batches)

    def sums(self, model: nn.Module, batch: dict[str, Tensor]) -> Sums:
        """What scores follow from."""
        logits, targets = outputs(model, batch), batch["targets"]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return of_tokens(loss, targets, logits.argmax(-1))

    def scores(self, sums: Sums) -> dict[str, float]:
        """What sums over all batches say."""
        return per_token(sums)


def outputs(
    model: nn.Module, batch: dict[str, Tensor], targets: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Logits [B, T, V], or the summed loss when targets are given."""
    return model(
        batch["tokens"],
        batch["decoder_tokens"],
        targets,
        sample=batch["sample"],
        smoothing=smoothing,
        read=batch["read"],
        places=batch["places"],
        written=batch.get("written"),
    )
