"""Sequences of different lengths as one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

MULTIPLE: Final = 8
"""Lengths are rounded up to a multiple of this, so that batches have few different shapes."""


def padded(rows: Sequence[np.ndarray], most: int, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as one array, as long as the longest, rounded up to 8 but not beyond `most`.

    Args:
        most: longest that a row may be.
        fill: what stands after a row's end.
    Returns:
        ids, int64 [rows, length], and the rows' own lengths, int64 [rows].
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest = min(most, -(-int(lengths.max(initial=1)) // MULTIPLE) * MULTIPLE)
    out = np.full((len(rows), longest), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, lengths
