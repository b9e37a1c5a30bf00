"""Stochastic gradient descent with momentum.

    v <- mu v + (1 - d) g    (first step: v = g)         d: dampening, 0 unless set
    w <- w - lr v            Nesterov: w <- w - lr (g + mu v)

with g <- g + wd w before. Papers: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964;
Qian, "On the momentum term in gradient descent learning algorithms", 1999.

Saves: one state a weight, none without momentum. Costs: a learning rate that must be found for each model.
Not for: Transformers from scratch, where adaptive rules converge far faster. The learning rate multiplies v rather
than entering it: on a change of rate nothing in v has to be corrected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from scrimp.errors import UserError
from scrimp.groups import Group, param_groups
from scrimp.sharding import sharded
from scrimp.technique import Card, Technique, at_least

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
    dampening: float = 0.0
    """d: the gradient's part is 1 - d of it, but for the first; 0 adds all of it."""
    nesterov: bool = False
    """Look ahead along the momentum."""
    weight_decay: float = 0.0
    """L2, added to the gradient; vectors have none."""
    params: str = "*"
    """Pattern of the parameters this rule owns."""

    def __post_init__(self) -> None:
        at_least(0, self, "lr", "weight_decay")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must be in [0, 1), not {self.momentum}.")
        if not 0 <= self.dampening <= 1:
            raise UserError(f"dampening must be in [0, 1], not {self.dampening}.")
        if self.dampening and (self.nesterov or not self.momentum):
            what = "nesterov is made for an undamped momentum." if self.momentum else "there is no momentum to dampen."
            raise UserError(what, "dampening", "Leave it out.")
        if self.nesterov and not self.momentum:
            raise UserError("nesterov looks ahead along the momentum, which is 0.", "", "Set momentum, such as 0.9.")

    def optimizer(self, make: Callable[[list[Group]], Optimizer], run: Run) -> Callable[[list[Group]], Optimizer]:
        """torch's SGD over the groups, fused where that is right."""

        def rule(groups: list[Group]) -> Optimizer:
            params = [p for group in groups for p in group.params.values()]
            made = torch.optim.SGD(
                param_groups(groups, self.lr, self.weight_decay),
                lr=self.lr,
                momentum=self.momentum,
                dampening=self.dampening,
                nesterov=self.nesterov,
                # On a CPU it leaves most weights of 16 bits as they are (pytorch/pytorch#191763), and torch has no
                # fused update of sharded ones.
                fused=all((p.device.type != "cpu" or p.dtype.itemsize > 2) and not sharded(p) for p in params),
            )
            if self.momentum:
                made.register_step_pre_hook(_begin)
            return made

        return rule


@torch.no_grad()
def _begin(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The v from which this step makes v = g, for weights that get their first gradient: 0, or d g / mu if damped.

    The fused update itself takes only all weights or none of a group to be in their first step, and a parameter may
    well get its first gradient later than others.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and "momentum_buffer" not in optimizer.state[p]:
                start = torch.zeros_like(p)
                if group["dampening"]:
                    start.add_(p.grad).add_(p, alpha=group["weight_decay"])
                    start.mul_(group["dampening"] / group["momentum"])
                optimizer.state[p]["momentum_buffer"] = start
