# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What a run will need, before it runs: the recipe itself, built and stepped on fake tensors, which have shapes only.

Every stage is built as training builds it, takes two steps (the second one has the optimizer's states from the first),
one validation, and hands its named tensors to the next. A `Trace` counts what lives; a `Machine` knows what it takes.
No technique is known here: one whose cost a dry run cannot see says so in `price`.
"""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import dataclass, field, replace
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

from scrimp.arrange import emulated
from scrimp.clock import Clock
from scrimp.errors import UserError
from scrimp.machines.machine import Machine, machine
from scrimp.machines.memory import CONTEXT, on_cuda, reserved, resident, rounded
from scrimp.machines.timing import step_seconds, waiting
from scrimp.meter import weights
from scrimp.ops import Op
from scrimp.plain import tokens_of
from scrimp.ranks import links, pretended, sending, sent
from scrimp.run import Run, build
from scrimp.stages import new_clock, stage_end, validation_batches
from scrimp.technique import Cost
from scrimp.trace import Moment, Trace, most, peak
from scrimp.world import World, arranged, spread

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.technique import Batch, State

SAMPLES: Final = 5
"""Steps of a stage at which the batch is looked at; the largest is planned with."""


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
class Plan:
    """A whole run, before it runs."""

    recipe: Recipe
    machine: Machine
    stages: list[StagePlan]
    ranks: int = 1
    notes: list[str] = field(default_factory=list[str])
    """What the figures rest on, in sentences."""

    @property
    def worst(self) -> StagePlan:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda s: s.peak.total)

    @property
    def live(self) -> int:
        """Peak bytes of live tensors over the whole run."""
        return self.worst.peak.total

    @property
    def memory(self) -> int:
        """Bytes that the machine must have: resident on a CPU; segments in use and the context on a GPU."""
        if self.machine.device == "cuda":
            return max(s.segments for s in self.stages) + CONTEXT
        rates = self.machine.rates
        return resident(self.live, rates.resident if rates is not None else None)

    @property
    def fits(self) -> bool:
        """Whether the machine has it."""
        return self.memory <= self.machine.memory

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return sum(s.seconds * s.steps for s in self.stages)

    @property
    def joules(self) -> float | None:
        """Energy at full power; None where the machine's power is not known."""
        return None if self.machine.power is None else self.machine.power * self.seconds * self.ranks


class CannotPlanError(UserError):
    """The recipe trains, or may; but it cannot be run on tensors without values."""


def plan(
    recipe: Recipe,
    on: Machine | str = "here",
    data: Any = None,
    ranks: int = 1,
    clock: Clock | None = None,
    rank: int = 0,
) -> Plan:
    """Plan a recipe for a machine.

    Args:
        data: an opened data set; by default the recipe's, or its outline where it is not built yet.
        ranks: devices in the recipe's mesh; figures of memory and time are those of one.
        rank: the one of them that is planned.
        clock: where a resumed run goes on; the start of the run by default.
    Raises:
        UserError: where training would raise it too.
        CannotPlanError: if the model decides by values of tensors.
    """
    target = machine(on) if isinstance(on, str) else on
    data = outlined(recipe) if data is None else data
    given, recipe = recipe, spread(recipe, ranks)
    found = Plan(recipe, target, [], ranks, _notes(given, target, data, ranks))
    device = "cuda" if target.device == "cuda" and torch.cuda.is_available() else "cpu"
    local = replace(recipe, device=device)
    clock = Clock(**clock.state()) if clock is not None else new_clock(recipe, data)
    carried: State | None = None
    decisions: dict[str, Any] = {}
    with pretended(ranks, rank):
        world = arranged(recipe.mesh, device)
        while True:
            dry = DryRun(local, target, data, clock, world, carried)
            carried = None
            stage, carried, decisions = dry.stage(decisions)
            found.stages.append(stage)
            if clock.done:
                return found
            clock.cuts.append(clock.position)
            clock.stage += 1
            gc.collect()


def outlined(recipe: Recipe) -> Any:
    """The recipe's data: opened if that is quick, else a stand-in with its sizes."""
    return getattr(recipe.data, "outline", recipe.data.open)()


def _notes(given: Recipe, target: Machine, data: Any, ranks: int) -> list[str]:
    notes: list[str] = [getattr(data, "note", "")]
    half = {"bfloat16", "float16"} & {given.dtype, *(str(getattr(t, "dtype", "")) for t in given.techniques)}
    for dtype in half - set(target.flops):
        notes.append(f"{target.name} has no fast {dtype}: its products run at most at float32's rate.")
    if target.device == "cuda" and not torch.cuda.is_available():
        notes.append("Kernels of the target are described, not run: this torch has no CUDA.")
    if not target.probed:
        here = "`scrimp probe` measures this machine" if target.name == "here" else "no probe of it is at hand"
        notes.append(f"Times rest on assumed rates: {here}.")
    if ranks > 1 and not any(t.card.axes for t in given.techniques):
        notes.append("No technique shards anything: every rank holds a replica, and gradients are summed.")
    notes += links(target, ranks)
    notes += emulated({t.name: t.card for t in given.techniques}, target.device)
    return [note for note in notes if note]


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
