"""Which schedule a chain gets, once the shape of its first input is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from scrimp.errors import UserError
from scrimp.limits import size_of
from scrimp.remat.chain import Piece, Schedule, best_segment, every, everything, segments, simulate
from scrimp.remat.dynamic import Evicting
from scrimp.remat.executor import Around, Policy, Scheduled
from scrimp.remat.given import Given
from scrimp.remat.measure import Link, measured, reruns
from scrimp.remat.program import cheapest
from scrimp.remat.rotor import least, optimal
from scrimp.remat.selective import SAVES, checkpointed


@dataclass(frozen=True)
class Choice:
    """A way to run a chain within a budget."""

    name: str
    bytes: int
    """That it holds at most."""
    cost: float
    """Of what runs again."""
    policy: Callable[[], Policy | Around | None]


def policy(mode: str, budget: str | float, segment: int, links: Sequence[Link], given: Given) -> Policy | Around | None:
    """What plays the chain; None keeps all.

    Raises:
        UserError: if the budget is less than any schedule needs.
    """
    pieces = measured(links, given)
    if mode == "sqrt":
        return Scheduled(segments(len(pieces), segment or best_segment(pieces)))
    room = bytes_of(budget, pieces)
    if mode == "optimal":
        return Scheduled(_found(optimal(pieces, room), pieces, room))
    if mode == "dynamic":
        return Evicting(pieces, room)
    if mode == "milp":
        return Scheduled(_found(cheapest(pieces, room), pieces, room))
    fits = [choice for choice in choices(pieces, room, links, given) if choice.bytes <= room]
    if not fits:
        _found(None, pieces, room)
    return min(fits, key=lambda choice: choice.cost).policy()


def bytes_of(budget: str | float, pieces: Sequence[Piece]) -> int:
    """A budget in bytes; up to 1 it is a share of what the chain holds plainly."""
    if isinstance(budget, str):
        return size_of(budget, "budget")
    return int(budget * everything(pieces) if budget <= 1 else budget)


def choices(pieces: Sequence[Piece], room: int, links: Sequence[Link], given: Given) -> list[Choice]:
    """Ways to run a chain, the simplest first."""
    count = len(pieces)
    found = [Choice("none", everything(pieces), 0.0, lambda: None)]
    for save in SAVES:
        kept = reruns(links, partial(checkpointed, draws=False, save=save), given)
        held = sum(p.input + pack for p, (pack, _) in zip(pieces, kept, strict=True)) + max(p.full for p in pieces)
        policy = Around(partial(checkpointed, draws=given.draws, save=save))
        found.append(Choice(f"selective {save}", held, sum(cost for _, cost in kept), lambda policy=policy: policy))
    schedules = {f"every {n}": every(count, n) for n in range(count - 1, 1, -1)} | {"block": every(count, 1)}
    best = optimal(pieces, room)
    for name, schedule in (schedules | ({"optimal": best} if best is not None else {})).items():
        held, cost = simulate(pieces, schedule)
        found.append(Choice(name, held, cost, lambda schedule=schedule: Scheduled(schedule)))
    return found


def _found(schedule: Schedule | None, pieces: Sequence[Piece], room: int) -> Schedule:
    if schedule is None:
        from scrimp.planview import size

        least_ = least(pieces)
        what = f"{size(room)} cannot hold what the blocks need at least, {size(least_)}."
        share = least_ / everything(pieces)
        fix = f"Give that much, which is a share of {share:.2f}, or lower `batch`."
        raise UserError(what, "techniques.recompute.budget", fix)
    return schedule
