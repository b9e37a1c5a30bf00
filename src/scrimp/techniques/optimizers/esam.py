"""Efficient sharpness-aware minimization: fewer tensors are perturbed, and fewer samples see the perturbed weights.

    e = rho / beta g / (||g|| + 1e-12) on each tensor with probability beta, 0 on the others;   g = grad L(w)
    update w with the gradient at w + e of the gamma B samples whose loss rises most from w to w + e

Paper: Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR 2022,
arXiv 2110.03141: stochastic weight perturbation and sharpness-sensitive data selection. ||g|| is over all tensors, so
that e is sam's on average; the authors' code takes the tensors that are perturbed.

Saves: against sam, 1 - gamma of the second forward and backward pass, and its activations. Costs: those passes, a copy
of the weights, and the losses of single samples: two forward passes over the batch, one sample at a time, without
gradients. Losses here are sums over a batch, so that the first pass does not tell them. On a CPU this makes it slower
than sam; on a GPU too, unless single samples fill it. Not for: losses that compare the samples of a batch.

The rise is that of a sample's share in the batch's summed loss. Which tensors are perturbed is a function of the seed
and the step. With beta = gamma = 1 it is sam, to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.perturbing import perturb, restore, with_gradients
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch


@dataclass(frozen=True, kw_only=True)
class ESAM(Technique):
    """Sharpness-aware minimization with a part of the tensors and a part of the samples."""

    card = Card(
        paper="arXiv:2110.03141",
        section="Optimization",
        saves="a part of sam's second pass",
        costs="a part of a second pass, single samples' losses, and a copy of the weights",
        sets=("gradient point", "parts of a batch"),
        micro_batches=True,
        phase={"backward": "perturbed"},
        alone="losses of single samples decide which of the batch are used again, and each rank has a part of it.",
        example={"rho": 0.05},
        neutral={"rho": 0.0},
    )
    rho: float = 0.05
    """Radius of the neighborhood, in the norm of all weights together."""
    beta: float = 0.6
    """Probability with which a tensor is perturbed; 1 perturbs all."""
    gamma: float = 0.5
    """Share of the samples in the second pass, rounded up; 1 takes all and looks at none."""

    def __post_init__(self) -> None:
        at_least(0, self, "rho")
        if not (0 < self.beta <= 1 and 0 < self.gamma <= 1):
            raise UserError(f"beta and gamma must be in (0, 1], not {self.beta} and {self.gamma}.")

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Backward at w, then at w + e for the samples that rise most, leaving the second gradient."""
        if self.rho == 0:
            return backward

        def perturbed(batch: Batch, count: Tensor) -> Tensor:
            before = losses(run, batch) if self.gamma < 1 else None
            loss = backward(batch, count)
            held = list(with_gradients(run).values())
            copies = perturb(run, held, self.rho / self.beta, left_out(run, len(held), self.beta))
            try:
                if before is None:
                    backward(batch, count)
                else:
                    part = steepest(batch, losses(run, batch) - before, self.gamma)
                    backward(part, run.task.count(part))
            finally:
                restore(held, copies)
            return loss

        return perturbed


def left_out(run: Run, count: int, beta: float) -> frozenset[int]:
    """Places of the tensors that this step does not perturb."""
    draws = np.random.default_rng(generator(run.seed, f"esam/{run.clock.step}").initial_seed()).random(count)
    return frozenset(np.flatnonzero(draws >= beta).tolist())


@torch.no_grad()
def losses(run: Run, batch: Batch) -> Tensor:
    """The summed loss of each sample by itself, [B]; they drop the activations that they drop in the batch."""
    assert run.loss is not None
    size = len(next(iter(batch.values())))
    return torch.stack([run.loss(run.model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(size)])


def steepest(batch: Batch, rises: Tensor, gamma: float) -> Batch:
    """The share gamma of a batch whose losses rise most, in their old order; at least one sample."""
    chosen = rises.topk(math.ceil(gamma * len(rises))).indices.sort().values
    return {name: value.index_select(0, chosen.to(value.device)) for name, value in batch.items()}
