"""T-Fixup: an initialization with which a Transformer trains without layer norms and without warm-up.

    all matrices: Xavier uniform;  embeddings, positions: normal with standard deviation d^(-1/2)
    value, output and MLP matrices:  times (9 N)^(-1/4) in a decoder, 0.67 N^(-1/4) in an encoder, of N blocks
    input embedding:                 times (9 N)^(-1/4)

Queries, keys and positions keep their scale. The paper's model multiplies what it looks up by sqrt(d) and ours does
not, hence this technique adds the factor. Paper: Huang et al., "Improving Transformer Optimization Through Better
Initialization", ICML 2020, PMLR 119.

Saves: layer norms (their time and activations) and warm-up. Costs: an architecture without norms, which no other
library loads. Not for: fine-tuning, growth of depth (N is fixed at the start), mixed precision without care. The 9
counts three branches of a decoder block, cross-attention among them; for a decoder-only model it lies outside the
derivation, and `constants: encoder` is the alternative. A tied head gets the embedding's scale, as in the paper's code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.models.seams import Linear, blocks
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run


NORMS = ("attention_norm", "mlp_norm")
"""What is removed from a block."""


@dataclass(frozen=True, kw_only=True)
class TFixup(Technique):
    """Train without layer norms and without warm-up."""

    card = Card(
        paper="ICML 2020, PMLR 119",
        section="Initialization",
        saves="layer norms and warm-up",
        costs="an architecture that no other library loads",
        sets=("initialization", "normalization"),
        needs=("attention_norm", "mlp_norm", "embed_scale"),
        phase={"model": "architecture", "init": "fill"},
        example={"constants": "decoder"},
    )
    constants: Literal["decoder", "encoder"] = "decoder"
    """Which of the two derived scales."""

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """No norms; looked-up embeddings times sqrt(d)."""
        for name, block in blocks(model, run.where(self)).items():
            for seam in NORMS:
                if not isinstance(getattr(block, seam, None), nn.Module):
                    raise UserError(
                        f"`{name}` has no `{seam}` to remove.", run.where(self), "Use the house Transformer."
                    )
                setattr(block, seam, nn.Identity())
        if not isinstance(getattr(model, "embed_scale", None), nn.Module):
            what = f"{type(model).__name__} has no embedding of its own to scale."
            raise UserError(what, run.where(self), "Use the house Transformer.")
        model.norm = nn.Identity()
        model.embed_scale = Times(math.sqrt(model.config.width))  # type: ignore[union-attr]
        return model

    @torch.no_grad()
    def init(self, model: nn.Module, run: Run) -> nn.Module:
        """Draw every matrix anew, each from a generator of its own."""
        if any(isinstance(p, FakeTensor) for p in model.parameters()):
            return model
        found = blocks(model)
        count = len(found)
        shrink = (9 * count) ** -0.25
        branch = shrink if self.constants == "decoder" else 0.67 * count**-0.25
        for path, block in found.items():
            attention = block.get_submodule("attention")
            kv = attention.kv_heads * attention.width  # type: ignore[operator]
            for name, layer in block.named_modules():
                if isinstance(layer, Linear):
                    self._fill(f"{path}.{name}", layer, branch, run.seed, int(kv))
        for name, p in model.named_parameters():
            if name in ("embed.weight", "positions.weight"):
                chance = generator(run.seed, f"t_fixup/{name}")
                value = torch.empty(p.shape).normal_(0, p.shape[1] ** -0.5, generator=chance)
                p.copy_(value * (shrink if name == "embed.weight" else 1))
            elif name == "head.weight":
                p.copy_(_xavier(p.shape, run.seed, name))
        return model

    def _fill(self, name: str, layer: Linear, branch: float, seed: int, kv: int) -> None:
        rows, inputs = layer.weight.shape
        if not name.endswith(".qkv"):
            layer.weight.copy_(_xavier(layer.weight.shape, seed, name) * branch)
            return
        # q, k and v are three matrices in one tensor: each has its own fan, and only v is scaled.
        parts = enumerate((rows - 2 * kv, kv, kv))
        q, k, v = (_xavier(torch.Size((part, inputs)), seed, f"{name}/{i}") for i, part in parts)
        layer.weight.copy_(torch.cat([q, k, v * branch]))


def _xavier(shape: torch.Size, seed: int, name: str) -> Tensor:
    bound = math.sqrt(6 / (shape[0] + shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, f"t_fixup/{name}"))


class Times(nn.Module):
    """x -> factor x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor
