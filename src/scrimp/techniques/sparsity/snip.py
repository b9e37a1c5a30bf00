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

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from scrimp.errors import UserError
from scrimp.sparse.masks import masked_evaluate, masked_export, masked_step, prunable
from scrimp.sparse.once import pruned_once
from scrimp.sparse.patterns import Pattern
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
        whole="masks are of whole weights.",
        undivided="it compares the weights of all blocks to choose which to drop.",
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
        weights = prunable(run, self, self.params)
        fix = "Use bfloat16, a lower autocast.scale, or another initialization."
        return pruned_once(backward, run, self, weights, lambda batch: self._scores(backward, run, batch, weights), fix)

    def _scores(
        self, backward: Backward, run: Run, batch: Batch, weights: dict[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        for scored in scored_batches(run, batch, self.batches, run.where(self, "batches")):
            backward(scored, run.task.count(scored))
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights.values()]
        for p in run.model.parameters():
            p.grad = None
        return dict(zip(weights, snip([w.detach() for w in weights.values()], grads), strict=True))

    def step(self, step: Step, run: Run) -> Step:
        """Mask the weights."""
        return masked_step(step, run, self, prunable(run, self, self.params))

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        """Mask averaged weights."""
        return masked_evaluate(evaluate, run, self, prunable(run, self, self.params))

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Masked."""
        return masked_export(named, run, self)
