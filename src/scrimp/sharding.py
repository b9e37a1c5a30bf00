# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Tensors of which each rank holds a part: filled from whole ones, and put together again.

There are two kinds. A torch DTensor knows its ranks itself. A plain tensor with a `Cut` is the part of one rank along
the mesh's axis `tensor`, where a rank's part need not be one stretch of rows. A DTensor may have a cut as well: its
ranks then share one such part.

Checkpoints hold whole tensors, so that one that was saved on any mesh is resumed on any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Cut:
    """How the ranks of a group share a tensor.

    Attributes:
        dim: along which it is cut.
        sections: lengths along it of what is cut by itself, such as queries, keys and values; each into parts of
            one length, the last with zeros at its end where they do not come out even.
        ranks: of the group. place: of this rank among them.
    """

    dim: int
    sections: tuple[int, ...]
    ranks: int
    place: int
    group: Any

    def shape(self, part: torch.Size) -> torch.Size:
        """Of the whole."""
        return torch.Size([sum(self.sections) if i == self.dim else n for i, n in enumerate(part)])

    def part(self, values: Tensor) -> Tensor:
        """This rank's part of the whole."""
        pieces = [self._filled(piece).chunk(self.ranks, self.dim) for piece in values.split(self.sections, self.dim)]
        return torch.cat([parts[self.place] for parts in pieces], self.dim)

    def whole(self, part: Tensor) -> Tensor:
        """The whole; all ranks of the group must ask for it at once."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, part.contiguous(), group=self.group)
        lengths = [-(-n // self.ranks) for n in self.sections]
        pieces = zip(*(p.split(lengths, self.dim) for p in parts), strict=True)
        wholes = [torch.cat(found, self.dim) for found in pieces]
        return torch.cat([t.narrow(self.dim, 0, n) for t, n in zip(wholes, self.sections, strict=True)], self.dim)

    def total(self, norm: Tensor, kind: float = 2.0) -> Tensor:
        """Norms of this rank's parts -> of the whole."""
        if kind != math.inf:
            return self.sum(norm.square()).sqrt()
        norm = norm.clone()
        torch.distributed.all_reduce(norm, torch.distributed.ReduceOp.MAX, group=self.group)
        return norm

    def sum(self, value: Tensor) -> Tensor:
        """Sums over this rank's parts -> over the whole."""
        value = value.clone()
        torch.distributed.all_reduce(value, group=self.group)
        return value

    def _filled(self, values: Tensor) -> Tensor:
        """Zeros behind the last ones, so that all ranks have as many."""
        lack = -values.shape[self.dim] % self.ranks
        return F.pad(values, (0, 0) * (values.ndim - 1 - self.dim) + (0, lack)) if lack else values


def mark(model: nn.Module) -> None:
    """Let parameters know their cuts, which modules have noted by name in `cuts`: what wraps a model replaces them."""
    for module in model.modules():
        cuts: Mapping[str, Cut] = getattr(module, "cuts", {})
        for name, cut in cuts.items():
            vars(module.get_parameter(name))["cut"] = cut


def follow(tensor: Tensor, parameter: Tensor | None) -> Tensor:
    """A moment or a copy of a parameter, cut as that is."""
    if parameter is not None and (cut := cut_of(parameter)) is not None and tensor.shape == parameter.shape:
        vars(tensor)["cut"] = cut
    return tensor


def cut_of(tensor: Any) -> Cut | None:
    """How a tensor is cut, if it is."""
    return getattr(tensor, "cut", None)


def shape(tensor: Tensor) -> torch.Size:
    """Of the whole."""
    cut = cut_of(tensor)
    return tensor.shape if cut is None else cut.shape(tensor.shape)


def sharded(tensor: Any) -> bool:
    """Whether it is a DTensor: this rank holds a part of the tensor only, or one copy of several."""
    # By name: the class takes half a second to import, and a single process has none.
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


@torch.no_grad()
def whole(tensor: Any) -> Tensor:
    """A sharded tensor put together, without a gradient; all ranks that hold a part must ask for it at once.

    Others are as they are.
    """
    cut = cut_of(tensor)
    tensor = tensor.detach()
    if sharded(tensor):
        tensor = tensor.full_tensor()
    return tensor if cut is None else cut.whole(tensor)


@torch.no_grad()
def put(own: Any, values: Tensor) -> None:
    """Whole values into a tensor; of one that is sharded, this rank's part of them."""
    (own.to_local() if sharded(own) else own).copy_(_part(own, values))


def like(own: Any, values: Tensor) -> Tensor:
    """Whole values as a new tensor that is sharded as another one is; what has another shape stays whole."""
    if values.shape != shape(own):
        return values.to(own.device, copy=True)
    local = _part(own, values)
    if not sharded(own):
        return follow(local.to(own.device, copy=True), own)
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local.clone(), own.device_mesh, own.placements, shape=own.shape, stride=own.stride())


def gradient_norm(parameters: Sequence[Tensor], kind: float = 2.0) -> Any:
    """The norm over the gradients of all parameters together; of those that are cut, over all of their parts."""
    from torch.nn.utils import get_total_norm

    held = [p for p in parameters if p.grad is not None]
    first = next((cut for p in held if (cut := cut_of(p)) is not None), None)
    alone: Any = get_total_norm([p.grad for p in held if p.grad is not None and cut_of(p) is None], kind)
    if first is None:
        return alone
    part = get_total_norm([p.grad for p in held if p.grad is not None and cut_of(p) is not None], kind)
    rest, parts = whole(alone), first.total(whole(part), kind)
    total = torch.maximum(rest, parts) if kind == math.inf else (rest.square() + parts.square()).sqrt()
    grad: Any = held[0].grad
    if not sharded(grad):
        return total
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(total, grad.device_mesh, [Replicate()] * grad.device_mesh.ndim)


def totals(norms: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Norms [n] of what belongs to n parameters, each of this rank's part -> of the whole."""
    cuts = [cut_of(p) for p in parameters]
    first = next((cut for cut in cuts if cut is not None), None)
    if first is None:
        return norms
    return torch.where(torch.tensor([cut is not None for cut in cuts], device=norms.device), first.total(norms), norms)


def _part(own: Any, values: Tensor) -> Tensor:
    """Each rank has all values already, so that none is sent."""
    if (cut := cut_of(own)) is not None:
        values = cut.part(values)
    if not sharded(own):
        return values
    # Only its own: torch's `distribute_tensor` makes the parts of all ranks first.
    for axis, placement in enumerate(own.placements):
        if placement.is_shard():
            dim, ranks, place = placement.dim, own.device_mesh.size(axis), own.device_mesh.get_local_rank(axis)
            length, size = values.shape[dim], -(-values.shape[dim] // ranks)
            start = min(place * size, length)
            values = values.narrow(dim, start, min(size, length - start))
    return values.to(own.device_mesh.device_type)


class Alike(TorchFunctionMode):
    """Inside, chunks of a tensor on meta are one object for each shape: without values, all ranks' pieces are alike.

    `fully_shard` cuts each parameter for all ranks to keep one piece, which takes seconds for hundreds of ranks.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.chunk or args[0].device.type != "meta":
            return func(*args, **kwargs)
        return _alike(*args, **kwargs)


def _alike(tensor: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    """As `torch.chunk`, which makes fewer where they do not come out even: here the missing ones are empty."""
    length = tensor.shape[dim]
    size = -(-length // chunks)
    found = [tensor.narrow(dim, 0, size)] * (length // size)
    found += [tensor.narrow(dim, 0, length % size)] if length % size else []
    return found + [tensor.new_empty(0)] * (chunks - len(found))
