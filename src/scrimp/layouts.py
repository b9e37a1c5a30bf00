# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Which layout of ranks to choose: by predicted time, under a limit of memory.

One plan of the whole model on one device gives bytes and seconds, from which arithmetic estimates every layout (see
`meshes`). The best of these are planned, the first and the last rank of a pipeline. All times are predictions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import yaml

from scrimp.errors import UserError
from scrimp.machines.machine import Machine
from scrimp.meshes import Layout, candidates, estimate
from scrimp.planning import Plan, StagePlan, outlined, plan
from scrimp.planview import duration, size
from scrimp.recipe import Mesh

if TYPE_CHECKING:
    from scrimp.recipe import Recipe

PLANS: Final = 6
"""Layouts that are planned, at most."""
ENOUGH: Final = 3
"""Layouts that fit, after which no more are planned."""
SLACK: Final = 1.3
"""By how much an estimate may exceed the limit and still be planned."""


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
    near = _various(sorted((g for g in guesses if g[0] <= SLACK * on.memory), key=lambda g: g[1]))
    least = sorted((g for g in guesses if g[0] > SLACK * on.memory), key=lambda g: g[0])
    found.refused["estimated to need more memory"] += len(least)
    for enough, most, queue in ((ENOUGH, PLANS, near[: 4 * PLANS]), (1, 2, least[:8])):
        most += len(found.large)
        for layout in (layout for _, _, layout in queue):
            # What is refused costs little, and does not count.
            if len(found.options) < enough and len(found.options) + len(found.large) < most:
                say(layout.lines().replace("\n", " "))
                _try(layout, found, lambda layout: planned(layout, recipe, on, ranks, data))
    found.options.sort(key=lambda o: o.slowest.seconds)
    found.large.sort(key=lambda o: o.memory)
    return found


def _try(layout: Layout, found: Found, planner: Callable[[Layout], Option]) -> None:
    """Plan a layout, and put it where it belongs."""
    try:
        option = planner(layout)
    except UserError as error:
        found.refused[str(error).splitlines()[0]] += 1
        return
    (found.options if option.memory <= found.limit else found.large).append(option)


def planned(layout: Layout, recipe: Recipe, on: Machine, ranks: int, data: Any) -> Option:
    """A layout planned on its first and, of a pipeline, its last rank.

    Once a pipeline is full, what a rank holds and does grows by the same from each micro-batch to the next: of many,
    two smaller numbers are planned.
    """
    places = [0, ranks - 1] if layout.mesh.pipeline > 1 else [0]

    def made(of: Layout, place: int, batch: int) -> Plan:
        return plan(of.added(replace(recipe, batch=batch)), on, data, ranks, rank=place)

    stages: Any = next((t for t in layout.techniques if t.name == "pipeline"), None)
    few = _few(stages.order, layout.mesh.pipeline) if stages is not None else (0, 0)
    if stages is None or sum(few) >= stages.micro_batches:
        option = Option(layout, [made(layout, place, recipe.batch) for place in places])
    else:
        m, whole = stages.micro_batches, layout.added(recipe)
        cut = {n: replace(layout, techniques=tuple(
            replace(t, micro_batches=n) if t is stages else t for t in layout.techniques)) for n in few}  # fmt: skip
        pairs = [[made(cut[n], place, recipe.batch // m * n) for n in few] for place in places]
        option = Option(layout, [stretched(pair[0], pair[1], few, m, whole) for pair in pairs])
    for stage in (stage for made in option.plans for stage in made.stages):
        stage.ops, stage.line = [], []
    return option


def _few(order: str, ranks: int) -> tuple[int, int]:
    """Two numbers of micro-batches with which a pipeline is full; in some orders rounds of ranks must come out even."""
    return {"1f1b": (ranks + 1, ranks + 2), "zbv": (2 * ranks + 1, 2 * ranks + 2)}.get(order, (2 * ranks, 3 * ranks))


def stretched(one: Plan, two: Plan, few: tuple[int, int], parts: int, recipe: Recipe) -> Plan:
    """A plan with so many micro-batches, from plans with fewer of them."""

    def at(a: float, b: float) -> float:
        return a + (parts - few[0]) / (few[1] - few[0]) * (b - a)

    def along(a: StagePlan, b: StagePlan) -> StagePlan:
        whole: dict[str, Any] = {n: round(at(getattr(a, n), getattr(b, n)))
                                 for n in ("tokens", "segments", "reserved", "sent")}  # fmt: skip
        # Waiting is a share of the passes, which falls as there are more of them.
        waits, sends = at(a.waiting * few[0], b.waiting * few[1]) / parts, at(a.sending, b.sending)
        seconds = at(a.seconds - a.waiting, b.seconds - b.waiting) + waits
        # A run that is not as long as so many steps has fewer of larger batches.
        steps = a.steps if a.steps == b.steps else -(-a.steps * a.tokens // whole["tokens"])
        peak = replace(b.peak, total=round(at(a.peak.total, b.peak.total)))
        return replace(b, steps=steps, peak=peak, waiting=waits, sending=sends, seconds=seconds, **whole)

    stages = [along(a, b) for a, b in zip(one.stages, two.stages, strict=True)]
    return replace(two, recipe=recipe, stages=stages)


def _various(guesses: list[tuple[float, float, Layout]]) -> list[tuple[float, float, Layout]]:
    """The best of every mesh and set of techniques: orders and micro-batches apart."""
    best: dict[tuple[Any, ...], tuple[float, float, Layout]] = {}
    for guess in guesses:
        techniques = tuple(t for t in guess[2].techniques if t.name != "pipeline")
        best.setdefault((guess[2].mesh, techniques), guess)
    return list(best.values())


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
    lines += [f"Left out: {count} layouts ({why.rstrip('.')})" for why, count in found.refused.items() if count]
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
