"""A memory-mapped stream of tokens, cut into windows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Tokens:
    """Tokens of one split on disk.

    Windows do not overlap; neighbors share one token, a target here and an input there. The file is mapped read-only
    at the first use, so that processes share its pages and a fork does no harm.
    """

    path: Path
    dtype: str
    """uint16 or uint32."""
    count: int
    """Tokens in the file."""
    context: int
    """Tokens of a window, without its last target."""
    end: int | None = None
    """Id of the end-of-text token, if windows shall say where documents begin."""

    def __len__(self) -> int:
        return max(0, (self.count - 1) // self.context)

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Windows as a task takes them: `tokens`, int64 [len(ids), context + 1].

        With `end` also `documents`, of the same shape: a number that rises at each end-of-text token. That token ends a
        document as a target; as an input it begins the next, whose first token is predicted from it alone, as when
        text is generated.
        """
        tokens = self.windows(ids)
        return {"tokens": tokens} if self.end is None else {"tokens": tokens, "documents": numbered(tokens, self.end)}

    def window(self, i: int, length: int | None = None) -> np.ndarray:
        """Inputs and targets of window i: int64, shape [length + 1], from token i * context on.

        Args:
            length: of the inputs, from 1 to context, which is the default.
        """
        return self.windows(np.array([i]), length)[0]

    def windows(self, ids: np.ndarray, length: int | None = None) -> np.ndarray:
        """Inputs and targets of windows: int64, shape [len(ids), length + 1]. Inputs are [:, :-1], targets [:, 1:].

        Raises:
            IndexError: if there is no such window.
            ValueError: if `length` is not from 1 to context.
        """
        ids = np.asarray(ids, dtype=np.int64)
        length = self.context if length is None else length
        if not 1 <= length <= self.context:
            raise ValueError(f"length must be from 1 to {self.context}, not {length}")
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"windows are 0 to {len(self) - 1}, not {ids.min()} to {ids.max()}")
        places = ids[:, None] * self.context + np.arange(length + 1)
        return self._tokens[places].astype(np.int64)


def numbered(tokens: np.ndarray, end: int) -> np.ndarray:
    """Number of each token's document, from 0 in each row: int64 [B, T], rising at every `end`."""
    return (tokens == end).cumsum(1, dtype=np.int64)
