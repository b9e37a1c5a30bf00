"""What ranks do in tests of validation: short runs of every task, whose scores are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.stages import validation_batches
from scrimp.training import train
from tiny import recipe
from tiny_tasks import TINY, Items, Memory

TASKS = ("causal-lm", "masked-lm", "classify", "regress", "seq2seq", "denoise", "masked-image", "fragment")
LAYOUTS = {"replicate": {}, "zero": {"stage": 3}}


@dataclass(frozen=True)
class Odd(Memory):
    """Seven items to validate on: no multiple of the ranks, nor of the batch."""

    def open(self) -> Any:
        """As `Memory`'s."""
        data = super().open()
        data.validation = Items({name: rows[:7] for name, rows in data.validation.arrays.items()},
                                data.validation.context)  # fmt: skip
        return data


def validated(task: str, *beside: str) -> tuple[dict[str, float], int]:
    """The scores after a step, and how many items this process has looked at."""
    result = train(made(task, *beside), save=False, force=True)
    return result.validation, sum(len(next(iter(batch.values()))) for batch in validation_batches(result.run))


def made(task: str, *beside: str) -> Recipe:
    """A run of one step."""
    techniques = [technique_class(name)(**LAYOUTS[name]) for name in beside]
    return recipe(technique_class("sgd")(lr=0.01), *techniques, model=dict(TINY[task].model), data=Odd(task), task=task,
                  dtype="float64", duration="1 step", sample={"tokens": 0},
                  validate={"every": "1 step", "batches": 9})  # fmt: skip


def everything() -> dict[str, Any]:
    """task/layout -> what `validated` gives on the first rank."""
    return {f"{task}/{layout}": validated(task, layout) for task in TASKS for layout in LAYOUTS}
