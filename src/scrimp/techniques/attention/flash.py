"""Exact attention in tiles, without the matrix of scores.

    forward    for each tile j of keys and values, for each tile i of queries:
               s = q_i k_j^T / sqrt(D)         m' = max(m_i, rowmax s)        p = exp(s - m')
               l' = exp(m_i - m') l_i + rowsum p           o_i <- (exp(m_i - m') l_i o_i + p v_j) / l'
    kept       o and L = m + log l, one number a row
    backward   delta = rowsum(do o);  for each two tiles p = exp(s - L):
               ds = p (do_i v_j^T - delta_i) / sqrt(D)     dv_j += p^T do_i    dq_i += ds k_j    dk_j += ds^T q_i

Paper: Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", NeurIPS 2022, arXiv
2205.14135. With room for M numbers on the chip, a tile of keys has ceil(M / 4 D) rows, one of queries at most D.

    numbers moved of a head, N queries, S keys, c tiles of keys      forward 2 S D + c (3 N D + 4 N)
                                                                     backward 4 S D + c (5 N D + N)

Tiles of which no pair is seen are left out: those above a causal diagonal, and those between packed documents where
the mask says so.

`engine: torch` is torch's fused kernel, which does the same inside, and which a model without this technique uses as
well; it is what to train with. `engine: tiled` is the algorithm above in torch's own products: it counts the bytes that
a chip would move between its memory and its cache (`traffic`), and keeps memory linear in the number of tokens on every
device and in every precision, but each tile is a few operators launched from Python.

Saves: the scores and their softmax, [heads, tokens, tokens], where no fused kernel exists. Costs: with `tiled`, time;
scores are computed twice. Not for: speed beyond torch's kernel, of which this is the explanation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from scrimp.cores import CoreTrace, attended, replace_cores, visible, whole
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class Flash(Technique):
    """Exact attention in tiles, without the matrix of scores."""

    card = Card(
        paper="arXiv:2205.14135",
        section="Hardware/algorithm co-design",
        claim="GPT-2 medium's attention on an A100, both passes: 41.7 ms becomes 7.3 (arXiv 2205.14135, Fig. 2)",
        saves="the matrix of scores, where no fused kernel exists",
        costs="with engine tiled, time: each tile is a few operators",
        sets=("attention core",),
        scope="targets",
        needs=("core",),
        phase={"model": "seams"},
        example={"engine": "tiled", "sram": 2048},
        neutral={"engine": "torch"},
    )
    targets: str = "attention|cross"
    """Pattern of the attentions whose core is replaced."""
    engine: Literal["torch", "tiled"] = "torch"
    """torch's fused kernel, or the algorithm itself with its traffic counted."""
    sram: int = 196608
    """Bytes on the chip that tiles may take, which sets their size."""

    def __post_init__(self) -> None:
        at_least(1, self, "sram")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Replace the cores."""
        replace_cores(model, self.targets, run.where(self, "targets"), self._core)
        return model

    def _core(self, path: str, attention: nn.Module) -> FlashCore:
        return FlashCore(self.engine, self.sram)


@dataclass
class Traffic:
    """Bytes that cross the border of the chip, and products of two tiles."""

    read: int = 0
    written: int = 0
    tiles: int = 0

    def move(self, read: int, written: int) -> None:
        """Count bytes."""
        self.read += read
        self.written += written


class FlashCore(nn.Module):
    """As `AttentionCore`.

    Attributes:
        tracing: whether calls count their `traffic`, and those without gradients leave a `trace`.
    """

    def __init__(self, engine: str, sram: int) -> None:
        super().__init__()
        self.engine, self.sram = engine, sram
        self.tracing = False
        self.trace: CoreTrace | None = None
        self.traffic = Traffic()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
        if self.tracing and not torch.is_grad_enabled():
            seen = visible(q, k, causal, mask)
            self.trace = CoreTrace("flash", whole(seen, q, k), seen)
        if self.engine == "torch":
            return attended(q, k, v, causal, mask)
        tiled: Any = self._tiled
        if torch.compiler.is_compiling():  # which would unroll every tile
            tiled = torch.compiler.disable(tiled)
        return tiled(q, k, v, causal, mask)

    def _tiled(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
        kind = q.device.type
        if torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
            q, k, v = (t.to(torch.get_autocast_dtype(kind)) for t in (q, k, v))
        tiles = Tiles(q, k, causal, mask, self.sram, self.traffic if self.tracing else None)
        with torch.autocast(kind, enabled=False):
            return Tiled.apply(q, k, v, tiles)  # type: ignore[no-any-return]


def tile_rows(sram: int, width: int, itemsize: int) -> tuple[int, int]:
    """Rows of a tile of queries and of one of keys."""
    keys = ceil(sram / itemsize / (4 * width))
    return min(keys, width), keys


def moved(queries: int, keys: int, width: int, tile: int) -> tuple[int, int]:
    """Numbers moved by the forward and by the backward pass of one head in which every pair is seen.

    Args:
        tile: rows of a tile of keys.
    """
    count = ceil(keys / tile)
    forward = 2 * keys * width + count * (3 * queries * width + 4 * queries)
    return forward, 4 * keys * width + count * (5 * queries * width + queries)


class Tiles:
    """Which tiles there are, and what is seen in them. Heads are [K, groups], so that grouped ones share their keys.

    Args:
        q: [B, H, T, D]
        k: [B, K, S, D]
        traffic: what to count in; None counts nothing.
    """

    def __init__(
        self, q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, sram: int, traffic: Traffic | None
    ) -> None:
        self.shape = (len(q), k.shape[1], q.shape[1] // k.shape[1], q.shape[2], q.shape[3])
        self.rows, self.columns = tile_rows(sram, q.shape[3], q.element_size())
        self.keys, self.causal, self.traffic = k.shape[2], causal, traffic
        self.mask = mask
        if mask is not None and mask.shape[1] > 1:
            self.mask = mask.view(len(mask), *self.shape[1:3], *mask.shape[2:])
        elif mask is not None:
            self.mask = mask[:, :, None]
        self.scale = q.shape[3] ** -0.5

    def grouped(self, t: Tensor) -> Tensor:
        """[B, H, T, D] of queries -> [B, K, G, T, D]."""
        return t.view(self.shape) if t.is_contiguous() else t.reshape(self.shape)

    def columnwise(self) -> Iterator[tuple[slice, list[slice]]]:
        """Tiles of keys, and for each those of queries that see some of it."""
        for first in range(0, self.keys, self.columns):
            keys = slice(first, min(first + self.columns, self.keys))
            starts = range(0, self.shape[3], self.rows)
            rows = [slice(start, min(start + self.rows, self.shape[3])) for start in starts]
            yield keys, [row for row in rows if self._seen(row, keys)]

    def _seen(self, rows: slice, keys: slice) -> bool:
        if self.causal and keys.start > rows.stop - 1:
            return False
        part = self._part(rows, keys)
        if part is None or isinstance(part, FakeTensor):
            return True
        return bool((part if part.dtype == torch.bool else part > float("-inf")).any())

    def _part(self, rows: slice, keys: slice) -> Tensor | None:
        """The mask of two tiles."""
        if self.mask is None:
            return None
        return self.mask[..., rows if self.mask.shape[-2] > 1 else slice(None), keys]

    def scores(self, q: Tensor, k: Tensor, rows: slice, keys: slice) -> Tensor:
        """q [B, K, G, r, D] and k [B, K, 1, c, D] -> scores [B, K, G, r, c], minus infinity where nothing is seen."""
        s = (q @ k.transpose(-1, -2)) * self.scale
        part = self._part(rows, keys)
        if part is not None:
            s = s.masked_fill_(~part, float("-inf")) if part.dtype == torch.bool else s.add_(part)
        if self.causal and keys.stop - 1 > rows.start:
            below = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
            s.masked_fill_(torch.arange(keys.start, keys.stop, device=q.device) > below, float("-inf"))
        return s

    def count(self, read: list[Tensor], written: list[Tensor], tiles: int = 0) -> None:
        """Count tensors that come onto the chip and leave it, in the numbers' own size."""
        if self.traffic is not None:
            self.traffic.move(*(sum(prod(t.shape) for t in side) * self.itemsize for side in (read, written)))
            self.traffic.tiles += tiles

    itemsize = 4
    """Bytes of a number."""


