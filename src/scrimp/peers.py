# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Losses that compare each item with the whole batch, of which each rank has a part.

    L = sum over ranks of L_r,  L_r = the losses of the rank's own items, each compared with the items of all ranks

Embeddings are gathered, and the gradients of what is gathered are summed to the rank that it came from: the loss and
its gradient are those of one process with the whole batch.
"""

from __future__ import annotations

from typing import Any

from scrimp.lanes import Ranks
from scrimp.world import SAMPLES, World


def among(task: Any, world: World) -> Any:
    """A task among ranks that see other samples; one whose loss is a sum over items stays as it is."""
    ranks = world.ranks(*SAMPLES)
    if ranks == 1 or not hasattr(task, "among"):
        return task
    return task.among(Ranks(world.group(*SAMPLES), ranks, world.place(*SAMPLES)))
