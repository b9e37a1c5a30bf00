# pyright: strict
"""The catalogue for a terminal and as JSON: what `scrimp list` and `scrimp show` print."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scrimp.registry import Entry


def sections(entries: Iterable[Entry]) -> str:
    """All techniques by section, a line each."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.card.section, []).append(entry)
    width = max(len(entry.name) for members in found.values() for entry in members)
    lines: list[str] = []
    for section, members in sorted(found.items()):
        lines += [section, *(f"  {entry.name:{width}} {first_line(entry)}" for entry in members)]
    return "\n".join(lines)


def whole(entry: Entry) -> str:
    """All that is said of a technique."""
    card = entry.card
    facts = {"Claim": card.claim, "Saves": card.saves, "Costs": card.costs, "Sets": ", ".join(card.sets),
             "Needs": ", ".join(card.needs), "Trains": ", ".join(card.trains), "Slots": ", ".join(entry.slots),
             "Emulated on": ", ".join(card.emulated), "Clashes with": ", ".join(rivals(entry))}  # fmt: skip
    lines = [f"{entry.name}  ({card.section}; {card.paper})\n\n{entry.about}\n"]
    lines += [f"{label + ':':14}{text}" for label, text in facts.items() if text]
    lines += ["", "Settings:"]
    lines += [f"  {s.name}: {s.type} = {s.default!r}\n      {s.about}" for s in entry.settings]
    return "\n".join(lines)


def first_line(entry: Entry) -> str:
    """A technique in one line."""
    return entry.about.split("\n", 1)[0]


def rivals(entry: Entry) -> list[str]:
    """Techniques that set the same thing, or something that one of the two refuses."""
    from scrimp.arrange import things
    from scrimp.registry import catalogue

    mine, refused = set(entry.card.sets), set(entry.card.refuses)
    return [
        name
        for name, other in catalogue().items()
        if name != entry.name
        and (
            mine & set(other.card.sets) or refused & things(other.card) or set(other.card.refuses) & things(entry.card)
        )
    ]


def described(entry: Entry) -> dict[str, Any]:
    """A technique as JSON."""
    card = entry.card
    emulated = set(card.emulated)
    return {
        "name": entry.name,
        "section": card.section,
        "paper": card.paper,
        "claim": card.claim,
        "saves": card.saves,
        "costs": card.costs,
        "sets": list(card.sets),
        "slots": list(entry.slots),
        "settings": {
            s.name: {"type": s.type, "default": None if s.default is ... else s.default, "about": s.about}
            for s in entry.settings
        },
        "runs": {device: "emulated" if device in emulated else "yes" for device in ("cpu", "cuda")},
        "module": entry.module,
    }
