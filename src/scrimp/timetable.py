# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What each rank of a pipeline computes when, and how long it idles: schedules as tables, without any rank running.

The order of actions is that of torch's schedules, which run them. Their times follow: an action begins as soon as its
rank is free and what it needs is there. With p ranks, m micro-batches and v stages a rank, every stage as fast as the
others and sending free,

    idle share    (p - 1) / (m + p - 1)        gpipe, 1f1b
                  (p - 1) / (v m + p - 1)      interleaved: the idle time is 1/v as long
    in flight     m                            gpipe: micro-batches whose activations rank i keeps at most
                  min(m, p - i)                1f1b
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, Literal

from torch import nn

Kind = Literal["F", "B", "I", "W"]
"""Forward, backward; where backward is split: of inputs, of weights."""
TIMES: Final[Mapping[str, float]] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
"""Slots that an action takes: backward multiplies twice as much as forward."""
CLASSES: Final = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}
"""Our names of schedules -> torch's."""
SINGLE: Final = ("gpipe", "1f1b", "2bw")
"""Schedules of one stage a rank."""


@dataclass(frozen=True)
class Action:
    """One micro-batch through one stage, in one direction."""

    kind: Kind
    stage: int
    part: int
    """Number of the micro-batch."""
    start: float = 0.0
    end: float = 0.0


def actions(order: str, ranks: int, parts: int, each: int = 1) -> list[list[Action]]:
    """What each rank computes, in order.

    Args:
        order: the schedule's name.
        parts: micro-batches.
        each: stages a rank.
    Raises:
        ValueError: if the schedule does not take so many micro-batches.
    """
    if order in SINGLE:
        return [_single(order, rank, ranks, parts) for rank in range(ranks)]
    from torch.distributed.pipelining import schedules

    # A schedule knows its order before it has a model or a process group.
    stages = [SimpleNamespace(num_stages=ranks * each, group_size=ranks, group_rank=0, stage_index=i * ranks,
                              is_first=i == 0, is_last=False, submod=nn.Identity(), has_backward=True,
                              stage_index_to_group_rank={}) for i in range(each)]  # fmt: skip
    made: Any = getattr(schedules, CLASSES[order])
    made = made(stages, parts, loss_fn=None)
    kinds: dict[str, Kind] = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    table = [[Action(kinds[a.computation_type.name], a.stage_index, a.microbatch_index)
              for a in made.pipeline_order[rank] if a is not None and a.computation_type.name in kinds]
             for rank in range(ranks)]  # fmt: skip
    return table


def _single(order: str, rank: int, ranks: int, parts: int) -> list[Action]:
    """Of one stage a rank: so many forwards first, then one backward and one forward in turns, then backwards."""
    first = parts if order == "gpipe" else min(parts, ranks - rank)
    forward = [Action("F", rank, part) for part in range(parts)]
    backward = [Action("B", rank, part) for part in range(parts)]
    turns = [a for pair in zip(backward, forward[first:], strict=False) for a in pair]
    return forward[:first] + turns + backward[parts - first :]


def timed(table: Sequence[Sequence[Action]], times: Mapping[str, float] = TIMES) -> list[list[Action]]:
    """The same actions with their times.

    Raises:
        ValueError: if an action waits for one that never comes.
    """
    last = max(a.stage for row in table for a in row)
    done: dict[tuple[str, int, int], float] = {}
    found: list[list[Action]] = [[] for _ in table]
    while any(len(row) < len(given) for row, given in zip(found, table, strict=True)):
        moved = False
        for row, given in zip(found, table, strict=True):
            while len(row) < len(given):
                a = given[len(row)]
                ready = [done.get(need) for need in _needs(a, last)]
                if any(time is None for time in ready):
                    break
                start = max([row[-1].end if row else 0.0, *(time for time in ready if time is not None)])
                end = start + times[a.kind] / (last + 1) * len(table)
                row.append(Action(a.kind, a.stage, a.part, start, end))
                done["B" if a.kind == "I" else a.kind, a.stage, a.part] = end
                moved = True
        if not moved:
            raise ValueError("the schedule waits for itself.")
    return found


def _needs(a: Action, last: int) -> list[tuple[str, int, int]]:
    """What must be done before an action: the stage before or behind, and the stage's own forward."""
    if a.kind == "F":
        return [("F", a.stage - 1, a.part)] if a.stage else []
    if a.kind == "W":
        return [("B", a.stage, a.part)]
    return [("F", a.stage, a.part)] + ([("B", a.stage + 1, a.part)] if a.stage < last else [])


def idle(rows: Sequence[Sequence[Action]]) -> float:
    """The share of all ranks' time in which they compute nothing."""
    end = max(a.end for row in rows for a in row)
    busy = sum(a.end - a.start for row in rows for a in row)
    return 1 - busy / (end * len(rows))


def in_flight(row: Sequence[Action]) -> int:
    """How many micro-batches' activations a rank keeps at most, in those of one of its stages."""
    held, most = 0, 0
    for a in row:
        held += {"F": 1, "B": -1, "I": 0, "W": -1}[a.kind]
        most = max(most, held)
    return most


def drawn(rows: Sequence[Sequence[Action]]) -> str:
    """A table of text: a line a rank, a column a slot; micro-batches are digits after F, B, I or W, and dots idle."""
    step = min(a.end - a.start for row in rows for a in row)
    end = max(a.end for row in rows for a in row)
    lines: list[str] = []
    for row in rows:
        cells = [" . "] * round(end / step)
        for a in row:
            for slot in range(round(a.start / step), round(a.end / step)):
                cells[slot] = f"{a.kind}{a.part:<2}"
        lines.append("".join(cells).rstrip())
    return "\n".join(lines)
