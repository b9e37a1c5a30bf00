"""Compound growth: depth, width of the MLPs and length of the input grow together.

    depth    block i of the deeper model  <-  block (i mod l) of the model with l blocks
    width    hidden unit j of the wider MLP  <-  unit (j mod h), what leads out of it divided by the number of copies
    length   the first tokens of each sequence (truncate), or means of k neighboring embeddings (pool)

Paper: Gu et al., "On the Transformer Growth for Progressive BERT Training", NAACL 2021, arXiv 2010.12562, which grows
all three together. Depths, shares and points are settings here, and the defaults are not the paper's. Width keeps the
function (`widths.py` says how, and what becomes of moments); depth does not.

With `pool`, which is for encoders, embeddings are pooled after positions are added, so that every position is trained,
and a pooled token is attended to if any of its tokens is. Each token is then given its group's state: heads and labels
stay as they are, and a hidden token is predicted from the state of its group. A decoder's tokens would see the tokens
they predict in their own group, so that it is refused there. Validation is of the stage's own model: pooled, or, when
truncated, of whole sequences.

Saves: time of early steps, which are cheaper in three ways at once. Costs: a jump of the loss at each growth of depth,
and early steps that hold fewer tokens. Not for: images (resolution_warmup is the twin of length), initializations that
depend on depth. Compare against a baseline with a fully decayed schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.clock import Duration
from scrimp.errors import UserError
from scrimp.growth import cut, deepened, halved, lists_of_blocks, origins, shallower, share_of
from scrimp.models.seams import blocks, wrap_forward
from scrimp.models.subsets import shortened
from scrimp.technique import Card, Technique, at_least
from scrimp.widths import hidden_units, narrow, rounded, widened

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch, State


@dataclass(frozen=True, kw_only=True)
class CompoundGrow(Technique):
    """Grow depth, width and length together."""

    card = Card(
        paper="arXiv:2010.12562",
        section="Incremental learning",
        claim="speeds up BERT's pre-training by 73.6 % (base) and 82.2 % (large) (abstract)",
        saves="time and activation memory of early steps",
        costs="a jump of the loss where depth grows; early steps hold fewer tokens",
        sets=("depth schedule", "width schedule", "length schedule"),
        refuses={"frozen weights": "frozen layers are as wide as they are."},
        phase={"model": "sizes", "carry": "grow", "batch": "length"},
        undivided="it makes new blocks of old ones, which another rank may hold.",
        example={"at": (0.5,)},
        neutral={"at": ()},
    )
    at: tuple[str | float, ...] = (0.3,)
    """Points at which the model grows; the recipe's model is the last one."""
    depths: tuple[int, ...] = ()
    """Depth of each stage, of the longest list of blocks; empty halves the recipe's depth once for each point."""
    hidden: tuple[float, ...] = ()
    """Share of the MLPs' width in each stage but the last; empty means a half in all of them."""
    lengths: tuple[float, ...] = ()
    """Share of the context in each stage but the last; empty means a half in all of them, 1 leaves it whole."""
    length: Literal["truncate", "pool"] = "truncate"
    """What becomes of sequences: their beginnings, or means of neighboring embeddings, for which shares are 1 / k."""
    multiple: int = 8
    """Widths and truncated lengths are rounded up to a multiple of this."""
    noise: float = 0.1
    """What keeps copies of hidden units apart, as a share of the standard deviation of what leads out of them."""

    def __post_init__(self) -> None:
        at_least(0, self, "noise")
        at_least(1, self, "multiple")
        for point in self.at:
            Duration.parse(point, "at")
        if self.depths and len(self.depths) != len(self.at) + 1:
            raise UserError(f"{len(self.at)} points need {len(self.at) + 1} depths, not {len(self.depths)}.", "depths")
        for name in ("hidden", "lengths"):
            shares = getattr(self, name)
            if shares and len(shares) != len(self.at):
                raise UserError(f"{len(self.at)} points need as many shares, not {len(shares)}.", name)
            if list(shares) != sorted(shares) or any(not 0 < share <= 1 for share in shares):
                raise UserError(f"shares must grow, from above 0 to at most 1, not {list(shares)}.", name)
        if self.length == "pool" and any(abs(1 / share - round(1 / share)) > 0.02 for share in self.lengths):
            raise UserError("shares of pooled lengths must be 1 / k, such as 0.5 and 0.25.", "lengths")

    def stages(self) -> tuple[str | float, ...]:
        """The points of growth."""
        return self.at

    def _share(self, shares: tuple[float, ...], run: Run) -> float:
        return (*(shares or (0.5,) * len(self.at)), 1.0)[run.clock.passed(self.at)]

    def _shortens(self) -> bool:
        return any(share < 1 for share in self.lengths) if self.lengths else bool(self.at)

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Keep the first blocks, narrow their MLPs, pool what comes in."""
        lists = lists_of_blocks(model, "*", run.where(self))
        total = max(lists.values())
        depths = self.depths or halved(total, len(self.at))
        if depths[-1] != total or depths[0] < 1 or list(depths) != sorted(depths):
            what = f"depths {list(depths)} do not grow from at least 1 to the model's {total} blocks."
            raise UserError(what, run.where(self, "depths"), "Set `depths`, or fewer points in `at`.")
        for path, count in lists.items():
            cut(model, path, share_of(count, depths[run.clock.passed(self.at)], total))
        for units in hidden_units(model, run.where(self)):
            narrow(model, units, rounded(self._share(self.hidden, run), units.count, self.multiple))
        factor = round(1 / self._share(self.lengths, run))
        if self.length == "pool" and self._shortens():
            _check_pooled(model, run.where(self, "length"))
        if self.length == "pool" and factor > 1:
            pool(model, factor)
        return model

    def carry(self, state: State, run: Run) -> State:
        """Copies for what the state does not have; a resume within a stage has it all."""
        for path, old, depth in shallower(run.model, state.get("model", {}), "*"):
            if old > depth:
                what = f"the weights to start from have {old} blocks in `{path}`, this stage has {depth}."
                raise UserError(what, run.where(self), "Choose `depths` or `model.layers` that begin with as many.")
            origin = origins(old, depth, "stack")
            state = {kind: deepened(tensors, path, origin) for kind, tensors in state.items()}
        return widened(state, hidden_units(run.model), run.seed, self.noise, run.where(self))

    def batch(self, batch: Callable[[int], Batch], run: Run) -> Callable[[int], Batch]:
        """Truncate what has the context's length."""
        if self.length == "pool" or not self._shortens():
            return batch
        context = getattr(run.data.train, "context", 0)
        if context < 2:
            fix = "Set `lengths` to 1 in each stage."
            raise UserError("the data has no sequences to shorten.", run.where(self, "lengths"), fix)
        length = rounded(self._share(self.lengths, run), context, self.multiple)
        if length == context:
            return batch
        return lambda step: shortened(batch(step), context, length)


