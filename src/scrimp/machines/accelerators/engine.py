# pyright: strict
"""The arithmetic of all dataflows: what a stage takes, how stages compose, and who takes which item.

cycles(stage) = max(work / (rate * utilization),
                    bytes / bandwidth                     for each level it moves bytes on,
                    latency * dependent accesses / parallel)
cycles(sequence) = count * (sum of its parts)
cycles(overlap)  = the slowest part, or the busiest resource that parts share
cycles(pipeline) = fill + interval * (count - 1), with fill the sum of its parts and interval that of an overlap
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

MEMORY = "memory"
"""Level of traffic that leaves the chip."""


class Rates(Protocol):
    """What the engine asks of a machine."""

    def rate(self, resource: str) -> float:
        """Operations a cycle of a resource."""
        ...

    def bandwidth(self, level: str) -> float:
        """Bytes a cycle of a level of memory."""
        ...

    def latency(self) -> float:
        """Cycles until an access to memory is answered."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Work of one resource, and the bytes that it needs meanwhile."""

    name: str
    resource: str = ""
    """Array or unit that does it; empty where bytes only are moved."""
    work: float = 0.0
    """Operations that are useful."""
    cycles: float | None = None
    """What the work takes, where a dataflow knows it exactly; else it follows from the resource's rate."""
    utilization: float = 1.0
    """Share of the resource's rate that useful work gets."""
    bytes: Mapping[str, float] = field(default_factory=dict[str, float])
    """Level -> bytes."""
    accesses: float = 0.0
    """To memory, each of which waits for another one."""
    parallel: float = 1.0
    """Of them at the same time."""


@dataclass(frozen=True)
class Group:
    """Stages together."""

    kind: Literal["sequence", "overlap", "pipeline"]
    parts: tuple[Flow, ...]
    count: float = 1.0
    """How often, or of how many items; a number of items may be an average."""
    name: str = ""


Flow = Stage | Group


def sequence(*parts: Flow, count: float = 1.0, name: str = "") -> Group:
    """One after another."""
    return Group("sequence", parts, count, name)


def overlap(*parts: Flow, name: str = "") -> Group:
    """At the same time."""
    return Group("overlap", parts, 1.0, name)


def pipeline(*parts: Flow, count: float, name: str = "") -> Group:
    """Items pass through all parts, each of which takes the next item as soon as it is free."""
    return Group("pipeline", parts, count, name)


def cycles(flow: Flow, machine: Rates) -> float:
    """Until all of it is done."""
    if isinstance(flow, Stage):
        return max(busy(flow, machine).values(), default=0.0)
    parts = [cycles(part, machine) for part in flow.parts]
    if flow.kind == "sequence":
        return flow.count * sum(parts)
    interval = max([*parts, *_shared(flow, machine).values()], default=0.0)
    if flow.kind == "overlap":
        return interval
    return sum(parts) * min(flow.count, 1.0) + interval * max(flow.count - 1.0, 0.0)


def busy(flow: Flow, machine: Rates) -> dict[str, float]:
    """Resource or level -> cycles in which it is taken."""
    if isinstance(flow, Group):
        return {name: flow.count * held for name, held in _shared(flow, machine).items()}
    held = {level: amount / machine.bandwidth(level) for level, amount in flow.bytes.items()}
    if flow.resource:
        needed = flow.work / machine.rate(flow.resource) / flow.utilization if flow.cycles is None else flow.cycles
        held[flow.resource] = held.get(flow.resource, 0.0) + needed
    if flow.accesses:
        held["latency"] = machine.latency() * flow.accesses / flow.parallel
    return held


def _shared(group: Group, machine: Rates) -> dict[str, float]:
    """What the parts of one item take of each resource, together. Waiting is nothing that they would share."""
    total: dict[str, float] = {}
    for part in group.parts:
        for name, held in busy(part, machine).items():
            before = total.get(name, 0.0)
            total[name] = max(before, held) if name == "latency" else before + held
    return total


def traffic(flow: Flow) -> dict[str, float]:
    """Level -> bytes."""
    return _total(flow, lambda stage: stage.bytes)


def work(flow: Flow) -> dict[str, float]:
    """Resource -> useful operations."""
    return _total(flow, lambda stage: {stage.resource: stage.work} if stage.resource else {})


def _total(flow: Flow, amounts: Callable[[Stage], Mapping[str, float]]) -> dict[str, float]:
    """A sum over all stages, as often as they are done."""
    if isinstance(flow, Stage):
        return dict(amounts(flow))
    total: dict[str, float] = {}
    for part in flow.parts:
        for name, amount in _total(part, amounts).items():
            total[name] = total.get(name, 0.0) + flow.count * amount
    return total


def scheduled(costs: Iterable[float], workers: int) -> list[float]:
    """Cycles that each worker is busy when each item goes, in its turn, to the worker that is free first."""
    heap = [(0.0, worker) for worker in range(workers)]
    for cost in costs:
        free, worker = heap[0]
        heapq.heapreplace(heap, (free + cost, worker))
    return [held for held, _ in sorted(heap, key=lambda entry: entry[1])]


def makespan(costs: Iterable[float], workers: int) -> float:
    """Until the last worker is done."""
    return max(scheduled(costs, workers))
