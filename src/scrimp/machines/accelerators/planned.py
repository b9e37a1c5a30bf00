# pyright: strict
"""An accelerator's share of a plan: the attention of a step's forward pass, at a share of kept keys.

The share is what was asked for, else what the recipe's technique is set to keep. Where that shows only in training, all
keys are planned with, and the plan says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from scrimp import planview
from scrimp.errors import UserError
from scrimp.machines.accelerators.architecture import Accelerator
from scrimp.machines.accelerators.dataflows import PREDICTS
from scrimp.machines.accelerators.report import Report, simulate
from scrimp.machines.accelerators.traces import AttentionTrace
from scrimp.machines.accelerators.views import simulation
from scrimp.planning import Plan
from scrimp.technique import Technique

SAYS: Final = {"dota": "keep"}
"""Technique -> its setting that is the share of the keys that are kept."""
HEADS: Final = 48
"""Heads that are simulated of a layer; of more, with all sequences of the batch, the time is in proportion."""


@dataclass(frozen=True)
class Layers:
    """Layers of one shape."""

    shape: tuple[int, ...]
    """Heads of all sequences, queries, keys, width of a head."""
    count: int
    report: Report
    """Of one of them."""
    factor: float
    """Heads over those that were simulated."""

    @property
    def seconds(self) -> float:
        """Of all of them."""
        return self.report.seconds * self.factor * self.count


@dataclass(frozen=True)
class Attended:
    """A plan, and its attention on a machine."""

    plan: Plan
    machine: Accelerator
    kept: float
    layers: list[Layers]
    source: str
    """Where the share comes from, a sentence."""

    @property
    def seconds(self) -> float:
        """Of a step's forward pass."""
        return sum(each.seconds for each in self.layers)

    def text(self) -> str:
        """The plan for this computer, then the machine, in lines."""
        chance = "" if self.kept == 1 else ", drawn by chance"
        lines = [planview.text(self.plan), "", f"Attention of a step's forward pass on {self.machine.name}, "
                 f"{self.kept:.0%} of the keys kept{chance}: {self.seconds * 1e6:,.4g} us"]  # fmt: skip
        for each in self.layers:
            rows, queries, keys, width = each.shape
            asked = f"{each.count} layers of {rows} heads, {queries} x {keys} scores of width {width};"
            asked += f" one layer's {rows / each.factor:.0f} heads"
            lines += ["  " + line for line in simulation(each.report, None, asked).splitlines()]
        return "\n".join([*lines, f"Note: {self.source}"])

    def as_json(self) -> dict[str, Any]:
        """Every figure."""
        rows = [each.report.as_json() | {"shape": list(each.shape), "layers": each.count, "factor": each.factor}
                for each in self.layers]  # fmt: skip
        own = {"machine": self.machine.name, "kept": self.kept, "kept_from": self.source, "seconds": self.seconds,
               "layers": rows}  # fmt: skip
        return planview.as_json(self.plan) | {"accelerator": own}


def attention(plan: Plan, machine: Accelerator, asked: float | None = None) -> Attended:
    """The last stage's attention on a machine.

    Args:
        asked: share of the keys that each query keeps; None for what the recipe says.
    Raises:
        UserError: if the plan has no attention, the machine does none, or the share is none.
    """
    kept, source = shared(plan.recipe.techniques, machine) if asked is None else (asked, "The share was asked for.")
    if not 0 < kept <= 1:
        raise UserError(f"must be above 0 and at most 1, not {kept:g}.", "--kept")
    ops = (op for op in plan.stages[-1].ops if "scaled_dot_product" in op.name)
    shapes = Counter(op.shape for op in ops if op.phase == "forward" and "backward" not in op.name)
    if not shapes:
        fix = "Train it, then `scrimp simulate RUN` takes what its attention cores really keep."
        raise UserError("the recipe has no attention of torch's own kernel to plan with.", machine.name, fix)
    found: list[Layers] = []
    for shape, count in shapes.items():
        rows, queries, keys, width = shape
        heads = min(rows, HEADS)
        trace = (AttentionTrace.dense(heads, queries, keys, width) if kept == 1
                 else AttentionTrace.random(heads, queries, keys, width, kept, predictor=machine.dataflow))  # fmt: skip
        found.append(Layers(shape, count, simulate([trace], machine), rows / heads))
    return Attended(plan, machine, kept, found, source)


def shared(techniques: Sequence[Technique], machine: Accelerator) -> tuple[float, str]:
    """The share of the keys that a recipe keeps, and where it comes from."""
    names = [t.name for t in techniques if "attention core" in t.card.sets and t.name in PREDICTS]
    for technique in techniques:
        if technique.name in SAYS:
            share = float(getattr(technique, SAYS[technique.name]))
            return share, f"The share is `techniques.{technique.name}.{SAYS[technique.name]}`."
    if not names:
        return 1.0, "Nothing in the recipe leaves out keys, so that all are kept. --kept 0.25 plans with fewer."
    what = f"How many keys {' and '.join(names)} will keep shows in training: this plan keeps all."
    return 1.0, f"{what} Give --kept 0.25, or train it and call scrimp simulate RUN --machine {machine.name}."
