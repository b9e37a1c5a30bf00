"""EL2N: the length of an item's error vector early in training.

    score(x) = mean over runs of ||softmax(f(x)) - onehot(y)||_2        of a sequence: mean over its targets

It is also the length of the gradient of the loss with respect to the logits, which bounds that of the weights' gradient
(`importance` samples by it). Paper: Paul et al., "Deep Learning on a Data Diet: Finding Important Examples Early in
Training", NeurIPS 2021, arXiv 2107.07075.

Score after a short training, about a tenth of the whole: late in training all scores are near 0. One run is noisy; the
paper averages ten, which together cost about one full training. Mislabeled items are hard too: leave out the very
hardest with `prune.skip`. Labels must be hard, and items are scored without augmentation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from scrimp.scoring.outputs import counted, logits_and_targets, over_items, squared_errors

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch


def score(run: Run) -> np.ndarray:
    """Of every training item: float64, [items]."""

    def errors(model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = logits_and_targets(run.task, model, batch, "--by el2n")
        return squared_errors(logits, targets).sqrt().sum(1) / counted(targets)

    return over_items(run, errors)
