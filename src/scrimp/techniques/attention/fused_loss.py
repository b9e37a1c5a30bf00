"""Head and cross entropy in one: the logits are never all in memory.

    for each chunk of rows x:   z = x W^T;  loss += logsumexp(z) - z[target];  p = softmax(z) - onehot(target)
                                dx = p W;   dW += p^T x

The gradients are computed in the forward, chunk by chunk, in one reused buffer of chunk x V numbers; the backward only
scales them. The idea is that of several fused heads (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
Models", arXiv 2411.09009, goes further and skips negligible entries).

Saves: the logits and their gradient, 8 B T V bytes in float32, often the peak of the whole step, and the time of
touching them. Costs: nothing in FLOPs. Not for: double backward. `kernel: torch` uses torch's own operation instead
(torch 2.13 and later); both are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.seams import CrossEntropy, Linear
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class FusedLoss(Technique):
    """Head and cross entropy without the logits."""

    card = Card(
        paper="arXiv:2411.09009",
        section="Hardware/algorithm co-design",
        saves="the logits and their gradient",
        costs="nothing in FLOPs",
        sets=("head loss",),
        needs=("head_loss",),
        phase={"model": "seams"},
        example={"chunk": 8},
    )
    chunk: int = 512
    """Rows (tokens) whose logits are in memory at once."""
    kernel: Literal["chunked", "torch"] = "chunked"
    """The loop above, or torch's F.linear_cross_entropy."""

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UserError(f"chunk must be at least 1, not {self.chunk}.")
        if self.kernel == "torch" and not hasattr(F, "linear_cross_entropy"):
            raise UserError(f"torch {torch.__version__} has no linear_cross_entropy.", "", "Use `kernel: chunked`.")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Replace the model's head loss."""
        if not isinstance(getattr(model, "head_loss", None), nn.Module):
            raise UserError("the model has no `head_loss` seam.", run.where(self), "Use the house Transformer.")
        model.head_loss = FusedCrossEntropy(self.chunk, self.kernel)
        return model


class FusedCrossEntropy(CrossEntropy):
    """The head-loss seam, chunk by chunk.

    Args:
        chunk: rows at once.
        kernel: chunked or torch.
    """

    def __init__(self, chunk: int, kernel: str) -> None:
        super().__init__()
        self.chunk, self.kernel = chunk, kernel

    def forward(self, hidden: Tensor, head: nn.Module, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Summed loss of hidden [B, T, C] against targets [B, T]."""
        if not isinstance(head, Linear) or head.on_output or head.bias is not None:
            raise UserError("the head is changed on its output, which a fused loss cannot see.", "techniques.fused_loss",
                            "Leave the head out of the other technique's targets, or drop `fused_loss`.")  # fmt: skip
        weight = head.weight
        for _, name in head.on_weight:
            weight = head.get_submodule(name)(weight)
        rows, targets = hidden.flatten(0, -2), targets.flatten()
        device = rows.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if self.kernel == "torch":
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=self.chunk, chunking_method=None)
            return F.linear_cross_entropy(rows.to(compute), weight.to(compute), targets, reduction="sum",
                                          label_smoothing=smoothing, options=options)  # fmt: skip
        grad = torch.is_grad_enabled()
        wanted = (grad and rows.requires_grad, grad and weight.requires_grad)
        return ChunkedCrossEntropy.apply(rows, weight, targets, smoothing, self.chunk, compute, wanted)


class ChunkedCrossEntropy(torch.autograd.Function):
    """rows [N, C], weight [V, C], targets [N] -> summed loss. Gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        smoothing: float,
        chunk: int,
        compute: torch.dtype,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        wide = torch.promote_types(compute, torch.float32)
        w = weight.to(compute)
        vocab = weight.shape[0]
        ctx.rows = torch.empty_like(rows) if wanted[0] else None
        ctx.weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        ctx.dtypes = rows.dtype, weight.dtype
        logits = torch.empty(min(chunk, len(rows)), vocab, dtype=wide, device=rows.device)
        total = torch.zeros((), dtype=wide, device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            for x, target, dx in zip(
                rows.split(chunk), targets.split(chunk), ctx.rows.split(chunk) if wanted[0] else rows.split(chunk), strict=True
            ):
                # Rows that do not count: their x and dx are zeroed, which costs nothing beside a pass over logits.
                valid = (target != -100)[:, None]
                place = target.clamp(min=0)[:, None]
                x = (x * valid).to(compute)
                z = logits[: len(x)]
                _product(x, w.t(), z)
                torch.log_softmax(z, 1, out=z)
                picked = z.gather(1, place)
                total -= (1 - smoothing) * (picked * valid).sum()
                if smoothing:
                    total -= smoothing / vocab * (z.sum(1, keepdim=True) * valid).sum()
                if not any(wanted):
                    continue
                z.exp_()
                z.scatter_add_(1, place, torch.full_like(picked, smoothing - 1))
                if smoothing:
                    z.sub_(smoothing / vocab)
                p = z.to(compute)
                if wanted[0]:
                    _product(p, w, dx)
                    dx.mul_(valid)
                if ctx.weight is not None:
                    _accumulate(p.t(), x, ctx.weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward made, in place: a second backward is refused."""
        if ctx.dtypes is None:
            raise RuntimeError("the fused loss keeps no graph: backward ran twice")
        rows = None if ctx.rows is None else ctx.rows.mul_(grads[0]).to(ctx.dtypes[0])
        weight = None if ctx.weight is None else ctx.weight.mul_(grads[0]).to(ctx.dtypes[1])
        ctx.rows = ctx.weight = ctx.dtypes = None
        return rows, weight, None, None, None, None, None


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, without a temporary where the types allow."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _accumulate(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a b, summed in out's type."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(torch.mm(a, b))
