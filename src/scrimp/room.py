# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Whether a run has room: refused before it starts when the plan says that it has not, and explained when it ran out.

A plan takes seconds, so that it is made only when a generous estimate comes near to what the machine has. A cgroup that
is exceeded ends the process without a word; that is why the refusal comes first.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Final

import torch

from scrimp.agree import configured
from scrimp.errors import UserError
from scrimp.limits import available
from scrimp.registry import component_name
from scrimp.run import device_of

if TYPE_CHECKING:
    from scrimp.clock import Clock
    from scrimp.recipe import Recipe

PER_WEIGHT: Final = 8
"""Copies of each weight that the estimate allows: itself, its gradient, two moments, and as much again."""
PER_CHANNEL: Final = (20, 8)
"""Values a token and block keeps, for each channel of the width and of the MLP: twice what a block has."""
PER_LOGIT: Final = 4
"""Values a token keeps for each entry of the vocabulary."""
WORDS: Final = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch says when memory has run out."""


def check_room(recipe: Recipe, data: Any, clock: Clock | None = None) -> None:
    """Refuse a run that will not fit on this machine. One that cannot be planned is let through.

    Args:
        clock: where a resumed run goes on.
    Raises:
        UserError: with what is missing and what would make it fit.
    """
    device = device_of(recipe)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available()
    if estimate(recipe, data) < free / 2:
        return
    from scrimp.dryrun import CannotPlanError
    from scrimp.fitting import fit
    from scrimp.machines.machine import free_here
    from scrimp.planning import plan
    from scrimp.planview import fitted, size

    machine = free_here(device.type)
    try:
        planned = plan(recipe, machine, data, clock=clock)
    except CannotPlanError:
        return
    if planned.fits:
        return
    what = f"the run will need {size(planned.memory)}, and {size(machine.memory)} are available."
    table = fitted(fit(recipe, machine, machine.memory, data))
    raise UserError(what, "memory", f"Start it anyway with --force, or change the recipe.\n{table}")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def explained(recipe: Recipe, data: Any) -> UserError:
    """The error for a run that ran out of memory, when its tensors are gone: what would make it fit."""
    from scrimp.dryrun import CannotPlanError
    from scrimp.fitting import fit
    from scrimp.machines.machine import free_here
    from scrimp.planview import fitted, size

    gc.collect()
    device = device_of(recipe)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    machine = free_here(device.type)
    try:
        found = fit(recipe, machine, machine.memory, data)
    except CannotPlanError as error:
        return UserError("memory ran out.", "memory", f"The recipe cannot be planned: {error}")
    fix = fitted(found)
    if found.given.fits:
        fix = f"The plan says that {size(found.given.memory)} suffice. What else holds memory on this machine?"
    return UserError(f"memory ran out; {size(machine.memory)} were available.", "memory", fix)


def estimate(recipe: Recipe, data: Any) -> int:
    """Bytes that a run will hardly exceed, from the model's options alone; a huge number for other models."""
    c = configured(recipe, data)
    if component_name("models", c) != "transformer":
        return 1 << 62
    item = torch.finfo(getattr(torch, recipe.dtype)).bits // 8
    weights = c.layers * c.width * (4 * c.width + 3 * c.mlp) + 2 * c.vocab * c.width
    kept = c.layers * (PER_CHANNEL[0] * c.width + PER_CHANNEL[1] * c.mlp) + PER_LOGIT * c.vocab
    # Half precision saves less than half where sums and statistics stay in float32.
    return max(item, 4) * (PER_WEIGHT * weights + recipe.batch * data.train.context * kept)
