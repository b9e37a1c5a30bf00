"""A tiny data set and model for every task, in memory: steps of any technique on any of them.

A new task joins by an entry in `TINY`: what its items hold, what a model must know of them, and the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from scrimp.errors import UserError
from scrimp.recipe import Recipe
from scrimp.registry import BUILT_IN
from scrimp.run import build
from scrimp.stages import new_clock, validation_batches
from tiny import MODEL, Letters, example, recipe

CONTEXT, VOCAB, SIDE, CLASSES = 16, 32, 16, 3
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tiny:
    """How a task is tried."""

    items: Callable[[np.random.Generator, int], Arrays]
    """(generator, how many) -> arrays whose rows are items."""
    model: dict[str, Any]
    gives: tuple[str, ...]
    sizes: dict[str, int]
    name: str = ""
    """Of the task, where the entry is called otherwise."""


def tokens(chance: np.random.Generator, count: int, length: int = CONTEXT) -> np.ndarray:
    """Ids that are no special ones: int64 [count, length]."""
    return chance.integers(3, VOCAB, (count, length))


def texts(chance: np.random.Generator, count: int) -> Arrays:
    """Texts of several lengths, filled up."""
    lengths = chance.integers(4, CONTEXT + 1, count)
    lengths[0] = CONTEXT
    return {"tokens": tokens(chance, count), "attended": np.arange(CONTEXT) < lengths[:, None]}


def images(chance: np.random.Generator, count: int) -> Arrays:
    return {"images": chance.standard_normal((count, 3, SIDE, SIDE)).astype(np.float32)}


def packed(chance: np.random.Generator, count: int) -> Arrays:
    """Two documents a window, of which the ends are learned."""
    ids = tokens(chance, count)
    documents = np.tile(np.arange(CONTEXT) // 8, (count, 1))
    learned = np.tile(np.arange(CONTEXT) % 8 > 3, (count, 1))
    return {"tokens": ids, "targets": np.where(learned, ids, -100), "documents": documents}


def pairs(chance: np.random.Generator, count: int, names: tuple[str, str]) -> Arrays:
    found: Arrays = {}
    for name in names:
        found[name] = tokens(chance, count)
        found[f"{name}_length"] = np.full(count, CONTEXT)
    return found


def embedded(chance: np.random.Generator, count: int) -> Arrays:
    one, two = texts(chance, count), texts(chance, count)
    return one | {f"pair_{name}": value for name, value in two.items()}


def captioned(chance: np.random.Generator, count: int) -> Arrays:
    text = {"captions": tokens(chance, count), "caption_length": np.full(count, CONTEXT)}
    return images(chance, count) | text


TEXT = {"vocab": VOCAB, "context": CONTEXT}
PICTURE = {"image": SIDE, "channels": 3}
ENCODER = {**MODEL, "causal": False}
VIT = {**MODEL, "name": "vision", "patch": 4}
TINY: dict[str, Tiny] = {
    "causal-lm": Tiny(lambda r, n: {"tokens": tokens(r, n, CONTEXT + 1)}, MODEL, ("tokens",), TEXT),
    "causal-lm, packed": Tiny(packed, MODEL, ("tokens",), TEXT, "causal-lm"),
    "masked-lm": Tiny(texts, ENCODER, ("texts",), TEXT),
    "classify": Tiny(
        lambda r, n: texts(r, n) | {"labels": r.integers(0, CLASSES, n)}, ENCODER, ("texts", "labels"),
        {**TEXT, "classes": CLASSES},
    ),
    "classify, images": Tiny(
        lambda r, n: images(r, n) | {"labels": r.integers(0, CLASSES, n)}, VIT, ("images", "labels"),
        {**PICTURE, "classes": CLASSES}, "classify",
    ),
    "regress": Tiny(
        lambda r, n: texts(r, n) | {"scores": r.standard_normal(n).astype(np.float32)}, ENCODER, ("texts", "scores"),
        {**TEXT, "classes": 1},
    ),
    "embed": Tiny(embedded, ENCODER, ("texts", "pair_tokens"), TEXT),
    "seq2seq": Tiny(
        lambda r, n: pairs(r, n, ("source", "target")), {**MODEL, "name": "encoder_decoder"}, ("source", "target"), TEXT
    ),
    "denoise": Tiny(
        lambda r, n: {"tokens": tokens(r, n, CONTEXT + 1)}, {**MODEL, "name": "encoder_decoder"}, ("tokens",), TEXT
    ),
    "masked-image": Tiny(
        images, {**VIT, "name": "masked_autoencoder", "decoder_layers": 1, "decoder_width": 16, "decoder_heads": 2},
        ("images",), PICTURE,
    ),
    "masked-image, mask tokens": Tiny(
        images, {**VIT, "name": "masked_autoencoder", "decoder_layers": 1, "decoder_width": 16, "decoder_heads": 2,
                 "drop": False},
        ("images",), PICTURE, "masked-image",
    ),
    "fragment": Tiny(
        lambda r, n: {"tokens": tokens(r, n, CONTEXT + 1)},
        {**MODEL, "name": "encoder_decoder", "layers": 3, "decoder_layers": 1}, ("tokens",), TEXT,
    ),
    "contrastive": Tiny(
        captioned, {**MODEL, "name": "two_towers", "patch": 8, "projection": 16}, ("images", "captions"),
        {**TEXT, **PICTURE},
    ),
}  # fmt: skip


class Items:
    """Rows of arrays."""

    def __init__(self, arrays: Arrays, context: int) -> None:
        self.arrays, self.context = arrays, context

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> Arrays:
        return {name: value[np.asarray(ids)] for name, value in self.arrays.items()}


class Words(Letters):
    """A tokenizer with a mask."""

    mask, pad = 1, 2
    special = frozenset({0, 1, 2})


@dataclass(frozen=True)
class Memory:
    """The data set of an entry of `TINY`."""

    entry: str
    seeds: tuple[int, int] = field(default=(0, 1))

    def open(self) -> Any:
        tiny = TINY[self.entry]
        context = tiny.sizes.get("context", 0)
        train, held = (
            Items(tiny.items(np.random.default_rng(seed), count), context)
            for seed, count in zip(self.seeds, (16, 8), strict=True)
        )
        return SimpleNamespace(train=train, validation=held, tokenizer=Words(), gives=tiny.gives, sizes=tiny.sizes)


def entries() -> list[str]:
    """Those whose task and model are registered."""
    return [
        key
        for key, tiny in TINY.items()
        if (tiny.name or key) in BUILT_IN["tasks"] and tiny.model.get("name", "transformer") in BUILT_IN["models"]
    ]


def recipe_for(entry: str, *names: str) -> Recipe:
    """A tiny recipe of a task with techniques by name, with their cards' examples."""
    tiny = TINY[entry]
    made = [example(name) for name in names]
    return recipe(*made, model=dict(tiny.model), data=Memory(entry), task=tiny.name or entry, duration="2 step")


def tried(entry: str, *names: str, steps: int = 1) -> dict[str, str]:
    """Steps and a validation of techniques on a task.

    Returns:
        `verdict`: `trains`; `refused` with the `reason`, which a user is told; or `fails` with what was raised.
    """
    try:
        made = recipe_for(entry, *names)
        data = made.data.open()
        run = build(made, data, new_clock(made, data))
        assert run.backward and run.step and run.optimizer and run.evaluate
        for _ in range(steps):
            batch = run.batch(run.clock.step)
            run.set_lr()
            loss = run.read(run.backward(batch, run.task.count(batch)), worst=0.0)
            if not math.isfinite(loss):
                return {"verdict": "fails", "reason": f"the loss is {loss}"}
            run.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.clock.tick(made.batch, 1)
        held = validation_batches(run)
        score = run.evaluate(lambda model: run.task.evaluate(model, held))["loss"]
        return (
            {"verdict": "trains"} if math.isfinite(score) else {"verdict": "fails", "reason": f"validates to {score}"}
        )
    except UserError as error:
        return {"verdict": "refused", "reason": " ".join(str(error).split())}
    except Exception as error:
        return {"verdict": "fails", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
