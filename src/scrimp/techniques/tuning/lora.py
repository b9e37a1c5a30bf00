"""LoRA: a frozen weight plus a trained product of two thin matrices.

    y = W x + b + (alpha / r) B (A x),   A [r, in] uniform at first, B [out, r] zero at first

Only A and B are trained. Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685;
`rank_stabilized` divides by sqrt(r): Kalajdzievski, arXiv 2312.03732.

Saves: gradients and optimizer states of all frozen weights, and disk: a checkpoint of the adapters is small. Costs:
two more products a layer. Not for: memory that is taken by activations: on all linear layers LoRA keeps as many as
full tuning, since each adapter keeps its layer's input (on attention.qkv alone it keeps a third fewer). Add
recompute and fused_loss for those. Export folds the product into the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.seams import Linear, linears
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class LoRA(Technique):
    """Frozen weights plus trained low-rank products."""

    card = Card(
        paper="arXiv:2106.09685",
        section="Parameter-efficient tuning",
        saves="gradients and states of the frozen weights",
        costs="two thin products a layer",
        scope="targets",
        trains=("*.lora.*",),
        phase={"model": "seams", "export": "merged"},
        example={"rank": 2, "targets": "attention.qkv|mlp.up"},
        remedies=({"rank": 8},),
    )
    rank: int = 8
    """r."""
    alpha: float = 16.0
    """Scale of the product: alpha / r."""
    targets: str = "attention.*|mlp.*"
    """Pattern of the linear layers; two LoRAs with disjoint patterns fit together."""
    rank_stabilized: bool = False
    """alpha / sqrt(r) instead."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, not {self.rank}.", "", "Drop the technique for full tuning.")

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """An adapter on the output of each matching layer."""
        shared = {id(p) for p in model.parameters()} - {id(p) for p in _alone(model)}
        for name, layer in linears(model, self.targets, run.where(self, "targets")).items():
            _keep_called(model.get_submodule(name.rpartition(".")[0]), layer, name, run.where(self, "targets"))
            if id(layer.weight) in shared:
                fix = "Leave it out of `targets`, or untie it (`model.tied: false`)."
                raise UserError(
                    f"the weight of `{name}` is shared with another layer.", run.where(self, "targets"), fix
                )
            layer.on("output", "adapter", "lora", LowRank(layer, self.rank, self.scale))
        return model

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """W + scale B A."""
        plain = dict(named)
        for name in linears(run.model, self.targets):
            a, b, weight = plain.pop(f"{name}.lora.a"), plain.pop(f"{name}.lora.b"), plain[f"{name}.weight"]
            wide = torch.promote_types(weight.dtype, torch.float32)
            plain[f"{name}.weight"] = (weight.to(wide) + self.scale * b.to(wide) @ a.to(wide)).to(weight.dtype)
        return plain


def _alone(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that have one name."""
    named = [p for _, p in model.named_parameters(remove_duplicate=False)]
    counts: dict[int, int] = {}
    for p in named:
        counts[id(p)] = counts.get(id(p), 0) + 1
    return [p for p in named if counts[id(p)] == 1]


def _keep_called(parent: nn.Module, layer: Linear, name: str, where: str) -> None:
    """Some modules of torch compute with a layer's weight instead of calling the layer, which skips the adapter."""
    if isinstance(parent, nn.MultiheadAttention):
        what = f"`{name}` is never called: nn.MultiheadAttention uses its weight directly."
        raise UserError(what, where, "Leave it out of `targets`.")
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Its fast path in evaluation does so too, unless some hook is attached.
        layer.register_forward_pre_hook(_no_change)


def _no_change(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    return None


class LowRank(nn.Module):
    """(x, y) -> y + scale B (A x). Shapes: a [r, in], b [out, r].

    Args:
        layer: whose shape, type and device are taken.
    """

    def __init__(self, layer: Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        outputs, inputs = layer.weight.shape
        self.a = nn.Parameter(layer.weight.new_empty(rank, inputs))
        self.b = nn.Parameter(layer.weight.new_zeros(outputs, rank))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """A uniform within 1 / sqrt(in), B zero: the layer begins as it was."""
        if name == "a":
            bound = 1 / math.sqrt(self.a.shape[1])
            value.uniform_(-bound, bound, generator=generator)
        else:
            value.zero_()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # The thin product is scaled, not the wide one: fewer elements to pass over.
        return y + F.linear(F.linear(x, self.a) * self.scale, self.b)
