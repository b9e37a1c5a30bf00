"""Token dropping: the middle layers see a random part of the tokens, another one in each layer.

    S = a random subset of the places, in their order
    y[S] = block(x[S])        y[i] = x[i] for all other places i

The first and the last block see all. The share that is kept grows in steps from `keep` to everything at `until`:

    share = keep + (1 - keep) n / levels while n of the `levels` equal parts of `until` have passed

Paper: Yao et al., "Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for Large-scale
Transformers", arXiv 2211.11586. Dropping in the middle layers of BERT is from Hou et al., "Token Dropping for Efficient
BERT Pretraining", ACL 2022, arXiv 2203.13240, who choose tokens by their loss and not at random.

What was dropped rejoins after the layer. Which tokens are kept is a function of the sample's number and the layer, so
that two passes over a batch, as sharpness-aware minimization makes them, drop the same. Kept tokens stay in their
order, with their own rotary angles and their own rows and columns of the mask, hence causality holds.

Saves: computation and activations of the middle layers, in proportion. Costs: tokens train some layers less; gathering
and scattering. Not for: models of fewer than three blocks, nor short sequences. Validation sees all tokens in all
layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from scrimp.clock import Duration
from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.models.seams import blocks, wrap_forward
from scrimp.models.subsets import drawn, gathered, scattered, some_mask, some_rope
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run

INPUTS = ("x", "rope", "mask", "sample", "cache", "states", "states_mask")
"""What a block takes, which must be known to give it some of the tokens only."""


@dataclass(frozen=True, kw_only=True)
class TokenDrop(Technique):
    """The middle layers see a random part of the tokens."""

    card = Card(
        paper="arXiv:2211.11586",
        section="Token masking",
        saves="computation and activations of the middle layers",
        costs="tokens train some layers less",
        sets=("tokens of a layer",),
        phase={"wrap": "tokens"},
        example={"keep": 0.5, "until": 0.5, "levels": 2},
        neutral={"keep": 1.0},
    )
    keep: float = 0.5
    """Share of the tokens that the middle layers see at first."""
    until: str | float = 0.7
    """Duration until they see all."""
    levels: int = 8
    """How many times the share grows; the run is rebuilt, hence planned, for each."""
    multiple: int = 8
    """Kept lengths are rounded up to a multiple of this."""
    special: int = 1
    """So many tokens at the start of a sequence are never dropped, such as a class token."""

    def __post_init__(self) -> None:
        at_least(1, self, "levels", "multiple")
        at_least(0, self, "special")
        if not 0 < self.keep <= 1:
            raise UserError(f"keep must be above 0 and at most 1, not {self.keep}.")
        Duration.parse(self.until, "until")

    def stages(self) -> tuple[str | float, ...]:
        """The points at which the share grows."""
        if self.keep == 1:
            return ()
        return Duration.parse(self.until).evenly(self.levels)

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Give the blocks between the first and the last of each list some of the tokens."""
        if self.keep == 1:
            return model
        chosen = middle(blocks(model, run.where(self)))
        growing = any("depth schedule" in t.card.sets for t in run.order.techniques)
        if not chosen and not growing:
            what = "there are no middle layers: each list of blocks has fewer than three."
            raise UserError(what, run.where(self), "Drop it, or use a deeper model.")
        context = getattr(run.data.train, "context", 0)
        if 1 < context <= kept(context, self.keep, self.multiple):
            what = f"{self.keep:g} of {context} tokens, rounded up to a multiple of {self.multiple}, are all of them."
            raise UserError(what, run.where(self), "Lower `keep` or `multiple`.")
        share = self.keep + (1 - self.keep) * run.clock.passed(self.stages()) / self.levels
        run.log(self, keep=min(share, 1.0))
        for name, block in chosen.items() if share < 1 else ():
            if tuple(inspect.signature(block.forward).parameters)[: len(INPUTS)] != INPUTS:
                what = f"the block `{name}` ({type(block).__name__}) does not take {', '.join(INPUTS)}."
                raise UserError(what, run.where(self), "Use a model of ours, or blocks that take the same.")
            # The sample's number has the seed in it already; the key tells layers apart, and from dropout's sites.
            key = generator(0, f"token_drop/{name}").initial_seed() & 0xFFFFFFFF
            block.add_module("token_subset", Subset(key, share, self.multiple, self.special))
            wrap_forward(block, lambda forward, block=block: partly(block, cast(Any, forward)))
        return model


class Subset(nn.Module):
    """Draws the places of the tokens that a layer sees. A module, so that compiled blocks share one code.

    Args:
        key: of the layer.
        share: of the tokens that are kept.
        multiple: the kept length is rounded up to a multiple of it.
        first: tokens at the start that are always kept.
    """

    def __init__(self, key: int, share: float, multiple: int, first: int) -> None:
        super().__init__()
        self.key, self.share, self.multiple, self.first = key, share, multiple, first

    def forward(self, x: Tensor, sample: Tensor | None) -> Tensor | None:
        """Places [B, K] in rising order, or None for all."""
        if sample is None:
            raise ValueError("token_drop needs the samples' numbers: pass `sample` to the model.")
        tokens = x.shape[1]
        count = kept(tokens, self.share, self.multiple)
        if count >= tokens:
            return None
        return drawn(sample.to(x.device), self.key, tokens, count, min(self.first, count))


def kept(tokens: int, share: float, multiple: int) -> int:
    """How many tokens a share is, rounded up to a multiple; it may be more than all."""
    # A billionth less, so that 0.1 of 80 tokens are 8 and not 16.
    return max(-(-int(-(-(share * tokens - 1e-9) // 1)) // multiple) * multiple, 1)


def middle(found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The blocks that are neither the first nor the last of their list."""
    lists: dict[str, list[str]] = {}
    for name in found:
        lists.setdefault(name.rpartition(".")[0], []).append(name)
    return {name: found[name] for names in lists.values() for name in names[1:-1]}


def partly(block: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A block's forward over some of the tokens while it trains."""

    def some(
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        sample: Tensor | None = None,
        cache: list[Tensor] | None = None,
        states: Tensor | None = None,
        states_mask: Tensor | None = None,
    ) -> Tensor:
        subset: Any = block.token_subset
        places = subset(x, sample) if block.training and cache is None else None
        if places is None:
            return forward(x, rope, mask, sample, cache, states, states_mask)
        rope, mask = some_rope(rope, places), some_mask(mask, places)
        y = forward(gathered(x, places), rope, mask, sample, None, states, states_mask)
        return scattered(x, places, y)

    return some
