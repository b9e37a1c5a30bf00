"""The order of items: an endless sequence that visits each item once an epoch, as a function of (seed, position)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` items in one epoch: int64, shape [count], read-only. A function of its arguments."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    order.flags.writeable = False
    return order


def sample_ids(index: np.ndarray | int, seed: int, first: int, count: int) -> np.ndarray:
    """Items at positions first, ..., first + count - 1 of the endless sequence.

    Batch i of B items is positions i*B, ..., (i+1)*B - 1: a function of (seed, i) alone, whatever was asked before.

    Args:
        index: ids of the items there are, int64, shape [items]; or how many there are: 0, ..., index - 1.
        seed: at least 0.
        first: at least 0.
    Returns:
        int64, shape [count].
    Raises:
        ValueError: if there are no items, or `seed`, `first` or `count` is negative.
    """
    items = index if isinstance(index, int) else len(index)
    if items < 1 or min(seed, first, count) < 0:
        raise ValueError(f"no order of {items} items, seed {seed}, from {first}, {count} long")
    epochs, offsets = np.divmod(np.arange(first, first + count), items)
    chosen = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = permutation(items, seed, int(epoch))[offsets[here]]
    return chosen if isinstance(index, int) else index[chosen]
