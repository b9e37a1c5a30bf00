# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""ZeRO: data parallelism that holds nothing twice.

Of N ranks with S bytes of weights, as much of gradients and K times as much of optimizer states, each holds

    stage 1    S + S + K S / N           each rank updates the parameters that it owns, and sends them to the others
    stage 2    S + (S + K S) / N         gradients are summed to the rank that owns them, block by block
    stage 3    (S + S + K S) / N         weights are gathered before a block runs, and given up after it

The gradient is that of one process with the whole batch, to float error, at every stage.

Paper: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020,
arXiv 1910.02054. Stages 2 and 3 are torch's `fully_shard` around the blocks and what is left; stage 1 is its
DistributedDataParallel, and an update of each rank's own parameters.

Saves: memory, as above. Costs: at stage 2 as many bytes as plain data parallelism sends, at stages 1 (whose gradients
go to all ranks, and updated weights besides) and 3 half as much again; with `accumulate` stages 2 and 3 send for every
part; while a block runs, its weights and gradients are there in full. Not for: models that fit into one device with
their states. With a mesh of `replica: R, data: N`, weights are sharded over N ranks and replicated R times, and what
is sent most stays within a machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scrimp.errors import UserError
from scrimp.models.seams import blocks
from scrimp.replicas import Owned, summed
from scrimp.sharding import Alike
from scrimp.stopwatch import watch
from scrimp.technique import Card, Technique
from scrimp.world import PARTS

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from scrimp.groups import Group
    from scrimp.run import Run
    from scrimp.technique import Backward, Evaluate
    from scrimp.world import World


@dataclass(frozen=True, kw_only=True)
class Zero(Technique):
    """Data parallelism that holds nothing twice."""

    card = Card(
        paper="arXiv:1910.02054",
        section="Parallelism",
        saves="memory: states, then gradients, then weights are sharded over the ranks",
        costs="stages 1 and 3 send half as much again as plain data parallelism",
        sets=("data parallelism",),
        axes=("replica", "data"),
        shards=True,
        phase={"wrap": "shard", "optimizer": "sharded", "backward": "summed"},
        example={},
        neutral={},
    )
    stage: int = 3
    """1 shards optimizer states, 2 gradients too, 3 weights too."""
    bucket: float = 25.0
    """Stage 1: megabytes of gradients that are sent together."""

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise UserError(f"stage must be 1, 2 or 3, not {self.stage}.", "stage")
        if not self.bucket > 0:
            raise UserError(f"bucket must be positive, not {self.bucket}.", "bucket")

    @property
    def shards(self) -> bool:
        """From stage 2 on, each rank's optimizer sees its part of each parameter only."""
        return self.stage > 1

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Shard every block, then the rest."""
        if not self.shards or run.world.ranks(*PARTS) == 1:
            return model
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = _mesh(run.world)
        scalars = {p for p in model.parameters() if not p.ndim}
        with Alike():
            for part in _apart(model, run.where(self)):
                fully_shard(part, mesh=mesh, reshard_after_forward=self.stage == 3, ignored_params=scalars)
            # What is not in a block is needed first in the backward pass, or by a head that runs after `forward`.
            fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)
        for part in _sharded(model):
            # Losses are divided by the count of all ranks already.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        for method in getattr(type(model), "entries", ()):
            register_fsdp_forward_method(model, method)
        return model

    def init(self, model: nn.Module, run: Run) -> nn.Module:
        """Scalars, which cannot be sharded, stay whole: their gradients are summed over the ranks here."""
        for p in model.parameters():
            if self.shards and p.requires_grad and not p.ndim:
                p.register_hook(run.world.total)
        return model

    def optimizer(self, make: Callable[[list[Group]], Optimizer], run: Run) -> Callable[[list[Group]], Optimizer]:
        """Stage 1: a rule over the parameters that this rank owns."""
        if self.shards or run.world.ranks("data", "context") == 1:
            return make
        return lambda groups: Owned(groups, make, run.world)

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Stage 1 sums gradients as plain data parallelism does; the hooks of `fully_shard` do it otherwise."""
        if run.world.ranks(*PARTS) == 1:
            return backward
        if not self.shards:
            return summed(backward, run, self.bucket)
        if run.world.ranks("context", "tensor") == 1:
            for part in _sharded(run.model)[1:]:
                watch(part, run.stopwatch)
        return backward

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        """Give weights up afterwards: without a backward pass nothing else does."""

        def sharded(job: Callable[[nn.Module], Any]) -> Any:
            found = evaluate(job)
            for part in _sharded(run.model):
                part.reshard()
            return found

        return sharded


def _mesh(world: World) -> DeviceMesh:
    """Ranks that shard, and groups of them that hold the same shards: one axis or two.

    Raises:
        UserError: if each group is a single rank.
    """
    assert world.mesh is not None
    if world.ranks("data", "context") == 1:
        what = "all ranks are replicas, and none is left to shard over."
        raise UserError(what, "mesh.replica", "Lower it, or take `replicate`.")
    joint, name = world.along("data", "context")
    return world.mesh["replica", name] if world.ranks("replica") > 1 else joint


def _apart(model: nn.Module, where: str) -> list[nn.Module]:
    """Blocks whose parameters are theirs alone; those that share some are gathered together, with the rest."""
    found = blocks(model, where).values()
    uses = Counter(p for block in found for p in set(block.parameters()))
    return [block for block in found if all(uses[p] == 1 for p in block.parameters())]


def _sharded(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    return [module for module in model.modules() if hasattr(module, "set_gradient_divide_factor")]
