"""GraNd: the length of an item's gradient early in training.

    score(x) = mean over runs of ||gradient of loss(x) with respect to all trained weights||_2

Paper: Paul et al., "Deep Learning on a Data Diet: Finding Important Examples Early in Training", NeurIPS 2021,
arXiv 2107.07075. At initialization, before any training, the paper's result does not reproduce: Kirsch, "Does 'Deep
Learning on a Data Diet' reproduce? Overall yes, but GraNd at Initialization does not", arXiv 2303.14753. Hence the
score is taken after a short training, as EL2N is.

Norms are averaged over runs, not gradients. One backward pass an item: the dearest of the scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from scrimp.scoring.outputs import one, over_items

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch


def score(run: Run) -> np.ndarray:
    """Of every training item: float64, [items]."""

    def norms(model: nn.Module, batch: Batch) -> Tensor:
        weights = [p for p in model.parameters() if p.requires_grad]
        size = len(next(iter(batch.values())))
        return torch.stack([_norm(run, model, one(batch, place), weights) for place in range(size)])

    return over_items(run, norms)


@torch.enable_grad()
def _norm(run: Run, model: nn.Module, item: Batch, weights: list[nn.Parameter]) -> Tensor:
    loss = run.task.loss(model, item) / run.task.count(item)
    found = [g for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]
    return torch.nn.utils.get_total_norm(found)
