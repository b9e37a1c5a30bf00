# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""One stage of a run on fake tensors: built and stepped as training does it, and counted.

Two steps are taken, as the second one has the optimizer's states from the first, and one validation. A `Trace` counts
what lives; a `Machine` knows what it takes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_map_only

from scrimp.errors import UserError
from scrimp.machines.memory import on_cuda, reserved, rounded
from scrimp.machines.timing import step_seconds, waiting
from scrimp.meter import weights
from scrimp.plain import tokens_of
from scrimp.ranks import sending, sent
from scrimp.run import Run, build
from scrimp.stages import stage_end, validation_batches
from scrimp.technique import Cost
from scrimp.trace import Moment, Trace, most, peak

if TYPE_CHECKING:
    from scrimp.clock import Clock
    from scrimp.machines.machine import Machine
    from scrimp.ops import Op
    from scrimp.recipe import Recipe
    from scrimp.technique import Batch, State
    from scrimp.world import World

SAMPLES: Final = 5
"""Steps of a stage at which the batch is looked at; the largest is planned with."""


class CannotPlanError(UserError):
    """The recipe trains, or may; but it cannot be run on tensors without values."""


@dataclass
class StagePlan:
    """One stage."""

    number: int
    steps: int
    tokens: int
    """What one step's loss sums over."""
    peak: Moment
    line: list[tuple[int, str]]
    """(live bytes, part of the run) after each allocation and release."""
    segments: int
    """Most bytes of segments of CUDA's allocator that hold something; 0 elsewhere."""
    reserved: int
    """Bytes that it would have reserved if nothing made it give back empty ones."""
    ops: list[Op]
    """Of one step."""
    seconds: float
    """Of one step."""
    slowest: list[tuple[str, float]]
    """(operator, seconds), the slowest first."""
    parameters: int
    """Weights, packed ones as what they stand for."""
    trained: int
    packed: int
    """Of the parameters, those that are held in four bits."""
    sent: int = 0
    """Bytes that each rank sends in a step."""
    sending: float = 0.0
    """Of the seconds, those in which it sends."""
    waiting: float = 0.0
    """Of the seconds, those in which it waits for ranks that compute."""
    most: dict[str, int] = field(default_factory=dict[str, int])
    """Kind of memory -> its highest bytes, each at a moment of its own."""

    def flops(self) -> dict[str, float]:
        """Phase -> FLOPs of a step."""
        return dict(sum((Counter({op.phase: op.flops}) for op in self.ops if op.flops), Counter[str]()))

    def moved(self) -> int:
        """Bytes that a step's operators read and write."""
        return sum(op.read + op.written for op in self.ops)


