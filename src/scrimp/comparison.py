# pyright: strict
"""A comparison as its file holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from scrimp.errors import UserError


@dataclass(frozen=True)
class Cell:
    """One run of an arm."""

    seed: int
    loss: float
    seconds: float
    tokens: float
    tokens_per_second: float
    peak_bytes: float
    curve: list[tuple[float, float, float, float]]
    """(step, tokens, seconds, held-out loss) of each validation."""
    bits_per_byte: float | None = None
    joules: float | None = None
    """Of the machine during the steps, where it could be read."""


@dataclass(frozen=True)
class Planned:
    """What the plan of an arm said."""

    memory: float
    seconds: float
    """Of a step."""
    flops: float | None = None
    """Of the run."""
    trained: int | None = None
    """Weights that are trained."""


@dataclass(frozen=True)
class Summary:
    """An arm against the baseline. Speed and memory are ratios to it."""

    loss: float
    difference: float
    verdict: str
    speed: float
    memory: float
    interval: tuple[float, float] | None = None
    seconds_to_baseline: float | None = None
    tokens_to_baseline: float | None = None


@dataclass(frozen=True)
class Arm:
    """A recipe that was compared."""

    name: str
    kind: str
    techniques: list[str]
    planned: Planned
    cells: list[Cell]
    summary: Summary
    lr: float = 1.0
    """Factor of the learning rate that was best for it."""
    claim: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `comparison.json` holds."""

    name: str
    mode: str
    seeds: list[int]
    arms: list[Arm]
    """The baseline first."""
    lrs: list[float] = field(default_factory=list[float])
    recipe: dict[str, Any] = field(default_factory=dict[str, Any])
    environment: dict[str, Any] = field(default_factory=dict[str, Any])
    commit: str = ""
    left_out: dict[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """Read a comparison's file.

        Raises:
            UserError: if it cannot be read, or is none.
        """
        fix = "Run `scrimp compare` again; finished runs are kept."
        try:
            found = TypeAdapter(cls).validate_python(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}.", str(path)) from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"is no comparison: `{place}`: {first['msg']}.", str(path), fix) from None
        except (ValueError, RecursionError):
            raise UserError("is not JSON.", str(path), fix) from None
        if not found.arms or not all(arm.cells for arm in found.arms):
            raise UserError("is a comparison without results.", str(path), fix)
        return found
