# pyright: reportPrivateImportUsage=false
"""An exponential moving average of the weights, used wherever the model is measured.

    a <- d a + (1 - d) w        after every update, with d = min(decay, (1 + t) / (10 + t))

t counts updates, this one included. Paper: Polyak and Juditsky, "Acceleration of Stochastic Approximation by
Averaging", SIAM J. Control Optim. 30(4), 1992; the short memory of the first steps is that of common implementations.

Saves: noise of the last steps, and part of the decay of the learning rate. Costs: a copy of the trained weights and
a pass over them each step. Not for: runs so short that the average still holds the start.
Training itself is untouched; validation, generation and export use the average. Weights of 16 bits are averaged in
float32, since a step of 1 - d is below their resolution. Buffers and frozen weights are not averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.groups import trainable
from scrimp.sharding import follow, whole
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scrimp.run import Run
    from scrimp.technique import Evaluate, Step

COUNT: Final = "#updates"
"""Name of the counter in memory; no parameter can be called so."""


@dataclass(frozen=True, kw_only=True)
class EMA(Technique):
    """Exponential moving average of the weights."""

    card = Card(
        paper="Polyak and Juditsky, SIAM J. Control Optim. 30(4), 1992",
        section="Optimization",
        saves="noise of the last steps",
        costs="a copy of the trained weights",
        sets=("averaged weights",),
        phase={"step": "averaged", "evaluate": "averaged", "export": "averaged"},
        example={"decay": 0.9},
        neutral={"decay": 0.0},
    )
    decay: float = 0.999
    """d; the average looks back about 1 / (1 - d) steps."""
    warmup: bool = True
    """Look back less in the first steps, so that the start is soon forgotten."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"decay must be in [0, 1), not {self.decay}.")

    def step(self, step: Step, run: Run) -> Step:
        """Average after an update."""
        memory, weights = run.memory(self), trainable(run.model)
        for name, p in weights.items():
            memory[name] = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        memory[COUNT] = torch.zeros((), dtype=torch.float64)

        def averaged() -> bool:
            if not step():
                return False
            memory[COUNT] += 1
            t = run.read(memory[COUNT], worst=1e9)
            _average(memory, weights, min(self.decay, (1 + t) / (10 + t)) if self.warmup else self.decay)
            return True

        return averaged

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        """Put the average in the weights' place, and afterwards exactly the same bits back."""

        def averaged(job: Callable[[nn.Module], Any]) -> Any:
            memory, weights = run.memory(self), trainable(run.model)
            kept = {name: p.data for name, p in weights.items()}
            try:
                for name, p in weights.items():
                    p.data = memory[name].to(p.dtype)
                return evaluate(job)
            finally:
                for name, p in weights.items():
                    p.data = kept[name]

        return averaged

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """The average instead of the last weights."""
        memory, weights = run.memory(self), trainable(run.model)
        return {name: whole(follow(memory[name], weights[name])).to(tensor.dtype) if name in weights else tensor
                for name, tensor in named.items()}  # fmt: skip


@torch.no_grad()
def _average(memory: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter], decay: float) -> None:
    alike = [name for name, p in weights.items() if memory[name].dtype == p.dtype]
    if alike:
        torch._foreach_lerp_([memory[n] for n in alike], [weights[n].detach() for n in alike], 1 - decay)
    for name in weights.keys() - set(alike):
        memory[name].lerp_(weights[name].detach().to(memory[name].dtype), 1 - decay)
