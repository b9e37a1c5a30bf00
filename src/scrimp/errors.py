"""Errors a user can act on: each says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a recipe, a file or a call, told in three parts.

    Args:
        what: what is wrong, a sentence.
        where: the path in the recipe (`techniques.lion.lr`), a file, or empty.
        fix: what to do about it, a sentence, or empty.
    """

    code = 2
    """Exit code of the command line."""

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}" + (f" {self.fix}" if self.fix else "")


class RecipeError(UserError):
    """All faults of a recipe at once.

    Args:
        faults: at least one; each becomes a line of the message.
    """

    def __init__(self, faults: Iterable[UserError]) -> None:
        self.faults = list(faults)
        count = len(self.faults)
        title = "The recipe has a fault:" if count == 1 else f"The recipe has {count} faults:"
        super().__init__("\n".join([title, *(f"  - {fault}" for fault in self.faults)]))


class LostError(UserError):
    """Another rank has ended, and this one cannot go on; why is in the log of that one."""

    code = 3


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """The known names that a word most likely stands for, best first: misspelled, in other case, or abbreviated."""
    names = {name.lower(): name for name in sorted(set(known))}
    word = word.lower()
    short = [name for name in names if name == initials(word) or initials(name) == word]
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return [names[name] for name in dict.fromkeys([*short, *near])][:3]


def initials(name: str) -> str:
    """lr of learning_rate; empty for a single word."""
    parts = re.split("[_-]", name)
    return "".join(part[:1] for part in parts) if len(parts) > 1 else ""


def did_you_mean(word: str, known: Iterable[str], listed: int = 12) -> str:
    """A sentence with the nearest known names, or all of them when they are few."""
    names = sorted(set(known))
    near = nearest(word, names)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    if not listed or not names:
        return ""
    if len(names) <= listed:
        return f"Known: {', '.join(names)}."
    return f"Known: {', '.join(names[:listed])}, ..."


def plural(count: int, noun: str) -> str:
    """1 seed, 2 seeds."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
