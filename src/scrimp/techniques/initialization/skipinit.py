"""SkipInit: a trained number at the end of every branch, zero at first, instead of norms.

    x <- x + alpha_j F_j(x)        alpha_j = 0, or d^(-1/2) with d branches; one a branch

What makes deep normalized networks trainable is that norms shrink each branch by the root of the depth at first; a
scalar does the same. Norms are taken out, those of BERT's embeddings and after its sums too. The matrices are Xavier
uniform, embeddings normal with standard deviation d^(-1/2) of the width. Paper: De and Smith, "Batch Normalization
Biases Residual Blocks Towards the Identity Function in Deep Networks", NeurIPS 2020, arXiv 2002.10444.

Saves: layer norms (their time and activations) and warm-up. Costs: an architecture without norms, which no other
library loads and `scrimp export` refuses (the plain weights it would write have alpha folded into the last layer of
each branch). Not for: fine-tuning of weights that were trained with norms; scores of weights before training (snip,
grasp), since at the first step nothing in a branch has a gradient. The paper adds regularization, such as dropout, to
make up for that of norms.

`rezero` has one number a block instead of one a branch. Norms of queries and keys, where a model has them, and the
norm in BERT's head stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from scrimp.normless import Scale, fill, folded, like, put_scale, refuse_norms, take_out_norms, undecayed
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.groups import Multipliers
    from scrimp.run import Run
    from scrimp.technique import State


@dataclass(frozen=True, kw_only=True)
class SkipInit(Technique):
    """A scale on each branch that begins closed, without norms."""

    card = Card(
        paper="arXiv:2002.10444",
        section="Initialization",
        saves="layer norms and warm-up",
        costs="an architecture that no other library loads",
        sets=("initialization", "normalization", "closed branches"),
        needs=("attention_norm", "mlp_norm", "attention_scale", "mlp_scale"),
        phase={"model": "architecture", "init": "fill", "export": "folded"},
        example={"scale_lr": 2.0},
    )
    initial: Literal["zero", "depth"] = "zero"
    """First value of each scale: 0, or 1 / sqrt(d) in a stack of d branches."""
    scale_lr: float = 1.0
    """Multiplier of the learning rate of the scales, which are never decayed."""

    def __post_init__(self) -> None:
        at_least(0, self, "scale_lr")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """No norms; a scale on every branch."""
        for stack in take_out_norms(model, run.where(self)):
            first = 0.0 if self.initial == "zero" else len(stack.branches) ** -0.5
            for branch in stack.branches:
                put_scale(branch, Scale(first, like(branch)), run.where(self))
        return model

    def init(self, model: nn.Module, run: Run) -> nn.Module:
        """Weights of a scale that needs no norm."""
        fill(model, run.seed, self.name)
        return model

    def carry(self, state: State, run: Run) -> State:
        """Refuse weights that were trained with norms."""
        return refuse_norms(state, run, run.where(self))

    def groups(self, groups: dict[str, Multipliers], run: Run) -> dict[str, Multipliers]:
        """No decay and a rate of their own for the scales, where they are trained."""
        return undecayed(groups, run, "*_scale.alpha", self.scale_lr)

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Scales times the last layers."""
        return folded(named, run.model)
