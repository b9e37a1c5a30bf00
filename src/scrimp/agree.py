# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What a recipe's model, task and data must agree on: sizes, the head, and what a batch is made of.

Options of 0 or "" in a model are taken from the others; those that are set must fit.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from scrimp.errors import UserError
from scrimp.registry import BUILT_IN, component_name

if TYPE_CHECKING:
    from scrimp.recipe import Recipe

LEAST: Final = ("vocab", "context", "segments")
"""Sizes of a model that may be larger than the data's; others must be equal."""
INPUTS: Final = ("vocab", "image")
"""Sizes that say what a model reads: texts, images."""
CHOSEN: Final = ("segments",)
"""Options of which 0 means none, so that it is not filled in."""


def sizes(data: Any) -> dict[str, int]:
    """What opened data say of themselves: vocab, context, classes, image, channels; those that they have."""
    said = getattr(data, "sizes", None)
    return said if said is not None else {"vocab": data.tokenizer.vocab, "context": data.train.context}


def configured(recipe: Recipe, data: Any) -> Any:
    """The model's options, with what is open taken from the data and the task.

    Raises:
        UserError: if the model does not fit the data or the task.
    """
    config: Any = recipe.model
    if not is_dataclass(recipe.model) or isinstance(recipe.model, type):
        return config
    _check_needs(recipe, data)
    _check_kind(recipe.task, config)
    known = {f.name for f in fields(config)}
    read = [name for name in INPUTS if name in sizes(data)]
    if read and not known.intersection(read) and known.intersection(INPUTS):
        name, source = component_name("models", config), component_name("datasets", recipe.data)
        what = f"the model `{name}` reads none of what the data `{source}` holds."
        raise UserError(what, "model", "Choose the model or the data set that belongs to the other.")
    for name, given in (sizes(data) | _added(recipe.task, data)).items():
        own = getattr(config, name) if name in known else None
        if own == 0 and name in CHOSEN:
            continue
        if own == 0:
            config = replace(config, **{name: given})
        elif own is not None and (own < given if name in LEAST else own != given):
            fix = f"Set model.{name} to {given}{' or more' if name in LEAST else ''}, or change data.{name}."
            raise UserError(f"the data's {name} is {given}, the model's {own}.", f"model.{name}", fix)
    for name in ("head", "pooling"):
        wanted = getattr(recipe.task, name, "")
        if wanted and name not in known:
            what = f"the task `{component_name('tasks', recipe.task)}` needs a model with a {name} `{wanted}`."
            raise UserError(what, "model", f"`{component_name('models', config)}` has none to choose.")
        if wanted and getattr(config, name) not in ("", wanted):
            what = f"the task needs `{wanted}`, not `{getattr(config, name)}`."
            raise UserError(what, f"model.{name}", "Leave it out.")
        config = replace(config, **{name: wanted}) if wanted else config
    return config


def _check_needs(recipe: Recipe, data: Any) -> None:
    """Whether the data hold what the task trains on."""
    needs, gives = getattr(recipe.task, "needs", ()), getattr(data, "gives", ("tokens",))
    lacking = [name for name in needs if name not in gives]
    if lacking:
        name, source = component_name("tasks", recipe.task), component_name("datasets", recipe.data)
        what = f"the task `{name}` needs {' and '.join(lacking)}, and the data `{source}` has {', '.join(gives)}."
        # Columns are named for one of what they hold: `label` for labels.
        unset = [f"data.{column}" for n in lacking if getattr(recipe.data, column := n.removesuffix("s"), None) == ""]
        fix = f"Set {' and '.join(unset)} to the column that has them, or choose" if unset else "Choose"
        raise UserError(what, "task", f"{fix} the task or the data set that belongs to the other.")


def _check_kind(task: Any, config: Any) -> None:
    """Whether a model of ours is one that the task trains; others' are not known by name."""
    wanted, name = getattr(task, "models", ()), component_name("models", config)
    if wanted and name in BUILT_IN["models"] and name not in wanted:
        what = f"the task `{component_name('tasks', task)}` trains a model `{' or '.join(wanted)}`, not `{name}`."
        raise UserError(what, "model", "Choose the model or the task that belongs to the other.")


def _added(task: Any, data: Any) -> dict[str, int]:
    """The vocabulary with the ids that a task adds to the tokenizer's, such as a mask; nothing where it adds none."""
    adds = getattr(task, "adds", None)
    more = adds(data) if adds is not None else 0
    return {"vocab": sizes(data)["vocab"] + more} if more else {}


def prepared(recipe: Recipe, data: Any) -> Any:
    """The task, with what it needs to know of the data (`prepared`) and of the model's options (`fitted`).

    Raises:
        UserError: if the data do not hold what the task trains on, or the model is none for it.
    """
    task = recipe.task
    _check_needs(recipe, data)
    prepare = getattr(task, "prepared", None)
    task = task if prepare is None else prepare(data)
    fit = getattr(task, "fitted", None)
    return task if fit is None else fit(configured(recipe, data))
