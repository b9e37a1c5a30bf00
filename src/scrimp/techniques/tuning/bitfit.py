"""BitFit: only the biases are trained.

    y = W x + b + db         W as given, db trained; so in every linear layer and norm that has a bias

About one weight in a thousand of BERT. Paper: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for
Transformer-based Masked Language-models", ACL 2022, arXiv 2106.10199.

Saves: gradients and optimizer states of all matrices, and a third of a block's activations (10 of 16 parts remain),
since the gradient of a bias needs no input. Costs: nothing, in time or in use: the architecture stays. Not for: models
without biases, such as Llama, which it refuses; tasks far from what the model was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from scrimp.errors import UserError
from scrimp.models.seams import matching
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run

NORMS = "*norm.weight"


@dataclass(frozen=True, kw_only=True)
class BitFit(Technique):
    """Train the biases alone."""

    card = Card(
        paper="arXiv:2106.10199",
        section="Parameter-efficient tuning",
        saves="gradients and states of all matrices, and a third of the activations",
        costs="nothing",
        trains=("bias",),
        refuses={"rule of matrices": "it trains vectors alone, and the other is a rule for matrices."},
    )
    norms: bool = False
    """Also train the weights of the norms."""

    @property
    def trained(self) -> tuple[str, ...]:
        """Biases, and weights of norms if asked for."""
        return (*self.card.trains, *((NORMS,) if self.norms else ()))

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """The model as it is, if it has biases, and norms with weights where these are asked for.

        Raises:
            UserError: if it has none.
        """
        if not any(name.rpartition(".")[2] == "bias" for name in run.base):
            what = "the model has no biases, and this trains nothing else."
            raise UserError(what, run.where(self), "Use lora, ia3 or ssf, or a model with `bias: true`.")
        if self.norms:
            matching(
                NORMS, [name for name, _ in model.named_parameters()], "weight of a norm", run.where(self, "norms")
            )
        return model
