"""Denoising: read a text with gaps, write the text, or what was in the gaps.

`bart` (text infilling, Lewis et al., arXiv 1910.13461, section 2.2): spans whose lengths are Poisson(3) are cut out
until 30 % of the tokens are gone, and each is replaced by one mask token; a span of length 0 inserts one. The whole
text is written.

`t5` (Raffel et al., arXiv 1910.10683, section 3.1.4): no span is empty, each is replaced by a mark of its own, and what
is written is each mark with its span, and the end.

Spans never touch: with k tokens that stay, the n spans lie in n different ones of the k + 1 gaps between them, all
choices alike. The draws of a window are a function of its sample's number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from scrimp.data.padding import padded
from scrimp.errors import UserError
from scrimp.tasks.seq2seq import IGNORED, counted, pair_batch, summed, with_gaps
from scrimp.tasks.sums import Sums, evaluated

SALT: Final = 0xDE01
"""Keeps these draws apart from all others that are keyed by the sample's number."""
MASKS: Final = ("<mask>", "[MASK]", "<|mask|>")
"""Usual names of a mask token."""
MARKS: Final = 100
"""Spans of a text that have marks of their own, as T5 has."""


@dataclass(frozen=True, kw_only=True)
class Denoise:
    """Text with gaps. Loss: cross entropy of what is written, summed over its tokens."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    models: ClassVar[tuple[str, ...]] = ("encoder_decoder",)
    style: Literal["bart", "t5"] = "bart"
    """bart: write the whole text. t5: write what was cut out, which is shorter."""
    share: float = 0.3
    """Of the tokens that are cut out; T5 has 0.15."""
    span: float = 3.0
    """Mean length of a span."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the vocabulary, in training only."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.8:
            raise UserError(f"share must be above 0 and at most 0.8, not {self.share}.")
        if not self.span >= 1:
            raise UserError(f"span must be at least 1, not {self.span}.")

    def marks(self, data: Any) -> tuple[int, ...]:
        """Ids that replace spans: the tokenizer's own where it has them, else those after its last."""
        find = getattr(getattr(data.tokenizer, "inner", None), "token_to_id", lambda name: None)
        names = MASKS if self.style == "bart" else tuple(f"<extra_id_{i}>" for i in range(MARKS))
        own = [i for i in map(find, names) if i is not None]
        if self.style == "bart":
            return (own[0] if own else data.tokenizer.vocab,)
        return tuple(own) if len(own) == MARKS else tuple(range(data.tokenizer.vocab, data.tokenizer.vocab + MARKS))

    def adds(self, data: Any) -> int:
        """How many ids the task uses that the tokenizer does not have."""
        return max(0, max(self.marks(data)) + 1 - data.tokenizer.vocab)

    def prepared(self, data: Any) -> GapsTask:
        """The task, with the ids that it uses.

        Raises:
            UserError: if the data are conversations, whose padding would be taken for text.
        """
        if "targets" in getattr(data, "gives", ()):
            what = "the data's windows hold conversations and padding, and not one text."
            raise UserError(what, "data", "Choose the data set `text`.")
        return GapsTask(self, data.tokenizer.end, self.marks(data))


@dataclass(frozen=True)
class GapsTask:
    """`Denoise` in use.

    Attributes:
        end: id that the decoder begins with, and that ends what `t5` writes.
        marks: ids that replace spans: one for all, or one each.
    """

    settings: Denoise
    end: int
    marks: tuple[int, ...]

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """A batch from windows of tokens, [B, T + 1], of which the last token is left out, and samples' numbers [B]."""
        windows = items["tokens"][:, :-1]
        rows = [self.pair(row, int(number)) for row, number in zip(windows, sample, strict=True)]
        (source, read), (target, written), (gaps, _) = (padded(s, windows.shape[1]) for s in zip(*rows, strict=True))
        arrays = (torch.from_numpy(array) for array in (source, read, target, written))
        batch = pair_batch(*arrays, start=self.end, sample=torch.from_numpy(sample))
        return batch | {"gaps": torch.from_numpy(gaps.astype(bool))}

    def pair(self, tokens: np.ndarray, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A window [T] -> what is read, what is written, and which tokens of that were cut out.

        None is longer than the window.
        """
        chance, s = np.random.default_rng([SALT, sample]), self.settings
        t5 = s.style == "t5"
        lengths = span_lengths(len(tokens), s.share, s.span, chance, least=int(t5), most=MARKS - 1 if t5 else None)
        spans = placed(len(tokens), lengths, chance)
        read, cut, last = list[np.ndarray](), list[np.ndarray](), 0
        gone = np.zeros(len(tokens), dtype=bool)
        for i, (start, stop) in enumerate(spans):
            mark = np.array([self.marks[i if t5 else 0]])
            read += [tokens[last:start], mark]
            cut += [mark, tokens[start:stop]]
            gone[start:stop] = True
            last = stop
        source = np.concatenate([*read, tokens[last:]])[: len(tokens)]
        if not t5:
            return source, tokens, gone
        written = np.concatenate([*cut, np.array([self.end])])[: len(tokens)]
        # Of each span, its mark was not cut out; the end was not, either.
        parts = [np.arange(1 + stop - start) > 0 for start, stop in spans]
        return source, written, np.concatenate([*parts, np.array([False])])[: len(tokens)]

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many targets the summed loss sums over: int64, a scalar."""
        return (batch["targets"] != IGNORED).sum()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss."""
        return summed(model, batch, self.settings.label_smoothing)

    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss (nats a token), perplexity, and the share of tokens that were the likeliest, over the batches.

        `accuracy` is that of all tokens, `gap_accuracy` that of those that were cut out.
        """
        return evaluated(self, model, batches)

    def sums(self, model: nn.Module, batch: dict[str, Tensor]) -> Sums:
        """What scores follow from."""
        return counted(model, batch)

    def scores(self, sums: Sums) -> dict[str, float]:
        """What sums over all batches say."""
        return with_gaps(sums)


def span_lengths(
    tokens: int, share: float, mean: float, chance: np.random.Generator, least: int = 0, most: int | None = None
) -> list[int]:
    """Lengths of spans that sum to the share of the tokens, at least one.

    The last one is shortened to fit. Where there are more spans than gaps for them, the last ones become one.

    Args:
        least: of a span; shorter draws are repeated.
        most: spans.
    """
    budget = min(max(1, round(share * tokens)), tokens)
    lengths: list[int] = []
    while (left := budget - sum(lengths)) > 0:
        drawn = int(chance.poisson(mean))
        if drawn >= least:
            lengths.append(min(drawn, left))
    while len(lengths) > min(tokens - budget + 1, most or tokens):
        lengths[-2:] = [sum(lengths[-2:])]
    return lengths


def placed(tokens: int, lengths: list[int], chance: np.random.Generator) -> list[tuple[int, int]]:
    """(start, stop) of spans of such lengths among the tokens, in this order, none touching the next."""
    stay = tokens - sum(lengths)
    gaps = np.sort(chance.choice(stay + 1, size=len(lengths), replace=False))
    spans: list[tuple[int, int]] = []
    taken = 0
    for gap, length in zip(gaps.tolist(), lengths, strict=True):
        spans.append((gap + taken, gap + taken + length))
        taken += length
    return spans
