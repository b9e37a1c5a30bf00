# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How long a run is, where its stages end, and what it is validated on: the same for training and for planning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scrimp.agree import configured
from scrimp.clock import Clock, Duration
from scrimp.plain import to_device
from scrimp.run import Run

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.technique import Batch


def new_clock(recipe: Recipe, data: Any) -> Clock:
    """The clock of a run that begins."""
    context = getattr(configured(recipe, data), "context", 0) or data.train.context
    tokens = min(context, data.train.context)
    return Clock.plan(Duration.parse(recipe.duration, "duration"), recipe.batch, tokens, len(data.train))


def stage_end(run: Run) -> int:
    """Where the current stage ends at the latest: the next point at which a technique wants the run rebuilt."""
    clock = run.clock
    points = [clock.at(d) for technique in run.order.slots["stages"] for d in technique.stages()]
    return min([*(p for p in points if p > clock.begun), clock.end])


def validation_batches(run: Run) -> list[Batch]:
    """The fixed validation set: the first windows of the held-out documents; none if the run is never validated."""
    if not Duration.parse(run.recipe.validate.every).value:
        return []
    size, held = run.recipe.batch, run.data.validation
    count = min(run.recipe.validate.batches * size, len(held))
    spans = [np.arange(i, min(i + size, count)) for i in range(0, count, size)]
    return [to_device(run.task.batch(held.read(ids), ids), run.device) for ids in spans]
