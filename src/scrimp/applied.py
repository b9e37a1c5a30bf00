# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Techniques for somebody's own loop: the slots that change a model, without the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from scrimp.arrange import arrange, misfits
from scrimp.clock import Clock
from scrimp.errors import UserError
from scrimp.fits import check_needs
from scrimp.run import Run
from scrimp.technique import SLOTS, Technique
from scrimp.weights import freeze, initialize


def apply(model: nn.Module, techniques: Sequence[Technique], seed: int = 0) -> nn.Module:
    """Techniques on somebody's own model, for somebody's own loop: the slots `model`, `wrap` and `init`.

    Args:
        model: any module with weights; it is changed in place where that suffices.
        techniques: such as `[LoRA(rank=8), Recompute()]`; those that act in other slots are refused.
        seed: of the weights that techniques add.
    Raises:
        UserError: if a technique needs the trainer, clashes with another, or hits nothing.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"needs an nn.Module to work on, not {model!r}.", "apply", "Give the model first.")
    for fault in misfits(techniques, "apply"):
        raise fault
    order = arrange(techniques)
    for slot in [s for s in SLOTS if s not in ("model", "wrap", "init", "carry", "export", "price")]:
        for technique in order.slots[slot]:
            rule = slot == "optimizer" and "update rule" in technique.card.sets
            what = f"`{technique.name}` acts in `{slot}`, which your own loop does not have."
            fix = "Use scrimp.train" + (", or its optimizer class by itself." if rule else ".")
            raise UserError(what, "apply", fix)
    given: Any = SimpleNamespace(techniques=tuple(techniques), seed=seed)
    device = next(model.parameters()).device
    run = Run(given, order, Clock("step", 1, 1, {"step": 1.0}), None, device, seed)
    run.base = frozenset(name for name, _ in model.named_parameters())
    before = {id(p) for p in model.parameters()}
    run.model = model
    check_needs(model, run)
    model = run.fold("model", model)
    freeze(model, techniques)
    initialize(model, seed, skip=before)
    run.model = run.fold("wrap", model)
    return run.fold("init", run.model)
