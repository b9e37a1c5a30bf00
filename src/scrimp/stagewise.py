# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A model cut into stages of consecutive blocks, of which each rank holds some.

Names stay: a rank's block 3 is `blocks.3`, whichever blocks it holds. A parameter that modules of several ranks share,
as a tied embedding, is held by all of them under its one name, and its gradients are summed between them.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.parts import ENTRY, Part
from scrimp.models.transformer import Transformer
from scrimp.weights import persistent

if TYPE_CHECKING:
    from scrimp.world import World


@dataclass(frozen=True)
class Stages:
    """Which part of the model each stage runs, and on which rank."""

    parts: tuple[Part, ...]
    ranks: tuple[int, ...]
    """Of each stage: its rank's place along the axis `pipeline`."""

    def of(self, rank: int) -> list[int]:
        """The stages of a rank, in order."""
        return [stage for stage, owner in enumerate(self.ranks) if owner == rank]


def placed(stages: int, ranks: int, folded: bool) -> tuple[int, ...]:
    """The rank of each stage: around and around, or there and back (`folded`), as a V."""
    return tuple((2 * ranks - 1 - s if s >= ranks else s) if folded else s % ranks for s in range(stages))


def parts_of(model: Transformer, counts: Sequence[int]) -> tuple[Part, ...]:
    """The parts of a model, by how many blocks each has."""
    ends = [0, *accumulate(counts)]
    last = len(counts) - 1
    return tuple(Part(range(a, b), i == 0, i == last) for i, (a, b) in enumerate(pairwise(ends)))


def work(model: Transformer) -> tuple[list[float], float, float]:
    """Multiplications a token: of each block, of what stands before the blocks, of what stands behind them.

    A matrix multiplies each of its weights once a token; a table of embeddings, whose rows are looked up, none.
    Attention's two products grow with the context.
    """
    attention = 2.0 * model.config.context * model.config.heads * model.config.head_dim
    blocks = [_weights(block) + attention for block in model.blocks]
    tables = {id(m) for name in ("embed", "positions", "segments", "prompts") for m in [getattr(model, name)]}
    sides = {True: 0.0, False: 0.0}
    for name, module in model.named_children():
        if name != "blocks" and id(module) not in tables:
            sides[name in ENTRY] += _weights(module)
    return blocks, sides[True], sides[False]


def _weights(module: nn.Module) -> float:
    return float(sum(p.numel() for p in module.parameters() if p.ndim > 1))


def balanced(blocks: Sequence[float], before: float, behind: float, stages: int) -> list[int]:
    """How many blocks each stage gets, at least one, so that the heaviest stage is as light as it can be.

    Args:
        blocks: the work of each block; `before` is the first stage's besides, `behind` the last one's.
    """
    sums = [0.0, *accumulate(blocks)]
    count = len(blocks)
    # best[n]: (the heaviest of the stages so far, where each ends), for the first n blocks.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(stages):
        more = (before if stage == 0 else 0.0) + (behind if stage == stages - 1 else 0.0)
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end in range(stage + 1, count - (stages - 1 - stage) + 1):
            options = [(max(heaviest, sums[end] - sums[start] + more), (*ends, end))
                       for start, (heaviest, ends) in best.items() if start < end]  # fmt: skip
            found[end] = min(options)
        best = found
    return [b - a for a, b in pairwise(best[count][1])]


def empty(model: Transformer, parts: Sequence[Part]) -> frozenset[str]:
    """Take out of a model what none of a rank's parts runs.

    Returns:
        The names of the parameters and buffers that other ranks hold and this one does not.
    """
    before = _names(model)
    mine = {block for part in parts for block in part.blocks}
    kept: dict[str, bool] = {}
    for name, _ in model.named_children():
        kept[name] = any(part.first if name in ENTRY else part.last for part in parts)
    whole = [m for name, m in model.named_children() if name != "blocks" and kept[name]]
    whole += [block for i, block in enumerate(model.blocks) if i in mine]
    alive = {id(m) for module in whole for m in module.modules()}
    shared = {id(p) for module in whole for p in module.parameters()}
    for name in [str(i) for i in range(len(model.blocks)) if i not in mine]:
        _replace(model.blocks, name, alive, shared)
    for name, module in list(model.named_children()):
        if name != "blocks" and not kept[name] and (next(module.parameters(), None) is not None or _holds(module)):
            _replace(model, name, alive, shared)
    return before - _names(model)


def _names(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in model.named_parameters()) | frozenset(persistent(model))


def _holds(module: nn.Module) -> bool:
    return next(module.buffers(), None) is not None


def _replace(parent: nn.Module, name: str, alive: Collection[int], shared: Collection[int]) -> None:
    """Take a module away, but for parameters that modules of this rank share with it."""
    left = _left(parent.get_submodule(name), alive, shared)
    # Set, not added anew: the order of modules decides under which of its names a shared parameter goes.
    setattr(parent, name, left)
    if left is None and isinstance(parent, nn.ModuleList):
        delattr(parent, name)


