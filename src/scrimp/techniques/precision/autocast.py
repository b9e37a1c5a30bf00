"""Mixed precision: products in 16 bits, weights and updates in 32.

    forward and backward of products in bfloat16 or float16, softmax and norms in float32, weights in float32
    float16:  g = grad(S loss) / S;  any g not finite: skip the step, S <- S/2;  2000 good steps in a row: S <- 2 S

Paper: Micikevicius et al., "Mixed Precision Training", ICLR 2018, arXiv 1710.03740; bfloat16: Kalamkar et al.,
arXiv 1905.12322.

Saves: time where the hardware multiplies 16-bit numbers faster, and up to half of the activations. Costs: a 16-bit
copy of every multiplied weight from its forward to its backward pass, so small batches may need more memory, not
less. Not for: CPUs without 16-bit instructions (avx512_bf16, avx512_fp16, amx), where it is many times slower than
float32.

bfloat16 has float32's range and needs no scale; take it where the hardware offers both. The casts of weights are not
cached: a cache would keep them through the whole forward pass even where recompute drops them. Which operators run in
16 bits is torch's list; float64 is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from scrimp.errors import UserError
from scrimp.models.seams import wrap_forward
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch, Loss, Step


@dataclass(frozen=True, kw_only=True)
class Autocast(Technique):
    """Mixed precision: products in 16 bits, weights and updates in 32."""

    card = Card(
        paper="arXiv:1710.03740",
        section="Quantized training",
        saves="time on hardware with 16-bit products; up to half of the activations",
        costs="a 16-bit copy of every multiplied weight from its forward to its backward pass",
        sets=("compute precision",),
        phase={"wrap": "precision", "loss": "scaled", "backward": "unscaled", "step": "unscaled"},
        example={"dtype": "bfloat16"},
        remedies=({},),
    )
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Of products. float16 scales the loss."""
    scale: float = 65536.0
    """First scale of the loss; float16 only."""
    patience: int = 2000
    """Good steps in a row before the scale doubles; float16 only."""

    def __post_init__(self) -> None:
        at_least(1, self, "patience")
        if not self.scale > 0:
            raise UserError(f"scale must be positive, not {self.scale}.")

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """The forward pass inside torch's autocast."""
        if any(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters()):
            fix = "Set dtype to float32, or drop autocast."
            raise UserError("autocast keeps its weights in float32, but the model's are in bfloat16.", "dtype", fix)
        device, dtype = run.device.type, getattr(torch, self.dtype)

        def around(forward: Callable[..., object]) -> Callable[..., object]:
            def cast(*args: Any, **kwargs: Any) -> object:
                with torch.autocast(device, dtype, cache_enabled=False):
                    return forward(*args, **kwargs)

            return cast

        wrap_forward(model, around)
        return model

    def loss(self, loss: Loss, run: Run) -> Loss:
        """float16: the loss times the scale."""
        if self.dtype != "float16":
            return loss
        memory = run.memory(self)
        memory["scale"] = torch.full((), self.scale, dtype=torch.float32, device=run.device)
        memory["streak"] = torch.zeros((), dtype=torch.int64, device=run.device)

        def scaled(model: nn.Module, batch: Batch) -> Tensor:
            return loss(model, batch) * memory["scale"]

        return scaled

    def backward(self, backward: Backward, run: Run) -> Backward:
        """float16: gradients stay scaled; the loss returned does not."""
        if self.dtype != "float16":
            return backward
        memory = run.memory(self)
        return lambda batch, count: backward(batch, count) / memory["scale"]

    def step(self, step: Step, run: Run) -> Step:
        """float16: unscale the gradients, and skip the update when one of them is not finite."""
        if self.dtype != "float16":
            return step
        memory = run.memory(self)

        def unscaled() -> bool:
            held = [p for p in run.model.parameters() if p.grad is not None]
            if not (held or run.elsewhere):
                return step()
            scale, streak = memory["scale"], memory["streak"]
            grads = [p.grad for p in held if p.grad is not None]
            for grad in grads:
                grad.div_(scale)
            finite = math.isfinite(run.read(whole(get_total_norm(grads, math.inf)), worst=0.0))
            if run.world.any(not finite):
                for p in held:
                    p.grad = None
                scale.mul_(0.5)
                streak.zero_()
                if run.read(scale, worst=1.0) < 2.0**-14:
                    what = "gradients overflow float16 at every step, however small the loss scale."
                    raise UserError(what, run.where(self, "dtype"), "Use bfloat16 or a lower learning rate.")
                return False
            updated = step()
            streak.add_(1)
            full = streak >= self.patience
            scale.mul_(torch.where(full, 2.0, 1.0))
            streak.mul_(~full)
            return updated

        return unscaled


def whole(norm: Tensor) -> Tensor:
    """A norm over all shards, so that all ranks decide alike."""
    gather = getattr(norm, "full_tensor", None)
    return norm if gather is None else gather()
