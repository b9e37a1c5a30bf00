# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The simulator against what was published: `references.yaml` has the values, `published.py` what is simulated.

Four classes are kept apart. L0: closed forms without a free parameter, exact or nearly so. L1: a ratio within one
machine. L2: one machine against another. L3: against a CPU or GPU whose kernels no model explains: their efficiency is
fitted on some values, and others are predicted with it. A value that something was fitted on is not predicted, and a
value from memory is not called published.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from scrimp.machines.accelerators.architecture import accelerator

WORDS: Final = {"V": "published", "S": "second-hand", "C": "computed", "R": "recalled"}
"""What a value is called, by its tag."""


class Reference(BaseModel):
    """One value of a source, and what to simulate for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    machine: str
    quantity: str
    value: float
    unit: str = ""
    source: str
    tag: Literal["V", "S", "C", "R"]
    kind: Literal["L0", "L1", "L2", "L3"] = Field(alias="class")
    tolerance: float = Field(ge=0)
    """Largest error, as a share of the value."""
    model: str = ""
    """Function of `published.py`; empty where nothing can be simulated."""
    inputs: dict[str, Any] = {}
    fitted_on: str = ""
    """What the model's free parameters were fitted on; empty without any."""
    fit: bool = False
    """Whether the value itself is among that."""
    note: str = ""
    """Why it is not simulated, or what to know of it."""
    holds: bool = True
    """Whether it should be within its tolerance; false where it is known not to be, and the note says why."""


@dataclass(frozen=True)
class Row:
    """A value beside the simulator's."""

    reference: Reference
    found: float | None

    @property
    def error(self) -> float | None:
        """Of the simulator, as a share of the value; None where the value itself was fitted, which predicts nothing."""
        if self.found is None or self.reference.fit:
            return None
        return self.found / self.reference.value - 1

    @property
    def verdict(self) -> str:
        """exact, within, outside, fitted, or not simulated."""
        if self.error is None:
            return "fitted" if self.reference.fit else "not simulated"
        if self.error == 0:
            return "exact"
        return "within" if abs(self.error) <= self.reference.tolerance + 1e-12 else "outside"

    @property
    def failed(self) -> bool:
        """Whether it is outside and should not be."""
        return self.verdict == "outside" and self.reference.holds

    def as_json(self) -> dict[str, Any]:
        """The reference, with what was found."""
        said = self.reference.model_dump(by_alias=True)
        status = WORDS[self.reference.tag]
        return said | {"status": status, "model_value": self.found, "error": self.error, "verdict": self.verdict}


def references() -> list[Reference]:
    """All of them."""
    from scrimp.reading import Loader

    text = (resources.files("scrimp.machines.accelerators") / "references.yaml").read_text(encoding="utf-8")
    return TypeAdapter(list[Reference]).validate_python(yaml.load(text, Loader=Loader))


def validate() -> list[Row]:
    """Simulate what was published."""
    return [Row(reference, found(reference)) for reference in references()]


def found(reference: Reference) -> float | None:
    """What the simulator gives; None where it has no model."""
    from scrimp.machines.accelerators.published import MODELS

    if not reference.model:
        return None
    return MODELS[reference.model](accelerator(reference.machine), **reference.inputs)