def _left(module: nn.Module, alive: Collection[int], shared: Collection[int]) -> nn.Module | None:
    """What is left of a module that other ranks run; None where nothing is."""
    if id(module) in alive:
        return module
    for name, child in list(module.named_children()):
        setattr(module, name, _left(child, alive, shared))
    for name, p in list(module.named_parameters(recurse=False)):
        if id(p) not in shared:
            module.register_parameter(name, None)
    for name, _ in list(module.named_buffers(recurse=False)):
        delattr(module, name)
    return module if next(module.parameters(), None) is not None else None


@contextmanager
def cut(model: Transformer, part: Part, given: Tensor | None) -> Generator[None]:
    """The model runs one part, on what the part before left."""
    model.part = replace(part, given=given)
    try:
        yield
    finally:
        model.part = None


class Relay(nn.Module):
    """The whole model to whoever calls it: each rank runs its stages and hands the states on, without gradients.

    Every rank must call it at once with the same arguments, and gets what the last stage returns.
    """

    def __init__(self, model: Transformer, stages: Stages, world: World) -> None:
        super().__init__()
        self.model, self.stages, self.world = model, stages, world
        self.config, self.training = model.config, model.training

    @property
    def room(self) -> int:
        """As the model's."""
        return self.model.room

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model's."""
        here, owners = self.world.place("pipeline"), self.stages.ranks
        x: Tensor | None = None
        for stage, part in enumerate(self.stages.parts):
            if owners[stage] == here:
                if stage and owners[stage - 1] != here:
                    x = self._received(owners[stage - 1])
                with cut(self.model, part, x):
                    x = self.model(*args, **kwargs)
                if not part.last and owners[stage + 1] != here and x is not None:
                    self._sent(x, owners[stage + 1])
        return self._told(x, owners[-1])

    def _sent(self, x: Tensor, to: int) -> None:
        group = self.world.group("pipeline")
        torch.distributed.send_object_list([(x.shape, x.dtype)], group=group, group_dst=to)
        torch.distributed.send(x.contiguous(), group=group, group_dst=to)

    def _received(self, source: int) -> Tensor:
        group, box = self.world.group("pipeline"), [None]
        torch.distributed.recv_object_list(box, group=group, group_src=source)
        x = self._empty(box[0])
        torch.distributed.recv(x, group=group, group_src=source)
        return x

    def _told(self, x: Tensor | None, source: int) -> Tensor:
        group, mine = self.world.group("pipeline"), self.world.place("pipeline") == source
        box = [(x.shape, x.dtype) if mine and x is not None else None]
        torch.distributed.broadcast_object_list(box, group=group, group_src=source)
        x = x.contiguous() if mine and x is not None else self._empty(box[0])
        torch.distributed.broadcast(x, group=group, group_src=source)
        return x

    def _empty(self, said: Any) -> Tensor:
        return torch.empty(said[0], dtype=said[1], device=next(self.model.parameters()).device)


def holders(model: nn.Module, world: World) -> dict[str, list[int]]:
    """Trained parameters that several ranks along the pipeline hold -> their places, in order."""
    own = [name for name, p in model.named_parameters() if p.requires_grad]
    told: list[Any] = [None] * world.ranks("pipeline")
    torch.distributed.all_gather_object(told, own, group=world.group("pipeline"))
    held = [frozenset(names) for names in told]
    found = {name: [rank for rank, names in enumerate(held) if name in names] for name in sorted(own)}
    return {name: ranks for name, ranks in found.items() if len(ranks) > 1}


def sum_shared(model: nn.Module, shared: dict[str, list[int]], world: World) -> None:
    """Sum the gradients of parameters that several ranks hold, in the same order on each, so that they stay equal."""
    if not shared:
        return
    here, group = world.place("pipeline"), world.group("pipeline")
    weights = dict(model.named_parameters())
    operations: list[Any] = []
    parts: dict[str, dict[int, Tensor]] = {}
    for name, ranks in shared.items():
        p = weights[name]
        own = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
        parts[name] = {rank: own if rank == here else torch.empty_like(own) for rank in ranks}
        for rank in ranks:
            if rank != here:
                for operation, tensor in ((torch.distributed.isend, own), (torch.distributed.irecv, parts[name][rank])):
                    operations.append(torch.distributed.P2POp(operation, tensor, group=group, group_peer=rank))
    for request in torch.distributed.batch_isend_irecv(operations):
        request.wait()
    for name, found in parts.items():
        ordered = [found[rank] for rank in shared[name]]
        weights[name].grad = sum(ordered[1:], start=ordered[0])


def check_model(model: nn.Module, where: str) -> Transformer:
    """The model, if it can be cut.

    Raises:
        UserError: if it is of another kind, or runs something beside its blocks.
    """
    if not isinstance(model, Transformer):
        what = f"{type(model).__name__} cannot be cut into stages."
        raise UserError(what, where, "Use a model `transformer`, or drop `pipeline`.")
    if model.config.head == "mlm":
        what = "validation of `masked-lm` reads hidden states and the head apart, which lie on several ranks."
        raise UserError(what, where, "Use another task, or drop `pipeline`.")
    if model.side is not None:
        what = "a side network reads the states of all blocks, which lie on several ranks."
        raise UserError(what, where, "Drop `pipeline`, or what adds the side network.")
    return model
