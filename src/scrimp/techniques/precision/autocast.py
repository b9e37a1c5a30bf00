"""Mixed precision: matrix products in 16 bits, weights and sums in 32.

    bfloat16: nothing else is needed; its exponent has float32's range.
    float16:  loss <- S loss;  g <- g / S;  if any g is inf or nan: skip the update, S <- S / 2
              after 2,000 good steps in a row: S <- 2 S

Papers: Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740; bfloat16: Kalamkar et al., arXiv 1905.12322.

Saves: time, where the processor multiplies 16-bit numbers faster, and about half of the activations. Costs: a 16-bit
copy of each weight matrix, kept for the backward. Not for: CPUs without such instructions (AVX512-BF16 or AMX), on
which 16-bit products are many times slower: look at `scrimp show autocast` and measure.
Which operations run in 16 bits is torch's list (torch.autocast).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from scrimp.models.seams import wrap_forward
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from collections.abc import Callable

    from scrimp.run import Run
    from scrimp.technique import Backward, Batch, Loss, Step


@dataclass(frozen=True, kw_only=True)
class Autocast(Technique):
    """Matrix products in 16 bits, with dynamic loss scaling in float16."""

    card = Card(
        paper="arXiv:1710.03740",
        section="Quantized training",
        saves="time on hardware with 16-bit products, and half of the activations",
        costs="a 16-bit copy of each weight matrix",
        sets=("compute precision",),
        phase={"wrap": "precision", "loss": "scaled", "backward": "unscaled", "step": "unscaled"},
        example={"dtype": "bfloat16"},
    )
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Of the matrix products."""
    scale: float = 65536.0
    """First S; float16 only."""
    patience: int = 2000
    """Good steps before S doubles; float16 only."""

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """The model's forward under torch.autocast."""
        dtype, device = getattr(torch, self.dtype), run.device.type

        def around(forward: Callable[..., Any]) -> Callable[..., Any]:
            def cast(*args: Any, **kwargs: Any) -> Any:
                with torch.autocast(device, dtype):
                    return forward(*args, **kwargs)

            return cast

        wrap_forward(model, around)
        return model

    def loss(self, loss: Loss, run: Run) -> Loss:
        """S times the loss, in training."""
        if self.dtype != "float16":
            return loss
        memory = run.memory(self)
        memory["scale"] = torch.tensor(self.scale, device=run.device)
        memory["streak"] = torch.zeros((), device=run.device)
        return lambda model, batch: loss(model, batch) * memory["scale"]

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Tell the loss without S."""
        if self.dtype != "float16":
            return backward
        memory = run.memory(self)

        def unscaled(batch: Batch, count: Tensor) -> Tensor:
            return backward(batch, count) / memory["scale"]

        return unscaled

    def step(self, step: Step, run: Run) -> Step:
        """Divide by S; skip and halve S if that leaves anything that is no number."""
        if self.dtype != "float16":
            return step

        def unscaled() -> bool:
            assert run.optimizer is not None
            memory = run.memory(self)
            params = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            torch._foreach_mul_(grads, 1 / memory["scale"])
            norms = torch._foreach_norm(grads, torch.inf)
            finite = run.read(torch.stack(norms).isfinite().all(), worst=1.0)
            if not finite:
                for p in params:
                    p.grad = None
                memory["scale"] /= 2
                memory["streak"].zero_()
                return False
            memory["streak"] += 1
            if run.read(memory["streak"], worst=0.0) >= self.patience:
                memory["scale"] *= 2
                memory["streak"].zero_()
            return step()

        return unscaled
