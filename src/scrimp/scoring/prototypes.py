"""Prototypes: the distance of an item from the nearest cluster center of embeddings.

    e(x) = mean of the model's last states, of unit length;  centers by k-means of all e(x), of unit length too
    score(x) = 1 - max over centers of e(x) . center

Paper: Sorscher et al., "Beyond neural scaling laws: beating power law scaling via data pruning", NeurIPS 2022,
arXiv 2206.14486, whose embeddings are learned without labels. Use a model of `masked-image`, `contrastive`, `masked-lm`
or `causal-lm` (`--from RUN`) to keep that promise; of a model that was trained on labels, the score is no longer
self-supervised.

Keep hard items where data are ample and easy ones where they are scarce; the paper keeps classes in balance
(`prune.balance`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from scrimp.draws import generator
from scrimp.scoring.outputs import items, mean_states

if TYPE_CHECKING:
    from scrimp.run import Run


def score(run: Run, clusters: int = 0) -> np.ndarray:
    """Of every training item: float64, [items].

    Args:
        clusters: how many centers; 0 takes as many as there are classes, or the root of the number of items.
    """
    assert run.evaluate is not None
    found = run.evaluate(lambda model: torch.cat([_embedded(run, model, batch) for batch in items(run)]))
    classes = getattr(run.data, "sizes", {}).get("classes", 0)
    count = clusters or (classes if classes > 1 else max(2, round(len(found) ** 0.5)))
    points = nn.functional.normalize(found.double().cpu(), dim=1)
    centers = nn.functional.normalize(k_means(points, min(count, len(points)), run.seed), dim=1)
    return (1 - (points @ centers.T).amax(1)).numpy()


def _embedded(run: Run, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return mean_states(model, lambda: run.task.loss(model, batch), "--by prototypes")


def k_means(points: Tensor, count: int, seed: int, rounds: int = 50) -> Tensor:
    """Centers of clusters by Lloyd's algorithm, begun as k-means++ does. Shapes: [n, C] -> [count, C].

    Args:
        rounds: at most so many; it stops when no point changes its cluster.
    """
    chance = generator(seed, "k-means")
    centers = points[torch.randint(len(points), (1,), generator=chance)]
    while len(centers) < count:
        far = torch.cdist(points, centers).amin(1).square()
        # All points may lie on centers already: then any of them is as good.
        place = torch.multinomial(far if far.sum() > 0 else torch.ones_like(far), 1, generator=chance)
        centers = torch.cat([centers, points[place]])
    nearest = torch.full((len(points),), -1)
    for _ in range(rounds):
        now = torch.cdist(points, centers).argmin(1)
        if torch.equal(now, nearest):
            break
        nearest = now
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        centers = torch.where(sizes > 0, sums / sizes.clamp(min=1), centers)
    return centers
