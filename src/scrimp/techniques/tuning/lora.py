"""LoRA: a frozen weight plus a trained product of two thin matrices.

    y = W x + b + (alpha / r) B (A x),   A [r, in] uniform at first, B [out, r] zero at first

Only A and B are trained. Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685;
`rank_stabilized` divides by sqrt(r): Kalajdzievski, arXiv 2312.03732. `magnitude` is DoRA, Liu et al., arXiv
2402.09353:

    y = m / |V| * V x + b,   V = W + (alpha / r) B A,   |V| and m [out] of each row, m = |W| at first

`dropout` drops inputs of A alone: A (mask x / (1 - p)), with a mask of each layer, sample, position and channel.

Saves: gradients and optimizer states of all frozen weights, and disk: a checkpoint of the adapters is small. Costs:
two more products a layer. Not for: memory that is taken by activations: on all linear layers LoRA keeps as many as
full tuning, since each adapter keeps its layer's input (on attention.qkv alone it keeps a third fewer). Add
recompute and fused_loss for those; magnitude adds two copies of each weight, dropout one of each layer's input.
Export folds the product into the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.models.dropout import Dropout, Samples
from scrimp.models.seams import Linear, blocks, linears, mergeable, wrap_forward
from scrimp.technique import Card, Technique, below_one

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import State


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
        phase={"model": "seams", "init": "measured", "carry": "measured", "export": "merged"},
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
    magnitude: bool = False
    """Train the length of each row of the weight apart from its direction (DoRA)."""
    dropout: float = 0.0
    """Share of the inputs of A that is dropped in training; what the frozen weight gets stays whole."""

    def __post_init__(self) -> None:
        below_one(self, "dropout")
        if self.dropout and self.magnitude:
            what = "with magnitude there is one product, whose inputs are the frozen weight's too."
            raise UserError(what, "dropout", "Drop one of the two.")
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, not {self.rank}.", "", "Drop the technique for full tuning.")

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """An adapter on the output of each matching layer."""
        where = run.where(self, "targets")
        layers = mergeable(model, list(linears(model, self.targets, where)), where)
        drops = self._drops(model, list(layers), run) if self.dropout else {}
        for name, layer in layers.items():
            if self.magnitude:
                layer.on("weight", "low-rank", "lora", Decomposed(layer, self.rank, self.scale))
            else:
                layer.on("output", "adapter", "lora", LowRank(layer, self.rank, self.scale, drops.get(name)))
        return model

    def _drops(self, model: nn.Module, layers: list[str], run: Run) -> dict[str, Dropped]:
        """Dropout for the layers of blocks, which know their samples.

        Raises:
            UserError: if a layer is in no block, or blocks do not get the samples' numbers.
        """
        where, samples, found = run.where(self, "dropout"), Samples(), blocks(model, run.where(self))
        outside = [name for name in layers if not name.startswith(tuple(f"{path}." for path in found))]
        if outside:
            what = f"`{outside[0]}` is in none of the model's blocks, and does not know which samples it gets."
            raise UserError(what, where, "Leave it out of `targets`, or the dropout.")
        for block in {id(block): block for block in found.values()}.values():
            try:
                wrap_forward(block, samples.around)
            except ValueError:
                what = f"`{type(block).__name__}` does not get the samples' numbers, which masks are made of."
                raise UserError(what, where, "Drop the dropout.") from None
        return {name: Dropped(self.dropout, generator(run.seed, f"{name}.lora").initial_seed(), samples)
                for name in layers}  # fmt: skip

    @torch.no_grad()
    def init(self, model: nn.Module, run: Run) -> nn.Module:
        """Magnitudes of the weights as they are."""
        for layer in linears(model, self.targets).values() if self.magnitude else ():
            layer.get_parameter("lora.m").copy_(lengths(layer.weight_before("lora")))
        return model

    @torch.no_grad()
    def carry(self, state: State, run: Run) -> State:
        """Magnitudes of the weights that a run starts from, where these have none."""
        if not self.magnitude or "model" not in state:
            return state
        weights = dict(state["model"])
        for name, layer in linears(run.model, self.targets).items():
            if f"{name}.lora.m" in weights:
                continue
            for part, own in layer.named_parameters():
                given = weights.get(f"{name}.{part}")
                if given is not None and given.shape == own.shape:
                    own.copy_(given)
            weights[f"{name}.lora.m"] = lengths(layer.weight_before("lora"))
        return {**state, "model": weights}

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """W + scale B A, at the magnitudes if there are any."""
        plain = dict(named)
        for name in linears(run.model, self.targets):
            a, b, weight = plain.pop(f"{name}.lora.a"), plain.pop(f"{name}.lora.b"), plain[f"{name}.weight"]
            wide = torch.promote_types(weight.dtype, torch.float32)
            whole = weight.to(wide) + self.scale * b.to(wide) @ a.to(wide)
            if self.magnitude:
                whole = whole * (plain.pop(f"{name}.lora.m").to(wide) / lengths(whole))[:, None]
            plain[f"{name}.weight"] = whole.to(weight.dtype)
        return plain


def lengths(weight: Tensor) -> Tensor:
    """Euclidean length of each row: [out, in] -> [out]."""
    return torch.linalg.vector_norm(weight, dim=1)


class Dropped(nn.Module):
    """Dropout of a layer inside a block. Shapes: [B, T, C] -> [B, T, C]."""

    def __init__(self, p: float, site: int, samples: Samples) -> None:
        super().__init__()
        self.dropout, self.samples = Dropout(p, site), samples

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x, self.samples.now)


class LowRank(nn.Module):
    """(x, y) -> y + scale B (A x). Shapes: a [r, in], b [out, r].

    Args:
        layer: whose shape, type and device are taken.
        drop: what x goes through first; nothing if None.
    """

    outputs: ClassVar = ("b",)
    """Parameters with a row for each output of the layer, and with a column for each input."""
    inputs: ClassVar = ("a",)

    def __init__(self, layer: Linear, rank: int, scale: float, drop: Dropped | None = None) -> None:
        super().__init__()
        self.scale, self.drop = scale, drop
        outputs, inputs = layer.weight.shape
        self.a = nn.Parameter(layer.weight.new_empty(rank, inputs))
        self.b = nn.Parameter(layer.weight.new_zeros(outputs, rank))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """A uniform within 1 / sqrt(in), B zero: the layer begins as it was."""
        if name == "a":
            bound = 1 / math.sqrt(value.shape[1])
            value.uniform_(-bound, bound, generator=generator)
        else:
            value.zero_()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x if self.drop is None else self.drop(x)
        # The thin product is scaled, not the wide one: fewer elements to pass over.
        return y + F.linear(F.linear(x, self.a) * self.scale, self.b)


class Decomposed(LowRank):
    """weight -> m V / |V| with V = weight + scale B A. Shapes: m [out], a [r, in], b [out, r], weight [out, in]."""

    def __init__(self, layer: Linear, rank: int, scale: float) -> None:
        super().__init__(layer, rank, scale)
        self.m = nn.Parameter(layer.weight.new_empty(len(layer.weight)))

    def forward(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        whole = weight + (self.scale * self.b) @ self.a
        # The paper holds the length constant in the backward pass, which saves its gradient.
        return whole * (self.m / lengths(whole.detach()))[:, None]
