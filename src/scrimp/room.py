# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Whether a run has room: refused before it starts when the plan says that it has not, and explained when it ran out.

A plan takes seconds, so that it is made only when a generous estimate comes near to what the machine has. A cgroup that
is exceeded ends the process without a word; that is why the refusal comes first.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Final

import torch

from scrimp.errors import UserError
from scrimp.limits import available, resident
from scrimp.run import configured, device_of

if TYPE_CHECKING:
    from scrimp.recipe import Recipe

PER_WEIGHT: Final = 32
"""Bytes a weight that the estimate allows: itself, its gradient, two moments, and as much again."""
PER_ACTIVATION: Final = 160
"""Bytes a token, block and channel: twice what a block keeps in float32."""
PER_LOGIT: Final = 16
WORDS: Final = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch says when a CPU's memory has run out."""


def check_room(recipe: Recipe, data: Any) -> None:
    """Refuse a run that will not fit on this machine.

    Raises:
        UserError: with what is missing and what would make it fit.
    """
    device = device_of(recipe)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available()
    if estimate(recipe, data) < free / 2:
        return
    from scrimp.fitting import fit
    from scrimp.machines.machine import free_here
    from scrimp.planning import plan

    machine = free_here(device.type)
    planned = plan(recipe, machine, data)
    held = resident() if machine.device == "cpu" else 0
    if planned.memory - held <= machine.memory:
        return
    from scrimp.planview import fitted, size

    what = f"the run will need {size(planned.memory)}, and {size(machine.memory + held)} are available."
    table = fitted(fit(recipe, machine, machine.memory + held, data))
    raise UserError(what, "memory", f"Start it anyway with --force, or change the recipe.\n{table}")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def explained(recipe: Recipe, data: Any) -> UserError:
    """The error for a run that ran out of memory, when its tensors are gone: what would make it fit."""
    from scrimp.fitting import fit
    from scrimp.machines.machine import free_here
    from scrimp.planview import fitted, size

    machine = free_here(device_of(recipe).type)
    limit = machine.memory + (resident() if machine.device == "cpu" else 0)
    found = fit(recipe, machine, limit, data)
    if found.given.fits:
        fix = f"The plan says that {size(found.given.memory)} suffice. What else holds memory on this machine?"
    else:
        fix = fitted(found)
    return UserError(f"memory ran out; {size(limit)} were available.", "memory", fix)


def estimate(recipe: Recipe, data: Any) -> int:
    """Bytes that a run will hardly exceed, from the model's options alone; a huge number for models of others."""
    c = configured(recipe, data)
    names = ("layers", "width", "vocab", "mlp")
    if not all(isinstance(getattr(c, name, None), int) for name in names):
        return 1 << 62
    tokens = recipe.batch * data.train.context
    weights = c.layers * c.width * (4 * c.width + 3 * c.mlp) + 2 * c.vocab * c.width
    return PER_WEIGHT * weights + tokens * (PER_ACTIVATION * prod((c.layers, c.width)) + PER_LOGIT * c.vocab)
