"""Attention to the keys that a greedy search over the largest products finds, and of these to those that weigh enough.

    search     of all products q_j k_ij, M times: the largest that is left, and the smallest that is left
               positive ones of the first are added to the score of key i, negative ones of the second too;
               the second is left out while the sum of all scores is negative
    kept       keys whose score is above 0, the best of a row where there is none, and of these
               q k_i / sqrt(D) >= largest of them + ln(weight):   at least this share of the largest weight

The hardware has each column of the keys sorted and a pointer to its largest and its smallest product, and takes the
best of D pointers a cycle. What it has taken after M cycles are the M largest and the M smallest of all products, so
that here they are selected at once; only the rule that leaves out a smallest one goes step by step. With as many steps
as there are products, a score is the exact product, as long as no negative one is left out. `search: all` is the exact
base design, whose only approximation is `weight`.

Paper: Ham et al., "A3: Accelerating Attention Mechanisms in Neural Networks with Approximation", HPCA 2020, arXiv
2002.10941. `bits` are its fixed-point numbers: so many after the point, and 4 with the sign before it; gradients pass.
Here and not there: the best key stands in where no score is above 0; products with keys that a query does not see count
as 0; M is a share of the keys of the sample, not of those that a causal query sees; exponentials are exact, where the
hardware looks them up in two tables. A trace has how many candidates each query had (`candidates`).

Saves: on such hardware, products of keys that do not matter. Costs: here all of it is computed in full, T S D products
at a time, and a mask of all pairs is kept for the backward pass. Not for: training time on any CPU or GPU; long
sequences, as the search takes memory; models whose weights are spread over many keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from scrimp.cores import SparseCore, best, choosing, share_of
from scrimp.technique import Card, Technique, at_least, below_one

if TYPE_CHECKING:
    from scrimp.run import Run

PRODUCTS: Final = 1 << 24
"""Products that exist at once, at most."""
WHOLE: Final = 8.0
"""Fixed-point numbers are less: 3 bits and a sign before the point."""


@dataclass(frozen=True, kw_only=True)
class A3(Technique):
    """Attention to keys that a greedy search finds."""

    card = Card(
        paper="arXiv:2002.10941",
        section="Hardware/algorithm co-design",
        saves="on its hardware, products of keys that do not matter",
        costs="here, a mask of all pairs and the work of searching",
        sets=("attention core",),
        scope="targets",
        needs=("core",),
        phase={"model": "seams"},
        emulated=("cpu", "cuda"),
        example={"bits": 6},
        neutral={"search": "all", "weight": 0.0, "bits": 0},
    )
    targets: str = "attention|cross"
    """Pattern of the attentions whose core is replaced."""
    search: Literal["greedy", "all"] = "greedy"
    """Whether candidates are searched, or all keys are."""
    steps: float = 0.5
    """Steps of the search, as a share of the keys, rounded up."""
    weight: float = 0.05
    """Share of the largest weight below which a candidate is dropped; 0 drops none."""
    bits: int = 0
    """Bits after the point of fixed-point queries, keys and values; 0 leaves them as they are."""
    when: Literal["evaluation", "always"] = "always"
    """Whether training chooses as well."""

    def __post_init__(self) -> None:
        below_one(self, "weight")
        at_least(0, self, "steps", "bits")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Replace the cores."""

        def make(path: str, attention: Any) -> SparseCore:
            before = FixedPoint(self.bits) if self.bits else None
            if self.search == "all" and not self.weight:
                return SparseCore(self.name, None, self.when, before)
            select = Searched(self)
            return SparseCore(self.name, select, self.when, before, details=select.told)

        choosing(self, model, run, make)
        return model


class FixedPoint(nn.Module):
    """(q, k, v) -> the same in fixed point. Gradients pass as if nothing had happened."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, *three: Tensor) -> tuple[Tensor, ...]:
        return tuple(x + (fixed(x.detach(), self.bits) - x.detach()) for x in three)


def fixed(x: Tensor, bits: int) -> Tensor:
    """The nearest number with so many bits after the point, cut off where it is too large."""
    step = 2.0**-bits
    return (x / step).round().mul(step).clamp(-WHOLE, WHOLE - step)


class Searched(nn.Module):
    """(q, k, seen) -> the pairs that are found and weigh enough. Shapes: q [B, H, T, D], k [B, H, S, D].

    Attributes:
        candidates: keys whose exact score each query of the last call needed, [B, H, T].
    """

    def __init__(self, how: A3) -> None:
        super().__init__()
        self.how = how
        self.candidates: Tensor | None = None

    def told(self, mask: Tensor) -> dict[str, Any]:
        """What a trace says beside its mask."""
        return {"candidates": self.candidates}

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        exact = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        found = seen.expand_as(exact)
        if self.how.search == "greedy":
            scores = greedy(q, k, seen, *share_of(seen, self.how.steps))
            found = ((scores > 0) & seen) | best(scores, seen)
        self.candidates = found.sum(-1)
        if not self.how.weight:
            return found
        top = exact.masked_fill(~found, float("-inf")).amax(-1, keepdim=True)
        return found & (exact >= top + math.log(self.how.weight))


def greedy(q: Tensor, k: Tensor, seen: Tensor, steps: int, each: Tensor) -> Tensor:
    """Scores [B, H, T, S] of a search, some queries at a time; steps as in `searched`."""
    rows = max(1, PRODUCTS // (q.shape[0] * q.shape[1] * k.shape[2] * k.shape[3]))
    allowed = seen if seen.shape[2] > 1 else seen.expand(-1, -1, q.shape[2], -1)
    parts = [
        searched(some, k, mask, steps, each)
        for some, mask in zip(q.split(rows, 2), allowed.split(rows, 2), strict=True)
    ]
    return torch.cat(parts, 2)


def searched(q: Tensor, k: Tensor, seen: Tensor, steps: int, each: Tensor) -> Tensor:
    """Scores [B, H, T, S].

    Args:
        steps: the most of any sample; `each` has those of each, [B or 1, 1, 1].
    """
    products = (q[:, :, :, None] * k[:, :, None]).masked_fill(~seen[..., None], 0.0).flatten(3)  # [B, H, T, S * D]
    steps, width = min(steps, products.shape[-1]), q.shape[-1]
    high, where_high = products.topk(steps, -1)
    low, where_low = products.topk(steps, -1, largest=False)
    del products
    count = torch.arange(steps, device=q.device)
    high, low = high.clamp(min=0).where(count < each[..., None], 0.0), low.clamp(max=0)
    low = low.where(count < taken(high, low, each)[..., None], 0.0)
    scores = q.new_zeros(*q.shape[:3], k.shape[2])
    scores.scatter_add_(-1, where_high // width, high)
    return scores.scatter_add_(-1, where_low // width, low)


def taken(high: Tensor, low: Tensor, each: Tensor) -> Tensor:
    """How many of the smallest products a search takes, [..]: high and low [.., M], what each step would add."""
    total, count = torch.zeros_like(high[..., 0]), torch.zeros_like(high[..., 0], dtype=torch.int64)
    for step in range(high.shape[-1]):
        total = total + high[..., step]
        takes = (total >= 0) & (step < each)
        total = total + low.gather(-1, count[..., None])[..., 0] * takes
        count = count + takes
    return count
