"""Clipping by the global norm: long gradients are shortened, their direction kept.

    g <- g min(1, c / ||g||),  ||g|| over all trained weights together

Paper: Pascanu et al., "On the difficulty of training recurrent neural networks", arXiv 1211.5063.

Saves: runs that one bad batch would end. Costs: two passes over the gradients. Not for: Lion, whose step does not
depend on the gradient's length (it acts there through the momentum only). A norm that is no number is not clipped
away: the loop stops on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scrimp.errors import UserError
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Step


@dataclass(frozen=True, kw_only=True)
class Clip(Technique):
    """Clip gradients by their global norm."""

    card = Card(
        paper="arXiv:1211.5063",
        section="Optimization",
        saves="runs that one bad batch would end",
        costs="two passes over the gradients",
        phase={"step": "clipped"},
        example={"norm": 0.5},
        neutral={"norm": 0.0},
    )
    norm: float = 1.0
    """c, the longest gradient; 0 for no limit."""

    def __post_init__(self) -> None:
        if self.norm < 0:
            raise UserError(f"norm must be at least 0, not {self.norm}.")

    def step(self, step: Step, run: Run) -> Step:
        """Clip, then update."""
        if not self.norm:
            return step

        def clipped() -> bool:
            assert run.optimizer is not None
            params = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
            if params:
                clip_grads_with_norm_(params, self.norm, get_total_norm([p.grad for p in params]))
            return step()

        return clipped
