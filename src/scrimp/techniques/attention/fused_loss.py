"""Head and cross entropy, a few rows at a time, without the matrix of logits.

    l = x W^T + b            loss = sum over counted rows of  logsumexp(l) - l[target]
    dl = softmax(l) - onehot(target)        dx = dl W        dW = dl^T x        db = sum of dl

Rows are independent, so a chunk of them goes through all five products before the next chunk begins, and their logits
are overwritten: first by the softmax, then by its gradient. Gradients are finished when the forward pass is; the
backward pass only multiplies them by the gradient of the summed loss. Rows whose target does not count are left out.

Paper: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", arXiv 2410.10989, section on
FusedLinearCrossEntropy. Here it is written with torch's own products, for every device.

Saves: three buffers of [tokens, vocabulary] become one of [chunk, vocabulary], which is often the highest point of
memory; and time, since that one stays in cache and its pages are touched once. Costs: nothing with a plain head; a
second product by the head when steps on its output (an output adapter, a scale) or another product (fp8, int8) forbid
finishing gradients early. Not for: tasks that need the logits themselves; a second backward pass through one loss.

`kernel: own` is the default because on a CPU it was as fast or faster at every chunk tried, by up to 8 %, needs no
further buffer, and smooths labels. `kernel: torch` takes `torch.nn.functional.linear_cross_entropy` (torch 2.13). Its
automatic chunk is not used: with a large vocabulary it is so small that accumulating dW dominates. Chunks of 256 to
1024 rows are good ones. On CUDA the choice of counted rows waits for the device once a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from scrimp.errors import UserError
from scrimp.models.seams import CrossEntropy, Linear
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class FusedLoss(Technique):
    """Head and cross entropy without the matrix of logits."""

    card = Card(
        paper="arXiv:2410.10989",
        section="Hardware/algorithm co-design",
        saves="the logits, [tokens, vocabulary], and their gradient; time",
        costs="nothing with a plain head",
        sets=("head loss",),
        needs=("head_loss",),
        phase={"model": "seams"},
        example={"chunk": 8},
        remedies=({},),
    )
    chunk: int = 512
    """Rows (tokens) whose logits exist at once."""
    kernel: Literal["own", "torch"] = "own"
    """Whose implementation."""

    def __post_init__(self) -> None:
        at_least(1, self, "chunk")
        if self.kernel == "torch" and not hasattr(F, "linear_cross_entropy"):
            raise UserError(f"torch {torch.__version__} has no linear_cross_entropy.", "", "Set kernel to own.")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Replace the model's `head_loss`."""
        if not isinstance(getattr(model, "head_loss", None), CrossEntropy):
            fix = "Use a model whose head_loss is scrimp.models.seams.CrossEntropy."
            raise UserError("the model has no head with cross entropy to replace.", run.where(self), fix)
        model.head_loss = FusedCrossEntropy(self.chunk, self.kernel)
        return model


