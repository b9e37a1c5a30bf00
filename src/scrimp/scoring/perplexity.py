"""Perplexity: an item's mean loss under a given model, such as a small one trained on text of good quality.

    score(x) = mean over its targets of - log p(target)

Paper: Wenzek et al., "CCNet: Extracting High Quality Monolingual Datasets from Web Crawl Data", LREC 2020,
arXiv 1911.00359, whose filter keeps text of low perplexity; Marion et al., "When Less is More: Investigating Data
Pruning for Pretraining LLMs at Scale", arXiv 2309.04564, where the middle is best.

The score is the logarithm of the perplexity, which has the same order. Give the model with `--from RUN`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from scrimp.scoring.outputs import counted, logits_and_targets, losses, over_items

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch


def score(run: Run) -> np.ndarray:
    """Of every training item: float64, [items]."""

    def mean(model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = logits_and_targets(run.task, model, batch, "--by perplexity")
        return losses(logits, targets) / counted(targets)

    return over_items(run, mean)
