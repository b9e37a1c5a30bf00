# pyright: reportPrivateImportUsage=false
"""Matrix products of 8-bit integers, forward and backward.

    q = r(x / s),   s = max |x| / 127,   -127 <= q <= 127;      y = sx sw (qx qw^T), summed in 32-bit integers
    r: to the nearest for weights and inputs; stochastic for gradients, so that they stay right on average

A scale belongs to what stays a row or a column in the product, never to an index that is summed over, so each of the
three products of a layer (y = x W^T, dx = g W, dW = g^T x) has scales of its own. Papers: Ghaffari et al., "Is Integer
Arithmetic Enough for Deep Learning Training?", NeurIPS 2022, arXiv 2207.08822, whose scales are powers of two of whole
tensors and which also makes norms and updates integer; these stay floating-point here, as in SwitchBack
(arXiv 2304.13013).

`weights: int8` rounds the weights stochastically onto the grid of their row after each update, so that each is an
8-bit code times its row's scale. They are still stored in floating-point: it shows whether a model would train on
8-bit weights and saves no memory. Codes that are updated themselves want gradients of s^-2 times the size, to have the
ratio |w| / |g| of the weights (quantization-aware scaling, arXiv 2206.15472); here weights are updated, which have it.

Saves: time where the machine multiplies 8-bit integers faster (CPUs with avx512_vnni, GPUs), in layers wide enough for
that to outweigh the rounding; with save int8 a quarter of a block's activations in float32. Costs: rounding of every
operand, and noise. Not for: memory by itself; narrow layers, where rounding takes longer than the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from scrimp.draws import generator
from scrimp.groups import trainable
from scrimp.models.seams import linears
from scrimp.numerics.rounding import contents, noise
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Step

LONGEST: Final = 1 << 17
"""Products summed in 32 bits: 127^2 times as many is just below 2^31."""


@dataclass(frozen=True, kw_only=True)
class INT8(Technique):
    """Matrix products of 8-bit integers, forward and backward."""

    card = Card(
        paper="arXiv:2207.08822",
        section="Quantized training",
        saves="time on machines with 8-bit integer products; with save int8, activations",
        costs="rounding of every operand, and noise",
        sets=("matrix product",),
        scope="targets",
        phase={"model": "seams", "step": "rounded"},
        whole="weights are rounded whole.",
        example={"save": "int8", "weights": "int8"},
    )
    targets: str = "attention.*|mlp.*"
    """Pattern of the linear layers; heads are better left alone."""
    granularity: Literal["row", "tensor"] = "row"
    """What has a scale of its own."""
    save: Literal["inputs", "int8"] = "inputs"
    """What is kept of a layer's input for the backward pass: the input as it is, or its 8 bits."""
    weights: Literal["float", "int8"] = "float"
    """int8: after each update weights are rounded onto their row's grid of 255 values. Saves no memory."""

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """The product of each matching layer."""
        for name, layer in linears(model, self.targets, run.where(self, "targets")).items():
            layer.product = Product(self, generator(run.seed, f"{name}.int8").initial_seed() & 0x7FFFFFFF)
        return model

    def step(self, step: Step, run: Run) -> Step:
        """Weights onto their grid, right after the update."""
        if self.weights == "float":
            return step
        trained = trainable(run.model)
        chosen = {name: trained[f"{name}.weight"] for name in linears(run.model, self.targets)
                  if f"{name}.weight" in trained}  # fmt: skip

        def rounded() -> bool:
            updated = step()
            for name, weight in chosen.items() if updated else ():
                key = generator(run.seed, f"{name}.{run.clock.step}").initial_seed() & 0x7FFFFFFF
                codes, scale = quantized(weight.detach(), 1, key)
                # Not through `data`, whose changes nobody else can see, such as who keeps a copy of the weight.
                weight.detach().copy_(codes.to(weight.dtype) * scale)
            return updated

        return rounded


