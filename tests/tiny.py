"""A tiny run: two seconds of everything, on tokens that are in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrimp.errors import UserError
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.run import Run, build
from scrimp.stages import new_clock
from scrimp.technique import Technique


class Stream:
    """Windows of fixed random tokens."""

    def __init__(self, count: int, context: int, vocab: int, seed: int) -> None:
        self.count, self.context = count, context
        self.tokens = np.random.default_rng(seed).integers(0, vocab, count * context + 1)

    def __len__(self) -> int:
        return self.count

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        return {"tokens": self.windows(ids)}

    def windows(self, ids: np.ndarray) -> np.ndarray:
        return self.tokens[np.asarray(ids)[:, None] * self.context + np.arange(self.context + 1)]


class Letters:
    """A tokenizer of 32 ids."""

    vocab, end = 32, 0

    def encode(self, text: str) -> list[int]:
        return [1 + ord(letter) % 31 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class TinyData:
    """A data set in memory, as somebody's own package would bring it."""

    context: int = 16
    items: int = 40

    def open(self) -> Any:
        @dataclass
        class Opened:
            train: Stream
            validation: Stream
            tokenizer: Letters

        return Opened(Stream(self.items, self.context, 32, 0), Stream(8, self.context, 32, 1), Letters())


MODEL = {"layers": 4, "width": 32, "heads": 2, "dropout": 0.1}


def example(name: str, **settings: Any) -> Technique:
    """A technique with its card's example settings."""
    kind = technique_class(name)
    return kind(**{**kind.card.example, **settings})


HOME = {"flip": "contrastive", "mae": "masked-image, mask tokens", "mass": "fragment", "vpt": "masked-image"}
"""Techniques of one task only -> that task's entry in `tiny_tasks.TINY`, where they are tried."""


def homes(*names: str) -> set[str]:
    """Entries of the tasks that some of these techniques need."""
    return {HOME[name] for name in names if name in HOME}


def home(*names: str) -> dict[str, Any]:
    """Model, data and task on which these techniques are tried together: the first home among them, or tokens."""
    from tiny_tasks import TINY, Memory

    if not homes(*names):
        return {"model": MODEL, "data": TinyData()}
    entry = min(homes(*names))
    return {"model": dict(TINY[entry].model), "data": Memory(entry), "task": TINY[entry].name or entry}


def at_home(*names: str) -> bool:
    """Whether the home of one of these techniques takes the others: some tasks refuse some techniques."""
    if len(homes(*names)) > 1:
        return False
    return all(taken(host, name) for host in names if host in HOME for name in names if name != host)


@cache
def taken(host: str, name: str) -> bool:
    """Whether the home of a technique takes another one."""
    try:
        run_of(recipe(example(host), example(name)))
    except UserError:
        return False
    return True


def recipe(*techniques: Technique, **settings: Any) -> Recipe:
    """A tiny recipe; SGD is its update rule when no technique sets one."""
    if not any("update rule" in t.card.sets for t in techniques):
        techniques = (*techniques, example("sgd"))
    settings = home(*(t.name for t in techniques)) | {"batch": 4, "duration": "8 step"} | settings
    settings.setdefault("log", {"tensorboard": False})
    # Twice; by default it would be after every step, which takes a third of the time.
    settings.setdefault("validate", {"every": 0.5})
    settings.setdefault("sample", {"tokens": 4})
    return Recipe(techniques=techniques, **settings)


def run_of(made: Recipe, **more: Any) -> Run:
    """A built run of a recipe."""
    data = made.data.open()
    return build(made, data, new_clock(made, data), **more)


def step(run: Run) -> None:
    """One step, as the loop does it."""
    assert run.backward and run.step and run.optimizer
    batch = run.batch(run.clock.step)
    count = run.task.count(batch)
    run.set_lr()
    run.backward(batch, count)
    run.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.clock.tick(run.recipe.batch, int(count))


def keep(record: Any, technique: str, library: str, difference: float) -> None:
    """Tell `benchmarks/parity.py` how far a technique is from a library's: `record` is pytest's record_property."""
    for name, value in {"technique": technique, "library": library, "difference": difference}.items():
        record(name, value)


def flat(state: dict[str, Any]) -> dict[str, Tensor]:
    """A state as one table of copies."""
    return {f"{kind}/{name}": t.detach().clone() for kind, tensors in state.items() for name, t in tensors.items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bitwise equality of two tables."""
    assert a.keys() == b.keys(), f"different tensors: {sorted(a.keys() ^ b.keys())[:4]}"
    off = [name for name in a if not torch.equal(a[name], b[name])]
    assert not off, f"{len(off)} tensors differ, first {off[0]}: {(a[off[0]] - b[off[0]]).abs().max()}"
