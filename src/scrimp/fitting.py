# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What makes a recipe fit into memory, and what each technique of the catalogue would do to it: plans of its variants.

Techniques say on their cards with which settings they save memory (`remedies`). `fit` adds them one after another: of
the sets that do not fit yet, it goes on with the few that need least. A set that holds a fitting one is not tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final

import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from scrimp.errors import UserError
from scrimp.machines.machine import Machine
from scrimp.planning import Plan, outlined, plan
from scrimp.reading import plain
from scrimp.registry import catalogue, technique_class
from scrimp.run import build
from scrimp.stages import new_clock

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.technique import Technique

BEAM: Final = 2
"""Sets that do not fit with which the search goes on."""
DEPTH: Final = 6
"""Remedies a set holds at most."""
PLANS: Final = 48
"""Sets that a search plans at most."""
HALF: Final = "dtype"
"""The remedy that is no technique: weights and states in bfloat16."""


@dataclass(frozen=True)
class Remedy:
    """A change to a recipe that saves memory."""

    name: str
    """A technique's name, or dtype."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
    why: str = ""
    """What it saves, and what it costs."""

    def added(self, recipe: Recipe) -> Recipe:
        """The recipe with it.

        Raises:
            UserError: if it does not go with what the recipe has.
        """
        if self.name == HALF:
            return replace(recipe, dtype="bfloat16")
        technique = technique_class(self.name)(**self.settings)
        return replace(recipe, techniques=(*recipe.techniques, technique))

    def __str__(self) -> str:
        """Its line in the recipe."""
        value = "bfloat16" if self.name == HALF else dict(self.settings)
        return yaml.safe_dump({self.name: plain(value)}, default_flow_style=True).strip()[1:-1]


@dataclass
class Option:
    """A recipe with remedies, planned."""

    remedies: tuple[Remedy, ...]
    plan: Plan
    saved: dict[str, int] = field(default_factory=dict[str, int])
    """remedy -> bytes that would be needed more without it, where that was planned."""


@dataclass
class Fit:
    """What a search found."""

    limit: int
    given: Plan
    options: list[Option]
    """Those that fit, by predicted time."""
    closest: Option
    tried: int
    cut: bool = False
    """Whether the search ended before all sets were tried."""


def fit(
    recipe: Recipe, on: Machine, limit: int, data: Any = None, say: Callable[[str], None] = lambda text: None
) -> Fit:
    """Search remedies that bring a recipe under a limit.

    Args:
        limit: bytes.
        say: hears every set that is tried.
    """
    data = outlined(recipe) if data is None else data
    on = replace(on, memory=limit)
    given = plan(recipe, on, data)
    search = Search(recipe, on, data, say, {frozenset(): given.memory})
    closest = Option((), given)
    if not given.fits:
        closest = search.most() or closest
        if closest.plan.fits:
            search.widen()
    options = _least(search.fitting)
    for option in options:
        chosen = frozenset(option.remedies)
        option.saved = {
            str(r): search.needs[chosen - {r}] - search.needs[chosen] for r in chosen if chosen - {r} in search.needs
        }
    options.sort(key=lambda o: o.plan.seconds)
    return Fit(limit, given, options, closest, len(search.needs) - 1, search.cut)


@dataclass
class Search:
    """One search over sets of remedies."""

    recipe: Recipe
    on: Machine
    data: Any
    say: Callable[[str], None]
    needs: dict[frozenset[Remedy], int]
    """Bytes that each set needs that was planned."""
    fitting: list[Option] = field(default_factory=list[Option])
    cut: bool = False
    """Whether sets were left untried for want of patience."""

    def most(self) -> Option | None:
        """All remedies at once that save something, each with its last settings, as far as they go together.

        If this does not fit, nothing does.
        """
        chosen: tuple[Remedy, ...] = ()
        for name in dict.fromkeys(r.name for r in remedies(self.recipe)):
            kinds = [r for r in remedies(self.recipe) if r.name == name]
            chosen = next((more for r in reversed(kinds) if self._goes(more := (*chosen, r))), chosen)
        best = self.tried(chosen)
        for remedy in chosen if best is not None and not best.plan.fits else ():
            fewer = self.tried(tuple(r for r in best.remedies if r is not remedy)) if best is not None else None
            best = fewer if fewer is not None and best is not None and fewer.plan.memory < best.plan.memory else best
        if best is not None and best.plan.fits:
            self.fitting.append(best)
        return best

    def _goes(self, chosen: tuple[Remedy, ...]) -> bool:
        """Whether a set goes together, without planning it."""
        try:
            recipe = self.recipe
            for remedy in chosen:
                recipe = remedy.added(recipe)
            with FakeTensorMode(allow_non_fake_inputs=True):
                build(replace(recipe, device="cpu"), self.data, new_clock(recipe, self.data))
        except UserError:
            return False
        return True

    def widen(self) -> None:
        """Sets of one remedy, of two, and so on; each time from the few that need least of those that do not fit."""
        front: list[tuple[Remedy, ...]] = [()]
        for _ in range(DEPTH):
            tried: list[Option] = []
            for chosen in self._larger(front):
                if len(self.needs) > PLANS:
                    self.cut = True
                    return
                option = self.tried(chosen)
                if option is not None:
                    tried.append(option)
                    self.fitting += [option] if option.plan.fits else []
            rest = sorted((o for o in tried if not o.plan.fits), key=lambda o: o.plan.memory)
            front = [option.remedies for option in rest[:BEAM]]

    def _larger(self, front: list[tuple[Remedy, ...]]) -> Iterator[tuple[Remedy, ...]]:
        """Sets with one remedy more than those of the front; of one name at most one."""
        enough = [frozenset(option.remedies) for option in self.fitting]
        seen: set[frozenset[Remedy]] = set()
        for held in front:
            names = {r.name for r in held}
            for remedy in remedies(self.recipe):
                new = frozenset((*held, remedy))
                if remedy.name in names or new in self.needs or new in seen or any(e <= new for e in enough):
                    continue
                seen.add(new)
                yield (*held, remedy)

    def tried(self, chosen: tuple[Remedy, ...]) -> Option | None:
        """A set, planned; None if it does not go together."""
        self.say(", ".join(map(str, chosen)))
        try:
            recipe = self.recipe
            for remedy in chosen:
                recipe = remedy.added(recipe)
            option = Option(chosen, plan(recipe, self.on, self.data))
            for stage in option.plan.stages:
                stage.ops, stage.line = [], []
        except UserError:
            return None
        self.needs[frozenset(chosen)] = option.plan.memory
        return option


def remedies(recipe: Recipe) -> Iterator[Remedy]:
    """What may be added to a recipe: every card's remedies, and bfloat16."""
    if recipe.dtype == "float32":
        yield Remedy(HALF, why="weights, gradients and states at half the size; small updates are rounded away")
    present = {t.name for t in recipe.techniques}
    # Adapters on weights that were never trained are no remedy.
    scratch = not getattr(recipe.model, "source", "source")
    for name, entry in catalogue().items():
        if name not in present and not (scratch and entry.card.trains):
            for settings in entry.card.remedies:
                yield Remedy(name, settings, f"saves {entry.card.saves}; costs {entry.card.costs}")


