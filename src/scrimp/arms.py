# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The arms of a comparison: the baseline, each technique alone, all together, each left out, and named sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from scrimp.arrange import clash
from scrimp.errors import UserError, did_you_mean
from scrimp.registry import catalogue, technique_class

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.technique import Technique

KINDS: Final = ("alone", "all", "without", "set")
"""Kinds of arms beside the baseline."""
BASIS: Final = frozenset({"update rule", "learning-rate schedule"})
"""What a baseline cannot do without, or is always given."""


@dataclass(frozen=True)
class Arm:
    """A recipe to compare with the baseline."""

    name: str
    kind: str
    recipe: Recipe
    claim: str = ""
    """What the paper of its technique claims, with the source; of single techniques only."""


def in_question(recipe: Recipe, named: Sequence[str] = (), everything: bool = False) -> list[Technique]:
    """The techniques in question: those named, else the recipe's own beside update rule and schedule.

    Args:
        named: names; settings are the recipe's where it has them, else the defaults.
        everything: the whole catalogue.
    Raises:
        UserError: if there are none.
    """
    own = {t.name: t for t in recipe.techniques}
    if everything:
        named = [name for name in catalogue() if not (name in own and set(own[name].card.sets) & BASIS)]
    for name in named:
        if name in own and set(own[name].card.sets) & {"update rule"}:
            raise UserError(
                f"`{name}` is the baseline's own update rule.", "--with", "Leave it out, or change the recipe."
            )
    if named:
        return [own[name] if name in own else technique_class(name)() for name in dict.fromkeys(named)]
    found = [t for t in recipe.techniques if not set(t.card.sets) & BASIS]
    if not found:
        raise UserError("the recipe has no technique to compare.", "compare", "Name some: --with fused_loss,recompute.")
    return found


def arms(
    recipe: Recipe,
    techniques: Sequence[Technique],
    sets: Sequence[Sequence[str]] = (),
    kinds: Sequence[str] = KINDS,
) -> tuple[list[Arm], dict[str, str]]:
    """The arms, the baseline first, and why others were left out.

    Args:
        techniques: those in question.
        sets: further sets of their names.
        kinds: which of `KINDS` to make.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f"there is no kind of arms `{unknown[0]}`.", "--kinds", did_you_mean(unknown[0], KINDS))
    names = {t.name for t in techniques}
    base = replace(recipe, techniques=tuple(t for t in recipe.techniques if t.name not in names or _rule(t)))
    found, left_out = [Arm("baseline", "baseline", base)], dict[str, str]()
    for name, kind, chosen in _sets(techniques, sets, kinds):
        try:
            found.append(Arm(name, kind, _with(base, chosen), _claim(chosen)))
        except UserError as error:
            left_out[name] = str(error)
    return found, left_out


def _rule(technique: Technique) -> bool:
    return "update rule" in technique.card.sets


def _sets(
    techniques: Sequence[Technique], sets: Sequence[Sequence[str]], kinds: Sequence[str]
) -> Iterator[tuple[str, str, list[Technique]]]:
    by_name = {t.name: t for t in techniques}
    if "alone" in kinds:
        yield from ((t.name, "alone", [t]) for t in techniques)
    if "all" in kinds and len(techniques) > 1:
        yield "all", "all", list(techniques)
    if "without" in kinds and len(techniques) > 2:
        yield from ((f"all without {t.name}", "without", [o for o in techniques if o is not t]) for t in techniques)
    for chosen in sets if "set" in kinds else ():
        missing = [name for name in chosen if name not in by_name]
        if missing:
            raise UserError(f"`{missing[0]}` is not one of the techniques compared.", "--set", "Name it in --with too.")
        yield "+".join(chosen), "set", [by_name[name] for name in chosen]


def _with(base: Recipe, chosen: Sequence[Technique]) -> Recipe:
    """The baseline with techniques, each in the place of what sets the same thing.

    Raises:
        UserError: if two of them clash.
    """
    for i, a in enumerate(chosen):
        for b in chosen[i + 1 :]:
            if reason := clash(a, b):
                raise UserError(reason)
    taken = {thing for t in chosen for thing in t.card.sets}
    kept = [t for t in base.techniques if not set(t.card.sets) & taken and t.name not in {c.name for c in chosen}]
    return replace(base, techniques=(*kept, *chosen))


def _claim(chosen: Sequence[Technique]) -> str:
    return chosen[0].card.claim if len(chosen) == 1 else ""


def at_rate(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with the learning rate of its update rule times a factor."""
    if factor == 1.0:
        return recipe
    changed: list[Any] = [
        replace(t, lr=getattr(t, "lr") * factor) if _rule(t) and hasattr(t, "lr") else t  # noqa: B009
        for t in recipe.techniques
    ]
    return replace(recipe, techniques=tuple(changed))
