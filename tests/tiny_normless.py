"""A network without norms and nothing instead, and runs of every kind of model for techniques that take them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from scrimp.normless import fill, take_out_norms
from scrimp.recipe import Recipe
from scrimp.run import Run, build
from scrimp.stages import new_clock
from scrimp.technique import Card, Technique
from tiny import recipe
from tiny_tasks import TINY, Memory

KINDS = ("causal-lm", "masked-lm", "classify, images", "seq2seq", "masked-image", "contrastive")
"""A tiny task of every kind of model; `test_tasks.py` trains all others."""


@dataclass(frozen=True, kw_only=True)
class Bare(Technique):
    """No norms, and nothing instead."""

    card = Card(paper="none", section="Initialization", sets=("initialization", "normalization"))

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        take_out_norms(model)
        return model

    def init(self, model: nn.Module, run: Run) -> nn.Module:
        fill(model, run.seed, "bare")
        return model


def made(entry: str, *techniques: Technique, model: dict[str, Any] | None = None) -> Run:
    """A run of one of the tiny tasks, in float64."""
    tiny = TINY[entry]
    given = {**tiny.model, **(model or {})}
    wanted: Recipe = recipe(
        *techniques, model=given, data=Memory(entry), task=tiny.name or entry, duration="2 step", dtype="float64"
    )
    data = wanted.data.open()
    return build(wanted, data, new_clock(wanted, data))
