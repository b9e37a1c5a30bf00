"""Gradient clipping by the global norm.

    g <- g min(1, norm / (||g|| + 1e-6)),    ||g|| over all trained parameters together

Paper: Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013, arXiv 1211.5063.

Saves: runs that a few bad batches would throw off. Costs: a pass over the gradients. Not for: rules that normalize
their update anyway (lion, lamb), where it does little.

Once a step, after accumulation, unscaling and masks. A norm that is not finite makes all gradients NaN instead of
hiding it: the next loss is then not finite, and the trainer stops and names the parameter. (autocast with float16
skips such a step before it comes here.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.utils import clip_grads_with_norm_

from scrimp.errors import UserError
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Step


@dataclass(frozen=True, kw_only=True)
class Clip(Technique):
    """Gradient clipping by the global norm."""

    card = Card(
        paper="arXiv:1211.5063",
        section="Optimization",
        saves="runs that a few bad batches would throw off",
        costs="a pass over the gradients",
        phase={"step": "clipped"},
        example={"norm": 0.1},
        neutral={"norm": 1e999},
    )
    norm: float = 1.0
    """Largest norm of all gradients together; infinity switches it off."""

    def __post_init__(self) -> None:
        if not self.norm > 0:
            raise UserError(f"norm must be positive, not {self.norm}.", "", "Drop `clip` to switch clipping off.")

    def step(self, step: Step, run: Run) -> Step:
        """Clip, then step."""
        if math.isinf(self.norm):
            return step

        def clipped() -> bool:
            assert run.optimizer is not None
            held = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
            if held or run.elsewhere:
                clip_grads_with_norm_(held, self.norm, run.norm(held))
            return step()

        return clipped
