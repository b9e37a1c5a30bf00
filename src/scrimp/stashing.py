# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A pipeline that does not drain between batches: PipeDream-2BW's two versions of the weights.

    W(t+1) = W(t) - lr grad f_(t-1)(W(t-1))

While the last micro-batches of batch t - 1 come back, those of batch t go out. Each batch is computed, forward and
backward, with the weights that were there when it began, of which a copy is kept. Its gradient is whole one step later.

What waits at a checkpoint are activations, which are not saved: the copy of the weights is, and a resumed run computes
the batch once more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from scrimp.pipelined import Stage, micro_batches, told
from scrimp.plain import counted
from scrimp.splitting import split
from scrimp.stagewise import Stages, sum_shared

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch

WAITS: Final = "waits"
"""In memory, beside the weights by their names: whether a gradient waits for the next step."""


@dataclass
class Version:
    """The weights with which one batch is computed, by name."""

    weights: dict[str, nn.Parameter]

    @contextmanager
    def inside(self, model: nn.Module) -> Generator[None]:
        """The model has these weights; backward passes that recompute activations need them too."""
        names = {id(p): name for name, p in model.named_parameters()}
        places = [(module, name, p) for module in model.modules()
                  for name, p in module.named_parameters(recurse=False)]  # fmt: skip
        for module, name, p in places:
            module.register_parameter(name, self.weights[names[id(p)]])
        try:
            yield
        finally:
            for module, name, p in places:
                module.register_parameter(name, p)


@dataclass
class Sent:
    """A micro-batch that is under way: it went forward here, and its gradient has not come back."""

    version: Version
    came: Tensor | None
    left: Tensor


class Stashed:
    """The backward pass of the batch before; the forward pass of the one that is given.

    Args:
        shared: parameters that several ranks hold, and which.
        memory: the technique's, checkpointed.
    """

    def __init__(
        self, run: Run, stages: Stages, shared: dict[str, list[int]], memory: dict[str, Tensor], wanted: int, where: str
    ) -> None:
        self.run, self.stages, self.shared, self.memory = run, stages, shared, memory
        self.wanted, self.where = wanted, where
        self.here, self.ranks = run.world.place("pipeline"), run.world.ranks("pipeline")
        self.stage = Stage(run, stages.parts[self.here])
        self.under_way: deque[Sent] = deque()
        self.group: Any = run.world.group("pipeline")
        # Gradients go by a group of their own: they are under way while other things are sent, and NCCL, which runs
        # what two ranks of a group send each other in the order of their calls, would let either wait for the other.
        # It is left open: the next one would get its name, under which torch's store has what it was made of.
        members = torch.distributed.get_process_group_ranks(self.group)
        self.back: Any = torch.distributed.new_group(members, use_local_synchronization=True)
        self.requests: list[tuple[Any, Tensor]] = []
        self.earlier: list[tuple[Any, Tensor]] = []
        self.last: Version | None = None
        self.begun = False
        memory.update({name: p.detach().clone() for name, p in run.model.named_parameters()})
        memory[WAITS] = torch.zeros((), dtype=torch.int64, device=run.device)
        run.closing.append(self.drain)

    def __call__(self, batch: Batch, count: Tensor) -> Tensor:
        """This batch's loss, on every rank; leaves the gradients of the batch before, none at the first step."""
        if not self.begun and self.run.read(self.memory[WAITS], worst=0.0):
            self._again()
        self.begun = True
        version = self._version(dict(self.run.model.named_parameters()))
        losses = self._through(batch, count, version)
        if self.last is not None:
            for name, p in self.run.model.named_parameters():
                p.grad = self.last.weights[name].grad
            sum_shared(self.run.model, self.shared, self.run.world)
        self.last = version
        self.memory.update({name: p.data for name, p in version.weights.items()})
        self.memory[WAITS] = torch.ones_like(self.memory[WAITS])
        return told(losses, self.run, self.stages.ranks[-1])

    def drain(self) -> None:
        """Let everything come back that is under way, so that no rank leaves another waiting when a stage ends."""
        while self.under_way:
            self._backward(self.under_way.popleft())
        for request, _ in self.earlier + self.requests:
            request.wait()
        self.earlier, self.requests = [], []

    def _version(self, weights: Mapping[str, Tensor]) -> Version:
        needed = {name: p.requires_grad for name, p in self.run.model.named_parameters()}
        return Version({name: nn.Parameter(weights[name].detach().clone(), grad) for name, grad in needed.items()})

    def _again(self) -> None:
        """The batch before, whose gradient waited when the run was saved."""
        batch = self.run.batch(self.run.clock.step - 1)
        self.last = self._version(self.memory)
        self._through(batch, counted(self.run, batch)[0], self.last)

    def _through(self, batch: Batch, count: Tensor, version: Version) -> list[Tensor]:
        """Every micro-batch goes forward, and as many come back as leave this rank's share under way."""
        size = len(batch["tokens"])
        parts = micro_batches(self.wanted, size, self.ranks, self.run.world, "2bw", self.where)
        losses: list[Tensor] = []
        for piece in split(batch, parts):
            self._forward(piece, count, version, losses)
            if len(self.under_way) == self.ranks - self.here:
                self._backward(self.under_way.popleft())
        # Those of this batch that nobody has asked for yet are waited for when the next is through.
        for request, _ in self.earlier:
            request.wait()
        self.earlier, self.requests = self.requests, []
        return losses

    def _forward(self, batch: Batch, count: Tensor, version: Version, losses: list[Tensor]) -> None:
        part, came = self.stage.part, None
        if not part.first:
            came = self._states(batch)
            torch.distributed.recv(came, group=self.group, group_src=self.here - 1)
            came.requires_grad_()
        with version.inside(self.run.model):
            left = self.stage(batch["tokens"] if came is None else came, **batch)
        if part.last:
            left = left / count
            losses.append(left.detach())
        else:
            self._send(left.detach().contiguous(), self.here + 1, self.group)
        self.under_way.append(Sent(version, came, left))

    def _backward(self, sent: Sent) -> None:
        grad = None
        if not self.stage.part.last:
            grad = torch.empty_like(sent.left)
            torch.distributed.recv(grad, group=self.back, group_src=self.here + 1)
        with sent.version.inside(self.run.model):
            sent.left.backward(grad)
        if sent.came is not None:
            assert sent.came.grad is not None
            self._send(sent.came.grad, self.here - 1, self.back)

    def _send(self, tensor: Tensor, to: int, group: Any) -> None:
        # Kept until it has gone.
        self.requests.append((torch.distributed.isend(tensor, group=group, group_dst=to), tensor))

    def _states(self, batch: Batch) -> Tensor:
        model: Any = self.run.model
        size, length = batch["tokens"].shape
        return torch.empty(size, model.prepended + length, model.config.width, device=self.run.device,
                           dtype=getattr(torch, self.run.recipe.dtype))  # fmt: skip
