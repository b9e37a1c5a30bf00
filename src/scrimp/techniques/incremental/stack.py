"""Progressive stacking: train a shallow model, put copies of its blocks on top, and go on.

    block i of the deeper model  <-  block (i mod l) of the model with l blocks          (order: stack)
                                     block floor(i l / L)                                (order: interleave)

Embedding, head and final norm are carried over. Paper: Gong et al., "Efficient Training of BERT by Progressively
Stacking", ICML 2019, PMLR 97.

Saves: time, since early steps run a shallow model. Costs: a jump of the loss at each growth, which later steps
recover (`zero_new` avoids it: copies then start as the identity). Not for: initializations that depend on depth
(t_fixup). Compare against a baseline with a fully decayed schedule: "No Train No Gain" (arXiv 2307.06440) finds that
the gain vanishes there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from scrimp.clock import Duration
from scrimp.errors import UserError
from scrimp.models.seams import blocks
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import State

OUTPUTS = ("attention.proj.weight", "attention.proj.bias", "mlp.down.weight", "mlp.down.bias")
"""Last layers of the branches: zero there makes a block the identity."""


@dataclass(frozen=True, kw_only=True)
class Stack(Technique):
    """Grow depth by copying blocks."""

    card = Card(
        paper="ICML 2019, PMLR 97",
        section="Incremental learning",
        saves="time of early steps",
        costs="a jump of the loss at each growth",
        sets=("depth schedule",),
        phase={"model": "architecture", "carry": "grow"},
        example={"at": (0.5,)},
        neutral={"at": ()},
    )
    at: tuple[str | float, ...] = (0.1, 0.3)
    """Points at which the model grows to its next depth; the recipe's model is the last one."""
    depths: tuple[int, ...] = ()
    """Depth of each stage; empty halves the recipe's depth once for each point."""
    order: Literal["stack", "interleave"] = "stack"
    """stack puts copies on top; interleave puts each beside its original."""
    states: Literal["copy", "reset"] = "copy"
    """What copies get of the optimizer's states."""
    zero_new: bool = False
    """Start copies as the identity, so that growth keeps the function."""

    def __post_init__(self) -> None:
        for point in self.at:
            Duration.parse(point)
        if self.depths and len(self.depths) != len(self.at) + 1:
            raise UserError(f"{len(self.at)} points need {len(self.at) + 1} depths, not {len(self.depths)}.")

    def stages(self) -> tuple[str | float, ...]:
        """The points of growth."""
        return self.at

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Keep the first blocks."""
        prefix, total = _list(model, run.where(self))
        depths = self.depths or tuple(total >> n for n in range(len(self.at), -1, -1))
        if depths[-1] != total or depths[0] < 1 or list(depths) != sorted(depths):
            what = f"depths {list(depths)} do not grow from at least 1 to the model's {total} blocks."
            raise UserError(what, run.where(self, "depths"), "Set `depths`, or fewer points in `at`.")
        depth = depths[run.clock.passed(self.at)]
        parent, _, child = prefix.rpartition(".")
        kept = list(model.get_submodule(prefix).children())[:depth]
        setattr(model.get_submodule(parent), child, nn.ModuleList(kept))
        return model

    def carry(self, state: State, run: Run) -> State:
        """Copies for the blocks that the last stage did not have; nothing on a resume within a stage."""
        prefix, depth = _list(run.model, run.where(self))
        held = {int(m[1]) for name in state.get("model", {}) if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
        old = len(held)
        if not held or old >= depth:
            return state
        origin = [i % old if self.order == "stack" else i * old // depth for i in range(depth)]
        copies = {i for i, o in enumerate(origin) if o in origin[:i]}
        return {kind: self._grown(kind, tensors, prefix, origin, copies) for kind, tensors in state.items()}

    def _grown(
        self, kind: str, tensors: Mapping[str, Tensor], prefix: str, origin: list[int], copies: set[int]
    ) -> dict[str, Tensor]:
        pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.*)")
        grown = {name: t for name, t in tensors.items() if not pattern.match(name)}
        for name, tensor in tensors.items():
            match = pattern.match(name)
            for i, source in enumerate(origin) if match else ():
                if source != int(match[1]):  # type: ignore[index]
                    continue
                new, rest = i in copies, match[2]  # type: ignore[index]
                fresh = kind.startswith("optimizer.") and self.states == "reset"
                zero = new and (fresh or (kind == "model" and self.zero_new and rest in OUTPUTS))
                grown[f"{prefix}.{i}.{rest}"] = torch.zeros_like(tensor) if zero else tensor
        return grown


def _list(model: nn.Module, where: str) -> tuple[str, int]:
    """Path of the list of blocks, and how many there are."""
    found = list(blocks(model, where))
    return found[0].rpartition(".")[0], len(found)
