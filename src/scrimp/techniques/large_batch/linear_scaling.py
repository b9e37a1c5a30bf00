"""Scale the learning rate with the batch, and ramp it up from the unscaled one.

    k = (B / base)^p,    p = 1 (rule: linear) or 1/2 (rule: sqrt)
    factor(t) <- factor(t) (1 + (k - 1) min(1, t / warmup))          k > 1
    factor(t) <- factor(t) k                                         k <= 1

B is the recipe's `batch` in samples; `base` is the batch for which the update rule's `lr` was chosen. The ramp is that
of the paper: it begins at the rate of the small batch, not at 0, and multiplies whatever schedule there is, its own
warm-up too. Paper: Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", arXiv 1706.02677.

Why: k steps of SGD on small batches, at rates lr, end within O(lr^2) of one step on all of them at k lr, as long as
the gradient changes little in between. The ramp is for the first steps, where it changes a lot.

Saves: the search for a learning rate when the batch grows. Costs: nothing. Not for: batches beyond the gradient noise
scale (noise_scale measures it), where no rate makes up for the lost steps; nor rules with trust ratios, which scale
their update by themselves. For Adam and its kin, take `rule: sqrt`.

Weight decay is not scaled. Rules multiply the decay by the learning rate, so each step decays k times as much; with k
times fewer steps an epoch, the decay of an epoch is what it was. With the square root it is less: raise the decay by
hand if it matters. The paper's correction of the momentum is not needed: the learning rate of `sgd` multiplies the
velocity and is no part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scrimp.clock import Duration
from scrimp.groups import other_than_sgd
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class LinearScaling(Technique):
    """Scale the learning rate with the batch, and ramp it up from the unscaled one."""

    card = Card(
        paper="arXiv:1706.02677",
        section="Large batch training",
        saves="the search for a learning rate when the batch grows",
        costs="nothing",
        sets=("learning rate scale",),
        phase={"schedule": "warm-up"},
        example={"base": 2, "warmup": 0.25},
    )
    base: int = 256
    """Batch, in samples, that the learning rate was chosen for."""
    rule: Literal["linear", "sqrt"] = "linear"
    """linear for SGD, sqrt for Adam and its kin."""
    warmup: str | float = 0.05
    """Duration of the ramp from the unscaled to the scaled rate; 0 starts scaled."""

    def __post_init__(self) -> None:
        at_least(1, self, "base")
        Duration.parse(self.warmup, "warmup")

    def schedule(self, factor: Callable[[float], float], run: Run) -> Callable[[float], float]:
        """progress before the step -> factor."""
        k = (run.recipe.batch / self.base) ** (1.0 if self.rule == "linear" else 0.5)
        assert run.optimizer is not None
        if self.rule == "linear" and k != 1 and (others := other_than_sgd(run.optimizer)):
            run.remarks.append(
                f"linear_scaling scales the rate by {k:.3g}, as is derived for SGD; for {others} try `rule: sqrt`."
            )
        w = run.clock.share(self.warmup, "warm-up", run.where(self, "warmup"))
        if k <= 1 or w == 0:
            return lambda p: factor(p) * k
        return lambda p: factor(p) * (1 + (k - 1) * min(1.0, p / w))
