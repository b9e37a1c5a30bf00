# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A batch through the stages of a pipeline, in micro-batches, by the schedules of torch.distributed.pipelining."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.parts import Part
from scrimp.replicas import apart
from scrimp.stagewise import Stages, cut, sum_shared
from scrimp.timetable import CLASSES, SINGLE

if TYPE_CHECKING:
    from scrimp.models.transformer import Transformer
    from scrimp.run import Run
    from scrimp.technique import Batch


class Handed(Exception):  # noqa: N818
    """A stage that is not the last has run its blocks: what the task does after the model is none of its business."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class Caller(nn.Module):
    """A model whose call ends the task's loss, by raising `Handed`."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model, self.config, self.training = model, model.config, model.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Never returns.

        Raises:
            Handed: with the hidden states.
        """
        raise Handed(self.model(*args, **kwargs))


class Stage(nn.Module):
    """(states of the stage before, micro-batch) -> hidden states [b, P + T, C]; of the last stage the summed loss."""

    def __init__(self, run: Run, part: Part) -> None:
        super().__init__()
        self.model, self.run, self.part = run.model, run, part

    def forward(self, x: Tensor, **batch: Tensor) -> Tensor:
        """What the next stage gets, or the loss."""
        model: Any = self.model
        with cut(model, self.part, None if self.part.first else x):
            if self.part.last:
                assert self.run.loss is not None
                return self.run.loss(model, batch)
            try:
                self.run.task.loss(Caller(model), batch)
            except Handed as handed:
                return handed.states
        raise TypeError(f"the task {type(self.run.task).__name__} does not call its model.")


class Pipeline:
    """The backward pass of a batch.

    Args:
        shared: parameters that several ranks hold, and which.
        schedule: its name.
        wanted: micro-batches; 0 for twice the stages, or as many as divide the batch.
    """

    def __init__(
        self, run: Run, stages: Stages, shared: dict[str, list[int]], schedule: str, wanted: int, where: str
    ) -> None:
        self.run, self.stages, self.shared = run, stages, shared
        self.schedule, self.wanted, self.where = schedule, wanted, where
        self.engine: Any = None
        self.shape: tuple[int, ...] = ()
        self.count = torch.ones(())

    def __call__(self, batch: Batch, count: Tensor) -> Tensor:
        """The loss, on every rank; leaves the gradients of this rank's stages."""
        self.count = count
        tokens, losses = batch["tokens"], list[Tensor]()
        if self.shape != tuple(tokens.shape):
            self.engine, self.shape = self._engine(*tokens.shape), tuple(tokens.shape)
        with apart(self.run.model):
            self.engine.step(tokens, target=tokens, losses=losses, return_outputs=False, **batch)
            sum_shared(self.run.model, self.shared, self.run.world)
        return told(losses, self.run, self.stages.ranks[-1])

    def _mean(self, loss: Tensor, target: Tensor) -> Tensor:
        """A micro-batch's part of the whole batch's mean loss."""
        return loss / self.count

    def _engine(self, size: int, length: int) -> Any:
        """Torch's schedule for batches of a shape: it keeps a buffer for each micro-batch."""
        from torch.distributed import pipelining

        parts = micro_batches(self.wanted, size, len(self.stages.parts), self.run.world, self.schedule, self.where)
        made = [self._stage(stage, size // parts, length) for stage in
                self.stages.of(self.run.world.place("pipeline"))]  # fmt: skip
        kind = getattr(pipelining.schedules, CLASSES[self.schedule])
        single = self.schedule in SINGLE
        return kind(made[0] if single else made, parts, loss_fn=self._mean, scale_grads=False)

    def _stage(self, stage: int, size: int, length: int) -> Any:
        from torch.distributed.pipelining import PipelineStage

        run, part = self.run, self.stages.parts[stage]
        model: Any = run.model
        states = torch.empty(size, model.prepended + length, model.config.width, device=run.device,
                             dtype=getattr(torch, run.recipe.dtype), requires_grad=True)  # fmt: skip
        tokens = torch.empty(size, length, dtype=torch.int64, device=run.device)
        # Given here, shapes need not be found by a pass that costs time and calls techniques once more.
        return PipelineStage(
            Stage(run, part), stage, len(self.stages.parts), run.device, group=run.world.group("pipeline"),
            input_args=tokens if part.first else states, output_args=states.sum() if part.last else states,
        )  # fmt: skip


def told(losses: list[Tensor], run: Run, source: int) -> Tensor:
    """The sum of the losses that the last stage's rank has, on every rank of the pipeline."""
    loss = torch.zeros((), dtype=torch.float64, device=run.device)
    if losses:
        loss = torch.stack([loss.detach() for loss in losses]).sum().double()
    torch.distributed.broadcast(loss, group=run.world.group("pipeline"), group_src=source)
    return loss.to(torch.promote_types(getattr(torch, run.recipe.dtype), torch.float32))


def micro_batches(wanted: int, size: int, stages: int, world: Any, schedule: str, where: str) -> int:
    """How many micro-batches a batch is cut into.

    Raises:
        UserError: if they would not be of one size, or too few for the schedule.
    """
    ranks = world.ranks("pipeline")

    def fits(m: int) -> bool:
        return size % m == 0 and m >= _least(schedule, stages, ranks) and _even(schedule, m, ranks)

    found = wanted or max((m for m in range(1, 2 * stages + 1) if fits(m)), default=0)
    if not found or not fits(found):
        rounds = "" if _even(schedule, found or 1, ranks) else f", and rounds of {ranks} must come out even"
        what = (f"a batch of {size} makes no {wanted or 'suitable number of'} micro-batches of one size for {stages} "
                f"stages, which need at least {_least(schedule, stages, ranks)}{rounds}.")  # fmt: skip
        raise UserError(what, f"{where}.micro_batches", "Choose a divisor of the batch, or another `batch`.")
    return found


def _least(schedule: str, stages: int, ranks: int) -> int:
    return {"gpipe": 1, "1f1b": stages, "2bw": ranks}.get(schedule, ranks)


def _even(schedule: str, count: int, ranks: int) -> bool:
    return schedule not in ("interleaved", "zero_bubble") or count % max(1, count // ranks) == 0
