"""Muon: momentum whose update is made orthogonal, for the weight matrices of hidden layers.

    M <- mu M + G                                   momentum, then a look ahead: U = G + mu M
    X <- U / |U|_F;  5 times:  A = X X^T,  X <- a X + (b A + c A A) X
    W <- W - lr wd W - lr 0.2 sqrt(max(rows, columns)) X

The iteration (a, b, c = 3.4445, -4.7750, 2.0315) drives all singular values towards 1, so that rare directions of the
gradient move the weights as far as frequent ones do. The factor gives the update the size of AdamW's, hence AdamW's
learning rate and decay can be kept. Vectors, embeddings and the head are AdamW's, here with the same learning rate.

Papers: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the factor and the decay: Liu et
al., "Muon is Scalable for LLM Training", arXiv 2502.16982.

Saves: steps to a loss; one of Adam's two states of each hidden matrix. Costs: 5 iterations of three products a matrix
and step, which do not depend on the batch: with m the smaller side they add about 3 m / tokens to the products of a
hidden layer, in bfloat16, as the original has it. Not for: small batches of tokens, fine-tuning of weights that were
trained with Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from scrimp.errors import UserError
from scrimp.groups import Group, Several, param_groups
from scrimp.models.seams import matching
from scrimp.sharding import cut_of, follow, like, shape, sharded, whole
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run

COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""a, b, c of the iteration: the steepest at 0 that stays bounded; singular values end between 0.7 and 1.2."""


@dataclass(frozen=True, kw_only=True)
class Muon(Technique):
    """Orthogonal momentum for hidden matrices, AdamW for the rest."""

    card = Card(
        paper="arXiv:2502.16982",
        section="Optimization",
        claim="about 2x the computational efficiency of AdamW with compute-optimal training (abstract of 2502.16982)",
        saves="steps to a loss, and one of Adam's two states of hidden matrices",
        costs="15 small products a matrix and step",
        sets=("update rule", "rule of matrices"),
        scope="params",
        phase={"optimizer": "rule"},
        example={"lr": 1e-3},
    )
    lr: float = 1e-3
    """Learning rate before the schedule, in the size of AdamW's."""
    momentum: float = 0.95
    """Decay rate of the momentum."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments, for what is not a hidden matrix."""
    eps: float = 1e-8
    """Of AdamW."""
    weight_decay: float = 0.1
    """Decoupled decay; vectors have none."""
    others: str = "embed*|positions*|head*|*embed*|*wte*|*wpe*|lm_head*"
    """Pattern of matrices that are AdamW's too: embeddings and heads."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the iteration; float32 for a device without products of bfloat16, on which these are slower."""
    iterations: int = 5
    """Of the orthogonalization; fewer are cheaper and leave the singular values further from 1."""
    params: str = "*"
    """Pattern of the parameters this rule owns."""

    def __post_init__(self) -> None:
        at_least(0, self, "lr", "eps", "weight_decay", "momentum")
        at_least(1, self, "iterations")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            raise UserError(f"momentum and both betas must be in [0, 1), not {self.momentum} and {self.betas}.")

    def optimizer(self, make: Callable[[list[Group]], Optimizer], run: Run) -> Callable[[list[Group]], Optimizer]:
        """The rule below over hidden matrices, torch's fused AdamW over the rest."""

        def made(groups: list[Group]) -> Optimizer:
            names = [name for group in groups for name, p in group.params.items() if p.ndim == 2]
            try:
                kept = set(matching(self.others, names, "matrix"))
            except UserError:  # A part of a model may have neither embedding nor head.
                kept = set[str]()
            hidden = set(names) - kept
            if not hidden:
                raise UserError("there is no hidden matrix to train.", run.where(self, "others"), "Use adamw.")
            inside, outside = ([Group({n: p for n, p in g.params.items() if (n in hidden) is wanted}, g.lr, g.decay)
                                for g in groups] for wanted in (True, False))  # fmt: skip
            rule = MuonRule(param_groups(inside, self.lr, self.weight_decay), self.lr, self.momentum,
                            dtype=getattr(torch, self.precision), iterations=self.iterations)  # fmt: skip
            rest = param_groups(outside, self.lr, self.weight_decay)
            if not rest:
                return rule
            adam = torch.optim.AdamW(rest, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
            return Several([rule, adam])

        return made


class MuonRule(Optimizer):
    """Muon as a plain optimizer of matrices, for any loop.

    Its state is one tensor a parameter, `momentum`, of the parameter's shape and type.

    Args:
        params: matrices or groups of them; a group may have its own lr, momentum and weight_decay.
        lr: learning rate, in the size of AdamW's.
        momentum: decay rate of the momentum.
        weight_decay: decoupled decay, multiplied by the learning rate.
        dtype: of the iteration.
        iterations: how many.
    Raises:
        ValueError: if a parameter is no matrix.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32, iterations: int = 5,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype, self.iterations = dtype, iterations
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim != 2]
        if shapes:
            raise ValueError(f"Muon trains matrices, not a parameter of shape {shapes[0]}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. Parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, mu = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].mul_(mu).add_(p.grad)
                update = self._orthogonal(p.grad.add(momentum, alpha=mu), p)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-lr * 0.2 * math.sqrt(max(shape(p))))
        return loss

    def _orthogonal(self, update: Tensor, p: Tensor) -> Tensor:
        """Of the whole matrix, where ranks hold parts of it."""
        found = orthogonal(whole(follow(update, p)), self.dtype, self.iterations)
        return found if cut_of(p) is None and not sharded(p) else like(p, found)


def orthogonal(matrix: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """A matrix of the same singular vectors whose singular values are near 1. Shapes: [m, n] -> [m, n].

    Args:
        dtype: of the iteration; float64 stays float64.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.float64 if matrix.dtype == torch.float64 else dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.t()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if tall else x
