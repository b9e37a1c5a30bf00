# pyright: reportPrivateImportUsage=false
"""Matrix products of 8-bit floating-point numbers.

    y = (sx x)_e4m3 (sw W)_e4m3^T / (sx sw),   s = 2^floor(log2(largest number of the format / max |x|))
    gradients: e5m2 (2 bits of precision, largest number 57344); weights and inputs: e4m3 (3 bits, 448); sums in float32

Paper: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433. Scales are powers of two, so that scaling
itself rounds nothing.

    scaling current    from the tensor itself: one more pass before the cast
    scaling delayed    from the largest max |x| of the last `history` steps, times 2^-margin: the cast needs no pass
                       first, and what has outgrown the history is cut off at the format's largest number. Of
                       several ranks the largest of all counts
    granularity row    a scale for each row that stays a row in the product, in place of one for the whole tensor

Saves: time where the hardware multiplies FP8 (from NVIDIA's compute capability 8.9 on), and with save fp8 a quarter of
a block's activations in float32, a sixth in bfloat16: inputs of layers are kept in 8 bits. Costs: casts of every
operand, and noise. Not for: a CPU, which has no such products: it computes the same numbers and takes longer; layers so
small that the casts outweigh the product. Weights stay in their own precision. A casting instruction that cuts off
would hide an overflow: a tensor that is not finite makes the whole product not a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from scrimp.errors import UserError
from scrimp.models.seams import linears
from scrimp.technique import Card, Technique, at_least
from scrimp.world import PARTS

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Step
    from scrimp.world import World

E4M3: Final = torch.float8_e4m3fn
E5M2: Final = torch.float8_e5m2
INPUT, WEIGHT, GRADIENT = range(3)
"""Rows of a history."""
STATE: Final = ".product.history"


@dataclass(frozen=True, kw_only=True)
class FP8(Technique):
    """Matrix products of 8-bit floating-point numbers."""

    card = Card(
        paper="arXiv:2209.05433",
        section="Quantized training",
        saves="time on hardware with FP8 products; with save fp8, activations",
        costs="casts of every operand, and noise",
        sets=("matrix product",),
        scope="targets",
        phase={"model": "seams", "export": "folded"},
        emulated=("cpu",),
        example={"scaling": "delayed", "history": 3, "save": "fp8"},
        remedies=({"save": "fp8"},),
    )
    targets: str = "attention.*|mlp.*"
    """Pattern of the linear layers; heads are better left alone."""
    scaling: Literal["current", "delayed"] = "current"
    """Scales from the tensor itself, or from earlier steps."""
    history: int = 16
    """Steps that delayed scaling looks back on."""
    margin: int = 0
    """Powers of two by which delayed scaling stays below the format's largest number."""
    granularity: Literal["tensor", "row"] = "tensor"
    """What has a scale of its own."""
    save: Literal["inputs", "fp8"] = "inputs"
    """What is kept of a layer's input for the backward pass: the input as it is, or its 8 bits."""

    def __post_init__(self) -> None:
        at_least(1, self, "history")
        at_least(0, self, "margin")
        if self.scaling == "delayed" and self.granularity == "row":
            fix = "Set granularity to tensor, or scaling to current."
            raise UserError("rows are other tokens at each step: their scales cannot be delayed.", "granularity", fix)

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """The product of each matching layer."""
        for layer in linears(model, self.targets, run.where(self, "targets")).values():
            layer.product = Product(self, layer.weight.device)
        return model

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Delayed scaling: each forward pass of training begins a new entry of the history."""
        if self.scaling == "delayed":
            mine: Any = [m.product for m in linears(model, self.targets).values()]
            histories = run.plans[run.order.key(self)] = Histories(mine, run.world)

            def begin(module: nn.Module, args: Any) -> None:
                if module.training and torch.is_grad_enabled():
                    histories.begin()

            model.register_forward_pre_hook(begin)
        return model

    def step(self, step: Step, run: Run) -> Step:
        """Delayed scaling: before the update, what all ranks have seen."""
        if self.scaling != "delayed":
            return step

        def agreed() -> bool:
            run.plans[run.order.key(self)].agree()
            return step()

        return agreed

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Without histories."""
        return {name: t for name, t in named.items() if not name.endswith(STATE)}


class Histories:
    """Those of all layers. Ranks that see other parts of a batch have the same, so that they scale alike.

    Args:
        products: of this rank's layers. world: all ranks.
    """

    def __init__(self, products: Sequence[Product], world: World) -> None:
        self.products, self.world, self.grown = products, world, False

    def begin(self) -> None:
        """A forward pass of training begins a new entry."""
        self.agree()
        for product in self.products:
            product.begin()
        self.grown = True

    @torch.no_grad()
    def agree(self) -> None:
        """The newest entries become the largest that any rank has seen."""
        if self.grown and self.products and self.world.ranks(*PARTS) > 1:
            newest = self.world.largest(torch.stack([p.history[:, 0] for p in self.products]))
            for product, most in zip(self.products, newest, strict=True):
                product.history[:, 0] = most
        self.grown = False


