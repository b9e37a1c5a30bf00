"""Linear overparameterization: a matrix is trained as a product of matrices, and multiplied out in the end.

    depth 2:   W_e = left cat(W, extra; rows)      or   cat(W, extra; columns) right      on the smaller side of W
    depth 3:   W_e = left cat(cat(W, extra; columns), more; rows) right

    W [n, m] is the layer's own weight;   at first left [n, r n] = [I 0], right [r m, m] = [I 0]^T, extra as W at random

so that W_e = W at first, to the last bit: the run starts where the plain one does, also from given weights. With a
`ratio` r of 1 there are no extra rows and columns. Nothing nonlinear stands between the factors, the bias stays
outside, and the hidden width r min(n, m) loses no rank, which is why r may not be less than 1.

Why it may help: with balanced factors, W_{j+1}^T W_{j+1} = W_j W_j^T, a small step of gradient descent moves a product
of N factors by

    dW_e = - eta sum over j = 1..N of [W_e W_e^T]^((N - j) / N)  grad  [W_e^T W_e]^((j - 1) / N)

which no penalty's gradient is. Here factors begin unbalanced, with the identity: the first step of depth 2 at a ratio
of 1 moves W_e by - eta (grad + grad W^T W), or by - eta (grad + W W^T grad) with the factor on the right. Papers: Arora
et al., "On the Optimization of Deep Networks: Implicit Acceleration by Overparameterization", ICML 2018, arXiv
1802.06509 (r = 1); Guo et al., "ExpandNets", NeurIPS 2020, arXiv 1811.10495 (r = 4; theirs are compact networks of
convolutions). For Transformers this is a reading of the survey's section, not a result of either paper.

Saves: steps, where it speeds up training; nothing in what is exported, which is the plain model. Costs: weights,
gradients and states of the factors, and their product once a forward pass, which does not grow with the batch. Not for:
masks and cut heads, which act on a weight that is trained itself; tuning methods, which freeze factors.

Factors that are added have no weight decay, since decay would pull left and right to zero rather than to the identity;
adaptive rules scale each factor's step apart, so that the rule above holds for gradient descent alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.groups import Multipliers
from scrimp.models.seams import Linear, linears
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class Expand(Technique):
    """Train matrices as products of matrices."""

    card = Card(
        paper="arXiv:1811.10495",
        section="Overparameterization",
        saves="steps, where it speeds up training",
        costs="weights and states of the factors, and their product once a forward pass",
        scope="targets",
        refuses={
            "sparsity": "Masks belong to a weight that is trained, not to a factor of it.",
            "width schedule": "Its factors have the sizes of the layer that they began with.",
            "frozen weights": "Factors of a frozen weight would be frozen too.",
            "shared blocks": "Factors belong to one layer, and shared weights to several.",
        },
        phase={"model": "seams", "export": "collapsed"},
        example={"ratio": 1.5, "depth": 3, "targets": "mlp.*"},
    )
    depth: Literal[2, 3] = 2
    """Factors."""
    ratio: float = 1.0
    """Width between factors, as a multiple of the layer's own."""
    targets: str = "attention.*|mlp.*"
    """Pattern of the linear layers."""

    def __post_init__(self) -> None:
        at_least(1, self, "ratio")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Factors on the weight of each matching layer."""
        where = run.where(self, "targets")
        names = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
        for name, layer in linears(model, self.targets, where).items():
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
                what = f"`{name}` is never called: nn.MultiheadAttention uses its weight directly."
                raise UserError(what, where, "Leave it out of `targets`.")
            if names.count(id(layer.weight)) > 1:
                fix = "Leave it out of `targets`, or untie it (`model.tied: false`)."
                raise UserError(f"the weight of `{name}` is shared with another layer.", where, fix)
            layer.on("weight", "expand", self.name, Factors(layer, self.depth, self.ratio))
        return model

    def groups(self, groups: dict[str, Multipliers], run: Run) -> dict[str, Multipliers]:
        """No decay of what is added."""
        alone = {f"{name}.{part}": Multipliers(decay=0.0) for name, factors in self._factors(run).items()
                 for part, _ in factors.named_parameters()}  # fmt: skip
        return {**groups, **{name: groups.get(name, Multipliers()).times(rule) for name, rule in alone.items()}}

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Multiply out."""
        plain = dict(named)
        for name, factors in self._factors(run).items():
            own = {part: plain.pop(f"{name}.{part}") for part, _ in factors.named_parameters()}
            layer = name.removesuffix(f".{self.name}")
            weight = plain[f"{layer}.weight"]
            wide = torch.promote_types(weight.dtype, torch.float32)
            product = factors.product(weight.to(wide), {part: t.to(wide) for part, t in own.items()})
            plain[f"{layer}.weight"] = product.to(weight.dtype)
        return plain

    def _factors(self, run: Run) -> dict[str, Factors]:
        """Those of this technique's layers; another one may have expanded others."""
        return {f"{name}.{self.name}": layer.get_submodule(self.name)  # type: ignore[misc]
                for name, layer in linears(run.model, self.targets).items()}  # fmt: skip


class Factors(nn.Module):
    """weight -> the product that stands for it. Shapes as in the module's docstring.

    Args:
        layer: whose shape, type and device are taken.
    """

    left: nn.Parameter | None
    right: nn.Parameter | None
    columns: nn.Parameter | None
    rows: nn.Parameter | None

    def __init__(self, layer: Linear, depth: int, ratio: float) -> None:
        super().__init__()
        self.std = layer.std
        n, m = layer.weight.shape
        tall, wide = int(ratio * n + 1e-9), int(ratio * m + 1e-9)
        on_left, on_right = depth == 3 or n <= m, depth == 3 or n > m
        width = wide if on_right else m

        def made(rows: int, columns: int, wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(layer.weight.new_empty(rows, columns)) if wanted and rows and columns else None

        self.left, self.right = made(n, tall, on_left), made(wide, m, on_right)
        self.columns, self.rows = made(n, wide - m, on_right), made(tall - n, width, on_left)

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The identity in left and right, so that what is extra has no effect at first."""
        if name in ("left", "right"):
            torch.eye(*value.shape, out=value)
        else:
            value.normal_(0.0, self.std, generator=generator)

    def forward(self, weight: Tensor) -> Tensor:
        return self.product(weight, dict(self.named_parameters()))

    def product(self, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """The matrix that the layer applies."""
        if "columns" in parts:
            weight = torch.cat((weight, parts["columns"]), 1)
        if "rows" in parts:
            weight = torch.cat((weight, parts["rows"]), 0)
        # The smaller product first.
        if "left" in parts:
            weight = parts["left"] @ weight
        return weight @ parts["right"] if "right" in parts else weight
