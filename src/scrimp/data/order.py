"""The order of items: an endless sequence that visits each item once an epoch, as a function of (seed, position)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` items in one epoch: int64, shape [count]. A function of its arguments."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def sample_ids(index: np.ndarray, seed: int, first: int, count: int) -> np.ndarray:
    """Items at positions first, ..., first + count - 1 of the endless sequence.

    Args:
        index: ids of the items there are, int64, shape [items].
    Returns:
        int64, shape [count].
    """
    places = np.arange(first, first + count)
    epochs, offsets = np.divmod(places, len(index))
    chosen = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = permutation(len(index), seed, int(epoch))[offsets[here]]
    return index[chosen]