def _check_pooled(model: nn.Module, where: str) -> None:
    """Whether tokens of a model can be pooled: those of an encoder, with positions in its embeddings or none."""
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "states") or not hasattr(model, "embed") or getattr(config, "causal", True):
        fix = "Set `length: truncate`."
        raise UserError("pooling needs an encoder, whose tokens may see those beside them.", where, fix)
    if config.positions == "rotary":
        raise UserError("rotary positions are no part of what is pooled.", where, "Set `length: truncate`.")


def pool(model: Any, factor: int) -> None:
    """Pool what enters the blocks of an encoder, and give each token its group's state afterwards."""

    def pooled(forward: Callable[..., object]) -> Callable[..., object]:
        return lambda x, sample=None: forward(means(x, factor), sample)

    def masked(forward: Callable[..., object]) -> Callable[..., object]:
        return lambda x, rope=None, mask=None, *rest, **more: forward(x, rope, _any(mask, factor), *rest, **more)

    states = model.states

    def spread(tokens: Tensor, *rest: Any, **more: Any) -> Tensor:
        return states(tokens, *rest, **more).repeat_interleave(factor, 1)[:, : tokens.shape[1]]

    wrap_forward(model.dropout, pooled)
    for block in blocks(model).values():
        wrap_forward(block, masked)
    model.states = spread


def means(x: Tensor, factor: int) -> Tensor:
    """Means of neighbors, of fewer at the end: [B, T, C] -> [B, T / factor rounded up, C]."""
    return F.avg_pool1d(x.transpose(1, 2), factor, ceil_mode=True).transpose(1, 2)


def _any(mask: Tensor | None, factor: int) -> Tensor | None:
    """Which groups hold a token that is attended to: [B, 1, 1, T] -> [B, 1, 1, T / factor rounded up]."""
    if mask is None:
        return None
    if mask.shape[2] != 1:
        raise ValueError("tokens that see different ones cannot be pooled.")
    filled = F.pad(mask, (0, -mask.shape[3] % factor))
    return filled.unflatten(3, (-1, factor)).any(4)
