# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Which layout of ranks to choose: meshes and the techniques that use them, by predicted time under a limit of memory.

One plan of the whole model on one device gives bytes and seconds, from which arithmetic estimates every layout:

    ZeRO        weights + gradients + states, each over d ranks from stage 3, 2, 1 on (arXiv 1910.02054)
    pipeline    idle (p - 1) / (v m + p - 1), and p of m micro-batches kept (arXiv 2104.04473)

The best of these are planned in full, the first and the last rank of a pipeline. All times are predictions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import yaml

from scrimp.errors import UserError
from scrimp.machines.machine import Machine
from scrimp.planning import Plan, outlined, plan
from scrimp.planview import duration, size
from scrimp.recipe import Mesh
from scrimp.registry import technique_class

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.technique import Technique

PLANS: Final = 6
"""Layouts that are planned in full, at most."""
SLACK: Final = 1.3
"""By how much an estimate may exceed the limit and still be planned."""


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
        given = {t.name: {k: v for k, v in vars(t).items() if k in ("stage", "order", "micro_batches")}
                 for t in self.techniques}  # fmt: skip
        raw |= {"techniques": given} if given else {}
        return yaml.safe_dump(raw, sort_keys=False, default_flow_style=None).strip() if raw else "# as it is"


@dataclass
class Option:
    """A layout with the plans of its first and last rank."""

    layout: Layout
    plans: list[Plan]

    @property
    def slowest(self) -> Plan:
        """Of the rank that takes longest."""
        return max(self.plans, key=lambda p: p.seconds)

    @property
    def memory(self) -> int:
        """Bytes of the rank that needs most."""
        return max(p.memory for p in self.plans)

    @property
    def seconds(self) -> float:
        """Of a step of the last stage."""
        return self.slowest.stages[-1].seconds

    def shares(self) -> dict[str, float]:
        """compute, links, bubble -> share of the step."""
        step = self.slowest.stages[-1]
        busy = step.seconds - step.sending - step.waiting
        parts = {"compute": busy, "links": step.sending, "bubble": step.waiting}
        return {name: time / max(step.seconds, 1e-12) for name, time in parts.items()}


@dataclass
class Found:
    """What a search found."""

    limit: int
    options: list[Option]
    """Those that fit, by predicted time."""
    large: list[Option]
    """Those that were planned and do not fit, by what they need."""
    refused: Counter[str] = field(default_factory=Counter[str])
    """Reason -> layouts."""


def search(recipe: Recipe, on: Machine, ranks: int, data: Any = None,
           say: Callable[[str], None] = lambda text: None) -> Found:  # fmt: skip
    """Search layouts of so many ranks.

    Args:
        on: the device; its memory is the limit.
        say: hears every layout that is planned.
    Raises:
        UserError: where the recipe cannot be planned on one device.
    """
    data = outlined(recipe) if data is None else data
    single = plan(Layout(Mesh(data=1)).added(recipe), on, data)
    found = Found(on.memory, [], [])
    if ranks == 1:
        (found.options if single.fits else found.large).append(Option(Layout(Mesh(data=1)), [single]))
        return found
    guesses = [(*estimate(layout, single, ranks, parts), layout) for layout, parts in
               candidates(recipe, on, single, ranks, found.refused)]  # fmt: skip
    near = sorted((g for g in guesses if g[0] <= SLACK * on.memory), key=lambda g: g[1])
    least = sorted((g for g in guesses if g not in near), key=lambda g: g[0])
    found.refused["estimated to need more memory"] += len(least)
    for tried, (_, _, layout) in enumerate(_various(near)[:PLANS] + least[:2]):
        if tried >= len(_various(near)[:PLANS]) and found.options:
            break
        say(layout.lines().replace("\n", " "))
        try:
            option = planned(layout, recipe, on, ranks, data)
        except UserError as error:
            found.refused[str(error).splitlines()[0]] += 1
            continue
        (found.options if option.memory <= on.memory else found.large).append(option)
    found.options.sort(key=lambda o: o.slowest.seconds)
    found.large.sort(key=lambda o: o.memory)
    return found


def planned(layout: Layout, recipe: Recipe, on: Machine, ranks: int, data: Any) -> Option:
    """A layout planned in full."""
    places = {0, ranks - 1} if layout.mesh.pipeline > 1 else {0}
    option = Option(layout, [plan(layout.added(recipe), on, data, ranks, rank=place) for place in sorted(places)])
    for stage in (stage for made in option.plans for stage in made.stages):
        stage.ops, stage.line = [], []
    return option


def _various(guesses: list[tuple[float, float, Layout]]) -> list[tuple[float, float, Layout]]:
    """The best of every mesh and set of techniques: orders and micro-batches apart."""
    best: dict[tuple[Any, ...], tuple[float, float, Layout]] = {}
    for guess in guesses:
        techniques = tuple(t for t in guess[2].techniques if t.name != "pipeline")
        best.setdefault((guess[2].mesh, techniques), guess)
    return list(best.values())


