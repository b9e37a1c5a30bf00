"""Compacter: adapters whose matrices are sums of Kronecker products, with one factor that all layers share.

    W = sum over i of A_i kron (s_i t_i^T),    i = 1 .. n
    A_i [n, n] shared by all layers and both matrices;   s_i [rows / n], t_i [columns / n] of each matrix

In a matrix of r x width numbers are n^3 shared ones and r + width of its own. The adapters stand where Houlsby's do,
after attention and after the MLP (`compacter++`, with `targets: mlp`, after the MLP alone), and norms are trained too.
Paper: Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021, arXiv
2106.04647. First values as in the authors' code: A normal with standard deviation 0.01, s and t uniform as Glorot and
Bengio have it, biases zero; the adapter's output is small at first.

Saves: gradients and optimizer states of all frozen weights, activations as adapters do, and nearly all of an adapter's
own weights. Costs: the matrices are multiplied out in each forward pass; as adapters, it does not merge. Not for: few
bytes of activations: there it is an adapter like others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.branches import add_steps, tell_of_norms
from scrimp.errors import UserError
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class Compacter(Technique):
    """Adapters of Kronecker products that share a factor."""

    card = Card(
        paper="arXiv:2106.04647",
        section="Parameter-efficient tuning",
        saves="gradients and states of the frozen weights, and most of an adapter's weights",
        costs="matrices that are multiplied out in each forward pass, in use too: it does not merge",
        trains=("*.compacter.*", "*norm.*"),
        refuses={"depth schedule": "All its adapters share a factor, and a copied block would bring one of its own."},
        phase={"model": "seams"},
        held="layers that share factors are gathered apart from them.",
        undivided="its adapters share matrices, which lie with the first of them.",
        example={"bottleneck": 8, "n": 4},
    )
    bottleneck: int = 24
    """r, the width between down and up; a multiple of n."""
    n: int = 4
    """Kronecker products in a sum, and side of the shared matrices."""
    targets: str = "attention|cross|mlp"
    """Pattern of the branches that get an adapter."""

    def __post_init__(self) -> None:
        at_least(1, self, "bottleneck", "n")
        if self.bottleneck % self.n:
            raise UserError(f"bottleneck {self.bottleneck} is not a multiple of n {self.n}.")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """An adapter after each branch; the first one owns what they share."""
        tell_of_norms(model, self.name, run)
        where = run.where(self, "targets")
        owner: list[KroneckerAdapter] = []

        def made(inputs: int, outputs: int, like: Tensor) -> nn.Module:
            if outputs % self.n:
                raise UserError(f"a branch of {outputs} outputs is not a multiple of n {self.n}.", where)
            owner.append(KroneckerAdapter(outputs, self.bottleneck, self.n, like, owner[0] if owner else None))
            return owner[-1]

        add_steps(model, self.targets, "compacter", made, where)
        return model


class KroneckerAdapter(nn.Module):
    """(x, y) -> y + U gelu(D y + d) + u, with D and U as in the module's docstring. Shapes: y [..., width].

    Args:
        like: whose type and device are taken.
        owner: the adapter that owns the shared matrices; None if this one does.
    """

    def __init__(self, width: int, bottleneck: int, n: int, like: Tensor, owner: KroneckerAdapter | None) -> None:
        super().__init__()
        # In a tuple, so that it is not registered here too: the parameter has one name.
        self.owner = (owner,)
        if owner is None:
            self.shared = nn.Parameter(like.new_empty(n, n, n))
        self.down_s = nn.Parameter(like.new_empty(n, bottleneck // n))
        self.down_t = nn.Parameter(like.new_empty(n, width // n))
        self.down_bias = nn.Parameter(like.new_empty(bottleneck))
        self.up_s = nn.Parameter(like.new_empty(n, width // n))
        self.up_t = nn.Parameter(like.new_empty(n, bottleneck // n))
        self.up_bias = nn.Parameter(like.new_empty(width))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """As the authors' code does."""
        if name == "shared":
            value.normal_(0.0, 0.01, generator=generator)
        elif name.endswith("bias"):
            value.zero_()
        else:
            # Each row is a matrix of rank one, of `size` rows and one column.
            bound = math.sqrt(6 / (value.shape[1] + 1))
            value.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        owner = self.owner[0] or self
        down = kronecker(owner.shared, self.down_s, self.down_t)
        up = kronecker(owner.shared, self.up_s, self.up_t)
        return y + F.linear(F.gelu(F.linear(y, down, self.down_bias)), up, self.up_bias)


def kronecker(a: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The sum over i of A_i kron (s_i t_i^T). Shapes: a [n, n, n], s [n, R], t [n, K] -> [n R, n K]."""
    n = len(a)
    right = s[:, :, None] * t[:, None, :]  # [n, R, K]
    # Entry (p R + r, q K + k) is the sum over i of A_i[p, q] right_i[r, k].
    product = a.reshape(n, n * n).t() @ right.reshape(n, -1)  # [p q, r k]
    blocks = product.view(n, n, s.shape[1], t.shape[1])
    return blocks.permute(0, 2, 1, 3).reshape(n * s.shape[1], n * t.shape[1])
