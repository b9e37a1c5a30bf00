"""Measure the gradient noise scale: which batch is large enough, and no larger.

    of the gradients of P parts of b samples each:  v (variance of one),  m (square of the true gradient)
    B_simple = tr(Sigma) / |G|^2 = b v / m,      v and m each averaged over steps before they are divided

With a batch of B_simple, training needs twice the steps of huge batches and twice the samples of tiny ones; far below
it a larger batch saves steps almost in proportion, far above it almost none. Paper: McCandlish et al., "An Empirical
Model of Large-Batch Training", arXiv 1812.06162 (appendix A.1).

Saves: samples that too large batches waste, and time that too small ones do, once `batch` is set to what it recommends.
Costs: the norm of every part's gradient; a batch in parts. Not for: choosing a batch from the first steps: the scale
grows as the loss falls. It holds for SGD with a well chosen rate, and guides other rules only roughly.

Training is bitwise that of `accumulate` with as many parts. Every line of metrics.jsonl shows the scale
(`noise_scale_b_simple`) and the nearest whole batch (`noise_scale_recommended_batch`), in samples, as soon as the
averages are positive. All parts are of the same size; one with more targets weighs more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scrimp.groups import trainable
from scrimp.splitting import accumulated, compared, own_parts, smooth, split
from scrimp.technique import Card, Technique, at_least, below_one

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch


@dataclass(frozen=True, kw_only=True)
class NoiseScale(Technique):
    """Measure the gradient noise scale, which recommends a batch."""

    card = Card(
        paper="arXiv:1812.06162",
        section="Large batch training",
        saves="samples and time that an ill-chosen batch wastes",
        costs="the norm of every part's gradient",
        sets=("parts of a batch",),
        micro_batches=True,
        phase={"backward": "accumulated"},
        entire="it compares gradients of samples, of which a rank has some tokens only.",
        held="a gradient that arrives is measured, which is whole then and a part later.",
        example={"parts": 2},
    )
    parts: int = 2
    """Micro-batches a step, whose gradients are compared; must divide the batch."""
    every: int = 1
    """Measure every so-many-th step."""
    decay: float = 0.95
    """Share of the averages that a measurement leaves."""

    def __post_init__(self) -> None:
        at_least(2, self, "parts")
        at_least(1, self, "every")
        below_one(self, "decay")

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Over every part, comparing their gradients."""
        own = own_parts(self.parts, run, run.where(self, "parts"))
        memory, weights = run.memory(self), list(trainable(run.model).values())
        for name in ("variance", "square"):
            memory[name] = torch.zeros((), dtype=torch.float64, device=run.device)
        last, size = [-1], run.recipe.batch / self.parts

        def measured(batch: Batch, count: Tensor) -> Tensor:
            pieces, now = split(batch, own), run.clock.step
            # Once a step, whoever asks for the gradient twice; a batch may have lost samples on its way.
            if now % self.every or now == last[0] or len(pieces) < own:
                return accumulated(backward, pieces, count, run)
            last[0] = now
            loss, variance, true = compared(backward, pieces, count, weights, run)
            memory["variance"] = smooth(memory["variance"], variance, self.decay)
            memory["square"] = smooth(memory["square"], true, self.decay)
            scale = run.read(size * memory["variance"] / memory["square"], worst=1.0)
            if 0 < scale < 1e18:
                best = max(1, round(scale))
                run.log(self, b_simple=scale, recommended_batch=best)
                run.findings[self.name] = (
                    f"noise_scale recommends a batch of about {best:,}; this run's is {run.recipe.batch:,}."
                )
            return loss

        return measured
