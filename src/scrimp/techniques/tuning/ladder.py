"""Ladder side tuning: a small network beside the frozen model, and no gradient ever enters the model.

    s[0] = D[0] h[0]                                         h[0] embedded tokens, h[i] states after block i
    s[i] = block[i](mu[i] D[i] h[i] + (1 - mu[i]) s[i-1])    mu[i] = sigmoid(alpha[i] / T), T = 0.1, alpha 0 at first
    y    = h[L] + U norm(s[L])                               U zero at first: the run begins as the model is

Only D, alpha, the side's blocks and U are trained. The side has blocks like the model's, `reduction` times thinner:
width C / reduction and as many heads of the same width D as go into it. Paper: Sung et al., "LST: Ladder Side-Tuning
for Parameter and Memory Efficient Transfer Learning", NeurIPS 2022, arXiv 2206.06522. Adding to the model's states,
instead of taking their place, is this file's; so is a side that is not cut out of the model's own weights.

Saves: activations of the whole model, whose blocks keep nothing but their outputs, and the backward pass through it,
half of the computation. Costs: a network to run as well when the model is used; a path for gradients that is shorter
and weaker than one through the model. Not for: export as plain weights, since the side stays beside the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.seams import Linear
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run

FIRST: Final = 10_000
"""Number of the first of the side's blocks; keys their dropout, apart from the model's."""


@dataclass(frozen=True, kw_only=True)
class Ladder(Technique):
    """A small network beside the frozen model."""

    card = Card(
        paper="arXiv:2206.06522",
        section="Parameter-efficient tuning",
        claim="2.7 times the memory savings of other tuning methods (the authors' repository)",
        saves="activations of the model, and the backward pass through it",
        costs="a network to run beside the model, in use too",
        trains=("*side.*",),
        refuses={
            "frozen weights": "It keeps the model out of the backward pass, so that nothing in it can be tuned.",
            "depth schedule": "The side has a rung for every block.",
            "width schedule": "The side's rungs are as wide as the blocks they stand on.",
        },
        phase={"model": "beside"},
        undivided="its side network reads the states of all blocks.",
        example={"reduction": 4},
        remedies=({},),
    )
    reduction: int = 8
    """How many times thinner the side is."""
    temperature: float = 0.1
    """T, which the gates' arguments are divided by."""

    def __post_init__(self) -> None:
        at_least(1, self, "reduction")
        if not self.temperature > 0:
            raise UserError(f"temperature must be above 0, not {self.temperature}.")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Put the side beside the blocks."""
        net: Any = next((m for m in model.modules() if hasattr(m, "side") and hasattr(m, "blocks")), None)
        if net is None:
            what = f"{type(model).__name__} has no seam `side`, where a network could look at its states."
            raise UserError(what, run.where(self), "Use a `transformer`.")
        c = net.config
        width, thin = c.width // self.reduction, max(1, c.heads // self.reduction)
        if not width:
            raise UserError(f"a width of {c.width} cannot be {self.reduction} times thinner.", run.where(self))
        trunk = replace(c, width=width, embed_width=0, heads=thin, kv_heads=0, head_width=c.head_dim,
                        hidden=c.hidden // self.reduction)  # fmt: skip
        kind = type(net.blocks[0])
        rungs = [
            Rung(c.width, kind(trunk, FIRST + i, c.causal), width, self.temperature) for i in range(len(net.blocks))
        ]
        norm = type(net.blocks[0].attention_norm)(width, c.norm, c.norm_eps, c.bias)
        side: Any = Side(Linear(c.width, width, std=c.width**-0.5), rungs, norm, Up(width, c.width))
        like, own = net.embed.weight, side.down.weight
        if (own.device, own.dtype) != (like.device, like.dtype):
            # A model in somebody's own loop has its device and type already.
            side.to(like.device, like.dtype)
        net.side = side
        return model


class Rung(nn.Module):
    """A block of the side, which sees a mix of the model's states and its own.

    Shapes: states [B, T, C], own [B, T, c] -> [B, T, c].
    """

    def __init__(self, width: int, block: nn.Module, thin: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.down = Linear(width, thin, std=width**-0.5)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.block = block

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Zero: a gate that is half open."""
        value.zero_()

    def forward(self, states: Tensor, own: Tensor, *more: Any) -> Tensor:
        mu = torch.sigmoid(self.alpha / self.temperature)
        return self.block(own + mu * (self.down(states) - own), *more)


class Side(nn.Module):
    """(the model's states, rope, mask, sample, cache) -> the last states with what the side adds, [B, T, C]."""

    def __init__(self, down: nn.Module, rungs: list[Rung], norm: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.rungs, self.norm, self.up = down, nn.ModuleList(rungs), norm, up

    def forward(
        self,
        states: list[Tensor],
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        sample: Tensor | None,
        cache: list[list[Tensor]] | None,
    ) -> Tensor:
        count = len(self.rungs)
        if cache is not None and len(cache) == count:
            # The side's keys and values go behind the model's.
            cache.extend([] for _ in range(count))
        # In the type of the model's states, which autocast leaves wide.
        own = self.down(states[0]).to(states[0].dtype)
        for i, rung in enumerate(self.rungs):
            own = rung(states[i + 1], own, rope, mask, sample, cache[count + i] if cache is not None else None)
        return states[-1] + self.up(self.norm(own))


class Up(Linear):
    """A linear layer without bias whose weight begins at zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False, std=0.0)
