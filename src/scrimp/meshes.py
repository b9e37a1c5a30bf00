# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Layouts of ranks: meshes and the techniques that use them, and what arithmetic says of each.

    ZeRO        weights + gradients + states, each over d ranks from stage 3, 2, 1 on (arXiv 1910.02054)
    pipeline    idle (p - 1) / (k m + p - 1), and p of m micro-batches kept (arXiv 2104.04473), where k depends on the
                order; it follows from `timetable`, whose actions take as long forward as each half of them backward

Settings that a recipe gives to such a technique stay, but for those that a search chooses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

import yaml

from scrimp.recipe import Mesh
from scrimp.registry import technique_class

if TYPE_CHECKING:
    from scrimp.machines.machine import Machine
    from scrimp.planning import Plan
    from scrimp.recipe import Recipe
    from scrimp.technique import Technique

ORDERS: Final = {"1f1b": (1, 1), "interleaved": (2, 2), "zero_bubble": (1, 3), "zbv": (2, 6)}
"""Order of a pipeline -> (stages a rank, k: how many times as many micro-batches would make 1f1b idle as little)."""
CHOSEN: Final = ("stage", "order", "micro_batches")
"""Settings that a search chooses, and shows even where they are the default."""


@dataclass(frozen=True)
class Layout:
    """A mesh, and the techniques that use it."""

    mesh: Mesh
    techniques: tuple[Technique, ...] = ()

    def added(self, recipe: Recipe) -> Recipe:
        """The recipe with it, in place of its own mesh and what used that."""
        kept = (t for t in recipe.techniques if not t.card.axes)
        return replace(recipe, mesh=self.mesh, techniques=(*kept, *self.techniques))

    def lines(self) -> str:
        """As lines of a recipe."""
        axes = {axis: n for axis in ("pipeline", "replica", "data", "tensor") if (n := getattr(self.mesh, axis)) > 1}
        raw: dict[str, Any] = {"mesh": axes} if axes else {}
        given = {t.name: {f.name: v for f in fields(t) if (v := getattr(t, f.name)) != f.default or f.name in CHOSEN}
                 for t in self.techniques}  # fmt: skip
        raw |= {"techniques": given} if given else {}
        return yaml.safe_dump(raw, sort_keys=False, default_flow_style=None).strip() if raw else "# as it is"


