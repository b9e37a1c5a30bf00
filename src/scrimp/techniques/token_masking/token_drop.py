"""Token dropping: the middle layers see a part of the tokens, a random one or that which is hard to guess.

    S = some of the places, in their order
    y[S] = block(x[S])        y[i] = x[i] for all other places i

The first and the last block see all. The share that is kept grows in steps from `keep` to everything at `until`:

    share = keep + (1 - keep) n / levels while n of the `levels` equal parts of `until` have passed

`mode: random` draws S anew in each layer: Yao et al., "Random-LTD: Random and Layerwise Token Dropping Brings Efficient
Training for Large-scale Transformers", arXiv 2211.11586. `mode: loss` keeps the tokens that were hard to guess, the
same ones in all middle layers: Hou et al., "Token Dropping for Efficient BERT Pretraining", ACL 2022, arXiv 2203.13240.

    m[v] <- s m[v] + (1 - s) (mean loss of the hidden tokens of the step that were v),     m[v] = log V at first
    S = the places i with the highest m[token at i];  special tokens before all others, padding after them

Which of two alike tokens is kept is drawn, hence equal m are `random` with one draw for all layers. The choice reads
all of a sequence, so that a causal model could tell from it what is to come: `loss` is for masked language modeling.

What was dropped rejoins after the layer. Which tokens are kept is a function of the sample's number, the layer and m,
which moves once a step, so that two passes over a batch, as sharpness-aware minimization makes them, drop the same.
Kept tokens stay in their order, with their own rotary angles and their own rows and columns of the mask.

Saves: computation and activations of the middle layers, in proportion. Costs: tokens train some layers less; gathering
and scattering; with `loss` one more product of the head with the hidden tokens. Not for: models of fewer than three
blocks, nor short sequences. Validation sees all tokens in all layers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.clock import Duration
from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.models.seams import blocks, wrap_forward
from scrimp.models.subsets import drawn, gathered, highest, scattered, some_mask, some_rope
from scrimp.technique import Card, Technique, above_zero, at_least, below_one
from scrimp.world import ALONE

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Step
    from scrimp.world import World

INPUTS = ("x", "rope", "mask", "sample", "cache", "states", "states_mask")
"""What a block takes, which must be known to give it some of the tokens only."""
ROWS: Final = 512
"""Hidden tokens whose logits exist at once, on top of those of the loss."""


@dataclass(frozen=True, kw_only=True)
class TokenDrop(Technique):
    """The middle layers see a part of the tokens."""

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
    mode: Literal["random", "loss"] = "random"
    """Which tokens are kept: a random part, or those of the ids that have been hardest to guess."""
    smoothing: float = 0.99
    """Share of the old value in the running loss of an id."""

    def __post_init__(self) -> None:
        below_one(self, "smoothing")
        at_least(1, self, "levels", "multiple")
        at_least(0, self, "special")
        above_zero(self, "keep")
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
        hardest = self._hardest(model, share, run) if self.mode == "loss" else None
        for name, block in chosen.items() if share < 1 else ():
            if tuple(inspect.signature(block.forward).parameters)[: len(INPUTS)] != INPUTS:
                what = f"the block `{name}` ({type(block).__name__}) does not take {', '.join(INPUTS)}."
                raise UserError(what, run.where(self), "Use a model of ours, or blocks that take the same.")
            key = layer_key("" if hardest else name)
            block.add_module("token_subset", Subset(key, share, self.multiple, self.special, hardest))
            wrap_forward(block, lambda forward, block=block: partly(block, cast(Any, forward)))
        return model

    def step(self, step: Step, run: Run) -> Step:
        """Afterwards, take note of the losses that the step has seen."""
        hardest = next((m for m in run.model.modules() if isinstance(m, Hardest)), None)
        if hardest is None:
            return step
        memory = run.memory(self)

        def noted() -> bool:
            updated = step()
            hardest.note(memory["loss"], self.smoothing, run.world)
            return updated

        return noted

    def _hardest(self, model: Any, share: float, run: Run) -> Hardest | None:
        """Reads ids where they are embedded, and their losses where they are predicted."""
        if getattr(getattr(model, "config", None), "head", "") != "mlm" or model.config.causal:
            what = "`loss` ranks tokens by how hard they are to guess when hidden, and this run hides none."
            raise UserError(what, run.where(self, "mode"), "Use the task `masked-lm`, or set `mode: random`.")
        if run.world.ranks("pipeline") > 1:
            what = "`loss` needs the losses of the last stage where tokens are embedded, which is the first."
            raise UserError(what, run.where(self, "mode"), "Set `mode: random`, or drop `pipeline`.")
        weight = model.embed.weight
        dtype, vocab = torch.promote_types(weight.dtype, torch.float32), len(weight)
        memory = run.memory(self)
        memory["loss"] = torch.full((vocab,), math.log(vocab), dtype=dtype, device=run.device)
        if share >= 1:
            return None
        special = torch.zeros(vocab, dtype=torch.bool)
        special[torch.from_numpy(run.task.special)] = True
        hardest = Hardest(special.to(run.device), torch.zeros_like(memory["loss"]))
        wrap_forward(model.embed, lambda forward: hardest.reading(memory, cast(Any, forward)))
        wrap_forward(model.head_loss, lambda forward: hardest.watching(model, cast(Any, forward)))
        return hardest


def layer_key(name: str) -> int:
    """Tells layers apart, and from dropout's sites; the sample's number has the seed in it already."""
    return generator(0, f"token_drop/{name}").initial_seed() & 0xFFFFFFFF


class Subset(nn.Module):
    """Draws the places of the tokens that a layer sees. A module, so that compiled blocks share one code.

    Args:
        key: of the layer.
        share: of the tokens that are kept.
        multiple: the kept length is rounded up to a multiple of it.
        first: tokens at the start that are always kept.
        hardest: scores the tokens; None for a draw among all.
    """

    def __init__(self, key: int, share: float, multiple: int, first: int, hardest: Hardest | None = None) -> None:
        super().__init__()
        self.key, self.share, self.multiple, self.first = key, share, multiple, first
        self.hardest = hardest

    def forward(self, x: Tensor, sample: Tensor | None, mask: Tensor | None = None) -> Tensor | None:
        """Places [B, K] in rising order, or None for all."""
        if sample is None:
            raise ValueError("token_drop needs the samples' numbers: pass `sample` to the model.")
        tokens = x.shape[1]
        count = kept(tokens, self.share, self.multiple)
        if count >= tokens:
            return None
        if self.hardest is None:
            return drawn(sample.to(x.device), self.key, tokens, count, min(self.first, count))
        return highest(self.hardest(mask, self.first), sample.to(x.device), self.key, count)


class Hardest(nn.Module):
    """Scores the tokens of a pass by how hard their ids have been to guess.

    Between steps it holds nothing that counts: what a step has seen is noted at its end.

    Args:
        special: which ids are never dropped, bool [V].
        nothing: zeros, [V].
    """

    def __init__(self, special: Tensor, nothing: Tensor) -> None:
        super().__init__()
        self.special, self.total, self.count = special, nothing, nothing.clone()
        self.scores = nothing[None]

    def forward(self, mask: Tensor | None, first: int) -> Tensor:
        """Scores of the tokens that were embedded last, [B, T]; the lowest where padding is, which nothing sees."""
        scores = self.scores.clone()
        if mask is not None and mask.dtype == torch.bool:
            own = mask[:, 0].diagonal(dim1=1, dim2=2) if mask.shape[2] > 1 else mask[:, 0, 0]
            scores = scores.masked_fill(~own, -math.inf)
        scores[:, :first] = math.inf
        return scores

    def reading(self, memory: dict[str, Tensor], forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The embedding, and the scores of what it embeds."""

        def read(ids: Tensor) -> Tensor:
            self.scores = memory["loss"][ids].masked_fill(self.special[ids], math.inf)
            return forward(ids)

        return read

    def watching(self, model: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The head with its loss, and before it the loss of each hidden token."""

        def watched(hidden: Tensor, head: nn.Module, targets: Tensor, smoothing: float = 0.0) -> Tensor:
            if model.training and torch.is_grad_enabled():
                self._add(hidden.detach().flatten(0, -2), head, targets.flatten())
            return forward(hidden, head, targets, smoothing)

        return watched

    @torch.no_grad()
    def _add(self, hidden: Tensor, head: nn.Module, targets: Tensor) -> None:
        kind = hidden.device.type
        half = torch.is_autocast_enabled(kind)
        # A weight that is cast here must not be kept for the pass that wants its gradient.
        with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=half, cache_enabled=False):
            for rows, ids in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
                found = F.cross_entropy(head(rows), ids, reduction="none").to(self.total.dtype)
                self.total.index_add_(0, ids.clamp(min=0), found)
                self.count.index_add_(0, ids.clamp(min=0), (ids >= 0).to(found.dtype))

    def note(self, losses: Tensor, smoothing: float, world: World = ALONE) -> None:
        """Move the running losses [V] of the ids that any rank has seen, and forget what was."""
        total, count = world.total(self.total), world.total(self.count)
        mean = total / count.clamp(min=1)
        losses.copy_(torch.where(count > 0, smoothing * losses + (1 - smoothing) * mean, losses))
        self.total.zero_()
        self.count.zero_()


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
        places = subset(x, sample, mask) if block.training and cache is None else None
        if places is None:
            return forward(x, rope, mask, sample, cache, states, states_mask)
        rope, mask = some_rope(rope, places), some_mask(mask, places)
        y = forward(gathered(x, places), rope, mask, sample, None, states, states_mask)
        return scattered(x, places, y)

    return some
