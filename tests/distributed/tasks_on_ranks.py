"""What ranks do in tests of tasks: short runs of every one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from distributed.jobs import apart, files, state
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.stages import validation_batches
from scrimp.training import train
from tiny import recipe
from tiny_tasks import TINY, Items, Memory

TASKS = ("causal-lm", "masked-lm", "classify", "regress", "seq2seq", "denoise", "masked-image", "fragment")
COMPARING = ("contrastive", "embed")
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


def compared() -> dict[str, Any]:
    """task/layout -> how far its weights and its scores are from one process's, for losses that compare all items."""
    found: dict[str, Any] = {}
    for task in COMPARING:
        wanted = torch.load(files() / f"{task}.pt")
        for layout in LAYOUTS:
            result = train(made(task, layout), save=False, force=True)
            found[f"{task}/{layout}"] = [apart(state(result.run), wanted), result.validation]
    return found


def everything() -> dict[str, Any]:
    """task/layout -> what `validated` gives on the first rank."""
    return {f"{task}/{layout}": validated(task, layout) for task in TASKS for layout in LAYOUTS}
