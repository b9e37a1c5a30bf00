# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The ranks that train together, where each stands in the mesh, and what they must agree on.

A rank is a process with a device of its own. The mesh gives every rank a place on each axis; its axes, from the one
whose ranks talk least to the one whose ranks talk most:

    pipeline    ranks hold consecutive blocks
    replica     ranks hold the same, and see different samples of a batch
    data        likewise; `zero` shards weights and states over this axis
    context     ranks hold the same, and see different tokens of the same samples
    tensor      ranks hold parts of each layer, and see the same tokens

Torch's process groups do all the sending. Outside of `torchrun` and `scrimp launch` there is one rank, and nothing
here sends anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from scrimp.recipe import Mesh, Recipe

AXES: Final = ("pipeline", "replica", "data", "context", "tensor")
SAMPLES: Final = ("replica", "data")
"""Axes whose ranks see different samples of a batch."""
PARTS: Final = (*SAMPLES, "context")
"""Axes whose ranks see different parts of a batch: what they compute of it, and its gradients, must be summed."""
JOINED: Final = (SAMPLES, PARTS, ("data", "context"))
"""Axes that are asked for as one."""
WAIT: Final = timedelta(minutes=10)
"""How long a rank waits for the others before it gives up."""
PATIENCE: Final = timedelta(days=7)
"""How long the others wait for what only the first builds, such as tokens of a corpus."""
LOST: Final = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""What gloo says where another rank has ended."""


@dataclass(frozen=True)
class World:
    """All ranks of a run, as this one sees them."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """Of the axes along which there is more than one rank; None for a single rank."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what only one needs to write."""
        return self.rank == 0

    def ranks(self, *axes: str) -> int:
        """How many ranks there are along some axes."""
        found = 1
        for axis in self._spread(*axes):
            found *= self.mesh[axis].size() if self.mesh is not None else 1
        return found

    def place(self, *axes: str) -> int:
        """This rank's place among those of some axes, the last axis varying fastest."""
        found = 0
        for axis in self._spread(*axes):
            found = found * self.ranks(axis) + (self.mesh.get_local_rank(axis) if self.mesh is not None else 0)
        return found

    def _spread(self, *axes: str) -> list[str]:
        """Those of some axes that have more than one rank."""
        names = self.mesh.mesh_dim_names if self.mesh is not None else None
        return [axis for axis in axes if axis in (names or ())]

    def group(self, *axes: str) -> Any:
        """The process group of the ranks that share this one's place on all other axes."""
        return self.along(*axes)[0].get_group()

    def along(self, *axes: str) -> tuple[DeviceMesh, str]:
        """Some axes, of which at least one has several ranks, as one: a mesh of one axis, and the name of that."""
        assert self.mesh is not None
        names = self._spread(*axes)
        if len(names) == 1:
            return self.mesh[names[0]], names[0]
        joint = "_".join(names)
        return self.mesh[tuple(names)]._flatten(joint), joint  # pyright: ignore[reportPrivateUsage]

    def total(self, value: Tensor, *axes: str) -> Tensor:
        """The sum of each number over the ranks of some axes (those that see other parts of a batch)."""
        return self._reduced(value, torch.distributed.ReduceOp.SUM, axes or PARTS)

    def largest(self, value: Tensor, *axes: str) -> Tensor:
        """The largest of each number over the ranks of some axes (those that see other parts of a batch)."""
        return self._reduced(value, torch.distributed.ReduceOp.MAX, axes or PARTS)

    def _reduced(self, value: Tensor, how: Any, axes: Sequence[str]) -> Tensor:
        if self.ranks(*axes) == 1:
            return value
        value = value.clone()
        torch.distributed.all_reduce(value, how, group=self.group(*axes))
        return value

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; tensors without values say so for this one only."""
        if self.mesh is None:
            return flag
        told = torch.tensor(float(flag), device=self._device())
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return flag if isinstance(told, FakeTensor) else bool(told)

    def numbers(self, own: float) -> list[float]:
        """A number of each rank, in order of ranks."""
        if self.mesh is None:
            return [own]
        told = torch.zeros(self.size, dtype=torch.float64, device=self._device())
        told[self.rank] = own
        torch.distributed.all_reduce(told)
        return told.tolist()

    def _device(self) -> str:
        """Where numbers that are on the host are sent from: there, if a group can, so that none waits for a device."""
        assert self.mesh is not None
        return "cpu" if "cpu:" in torch.distributed.get_backend_config() else self.mesh.device_type

    def gathered(self, thing: Any) -> list[Any]:
        """What each rank has, in order of ranks: for what is rare, as each rank takes apart what all have."""
        if self.mesh is None:
            return [thing]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, thing)
        return found

    def told(self, thing: Any) -> Any:
        """What the first rank has."""
        if self.mesh is None:
            return thing
        box = [thing]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.mesh is not None:
            torch.distributed.barrier()

    def after_first(self, job: Callable[[], Any]) -> Any:
        """What a job returns, which the first rank does alone before the others do it, however long it takes."""
        if self.mesh is None:
            return job()
        # The ordinary group gives up after `WAIT`, and what is built once may take hours.
        group: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        if not self.first:
            torch.distributed.barrier(group)
        found = job()
        if self.first:
            torch.distributed.barrier(group)
        torch.distributed.destroy_process_group(group)
        return found


ALONE: Final = World()


@contextmanager
def joined() -> Generator[None]:
    """The process group of the ranks that `torchrun` or `scrimp launch` started; nothing for a single process.

    A group that somebody's own program has opened is used, and left open.
    """
    import torch.distributed as dist

    if "RANK" not in os.environ or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def ranks() -> int:
    """How many ranks the open process group has; 1 where there is none."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def arranged(mesh: Mesh, device: str) -> World:
    """The ranks of the open process group in the mesh of a recipe.

    Raises:
        UserError: if the mesh has another number of ranks.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    size = ranks()
    shape = sizes(mesh, size)
    if size == 1:
        return ALONE
    axes = {axis: count for axis, count in shape.items() if count > 1}
    world = World(dist.get_rank(), size, init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes)))
    for together in JOINED:
        # Now, as joining looks at numbers of ranks: a dry run's tensors have none.
        if world.ranks(*together) > 1:
            world.along(*together)
    return world


def sizes(mesh: Mesh, ranks: int) -> dict[str, int]:
    """axis -> its number of ranks, where `data` takes those that no other axis takes.

    Raises:
        UserError: if they do not make up so many ranks.
    """
    shape = {axis: getattr(mesh, axis) for axis in AXES}
    fixed = 1
    for axis, count in shape.items():
        fixed *= count if axis != "data" or count else 1
    if not shape["data"]:
        shape["data"] = max(1, ranks // fixed)
        fixed *= shape["data"]
    if fixed != ranks:
        told = ", ".join(f"{axis}: {count}" for axis, count in shape.items() if count > 1) or "a single rank"
        what = f"the mesh ({told}) has {fixed} {'rank' if fixed == 1 else 'ranks'}, and {ranks} run."
        start = f"Start {fixed} with `scrimp launch --ranks {fixed}`"
        raise UserError(what, "mesh", f"{start}, or change `mesh` (of a run that is resumed: `--mesh data={ranks}`).")
    return shape


def spread(recipe: Recipe, ranks: int) -> Recipe:
    """A recipe for several ranks: where it does not say how they share samples, each holds the whole model.

    Raises:
        UserError: if the mesh has another number of ranks.
    """
    shape = sizes(recipe.mesh, ranks)
    served = {axis for t in recipe.techniques for axis in t.card.axes}
    if all(shape[axis] == 1 or axis in served for axis in SAMPLES):
        return recipe
    from scrimp.registry import technique_class

    return replace(recipe, techniques=(*recipe.techniques, technique_class("replicate")()))


def lost(error: BaseException) -> bool:
    """Whether an error says that another rank has ended or does not answer."""
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in LOST)
