"""Importance sampling: of more candidates than a batch has, train on those with large gradients, weighted to be fair.

    candidates: pool x batch items;  G_i = ||softmax(f(x_i)) - onehot(y_i)||_2     a forward pass without gradients
    g_i = G_i / sum G;  the batch: items drawn with chances g_i, with replacement
    loss = sum over drawn i of w_i loss_i,   w_i = 1 / (B g_i) of B candidates     unbiased: E = mean over candidates

G bounds the length of the gradient by that of the logits; of a sequence it is the root of the sum of squares over its
targets. Sampling begins when it pays: tau = sqrt(B sum g^2), averaged over steps, says how many times larger a uniform
batch had to be for as little variance, and must exceed (B + 3 b) / (3 b), the price of the forward passes of B
candidates for a batch of b, a backward pass counting twice a forward. Before that, the batch is a uniform draw.

Paper: Katharopoulos and Fleuret, "Not All Samples Are Created Equal: Deep Learning with Importance Sampling", ICML
2018, arXiv 1803.00942.

Saves: variance of the gradient, hence steps, where few items have most of the gradient. Costs: a forward pass over
all candidates each step, and logits in memory (fused_loss has no effect). Not for: short runs and small sets, where
losses are alike; tasks without classes. Epochs pass `pool` times as fast, as candidates count as seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.draws import generator
from scrimp.scoring.outputs import check_classes, logits_and_targets, losses, squared_errors
from scrimp.technique import Card, Technique, at_least, below_one

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch, Loss


@dataclass(frozen=True, kw_only=True)
class Importance(Technique):
    """Of more candidates than a batch has, train on those with large gradients, weighted to be fair."""

    card = Card(
        paper="arXiv:1803.00942",
        section="Importance sampling",
        saves="variance of the gradient",
        costs="a forward pass over all candidates each step",
        sets=("chosen items",),
        refuses={
            "gradient point": "both passes of a step must see the same items, and this draws them by the weights.",
        },
        micro_batches=True,
        phase={"batch": "augment", "loss": "items", "backward": "micro-batch"},
        alone="samples are chosen among all of a batch, of which each rank has a part.",
        undivided="it asks the whole model for losses before it chooses samples.",
        example={"pool": 2, "threshold": 1.0},
        neutral={"pool": 1},
    )
    pool: int = 3
    """Candidates for each item of a batch."""
    threshold: float = 0.0
    """tau above which sampling pays; 0 takes (B + 3 b) / (3 b), 2 for a pool of 3."""
    smoothing: float = 0.9
    """Share of the old value in the average of tau."""

    def __post_init__(self) -> None:
        at_least(1, self, "pool")
        at_least(0, self, "threshold")
        below_one(self, "smoothing")

    def batch(self, batch: Callable[[int], Batch], run: Run) -> Callable[[int], Batch]:
        """`pool` batches as one."""
        if self.pool == 1:
            return batch
        return lambda step: joined([batch(step * self.pool + n) for n in range(self.pool)])

    def loss(self, loss: Loss, run: Run) -> Loss:
        """Each item's loss times its weight, where a batch has weights."""
        smoothing = getattr(run.task, "label_smoothing", 0.0)

        def weighted(model: nn.Module, batch: Batch) -> Tensor:
            if "weights" not in batch:
                return loss(model, batch)
            plain = {name: value for name, value in batch.items() if name != "weights"}
            logits, targets = logits_and_targets(run.task, model, plain, run.where(self))
            return (losses(logits, targets, smoothing) * batch["weights"].to(logits.dtype)).sum()

        return weighted

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Choose, then go back through what was chosen."""
        if self.pool == 1:
            return backward
        check_classes(run.task, run.where(self))
        memory = run.memory(self)
        memory["tau"] = torch.ones((), dtype=torch.float64)

        def chosen(batch: Batch, count: Tensor) -> Tensor:
            size = len(next(iter(batch.values())))
            take = max(1, size // self.pool)
            chances = self._chances(run, batch)
            tau = (size * chances.square().sum()).sqrt().cpu()
            memory["tau"].mul_(self.smoothing).add_(tau, alpha=1 - self.smoothing)
            sampling = run.read(memory["tau"], worst=1e9) > (self.threshold or (size + 3 * take) / (3 * take))
            run.log(self, tau=run.read(memory["tau"], worst=1.0), sampling=float(sampling))
            places = _drawn(chances, take, run, batch) if sampling else torch.arange(take, device=chances.device)
            part = {name: value[places] for name, value in batch.items()}
            if sampling:
                part["weights"] = 1 / (size * chances[places])
            return backward(part, count * take / size)

        return chosen

    @torch.no_grad()
    def _chances(self, run: Run, batch: Batch) -> Tensor:
        """g of each candidate: float64, [B]."""
        training = run.model.training
        run.model.eval()
        try:
            logits, targets = logits_and_targets(run.task, run.model, batch, run.where(self))
            lengths = squared_errors(logits, targets).double().sum(1).sqrt()
        finally:
            run.model.train(training)
        # What is learned perfectly could else never be drawn, and would have no finite weight.
        lengths = lengths + 1e-9 + 1e-6 * lengths.mean()
        return lengths / lengths.sum()


def _drawn(chances: Tensor, take: int, run: Run, batch: Batch) -> Tensor:
    """Places of candidates, drawn with replacement: int64, [take]. A function of the seed, the samples and chances."""
    first = batch["sample"][0]
    if isinstance(chances, FakeTensor):
        return torch.arange(take, device=chances.device)
    chance = generator(run.seed, f"importance/{int(first)}")
    return torch.multinomial(chances.cpu(), take, replacement=True, generator=chance).to(chances.device)


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches behind each other, all as wide as the widest."""
    return {name: torch.cat([_widened(b[name], batches, name) for b in batches]) for name in batches[0]}


def _widened(value: Tensor, batches: Sequence[Batch], name: str) -> Tensor:
    if value.ndim != 2:
        return value
    width = max(batch[name].shape[1] for batch in batches)
    filler: Any = -100 if name == "targets" else 0
    return F.pad(value, (0, width - value.shape[1]), value=filler)
