"""Progressive stacking: train a shallow model, put copies of its blocks on top, and go on.

    block i of the deeper model  <-  block (i mod l) of the model with l blocks          (order: stack)
                                     block floor(i l / L)                                (order: interleave)

Embedding, head and final norm are carried over; moments of the optimizer and memories of other techniques are copied
like the weights they belong to. A model with several lists of blocks, such as an encoder and a decoder, grows in all of
them in proportion. Paper: Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019, PMLR 97.

The recipe's model is the deepest one, and the run ends with it. Weights that a run starts from are grown when they have
fewer blocks than its first stage, and refused when they have more.

Saves: time, since early steps run a shallow model. Costs: a jump of the loss at each growth, which later steps
recover (`zero_new` avoids it in models with norms before the branches: copies then start as the identity). Not for:
initializations that depend on depth (t_fixup). Compare against a baseline with a fully decayed schedule: "No Train No
Gain" (arXiv 2307.06440) finds that the gain vanishes there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from scrimp.clock import Duration
from scrimp.errors import UserError
from scrimp.growth import (
    check_identity,
    cut,
    deepened,
    empty_outputs,
    halved,
    lists_of_blocks,
    origins,
    shallower,
    share_of,
)
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import State


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
        undivided="it makes new blocks of old ones, which another rank may hold.",
        example={"at": (0.5,)},
        neutral={"at": ()},
    )
    at: tuple[str | float, ...] = (0.1, 0.3)
    """Points at which the model grows to its next depth; the recipe's model is the last one."""
    depths: tuple[int, ...] = ()
    """Depth of each stage, of the longest list of blocks; empty halves the recipe's depth once for each point."""
    stacks: str = "*"
    """Pattern of the lists of blocks that grow, such as `encoder.*`; the others keep their depth."""
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
        lists = lists_of_blocks(model, self.stacks, run.where(self, "stacks"))
        total = max(lists.values())
        depths = self.depths or halved(total, len(self.at))
        if depths[-1] != total or depths[0] < 1 or list(depths) != sorted(depths):
            what = f"depths {list(depths)} do not grow from at least 1 to the model's {total} blocks."
            raise UserError(what, run.where(self, "depths"), "Set `depths`, or fewer points in `at`.")
        for path, count in lists.items():
            if self.zero_new:
                check_identity(model.get_submodule(f"{path}.0".lstrip(".")), run.where(self, "zero_new"))
            cut(model, path, share_of(count, depths[run.clock.passed(self.at)], total))
        return model

    def carry(self, state: State, run: Run) -> State:
        """Copies for the blocks that the state does not have; a resume within a stage has them all."""
        for path, old, depth in shallower(run.model, state.get("model", {}), self.stacks):
            if old > depth:
                what = f"the weights to start from have {old} blocks in `{path}`, this stage has {depth}."
                raise UserError(what, run.where(self), "Choose `depths` or `model.layers` that begin with as many.")
            origin = origins(old, depth, self.order)
            state = {kind: deepened(tensors, path, origin, self._zero(kind)) for kind, tensors in state.items()}
        return state

    def _zero(self, kind: str) -> Callable[[str, Tensor], bool]:
        """Which tensors of copies are zeros."""
        if kind.startswith("optimizer."):
            return lambda rest, tensor: self.states == "reset"
        return lambda rest, tensor: self.zero_new and empty_outputs(rest, tensor)
