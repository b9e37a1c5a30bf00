# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Tensors of which each rank holds a part: filled from whole ones, and put together again.

There are two kinds. A torch DTensor knows its ranks itself. A plain tensor with a `Cut` is the part of one rank along
the mesh's axis `tensor`, where a rank's part need not be one stretch of rows. A DTensor may have a cut as well: its
ranks then share one such part.

Checkpoints hold whole tensors, so that one that was saved on any mesh is resumed on any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """How the ranks of a group share a tensor.

    Attributes:
        dim: along which it is cut.
        sections: lengths along it of what is cut by itself, such as queries, keys and values; each into equal parts.
        ranks: of the group. place: of this rank among them.
    """

    dim: int
    sections: tuple[int, ...]
    ranks: int
    place: int
    group: Any

    def shape(self, part: torch.Size) -> torch.Size:
        """Of the whole."""
        return torch.Size([n * self.ranks if i == self.dim else n for i, n in enumerate(part)])

    def part(self, values: Tensor) -> Tensor:
        """This rank's part of the whole."""
        pieces = values.split(self.sections, self.dim)
        return torch.cat([piece.chunk(self.ranks, self.dim)[self.place] for piece in pieces], self.dim)

    def whole(self, part: Tensor) -> Tensor:
        """The whole; all ranks of the group must ask for it at once."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, part.contiguous(), group=self.group)
        lengths = [n // self.ranks for n in self.sections]
        pieces = zip(*(p.split(lengths, self.dim) for p in parts), strict=True)
        return torch.cat([piece for section in pieces for piece in section], self.dim)


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


def distributed(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    # By name: the class takes half a second to import, and a single process has none.
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def sharded(tensor: Any) -> bool:
    """Whether this rank holds a part of the tensor only, or one copy of several."""
    return cut_of(tensor) is not None or distributed(tensor)


@torch.no_grad()
def whole(tensor: Any) -> Tensor:
    """A sharded tensor put together, without a gradient; all ranks that hold a part must ask for it at once.

    Others are as they are.
    """
    cut = cut_of(tensor)
    tensor = tensor.detach()
    if distributed(tensor):
        tensor = tensor.full_tensor()
    return tensor if cut is None else cut.whole(tensor)


@torch.no_grad()
def put(own: Any, values: Tensor) -> None:
    """Whole values into a tensor; of one that is sharded, this rank's part of them."""
    own.to_local().copy_(_part(own, values)) if distributed(own) else own.copy_(_part(own, values))


def like(own: Any, values: Tensor) -> Tensor:
    """Whole values as a new tensor that is sharded as another one is; what has another shape stays whole."""
    if values.shape != shape(own):
        return values.to(own.device, copy=True)
    local = _part(own, values)
    if not distributed(own):
        return local.to(own.device, copy=True)
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local.clone(), own.device_mesh, own.placements, shape=own.shape, stride=own.stride())


def _part(own: Any, values: Tensor) -> Tensor:
    """Each rank has all values already, so that none is sent."""
    if (cut := cut_of(own)) is not None:
        values = cut.part(values)
    if not distributed(own):
        return values
    from torch.distributed.tensor import distribute_tensor

    values = values.to(own.device_mesh.device_type)
    return distribute_tensor(values, own.device_mesh, own.placements, src_data_rank=None).to_local()
