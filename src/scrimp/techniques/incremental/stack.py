"""Progressive stacking: train a shallow model, put copies of its blocks on top, and go on.

    block i of the deeper model  <-  block (i mod l) of the model with l blocks          (order: stack)
                                     block floor(i l / L)                                (order: interleave)

Embedding, head and final norm are carried over; moments of the optimizer and memories of other techniques are copied
like the weights they belong to. Paper: Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019,
PMLR 97.

The recipe's model is the deepest one, and the run ends with it. Weights that a run starts from are grown when they have
fewer blocks than its first stage, and refused when they have more.

Saves: time, since early steps run a shallow model. Costs: a jump of the loss at each growth, which later steps
recover (`zero_new` avoids it in models with norms before the branches: copies then start as the identity). Not for:
initializations that depend on depth (t_fixup). Compare against a baseline with a fully decayed schedule: "No Train No
Gain" (arXiv 2307.06440) finds that the gain vanishes there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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
        phase={"model": "sizes", "carry": "grow"},
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
            Duration.parse(point, "at")
        if self.depths and len(self.depths) != len(self.at) + 1:
            raise UserError(f"{len(self.at)} points need {len(self.at) + 1} depths, not {len(self.depths)}.")

    def stages(self) -> tuple[str | float, ...]:
        """The points of growth."""
        return self.at

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Keep the first blocks."""
        found = blocks(model, run.where(self))
        path, total = _parent(found, run.where(self)), len(found)
        depths = self.depths or tuple(total >> n for n in range(len(self.at), -1, -1))
        if depths[-1] != total or depths[0] < 1 or list(depths) != sorted(depths):
            what = f"depths {list(depths)} do not grow from at least 1 to the model's {total} blocks."
            raise UserError(what, run.where(self, "depths"), "Set `depths`, or fewer points in `at`.")
        if self.zero_new:
            _check_branches(next(iter(found.values())), run.where(self, "zero_new"))
        # Cut in place: the list may be an nn.Sequential that is called, or the model itself.
        layers = model.get_submodule(path)
        assert isinstance(layers, nn.ModuleList | nn.Sequential)
        del layers[depths[run.clock.passed(self.at)] :]
        return model

    def carry(self, state: State, run: Run) -> State:
        """Copies for the blocks that the state does not have; a resume within a stage has them all.

        Copies share memory in what is returned: whatever loads it copies.
        """
        differing = _differing(run.model, state.get("model", {}))
        if differing is None:
            return state
        path, old, depth = differing
        if old > depth:
            what = f"the weights to start from have {old} blocks in `{path}`, this stage has {depth}."
            raise UserError(what, run.where(self), "Choose `depths` or `model.layers` that begin with as many.")
        origin = [i % old if self.order == "stack" else i * old // depth for i in range(depth)]
        copies = {i for i, o in enumerate(origin) if o in origin[:i]}
        return {kind: self._grown(kind, tensors, path, origin, copies) for kind, tensors in state.items()}

    def _grown(
        self, kind: str, tensors: Mapping[str, Tensor], path: str, origin: list[int], copies: set[int]
    ) -> dict[str, Tensor]:
        pattern = _pattern(path)
        grown = {name: t for name, t in tensors.items() if not pattern.match(name)}
        for name, tensor in tensors.items():
            match = pattern.match(name)
            for i, source in enumerate(origin) if match else ():
                if source != int(match[1]):  # type: ignore[index]
                    continue
                new, rest = i in copies, match[2]  # type: ignore[index]
                fresh = kind.startswith("optimizer.") and self.states == "reset"
                zero = new and (fresh or (not kind.startswith("optimizer.") and self.zero_new and rest in OUTPUTS))
                grown[f"{path}.{i}.{rest}".lstrip(".")] = torch.zeros_like(tensor) if zero else tensor
        return grown


def _parent(found: Mapping[str, nn.Module], where: str) -> str:
    """Path of the list that the blocks are in; empty when the model is the list."""
    names = list(found)
    path = names[0].rpartition(".")[0]
    if len({name.rpartition(".")[0] for name in names}) > 1:
        raise UserError("the model has several lists of blocks.", where, "Use a model with one, such as a decoder.")
    if names != [f"{path}.{i}".lstrip(".") for i in range(len(names))]:
        raise UserError(f"the blocks {names[:3]} are not numbered from 0.", where, "Put them into an nn.ModuleList.")
    return path


def _check_branches(block: nn.Module, where: str) -> None:
    """Whether zeros in the last layers of a block's branches make it the identity."""
    own = {name for name, _ in block.named_parameters()}
    lacking = [name for name in OUTPUTS if name.endswith(".weight") and name not in own]
    if lacking:
        raise UserError(f"blocks have no `{lacking[0]}` to zero.", where, "Leave it off, or use the house Transformer.")
    if not getattr(block, "pre", True):
        what = "a block with norms after its branches is never the identity."
        raise UserError(what, where, "Leave it off, or set `model.norm_at: pre`.")


def _pattern(path: str) -> re.Pattern[str]:
    """Names of what is in a list: (number of the block, rest of the name)."""
    return re.compile(rf"{re.escape(path + '.') if path else ''}(\d+)\.(.*)")


def _differing(model: nn.Module, given: Iterable[str]) -> tuple[str, int, int] | None:
    """The outermost list of which the given names hold another number of children: (path, that number, the model's).

    Not simply the model's longest list: once the blocks are cut to a few, a list within a block may be longer.
    """
    names, own = list(given), [name for name, _ in model.named_parameters()]
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            pattern = _pattern(path)
            held, wanted = ({m[1] for name in many if (m := pattern.fullmatch(name))} for many in (names, own))
            if held and len(held) != len(wanted):
                return path, len(held), len(wanted)
    return None
