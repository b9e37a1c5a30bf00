"""SNIP: prune once, before training, the weights that the loss would miss least.

    s = |w dL/dw| = |dL/dc| at c = 1, of a factor c on the weight;   keep the weights with the largest s

over all layers together, then train them from the values they have. Paper: Lee et al., "SNIP: Single-shot Network
Pruning based on Connection Sensitivity", ICLR 2019, arXiv 1810.02340.

The gradient is averaged over the scoring batches before its magnitude is taken, with dropout off, by the run's own
backward pass: with accumulate the batch is scored in parts. The paper's code prunes biases too; here they stay. Every
layer keeps at least `floor` weights, as a layer that is cut off entirely stops the gradient.

Saves: FLOPs and bytes on hardware with sparse products; no seconds on a CPU or GPU, where masks are stored dense.
Costs: a backward pass for each scoring batch, once. Not for: branches that begin at zero, where every score is 0.
A run that resumes has its masks. Weights that the first batches do not use score 0 and go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from scrimp.errors import UserError
from scrimp.sparse.masks import (
    MASK,
    apply,
    full,
    masked_backward,
    masked_evaluate,
    masked_export,
    masked_step,
    prunable,
    shapes,
    size,
)
from scrimp.sparse.patterns import Pattern, best
from scrimp.sparse.scores import scored_batches, snip
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scrimp.run import Run
    from scrimp.technique import Backward, Batch, Evaluate, Step


@dataclass(frozen=True, kw_only=True)
class SNIP(Technique):
    """Prune at the start by the sensitivity of the loss."""

    card = Card(
        paper="arXiv:1810.02340",
        section="Sparse training",
        claim="98 % of LeNet-300-100 and 99 % of LeNet-5 pruned with little loss (abstract of 1810.02340)",
        saves="FLOPs on sparse hardware; no seconds on a CPU or GPU: masks are stored dense",
        costs="a backward pass for each scoring batch, once",
        sets=("sparsity",),
        phase={"backward": "masked", "step": "masked", "evaluate": "masked", "export": "merged"},
        refuses={
            "frozen weights": "masks are of weights that are trained, and tuning freezes them.",
            "width schedule": "masks have the shapes of their weights, which it changes.",
            "closed branches": "every weight of a branch that begins at zero has a score of 0.",
        },
        example={"density": 0.5},
        neutral={"density": 1.0},
    )
    density: float = 0.2
    """Share of all prunable weights together that remains; not read by a pattern such as 2:4, which is 1/2."""
    batches: int = 1
    """Batches that are scored: the run's first ones."""
    floor: int = 1
    """Weights, or blocks of a pattern, that every layer keeps."""
    pattern: str = "weights"
    """What is pruned together: `weights` one by one, blocks such as `4x4`, or the worst of each group: `2:4`."""
    params: str = "blocks.*"
    """Pattern of the linear layers' weights to prune."""

    def __post_init__(self) -> None:
        at_least(1, self, "batches", "floor")
        Pattern.parse(self.pattern)
        if not 0 < self.density <= 1:
            raise UserError(f"density must be above 0 and at most 1, not {self.density}.")

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Score and prune before the run's first backward pass; mask the gradients."""
        weights, pattern = prunable(run, self, self.params), Pattern.parse(self.pattern)
        full(run, self, weights)
        for name, shape in shapes(weights).items():
            pattern.check(name, shape)
        masked = masked_backward(backward, run, self, weights)
        # By the clock and not by a flag in memory, so that a plan sees one scoring.
        scored = run.clock.step > 0 or (self.density == 1 and not pattern.group)

        def after_scoring(batch: Batch, count: Tensor) -> Tensor:
            nonlocal scored
            if not scored:
                scored = True
                self._prune(backward, run, batch, weights, pattern)
            return masked(batch, count)

        return after_scoring

    def _prune(
        self, backward: Backward, run: Run, batch: Batch, weights: dict[str, nn.Parameter], pattern: Pattern
    ) -> None:
        training = run.model.training
        run.model.eval()
        for scored in scored_batches(run, batch, self.batches, run.where(self, "batches")):
            backward(scored, run.task.count(scored))
        run.model.train(training)
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights.values()]
        scores = dict(zip(weights, snip([w.detach() for w in weights.values()], grads), strict=True))
        total = run.read(torch.stack([s.sum() for s in scores.values()]).sum(), worst=1.0)
        if not math.isfinite(total) or total == 0:
            what = f"the scores of the weights sum to {total}, so that none can be told from another."
            raise UserError(what, run.where(self), "Use bfloat16, a lower autocast.scale, or another initialization.")
        masks = best(scores, round(self.density * size(weights)), pattern, self.floor)
        run.memory(self).update({name + MASK: mask for name, mask in masks.items()})
        for p in run.model.parameters():
            p.grad = None
        apply(run.memory(self), weights)

    def step(self, step: Step, run: Run) -> Step:
        """Mask the weights."""
        return masked_step(step, run, self, prunable(run, self, self.params))

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        """Mask averaged weights."""
        return masked_evaluate(evaluate, run, self, prunable(run, self, self.params))

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Masked."""
        return masked_export(named, run, self)