class Product(nn.Module):
    """y = x W^T + b in FP8. Shapes: x [..., inputs], weight [outputs, inputs], y [..., outputs].

    Attributes:
        history: largest magnitudes, [3, history + 1] of inputs, weights and gradients, the newest first; of delayed
            scaling only. The first column grows while a step runs and is not read before the next.
    """

    history: Tensor

    def __init__(self, how: FP8, device: torch.device) -> None:
        super().__init__()
        self.how = how
        if how.scaling == "delayed":
            self.register_buffer("history", torch.zeros(3, how.history + 1, dtype=torch.float32, device=device))

    def refill(self) -> None:
        """Nothing seen yet."""
        if self.how.scaling == "delayed":
            self.history.zero_()

    @torch.no_grad()
    def begin(self) -> None:
        """A new entry, unless the newest is still unused."""
        moved = torch.cat([torch.zeros_like(self.history[:, :1]), self.history[:, :-1]], 1)
        self.history.copy_(torch.where(self.history[INPUT, 0] > 0, moved, self.history))

    def cast(self, x: Tensor, kind: int, dim: int) -> tuple[Tensor, Tensor]:
        """(8-bit numbers, inverse scale) of a matrix: [m, n], and a scalar or, by rows, x's shape with 1 at `dim`."""
        dtype = E5M2 if kind == GRADIENT else E4M3
        row = self.how.granularity == "row"
        most = x.abs().amax(dim, keepdim=True) if row else x.abs().amax()
        most = most.to(torch.float32)
        reach = most
        if self.how.scaling == "delayed":
            past = self.history[kind, 1:].amax() * 2.0**self.how.margin
            reach = torch.where(past > 0, past, most)
            if self.training and (kind == GRADIENT or torch.is_grad_enabled()):
                self.history[kind, 0] = torch.maximum(self.history[kind, 0], most)
        scale = power(torch.finfo(dtype).max / reach)
        # Casting cuts off, so an overflow must be seen in the tensor before it.
        inverse = torch.where(most.isfinite(), 1 / scale, torch.nan)
        limit = torch.finfo(dtype).max
        # Scales of small tensors are more than float16 can hold.
        wide = x.float() if x.dtype == torch.float16 else x
        return (wide * scale.to(wide.dtype)).clamp_(-limit, limit).to(dtype), inverse

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        recorded = torch.is_grad_enabled()
        y = _Product.apply(x.reshape(-1, x.shape[-1]), weight, self, recorded)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias.to(y.dtype)


class _Product(Function):
    """x [m, k], weight [n, k] -> [m, n], and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: Product, recorded: bool) -> Tensor:
        with torch.set_grad_enabled(recorded):
            x8, ix = how.cast(x.detach(), INPUT, 1)
            w8, iw = how.cast(weight.detach(), WEIGHT, 1)
        kept = (x8, ix) if how.how.save == "fp8" else (x,)
        ctx.save_for_backward(weight, *(kept if ctx.needs_input_grad[1] else ()))
        ctx.how, ctx.dtypes = how, (x.dtype, weight.dtype)
        half = x.dtype if x.dtype.itemsize == 2 else None
        out = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else half or x.dtype
        return product(x8, w8.t(), ix * iw.t() if ix.ndim else ix * iw, x.dtype).to(out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        how: Product = ctx.how
        dx = dw = None
        g8, ig = how.cast(g, GRADIENT, 1)
        if ctx.needs_input_grad[0]:
            w8, iw = how.cast(weight, WEIGHT, 0)
            dx = product(g8, w8, ig * iw, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            rows = how.how.granularity == "row"
            if rows:
                g8, ig = how.cast(g, GRADIENT, 0)
            if how.how.save == "fp8" and not rows:
                x8, ix = kept
            else:
                # Rows of the input are columns here: a scale along the sum would be wrong.
                x = kept[0].to(g.dtype) * kept[1].to(g.dtype) if how.how.save == "fp8" else kept[0]
                x8, ix = how.cast(x, INPUT, 0)
            dw = product(g8.t(), x8, ig.t() * ix if rows else ig * ix, ctx.dtypes[1])
        return dx, dw, None, None


def product(a: Tensor, b: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """a [m, k] times b [k, n], times the inverse scales; the sum is in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    if fast(a, b):
        one = torch.ones((), dtype=torch.float32, device=a.device)
        y = torch._scaled_mm(a.contiguous(), b.t().contiguous().t(), one, one, out_dtype=wide)
    else:
        # Products of 8-bit numbers are exact in float32. Torch's own kernel for CPUs adds them one at a time.
        with torch.autocast(a.device.type, enabled=False):
            y = a.to(wide) @ b.to(wide)
    return y.mul_(inverse.to(wide)).to(dtype)


def fast(a: Tensor, b: Tensor) -> bool:
    """Whether a CUDA device multiplies these itself."""
    aligned = all(n % 16 == 0 for n in (*a.shape, *b.shape))
    return aligned and a.device.type == "cuda" and torch.cuda.get_device_capability(a.device) >= (8, 9)


def power(x: Tensor) -> Tensor:
    """The largest power of two that is not larger; 1 for infinity and for what is no number."""
    mantissa, exponent = torch.frexp(x)
    return torch.where(x.isfinite(), torch.ldexp(torch.ones_like(mantissa), exponent - 1), 1.0)
