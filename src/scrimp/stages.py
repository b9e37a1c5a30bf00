# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How long a run is, and where its stages end: the same for training and for planning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scrimp.clock import Clock, Duration
from scrimp.run import Run, configured

if TYPE_CHECKING:
    from scrimp.recipe import Recipe


def new_clock(recipe: Recipe, data: Any) -> Clock:
    """The clock of a run that begins."""
    context = getattr(configured(recipe, data), "context", 0) or data.train.context
    tokens = min(context, data.train.context)
    return Clock.plan(Duration.parse(recipe.duration, "duration"), recipe.batch, tokens, len(data.train))


def stage_end(run: Run) -> int:
    """Where the current stage ends at the latest: the next point at which a technique wants the run rebuilt."""
    clock = run.clock
    points = [clock.at(d) for technique in run.order.slots["stages"] for d in technique.stages()]
    return min((p for p in points if p > clock.begun), default=clock.end)