def _least(fitting: list[Option]) -> list[Option]:
    """Without sets that hold another fitting one, and of sets that differ in settings only, the fastest."""
    best: dict[frozenset[str], Option] = {}
    for option in fitting:
        names = frozenset(r.name for r in option.remedies)
        if names not in best or option.plan.seconds < best[names].plan.seconds:
            best[names] = option
    return [o for names, o in best.items() if not any(other < names for other in best)]


@dataclass
class Tip:
    """A technique of the catalogue, against a recipe."""

    name: str
    claim: str
    plan: Plan | None = None
    reason: str = ""
    """Why it does not apply; or what it took the place of."""


def each(recipe: Recipe, on: Machine, data: Any = None, say: Callable[[str], None] = lambda text: None) -> list[Tip]:
    """Every technique of the catalogue with this recipe, by section."""
    data = outlined(recipe) if data is None else data
    tips: list[Tip] = []
    for name, entry in sorted(catalogue().items(), key=lambda item: (item[1].card.section, item[0])):
        say(name)
        tip = Tip(name, entry.card.claim)
        tips.append(tip)
        try:
            changed, tip.reason = _with(recipe, name)
            tip.plan = plan(changed, on, data)
        except UserError as error:
            tip.reason = str(error)
    return tips


def _with(recipe: Recipe, name: str) -> tuple[Recipe, str]:
    """The recipe with a technique at its default settings, in place of what sets the same thing."""
    kind: type[Technique] = technique_class(name)
    if any(t.name == name for t in recipe.techniques):
        raise UserError("is in the recipe already.")
    rivals = [t for t in recipe.techniques if set(t.card.sets) & set(kind.card.sets)]
    kept = tuple(t for t in recipe.techniques if t not in rivals)
    reason = "instead of " + ", ".join(t.name for t in rivals) if rivals else ""
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    technique = kind(**{name: kind.card.example[name] for name in needed})
    return replace(recipe, techniques=(*kept, technique)), reason
