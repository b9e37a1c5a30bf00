"""Data pruning: train on the part of the training set that scores choose.

    which: hard      the share `keep` of the items with the highest scores, after `skip` of the very highest
           easy      the share with the lowest
           middle    as many from both ends are left out
           random    drawn by the seed; needs no scores, and is what every score must beat

Scores are made once by `scrimp score RECIPE --by el2n|grand|forgetting|prototypes|perplexity` (their equations are in
scrimp/scoring). With `balance` b each class keeps at least the share b of its part of what is kept: scores prefer some
classes, and a class that is gone cannot be learned.

Papers: Paul et al. (EL2N, GraNd), arXiv 2107.07075; Toneva et al. (forgetting), arXiv 1812.05159; Sorscher et al.
(prototypes; hard items where data are ample, easy ones where they are scarce), arXiv 2206.14486.

Saves: items, hence steps an epoch and what is stored. Costs: scores, which are a model's training and more, once a data
set. Not for: a training set that is used once, where scoring costs more than it saves; keeping a small share of hard
items, which is worse than a random choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.scoring.scores import read
from scrimp.technique import Card, Technique, below_one

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class Prune(Technique):
    """Train on the part of the training set that scores choose."""

    card = Card(
        paper="arXiv:2206.14486",
        section="Importance sampling",
        saves="items, hence steps an epoch",
        costs="scores, which are a short training and more, once a data set",
        phase={"items": "filter"},
        example={"which": "random", "keep": 0.5},
        neutral={"keep": 1.0, "which": "random"},
    )
    scores: str = ""
    """The file that `scrimp score` wrote; not needed for `which: random`."""
    keep: float = 0.7
    """Share of the items that is kept."""
    which: Literal["", "hard", "easy", "middle", "random"] = ""
    """Which items are kept; empty means hard ones, or random ones where there are no scores."""
    skip: float = 0.0
    """Share of the items with the highest scores that is left out first, such as mislabeled ones; only for `hard`."""
    balance: float = 0.0
    """Share of its part of what is kept that each class has at least; 1 keeps classes as frequent as they were."""

    def __post_init__(self) -> None:
        below_one(self, "skip")
        if not 0 < self.keep <= 1 or not 0 <= self.balance <= 1:
            raise UserError(f"keep ({self.keep}) must be above 0 and at most 1, balance ({self.balance}) from 0 to 1.")
        if self.keep + self.skip > 1:
            raise UserError(f"keep {self.keep} and skip {self.skip} are more than all items.", "skip")
        if self.skip and self.kind != "hard":
            raise UserError(f"skip leaves out the hardest, which `{self.kind}` does by itself or not at all.", "skip")
        if self.kind != "random" and not self.scores:
            fix = "Name the file that `scrimp score RECIPE --by el2n` wrote."
            raise UserError(f"`which: {self.which}` needs scores.", "scores", fix)

    @property
    def kind(self) -> str:
        """`which`, chosen where it is left open."""
        return self.which or ("hard" if self.scores else "random")

    def anchored(self) -> Prune:
        """The same with an absolute path, which holds from any working directory."""
        return replace(self, scores=str(Path(self.scores).expanduser().absolute())) if self.scores else self

    def items(self, index: np.ndarray, run: Run) -> np.ndarray:
        """The kept items, in their order."""
        count = max(1, math.ceil(self.keep * len(index) - 1e-9))
        if count == len(index):
            return index
        values = self._values(run)
        if values is None:  # A plan of data that are not built yet knows only how many there are.
            return index[:count]
        ranks = ranked(values[index], self.kind, self.skip)
        labels = _labels(run, index) if self.balance else None
        return index[np.sort(chosen(ranks, count, labels, self.balance))]

    def _values(self, run: Run) -> np.ndarray | None:
        total = len(run.data.train)
        if self.kind == "random":
            return np.random.default_rng(generator(run.seed, "prune").initial_seed()).random(total)
        where = run.where(self, "scores")
        scores = read(Path(self.scores).expanduser(), where)
        said, now = scores.about["data"], _identity(run.data)
        if not now and len(scores.mean) != total:
            return None
        if len(scores.mean) != total or (now and said != now):
            what = f"the scores are of {len(scores.mean):,} items of other data; the training set has {total:,}."
            raise UserError(what, where, "Score these data: scrimp score RECIPE --by ...")
        return scores.mean


def ranked(values: np.ndarray, which: str, skip: float) -> np.ndarray:
    """Places of items, the first to be kept first. Ties are in the order of the items."""
    order = np.argsort(-values, kind="stable")
    if which == "easy":
        return np.argsort(values, kind="stable")
    if which == "middle":
        middle = (len(order) - 1) / 2
        return order[np.argsort(np.abs(np.arange(len(order)) - middle), kind="stable")]
    left = round(skip * len(order))
    return np.concatenate([order[left:], order[:left]])


def chosen(ranks: np.ndarray, count: int, labels: np.ndarray | None, balance: float) -> np.ndarray:
    """The first `count` of the ranked places, after every class has its least share."""
    if labels is None:
        return ranks[:count]
    first = list[np.ndarray]()
    for label in np.unique(labels):
        own = ranks[labels[ranks] == label]
        first.append(own[: math.floor(balance * count * len(own) / len(ranks))])
    floor = np.concatenate(first)
    rest = ranks[~np.isin(ranks, floor)]
    return np.concatenate([floor, rest[: count - len(floor)]])


def _labels(run: Run, index: np.ndarray) -> np.ndarray:
    """Classes of items: int64, [items]."""
    parts = list[np.ndarray]()
    for part in np.array_split(index, max(1, len(index) // 1024)):
        items: dict[str, Any] = run.data.train.read(part)
        if "labels" not in items:
            raise UserError("the data have no classes to balance.", "", "Set `balance: 0`.")
        parts.append(items["labels"])
    return np.concatenate(parts)


def _identity(data: Any) -> Any:
    from scrimp.restore import fingerprint

    return fingerprint(data)
