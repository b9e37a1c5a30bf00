"""What ranks do in tests of shared tokens: everything in one start."""

from __future__ import annotations

from typing import Any

from distributed.jobs import apart, files, made, state
from scrimp.meter import LiveBytes
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.training import train
from tiny import TinyData, example, recipe
from tiny_tasks import TINY, Memory

KINDS = ("ring", "ulysses")
MESH = {"context": 2, "data": 1}


def shared(kind: str) -> Any:
    """The technique."""
    return technique_class("context")(kind=kind)


def padded(*beside: Any, **settings: Any) -> Recipe:
    """A run of a masked language model on texts of various lengths."""
    model = dict(TINY["masked-lm"].model)
    return recipe(technique_class("sgd")(lr=0.1), *beside, model=model, data=Memory("masked-lm"), task="masked-lm",
                  batch=4, dtype="float64", duration="2 step", sample={"tokens": 0},
                  validate={"every": 0}, **settings)  # fmt: skip


def long(*beside: Any, **settings: Any) -> Recipe:
    """A run whose memory is planned and counted: activations are most of it."""
    model = {"layers": 2, "width": 32, "heads": 4, "dropout": 0.1}
    return recipe(example("adamw"), *beside, model=model, data=TinyData(context=128), batch=8, duration="3 step",
                  sample={"tokens": 0}, validate={"every": 0}, **settings)  # fmt: skip


def counted(made: Recipe) -> int:
    """The highest live bytes."""
    with LiveBytes() as meter:
        train(made, save=False, force=True)
    return meter.peak


def everything() -> dict[str, Any]:
    """A run is saved on the way; differences from one process, whose result a file holds; the highest live bytes."""
    import torch

    settings = {"data": "text", "out": str(files()), "name": "run", "checkpoint": {"every": "2 step", "keep": 9}}
    train(made(shared("ring"), mesh=MESH, **settings), data=made().data.open(), force=True)
    wanted, compiled = torch.load(files() / "padded.pt"), technique_class("compile")(backend="eager")

    def gap(*techniques: Any) -> float:
        return apart(state(train(padded(*techniques, mesh=MESH), save=False, force=True).run), wanted)

    return {
        "padded": {kind: gap(shared(kind)) for kind in KINDS},
        "compiled": {kind: gap(shared(kind), compiled) for kind in KINDS},
        "live": {kind: counted(long(shared(kind), mesh=MESH)) for kind in KINDS},
    }
