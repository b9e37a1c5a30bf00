"""The order of items: an endless sequence that visits each item once an epoch, as a function of (seed, position).

Texts of different lengths waste what fills up their batches. `places_by_length` has the batches of a stretch of the
sequence sorted by length among each other, as Khomenko et al. do ("Accelerating recurrent neural network training using
sequence bucketing and multi-GPU data parallelization", arXiv 1708.05604), in an order drawn anew for each stretch.
"""

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
    if min(first, count) < 0:
        raise ValueError(f"no order from {first}, {count} long")
    return items_at(index, seed, np.arange(first, first + count))


def items_at(index: np.ndarray | int, seed: int, places: np.ndarray) -> np.ndarray:
    """Items at any positions of the endless sequence.

    Args:
        index: as for `sample_ids`.
        places: int64, shape [count], each at least 0.
    Returns:
        int64, shape [count].
    Raises:
        ValueError: if there are no items, or `seed` is negative.
    """
    items = index if isinstance(index, int) else len(index)
    if items < 1 or seed < 0:
        raise ValueError(f"no order of {items} items, seed {seed}")
    epochs, offsets = np.divmod(places, items)
    chosen = np.empty(len(places), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = permutation(items, seed, int(epoch))[offsets[here]]
    return chosen if isinstance(index, int) else index[chosen]


def places_by_length(
    index: np.ndarray | int, lengths: np.ndarray, seed: int, step: int, batch: int, stretch: int
) -> np.ndarray:
    """Positions in the endless sequence of the items of one batch, which are of about the same length.

    A stretch of `stretch` batches has the items that it has without sorting, so that an epoch visits each item once. A
    function of its arguments: batch i does not depend on what was asked before.

    Args:
        index: as for `sample_ids`.
        lengths: of each item, by its id.
        step: number of the batch, at least 0.
    Returns:
        int64, shape [batch].
    """
    number, row = divmod(step, stretch)
    first = number * stretch * batch
    ids = sample_ids(index, seed, first, stretch * batch)
    rows = np.argsort(lengths[ids], kind="stable").reshape(stretch, batch)
    turn = np.random.default_rng((seed, number, stretch)).permutation(stretch)[row]
    return first + rows[turn]