class Product:
    """y = x W^T + b by 8-bit integers. Shapes: x [..., inputs], weight [outputs, inputs], y [..., outputs].

    Args:
        salt: of the noise.
    """

    def __init__(self, how: INT8, salt: int) -> None:
        self.how, self.salt = how, salt

    def cast(self, x: Tensor, dim: int, salt: int = 0) -> tuple[Tensor, Tensor]:
        """(codes, scales) of a matrix; stochastic with a salt."""
        along = dim if self.how.granularity == "row" else None
        return quantized(x, along, contents(x, self.salt + salt) if salt else None)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = _Product.apply(x.reshape(-1, x.shape[-1]), weight, self).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias.to(y.dtype)


class _Product(Function):
    """x [m, k], weight [n, k] -> [m, n], and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: Product) -> Tensor:
        qx, sx = how.cast(x, 1)
        qw, sw = how.cast(weight, 1)
        kept = (qx, sx) if how.how.save == "int8" else (x,)
        ctx.save_for_backward(weight, *(kept if ctx.needs_input_grad[1] else ()))
        ctx.how, ctx.dtypes = how, (x.dtype, weight.dtype)
        device = x.device.type
        out = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return product(qx, qw.t(), sx, sw.t(), out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        how: Product = ctx.how
        rows = how.how.granularity == "row"
        dx = dw = None
        if ctx.needs_input_grad[0]:
            qg, sg = how.cast(g, 1, salt=1)
            qw, sw = how.cast(weight, 0)
            dx = product(qg, qw, sg, sw, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            if how.how.save == "int8" and rows:
                # Scales of rows of the input would be summed over here.
                kept = how.cast(kept[0].to(kept[1].dtype) * kept[1], 0)
            qx, sx = kept if how.how.save == "int8" else how.cast(kept[0], 0)
            qg, sg = how.cast(g, 0, salt=2)
            dw = product(qg.t(), qx, sg.t(), sx, ctx.dtypes[1])
        return dx, dw, None


def quantized(x: Tensor, dim: int | None, key: Tensor | int | None) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a matrix [m, n]: int8 [m, n] and, in at least float32, one scale for what lies along `dim`.

    A part that is not finite gets a scale that is not, and zeros: its products are no numbers, so that it is noticed.

    Args:
        dim: 1 for a scale a row, 0 for a scale a column, None for one of all.
        key: of stochastic rounding; None rounds to the nearest.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    most = (x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)).to(wide)
    scale = most.reshape((1, 1) if dim is None else most.shape) / 127
    finite = scale.isfinite()
    inverse = torch.where((scale > torch.finfo(wide).tiny) & finite, 1 / scale, 0.0)
    q = (x.to(wide) * inverse).nan_to_num_(0.0)
    q = q.round_() if key is None else q.add_(noise(q.numel(), key, x.device).view(q.shape)).floor_()
    return q.clamp_(-127, 127).to(torch.int8), torch.where(finite, scale, torch.nan)


def product(a: Tensor, b: Tensor, sa: Tensor, sb: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes a [m, k] times b [k, n], times scales [m, 1] and [1, n] (or [1, 1])."""
    wide = sa.dtype
    y = integers(a[:, :LONGEST], b[:LONGEST]).to(wide)
    for begin in range(LONGEST, a.shape[1], LONGEST):
        y += integers(a[:, begin : begin + LONGEST], b[begin : begin + LONGEST])
    return y.mul_(sa).mul_(sb.to(wide)).to(dtype)


def integers(a: Tensor, b: Tensor) -> Tensor:
    """int8 [m, k] times int8 [k, n] -> int32 [m, n], exact for k up to `LONGEST`."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b)
    # CUDA multiplies whole tiles.
    m, k, n = a.shape[0], a.shape[1], b.shape[1]
    a = nn.functional.pad(a, (0, -k % 8, 0, max(0, 32 - m)))
    b = nn.functional.pad(b, (0, -n % 8, 0, -k % 8))
    return torch._int_mm(a.contiguous(), b.t().contiguous().t())[:m, :n]
