"""Fixup: scales of the first weights with which updates of a deep network stay small without any norm.

    last layer of each branch, head:  0                                  (weight and bias)
    other matrices of a branch:       Xavier uniform times L^(-1 / (2m - 2))
    branch(x) = alpha F(x + shift)    alpha = 1, shift = 0: trained numbers, learned ten times more slowly

L counts branches, not blocks: two a block, three where it attends to an encoder, and of an encoder and its decoder all
together, as in the authors' code. m counts the matrices that a branch multiplies in a row: query, key, value and output
make 4 and L^(-1/6), an MLP has 2 and L^(-1/2), with a gate 3 and L^(-1/4). Paper: Zhang et al., "Fixup Initialization:
Residual Learning Without Normalization", ICLR 2019, arXiv 1901.09321.

Saves: layer norms (their time and activations). Costs: an architecture without norms, which no other library loads
and `scrimp export` refuses (the plain weights it would write have alpha and the shifts folded into the layers they
stand at); sums for the gradients of those numbers. Not for: fine-tuning of weights that were trained with norms;
growth of depth, since L is fixed at the start; scores of weights before training (snip, grasp), since at the first
step nothing but the head has a gradient. The paper's Transformer keeps its warm-up.

There is a shift before each linear layer of a branch, and before its activation where the layer there has no bias of
its own, which would be the same. Norms of queries and keys are taken out too: they would undo the scale of both. A
tied head is the embedding's weight and cannot be zero; it is left as it is, and the run says so. The norm in BERT's
head stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scrimp.models.seams import Linear
from scrimp.normless import (
    Branch,
    Scale,
    Stack,
    fill,
    folded,
    like,
    put_scale,
    refuse_norms,
    stacks,
    take_out_norms,
    undecayed,
)
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.groups import Multipliers
    from scrimp.run import Run
    from scrimp.technique import State

HEADS = ("head", "predict")
"""Names of the layers that compute a model's outputs."""
NUMBERS = "*_scale.alpha|*.fixup_shift.shift|*.fixup_bias.shift"
"""Pattern of what this adds."""


@dataclass(frozen=True, kw_only=True)
class Fixup(Technique):
    """Train without layer norms: branches that begin at zero, first weights scaled by depth."""

    card = Card(
        paper="arXiv:1901.09321",
        section="Initialization",
        saves="layer norms",
        costs="an architecture that no other library loads",
        sets=("initialization", "normalization", "closed branches"),
        needs=("attention_norm", "mlp_norm", "attention_scale", "mlp_scale"),
        phase={"model": "architecture", "init": "fill", "export": "folded"},
        undivided="it counts the model's blocks to choose their first weights, and a rank has only some of them.",
        example={"scale_lr": 0.5},
    )
    zero_head: bool = True
    """Begin with a head of zeros, where there is one that is not the embedding's."""
    scale_lr: float = 0.1
    """Multiplier of the learning rate of alpha and the shifts, which are never decayed."""

    def __post_init__(self) -> None:
        at_least(0, self, "scale_lr")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """No norms; a scale on every branch, a shift before its linear layers."""
        for stack in take_out_norms(model, run.where(self), inner=True):
            for branch in stack.branches:
                put_scale(branch, Scale(1.0, like(branch)), run.where(self))
                _put_shifts(branch)
        tied = next((n for n in _heads(model) if _shared(model, n)), "")
        if self.zero_head and tied:
            what = f"`{tied}` is the embedding's weight, so that fixup does not begin it at zero"
            run.remarks.append(f"{what}; `model.tied: false` would.")
        return model

    def init(self, model: nn.Module, run: Run) -> nn.Module:
        """Weights by the formulas."""
        found = stacks(model)
        factors = {name: value for stack in found for name, value in _factors(stack, _length(stack, found)).items()}
        if self.zero_head:
            factors |= dict.fromkeys(_heads(model), 0.0)
        fill(model, run.seed, self.name, lambda name, part: factors.get(name, 1.0))
        return model

    def carry(self, state: State, run: Run) -> State:
        """Refuse weights that were trained with norms."""
        return refuse_norms(state, run, run.where(self))

    def groups(self, groups: dict[str, Multipliers], run: Run) -> dict[str, Multipliers]:
        """A lower rate and no decay for the numbers, where they are trained."""
        return undecayed(groups, run, NUMBERS, self.scale_lr)

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Shifts into biases, then scales into the last layers. A layer without a bias gets one."""
        plain = dict(named)
        for path, _ in _linears(run.model):
            bias = plain.get(f"{path}.bias")
            for child in ("fixup_shift", "fixup_bias"):
                shift = plain.pop(f"{path}.{child}.shift", None)
                if shift is None:
                    continue
                weight = plain[f"{path}.weight"]
                # W (x + s) = W x + s times the sums of W's rows.
                more = shift * weight.sum(1) if child == "fixup_shift" else shift.expand(len(weight))
                bias = more.clone() if bias is None else bias + more
            if bias is not None:
                plain[f"{path}.bias"] = bias
        return folded(plain, run.model)


def _linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear))


def _heads(model: nn.Module) -> list[str]:
    """Names of the weights of a model's heads."""
    return [f"{name}.weight" for name, _ in _linears(model) if name.rpartition(".")[2] in HEADS]


def _shared(model: nn.Module, name: str) -> bool:
    """Whether a weight has another name too."""
    weight = model.get_parameter(name)
    return sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1


def _inner(branch: Branch) -> dict[str, Linear]:
    """The linear layers of a branch, by path in the model."""
    root: Any = getattr(branch.block, branch.kind)
    return {f"{branch.path}.{branch.kind}.{name}": layer for name, layer in _linears(root)}


def _length(stack: Stack, found: list[Stack]) -> int:
    """L: branches of all stacks, where a decoder goes on from an encoder; of towers side by side each has its own."""
    joined = found if any(other.path.rpartition(".")[2] == "decoder" for other in found) else [stack]
    return sum(len(one.branches) for one in joined)


def _factors(stack: Stack, count: int) -> dict[str, float]:
    """Names of a stack's matrices -> their factors, of L branches."""
    found: dict[str, float] = {}
    for branch in stack.branches:
        layers = _inner(branch)
        # A layer for queries, keys and values together is three.
        m = len(layers) if branch.kind == "mlp" else 4
        for path in layers:
            found[f"{path}.weight"] = 0.0 if path == branch.output else count ** (-1 / (2 * m - 2))
    return found


def _put_shifts(branch: Branch) -> None:
    layers = _inner(branch)
    first = "gate" if f"{branch.path}.mlp.gate" in layers else "up"
    activated = f"{branch.path}.mlp.{first}"
    for path, layer in layers.items():
        layer.add_module("fixup_shift", Shift(layer.weight))
        layer.register_forward_pre_hook(_shifted)
        if path == activated and layer.bias is None:
            layer.on("output", "shift", "fixup_bias", After(layer.weight))


def _shifted(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook, so that it finds the shift of whichever copy of the layer is called."""
    return (layer.get_submodule("fixup_shift")(inputs[0]), *inputs[1:])


class Shift(nn.Module):
    """x -> x + shift, of one trained number, 0 at first.

    Args:
        like: whose type and device it takes.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(like.new_empty(()))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Zero; nothing is drawn."""
        value.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class After(Shift):
    """(x, y) -> y + shift, as a step on a layer's output."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return y + self.shift
