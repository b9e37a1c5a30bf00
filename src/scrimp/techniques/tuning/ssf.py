"""SSF: the output of every operator is scaled and shifted by trained vectors.

    y = gamma * (W x + b) + beta   =   (gamma * W) x + (gamma * b + beta)

The right side is what is computed: gamma stands before the product, not after it, so that a layer keeps its input and
not its output. The left side keeps 21 parts of a block's activations where full tuning keeps 16; the right one keeps
16, and one copy of the weights. Norms are scaled and shifted in the same way. A layer without a bias is only scaled,
since its architecture has no place for beta. Paper: Lian et al., "Scaling & Shifting Your Features: A New Baseline for
Efficient Model Tuning", NeurIPS 2022, arXiv 2210.08823.

Saves: gradients and optimizer states of the frozen weights; nothing in use, where it costs nothing either: export folds
both vectors into weight and bias. Costs: a scaled copy of each weight a step. Not for: memory that is taken by
activations: bitfit, ia3 and adapters keep fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from scrimp.models.layers import Norm
from scrimp.models.seams import Linear, matching, mergeable
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class SSF(Technique):
    """Scale and shift what frozen layers and norms compute."""

    card = Card(
        paper="arXiv:2210.08823",
        section="Parameter-efficient tuning",
        claim="90.72 % top-1 on FGVC with 0.3 million trained parameters, 88.54 % by full tuning, ViT-B/16 "
        "(the authors' repository)",
        saves="gradients and states of the frozen weights",
        costs="a scaled copy of each weight a step",
        scope="targets",
        trains=("*.ssf_*",),
        phase={"model": "seams", "export": "scaled"},
        refuses={"rule of matrices": "it trains vectors alone, and the other is a rule for matrices."},
        example={"targets": "attention.*|mlp.up|*norm"},
    )
    targets: str = "blocks.*|patches|norm|embed_norm|pre_norm"
    """Pattern of the linear layers and norms."""
    std: float = 0.02
    """Of the first values, around 1 for gamma and 0 for beta; with 0 the model begins exactly as it was."""

    def __post_init__(self) -> None:
        at_least(0, self, "std")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """A scale and a shift on the parameters of each layer and norm."""
        for module in self._found(model, run.where(self, "targets")).values():
            scale = Scale(module.weight, self.std)
            if isinstance(module, Linear):
                module.on("weight", "scale", "ssf_scale", scale)
                if module.bias is not None:
                    module.on("bias", "scale", "ssf_shift", Shift(module.bias, self.std, scale))
                continue
            module.on("weight", "ssf_scale", scale)
            if module.bias is not None:
                module.on("bias", "ssf_shift", Shift(module.bias, self.std, scale))
        return model

    def _found(self, model: nn.Module, where: str = "") -> dict[str, Linear | Norm]:
        kinds = Linear | nn.Linear | Norm
        modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
        names = matching(self.targets, list(modules), "linear layer or norm", where)
        layers = mergeable(model, [name for name in names if not isinstance(modules[name], Norm)], where)
        norms = {name: norm for name in names if isinstance(norm := modules[name], Norm)}
        return layers | norms

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """gamma * W and gamma * b + beta."""
        plain = dict(named)
        for name in self._found(run.model):
            weight = plain[f"{name}.weight"]
            wide = torch.promote_types(weight.dtype, torch.float32)
            gamma = plain.pop(f"{name}.ssf_scale.gamma").to(wide)
            plain[f"{name}.weight"] = _scaled(weight.to(wide), gamma).to(weight.dtype)
            beta = plain.pop(f"{name}.ssf_shift.beta", None)
            if beta is not None:
                bias = plain[f"{name}.bias"]
                plain[f"{name}.bias"] = (gamma * bias.to(wide) + beta.to(wide)).to(bias.dtype)
        return plain


def _scaled(weight: Tensor, gamma: Tensor) -> Tensor:
    """Rows of a matrix, or numbers of a vector, times gamma."""
    return weight * (gamma[:, None] if weight.ndim == 2 else gamma)


class Scale(nn.Module):
    """weight -> gamma * weight. Shapes: gamma [outputs], weight [outputs, inputs] or [outputs].

    Args:
        like: the weight.
    """

    def __init__(self, like: Tensor, std: float) -> None:
        super().__init__()
        self.std = std
        self.gamma = nn.Parameter(like.new_empty(like.shape[0]))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Around one."""
        value.normal_(1.0, self.std, generator=generator)

    def forward(self, weight: Tensor) -> Tensor:
        return _scaled(weight, self.gamma)


class Shift(nn.Module):
    """bias -> gamma * bias + beta. Shapes: [outputs].

    Attributes:
        elsewhere: that it uses another module's parameters.

    Args:
        like: the bias.
        scale: which owns gamma.
    """

    elsewhere: ClassVar = True

    def __init__(self, like: Tensor, std: float, scale: Scale) -> None:
        super().__init__()
        self.std = std
        # In a tuple, so that it is not registered here too: gamma has one name.
        self.scale = (scale,)
        self.beta = nn.Parameter(like.new_empty(like.shape[0]))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Around zero."""
        value.normal_(0.0, self.std, generator=generator)

    def forward(self, bias: Tensor) -> Tensor:
        return self.scale[0].gamma * bias + self.beta
