"""Pruning once, before the run's first backward pass: what snip and grasp have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.sparse.masks import MASK, apply, full, masked_backward, shapes, size
from scrimp.sparse.patterns import Pattern, best

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch

Score = Callable[["Batch"], "dict[str, Tensor]"]
"""The first batch -> scores of the weights by name, the highest to be kept."""


def pruned_once(
    backward: Backward, run: Run, technique: Any, weights: Mapping[str, nn.Parameter], score: Score, fix: str
) -> Backward:
    """Score and prune before the run's first backward pass, with dropout off; mask the gradients.

    Args:
        technique: with the settings `density`, `pattern` and `floor`.
        fix: what to do when scores say nothing.
    """
    pattern = Pattern.parse(technique.pattern)
    full(run, technique, weights)
    for name, shape in shapes(weights).items():
        pattern.check(name, shape, run.where(technique, "pattern"))
    masked = masked_backward(backward, run, technique, weights)
    # By the clock and not by a flag in memory, so that a plan sees one scoring.
    scored = run.clock.step > 0 or (technique.density == 1 and not pattern.group)

    def after_scoring(batch: Batch, count: Tensor) -> Tensor:
        nonlocal scored
        if not scored:
            scored = True
            _prune(run, technique, weights, score, batch, pattern, fix)
        return masked(batch, count)

    return after_scoring


def _prune(
    run: Run, technique: Any, weights: Mapping[str, nn.Parameter], score: Score, batch: Batch, pattern: Pattern,
    fix: str,
) -> None:  # fmt: skip
    training = run.model.training
    run.model.eval()
    try:
        scores = score(batch)
    finally:
        run.model.train(training)
    total = run.read(torch.stack([s.abs().sum() for s in scores.values()]).sum(), worst=1.0)
    if not math.isfinite(total) or total == 0:
        what = f"the scores of the weights sum to {total}, so that none can be told from another."
        raise UserError(what, run.where(technique), fix)
    masks = best(scores, round(technique.density * size(weights)), pattern, technique.floor)
    run.memory(technique).update({name + MASK: mask for name, mask in masks.items()})
    apply(run.memory(technique), weights)