class FusedCrossEntropy(nn.Module):
    """As `CrossEntropy`, by chunks of rows. Shapes: hidden [..., C], targets [...], both flattened to rows [N].

    Args:
        chunk: rows whose logits exist at once.
        kernel: "own", or "torch" for `torch.nn.functional.linear_cross_entropy`.
    """

    def __init__(self, chunk: int = 512, kernel: str = "own") -> None:
        super().__init__()
        self.chunk, self.kernel = chunk, kernel

    def forward(self, hidden: Tensor, head: nn.Module, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Summed loss; targets of -100 do not count."""
        x, targets = counted(hidden.flatten(0, -2), targets.flatten())
        parts = plain_head(head)
        if parts is None:
            return recomputed(x, head, targets, smoothing, self.chunk)
        weight, bias = parts
        if self.kernel == "torch" and smoothing == 0.0 and len(x):
            return by_torch(x, weight, bias, targets, self.chunk)
        grads = torch.is_grad_enabled()
        wanted = tuple(grads and t is not None and t.requires_grad for t in (x, weight, bias))
        return LinearCrossEntropy.apply(x, weight, bias, targets, smoothing, self.chunk, wanted)  # type: ignore[no-any-return]


def counted(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The rows whose targets count; all of them while planning, when targets have no values."""
    if isinstance(targets, FakeTensor):
        return x, targets
    rows = (targets != -100).nonzero().squeeze(1)
    return (x, targets) if len(rows) == len(targets) else (x.index_select(0, rows), targets.index_select(0, rows))


def plain_head(head: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(weight [V, C], bias [V]) of a head that is one product, after the steps on its weight; None for others."""
    if type(head) is nn.Linear:
        return head.weight, head.bias
    if not isinstance(head, Linear) or head.on_input or head.on_output or head.product is not F.linear:
        return None
    weight, bias = head.weight, head.bias
    for _, name in head.on_weight:
        weight = head.get_submodule(name)(weight)
    for _, name in head.on_bias if bias is not None else ():
        bias = head.get_submodule(name)(bias)
    return weight, bias


def recomputed(x: Tensor, head: nn.Module, targets: Tensor, smoothing: float, chunk: int) -> Tensor:
    """Any head: chunks whose logits are computed once more in the backward pass."""

    def loss(x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(x), targets, reduction="sum", label_smoothing=smoothing)

    total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32)) + 0.0 * x[:0].sum()
    for rows, ids in zip(x.split(chunk), targets.split(chunk), strict=True):
        total = total + (
            checkpoint(loss, rows, ids, use_reentrant=False) if torch.is_grad_enabled() else loss(rows, ids)
        )
    return total


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
    """torch's chunked implementation, in the dtype of autocast where that is on."""
    dtype = product_dtype(x)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)  # type: ignore[attr-defined]
    with torch.autocast(x.device.type, enabled=False):
        return F.linear_cross_entropy(  # type: ignore[attr-defined]
            x.to(dtype),
            weight.to(dtype),
            targets,
            linear_bias=None if bias is None else bias.to(dtype),
            reduction="sum",
            options=options,
        )


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer would multiply x here."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of x [N, C] W^T [C, V] + b [V] against targets [N], with gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        smoothing: float,
        chunk: int,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        """The loss, a scalar in at least float32."""
        dtype = product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            sweep = Sweep(x, weight, bias, dtype, min(chunk, max(len(x), 1)), wanted)
            total = x.new_zeros((), dtype=sweep.wide.dtype)
            for start in range(0, len(x), chunk):
                total += sweep.chunk(slice(start, start + chunk), targets[start : start + chunk], smoothing)
        # Attributes, not saved tensors: hooks that compress or offload activations must not touch gradients.
        ctx.gradients, ctx.lift = sweep.gradients(), sweep.lift
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times that of the loss, in place.

        Raises:
            RuntimeError: the second time, as their buffers are then somebody's gradients.
        """
        if ctx.gradients is None:
            raise RuntimeError("fused_loss keeps no gradients for a second backward pass through one loss.")
        found, ctx.gradients = ctx.gradients, None
        factor = grad[0] / ctx.lift
        return *(None if g is None else g.mul_(factor) for g in found), None, None, None, None


class Sweep:
    """The buffers of one pass over the rows.

    Args:
        dtype: of the products; softmax and sums are in at least float32.
        rows: rows of the buffer of logits.
        wanted: which gradients to make, of x, weight and bias.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        rows: int,
        wanted: tuple[bool, bool, bool],
    ) -> None:
        half = dtype in HALF
        self.x, self.weight = x, weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.logits = x.new_empty((rows, len(weight)), dtype=dtype)
        self.wide = x.new_empty((rows, len(weight)), dtype=torch.float32) if half else self.logits
        # float16 loses gradients below 6e-8, and a loss scale comes too late here, so they are lifted on the way; by
        # little, because sums over the rows of a frequent target must stay below 65504.
        self.lift = 16.0 if dtype == torch.float16 else 1.0
        kinds = [t.dtype if t is not None else dtype for t in (x, weight, bias)]
        self.kinds, sums = kinds, self.wide.dtype
        make_x, make_weight, make_bias = wanted
        self.dx = x.new_empty(x.shape) if make_x else None
        self.dweight = x.new_empty(weight.shape, dtype=sums) if make_weight else None
        self.dbias = x.new_zeros(len(weight), dtype=sums) if make_bias else None
        self.begun = False

    def chunk(self, rows: slice, targets: Tensor, smoothing: float) -> Tensor:
        """The loss of a chunk of rows; their gradients are written or added to the buffers."""
        x = self.x[rows].detach().to(self.weight.dtype)
        logits, wide = self.logits[: len(x)], self.wide[: len(x)]
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=logits)
        if wide is not logits:
            wide.copy_(logits)
        place = targets[:, None]
        right = wide.gather(1, place)[:, 0]
        if smoothing:
            right = (1 - smoothing) * right + smoothing * wide.mean(1)
        top = wide.amax(1)
        torch.softmax(wide, 1, out=wide)
        # The largest probability is exp(top - logsumexp), and never small.
        loss = (top - wide.amax(1).log() - right).sum()
        if self.dx is None and self.dweight is None and self.dbias is None:
            return loss
        wide.scatter_add_(1, place, wide.new_full(place.shape, smoothing - 1))
        if smoothing:
            wide.sub_(smoothing / wide.shape[1])
        if self.lift != 1.0:
            wide.mul_(self.lift)
        self._gradients(x, rows, logits, wide)
        return loss

    def _gradients(self, x: Tensor, rows: slice, logits: Tensor, wide: Tensor) -> None:
        if self.dbias is not None:
            self.dbias += wide.sum(0)
        if wide is not logits:
            logits.copy_(wide)
        if self.dx is not None:
            out = self.dx[rows]
            if out.dtype == logits.dtype:
                torch.mm(logits, self.weight, out=out)
            else:
                out.copy_(logits @ self.weight)
        if self.dweight is not None:
            same = self.dweight.dtype == logits.dtype
            if not self.begun:
                if same:
                    torch.mm(logits.t(), x, out=self.dweight)
                else:
                    self.dweight.copy_(logits.t() @ x)
            elif same:
                self.dweight.addmm_(logits.t(), x)
            else:
                self.dweight.add_(logits.t() @ x)
            self.begun = True

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of x, weight and bias, in their own dtypes."""
        if self.dweight is not None and not self.begun:
            self.dweight.zero_()
        made = (self.dx, self.dweight, self.dbias)
        return tuple(None if g is None else g.to(kind) for g, kind in zip(made, self.kinds, strict=True))
