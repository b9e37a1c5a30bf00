"""Drop and growth: a layer gives up some of its weights and takes as many others.

    drop    the k active weights with the lowest key
    grow    of all that are then inactive, the just dropped included, the k with the highest score

So the number of weights stays the same to the integer. A weight that is dropped and grown at once was never gone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine(first: float, last: float, share: float) -> float:
    """From `first` at 0 to `last` at 1, along half a cosine; `last` ever after."""
    return last + (first - last) / 2 * (1 + math.cos(math.pi * min(share, 1.0)))


def exchanged(key: Tensor, mask: Tensor, active: int, count: int, score: Tensor) -> Tensor:
    """The mask after a drop and a growth of `count` weights.

    Args:
        key: not negative; the lowest ones among the active are dropped.
        active: how many the mask has.
        score: the highest ones among the inactive are grown.
    """
    kept = torch.zeros_like(mask).flatten()
    kept[torch.where(mask, key, -1.0).flatten().topk(active - count).indices] = True
    candidates = torch.where(kept, -torch.inf, score.flatten())
    kept[candidates.topk(count).indices] = True
    return kept.view(mask.shape)


def signed_key(weight: Tensor, mask: Tensor) -> Tensor:
    """Rank by magnitude among the active weights of the same sign, as a share of them; 0 for weights that are 0.

    Dropping the lowest takes the same share of the smallest positive and of the largest negative weights.
    """
    key = torch.zeros_like(weight, dtype=torch.float64).flatten()
    for sign in (1, -1):
        chosen = (mask & (weight * sign > 0)).flatten()
        magnitude = torch.where(chosen, weight.flatten().abs(), torch.inf)
        rank = torch.empty_like(key)
        rank[magnitude.argsort(stable=True)] = torch.arange(1, len(key) + 1, dtype=key.dtype, device=key.device)
        key = torch.where(chosen, rank / chosen.sum(), key)
    return key.view(weight.shape)
