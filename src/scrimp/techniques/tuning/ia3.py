"""(IA)^3: keys, values and the MLP's hidden activations are multiplied by trained vectors.

    attention:  softmax(q (l_k * k)^T / sqrt(d)) (l_v * v)         MLP:  down(l_ff * act(up(x)))

All three are ones at first, so that the model begins exactly as it was. Paper: Liu et al., "Few-Shot
Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS 2022, arXiv 2205.05638.

Saves: gradients and optimizer states of all frozen weights, with fewer trained numbers than lora of rank 1; some
activations (the vectors on q, k and v keep 13 parts of a block's, of 16). Costs: one pass over q, k, v and one over the
hidden activations; none in use: export folds the vectors into the weights. Not for: tasks far from what the model was
trained on, for which so few numbers do not suffice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.seams import Linear, linears, mergeable
from scrimp.normless import rows_of
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class IA3(Technique):
    """Trained factors of keys, values and hidden activations."""

    card = Card(
        paper="arXiv:2205.05638",
        section="Parameter-efficient tuning",
        saves="gradients and states of the frozen weights",
        costs="a pass over q, k, v and one over the hidden activations",
        trains=("*.ia3.*",),
        phase={"model": "seams", "export": "gated"},
        refuses={"rule of matrices": "it trains vectors alone, and the other is a rule for matrices."},
        example={"queries": True},
    )
    keys_values: str = "attention.qkv|cross.kv"
    """Pattern of the layers whose outputs are keys and values; empty for none. Any other layer is scaled whole."""
    hidden: str = "mlp.down"
    """Pattern of the layers whose inputs are scaled; empty for none."""
    queries: bool = False
    """Scale the queries too, as peft does in GPT-2, where q, k and v are one layer."""

    def __post_init__(self) -> None:
        if not self.keys_values and not self.hidden:
            raise UserError("both patterns are empty, which trains nothing.", "", "Give one of them.")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Factors on outputs, and factors on inputs."""
        if self.keys_values:
            where = run.where(self, "keys_values")
            names = list(linears(model, self.keys_values, where))
            for name, layer in mergeable(model, names, where).items():
                parent, _, child = name.rpartition(".")
                rows = rows_of(model.get_submodule(parent), child, layer.weight.shape[0])
                layer.on("output", "gate", "ia3", Gate(rows, self.queries, layer))
        if self.hidden:
            where = run.where(self, "hidden")
            for layer in mergeable(model, list(linears(model, self.hidden, where)), where).values():
                layer.on("input", "scale", "ia3", Factor(layer))
        return model

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Rows of the weights and biases of keys and values, columns of the MLP's last weight."""
        plain = dict(named)
        for name in linears(run.model, self.keys_values) if self.keys_values else ():
            gate = run.model.get_submodule(f"{name}.ia3")
            assert isinstance(gate, Gate)
            factor = gate.whole({part: plain.pop(f"{name}.ia3.{part}") for part, _ in gate.named_parameters()})
            for part in ("weight", "bias"):
                if f"{name}.{part}" in plain:
                    plain[f"{name}.{part}"] = _times(plain[f"{name}.{part}"], factor, rows=True)
        for name in linears(run.model, self.hidden) if self.hidden else ():
            factor = plain.pop(f"{name}.ia3.hidden")
            plain[f"{name}.weight"] = _times(plain[f"{name}.weight"], factor, rows=False)
        return plain


def _times(t: Tensor, factor: Tensor, rows: bool) -> Tensor:
    wide = torch.promote_types(t.dtype, torch.float32)
    factor = factor.to(wide)
    return (t.to(wide) * (factor[:, None] if rows and t.ndim == 2 else factor)).to(t.dtype)


class Gate(nn.Module):
    """(x, y) -> y * l, where l is one for queries. Shapes: y [..., outputs].

    Args:
        rows: part of the outputs ("q", "k", "v", or "" for all) -> how many there are, in their order.
        queries: whether queries have factors.
        layer: whose type and device are taken.
    """

    def __init__(self, rows: dict[str, int], queries: bool, layer: Linear) -> None:
        super().__init__()
        self.rows = rows
        for part, count in rows.items():
            if part != "q" or queries:
                self.register_parameter(part or "all", nn.Parameter(layer.weight.new_empty(count)))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Ones: the layer begins as it was."""
        value.fill_(1.0)

    def whole(self, own: dict[str, Tensor]) -> Tensor:
        """l [outputs], from the factors of its parts."""
        like = next(iter(own.values()))
        return torch.cat([own.get(part or "all", like.new_ones(count)) for part, count in self.rows.items()])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.whole(dict(self.named_parameters())).to(y.dtype)


class Factor(nn.Module):
    """x -> x * l. Shapes: [..., inputs].

    Args:
        layer: whose inputs they are.
    """

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.hidden = nn.Parameter(layer.weight.new_empty(layer.weight.shape[1]))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Ones: the layer begins as it was."""
        value.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.hidden.to(x.dtype)
