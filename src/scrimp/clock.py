"""Time as a value: durations with a unit, and the clock that counts steps, samples and tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scrimp.errors import UserError

UNITS = {
    "step": "step", "steps": "step", "it": "step",
    "tok": "tok", "token": "tok", "tokens": "tok",
    "epoch": "epoch", "epochs": "epoch", "ep": "epoch",
    "sample": "sample", "samples": "sample",
}  # fmt: skip


@dataclass(frozen=True)
class Duration:
    """A length of training: `2000 step`, `5e6 tok`, `1 epoch`, `3e4 sample`, or `0.25` of the run."""

    value: float
    unit: str
    """step, tok, epoch, sample, or run (a fraction of the whole run)."""

    @classmethod
    def parse(cls, text: str | float | Duration, where: str = "") -> Duration:
        """Read a duration.

        Raises:
            UserError: if it has no known unit, is negative, or is a bare number other than a fraction or a count.
        """
        if isinstance(text, Duration):
            return text
        fix = "Write it as `2000 step`, `5e6 tok`, `1 epoch`, or as a fraction of the run such as 0.25."
        match = re.fullmatch(r"\s*([0-9.eE+_-]+)\s*([a-z]*)\s*", str(text))
        unit = UNITS.get(match[2]) if match and match[2] else "run"
        try:
            value = float(match[1]) if match else math.nan
        except ValueError:
            value = math.nan
        if unit is None or not 0 <= value < math.inf:
            raise UserError(f"`{text}` is not a duration.", where, fix)
        if unit == "run" and value > 1:
            if value != int(value):
                raise UserError(f"`{text}` has no unit and is more than the whole run.", where, fix)
            unit = "step"
        return cls(value, unit)

    def evenly(self, count: int) -> tuple[str | float, ...]:
        """The ends of so many equal parts, as durations from the start."""
        ends = [self.value * n / count for n in range(1, count + 1)]
        return tuple(end if self.unit == "run" else f"{end!r} {self.unit}" for end in ends)

    def __str__(self) -> str:
        return f"{self.value:g}" if self.unit == "run" else f"{self.value:.15g} {self.unit}"


@dataclass
class Clock:
    """Counts what was trained, and knows where the run ends.

    Stage cuts are absolute positions: `length` is the length they were planned for. `end` moves when a run is
    extended; learning-rate schedules follow `end`, stage cuts stay where they were.
    """

    unit: str
    """What the run is measured in: step, sample or tok."""
    length: int
    end: int
    per_step: dict[str, float]
    """Nominal samples, tokens and epochs of one step, to convert between units."""
    step: int = 0
    sample: int = 0
    tok: int = 0
    stage: int = 0
    cuts: list[int] = field(default_factory=list[int])
    """Positions at which the stages after the first one began."""

    @classmethod
    def plan(cls, duration: Duration, batch: int, tokens: int, items: int) -> Clock:
        """A clock for a run.

        Args:
            batch: samples a step. tokens: tokens a sample. items: samples an epoch.
        """
        per_step = {"step": 1.0, "sample": float(batch), "tok": float(batch * tokens), "epoch": batch / items}
        unit, value = duration.unit, duration.value
        if unit == "epoch":
            unit, value = "sample", value * items
        if unit == "run":
            raise UserError("The run's own duration cannot be a fraction.", "duration", "Write `2000 step`.")
        length = math.ceil(value)
        return cls(unit, length, length, per_step)

    @property
    def position(self) -> int:
        """Where the run is, in its own unit."""
        return int(getattr(self, self.unit))

    @property
    def progress(self) -> float:
        """Position as a fraction of the run's end, for schedules."""
        return self.position / self.end if self.end else 1.0

    @property
    def done(self) -> bool:
        """Whether the run has reached its end."""
        return self.position >= self.end

    @property
    def begun(self) -> int:
        """The position at which the current stage began."""
        return self.cuts[self.stage - 1] if self.stage else 0

    def passed(self, points: Sequence[Duration | str | float]) -> int:
        """How many of a technique's points lie at or before the start of the current stage."""
        return sum(self.at(point) <= self.begun for point in points)

    def at(self, duration: Duration | str | float) -> int:
        """A duration from the start of the run as a position in the run's unit (rounded up)."""
        duration = Duration.parse(duration)
        if duration.unit == "run":
            return math.ceil(duration.value * self.length - 1e-9)
        scale = self.per_step[self.unit] / self.per_step[duration.unit]
        return math.ceil(duration.value * scale - 1e-9)

    def fraction(self, duration: Duration | str | float) -> float:
        """A duration as a fraction of the run's end, for schedules."""
        duration = Duration.parse(duration)
        return duration.value if duration.unit == "run" else self.at(duration) / max(self.end, 1)

    def share(self, duration: Duration | str | float, what: str, where: str) -> float:
        """`fraction` of something that must fit into the run.

        Args:
            what: it is, such as "warm-up".
        Raises:
            UserError: if it is longer than the run.
        """
        fraction = self.fraction(duration)
        if fraction > 1 + 1e-9:
            long = f"the run has {self.end:,} {self.unit}"
            fix = "Shorten it, or give it as a fraction of the run such as 0.1."
            raise UserError(f"a {what} of `{duration}` is longer than the run: {long}.", where, fix)
        return fraction

    def steps(self, duration: Duration | str | float) -> int:
        """A duration in steps, at least one; for intervals such as validation."""
        return max(1, round(self.at(duration) / self.per_step[self.unit]))

    def tick(self, samples: int, tokens: int) -> None:
        """Count one step, whether or not it updated the weights."""
        self.step += 1
        self.sample += samples
        self.tok += tokens

    def state(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return dict(vars(self), cuts=list(self.cuts))
