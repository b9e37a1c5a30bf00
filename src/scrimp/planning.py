# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What a run will need, before it runs: the recipe itself, built and stepped on fake tensors, which have shapes only.

Every stage is a `DryRun` and hands its named tensors to the next. No technique is known here: one whose cost a dry run
cannot see says so in `price`.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from scrimp.arrange import emulated
from scrimp.clock import Clock
from scrimp.dryrun import DryRun, StagePlan
from scrimp.machines.machine import Machine, machine
from scrimp.machines.memory import CONTEXT, resident
from scrimp.ranks import links, pretended
from scrimp.stages import new_clock
from scrimp.world import arranged, spread

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.technique import State


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
