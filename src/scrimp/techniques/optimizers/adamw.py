"""Adam with decoupled weight decay.

    m <- b1 m + (1 - b1) g            mh = m / (1 - b1^t)
    v <- b2 v + (1 - b2) g^2          vh = v / (1 - b2^t)
    w <- w - lr wd w - lr mh / (sqrt(vh) + eps)

Paper: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv 1711.05101. The decay does not
pass through the division by sqrt(v), so that it means the same for every weight.

Saves: tuning, against SGD. Costs: two states a weight. Not for: memory that is short (lion keeps one state, sgd one
or none). The decay is multiplied by the learning rate, as in torch; the paper multiplies it by the schedule only.
The update itself is torch's, in its fused form: one pass over weights, gradients and states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from scrimp.errors import UserError
from scrimp.groups import Group, param_groups
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class AdamW(Technique):
    """Adam with decoupled weight decay."""

    card = Card(
        paper="arXiv:1711.05101",
        section="Optimization",
        saves="learning-rate tuning",
        costs="two states a weight",
        sets=("update rule",),
        scope="params",
        phase={"optimizer": "rule"},
        example={"lr": 1e-3},
    )
    lr: float = 3e-4
    """Learning rate before the schedule."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay; vectors have none."""
    params: str = "*"
    """Pattern of the parameters this rule owns."""

    def __post_init__(self) -> None:
        at_least(0, self, "lr", "eps", "weight_decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"both betas must be in [0, 1), not {self.betas}.")

    def optimizer(self, make: Callable[[list[Group]], Optimizer], run: Run) -> Callable[[list[Group]], Optimizer]:
        """torch's fused AdamW over the groups."""
        return lambda groups: torch.optim.AdamW(
            param_groups(groups, self.lr, self.weight_decay), lr=self.lr, betas=self.betas, eps=self.eps, fused=True
        )
