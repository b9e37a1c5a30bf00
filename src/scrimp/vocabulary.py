# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A vocabulary whose tokens are shared by ranks: embedding, logits and cross entropy.

    embedding       each rank looks its own tokens up, others are zero; summed over ranks
    loss of a row   log sum exp(l) - l[target], where the maximum, the sum and the target's logit come from all ranks

Logits are never put together for the loss: three numbers a row are sent.

Legend of shapes: N rows (tokens), V vocabulary, n ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scrimp.lanes import Ranks
from scrimp.models.layers import Embedding
from scrimp.models.seams import CrossEntropy

IGNORED = -100
"""Target that does not count."""


def looked_up(embed: Embedding, ids: Tensor, ranks: Ranks) -> Tensor:
    """Rows of a table [V / n, C] of which other ranks have the others: ids [...] -> [..., C]."""
    rows, foreign = _places(ids, len(embed.weight), ranks)
    return ranks.summed(F.embedding(rows, embed.weight).masked_fill(foreign[..., None], 0.0))


class SharedCrossEntropy(CrossEntropy):
    """As `CrossEntropy`, of a head that gives this rank's logits only.

    Args:
        part: hidden states -> this rank's logits [..., V / n]; the last rank has fewer where V / n is no whole number.
        vocab: V.
    """

    def __init__(self, part: Callable[[Tensor], Tensor], vocab: int, ranks: Ranks) -> None:
        super().__init__()
        self.part, self.vocab, self.ranks = part, vocab, ranks

    def forward(self, hidden: Tensor, head: nn.Module, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The summed loss; targets of -100 do not count."""
        logits = self.part(hidden).flatten(0, -2)
        return SummedLoss.apply(logits, targets.flatten(), smoothing, self.vocab, self.ranks)  # type: ignore[no-any-return]


class SummedLoss(torch.autograd.Function):
    """Summed cross entropy of logits [N, V / n] against targets [N]; keeps the softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float, vocab: int, ranks: Ranks) -> Tensor:
        """The loss, a scalar."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        counts = targets != IGNORED
        rows, foreign = _places(targets, -(-vocab // ranks.count), ranks)
        foreign = foreign | ~counts
        shifted = wide - ranks.largest(wide.amax(-1))[:, None]
        target = shifted.gather(-1, rows[:, None]).squeeze(-1).masked_fill(foreign, 0.0)
        spread = shifted.sum(-1) * (smoothing / vocab)
        exps = shifted.exp_()
        total, likely = ranks.sum(torch.stack([exps.sum(-1), target * (1 - smoothing) + spread]))
        ctx.save_for_backward(exps.div_(total[:, None]), rows, foreign, counts)
        ctx.smoothing, ctx.vocab, ctx.dtype = smoothing, vocab, logits.dtype
        return (total.log() - likely).masked_fill(~counts, 0.0).sum().to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """softmax - (1 - smoothing) onehot - smoothing / V, in rows that count."""
        softmax, rows, foreign, counts = ctx.saved_tensors
        grad = softmax - ctx.smoothing / ctx.vocab
        own = (1 - ctx.smoothing) * (~foreign).to(grad.dtype)
        grad.scatter_add_(-1, rows[:, None], -own[:, None])
        return (grad * counts[:, None] * grads[0]).to(ctx.dtype), None, None, None, None


def _places(ids: Tensor, rows: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Which of this rank's rows each id has, 0 for those of other ranks, and which these are."""
    places = ids - rows * ranks.place
    foreign = (places < 0) | (places >= rows)
    return places.masked_fill(foreign, 0), foreign
