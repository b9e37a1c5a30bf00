"""Attention to the keys to which scores of a few bits, before the real ones, give some weight.

    q' = round(q s),  s = (2^(bits-1) - 1) / max |q|, and k' alike      the most a number of these bits holds
    kept:   softmax(q' k'^T / (s_q s_k sqrt(D))) > threshold            the best of a row, where there is none

A scale is that of one row, so that neither other samples nor later tokens change what a token keeps. With
`scale: tensor` it is as in the released code: rows are first divided by their norms, all of a tensor then share a
scale, and the scores are multiplied by the norms again. The mask is a constant to the gradient: train with it, or
begin a run from one that was trained without (`--from`), which is the paper's fine-tuning.

Hardware gets the mask in pieces: rows are cut into sub-rows of 64 keys, empty ones are dropped, and one of more than 16
keys is split. A trace holds how many pieces each sub-row becomes (`pieces`), from which follows how full they are.

Paper: Lu et al., "Sanger: A Co-Design Framework for Enabling Sparse Attention using Reconfigurable Architecture", MICRO
2021, doi 10.1145/3466752.3480125. Here and not there: the best key stands in where none is above the threshold, and
pairs that are left out have a weight of exactly 0, not one of exp(-10000).

Saves: on such hardware, the exact scores of the other keys; products of 4 bits are a sixteenth of those of 16. Costs:
here all of it is computed in full, and a mask of all pairs is kept for the backward pass. Not for: training time on any
CPU or GPU; very long rows, whose weights are all below a fixed threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.cores import SparseCore, best, choosing, wide
from scrimp.errors import UserError
from scrimp.technique import Card, Technique, below_one

if TYPE_CHECKING:
    from scrimp.run import Run

SUBROW: Final = 64
"""Keys of a sub-row."""
PIECE: Final = 16
"""Kept keys of a sub-row that the hardware takes at a time."""


@dataclass(frozen=True, kw_only=True)
class Sanger(Technique):
    """Attention to keys that scores of a few bits give some weight."""

    card = Card(
        paper="doi:10.1145/3466752.3480125",
        section="Hardware/algorithm co-design",
        saves="on its hardware, the exact scores of unlikely keys",
        costs="here, a mask of all pairs and the work of choosing",
        sets=("attention core",),
        scope="targets",
        needs=("core",),
        phase={"model": "seams"},
        emulated=("cpu", "cuda"),
        example={"threshold": 0.08},
        neutral={"threshold": 0.0},
    )
    targets: str = "attention|cross"
    """Pattern of the attentions whose core is replaced."""
    threshold: float = 0.002
    """Weight above which a key is kept; 0 keeps all."""
    bits: int = 4
    """Of the numbers of the first scores."""
    scale: Literal["row", "tensor"] = "row"
    """What shares a scale."""
    when: Literal["evaluation", "always"] = "always"
    """Whether training chooses as well."""

    def __post_init__(self) -> None:
        below_one(self, "threshold")
        if not 2 <= self.bits <= 16:
            raise UserError(f"bits must be from 2 to 16, not {self.bits}.")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Replace the cores."""

        def make(path: str, attention: Any) -> SparseCore:
            select = Predicted(self) if self.threshold else None
            return SparseCore(self.name, select, self.when, details=lambda mask: {"pieces": pieces(mask)})

        choosing(self, model, run, make)
        return model


class Predicted(nn.Module):
    """(q, k, seen) -> the pairs that are predicted to matter. Shapes: q [B, H, T, D], k [B, H, S, D]."""

    def __init__(self, how: Sanger) -> None:
        super().__init__()
        self.how = how

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        weights = predicted(q, k, seen, self.how.bits, self.how.scale == "row")
        return (weights > self.how.threshold) | best(weights, seen)


def predicted(q: Tensor, k: Tensor, seen: Tensor, bits: int, rows: bool) -> Tensor:
    """Weights of attention [B, H, T, S] from numbers of a few bits."""
    (q8, q_step), (k8, k_step) = (coded(t, bits, rows) if rows else directions(t, bits) for t in (q, k))
    scores = (q8 @ k8.transpose(-1, -2)) * (q_step * k_step.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return wide(scores).masked_fill(~seen, float("-inf")).softmax(-1)


def coded(x: Tensor, bits: int, rows: bool) -> tuple[Tensor, Tensor]:
    """(whole numbers of so many bits, the step between them), symmetric around 0: x [.., D], [.., 1]."""
    most = x.abs().amax(-1, keepdim=True) if rows else x.abs().amax().expand(*x.shape[:-1], 1)
    step = most.clamp(min=torch.finfo(x.dtype).tiny) / (2 ** (bits - 1) - 1)
    return (x / step).round(), step


def directions(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `coded`, of rows of norm 1 that share a step; the step of each row has its norm."""
    norm = x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    whole, step = coded(x / norm, bits, rows=False)
    return whole, step * norm


def pieces(mask: Tensor) -> Tensor:
    """How many pieces each sub-row of a mask [.., T, S] becomes, 0 for empty ones: [.., T, ceil(S / 64)]."""
    padded = F.pad(mask, (0, -mask.shape[-1] % SUBROW))
    kept = padded.unflatten(-1, (-1, SUBROW)).sum(-1)
    return -(-kept // PIECE)


def fullness(mask: Tensor) -> float:
    """Share of the hardware's places in the pieces of a mask that hold a kept key."""
    return float(mask.sum() / (pieces(mask).sum() * PIECE).clamp(min=1))
