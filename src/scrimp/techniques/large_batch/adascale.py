"""AdaScale: a large batch's learning rate grows by how much the batch quiets the gradient, and time passes as fast.

    of the gradients of S parts:  v (variance of one),  m (square of the true gradient),  both averaged over steps
    gain   r = (v + m) / (v / S + m)                      in [1, S]
    w <- w - r lr(tau) g,    tau <- tau + r               tau: steps of a run with batches of one part

Where noise rules, r = S: the rate is scaled linearly and one step counts as S of the small run. Where the parts agree,
r = 1: a larger batch brings nothing, and neither rate nor time is scaled. A warm-up emerges by itself, as gradients
agree at first. The average keeps max(1 - S / 1000, 0) of itself a step; the start of both averages at zero cancels.
Paper: Johnson et al., "AdaScale SGD: A User-Friendly Algorithm for Distributed Training", ICML 2020, arXiv 2007.05105.

Saves: the search for a learning rate and a warm-up when the batch grows. Costs: the norm of every part's gradient.
Not for: update rules other than SGD, whose steps do not shrink with the noise as the gain assumes; one part.

The schedule follows tau, not steps. The paper stops at tau = T, the length of the small run; here the run keeps its
`duration` of N steps, and its schedule is complete where tau reaches T = `scale` N. With `scale: 0` T is S N, which tau
never passes: a gain below S then ends the run before its schedule, with the rate not fully decayed. Each line of
metrics.jsonl shows the gain and `progress`; set `scale` to the mean gain of a first run for one that ends with the run.
Beyond T the schedule stays at its end. Of a batch of B samples the small run has B / S.

Where time begins anew in rounds (lottery, early_bird) there is no tau. Steps that are skipped take no time. What is
clipped, is clipped after it was measured. Values below 0 are averaged as 0; there is no other floor, since the gain
does not depend on the scale of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scrimp.groups import other_than_sgd, trainable
from scrimp.splitting import accumulated, compared, own_parts, smooth, split
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch, Step


@dataclass(frozen=True, kw_only=True)
class AdaScale(Technique):
    """Learning rate and time grow by how much a large batch quiets the gradient."""

    card = Card(
        paper="arXiv:2007.05105",
        section="Large batch training",
        claim="batch sizes beyond the limits of linear scaling, without harm on five tasks (abstract)",
        saves="the search for a learning rate and a warm-up when the batch grows",
        costs="the norm of every part's gradient",
        sets=("learning rate scale", "parts of a batch", "schedule's time"),
        refuses={"gradient point": "the gain is that of gradients at the weights themselves, not at a point nearby."},
        micro_batches=True,
        phase={"schedule": "time", "backward": "accumulated", "step": "updated"},
        entire="it compares gradients of samples, of which a rank has some tokens only.",
        held="a gradient that arrives is measured, which is whole then and a part later.",
        example={"parts": 2},
    )
    parts: int = 2
    """S: micro-batches a step, whose gradients are compared; must divide the batch."""
    scale: float = 0.0
    """Steps of the small run that its schedule lasts, for each step of this run; 0 stands for `parts`."""

    def __post_init__(self) -> None:
        at_least(2, self, "parts")
        at_least(0, self, "scale")

    def schedule(self, factor: Callable[[float], float], run: Run) -> Callable[[float], float]:
        """The factor at tau instead of the clock's progress."""
        memory = self._memory(run)
        return lambda p: factor(self._progress(run, run.read(memory["time"], worst=0.0)))

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Over every part, comparing their gradients."""
        own = own_parts(self.parts, run, run.where(self, "parts"))
        memory, weights = self._memory(run), list(trainable(run.model).values())
        keep, last = max(1 - self.parts / 1000, 0.0), [-1]

        def measured(batch: Batch, count: Tensor) -> Tensor:
            pieces = split(batch, own)
            # Once a step, whoever asks for the gradient twice; a batch may have lost samples on its way.
            if last[0] == run.clock.step or len(pieces) < own:
                return accumulated(backward, pieces, count, run)
            last[0] = run.clock.step
            loss, variance, true = compared(backward, pieces, count, weights, run)
            memory["variance"] = smooth(memory["variance"], variance.clamp(min=0), keep)
            memory["square"] = smooth(memory["square"], true.clamp(min=0), keep)
            memory["gain"] = gain(memory["variance"], memory["square"], self.parts)
            return loss

        return measured

    def step(self, step: Step, run: Run) -> Step:
        """Step at r times the learning rate, and let r pass."""
        memory = self._memory(run)
        assert run.optimizer is not None
        if others := other_than_sgd(run.optimizer):
            run.remarks.append(
                f"adascale's gain is derived for SGD; under {others} the rate it sets has no such ground."
            )

        def scaled() -> bool:
            assert run.optimizer is not None
            r, groups = run.read(memory["gain"], worst=1.0), run.optimizer.param_groups
            before = [group["lr"] for group in groups]
            for group in groups:
                group["lr"] = group["lr"] * r
            updated = step()
            for group, lr in zip(groups, before, strict=True):
                group["lr"] = lr
            if updated:
                memory["time"] = memory["time"] + r
            time = run.read(memory["time"], worst=0.0)
            run.log(self, gain=r, time=time, progress=self._progress(run, time))
            return updated

        return scaled

    def _progress(self, run: Run, time: float) -> float:
        """How much of the schedule has passed: whole steps of the small run."""
        clock = run.clock
        length = (self.scale or self.parts) * clock.end / clock.per_step[clock.unit]
        return min(1.0, math.floor(time) / length) if length else 1.0

    def _memory(self, run: Run) -> dict[str, Tensor]:
        """Averages, the last gain and tau."""
        memory = run.memory(self)
        for name, value in (("variance", 0.0), ("square", 0.0), ("gain", 1.0), ("time", 0.0)):
            if name not in memory:
                memory[name] = torch.full((), value, dtype=torch.float64, device=run.device)
        return memory


def gain(variance: Tensor, square: Tensor, parts: int) -> Tensor:
    """(v + m) / (v / S + m); 1 where there is no gradient at all."""
    whole = variance + square
    return torch.where(whole > 0, whole / (variance / parts + square), torch.ones_like(whole))