def candidates(recipe: Recipe, on: Machine, single: Plan, ranks: int,
               refused: Counter[str]) -> Iterator[tuple[Layout, tuple[int, int]]]:  # fmt: skip
    """Layouts with (micro-batches, stages a rank), without those that arithmetic refuses."""
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
            yield from _with(mesh, recipe.batch // samples, blocks)


def _with(mesh: Mesh, batch: int, blocks: int) -> Iterator[tuple[Layout, tuple[int, int]]]:
    """A mesh with every set of techniques that uses it."""
    samples, p = mesh.replica * mesh.data, mesh.pipeline
    layers = (technique_class("tensor")(),) if mesh.tensor > 1 else ()
    shares: list[tuple[Technique, ...]] = [()]
    if samples > 1:
        zero: Any = technique_class("zero")
        shares = [(zero(stage=s),) for s in ((1,) if p > 1 else (1, 2, 3))]
        shares += [(technique_class("replicate")(),)] if mesh.replica == 1 else []
    kind: Any = technique_class("pipeline")
    for share in shares:
        if p == 1:
            yield Layout(mesh, (*share, *layers)), (1, 1)
            continue
        # Several stages a rank would each need their own exchange of tokens, which `tensor` has one of.
        for order, each in (("1f1b", 1), ("interleaved", 2))[: 1 if layers else 2]:
            for m in (p, 2 * p, 4 * p, 8 * p):
                if batch % m == 0 and blocks >= p * each and m >= p * each:
                    yield Layout(mesh, (*share, *layers, kind(order=order, micro_batches=m))), (m, each)


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
    (m, each), p, t, samples = parts, mesh.pipeline, mesh.tensor, mesh.data * mesh.replica
    kinds = stage.peak.kinds
    zero = next((int(getattr(x, "stage", 0)) for x in layout.techniques if x.name == "zero"), 0)
    grads = kinds["weights"] * stage.trained / max(stage.parameters, 1)
    held = sum(size / (p * t) / (mesh.data if zero >= least else 1)
               for size, least in ((kinds["weights"], 3), (grads, 2), (kinds["states"], 1)))  # fmt: skip
    passing = (kinds["activations"] + kinds["workspace"]) / (samples * t) * (1 / m if p > 1 else 1.0)
    memory = single.memory - stage.peak.total + held + passing
    idle = (p - 1) / (each * m + p - 1)
    # Every micro-batch launches the operators of the rank's blocks anew.
    launched = len(single.stages[-1].ops) * on.overhead * m / p
    seconds = max(single.stages[-1].seconds / ranks, launched) / (1 - idle)
    speed = on.speed(samples, t) or float("inf")
    seconds += (3 if zero == 3 else 2) * grads / (p * t) * (samples - 1) / samples / speed
    model: Any = single.recipe.model
    stream = stage.tokens / samples * getattr(model, "width", 0) * 4
    speed = on.speed(t, 1) or float("inf")
    return memory, seconds + 8 * stream * getattr(model, "layers", 1) / p * (t - 1) / t / speed


def text(found: Found) -> str:
    """The best few as lines of a recipe, then what was left out and why."""
    lines = [f"Layouts that fit into {size(found.limit)} a rank, by predicted time:"] if found.options else []
    for i, option in enumerate(found.options[:5], 1):
        shares = option.shares()
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        bound = max(shares, key=lambda name: shares[name])
        lines += [
            "",
            f"{i}. {size(option.memory)} a rank, {duration(option.seconds)} a step; bound by {bound} ({told})",
        ]
        lines += [f"     {line}" for line in option.layout.lines().splitlines()]
    if not found.options:
        closest = f" The closest lacks {size(found.large[0].memory - found.limit)}:" if found.large else ""
        lines += [f"No layout that was planned fits into {size(found.limit)} a rank.{closest}"]
        lines += [f"     {line}" for line in found.large[0].layout.lines().splitlines()] if found.large else []
    lines += ["", *(f"Too large: {' '.join(o.layout.lines().split())}: {size(o.memory)}" for o in found.large)]
    lines += [f"Left out: {count} ({why.rstrip('.')})" for why, count in found.refused.items() if count]
    plans = [p for option in (*found.options, *found.large) for p in option.plans]
    lines += [f"Note: {note}" for note in dict.fromkeys(note for p in plans for note in p.notes)]
    return "\n".join(lines).rstrip()


def as_json(found: Found) -> dict[str, Any]:
    """Every figure."""

    def row(option: Option) -> dict[str, Any]:
        return {"recipe": yaml.safe_load(option.layout.lines()) or {}, "memory": option.memory,
                "seconds": option.seconds, "shares": option.shares()}  # fmt: skip

    return {"limit": found.limit, "options": [row(o) for o in found.options], "large": [row(o) for o in found.large],
            "refused": dict(found.refused)}  # fmt: skip
