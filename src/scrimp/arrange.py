"""Which techniques fit together, and in which order each slot is folded. Reasons are sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from scrimp.errors import RecipeError, UserError
from scrimp.registry import classes
from scrimp.technique import PHASES, SLOTS, Card, Technique, overrides


@dataclass(frozen=True)
class Arrangement:
    """The techniques of a recipe, checked, with the order of every slot."""

    techniques: tuple[Technique, ...]
    keys: dict[int, str]
    """id of a technique -> its name, or name.2 for the second of that name."""
    slots: dict[str, tuple[Technique, ...]]
    """slot -> the techniques that override it, innermost first."""

    def key(self, technique: Technique) -> str:
        """The name under which a technique's memory is checkpointed."""
        return self.keys[id(technique)]


def arrange(techniques: Sequence[Technique], where: str = "techniques") -> Arrangement:
    """Check a set of techniques and order every slot.

    Raises:
        RecipeError: with every clash, each saying which to drop.
    """
    faults = clashes(techniques, where)
    if faults:
        raise RecipeError(faults)
    counts: dict[str, int] = {}
    keys: dict[int, str] = {}
    for technique in techniques:
        n = counts[technique.name] = counts.get(technique.name, 0) + 1
        keys[id(technique)] = technique.name if n == 1 else f"{technique.name}.{n}"
    slots = {slot: order(slot, techniques) for slot in SLOTS}
    return Arrangement(tuple(techniques), keys, slots)


def misfits(techniques: Any, where: str = "techniques") -> list[UserError]:
    """What is given instead of a list of techniques, and what to write."""
    if isinstance(techniques, Technique):
        fix = f"Write `[{type(techniques).__name__}(...)]`."
        return [UserError("must be a list of techniques, not a single one.", where, fix)]
    if not isinstance(techniques, list | tuple):
        fix = "Write for example `[scrimp.Clip(norm=1.0)]`; scrimp.Recipe.read takes mappings and names."
        return [UserError(f"must be a list of techniques, not {techniques!r}.", where, fix)]
    return [fault for item in cast(Sequence[Any], techniques) for fault in _misfit(item, where)]


def _misfit(item: Any, where: str) -> list[UserError]:
    if isinstance(item, Technique):
        return []
    if isinstance(item, type) and issubclass(item, Technique):
        fix = f"Write `{item.__name__}()`, with its settings in the parentheses."
        return [UserError(f"`{item.__name__}` is a class, not a technique.", where, fix)]
    made = {name: kind for kind, name in classes().items()}
    if isinstance(item, str) and item in made:
        return [UserError(f"`{item}` is a name, not a technique.", where, f"Write `scrimp.{made[item]}()`.")]
    return [UserError(f"{item!r} is not a technique.", where, "Write for example `scrimp.Clip(norm=1.0)`.")]


def order(slot: str, techniques: Sequence[Technique]) -> tuple[Technique, ...]:
    """The techniques that override a slot, in the order in which they are folded (innermost first)."""
    phases = PHASES.get(slot, ())

    def place(technique: Technique) -> tuple[int, bool, str, str]:
        phase = technique.card.phase.get(slot)
        position = phases.index(phase) if phase in phases else len(phases)
        return position, slot not in technique.card.replaces, technique.name, repr(technique)

    return tuple(sorted((t for t in techniques if overrides(t, slot)), key=place))


def declared(slot: str, a: Technique, b: Technique) -> bool:
    """Whether the cards of two techniques say which of them comes first in a slot."""
    first, second = a.card.phase.get(slot), b.card.phase.get(slot)
    replacing = (slot in a.card.replaces) != (slot in b.card.replaces)
    return (first != second and first is not None and second is not None) or (replacing and first == second)


def scope(technique: Technique) -> str:
    """The pattern of parameters a technique is limited to; `*` when it is not limited."""
    return getattr(technique, technique.card.scope) if technique.card.scope else "*"


def clash(a: Technique, b: Technique) -> str:
    """Why two techniques do not fit together, or an empty string."""
    apart = scope(a) != scope(b)
    if a.name == b.name and not apart:
        limit = a.card.scope
        hint = f"give them disjoint patterns in `{limit}`" if limit else "drop one"
        return f"`{a.name}` appears twice; {hint}."
    shared = set(a.card.sets) & set(b.card.sets)
    if shared and not apart:
        thing = sorted(shared)[0]
        hint = ""
        if a.card.scope and b.card.scope:
            hint = f", or give them disjoint patterns in `{a.card.scope}`"
        return f"`{a.name}` and `{b.name}` both set the {thing}. Drop one of them{hint}."
    for one, other in ((a, b), (b, a)):
        for thing in sorted(set(one.card.refuses) & things(other.card)):
            return f"`{one.name}` does not go with `{other.name}`: {one.card.refuses[thing]} Drop one of them."
        reason = other.card.whole or ("data" in one.card.axes and other.card.held)
        if one.shards and reason:
            return f"`{other.name}` does not go with `{one.name}`: {reason} Drop one of them."
        if one.card.breaks and other.card.entire:
            return f"`{other.name}` does not go with `{one.name}`: {other.card.entire} Drop one of them."
        if one.card.cuts and other.card.undivided:
            return f"`{other.name}` does not go with `{one.name}`: {other.card.undivided} Drop one of them."
    both = sorted(set(a.card.replaces) & set(b.card.replaces))
    for slot in both:
        if not (a.card.scope and apart):
            return f"`{a.name}` and `{b.name}` both replace `{slot}`. Drop one of them."
    return ""


def emulated(names: Mapping[str, Card], device: str) -> list[str]:
    """What must be said of techniques, by name, that a kind of device has no hardware for: a sentence each."""
    kind = {"cpu": "a CPU", "cuda": "a GPU"}.get(device, device)
    return [
        f"{name} is emulated on {kind}: the numbers are right, and its seconds say nothing of hardware that has it."
        for name, card in names.items()
        if device in card.emulated
    ]


def things(card: Card) -> set[str]:
    """What a technique sets, for the cards of others that cannot stand beside it."""
    return {*card.sets, *(("frozen weights",) if card.trains else ())}


def clashes(techniques: Sequence[Technique], where: str = "techniques") -> list[UserError]:
    """Every clash in a set, as errors."""
    faults: list[UserError] = []
    for i, a in enumerate(techniques):
        for slot, phase in a.card.phase.items():
            if phase not in PHASES.get(slot, ()):
                known = ", ".join(PHASES.get(slot, ())) or "none"
                faults.append(
                    UserError(f"its card has the unknown phase `{phase}`.", f"{where}.{a.name}", f"Known: {known}.")
                )
        for b in techniques[i + 1 :]:
            reason = clash(a, b)
            if reason:
                faults.append(UserError(reason, f"{where}.{b.name}"))
    return faults