@dataclass
class DryRun:
    """One stage on fake tensors."""

    recipe: Recipe
    target: Machine
    data: Any
    clock: Clock
    world: World
    carried: State | None
    """What the last stage left; let go once the run is built from it, as training does."""
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    trace: Trace = field(init=False)

    def __post_init__(self) -> None:
        """Sizes are the target's: where its kernels are only described, those keep other things than a CPU's."""
        cuda, described = self.target.device == "cuda", not torch.cuda.is_available()
        self.trace = Trace(on_cuda if cuda and described else rounded if cuda else lambda size, op, output: size)

    def stage(self, decisions: dict[str, Any]) -> tuple[StagePlan, State, dict[str, Any]]:
        """The stage's plan, and what the next one is built from.

        Raises:
            CannotPlanError: if the model decides by values.
        """
        trace, clock = self.trace, self.clock
        run = self._built(decisions)
        begin, end = clock.position, stage_end(run)
        batch, tokens = self._largest_batch(run, end)
        cost = run.fold("price", Cost())
        try:
            step = self._steps(run, batch, cost.bytes)
            self._validation(run)
        except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode) as error:
            where = trace.module or "training"
            raise CannotPlanError(
                f"decides by values of tensors ({error}).", where, "Read scalars by run.read."
            ) from error
        tokens *= self.world.ranks("replica", "data")
        count = _advance(clock, begin, end, self.recipe.batch, tokens)
        decisions = self._decided(run)
        moment, line = peak(trace)
        seconds, slowest = step_seconds(step, self.target, cost.fused)
        waits, sends = waiting(step, self.target, cost), sending(step, self.target)
        seconds += cost.seconds + waits + sends
        segments, held = reserved(trace.blocks) if self.target.device == "cuda" else (0, 0)
        planned = StagePlan(
            clock.stage, count, tokens, moment, line, segments, held, step, seconds, slowest,
            *weights(run.model), sent(step), sends, waits, most(trace),
        )  # fmt: skip
        with self.mode:
            state = tree_map_only(Tensor, lambda t: t.detach().clone(), run.state())
        return planned, state, decisions

    def _decided(self, run: Run) -> dict[str, Any]:
        """What techniques decide when the stage ends; what they need for it counts."""
        with self.mode, self.trace:
            self.trace.kind = "workspace"
            found = {run.order.key(t): t.decide(run) for t in run.order.slots["decide"]}
            self.trace.kind = ""
        return run.decisions | found

    def _built(self, decisions: dict[str, Any]) -> Run:
        trace, carried = self.trace, self.carried
        self.carried = None
        with self.mode, trace:
            trace.kind = "workspace"
            if carried is not None:  # The copy is seen where it is made.
                carried = tree_map_only(Tensor, lambda t: t.detach().clone(), carried)
            trace.kind = ""
            run = build(self.recipe, self.data, self.clock, carried, None, decisions, world=self.world)
            del carried
            # Each weight is drawn in float32 before it gets its type.
            trace.kind = "workspace"
            torch.empty(max(p.numel() for p in run.model.parameters()), dtype=torch.float32)
            trace.kind = ""
        self._mark(run)
        return run

    def _mark(self, run: Run) -> None:
        """What is a state of the optimizer or of a technique, and what a weight."""
        state = run.state()
        self.trace.mark([tensors for kind, tensors in state.items() if kind != "model"], "states")
        self.trace.mark([list(run.model.parameters()), list(run.model.buffers())], "weights")

    def _largest_batch(self, run: Run, end: int) -> tuple[Batch, int]:
        """The largest of some batches of a stage, and how many tokens it trains on."""
        clock = run.clock
        steps = max(1, round((end - clock.position) / clock.per_step[clock.unit]))
        places = sorted({clock.step + round(i * (steps - 1) / (SAMPLES - 1)) for i in range(SAMPLES)})
        found = max((run.batch(step) for step in places), key=lambda b: sum(t.numel() for t in b.values()))
        return found, tokens_of(run.task, found)

    def _steps(self, run: Run, batch: Batch, price: int) -> list[Op]:
        """Two steps; returns the operators of the second."""
        assert run.backward and run.step and run.optimizer
        trace, count, first = self.trace, run.task.count(batch), 0
        with self.mode, trace.watching(run.model), trace:
            trace.part, trace.kind = "step", "workspace"
            priced = torch.empty(price, dtype=torch.uint8)
            trace.kind = "activations"
            fake = {name: torch.empty_like(t) for name, t in batch.items()}
            trace.kind = ""
            for _ in range(2):
                first, trace.part = len(trace.ops), "step"
                run.set_lr()
                run.backward(fake, count)
                trace.part = "update"
                run.step()
                run.optimizer.zero_grad(set_to_none=True)
                self._mark(run)
            del priced
        return trace.ops[first:]

    def _validation(self, run: Run) -> None:
        """One batch of the validation set, the first, which is as large as any."""
        assert run.evaluate is not None
        trace = self.trace
        batches = validation_batches(run)[:1]
        with self.mode, trace.watching(run.model), trace:
            trace.part = "validation"
            for batch in batches:
                fake = {name: torch.empty_like(t) for name, t in batch.items()}
                run.evaluate(lambda model, fake=fake: run.task.loss(model, fake))


def _advance(clock: Clock, begin: int, end: int, batch: int, tokens: int) -> int:
    """Move the clock to the end of a stage; returns how many steps that takes."""
    per = {"step": 1, "sample": batch, "tok": tokens}[clock.unit]
    steps = -(-(end - begin) // max(per, 1))
    clock.step += steps
    clock.sample += steps * batch
    clock.tok += steps * tokens
    return steps
