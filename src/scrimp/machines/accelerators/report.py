# pyright: strict
"""What a machine needs for some traces: cycles, seconds, bytes, joules, and who was busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scrimp.errors import UserError
from scrimp.machines.accelerators.architecture import Accelerator
from scrimp.machines.accelerators.dataflows import dataflow
from scrimp.machines.accelerators.engine import Flow, Group, busy, cycles, traffic, work
from scrimp.machines.accelerators.traces import Trace


@dataclass(frozen=True, kw_only=True)
class Report:
    """One simulation."""

    machine: str
    cycles: float
    seconds: float
    utilization: dict[str, float]
    """Resource -> share of its products that were useful; level -> share of its bandwidth."""
    bytes: dict[str, float]
    """Level -> bytes."""
    work: dict[str, float]
    """Resource -> useful operations."""
    joules_by_power: float | None
    """Published power times seconds; None where no power was published."""
    joules_by_events: float | None
    """Operations and bytes by a table; without leakage, clocks and control."""
    parts: dict[str, float] = field(default_factory=dict[str, float])
    """Name of a part -> its cycles by itself."""
    fitted: str = ""
    """What the machine's calibrated numbers were fitted on."""
    notes: list[str] = field(default_factory=list[str])

    def speedup(self, baseline: Report) -> float:
        """How many times sooner it is done than another."""
        return baseline.seconds / self.seconds if self.seconds else float("inf")

    def as_json(self) -> dict[str, Any]:
        """Every figure."""
        return asdict(self)


def simulate(traces: Sequence[Trace], machine: Accelerator) -> Report:
    """Run traces, one after another, through a machine.

    Raises:
        UserError: if the machine does not do what a trace asks for.
    """
    found = dataflow(machine.dataflow, machine.name)
    for trace in traces:
        if not isinstance(trace, found.takes):
            what = f"{machine.name} does no {type(trace).__name__.removesuffix('Trace').lower()}."
            raise UserError(what, "--machine", f"It does: {found.takes.__name__.removesuffix('Trace').lower()}.")
    if not traces:
        raise UserError("there is nothing to simulate: no trace was given.", machine.name)
    notes = found.notes(traces, machine)
    if machine.power is not None and machine.power.tag == "R":
        notes.append(f"The power of {machine.name} is recalled, not read: so is its energy by power and time.")
    return reported(found.function(traces, machine), machine, notes)


def reported(flow: Flow, machine: Accelerator, notes: Sequence[str] = ()) -> Report:
    """What a flow of stages needs."""
    total, useful, moved = cycles(flow, machine), work(flow), traffic(flow)
    held = {name: amount / machine.rate(name) for name, amount in useful.items() if machine.rate(name)}
    held |= {level: busy(flow, machine).get(level, 0.0) for level in moved}
    seconds = total / machine.clock
    return Report(
        machine=machine.name,
        cycles=total,
        seconds=seconds,
        utilization={name: amount / total for name, amount in held.items()} if total else {},
        bytes=moved,
        work=useful,
        joules_by_power=machine.power.value * seconds if machine.power is not None else None,
        joules_by_events=(machine.energy.joules(useful, moved) or None) if machine.energy is not None else None,
        parts=_parts(flow, machine),
        fitted=machine.fitted,
        notes=list(notes),
    )


def _parts(flow: Flow, machine: Accelerator) -> dict[str, float]:
    """Cycles of the named parts, each by itself."""
    found: dict[str, float] = {}
    if isinstance(flow, Group) and not flow.name:
        for part in flow.parts:
            for name, amount in _parts(part, machine).items():
                found[name] = found.get(name, 0.0) + flow.count * amount
        return found
    return {flow.name: cycles(flow, machine)}
