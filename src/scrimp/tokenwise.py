# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Ranks that share the tokens of each sample: which tokens a rank's model gets, and how attention sees the others.

Every rank is given whole samples, of which its model takes a part just before the embedding; so nothing before the
model, and nothing that asks the model outside of training's loss, knows of it. Samples that cannot be shared evenly are
filled up at their end with tokens that nobody sees and that have no targets.

Legend of shapes: B batch, T tokens of a sample, t tokens of a rank, H heads, D head width, n ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.lanes import Ranks, exchanged
from scrimp.models.dropout import Dropout
from scrimp.models.masks import added, firsts, seen
from scrimp.models.transformer import Transformer
from scrimp.ring import Ringed, Sight, straight, zigzag

IGNORED = -100
"""Target that does not count."""


class Neighbors:
    """The ranks before and behind this one in a ring. See `ring.Line`."""

    def __init__(self, ranks: Ranks) -> None:
        self.group, self.count, self.place = ranks.group, ranks.count, ranks.place

    def turn(self, x: Tensor) -> Callable[[], Tensor]:
        """Send a tensor to the next rank; returns a function that waits for the one of the rank before."""
        x, found = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        there, back = (self.place + 1) % self.count, (self.place - 1) % self.count
        jobs = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, x, group=self.group, group_peer=there),
            dist.P2POp(dist.irecv, found, group=self.group, group_peer=back),
        ])  # fmt: skip

        def arrived() -> Tensor:
            nonlocal x
            for job in jobs:
                job.wait()
            x = found  # Until now it had to live.
            return found

        return arrived


@dataclass(eq=False)
class Shared:
    """The tokens of the samples that a model trains on, shared by ranks.

    Attributes:
        ring: whether keys and values go round; otherwise each rank has all tokens of some heads while it attends.
        dropouts: of the model, whose masks depend on the place of a token.
        wanted: whether the loss that is computed now is shared.
        sight: what this rank and the others have just now; None while each has all. It holds until the model is entered
            again, so that recomputation sees it too.
    """

    ranks: Ranks
    ring: bool
    dropouts: list[Dropout] = field(default_factory=list[Dropout])
    wanted: bool = False
    sight: Sight | None = None
    mask: Tensor | None = None
    """Which tokens of the whole samples see which, where a rank attends with all of them and causality does not say."""

    def around(self, model: Transformer) -> Callable[..., Any]:
        """The model's forward pass of its tokens only."""
        forward = model.forward

        def shared(
            tokens: Tensor, targets: Tensor | None = None, sample: Tensor | None = None, smoothing: float = 0.0,
            cache: list[list[Tensor]] | None = None, attended: Tensor | None = None, segments: Tensor | None = None,
            documents: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            if not self.wanted or targets is None:
                self._leave(model)
                return forward(tokens, targets, sample, smoothing, cache, attended, segments, documents)
            own = self._enter(model, tokens, attended, documents)
            tokens, targets = (filled(x, own, fill) for x, fill in ((tokens, 0), (targets, IGNORED)))
            segments = None if segments is None else filled(segments, own, 0)
            return forward(tokens, targets, sample, smoothing, None, None, segments)

        return shared

    @contextmanager
    def sharing(self) -> Generator[None]:
        """Losses that are computed inside are sums over this rank's tokens, if `sight` says so afterwards."""
        self.wanted, self.sight = True, None
        try:
            yield
        finally:
            self.wanted = False

    def attend(self, core: nn.Module, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
        """As `AttentionCore`, of this rank's tokens."""
        if self.sight is None:
            return core(q, k, v, causal, mask)
        if not self.ring:
            if self.mask is not None and self.mask.dtype == torch.bool and self.mask.shape[2] > 1:
                self.mask = added(self.mask, q)
            q, k, v = (exchanged(x, self._heads, self._tokens) for x in (q, k, v))
            return exchanged(core(q, k, v, causal and self.mask is None, self.mask), self._tokens, self._heads)
        kind = q.device.type
        if torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
            q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
        with torch.autocast(kind, enabled=False):
            return Ringed.apply(q, k, v, Neighbors(self.ranks), self.sight)  # type: ignore[no-any-return]

    def _enter(self, model: Transformer, tokens: Tensor, attended: Tensor | None, documents: Tensor | None) -> Tensor:
        """Find the places of this rank's tokens in a sample, [t], and let the model and its attention know."""
        count, ranks, causal = tokens.shape[1], self.ranks.count, model.config.causal
        lack = -count % (2 * ranks if self.ring else ranks)
        if lack and attended is None and not causal:
            attended = torch.ones_like(tokens, dtype=torch.bool)
        whole = torch.arange(count + lack, device=tokens.device)
        attended = None if attended is None else F.pad(attended, (0, lack), value=False)
        if documents is not None:
            documents = F.pad(documents, (0, lack), value=-1)
        places = whole if documents is None else whole - firsts(documents)
        self.sight = Sight((zigzag if self.ring else straight)(count + lack, ranks), causal, attended, documents)
        own = torch.cat([whole[stretch] for stretch in self.sight.owned[self.ranks.place]])
        model.places = places[..., own].clamp(max=count - 1)
        for dropout in self.dropouts:
            dropout.places = own
        self.mask = None if self.ring else seen(whole[None], causal, attended, documents)
        return own

    def _leave(self, model: Transformer) -> None:
        """Each rank has all tokens."""
        self.sight = self.mask = model.places = None
        for dropout in self.dropouts:
            dropout.places = None

    def _heads(self, x: Tensor) -> Tensor:
        """All heads of this rank's tokens [B, H, t, D] -> its heads of all tokens [B, H / n, T, D]."""
        parts = x.unflatten(1, (self.ranks.count, -1)).movedim(1, 0)  # [n, B, H / n, t, D]
        return self._swapped(parts).movedim(0, 2).flatten(2, 3)

    def _tokens(self, x: Tensor) -> Tensor:
        """This rank's heads of all tokens [B, H / n, T, D] -> all heads of its tokens [B, H, t, D]."""
        parts = x.unflatten(2, (self.ranks.count, -1)).movedim(2, 0)
        return self._swapped(parts).movedim(0, 1).flatten(1, 2)

    def _swapped(self, parts: Tensor) -> Tensor:
        """Part i to rank i, and the parts that the ranks have for this one."""
        parts = parts.contiguous()
        found = torch.empty_like(parts)
        dist.all_to_all_single(found, parts, group=self.ranks.group)
        return found


class SharedCore(nn.Module):
    """As `AttentionCore`, of tokens that ranks share."""

    def __init__(self, inner: nn.Module, shared: Shared) -> None:
        super().__init__()
        self.inner, self.shared = inner, shared

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
        attend: Any = self.shared.attend
        if torch.compiler.is_compiling():  # which cannot see what is sent
            attend = torch.compiler.disable(attend)
        return attend(self.inner, q, k, v, causal, mask)


def filled(x: Tensor, own: Tensor, value: int) -> Tensor:
    """Some places [t] of x [B, T], and a value behind its end: [B, t]."""
    return torch.where(own < x.shape[1], x[:, own.clamp(max=x.shape[1] - 1)], value)
