"""Weights moved uphill for a second gradient, and put back: what sharpness-aware techniques share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from scrimp.run import Run


def with_gradients(run: Run) -> dict[str, nn.Parameter]:
    """The model's parameters that hold a gradient, by name."""
    return {name: p for name, p in run.model.named_parameters() if p.grad is not None}


@torch.no_grad()
def perturb(run: Run, parameters: Sequence[nn.Parameter], rho: float, still: Collection[int] = ()) -> list[Tensor]:
    """w <- w + rho g / (||g|| + 1e-12), and drop the gradients. ||g|| is over all parameters together.

    Args:
        still: places of parameters that stay where they are. They are copied too, so that memory does not depend on
            which they are.
    Returns:
        Copies of the weights as they were.
    """
    if not parameters and not run.elsewhere:
        return []
    scale = rho / (run.norm(parameters) + 1e-12)
    copies: list[Tensor] = []
    for i, p in enumerate(parameters):
        assert p.grad is not None
        copies.append(p.detach().clone())
        if i not in still:
            p.add_(p.grad.mul_(scale.to(p.grad.dtype)))
        # One at a time, so that the copies take the gradients' place in memory.
        p.grad = None
    return copies


@torch.no_grad()
def restore(parameters: Sequence[nn.Parameter], copies: Sequence[Tensor]) -> None:
    """Put the copies back: subtracting the step would leave rounding errors."""
    for p, copy in zip(parameters, copies, strict=True):
        p.copy_(copy)
