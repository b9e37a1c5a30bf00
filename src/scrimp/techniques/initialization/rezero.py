"""ReZero: every block begins as the identity and opens by one trained number.

    x <- x + alpha_i F(x)        alpha_i = 0 at first; one a block, which all of its branches share

Norms are taken out, those of BERT's embeddings and after its sums too, and no warm-up is needed. The scale stands
before dropout, as in the official layer. The matrices are Xavier uniform, embeddings normal with standard deviation
d^(-1/2). Paper: Bachlechner et al., "ReZero is All You Need: Fast Convergence at Large Depth", UAI 2021, arXiv
2003.04887.

Saves: layer norms (their time and activations), warm-up, and steps of deep models. Costs: an architecture without
norms, which no other library loads and `scrimp export` refuses (the plain weights it would write have alpha folded
into the last layer of each branch). Not for: fine-tuning of weights that were trained with norms; scores of weights
before training (snip, grasp), since at the first step nothing in a branch has a gradient. Goes well with growth of
depth.

The model begins as its head over its embeddings: logits(x) = head(embed(x)). Norms of queries and keys, where a model
has them, and the norm in BERT's head stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from scrimp.normless import Scale, fill, folded, like, put_scale, refuse_norms, take_out_norms, undecayed
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.groups import Multipliers
    from scrimp.run import Run
    from scrimp.technique import State


@dataclass(frozen=True, kw_only=True)
class ReZero(Technique):
    """Blocks that begin as the identity, without norms."""

    card = Card(
        paper="arXiv:2003.04887",
        section="Initialization",
        claim="56 % faster convergence on enwik8 with 12 layers (the authors' repository)",
        saves="layer norms and warm-up; steps of deep models",
        costs="an architecture that no other library loads",
        sets=("initialization", "normalization", "closed branches"),
        needs=("attention_norm", "mlp_norm", "attention_scale", "mlp_scale"),
        phase={"model": "architecture", "init": "fill", "export": "folded"},
        example={"scale_lr": 2.0},
    )
    scale_lr: float = 1.0
    """Multiplier of the learning rate of the numbers alpha, which are never decayed."""

    def __post_init__(self) -> None:
        at_least(0, self, "scale_lr")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """No norms; one scale a block, on each of its branches."""
        for stack in take_out_norms(model, run.where(self)):
            scales: dict[str, Scale] = {}
            for branch in stack.branches:
                scale = scales.setdefault(branch.path, Scale(0.0, like(branch)))
                put_scale(branch, scale, run.where(self))
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
