"""Progressive layer dropping and stochastic depth: leave out random blocks while training, deep ones more often.

    theta(t) = (1 - keep) exp(-gamma t / T) + keep          mode: progressive
    theta    = keep                                         mode: constant
    block i of L, counted from 0, is kept with p = 1 - (i / L) (1 - theta):
    x <- x + (block(x) - x) / p  if kept,    x <- x  if not

One draw for each block and step, for the whole batch: a block that is left out is not computed. Kept branches are
scaled by 1 / p, so that each block's output is right on average. Validation and export use all blocks, unscaled.
In the long run a share (L - 1) / (2 L) (1 - theta) of the blocks is left out: 23 % of 12 at theta = 0.5. Papers: Zhang
and He, "Accelerating Training of Transformer-Based Language Models with Progressive Layer Dropping", NeurIPS 2020,
arXiv 2010.13369; Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, arXiv 1603.09382, which counts blocks
from 1, and scales in validation instead.

Saves: time, that of the blocks left out; it also regularizes. Costs: noise, for which shallow models have little room.
Not for: norms after the branches, where a block is no x + branches; memory, as the peak is a step with all blocks. A
baseline with a fully decayed schedule may do as well in the same time: "No Train No Gain" (arXiv 2307.06440).

The draw is a function of (seed, step, name of the block): all parts of a batch, both passes of a technique that takes
two, and all ranks leave out the same blocks. Each list of blocks, as of an encoder and a decoder, counts on its own;
its first block is always kept. Weights of a block that is left out get no gradient: update rules skip them, their decay
and their counters. The first step of each stage keeps all blocks, so that a plan sees what a step can need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.models.seams import blocks, wrap_forward
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class LayerDrop(Technique):
    """Leave out random blocks while training, deep ones more often."""

    card = Card(
        paper="arXiv:2010.13369",
        section="Incremental learning",
        claim="24% less time a sample in pre-training BERT (abstract)",
        saves="time of the blocks left out",
        costs="noise",
        phase={"wrap": "dropped"},
        example={"keep": 0.5},
        neutral={"keep": 1.0},
    )
    mode: Literal["progressive", "constant"] = "progressive"
    """progressive keeps all blocks at first; constant is stochastic depth."""
    keep: float = 0.5
    """theta in the end: about the share of steps that the last block takes part in."""
    gamma: float = 100.0
    """How fast theta falls; it is within 1 % of its way to `keep` after 4.6 / gamma of the run."""

    def __post_init__(self) -> None:
        at_least(0, self, "gamma")
        if not 0 < self.keep <= 1:
            raise UserError(f"keep must be more than 0 and at most 1, not {self.keep}.")

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Gate every block but the first of each list."""
        if run.task is None:
            what = "drops by the run's step, which your own loop does not have."
            raise UserError(f"`{self.name}` {what}", run.where(self), "Use scrimp.train.")
        found = blocks(model, run.where(self))
        depth = depths(list(found))
        deep = any(place for place, _ in depth.values())
        if not deep and not any("depth schedule" in t.card.sets for t in run.order.techniques):
            what = "no list has a second block, and the first is always kept."
            raise UserError(what, run.where(self), "Drop it, or use a deeper model.")
        if any(not getattr(block, "pre", True) for block in found.values()):
            what = "blocks with norms after their branches cannot be left out."
            raise UserError(what, run.where(self), "Set `model.norm_at: pre`, or drop `layer_drop`.")
        for name, block in found.items():
            wrap_forward(block, lambda forward, name=name, block=block: self._gated(forward, name, block, depth, run))
        return model

    def theta(self, run: Run) -> float:
        """Of the current step; 1 in the first of a stage."""
        if run.clock.position == run.clock.begun:
            return 1.0
        fallen = 1.0 if self.mode == "constant" else 1 - math.exp(-self.gamma * run.clock.progress)
        return 1 - (1 - self.keep) * fallen

    def _gated(
        self,
        forward: Callable[..., object],
        name: str,
        block: nn.Module,
        depth: dict[str, tuple[int, int]],
        run: Run,
    ) -> Callable[..., object]:
        first = name == next(iter(depth))

        def gated(*args: Any, **kwargs: Any) -> object:
            if not block.training:
                return forward(*args, **kwargs)
            theta, step = self.theta(run), run.clock.step
            if first:
                kept = [drawn(run.seed, step, n) < chance(*place, theta) for n, place in depth.items()]
                run.log(self, kept=sum(kept) / len(kept))
            p = chance(*depth[name], theta)
            x: Any = args[0] if args else next(iter(kwargs.values()))
            if drawn(run.seed, step, name) >= p:
                return x
            y = forward(*args, **kwargs)
            if not isinstance(y, Tensor) or y.shape != x.shape:
                what = f"`{name}` does not map a tensor to one of the same shape, so that it cannot be left out."
                raise UserError(what, run.where(self), "Use a model whose blocks do.")
            # A step that keeps all by chance holds as much as one in which nothing can be left out.
            return y if self.keep == 1 or depth[name][0] == 0 else x + (y - x) / p

        return gated


def depths(names: list[str]) -> dict[str, tuple[int, int]]:
    """Blocks by name -> (place in its list, length of the list)."""
    lists: dict[str, list[str]] = {}
    for name in names:
        lists.setdefault(name.rpartition(".")[0], []).append(name)
    return {name: (i, len(own)) for own in lists.values() for i, name in enumerate(own)}


def chance(place: int, length: int, theta: float) -> float:
    """That a block is kept."""
    return 1 - place / length * (1 - theta)


def drawn(seed: int, step: int, name: str) -> float:
    """Uniform in [0, 1), on the host: a run on tensors without values draws the same."""
    bits = generator(seed, f"layer_drop/{step}/{name}").initial_seed()
    return (bits >> 10) / 2**53
