"""What a recipe's values must obey beyond their types: bounds, choices, and what only makes sense together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from scrimp.arrange import clashes, misfits
from scrimp.clock import Duration
from scrimp.errors import UserError
from scrimp.registry import component_name

if TYPE_CHECKING:
    from scrimp.recipe import Recipe

LEAST: Final = {"batch": 1, "seed": 0, "validate.batches": 0, "checkpoint.keep": 1, "stop.patience": 0,
                "sample.tokens": 0, "sample.temperature": 0, "mesh.data": 0, "mesh.tensor": 1, "mesh.pipeline": 1,
                "mesh.replica": 1}  # fmt: skip
"""The smallest value of numbers that have one."""
CHOICES: Final = {"device": ("auto", "cpu", "cuda"), "dtype": ("float32", "float64", "bfloat16")}
"""The values of words that have few."""
DURATIONS: Final = ("duration", "validate.every", "checkpoint.every")
NO_RULE: Final = "no technique sets the update rule."


def broken(values: Mapping[str, Any], techniques: Any) -> list[UserError]:
    """Every rule that is not kept.

    Args:
        values: of a recipe, by key; None where a value was already faulty.
        techniques: what stands where techniques should.
    """
    rules = (_bounds, _choices, _durations, _name, _validation)
    return [fault for rule in rules for fault in rule(values)] + _together(techniques, values["task"])


def notes(recipe: Recipe) -> list[str]:
    """What is allowed in a run that starts from nothing, and hardly meant: a line each."""
    if getattr(recipe.model, "source", None) != "":
        return []
    start = "Start from a folder (`model: {from: FOLDER}`) or from a run (--from RUN)"
    return [
        f"Note: `{technique.name}` freezes all other weights, and they are random. {start}."
        for technique in recipe.techniques
        if technique.card.trains
    ]


def value_of(values: Mapping[str, Any], path: str) -> Any:
    """The value at a path such as `validate.every`; None where the section itself was faulty."""
    section, _, name = path.rpartition(".")
    return getattr(values[section], name, None) if section else values[name]


def _bounds(values: Mapping[str, Any]) -> Iterator[UserError]:
    for where, least in LEAST.items():
        value = value_of(values, where)
        if value is not None and not value >= least:
            yield UserError(f"must be at least {least}, not {value}.", where)
    if values["seed"] is not None and values["seed"] >= 2**63:
        yield UserError("must be below 2**63.", "seed")


def _choices(values: Mapping[str, Any]) -> Iterator[UserError]:
    for where, known in CHOICES.items():
        if values[where] is not None and values[where] not in known:
            yield UserError(f"`{values[where]}` is not one of {', '.join(known)}.", where)


def _durations(values: Mapping[str, Any]) -> Iterator[UserError]:
    fix = "Write how long it is, such as `2000 step`, `5e6 tok` or `1 epoch`."
    for where in DURATIONS:
        text = value_of(values, where)
        if text is None:
            continue
        try:
            given = Duration.parse(text, where)
        except UserError as error:
            yield error
            continue
        if where == "duration" and given.value == 0:
            yield UserError(f"`{text}` trains nothing.", where, fix)
        elif where == "duration" and given.unit == "run":
            yield UserError(f"`{text}` has no unit, and a run's own duration cannot be a fraction of it.", where, fix)


def _name(values: Mapping[str, Any]) -> Iterator[UserError]:
    name = values["name"] or ""
    if name in (".", "..") or any(letter in name for letter in "/\\\0"):
        yield UserError(f"`{name}` is not the name of a folder.", "name", "Set `out` to choose where the folder is.")


def _validation(values: Mapping[str, Any]) -> Iterator[UserError]:
    try:
        never = Duration.parse(value_of(values, "validate.every")).value == 0
    except UserError:
        never = False
    if not never and value_of(values, "validate.batches") != 0:
        return
    fix = "Set `validate.every` and `validate.batches` above 0, or drop it."
    for where, what in (("checkpoint.best", "keeps the checkpoint of"), ("stop.patience", "waits for")):
        if value_of(values, where):
            yield UserError(f"{what} the lowest validation loss, but validation is off.", where, fix)


def _together(techniques: Any, task: Any) -> list[UserError]:
    wrong = misfits(techniques)
    if wrong:
        return wrong
    faults = clashes(techniques) + _parts(techniques, task)
    if not any("update rule" in technique.card.sets for technique in techniques):
        faults.append(UserError(NO_RULE, "techniques", "Add one of adamw, adam, lion or sgd."))
    return faults


def _parts(techniques: Any, task: Any) -> list[UserError]:
    """Techniques that compute a batch in parts, for a task whose loss is not the sum of its parts'."""
    if getattr(task, "decomposes", True):
        return []
    name = component_name("tasks", task)
    what = f"it computes a batch in parts, and the loss of the task `{name}` compares each item with the whole batch."
    fix = "Drop it: parts would be compared with themselves only. Lower `batch`, or save activations by recompute."
    return [UserError(what, f"techniques.{t.name}", fix) for t in techniques if t.card.micro_batches]
