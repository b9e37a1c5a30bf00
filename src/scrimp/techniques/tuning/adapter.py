"""Adapters: small trained bottlenecks inside the blocks of a frozen model.

    serial:      y = F(x) + Ad(F(x))          parallel:   y = F(x) + s Ad(x)
    Ad(z) = U act(D z + d) + u,   D [r, width], U [width, r]

F is a branch of a block, before it is added to the residual stream. Placements:

    houlsby     serial, after attention and after the MLP; norms are trained too    arXiv 1902.00751
    pfeiffer    serial, after the MLP alone                                         arXiv 2005.00247
    parallel    beside the MLP, with s = 4 (the "MAM" adapter's half)               arXiv 2110.04366

Serial adapters begin near the identity: D and U are normal within two standard deviations of 0.01. A parallel one
begins exactly as the plain model: U is zero, and D uniform as a linear layer's usually is.

Saves: gradients and optimizer states of all frozen weights; a third of a block's activations, since frozen layers keep
nothing (pfeiffer keeps 11 + 2 r/width of 16 parts, houlsby 12 + 4 r/width). Costs: time in training and in use ever
after: adapters do not merge into the weights, so that no folder of another library holds them. Not for: models that
must be as fast as before or be exported; lora, ssf and ia3 merge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.branches import add_steps, tell_of_norms
from scrimp.errors import UserError
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run

BRANCHES: Final = {"houlsby": "attention|cross|mlp", "pfeiffer": "mlp", "parallel": "mlp"}
"""Placement -> pattern of the branches that get an adapter."""


@dataclass(frozen=True, kw_only=True)
class Adapter(Technique):
    """Bottlenecks after, or beside, the branches of frozen blocks."""

    card = Card(
        paper="arXiv:1902.00751",
        section="Parameter-efficient tuning",
        saves="gradients and states of the frozen weights, and a third of the activations",
        costs="two thin products a branch, in use too: it does not merge",
        trains=("*.adapter.*",),
        phase={"model": "seams"},
        example={"placement": "houlsby", "bottleneck": 4},
    )
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """Where adapters stand; houlsby trains the norms too."""
    bottleneck: int = 64
    """r, the width between D and U."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """act."""
    scale: float = 4.0
    """s of parallel adapters; serial ones add theirs as it is."""
    std: float = 0.01
    """Of the first weights of serial adapters."""
    targets: str = ""
    """Pattern of the branches instead of the placement's own, such as `decoder.*.mlp`."""

    def __post_init__(self) -> None:
        at_least(1, self, "bottleneck")
        if self.std <= 0:
            # A product of two zeros has no gradient for either.
            raise UserError(f"std must be above 0, not {self.std}, or adapters never learn.", "std", "Give 0.01.")

    @property
    def trained(self) -> tuple[str, ...]:
        """Adapters; norms where Houlsby et al. place them."""
        return (*self.card.trains, *(("*norm.*",) if self.placement == "houlsby" else ()))

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """An adapter on each branch."""
        if self.placement == "houlsby":
            tell_of_norms(model, self.name, run)
        add_steps(model, self.targets or BRANCHES[self.placement], "adapter", self._made, run.where(self, "targets"))
        return model

    def _made(self, inputs: int, outputs: int, like: Tensor) -> nn.Module:
        if self.placement == "parallel":
            return Parallel(inputs, outputs, self.bottleneck, self.activation, self.scale, like)
        return Serial(outputs, self.bottleneck, self.activation, self.std, like)


class Bottleneck(nn.Module):
    """Down, activation, up. Shapes: [..., inputs] -> [..., outputs].

    Args:
        like: whose type and device are taken.
    """

    def __init__(self, inputs: int, outputs: int, width: int, activation: str, like: Tensor) -> None:
        super().__init__()
        self.act = getattr(F, activation)
        self.down = nn.Parameter(like.new_empty(width, inputs))
        self.down_bias = nn.Parameter(like.new_empty(width))
        self.up = nn.Parameter(like.new_empty(outputs, width))
        self.up_bias = nn.Parameter(like.new_empty(outputs))

    def change(self, z: Tensor) -> Tensor:
        """Ad(z)."""
        return F.linear(self.act(F.linear(z, self.down, self.down_bias)), self.up, self.up_bias)


class Serial(Bottleneck):
    """(x, y) -> y + Ad(y).

    Attributes:
        behind: that it changes y, and looks at nothing else.
    """

    behind: ClassVar = True

    def __init__(self, width: int, bottleneck: int, activation: str, std: float, like: Tensor) -> None:
        super().__init__(width, width, bottleneck, activation, like)
        self.std = std

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Normal, cut off at two standard deviations; biases zero."""
        if name in ("down", "up"):
            nn.init.trunc_normal_(value, 0.0, self.std, -2 * self.std, 2 * self.std, generator=generator)
        else:
            value.zero_()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(y)


class Parallel(Bottleneck):
    """(x, y) -> y + s Ad(x)."""

    def __init__(self, inputs: int, outputs: int, bottleneck: int, activation: str, scale: float, like: Tensor) -> None:
        super().__init__(inputs, outputs, bottleneck, activation, like)
        self.scale = scale

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """D uniform within 1 / sqrt(inputs), all else zero: the branch begins as it was."""
        if name == "down":
            bound = 1 / math.sqrt(value.shape[1])
            value.uniform_(-bound, bound, generator=generator)
        else:
            value.zero_()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.scale * self.change(x)
