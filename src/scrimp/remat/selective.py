"""A block checkpointed by torch: as a whole, or keeping the outputs of some operators."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

PRODUCTS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_int_mm", "_addmm_activation", "_linear_pointwise"}
)
"""Operators that multiply matrices, on any device."""
ATTENTION = "_scaled_dot_product_"
"""How torch's fused attention operators begin, such as `_scaled_dot_product_flash_attention_for_cpu`."""

Save = Literal["products", "half", "attention"]
SAVES: tuple[Save, ...] = ("products", "half", "attention")
"""The most is kept first."""


def checkpointed(forward: Callable[..., object], draws: bool, save: Save | None = None) -> Callable[..., object]:
    """The same forward, checkpointed while gradients are recorded.

    Args:
        draws: whether it may draw from torch's generator.
        save: what is kept of it; None keeps the input only.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws}
    if save is not None:
        options["context_fn"] = partial(selective, save)

    def recomputed(*args: Any, **kwargs: Any) -> object:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return recomputed


def selective(save: Save) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
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
