# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Tensors of which each rank holds a part (torch's DTensor): filled from whole ones, and put together again.

Checkpoints hold whole tensors, so that one that was saved on any mesh is resumed on any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sharded(tensor: Any) -> bool:
    """Whether this rank holds a part of the tensor only, or one copy of several."""
    # By name: the class takes half a second to import, and a single process has none.
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def whole(tensor: Any) -> Tensor:
    """A sharded tensor put together; all ranks that hold a part must ask for it at once. Others are as they are."""
    return tensor.full_tensor() if sharded(tensor) else tensor


@torch.no_grad()
def put(own: Any, values: Tensor) -> None:
    """Values into a tensor; of one that is sharded, this rank's part of them."""
    if sharded(own):
        own.to_local().copy_(_part(own, values))
    else:
        own.copy_(values)


def like(own: Any, values: Tensor) -> Tensor:
    """Whole values as a new tensor that is sharded as another one is; what has another shape stays whole."""
    if values.shape != own.shape:
        return values.to(own.device_mesh.device_type, copy=True)
    from torch.distributed.tensor import DTensor

    local = _part(own, values).clone()
    return DTensor.from_local(local, own.device_mesh, own.placements, shape=own.shape, stride=own.stride())


def _part(own: Any, values: Tensor) -> Tensor:
    """Each rank has all values already, so that none is sent."""
    from torch.distributed.tensor import distribute_tensor

    values = values.to(own.device_mesh.device_type)
    return distribute_tensor(values, own.device_mesh, own.placements, src_data_rank=None).to_local()
