"""Stochastic gradient descent with momentum.

    v <- mu v + g            (first step: v = g)
    w <- w - lr v            Nesterov: w <- w - lr (g + mu v)

with g <- g + wd w before. Papers: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964;
Qian, "On the momentum term in gradient descent learning algorithms", 1999.

Saves: one state a weight, none without momentum. Costs: a learning rate that must be found for each model.
Not for: Transformers from scratch, where adaptive rules converge far faster. The learning rate multiplies v rather
than entering it: on a change of rate nothing in v has to be corrected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from scrimp.groups import Group, param_groups
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class SGD(Technique):
    """Stochastic gradient descent with momentum."""

    card = Card(
        paper="Qian, Neural Networks 12(1), 1999",
        section="Optimization",
        saves="states: one a weight, or none",
        costs="a learning rate found for each model",
        sets=("update rule",),
        scope="params",
        phase={"optimizer": "rule"},
        example={"lr": 0.05},
    )
    lr: float = 0.1
    """Learning rate before the schedule."""
    momentum: float = 0.9
    """mu; 0 keeps no state."""
    nesterov: bool = False
    """Look ahead along the momentum."""
    weight_decay: float = 0.0
    """L2, added to the gradient; vectors have none."""
    params: str = "*"
    """Pattern of the parameters this rule owns."""

    def optimizer(self, make: Callable[[list[Group]], Optimizer], run: Run) -> Callable[[list[Group]], Optimizer]:
        """torch's fused SGD over the groups."""
        return lambda groups: torch.optim.SGD(
            param_groups(groups, self.lr, self.weight_decay),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            fused=True,
        )
