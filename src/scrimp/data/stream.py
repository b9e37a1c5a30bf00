"""A memory-mapped stream of tokens, cut into windows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Tokens:
    """Tokens of one split on disk.

    Windows do not overlap; neighbors share one token, a target here and an input there.
    """

    path: Path
    dtype: str
    count: int
    """Tokens in the file."""
    context: int
    """Tokens of a window."""

    def __len__(self) -> int:
        return max(0, (self.count - 1) // self.context)

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))

    def windows(self, ids: np.ndarray) -> np.ndarray:
        """Inputs and targets of windows: int64, [len(ids), context + 1]."""
        places = np.asarray(ids, dtype=np.int64)[:, None] * self.context + np.arange(self.context + 1)
        return self._tokens[places].astype(np.int64)
