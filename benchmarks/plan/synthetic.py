"""Random tokens, and the recipe of a case over them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from scrimp.data.outline import Vocabulary
from scrimp.recipe import Recipe
from scrimp.registry import technique_class


@dataclass(frozen=True)
class Stream:
    """Windows of tokens in memory."""

    tokens: np.ndarray
    context: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def windows(self, ids: np.ndarray) -> np.ndarray:
        """[len(ids), context + 1]."""
        return self.tokens[np.asarray(ids)[:, None] * self.context + np.arange(self.context + 1)].astype(np.int64)


@dataclass(frozen=True)
class Synthetic:
    """A data set of random tokens."""

    vocab: int
    context: int

    def open(self) -> Any:
        """64 windows to train, 32 to validate."""
        draw = np.random.default_rng(0).integers(0, self.vocab, 96 * self.context + 1, dtype=np.uint16)
        train, held = draw[: 64 * self.context + 1], draw[64 * self.context :]
        return SimpleNamespace(
            train=Stream(train, self.context), validation=Stream(held, self.context), tokenizer=Vocabulary(self.vocab)
        )


def recipe(case: dict[str, Any], out: str, steps: int = 8) -> Recipe:
    """The recipe of a case."""
    techniques = tuple(technique_class(name)(**settings) for name, settings in case["techniques"].items())
    settings: dict[str, Any] = {
        "log": {"tensorboard": False}, "sample": {"tokens": 0}, "validate": {"every": 0.5, "batches": 1},
        "checkpoint": {"every": 0.5},
    }  # fmt: skip
    return Recipe(
        model=case["model"], data=Synthetic(case["vocab"], case["context"]), batch=case["batch"], dtype=case["dtype"],
        techniques=techniques, duration=f"{steps} step", device="cpu", out=out, **settings,
    )  # fmt: skip
