"""Recomputation: a block keeps its input instead of its activations, and runs forward again in the backward.

    kept a block:   about 16 activations of size B T C  ->  1 (mode block), about 11 (mode selective)
    computed again: one forward of every block, a third of a step (block); norms and activations only (selective)

Papers: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174; selective: Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models", arXiv 2205.05198.

Saves: activation memory. Costs: up to a third more computation. Not for: peaks that are made elsewhere, such as full
logits (fused_loss) or optimizer states. Only torch's non-reentrant checkpoint is used: the reentrant one gives silent
zero gradients when only adapters are trained. Gradients are bitwise those without recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from scrimp.errors import UserError
from scrimp.models.seams import blocks, wrap_forward
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from collections.abc import Callable

    from scrimp.run import Run

PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
)  # fmt: skip
"""Operations whose results are kept by the selective mode: they are dear to compute."""


@dataclass(frozen=True, kw_only=True)
class Recompute(Technique):
    """Run blocks forward again in the backward."""

    card = Card(
        paper="arXiv:1604.06174",
        section="Rematerialization",
        saves="activation memory",
        costs="up to a third more computation",
        sets=("recomputation",),
        phase={"wrap": "recompute"},
        example={"every": 1},
    )
    mode: Literal["block", "selective"] = "block"
    """block keeps each block's input; selective also keeps matrix products and attention."""
    every: int = 1
    """Recompute every n-th block."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"every must be at least 1, not {self.every}.")

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Each chosen block's forward inside torch's checkpoint."""
        # Our own dropout needs no generator; a foreign model's may.
        random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": random}
        if self.mode == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)
        for i, block in enumerate(blocks(model, run.where(self)).values()):
            if i % self.every == 0:
                wrap_forward(block, partial(_checkpointed, options=options))
        return model


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return run


def _keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name().split(".")[0] in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
