"""Recompute activations in the backward pass instead of keeping them.

    kept of a block of B x T tokens and width C, in units of B T C numbers:  16 without,  1 with mode block

    block         keep the inputs of blocks, run each again
    selective     keep outputs of expensive operators (`save`), run cheap ones again: norms, activations, residuals
    sqrt          keep the inputs of segments of g blocks, g about sqrt(L / 16): of single blocks, up to 16 of them
    optimal       the cheapest schedule within `budget`, by dynamic programming over the chain of blocks
    milp          the cheapest of all schedules, by an integer program; seconds to minutes, and scipy
    dynamic       keep all, and evict what is cheap, large and long unused when the budget is full
    auto          with a budget, the cheapest of none, selective, every so-many-th block, block and optimal that fits

Papers: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174; selective: Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models", MLSys 2023, arXiv 2205.05198. The others are told where
they are solved: `scrimp.remat.rotor`, `.checkmate` and `.eviction`.

A budget counts the bytes that blocks make in forward passes, first or again, and hold; gradients, weights and the head
are beside it. What blocks cost is measured when the first batch comes, on tensors without values.

Saves: activations. Costs: the second forward pass, a third more computation with mode block. Not for: runs that fit, or
small batches, whose peak is the update. Selective keeps outputs even where the backward pass would not have needed
them, so with small savings in sight a budget may be the better half-way house. Gradients are bitwise those of a run
without.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from scrimp.errors import UserError
from scrimp.limits import size_of
from scrimp.models.seams import blocks, matching, wrap_forward
from scrimp.remat.choose import policy
from scrimp.remat.executor import Player
from scrimp.remat.measure import Link
from scrimp.remat.selective import checkpointed
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run

BUDGETED = ("optimal", "milp", "dynamic")
"""Modes that need a budget."""


@dataclass(frozen=True, kw_only=True)
class Recompute(Technique):
    """Recompute activations in the backward pass instead of keeping them."""

    card = Card(
        paper="arXiv:1604.06174",
        section="Rematerialization",
        saves="activations: 1 of 16 parts of a block's remains",
        costs="a second forward pass of the chosen blocks",
        phase={"wrap": "recompute"},
        sets=("recomputation",),
        example={"mode": "block"},
        remedies=({"mode": "selective"}, {"mode": "block"}),
    )
    mode: Literal["auto", "block", "selective", "sqrt", "optimal", "milp", "dynamic"] = "auto"
    """block: keep inputs of blocks. selective: keep what `save` says. sqrt: keep inputs of segments. optimal, milp,
    dynamic: what fits into `budget`. auto: the cheapest of these that fits into `budget`; block if there is none."""
    budget: str | float = 0
    """Bytes that blocks may hold for the backward pass, such as 2GB; up to 1, a share of what they hold plainly."""
    every: int = 1
    """Treat every so-many-th block, from the first; modes block and selective."""
    segment: int = 0
    """Blocks a segment of mode sqrt; 0 takes the length at which the least is held."""
    save: Literal["products", "half", "attention"] = "products"
    """What mode selective keeps."""
    blocks: str = ""
    """Pattern of the modules to treat, for modes block and selective; empty means the model's blocks."""

    def __post_init__(self) -> None:
        at_least(1, self, "every")
        at_least(0, self, "segment")
        if isinstance(self.budget, str):
            size_of(self.budget, "budget")
        else:
            at_least(0, self, "budget")
        self._check_mode()

    def _check_mode(self) -> None:
        """Settings that a mode would not look at are mistakes."""
        if self.mode in BUDGETED and not self.budget:
            raise UserError(f"mode {self.mode} needs a budget.", "budget", "Give for example 0.5, or 2GB.")
        if self.mode in ("block", "selective", "sqrt") and self.budget:
            raise UserError(f"mode {self.mode} knows no budget.", "budget", "Drop it, or the mode.")
        if self.segment and self.mode != "sqrt":
            raise UserError(f"mode {self.mode} has no segments.", "segment", "Drop it, or set mode to sqrt.")
        if self.chained and (self.every > 1 or self.blocks):
            name = "every" if self.every > 1 else "blocks"
            raise UserError(f"treats all blocks of the model, so that `{name}` has no meaning.", name, "Drop it.")

    @property
    def chained(self) -> bool:
        """Whether the blocks are treated as a chain, not each by itself."""
        return self.mode in ("sqrt", *BUDGETED) or bool(self.budget)

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Checkpoint the chosen blocks' forward passes, or play them as chains."""
        if self.chained:
            return self._play(model, run)
        if self.blocks:
            modules = dict(model.named_modules())
            found = matching(self.blocks, [n for n in modules if n], "module", run.where(self, "blocks"))
            chosen = [modules[name] for name in found]
        else:
            chosen = list(blocks(model, run.where(self)).values())
        save = self.save if self.mode == "selective" else None
        for block in chosen[:: self.every]:
            wrap_forward(block, partial(checkpointed, draws=draws(model), save=save))
        return model

    def _play(self, model: nn.Module, run: Run) -> nn.Module:
        if any("compilation" in t.card.sets for t in run.order.techniques):
            fix = "Set mode to block or selective, without a budget, or drop the compiler."
            raise UserError("runs blocks in an order of its own, which cannot be compiled.", run.where(self), fix)
        lists: dict[str, list[nn.Module]] = {}
        for name, block in blocks(model, run.where(self)).items():
            lists.setdefault(name.rpartition(".")[0], []).append(block)
        if len(lists) > 1 and (isinstance(self.budget, str) or self.budget > 1):
            what = f"the model has {len(lists)} lists of blocks, which cannot share bytes."
            raise UserError(what, run.where(self, "budget"), "Give a share of what they hold, such as 0.5.")
        for chain in lists.values():
            links = [Link.of(block) for block in chain]
            choose = partial(policy, self.mode, self.budget, self.segment, links)
            player = Player([link.forward for link in links], choose, draws(model))
            for i, block in enumerate(chain):
                wrap_forward(block, lambda forward, player=player, i=i: partial(player.run, i))
        return model


def draws(model: nn.Module) -> bool:
    """Whether a model may draw from torch's generator. Our own dropout does not; another model may, unseen."""
    ours = type(model).__module__.partition(".")[0] == "scrimp"
    return not ours or any(isinstance(m, _DropoutNd) and m.p > 0 for m in model.modules())
