"""The sizes of a corpus that is not at hand: not built yet, for a plan, or not needed, to use what was trained on it.

Tokenizing ten gigabytes to say what a run needs is no plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from scrimp.data.tokenizer import Tokenizer

BYTES_PER_TOKEN: Final = {"bytes": 1.0, "bpe": 4.0}
"""Of usual text; of a given tokenizer as of a trained one."""


@dataclass(frozen=True)
class Windows:
    """Windows of zeros, as many as the corpus is thought to have."""

    count: int
    context: int
    isolate: bool = False
    """Whether items say which tokens are of one document."""

    def __len__(self) -> int:
        return self.count

    def windows(self, ids: np.ndarray, length: int | None = None) -> np.ndarray:
        """int64 zeros, shape [len(ids), length + 1]."""
        return np.zeros((len(ids), (length or self.context) + 1), dtype=np.int64)

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Windows as a task takes them."""
        tokens = self.windows(ids)
        return {"tokens": tokens, "documents": np.zeros_like(tokens)} if self.isolate else {"tokens": tokens}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's size; `end` is any id, and no id stands for a special token."""

    vocab: int
    end: int = 0
    mask: int | None = None
    special: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Outline:
    """What a plan needs to know of a corpus; with a `Tokenizer`, also what generating and exporting need."""

    train: Windows
    validation: Windows
    tokenizer: Vocabulary | Tokenizer
    note: str = ""
    meta: dict[str, Any] = field(default_factory=dict[str, Any])


def estimated(
    size: int, tokenizer: str, vocabulary: Vocabulary, context: int, holdout: float, isolate: bool = False
) -> Outline:
    """An outline from bytes of text."""
    tokens = size / BYTES_PER_TOKEN.get(tokenizer, BYTES_PER_TOKEN["bpe"])
    windows = max(2, int(tokens / context))
    held = max(1, int(windows * holdout))
    note = f"The corpus is not built yet: {tokens:,.0f} tokens are an estimate from {size:,} bytes of files."
    train, validation = (Windows(count, context, isolate) for count in (windows - held, held))
    return Outline(train, validation, vocabulary, note)