class Tiled(Function):
    """q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        tiles.itemsize = q.element_size()
        queries = tiles.grouped(q)
        o = queries.new_zeros(queries.shape, dtype=wide)
        m = o.new_full((*o.shape[:-1], 1), float("-inf"))
        total = torch.zeros_like(m)
        for keys, rows in tiles.columnwise():
            kj, vj = (t[:, :, None, keys].to(wide) for t in (k, v))
            tiles.count([kj, vj] if rows else [], [])
            for i in rows:
                qi, oi, mi, li = queries[..., i, :].to(wide), o[..., i, :], m[..., i, :], total[..., i, :]
                tiles.count([qi, oi, mi, li], [oi, mi, li], tiles=1)
                s = tiles.scores(qi, kj, i, keys)
                top = torch.maximum(mi, s.amax(-1, keepdim=True))
                # A row that has seen nothing yet has minus infinity for its highest score.
                safe = top.masked_fill(top == float("-inf"), 0.0)
                p = s.sub_(safe).exp_()
                before = (mi - safe).exp() * li
                li_new = before + p.sum(-1, keepdim=True)
                oi.mul_(before).add_(p @ vj).div_(li_new.clamp(min=torch.finfo(wide).tiny))
                mi.copy_(top)
                li.copy_(li_new)
        out = o.to(q.dtype).view(q.shape)
        ctx.save_for_backward(q, k, v, out, m.add_(total.log_()).squeeze(-1))
        ctx.tiles = tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        tiles: Tiles = ctx.tiles
        wide = lse.dtype
        queries, output, do = (tiles.grouped(t) for t in (q, out, grad[0]))
        dq = queries.new_zeros(queries.shape, dtype=wide)
        dk, dv = (t.new_zeros(t.shape, dtype=wide) for t in (k, v))
        for keys, rows in tiles.columnwise():
            kj, vj = (t[:, :, None, keys].to(wide) for t in (k, v))
            tiles.count([kj, vj] if rows else [], [kj, vj] if rows else [])
            for i in rows:
                qi, oi, doi = (t[..., i, :].to(wide) for t in (queries, output, do))
                li, dqi = lse[..., i, None], dq[..., i, :]
                tiles.count([qi, oi, doi, dqi, li], [dqi], tiles=1)
                p = tiles.scores(qi, kj, i, keys).sub_(li.masked_fill(li == float("-inf"), 0.0)).exp_()
                dv[:, :, keys] += (p.transpose(-1, -2) @ doi).sum(2)
                ds = (doi @ vj.transpose(-1, -2)).sub_((doi * oi).sum(-1, keepdim=True)).mul_(p).mul_(tiles.scale)
                dqi += ds @ kj
                dk[:, :, keys] += (ds.transpose(-1, -2) @ qi).sum(2)
        return dq.to(q.dtype).view(q.shape), dk.to(k.dtype), dv.to(v.dtype), None
