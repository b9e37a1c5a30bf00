# pyright: reportPrivateImportUsage=false
"""LAMB: Adam whose step is scaled tensor by tensor to the size of the weights.

    m <- b1 m + (1 - b1) g            mh = m / (1 - b1^t)
    v <- b2 v + (1 - b2) g^2          vh = v / (1 - b2^t)
    u = mh / (sqrt(vh) + eps) + wd w
    w <- w - lr phi(||w||) / ||u|| u          norms of each tensor; phi(z) = min(z, clamp)

Paper: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020,
arXiv 1904.00962. Every matrix moves by lr of its own norm, whatever its gradient. Versions of the paper differ in the
division by 1 - b^t (`bias_correction`); a common implementation, NVLAMB, clips all gradients together first (`clip`).

Saves: steps, as it stays stable with large batches. Costs: two states a weight, as Adam, and a second pass over them.
Not for: small batches, where adamw is as good and cheaper; two clippings, by `clip` here and the technique clip.
Vectors (biases, norms) get Adam's step, without decay; so does, for a step, a tensor whose weights are all zero. With a
batch k times larger the paper multiplies the learning rate by sqrt(k), and the share of the warm-up by k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scrimp.chunks import chunks, norms
from scrimp.errors import UserError
from scrimp.groups import Group, param_groups
from scrimp.sharding import gradient_norm, totals, whole
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class LAMB(Technique):
    """Adam scaled tensor by tensor to the size of the weights."""

    card = Card(
        paper="arXiv:1904.00962",
        section="Large batch training",
        claim="BERT in 76 minutes instead of 3 days, with batches of 32,768 on a TPU pod (abstract of 1904.00962)",
        saves="steps, with large batches",
        costs="two states a weight, and a second pass over them",
        sets=("update rule",),
        scope="params",
        phase={"optimizer": "rule"},
        example={"lr": 1e-2},
    )
    lr: float = 5e-3
    """Learning rate before the schedule: the share of its norm by which a matrix moves."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Part of the update, before its norm is taken; vectors have none."""
    bias_correction: bool = True
    """Divide the moments by 1 - b^t."""
    clamp: float = 1e999
    """Upper bound of phi; infinity for none."""
    trust_clip: bool = False
    """LAMBC: never scale up, min(ratio, 1)."""
    clip: float = 0.0
    """Largest norm of all gradients of this rule together; 0 for none, 1 is NVLAMB's."""
    params: str = "*"
    """Pattern of the parameters this rule owns."""

    def __post_init__(self) -> None:
        at_least(0, self, "lr", "eps", "weight_decay", "clip")
        if not self.clamp > 0:
            raise UserError(f"clamp must be positive, not {self.clamp}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"both betas must be in [0, 1), not {self.betas}.")

    def optimizer(self, make: Callable[[list[Group]], Optimizer], run: Run) -> Callable[[list[Group]], Optimizer]:
        """The rule below over the groups."""
        if self.clip and run.elsewhere:
            what = "gradients are clipped by the norm of all, and a rank holds those of its own blocks only."
            raise UserError(what, run.where(self, "clip"), "Add `clip`, which sums over ranks, and leave this at 0.")
        return lambda groups: LAMBRule(
            param_groups(groups, self.lr, self.weight_decay), self.lr, self.betas, self.eps, clip=self.clip,
            bias_correction=self.bias_correction, clamp=self.clamp, trust_clip=self.trust_clip,
        )  # fmt: skip


class LAMBRule(Optimizer):
    """LAMB as a plain optimizer, for any loop.

    Its states are those of torch's Adam: `exp_avg`, `exp_avg_sq` and, on the host, `step`.

    Args:
        params: parameters or groups; a group may have its own value of everything below but `clip`.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: part of the update; parameters of one dimension or none have none.
        bias_correction: divide the moments by 1 - b^t.
        clamp: upper bound of phi.
        trust_clip: never scale up.
        clip: largest norm of all gradients together, which are left as they are; 0 for none.
    Raises:
        ValueError: if lr, weight_decay, eps or clip is negative, clamp not positive, or a beta outside [0, 1).
    """

    def __init__(
        self, params: Any, lr: float = 5e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.0, bias_correction: bool = True, clamp: float = math.inf, trust_clip: bool = False,
        clip: float = 0.0,
    ) -> None:  # fmt: skip
        if not (lr >= 0 and weight_decay >= 0 and eps >= 0 and clip >= 0 and clamp > 0):
            given = f"{lr}, {weight_decay}, {eps}, {clip}, {clamp}"
            raise ValueError(f"lr, weight_decay, eps and clip must be at least 0, clamp more: {given}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"both betas must be in [0, 1): {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clamp": clamp}
        super().__init__(params, defaults | {"bias_correction": bias_correction, "trust_clip": trust_clip})
        self.clip = clip

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
        factor = self._factor()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            for p in moving:
                state = self.state[p]
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
            self._move([p for p in moving if p.ndim > 1], group, factor, adapted=True)
            self._move([p for p in moving if p.ndim <= 1], group, factor, adapted=False)
        return loss

    def _factor(self) -> Tensor | None:
        """By which all gradients are multiplied; None for 1."""
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not self.clip or not held:
            return None
        return (self.clip / whole(gradient_norm(held))).clamp(max=1.0)

    def _move(
        self, params: Sequence[nn.Parameter], group: dict[str, Any], factor: Tensor | None, adapted: bool
    ) -> None:
        """The moments, then the weights.

        The update of a matrix is computed twice rather than kept until its norm is known.
        """
        if not params:
            return
        states = [self.state[p] for p in params]
        counts = _corrections([s["step"] for s in states], group["betas"])
        counts = counts if group["bias_correction"] else [()] * len(states)
        rows = [(p.detach(), s["exp_avg"], s["exp_avg_sq"], *c) for p, s, c in zip(params, states, counts, strict=True)]
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        decay = group["weight_decay"] if adapted else 0.0
        old = totals(torch.stack(norms([row[0] for row in rows])), params)
        squares = torch.zeros_like(old).unbind()
        with_grads = [(w, g, q, *more) for (w, *more), g, q in zip(rows, grads, squares, strict=True)]
        for w, g, square, m, v, *corrections in chunks(with_grads):
            _moments(m, v, g if factor is None else torch._foreach_mul(g, factor), group["betas"])
            updates = _updates(w, m, v, corrections, group["eps"], decay)
            if adapted:
                found = norms(updates)
                torch._foreach_addcmul_(square, found, found)
            else:
                torch._foreach_add_(w, updates, alpha=-group["lr"])
        if not adapted:
            return
        scales = ratios(old, totals(torch.stack(squares).sqrt(), params), group)
        for w, m, v, scale, *corrections in chunks(
            [(w, m, v, scale, *c) for (w, m, v, *c), scale in zip(rows, scales, strict=True)]
        ):
            updates = _updates(w, m, v, corrections, group["eps"], decay)
            torch._foreach_mul_(updates, scale)
            torch._foreach_add_(w, updates, alpha=-group["lr"])


def ratios(weights: Tensor, updates: Tensor, group: dict[str, Any]) -> Sequence[Tensor]:
    """phi(||w||) / ||u|| of each tensor, from their norms, as scalars; 1 where one of them is 0."""
    found = weights.clamp(max=group["clamp"]) / updates
    if group["trust_clip"]:
        found = found.clamp(max=1.0)
    return torch.where((weights > 0) & (updates > 0), found, 1.0).unbind()


def _corrections(steps: list[Tensor], betas: tuple[float, float]) -> list[tuple[Tensor, ...]]:
    """1 - b1^t and sqrt(1 - b2^t) of each parameter, which count their own steps, as scalars on the host."""
    counts = torch.stack(steps).double()
    return list(zip((1 - betas[0] ** counts).unbind(), (1 - betas[1] ** counts).sqrt().unbind(), strict=True))


def _moments(first: list[Tensor], second: list[Tensor], found: Sequence[Tensor], betas: tuple[float, float]) -> None:
    """Both moments, in place."""
    grads = list(found)
    torch._foreach_lerp_(first, grads, 1 - betas[0])
    torch._foreach_mul_(second, betas[1])
    torch._foreach_addcmul_(second, grads, grads, 1 - betas[1])


def _updates(
    weights: list[Tensor], first: list[Tensor], second: list[Tensor], corrections: list[list[Tensor]], eps: float,
    decay: float,
) -> list[Tensor]:  # fmt: skip
    """u of some weights."""
    updates = list(torch._foreach_sqrt(second))
    if corrections:
        torch._foreach_div_(updates, corrections[1])
    torch._foreach_add_(updates, eps)
    torch._foreach_reciprocal_(updates)
    torch._foreach_mul_(updates, first)
    if corrections:
        torch._foreach_div_(updates, corrections[0])
    if decay:
        torch._foreach_add_(updates, weights, alpha=decay)
    return updates
