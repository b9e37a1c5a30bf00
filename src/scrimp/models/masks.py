"""Which tokens see which: masks for attention, and the places that documents in one sequence begin at.

Legend of shapes: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def firsts(documents: Tensor) -> Tensor:
    """Where each token's document begins: [B, T] -> [B, T]."""
    tokens = documents.shape[1]
    place = torch.arange(tokens, device=documents.device).expand_as(documents)
    new = torch.ones_like(documents, dtype=torch.bool)
    new[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(new, place, 0).cummax(1).values


def seen(tokens: Tensor, causal: bool, attended: Tensor | None, documents: Tensor | None) -> Tensor | None:
    """Which tokens see which, [B, 1, T, T] or [B, 1, 1, T]; None where the attention knows by itself."""
    if attended is None and documents is None:
        return None
    mask = None if attended is None else attended[:, None, None, :]
    if documents is not None:
        same = documents[:, None, :, None] == documents[:, None, None, :]
        mask = same if mask is None else mask & same
    assert mask is not None
    if causal:
        before = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
        mask = mask & before
    return mask


def beside(mask: Tensor, count: int, causal: bool) -> Tensor:
    """A boolean mask [B, 1, T, T] or [B, 1, 1, T] with `count` prompts before the tokens.

    Every token sees the prompts; of several documents, so does every one, and the prompts see themselves only.
    """
    rows = mask.shape[2]
    mask = torch.cat([mask.new_ones(len(mask), 1, rows, count), mask], 3)
    if rows == 1:
        return mask
    above = mask.new_ones(count, count)
    above = torch.cat([above.tril() if causal else above, mask.new_zeros(count, rows)], 1)
    return torch.cat([above.expand(len(mask), 1, -1, -1), mask], 2)


def added(mask: Tensor, x: Tensor) -> Tensor:
    """A boolean mask as what is added to the scores, in the type in which attention computes: 0 or minus infinity.

    torch's kernels make that of a boolean one, and every block would keep its own for the backward pass. Each token
    must see at least one.
    """
    kind = x.device.type
    half = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if half else x.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def counted(x: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The states whose targets count, [n, C] and [n]: few of a masked language model's; all where they have no values.

    While planning, targets have no values, and the plan is for the worst case.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    if targets is None or isinstance(targets, FakeTensor):
        return x, targets
    rows = (targets.flatten() != -100).nonzero().squeeze(1)
    return x.flatten(0, 1).index_select(0, rows), targets.flatten().index_select(0, rows)
