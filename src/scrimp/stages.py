# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How long a run is, where its stages end, and what it is validated on: the same for training and for planning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scrimp.agree import configured
from scrimp.clock import Clock, Duration
from scrimp.plain import to_device
from scrimp.run import Run
from scrimp.tasks.sums import shareable
from scrimp.world import SAMPLES

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
    """The fixed validation set: the first windows of the held-out documents; none if the run is never validated.

    Ranks that see different samples each get a part, if the task adds up what they find.
    """
    if not Duration.parse(run.recipe.validate.every).value:
        return []
    size, held, count = run.recipe.batch, run.data.validation, _items(run)
    spans = (
        _own(count, size, run) if shared(run) else [np.arange(i, min(i + size, count)) for i in range(0, count, size)]
    )
    return [to_device(run.task.batch(held.read(ids), ids), run.device) for ids in spans]


def shared(run: Run) -> bool:
    """Whether each rank has a part of the validation set, and not all of it."""
    ranks = run.world.ranks(*SAMPLES)
    return 1 < ranks <= _items(run) and shareable(run.task)


def _items(run: Run) -> int:
    return min(run.recipe.validate.batches * run.recipe.batch, len(run.data.validation))


def _own(count: int, size: int, run: Run) -> list[np.ndarray]:
    """This rank's part of so many items, in batches."""
    ranks, place = run.world.ranks(*SAMPLES), run.world.place(*SAMPLES)
    # As many on each rank, none of them empty: a pass of sharded weights needs all ranks.
    batches = min(-(-count // size), count // ranks)
    return np.array_split(np.arange(place * count // ranks, (place + 1) * count // ranks), batches)
