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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from scrimp.clock import Duration
from scrimp.machines.machine import Machine, machine
from scrimp.machines.memory import CONTEXT, on_cuda, reserved, resident
from scrimp.machines.timing import seconds
from scrimp.run import Run, build
from scrimp.stages import new_clock, stage_end
from scrimp.trace import Moment, Op, Trace, peak

if TYPE_CHECKING:
    from scrimp.clock import Clock
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
    reserved: int
    """Bytes that CUDA's allocator would hold; 0 elsewhere."""
    ops: list[Op]
    """Of one step."""
    seconds: float
    """Of one step."""
    slowest: list[tuple[str, float]]
    """(operator, seconds), the slowest first."""
    parameters: int
    trained: int

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
        """Bytes that the machine must have: resident on a CPU, reserved and the context on a GPU."""
        if self.machine.device == "cuda":
            return max(s.reserved for s in self.stages) + CONTEXT
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


def plan(recipe: Recipe, on: Machine | str = "here", data: Any = None) -> Plan:
    """Plan a recipe for a machine.

    Args:
        data: an opened data set; by default the recipe's, or its outline where it is not built yet.
    Raises:
        UserError: where training would raise it too.
    """
    target = machine(on) if isinstance(on, str) else on
    data = outlined(recipe) if data is None else data
    clock = new_clock(recipe, data)
    found = Plan(recipe, target, [], notes=_notes(recipe, target, data))
    local = replace(recipe, device="cuda" if target.device == "cuda" and torch.cuda.is_available() else "cpu")
    last: State | None = None
    decisions: dict[str, Any] = {}
    while True:
        stage, last, decisions = _stage(local, target, data, clock, last, decisions)
        found.stages.append(stage)
        if clock.done:
            return found
        clock.cuts.append(clock.position)
        clock.stage += 1
        gc.collect()


def outlined(recipe: Recipe) -> Any:
    """The recipe's data: opened if that is quick, else a stand-in with its sizes."""
    return getattr(recipe.data, "outline", recipe.data.open)()


def _notes(recipe: Recipe, target: Machine, data: Any) -> list[str]:
    notes: list[str] = [getattr(data, "note", "")]
    half = {"bfloat16", "float16"} & {recipe.dtype, *(str(getattr(t, "dtype", "")) for t in recipe.techniques)}
    for dtype in half - set(target.flops):
        notes.append(f"{target.name} has no fast {dtype}: its products run at most at float32's rate.")
    if target.device != "cpu" and not torch.cuda.is_available():
        notes.append("Kernels of the target are described, not run: this torch has no CUDA.")
    if not target.probed:
        here = "`scrimp probe` measures this machine" if target.name == "here" else "no probe of it is at hand"
        notes.append(f"Times rest on assumed rates: {here}.")
    return [note for note in notes if note]


def _stage(
    recipe: Recipe, target: Machine, data: Any, clock: Clock, last: State | None, decisions: dict[str, Any]
) -> tuple[StagePlan, State, dict[str, Any]]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    trace = Trace(on_cuda if target.device != "cpu" else lambda size, op, output: size)
    with mode, trace:
        run = build(recipe, data, clock, last, None, decisions)
    del last
    trace.mark([list(run.model.parameters()), list(run.model.buffers())], "weights")
    trace.mark([run.state(), run.memories], "states")
    trace.mark([list(run.model.parameters()), list(run.model.buffers())], "weights")
    begin, end = clock.position, stage_end(run)
    batch, tokens = _largest_batch(run, end)
    first = _steps(run, batch, mode, trace)
    step = trace.ops[first:]
    if Duration.parse(recipe.validate.every).value and recipe.validate.batches:
        _validate(run, batch, mode, trace)
    cost = run.fold("price", {"seconds": 0.0, "bytes": 0.0, "fused": 0.0})
    moment, line = peak(trace)
    moment.total += int(cost["bytes"])
    moment.kinds["workspace"] += int(cost["bytes"])
    step_seconds, slowest = seconds(step, target, bool(cost["fused"]))
    parameters = list(run.model.parameters())
    count = _advance(clock, begin, end, recipe.batch, tokens)
    stage = StagePlan(
        clock.stage, count, tokens, moment, line,
        reserved(trace.blocks) + int(cost["bytes"]) if target.device == "cuda" else 0,
        step, step_seconds + cost["seconds"], slowest,
        sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad),
    )  # fmt: skip
    with mode:
        state = tree_map_only(Tensor, lambda t: t.detach().clone(), run.state())
    decisions = run.decisions | {run.order.key(t): t.decide(run) for t in run.order.slots["decide"]}
    return stage, state, decisions


def _largest_batch(run: Run, end: int) -> tuple[Batch, int]:
    """The largest of some batches of a stage, and what its loss sums over."""
    clock = run.clock
    steps = max(1, round((end - clock.position) / clock.per_step[clock.unit]))
    places = sorted({clock.step + round(i * (steps - 1) / (SAMPLES - 1)) for i in range(SAMPLES)})
    found = max((run.batch(step) for step in places), key=lambda b: sum(t.numel() for t in b.values()))
    return found, int(run.task.count(found))


def _steps(run: Run, batch: Batch, mode: FakeTensorMode, trace: Trace) -> int:
    """Two steps; returns the number of the second one's first operator."""
    assert run.backward and run.step and run.optimizer
    count = run.task.count(batch)
    first = 0
    with mode, trace.watching(run.model), trace:
        trace.part, trace.kind = "batch", "activations"
        fake = {name: torch.empty_like(t) for name, t in batch.items()}
        trace.part, trace.kind = "step", ""
        for _ in range(2):
            first = len(trace.ops)
            run.set_lr()
            run.backward(fake, count)
            run.step()
            run.optimizer.zero_grad(set_to_none=True)
            trace.mark(list(run.optimizer.state.values()), "states")
    return first


def _validate(run: Run, batch: Batch, mode: FakeTensorMode, trace: Trace) -> None:
    assert run.evaluate is not None
    with mode, trace.watching(run.model), trace:
        trace.part = "validation"
        fake = {name: torch.empty_like(t) for name, t in batch.items()}
        run.evaluate(lambda model: run.task.loss(model, fake))


def _advance(clock: Clock, begin: int, end: int, batch: int, tokens: int) -> int:
    """Move the clock to the end of a stage; returns how many steps that takes."""
    per = {"step": 1, "sample": batch, "tok": tokens}[clock.unit]
    steps = -(-(end - begin) // max(per, 1))
    clock.step += steps
    clock.sample += steps * batch
    clock.tok += steps * tokens
    return steps
