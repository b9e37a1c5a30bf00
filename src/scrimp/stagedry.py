# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A rank's part of a pipeline on tensors without values: the same actions in the same order, and nobody to wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.pipelined import Stage, micro_batches
from scrimp.splitting import split
from scrimp.stagewise import Stages, cut
from scrimp.timetable import actions

if TYPE_CHECKING:
    from scrimp.models.transformer import Transformer
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch
    from scrimp.world import World


def valueless(model: nn.Module) -> bool:
    """Whether the model's tensors have no values."""
    return any(isinstance(p, FakeTensor) for p in model.parameters())


def planned(run: Run, stages: Stages, order: str, wanted: int, where: str) -> Backward:
    """This rank's actions, with states that come from nowhere. Torch keeps a buffer for those of each micro-batch."""
    here, ranks = run.world.place("pipeline"), run.world.ranks("pipeline")
    own = {stage: Stage(run, stages.parts[stage]) for stage in stages.of(here)}

    def backward(batch: Batch, count: Tensor) -> Tensor:
        parts = micro_batches(wanted, len(batch["tokens"]), len(stages.parts), run.world, order, where)
        pieces = split(batch, parts)
        came = {(stage, i): _states(run, piece) for stage in own for i, piece in enumerate(pieces)}
        grads = {key: torch.empty_like(states) for key, states in came.items()}
        left: dict[tuple[int, int], Tensor] = {}
        loss = torch.zeros((), device=run.device)
        # The two copies of 2bw, and its gradients that wait.
        stash = [torch.empty_like(p) for p in run.model.parameters() for _ in range(2)] if order == "2bw" else []
        for action in actions("1f1b" if order == "2bw" else order, ranks, parts, len(own))[here]:
            key = (action.stage, action.part)
            if action.kind == "F":
                left[key] = own[action.stage](came[key], **pieces[action.part])
                _send(run, left[key], stages, action.stage + 1)
            elif action.kind != "W":
                out = left.pop(key)
                out.backward(grads[key] if out.ndim else None)
                _send(run, came[key], stages, action.stage - 1)
        del stash
        return loss

    return backward


def _send(run: Run, states: Tensor, stages: Stages, to: int) -> None:
    """States, or as many gradients, to another rank's stage; there may be none."""
    place = stages.ranks[to] if 0 <= to < len(stages.ranks) else run.world.place("pipeline")
    if place != run.world.place("pipeline"):
        torch.distributed.send(states.detach(), group=run.world.group("pipeline"), group_dst=place)


def _states(run: Run, batch: Batch) -> Tensor:
    """What the stage before would leave: [b, P + T, C]."""
    model: Any = run.model
    size, length = batch["tokens"].shape
    return torch.empty(size, model.prepended + length, model.config.width, device=run.device,
                       dtype=getattr(torch, run.recipe.dtype), requires_grad=True)  # fmt: skip


class DryRelay(nn.Module):
    """As `Relay`, for the stages of this rank only."""

    def __init__(self, model: Transformer, stages: Stages, world: World) -> None:
        super().__init__()
        self.model, self.stages, self.here = model, stages, world.place("pipeline")
        self.config, self.training = model.config, model.training

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the rank's last stage leaves."""
        x, like = tokens, next(self.model.parameters())
        for stage in self.stages.of(self.here):
            part = self.stages.parts[stage]
            given = like.new_empty(*tokens.shape, self.config.width)
            with cut(self.model, part, None if part.first else given):
                x = self.model(tokens, *args, **kwargs)
        return x
