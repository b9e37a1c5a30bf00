"""Some of the tokens of a sequence: taken out, and put back.

Legend of shapes: B batch, T tokens, K tokens that are taken, C width, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.models.dropout import mixed


def gathered(x: Tensor, places: Tensor) -> Tensor:
    """The tokens at some places of each sample: x [B, T, ...], places [B, K] -> [B, K, ...]."""
    rest = x.shape[2:]
    index = places.view(*places.shape, *(1 for _ in rest)).expand(*places.shape, *rest)
    return x.gather(1, index)


def shortened(batch: dict[str, Tensor], context: int, length: int) -> dict[str, Tensor]:
    """A batch with the beginnings of what has the context's length."""
    if length == context:
        return batch
    return {n: t[:, :length].contiguous() if t.ndim > 1 and t.shape[1] == context else t for n, t in batch.items()}


def scattered(x: Tensor, places: Tensor, new: Tensor) -> Tensor:
    """x [B, T, C] with the tokens at some places [B, K] replaced by those of new [B, K, C]; the others as they are."""
    return x.scatter(1, places[..., None].expand(-1, -1, x.shape[2]), new.to(x.dtype))


def drawn(sample: Tensor, key: int, tokens: int, count: int, first: int) -> Tensor:
    """Some places of each sample in rising order, all choices alike: int64 [B, count].

    Like dropout's masks, a function of (sample, key, place), so that no generator is involved and a second pass, other
    micro-batches or a resumed run draw the same.

    Args:
        sample: number of each sample in the run, [B].
        key: of what draws.
        first: so many tokens from the start are always among them.
    """
    bits = lots(sample, key, tokens)
    bits[:, :first] = -1
    return bits.topk(count, largest=False, sorted=False).indices.sort().values


def highest(scores: Tensor, sample: Tensor, key: int, count: int) -> Tensor:
    """The places with the highest scores [B, T] in rising order, alike ones by lot: int64 [B, count].

    Where all scores are equal, these are the places that `drawn` gives.
    """
    by_lot = lots(sample, key, scores.shape[1]).argsort(1)
    order = scores.gather(1, by_lot).sort(dim=1, descending=True, stable=True).indices
    return by_lot.gather(1, order[:, :count]).sort().values


def lots(sample: Tensor, key: int, tokens: int) -> Tensor:
    """A number of each place, a function of (sample, key, place): [B, tokens]."""
    row = mixed(mixed(sample & 0xFFFFFFFF) ^ key)[:, None]
    return mixed(row ^ torch.arange(tokens, device=sample.device))


def some_rope(rope: tuple[Tensor, Tensor] | None, places: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rotary angles of the tokens at some places [B, K]: each [T, D/2] or [B, 1, T, D/2] -> [B, 1, K, D/2]."""
    if rope is None:
        return None
    cos, sin = (
        angle[places][:, None] if angle.ndim == 2
        else gathered(angle[:, 0].expand(len(places), -1, -1), places)[:, None]
        for angle in rope
    )  # fmt: skip
    return cos, sin


def some_mask(mask: Tensor | None, places: Tensor) -> Tensor | None:
    """Rows and columns of the tokens at some places [B, K] of a mask that broadcasts to [B, H, T, T]."""
    if mask is None:
        return None
    part = mask.view(*(1 for _ in range(4 - mask.ndim)), *mask.shape).expand(len(places), -1, -1, -1)
    for dim in (2, 3):
        if part.shape[dim] > 1:
            shape = list(part.shape)
            shape[dim] = places.shape[1]
            index = places[:, None, :, None] if dim == 2 else places[:, None, None, :]
            part = part.gather(dim, index.expand(shape))
    return part