def candidates(recipe: Recipe, on: Machine, single: Plan, ranks: int,
               refused: Counter[str]) -> Iterator[tuple[Layout, tuple[int, int]]]:  # fmt: skip
    """Layouts with (micro-batches, how much less a pipeline idles), without those that arithmetic refuses."""
    model: Any = recipe.model
    blocks, heads = getattr(model, "layers", 1), getattr(model, "heads", 1)
    groups = getattr(model, "kv_heads", 0) or heads
    node = on.node or ranks
    for p, r, d, t in factors(ranks, 4):
        samples = r * d
        if recipe.batch % samples:
            refused["the batch cannot be shared evenly"] += 1
        elif heads % t or groups % t:
            refused["heads cannot be shared evenly"] += 1
        elif t > node:
            refused["a layer would be shared between machines"] += 1
        elif p > blocks:
            refused["fewer blocks than stages"] += 1
        elif r > 1 and (p > 1 or ranks <= node or d * t != node):
            refused["replicas help between machines only"] += 1
        else:
            mesh = Mesh(pipeline=p, replica=r, data=d, tensor=t)
            yield from _with(mesh, recipe, recipe.batch // samples, blocks)


def _with(mesh: Mesh, recipe: Recipe, batch: int, blocks: int) -> Iterator[tuple[Layout, tuple[int, int]]]:
    """A mesh with every set of techniques that uses it."""
    layers = (_as_given(recipe, "tensor"),) if mesh.tensor > 1 else ()
    for share in _shares(mesh, recipe):
        if mesh.pipeline == 1:
            yield Layout(mesh, (*share, *layers)), (1, 1)
        else:
            for stages, parts in _pipelines(mesh, recipe, batch, blocks):
                yield Layout(mesh, (*share, *layers, stages)), parts


def _shares(mesh: Mesh, recipe: Recipe) -> list[tuple[Technique, ...]]:
    """Ways to share a batch; a pipeline gathers no weights for each micro-batch."""
    if mesh.replica * mesh.data == 1:
        return [()]
    stages = (1,) if mesh.pipeline > 1 else (1, 2, 3)
    found: list[tuple[Technique, ...]] = [(_as_given(recipe, "zero", stage=s),) for s in stages]
    return found + ([(_as_given(recipe, "replicate"),)] if mesh.replica == 1 else [])


def _pipelines(mesh: Mesh, recipe: Recipe, batch: int, blocks: int) -> Iterator[tuple[Technique, tuple[int, int]]]:
    """Orders with so many micro-batches; a recipe's own order only, where it has one that a search knows."""
    p = mesh.pipeline
    given: Any = next((t for t in recipe.techniques if t.name == "pipeline"), None)
    orders = (given.order,) if given is not None and given.order in ORDERS else tuple(ORDERS)
    if any("head loss" in t.card.sets for t in recipe.techniques):
        # It finishes all gradients in one pass, which these orders split in two.
        orders = tuple(order for order in orders if order not in ("zero_bubble", "zbv"))
    shared: Any = _as_given(recipe, "tensor")
    for order, (each, less) in ((order, ORDERS[order]) for order in orders):
        # Several stages a rank would each need their own exchange of tokens, which `tensor` has one of.
        if blocks < p * each or (each > 1 and mesh.tensor > 1 and shared.sequence):
            continue
        for m in (p, 2 * p, 4 * p, 8 * p):
            if batch % m == 0 and m >= p * each:
                made = _as_given(recipe, "pipeline", order=order, micro_batches=m, stages_per_rank=0, split=())
                yield made, (m, less)


def _as_given(recipe: Recipe, name: str, **chosen: Any) -> Technique:
    """A technique with a recipe's settings, but for some; with its defaults where the recipe lacks it."""
    given: Any = next((t for t in recipe.techniques if t.name == name), None)
    return replace(technique_class(name)() if given is None else given, **chosen)


def factors(ranks: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write a number as a product of so many."""
    if count == 1:
        yield (ranks,)
        return
    for first in (n for n in range(1, ranks + 1) if ranks % n == 0):
        for rest in factors(ranks // first, count - 1):
            yield (first, *rest)


def estimate(layout: Layout, single: Plan, ranks: int, parts: tuple[int, int]) -> tuple[float, float]:
    """(bytes a rank, seconds a step) by arithmetic, from a plan of the whole model on one device."""
    mesh, on, stage = layout.mesh, single.machine, single.worst
    (m, less), p, t, samples = parts, mesh.pipeline, mesh.tensor, mesh.data * mesh.replica
    kinds = stage.peak.kinds
    zero = next((int(getattr(x, "stage", 0)) for x in layout.techniques if x.name == "zero"), 0)
    grads = kinds["weights"] * stage.trained / max(stage.parameters, 1)
    held = sum(size / (p * t) / (mesh.data if zero >= least else 1)
               for size, least in ((kinds["weights"], 3), (grads, 2), (kinds["states"], 1)))  # fmt: skip
    passing = (kinds["activations"] + kinds["workspace"]) / (samples * t) * (1 / m if p > 1 else 1.0)
    memory = single.memory - stage.peak.total + held + passing
    idle = (p - 1) / (less * m + p - 1)
    # Every micro-batch launches the operators of the rank's blocks anew.
    launched = len(single.stages[-1].ops) * on.overhead * m / p
    seconds = max(single.stages[-1].seconds / ranks, launched) / (1 - idle)
    speed = on.speed(samples, t) or float("inf")
    # Stage 1 adds a broadcast of weights to the all-reduce; stage 3 gathers weights twice.
    seconds += (3 if zero in (1, 3) else 2) * grads / (p * t) * (samples - 1) / samples / speed
    model: Any = single.recipe.model
    stream = stage.tokens / samples * getattr(model, "width", 0) * 4
    speed = on.speed(t, 1) or float("inf")
    return memory, seconds + 8 * stream * getattr(model, "layers", 1) / p * (t - 1) / t / speed
