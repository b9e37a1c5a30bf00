"""Attention to the keys that a small trained detector picks, as many for each query.

    q' = q P A,  k' = k P B        P fixed, [D, r], of 0 and +-sqrt(3 / r);  A and B [r, r] of each head, trained
    S' = q' k'^T / sqrt(D)         an estimate of S = q k^T / sqrt(D)
    kept:   the highest S' of each row: a share `keep` of the keys, or all that the query sees where these are fewer
    loss + weight * sum over layers of mean (S - S')^2

The two train together. The detector's loss moves the detector only: q, k and S are constants to it, and the mask is
one to the task's loss. A and B begin as the identity, with which S' is right on average over P. With `bits`, q P, k P,
A, B, q' and k' are numbers of so few bits, with a scale for each token, and of A and B for each column, so that sums of
products are whole numbers; gradients pass through.

Rows of equal length are balanced work for hardware, which takes a few queries at a time and fetches each key once.

Paper: Qu et al., "DOTA: Detect and Omit Weak Attentions for Scalable Transformer Acceleration", ASPLOS 2022, doi
10.1145/3503222.3507738. Here and not there: its detector reads the layer's input in place of q and k, this one what the
core gets, so that caches, prefixes, rotary positions and other sequences need nothing of their own; and exact scores
are in the run's own type, not in fixed point of 16 bits. A trace has the detector's width and bits (`rank`, `bits`).

Saves: on such hardware, scores of weak keys. Costs: here all of it is computed in full, S and S' once more for the
loss, and a mask of all pairs is kept for the backward pass. Not for: training time on any CPU or GPU; frozen models,
since the detector must be trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.cores import SparseCore, best, choosing, share_of, sparse_cores, wide, with_due, without
from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.technique import Card, Technique, at_least
from scrimp.techniques.attention.sanger import coded

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Loss


@dataclass(frozen=True, kw_only=True)
class Dota(Technique):
    """Attention to keys that a small trained detector picks."""

    card = Card(
        paper="doi:10.1145/3503222.3507738",
        section="Hardware/algorithm co-design",
        claim="152.6x the speed of attention of a GPU, 4.5x that of other accelerators (abstract, ASPLOS 2022)",
        saves="on its hardware, scores of weak keys",
        costs="here, a mask of all pairs, the work of choosing, and a loss for it",
        sets=("attention core",),
        scope="targets",
        needs=("core",),
        refuses={
            "frozen weights": "Its detectors train with the weights.",
            "width schedule": "Its detectors are those of one head each, and heads come and go.",
        },
        phase={"model": "seams", "loss": "auxiliary", "export": "folded"},
        emulated=("cpu", "cuda"),
        alone="what its detector learns from is one rank's samples.",
        example={"keep": 0.25},
        neutral={"keep": 1.0},
    )
    targets: str = "attention|cross"
    """Pattern of the attentions whose core is replaced."""
    keep: float = 0.1
    """Share of the keys that each query attends to, rounded up; 1 keeps all, without a detector."""
    rank: float = 0.25
    """Width of the detector, as a share of a head's."""
    bits: int = 4
    """Of the detector's numbers; 0 leaves them as they are."""
    weight: float = 1.0
    """Factor of the detector's error in the loss."""
    when: Literal["evaluation", "always"] = "always"
    """Whether training chooses as well. The detector trains in any case."""

    def __post_init__(self) -> None:
        for name in ("keep", "rank"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} must be above 0 and at most 1, not {getattr(self, name)}.")
        at_least(0, self, "bits", "weight")
        if self.bits == 1:
            raise UserError("one bit has no room for a sign.", "bits", "Give at least 2, or 0.")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Replace the cores."""

        def make(path: str, attention: Any) -> SparseCore:
            if self.keep == 1:
                return SparseCore(self.name)
            like = attention.proj.weight.new_empty(attention.heads, attention.width)
            detector = Detector(self, like, run.seed)
            told = {"rank": detector.projection.shape[1], "bits": self.bits}
            return SparseCore(self.name, detector, self.when, watch=detector.error, details=lambda mask: dict(told))

        choosing(self, model, run, make)
        return model

    def loss(self, loss: Loss, run: Run) -> Loss:
        """The detectors' errors."""
        if self.keep == 1:
            return loss
        return with_due(loss, sparse_cores(run.model, self.name), self.weight, run)

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Without detectors."""
        return without(named, run.model, self.name)


class Detector(nn.Module):
    """(q, k, seen) -> as many pairs a row. Shapes: q [B, H, T, D], k [B, H, S, D].

    Attributes:
        projection: P, the same in all layers.
        queries, keys: A and B of each head, [H, r, r].
    """

    projection: Tensor

    def __init__(self, how: Dota, like: Tensor, seed: int) -> None:
        super().__init__()
        self.how, self.seed = how, seed
        heads, width = like.shape
        rank = max(1, round(how.rank * width))
        self.queries = nn.Parameter(like.new_empty(heads, rank, rank))
        self.keys = nn.Parameter(like.new_empty(heads, rank, rank))
        self.register_buffer("projection", like.new_empty(width, rank), persistent=False)

    def refill(self) -> None:
        """P, drawn."""
        if not isinstance(self.projection, FakeTensor):
            width, rank = self.projection.shape
            self.projection.copy_(ternary(width, rank, generator(self.seed, "dota")))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The identity."""
        value.copy_(torch.eye(value.shape[-1]).expand_as(value))

    def estimate(self, q: Tensor, k: Tensor) -> Tensor:
        """S', [B, H, T, S]."""
        projection, few = self.projection.to(q.dtype), self.how.bits
        a, b = (
            rounded(rounded(x @ projection, few) @ rounded(w.to(x.dtype).mT, few).mT, few)
            for x, w in ((q, self.queries), (k, self.keys))
        )
        return (a @ b.transpose(-1, -2)) * q.shape[-1] ** -0.5

    def error(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        """The mean squared error of S' over the pairs seen."""
        exact = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        apart = (wide(self.estimate(q, k)) - wide(exact)).masked_fill(~seen, 0.0)
        return apart.square().sum() / seen.expand_as(apart).sum()

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        return best(self.estimate(q, k), seen, *share_of(seen, self.how.keep))


def rounded(x: Tensor, bits: int) -> Tensor:
    """Numbers of so many bits with a scale a row; gradients pass as if nothing had happened."""
    if not bits:
        return x
    whole, step = coded(x.detach(), bits, rows=True)
    return x + (whole * step - x.detach())


def ternary(width: int, rank: int, chance: torch.Generator) -> Tensor:
    """A projection [D, r] of 0 with probability 2/3 and +-sqrt(3 / r), which keeps products on average."""
    drawn = torch.empty(width, rank, device="cpu").uniform_(generator=chance)
    return ((drawn < 1 / 6).float() - (drawn >= 5 / 6).float()) * math.sqrt(3 / rank)
