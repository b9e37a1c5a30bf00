"""Visual prompt tuning: trained tokens between the class token and the patches, the model itself frozen.

    x = [class, P, patches]                  shallow: P [length, C] trained, once
    x <- block([class, P[i], patches])       deep: block i gets its own, in place of what the last one made of them

Paper: Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119. First values are uniform within
sqrt(6 / (channels * patch^2 + C)). Prompts have no positions, and are cut off again before the last norm.

Saves: gradients and states of the model's weights, and disk. Costs: `length` more tokens in every block. Not for:
memory taken by activations, which grow; models of texts, which have `prompt`. The head begins anew and is trained too,
where the task's head does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class VPT(Technique):
    """Trained tokens among the patches."""

    card = Card(
        paper="arXiv:2203.12119",
        section="Parameter-efficient tuning",
        saves="gradients and states of the model's weights, and disk",
        costs="`length` more tokens in every block",
        sets=("prompts",),
        trains=("*prompts.*|*.enter.*",),
        refuses={
            "tokens of a layer": "It may leave out prompts, which stand among the patches.",
            "depth schedule": "Copies of blocks would begin with copies of their prompts.",
        },
        phase={"model": "seams"},
        example={"length": 2, "deep": True},
    )
    length: int = 10
    """How many tokens."""
    deep: bool = False
    """Whether each block gets its own, in place of what the block before made of the last."""

    def __post_init__(self) -> None:
        at_least(1, self, "length")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Put the tokens among the patches."""
        net: Any = next((m for m in model.modules() if hasattr(m, "prompts") and hasattr(m, "patches")), None)
        if net is None:
            what = f"{type(model).__name__} has no place for prompts among patches."
            raise UserError(what, run.where(self), "Use a model of images, or `prompt` on models of texts.")
        weight: Tensor = net.patches.weight  # [C, channels * patch^2]
        bound = math.sqrt(6 / (weight.shape[1] + weight.shape[0]))
        net.prompts = Prompts(weight.new_empty(self.length, weight.shape[0]), bound)
        net.prepended = self.length
        for block in list(net.blocks)[1:] if self.deep else ():
            block.enter = Replaced(weight.new_empty(self.length, weight.shape[0]), bound, net.first)
        return model


class Prompts(nn.Module):
    """() -> the tokens [P, C].

    Args:
        like: of their shape, type and device.
        bound: of first values.
    """

    def __init__(self, like: Tensor, bound: float) -> None:
        super().__init__()
        self.bound, self.weight = bound, nn.Parameter(like)

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Uniform."""
        value.uniform_(-self.bound, self.bound, generator=generator)

    def forward(self) -> Tensor:
        return self.weight


class Replaced(Prompts):
    """Tokens [B, T, C] -> the same with other prompts.

    Args:
        first: tokens before the prompts.
    """

    def __init__(self, like: Tensor, bound: float, first: int) -> None:
        super().__init__(like, bound)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        prompts = self.weight.to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, : self.first], prompts, x[:, self.first + prompts.shape[1] :]], 1)
