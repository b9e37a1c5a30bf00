# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Whether the techniques of a run fit its model and its ranks, before anything is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torch import nn

from scrimp.errors import UserError
from scrimp.world import AXES, SAMPLES

if TYPE_CHECKING:
    from scrimp.run import Run

SERVING: Final = {"pipeline": ("pipeline",), "replica": ("replicate", "zero"), "data": ("replicate", "zero"),
                  "context": ("context",), "tensor": ("tensor",)}  # fmt: skip
"""Axis of the mesh -> the techniques to propose for it."""


def check_ranks(run: Run) -> None:
    """Whether techniques make use of every axis of the mesh.

    Raises:
        UserError: naming what is missing.
    """
    several = run.world.ranks(*SAMPLES) > 1
    for technique in run.order.techniques:
        if technique.card.alone and run.world.size > 1:
            what = f"does not go with several ranks: {technique.card.alone}"
            raise UserError(what, run.where(technique), "Drop it, or train on one.")
    task = run.recipe.task
    if several and not (getattr(task, "decomposes", True) or getattr(task, "gathers", False)):
        what = "its loss compares each item with the whole batch, of which each rank has a part."
        raise UserError(what, "task", "Train on one rank.")
    served = {axis for t in run.order.techniques for axis in t.card.axes}
    for axis in AXES:
        if run.world.ranks(axis) > 1 and axis not in served:
            names = " or ".join(f"`{name}`" for name in SERVING[axis])
            what = f"{run.world.ranks(axis)} ranks stand along the mesh's axis `{axis}`, and no technique uses it."
            raise UserError(what, "mesh", f"Add {names} to `techniques`.")


def check_needs(model: nn.Module, run: Run) -> None:
    """Whether the model offers the seams that techniques' cards name.

    Raises:
        UserError: naming the first that is missing.
    """
    offered = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for technique in run.order.techniques:
        for seam in technique.card.needs:
            if seam not in offered:
                what = f"`{technique.name}` needs the seam `{seam}`, which {type(model).__name__} does not have."
                raise UserError(what, run.where(technique), "Drop it, or use a model that offers the seam.")
