# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Attention to keys that arrive part by part, as they do when ranks pass theirs round a ring.

    forward    for each part j of keys and values that arrives:
               s = q k_j^T / sqrt(D)        L_j = log sum exp s        o_j = exp(s - L_j) v_j
               L' = log(exp L + exp L_j)    o <- exp(L - L') o + exp(L_j - L') o_j        L <- L'
    backward   delta = rowsum(do o);  for each part that arrives again, p = exp(s - L):
               ds = p (do v_j^T - delta) / sqrt(D)     dv_j += p^T do    dq += ds k_j    dk_j += ds^T q

The merge is exact, and in at least float32. Scores exist tile by tile. Nothing here sends anything: who does hands over
the parts.

Of n ranks, rank r has the stretches r and 2 n - 1 - r of 2 n. Under a causal mask each then computes 2 n + 1 pairs of
stretches, at every turn two of them (three at first), and nobody waits for the one with the last tokens.

Papers: Li et al., "Sequence Parallelism: Long Sequence Training from System Perspective", arXiv 2105.13120; Liu et al.,
"Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv 2310.01889, for the merge.

Legend of shapes: B batch, T tokens of a sample, t of a rank, H heads, K key/value heads, G = H / K, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

TILE: Final = 1024
"""Most queries, and most keys, whose scores exist at once."""
Arrival = tuple[int, Tensor]
"""A rank, and its keys and values [2, B, K, t, D]."""


class Line(Protocol):
    """How parts come to a rank and go on from it; `tokenwise.Neighbors` is one over a process group."""

    count: int
    place: int

    def turn(self, x: Tensor) -> Any:
        """Send a tensor to the next rank; returns a function that waits for the one of the rank before."""


@dataclass(frozen=True)
class Sight:
    """Which tokens of the whole samples see which, and which of them a rank has.

    Attributes:
        owned: for each rank the stretches of a sample that it has, in the order in which it holds them.
        attended: which tokens are no padding, [B, T].
        documents: number of each token's document, [B, T]; tokens of others are not seen.
    """

    owned: tuple[tuple[slice, ...], ...]
    causal: bool
    attended: Tensor | None = None
    documents: Tensor | None = None

    def tiles(self, rank: int) -> Iterator[tuple[slice, slice]]:
        """(place among a rank's tokens, place in the sample) of stretches of at most `TILE` tokens."""
        begin = 0
        for stretch in self.owned[rank]:
            for start in range(stretch.start, stretch.stop, TILE):
                there = slice(start, min(start + TILE, stretch.stop))
                yield slice(begin, begin := begin + there.stop - there.start), there

    def seen(self, queries: slice, keys: slice, device: torch.device) -> Tensor | bool:
        """Which keys of a stretch the queries of another see: all, none, or a mask of [B, 1, 1, q, k]."""
        if self.causal and keys.start > queries.stop - 1:
            return False
        mask: Tensor | None = None
        if self.causal and keys.stop - 1 > queries.start:
            below = torch.arange(queries.start, queries.stop, device=device)[:, None]
            mask = torch.arange(keys.start, keys.stop, device=device) <= below
        if self.attended is not None:
            attended = self.attended[:, None, None, None, keys]
            mask = attended if mask is None else mask & attended
        if self.documents is not None:
            rows, columns = self.documents[:, queries], self.documents[:, keys]
            same = (rows[:, :, None] == columns[:, None, :])[:, None, None]
            mask = same if mask is None else mask & same
        return True if mask is None else mask


def zigzag(tokens: int, ranks: int) -> tuple[tuple[slice, ...], ...]:
    """For each rank its two stretches of so many tokens, a multiple of 2 n."""
    size = tokens // (2 * ranks)
    return tuple(tuple(slice(i * size, (i + 1) * size) for i in (r, 2 * ranks - 1 - r)) for r in range(ranks))


def straight(tokens: int, ranks: int) -> tuple[tuple[slice, ...], ...]:
    """For each rank its one stretch of so many tokens, a multiple of n."""
    size = tokens // ranks
    return tuple((slice(r * size, (r + 1) * size),) for r in range(ranks))


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Attention to some keys, with its log-sum-exp [..., 1], becomes attention to these and others; in place.

    A row that sees none of some keys has minus infinity there.
    """
    joint = torch.logaddexp(lse, more_lse)
    safe = finite(joint)
    out.mul_((lse - safe).exp()).add_((more_lse - safe).exp() * more)
    lse.copy_(joint)


def attend(q: Tensor, arrivals: Iterable[Arrival], rank: int, sight: Sight) -> tuple[Tensor, Tensor]:
    """A rank's queries [B, H, t, D], all keys that arrive -> attention [B, H, t, D], log-sum-exp [B, K, G, t, 1]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = lse = queries = torch.empty(0)
    for source, kv in arrivals:
        if not queries.numel():
            queries = grouped(q, kv)
            out = torch.zeros(queries.shape, dtype=wide, device=q.device)
            lse = torch.full((*queries.shape[:-1], 1), float("-inf"), dtype=wide, device=q.device)
        for rows, there in sight.tiles(rank):
            for columns, theirs in sight.tiles(source):
                seen = sight.seen(there, theirs, q.device)
                if seen is False:
                    continue
                k, v = kv[:, :, :, None, columns].to(wide)
                s = scores(queries[..., rows, :].to(wide), k, seen)
                part = s.logsumexp(-1, keepdim=True)
                merge(out[..., rows, :], lse[..., rows, :], s.sub_(finite(part)).exp_() @ v, part)
    return out.view(q.shape).to(q.dtype), lse


def attend_back(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, arrival: Arrival, rank: int, sight: Sight, dq: Tensor
) -> Tensor:
    """The gradient of the keys and values that have arrived, [2, B, K, t, D], wide; that of the queries is added to dq.

    Args:
        grad: of `out`, [B, H, t, D].
        dq: [B, K, G, t, D], wide.
    """
    source, kv = arrival
    queries, do, o = (grouped(t, kv) for t in (q, grad, out))
    scale, dkv = q.shape[-1] ** -0.5, torch.zeros_like(kv, dtype=lse.dtype)
    for rows, there in sight.tiles(rank):
        for columns, theirs in sight.tiles(source):
            seen = sight.seen(there, theirs, q.device)
            if seen is False:
                continue
            qi, doi, oi = (t[..., rows, :].to(lse.dtype) for t in (queries, do, o))
            k, v = kv[:, :, :, None, columns].to(lse.dtype)
            p = scores(qi, k, seen).sub_(finite(lse[..., rows, :])).exp_()
            dkv[1, :, :, columns] += (p.transpose(-1, -2) @ doi).sum(2)
            ds = (doi @ v.transpose(-1, -2)).sub_((doi * oi).sum(-1, keepdim=True)).mul_(p).mul_(scale)
            dq[..., rows, :] += ds @ k
            dkv[0, :, :, columns] += (ds.transpose(-1, -2) @ qi).sum(2)
    return dkv


def scores(q: Tensor, k: Tensor, seen: Tensor | bool) -> Tensor:
    """q [B, K, G, t, D] and k [B, K, 1, s, D] -> [B, K, G, t, s], minus infinity where nothing is seen."""
    s = (q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)
    return s if isinstance(seen, bool) else s.masked_fill_(~seen, float("-inf"))


def finite(lse: Tensor) -> Tensor:
    """What can be subtracted: 0 for rows that see nothing."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def grouped(x: Tensor, kv: Tensor) -> Tensor:
    """[B, H, t, D] of queries -> [B, K, G, t, D], with the heads of keys [2, B, K, t, D]."""
    return x.reshape(len(x), kv.shape[2], -1, *x.shape[2:])


def round_trip(kv: Tensor, line: Line) -> Iterator[Arrival]:
    """Each rank's keys and values, this one's first; the next ones are on their way while these are used."""
    for step in range(line.count):
        coming = line.turn(kv) if step + 1 < line.count else None
        yield (line.place - step) % line.count, kv
        if coming is not None:
            kv = coming()


class Ringed(Function):
    """q [B, H, t, D], k and v [B, K, t, D] of this rank's tokens -> [B, H, t, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, line: Line, sight: Sight) -> Tensor:
        """Keys and values go once round the ring."""
        kv = torch.stack([k, v])
        out, lse = attend(q, round_trip(kv, line), line.place, sight)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.line, ctx.sight = line, sight
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """They go round again, and their gradients behind them, which are home after the last turn."""
        q, kv, out, lse = ctx.saved_tensors
        line: Line = ctx.line
        dq, coming = torch.zeros(grouped(q, kv).shape, dtype=lse.dtype, device=q.device), None
        dkv = torch.empty(0)
        for arrival in round_trip(kv, line):
            dkv = attend_back(grads[0], q, out, lse, arrival, line.place, ctx.sight, dq)
            if coming is not None:
                dkv += coming()
            coming = line.turn(dkv) if line.count > 1 else None
        dk, dv = (dkv if coming is None else coming()).to(kv.dtype)
        return dq.view(q.shape).to(q.dtype), dk, dv, None, None
