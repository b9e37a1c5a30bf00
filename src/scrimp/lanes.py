# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What the ranks that share a layer send each other, forward and backward.

    into a layer      forward: nothing, or tokens are gathered       backward: gradients are summed, or tokens scattered
    out of a layer    forward: parts are summed, or tokens scattered      backward: nothing, or tokens are gathered

The second of each is sequence parallelism: between layers each rank holds its tokens only. A reduce-scatter and a
gather send what an all-reduce does.

Legend of shapes: B batch, T tokens, C width, n ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scrimp.models.dropout import Dropout
from scrimp.world import World

TOKENS = 1
"""Dimension of the tokens in [B, T, C]."""


class Exchange(torch.autograd.Function):
    """One exchange forward and another one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        """What `there` makes of x."""
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """What `back` makes of the gradient."""
        return ctx.back(grads[0]), None, None


@dataclass(eq=False)
class Ranks:
    """The ranks that share layers, tokens, or a batch."""

    group: Any
    count: int
    place: int

    @classmethod
    def of(cls, world: World, axis: str = "tensor") -> Ranks:
        """Those along an axis of the mesh."""
        return cls(world.group(axis), world.ranks(axis), world.place(axis))

    def same(self, x: Tensor) -> Tensor:
        """Nothing is sent."""
        return x.view_as(x)

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks."""
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """Over the ranks."""
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def gather(self, x: Tensor, dim: int = TOKENS) -> Tensor:
        """All ranks' parts side by side."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def own(self, x: Tensor, dim: int = TOKENS) -> Tensor:
        """This rank's part of what all ranks have."""
        return x.chunk(self.count, dim)[self.place].contiguous()

    def scatter(self, x: Tensor, dim: int = TOKENS) -> Tensor:
        """This rank's part of the sum over ranks."""
        parts = [part.contiguous() for part in x.chunk(self.count, dim)]
        found = torch.empty_like(parts[0])
        dist.reduce_scatter(found, parts, group=self.group)
        return found

    def spread(self, x: Tensor) -> Tensor:
        """A copy on each rank, whose gradients are summed."""
        return exchanged(x, self.same, self.sum)

    def summed(self, x: Tensor) -> Tensor:
        """The sum of the ranks' parts, each of which gets its gradient."""
        return exchanged(x, self.sum, self.same)

    def rows(self, x: Tensor) -> Tensor:
        """The rows of all ranks, of which each rank then makes something of its own."""
        return exchanged(x, lambda part: self.gather(part, 0), lambda grad: self.scatter(grad, 0))

    def beside(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' parts side by side, of which all ranks then make the same."""
        return exchanged(x, lambda part: self.gather(part, dim), lambda grad: self.own(grad, dim))


@dataclass(eq=False)
class Lane:
    """A stack of blocks whose layers ranks share.

    Attributes:
        sequence: whether tokens between layers are shared as well, in training, where ranks can share them evenly.
        split: whether they are just now. It holds until the stack is entered again, so that recomputation sees it too.
        dropouts: of the stack, whose masks depend on the place of a token.
    """

    ranks: Ranks
    sequence: bool
    split: bool = False
    dropouts: list[Dropout] = field(default_factory=list[Dropout])

    def enter(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the first block: x [B, T, C] -> [B, T / n, C]."""
        x: Tensor = args[0]
        tokens = x.shape[TOKENS]
        self.split = self.sequence and block.training and tokens % self.ranks.count == 0
        for dropout in self.dropouts:
            dropout.before = tokens // self.ranks.count * self.ranks.place if self.split else 0
        if not self.split:
            return args
        return exchanged(x, self.ranks.own, self.ranks.gather), *args[1:]

    def leave(self, block: nn.Module, args: Any, x: Tensor) -> Tensor:
        """After the last block: x [B, T / n, C] -> [B, T, C]."""
        return exchanged(x, self.ranks.gather, self.ranks.own) if self.split else x

    def into(self, x: Tensor) -> Tensor:
        """Tokens [B, T / n, C] or [B, T, C] into a shared layer, which sees all: [B, T, C]."""
        return exchanged(x, self.ranks.gather, self.ranks.scatter) if self.split else self.ranks.spread(x)

    def out(self, x: Tensor) -> Tensor:
        """What each rank's part of a layer adds for all tokens, [B, T, C], to the sums: [B, T / n, C] or [B, T, C]."""
        return exchanged(x, self.ranks.scatter, self.ranks.gather) if self.split else self.ranks.summed(x)


def exchanged(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    """An exchange with its own way back."""
    return Exchange.apply(x, there, back)  # type: ignore[no-any-return]
