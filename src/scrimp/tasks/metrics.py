"""Metrics of predictions over a whole held-out set, from counts and ranks.

    macro F1 = mean over classes of 2 tp / (2 tp + fp + fn)
    Matthews = (c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))

with c right of s predictions, p_k predictions of class k and t_k items of it (Gorodkin, "Comparing two K-category
assignments by a K-category correlation coefficient", 2004). A class that occurs neither among the items nor among the
predictions does not count in the mean of F1.
"""

from __future__ import annotations

import numpy as np


def classified(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """accuracy, macro_f1 and matthews of class numbers, both int64 [items]."""
    classes = int(max(predicted.max(), labels.max())) + 1
    table = np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    return tabled(table)


def tabled(table: np.ndarray) -> dict[str, float]:
    """The same of how many items of each class were taken for each class: int64 [class, predicted class]."""
    right, said, are = np.diag(table), table.sum(0), table.sum(1)
    there = said + are > 0
    f1 = 2 * right[there] / (said + are)[there]
    total, hits = float(table.sum()), float(right.sum())
    spread = (total**2 - float(said @ said)) * (total**2 - float(are @ are))
    matthews = (hits * total - float(said @ are)) / spread**0.5 if spread > 0 else 0.0
    return {"accuracy": hits / total, "macro_f1": float(f1.mean()), "matthews": matthews}


def correlated(predicted: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """pearson and spearman, which is Pearson's of the ranks; 0 where one side is constant."""
    return {"pearson": _pearson(predicted, scores), "spearman": _pearson(ranks(predicted), ranks(scores))}


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 on; equal values share the mean of theirs. Shape [items]."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[place]


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else 0.0
