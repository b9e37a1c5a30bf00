# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Dataflows by name: each maps traces and a description to stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from scrimp.errors import UserError, did_you_mean
from scrimp.machines.accelerators.engine import Flow
from scrimp.machines.accelerators.traces import AttentionTrace, MatmulTrace, ProductTrace

MODULE: Final = {
    "outerspace": "outerspace", "vitcod": "vitcod", "sanger": "sanger", "sanger_released": "sanger", "dota": "dota",
    "a3": "a3", "elsa": "elsa", "spatten": "spatten", "gpu": "gpu", "flash": "gpu", "tensor_cores": "matmul",
    "systolic": "matmul",
}  # fmt: skip
"""Dataflow -> its file here; its function has its name."""
PRODUCTS: Final = ("outerspace",)
MATMULS: Final = ("tensor_cores", "systolic")
PREDICTS: Final = {"sanger", "dota", "a3", "elsa", "vitcod"}
"""Dataflows whose masks an attention core of the same name learns."""


@dataclass(frozen=True)
class Dataflow:
    """A function of traces and a machine, and what it takes."""

    name: str
    function: Callable[[Sequence[Any], Any], Flow]
    takes: type[AttentionTrace] | type[ProductTrace] | type[MatmulTrace]

    def notes(self, traces: Sequence[Any], machine: Any) -> list[str]:
        """What a reader should know of the traces, in sentences."""
        if self.name not in PREDICTS:
            return []
        unknown = f"No source says how large {machine.name}'s buffers are: whatever it is asked for is taken to fit."
        return [*self._chosen(traces, machine), *([] if machine.buffers else [unknown])]

    def _chosen(self, traces: Sequence[Any], machine: Any) -> list[str]:
        kinds = {trace.predictor.kind for trace in traces} - {self.name}
        if "none" in kinds:
            return [f"The attention is dense: nothing chose keys for {machine.name} to skip."]
        if kinds:
            return [f"The keys were chosen by {', '.join(sorted(kinds))}, not as {machine.name} would."]
        return []


def dataflow(name: str, where: str = "") -> Dataflow:
    """A dataflow by name.

    Raises:
        UserError: if there is none.
    """
    if name not in MODULE:
        raise UserError(f"there is no dataflow `{name}`.", where, did_you_mean(name, MODULE))
    function = getattr(import_module(f"{__name__}.{MODULE[name]}"), name)
    takes = ProductTrace if name in PRODUCTS else MatmulTrace if name in MATMULS else AttentionTrace
    return Dataflow(name, function, takes)
