# pyright: strict
"""What the command line reads and checks before a verb begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scrimp.errors import UserError

if TYPE_CHECKING:
    from scrimp.recipe import Recipe


def axes_of(text: str) -> dict[str, int]:
    """axis -> ranks, from `data=2,tensor=2`."""
    try:
        return {axis.strip(): int(count) for axis, count in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise UserError(f"`{text}` is no mesh.", "--mesh", "Write it as data=2,tensor=2.") from None


def accelerated(machine: str) -> bool:
    """Whether this names a simulated accelerator, or its description."""
    from scrimp.machines.accelerators.architecture import known
    from scrimp.machines.machine import KNOWN

    ours = machine.lower() in known() and machine.lower() not in (name.lower() for name in KNOWN)
    return ours or machine.endswith((".yaml", ".yml"))


def within(option: str, value: float, zero: str = "") -> None:
    """Check a number of the command line.

    Args:
        zero: what 0 means, a sentence.
    Raises:
        UserError: if it is negative, no number, or too large for a generator's seed.
    """
    if not 0 <= value < 2**63:
        bound = "below 2**63" if value > 0 else "at least 0"
        raise UserError(f"must be {bound}, not {value}.", option, zero)


def load(path: Path, overrides: list[str] | None) -> Recipe:
    """A recipe with overrides."""
    from scrimp.recipe import Recipe

    return Recipe.load(path, overrides or [])


def numbers(text: str) -> list[float]:
    """Numbers between commas.

    Raises:
        UserError: if one is none, or not above 0.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < value < 1e6 for value in found):
        raise UserError(f"`{text}` are not factors above 0.", "--lrs", "Write them as 0.5,1,2.")
    return found
