"""Recompute activations in the backward pass instead of keeping them.

    kept of a block of B x T tokens and width C, in units of B T C numbers:  16 without,  1 with mode block

Papers: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174; selective: Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models", MLSys 2023, arXiv 2205.05198.

`block` keeps the input of a block and runs its forward pass again: a third more computation. `selective` keeps the
outputs of expensive operators and runs only cheap ones again (norms, activations, residuals):

    save: products     outputs of matrix products and of attention
    save: half         outputs of every second product, and of attention
    save: attention    outputs of attention only

Saves: activations. Costs: the second forward pass. Not for: runs that fit, or small batches, whose peak is the update.
Selective keeps outputs even where the backward pass would not have needed them, so with small savings in sight `block`
on every second block may be the better half-way house. Gradients are bitwise those of a run without.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from scrimp.models.seams import blocks, matching, wrap_forward
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run

PRODUCTS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_int_mm", "_addmm_activation", "_linear_pointwise"}
)
"""Operators that multiply matrices, on any device."""
ATTENTION = "_scaled_dot_product_"
"""How torch's fused attention operators begin, such as `_scaled_dot_product_flash_attention_for_cpu`."""


@dataclass(frozen=True, kw_only=True)
class Recompute(Technique):
    """Recompute activations in the backward pass instead of keeping them."""

    card = Card(
        paper="arXiv:1604.06174",
        section="Rematerialization",
        saves="activations: 1 of 16 parts of a block's remains",
        costs="a second forward pass of the chosen blocks",
        phase={"wrap": "recompute"},
        sets=("recomputation",),
        example={"mode": "block"},
        remedies=({"mode": "selective"}, {"mode": "block"}),
    )
    mode: Literal["block", "selective"] = "block"
    """block: keep inputs of blocks. selective: keep what `save` says."""
    every: int = 1
    """Treat every so-many-th block, from the first."""
    save: Literal["products", "half", "attention"] = "products"
    """What mode selective keeps."""
    blocks: str = ""
    """Pattern of the modules to treat; empty means the model's blocks."""

    def __post_init__(self) -> None:
        at_least(1, self, "every")

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Checkpoint the chosen blocks' forward passes."""
        if self.blocks:
            modules = dict(model.named_modules())
            found = matching(self.blocks, [n for n in modules if n], "module", run.where(self, "blocks"))
            chosen = [modules[name] for name in found]
        else:
            chosen = list(blocks(model, run.where(self)).values())
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws(model)}
        if self.mode == "selective":
            options["context_fn"] = partial(selective, self.save)
        for block in chosen[:: self.every]:
            wrap_forward(block, partial(checkpointed, options=options))
        return model


def checkpointed(forward: Callable[..., object], options: dict[str, Any]) -> Callable[..., object]:
    """The same forward, checkpointed while gradients are recorded."""

    def recomputed(*args: Any, **kwargs: Any) -> object:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return recomputed


def draws(model: nn.Module) -> bool:
    """Whether a model may draw from torch's generator. Our own dropout does not; another model may, unseen."""
    ours = type(model).__module__.partition(".")[0] == "scrimp"
    return not ours or any(isinstance(m, _DropoutNd) and m.p > 0 for m in model.modules())


def selective(save: str) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts that keep the outputs of some operators."""
    counts = {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op.__name__.partition(".")[0]
        if name.startswith(ATTENTION):
            return CheckpointPolicy.MUST_SAVE
        if name not in PRODUCTS or save == "attention":
            return CheckpointPolicy.PREFER_RECOMPUTE
        counts[context.is_recompute] += 1
        keep = save == "products" or counts[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
