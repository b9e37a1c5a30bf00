"""How much a weight matters to the loss, before it is trained.

snip     |w g|           how much the loss changes when the weight goes, to first order
grasp    -w (H g)        half of how much ||g||^2 rises when the weight goes, to first order: the highest are removed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.errors import UserError

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch


def scored_batches(run: Run, batch: Batch, count: int, where: str) -> list[Batch]:
    """This step's batch and those of the next steps; of batches without values, the same again.

    Raises:
        UserError: if the run has fewer batches.
    """
    steps = run.clock.steps(1.0)
    if count > steps:
        raise UserError(f"{count:,} batches are more than the {steps:,} of the run.", where, "Lower `batches`.")
    if any(isinstance(value, FakeTensor) for value in batch.values()):
        return [batch] * count
    return [batch, *(run.batch(run.clock.step + i) for i in range(1, count))]


def snip(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """|w g| = |dL/dc| of a factor c on each weight, at c = 1."""
    return [(w * g).abs() for w, g in zip(weights, grads, strict=True)]


def grasp(
    losses: Sequence[Callable[[], Tensor]], weights: Sequence[nn.Parameter], total: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """-w (H g), for the sum of some losses: H and g are those of the sum.

    Args:
        total: sums a tensor over the ranks that have other losses.
        losses: parts of the loss, computed one at a time, so that only one has its activations in memory.
    """
    totals: list[Tensor] = []
    for loss in losses:
        grads = _known(torch.autograd.grad(loss(), weights, allow_unused=True), weights)
        totals = [a + b for a, b in zip(totals, grads, strict=True)] if totals else grads
    totals = [total(g) for g in totals]
    products = [torch.zeros_like(w) for w in weights]
    for loss in losses:
        grads = _known(torch.autograd.grad(loss(), weights, create_graph=True, allow_unused=True), weights)
        inner = torch.stack([(g * whole).sum() for g, whole in zip(grads, totals, strict=True)]).sum()
        parts = _known(torch.autograd.grad(inner, weights, allow_unused=True), weights)
        products = [a + b for a, b in zip(products, parts, strict=True)]
    products = [total(product) for product in products]
    return [-w.detach() * product for w, product in zip(weights, products, strict=True)]


def _known(grads: Sequence[Any], weights: Sequence[Tensor]) -> list[Tensor]:
    """Zeros for weights that a loss does not touch."""
    return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
