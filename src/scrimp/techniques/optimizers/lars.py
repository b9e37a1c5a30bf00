# pyright: reportPrivateImportUsage=false
"""LARS: momentum whose step is scaled tensor by tensor to the size of the weights.

    lam = eta ||w|| / (||g|| + beta ||w|| + eps)          norms of each tensor; beta is the weight decay
    v <- mu v + lr lam (g + beta w)
    w <- w - v                                            Nesterov: w <- w - (mu v + lr lam (g + beta w))

Paper: You et al., "Large Batch Training of Convolutional Networks", arXiv 1708.03888. As there, the learning rate is
inside the momentum, which a change of rate therefore changes only for steps to come; many libraries multiply outside.

Saves: steps, as it stays stable with large batches and the learning rates that go with them. Costs: one state a weight
and the norms. Not for: attention, where its successor lamb learns far better.
Vectors (biases, norms) are moved by the plain gradient, without decay; so is, for a step, a tensor whose weights or
gradient are all zero. The size of the loss cancels, hence learning rates are those of no other rule: 1 to 30.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scrimp.chunks import chunks, norms
from scrimp.errors import UserError
from scrimp.groups import Group, param_groups
from scrimp.sharding import totals
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class LARS(Technique):
    """Momentum scaled tensor by tensor to the size of the weights."""

    card = Card(
        paper="arXiv:1708.03888",
        section="Large batch training",
        claim="AlexNet with batches of 8K and ResNet-50 with 32K without loss in accuracy (abstract of 1708.03888)",
        saves="steps, with large batches",
        costs="another learning rate, and the norms of all tensors",
        sets=("update rule",),
        scope="params",
        phase={"optimizer": "rule"},
        example={"lr": 1.0},
    )
    lr: float = 1.0
    """Learning rate before the schedule; of vectors too, which are not scaled."""
    momentum: float = 0.9
    """mu."""
    weight_decay: float = 1e-4
    """beta; vectors have none."""
    eta: float = 1e-3
    """Trust coefficient: the share of its norm by which a tensor moves at a learning rate of 1."""
    eps: float = 1e-8
    """Added to the denominator."""
    nesterov: bool = False
    """Look ahead along the momentum."""
    trust_clip: bool = False
    """LARC: at most the learning rate itself, min(lam / lr, 1) instead of lam."""
    params: str = "*"
    """Pattern of the parameters this rule owns."""

    def __post_init__(self) -> None:
        at_least(0, self, "lr", "eps", "weight_decay")
        if not self.eta > 0:
            raise UserError(f"eta must be positive, not {self.eta}.")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must be in [0, 1), not {self.momentum}.")

    def optimizer(self, make: Callable[[list[Group]], Optimizer], run: Run) -> Callable[[list[Group]], Optimizer]:
        """The rule below over the groups."""
        return lambda groups: LARSRule(
            param_groups(groups, self.lr, self.weight_decay), self.lr, self.momentum, eta=self.eta, eps=self.eps,
            nesterov=self.nesterov, trust_clip=self.trust_clip,
        )  # fmt: skip


class LARSRule(Optimizer):
    """LARS as a plain optimizer, for any loop.

    Its state is one tensor a parameter, `momentum_buffer`, of the parameter's shape and type. It holds steps: the
    learning rate is inside.

    Args:
        params: parameters or groups; a group may have its own value of everything below.
        lr: learning rate.
        momentum: decay rate of the momentum.
        weight_decay: beta; parameters of one dimension or none have none.
        eta: trust coefficient.
        eps: added to the denominator.
        nesterov: look ahead along the momentum.
        trust_clip: min(lam / lr, 1) instead of lam.
    Raises:
        ValueError: if lr, weight_decay or eps is negative, eta not positive, or momentum outside [0, 1).
    """

    def __init__(
        self, params: Any, lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0, eta: float = 1e-3,
        eps: float = 1e-8, nesterov: bool = False, trust_clip: bool = False,
    ) -> None:  # fmt: skip
        if not (lr >= 0 and weight_decay >= 0 and eps >= 0 and eta > 0):
            raise ValueError(
                f"lr, weight_decay and eps must be at least 0, eta more: {lr}, {weight_decay}, {eps}, {eta}"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1): {momentum}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "eps": eps}
        super().__init__(params, defaults | {"nesterov": nesterov, "trust_clip": trust_clip})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Parameters without a gradient are left alone.

        Args:
            closure: computes the loss and the gradients anew; its loss is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            for p in moving:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            self._move([p for p in moving if p.ndim > 1], group, adapted=True)
            self._move([p for p in moving if p.ndim <= 1], group, adapted=False)
        return loss

    def _move(self, params: Sequence[nn.Parameter], group: dict[str, Any], adapted: bool) -> None:
        rows: list[tuple[Tensor, ...]] = [(p.detach(), p.grad, self.state[p]["momentum_buffer"]) for p in params]  # type: ignore[misc]
        if adapted and rows:
            scales = ratios(params, [row[1] for row in rows], group)
            rows = [(*row, scale) for row, scale in zip(rows, scales, strict=True)]
        for weights, grads, momenta, *scalars in chunks(rows):
            _update(weights, grads, momenta, scalars[0] if adapted else None, group)


def ratios(weights: Sequence[Tensor], grads: Sequence[Tensor], group: dict[str, Any]) -> Sequence[Tensor]:
    """lam of each tensor, as scalars; 1 where the weights or the gradient are all zero."""
    w, g = (totals(torch.stack(norms(tensors)), weights) for tensors in (weights, grads))
    found = group["eta"] * w / (g + group["weight_decay"] * w + group["eps"])
    if group["trust_clip"]:
        found = (found / group["lr"]).clamp(max=1.0)
    return torch.where((w > 0) & (g > 0), found, 1.0).unbind()


def _update(
    weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor], scales: list[Tensor] | None,
    group: dict[str, Any],
) -> None:  # fmt: skip
    """The equations above, in place; without scales those of a vector."""
    lr, mu = group["lr"], group["momentum"]
    updates = torch._foreach_mul(grads, lr)
    if scales is not None:
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=lr * group["weight_decay"])
        torch._foreach_mul_(updates, scales)
    torch._foreach_mul_(momenta, mu)
    torch._foreach_add_(momenta, updates)
    if group["nesterov"]:
        torch._foreach_add_(updates, momenta, alpha=mu)
        torch._foreach_sub_(weights, updates)
    else:
        torch._foreach_sub_(weights, momenta)
