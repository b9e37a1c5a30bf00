# pyright: reportPrivateImportUsage=false
"""2:4 sparsity: of every 4 neighboring weights along the inputs 2 are used, and chosen anew as training goes.

    y = (m * W) x,      m = 1 at the 2 largest |w| of every 4, else 0
    STE:      W <- W - lr * g               g: the gradient by m * W, passed on to all of W
    SR-STE:   W <- W - lr * (g + decay * (1 - m) * W)

All weights are kept and trained, those that are not used too, so that a pair can change. SR-STE pulls what is not used
to zero, whereby masks settle: the gradient was taken without these weights, and the less of them there is, the better
it fits. The decay is added to the gradient before the update rule sees it, so that Adam scales it too. Paper: Zhou et
al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021, arXiv 2102.04010.

    transposable   2 of every 4 along the outputs too, the best of 90 ways for each block of 4 x 4: so the product with
                   W^T, which gives the gradient of the inputs, is 2:4 as well (after Hubara et al., 2021)

How restless masks are is logged as `two_four_changed`: how many of their entries changed at the step, |m_t - m_{t-1}|.

Saves: half of the multiplications of the forward pass, and of the inputs' gradient if transposable, on GPUs from
compute capability 8.0 on, which have them in 16 bits; 44 % of the bytes of the exported weights in 16 bits, if they are
packed (`scrimp.numerics.semi`). The weights' gradient stays dense. Costs: a mask and its choice at each step; some
accuracy. Not for: saving time on a CPU, for which no kernel exists: it multiplies masked dense weights; layers or
batches so small that packing a weight outweighs its product; memory in training, where all weights stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from scrimp.models.seams import Linear, linears, mergeable
from scrimp.sparse.masks import prunable, shapes
from scrimp.sparse.patterns import Pattern, of_groups, transposable
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import State, Step


@dataclass(frozen=True, kw_only=True)
class TwoFour(Technique):
    """Train with 2 of every 4 weights."""

    card = Card(
        paper="arXiv:2102.04010",
        section="Hardware/algorithm co-design",
        claim="ResNet-50 at 2:4: 77.0 % on ImageNet (table of github.com/aojunzz/NM-sparsity)",
        saves="half of the forward pass' multiplications on GPUs with sparse tensor cores",
        costs="a mask and its choice at each step; some accuracy",
        sets=("sparsity",),
        phase={"model": "seams", "carry": "masked", "step": "masked", "export": "merged"},
        refuses={
            "frozen weights": "masks are of weights that are trained, and tuning freezes them.",
            "width schedule": "masks have the shapes of their weights, which it changes.",
        },
        emulated=("cpu",),
        whole="masks are of whole weights.",
        example={"targets": "mlp.*", "decay": 0.01, "every": 2},
    )
    targets: str = "attention.*|mlp.*"
    """Pattern of the linear layers; heads are better left alone."""
    decay: float = 2e-4
    """How strongly weights that are not used are pulled to zero; 0 is STE, without it."""
    transposable: bool = False
    """Whether weights are 2:4 along the outputs too."""
    every: int = 1
    """Steps between choices of the masks."""

    def __post_init__(self) -> None:
        at_least(0, self, "decay")
        at_least(1, self, "every")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """A mask on the weight of each matching layer; on a GPU, its product too."""
        where = run.where(self, "targets")
        pattern = "|".join(f"{name}.weight" for name in linears(model, self.targets, where))
        weights = prunable(run, self, pattern)
        names = [name.removesuffix(".weight") for name in weights]
        for name, shape in shapes(weights).items():
            Pattern.parse("2:4").check(name, shape, where)
            if self.transposable:
                Pattern.parse("4x4").check(name, shape, where)
        for layer in mergeable(model, names, where).values():
            layer.on("weight", "mask", self.name, Mask(layer.weight, self.transposable))
            if run.device.type == "cuda" and layer.product is F.linear:
                layer.product = Product(self.transposable)
        return model

    def carry(self, state: State, run: Run) -> State:
        """The first masks, of the weights that the run begins with; a checkpoint has its own."""
        given = state.get("model", {})
        for name, layer in self._layers(run).items():
            if f"{name}.{self.name}.mask" not in given:
                mask_of(layer).choose(given.get(f"{name}.weight", layer.weight))
        return state

    def step(self, step: Step, run: Run) -> Step:
        """Decay before the update, masks after it."""
        layers = self._layers(run)

        def masked() -> bool:
            for layer in layers.values() if self.decay else ():
                if layer.weight.grad is not None:
                    unused = layer.weight.detach() * ~mask_of(layer).mask
                    layer.weight.grad.add_(unused, alpha=self.decay)
            updated = step()
            changed = 0.0
            if updated and (run.clock.step + 1) % self.every == 0:
                moved = torch.stack([mask_of(layer).choose(layer.weight) for layer in layers.values()]).sum()
                changed = run.read(moved, worst=float(sum(layer.weight.numel() for layer in layers.values())))
            run.log(self, changed=changed)
            return updated

        return masked

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Masked, and without the masks."""
        plain = dict(named)
        for name in self._layers(run):
            mask = plain.pop(f"{name}.{self.name}.mask")
            plain[f"{name}.weight"] = plain[f"{name}.weight"] * mask.to(plain[f"{name}.weight"].device)
        return plain

    def _layers(self, run: Run) -> dict[str, Linear]:
        """Those of this technique's pattern that have a mask."""
        return {name: layer for name, layer in linears(run.model, self.targets).items() if hasattr(layer, self.name)}


class Mask(nn.Module):
    """weight -> the part of it that is used.

    Attributes:
        mask: bool [outputs, inputs].
    """

    mask: Tensor

    def __init__(self, weight: Tensor, both: bool) -> None:
        super().__init__()
        self.both = both
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def refill(self) -> None:
        """Everything is used until a choice is made."""
        self.mask.fill_(True)

    @torch.no_grad()
    def choose(self, weight: Tensor) -> Tensor:
        """Choose by a weight; returns how many entries changed."""
        score = weight.detach().abs().to(self.mask.device)
        chosen = transposable(score.float()) if self.both else of_groups(score, Pattern.parse("2:4"))
        changed = (chosen != self.mask).sum()
        self.mask.copy_(chosen)
        return changed

    def forward(self, weight: Tensor) -> Tensor:
        return _Straight.apply(weight, self.mask)


def mask_of(layer: Linear) -> Mask:
    """The mask of a layer that has one."""
    return layer.get_submodule("two_four")  # type: ignore[return-value]


class _Straight(Function):
    """Masked forward; the gradient goes through as if there were no mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g, None


class Product:
    """y = x W^T + b by sparse tensor cores where they take it, else as it is.

    Args:
        both: whether W^T is 2:4 too.
    """

    def __init__(self, both: bool) -> None:
        self.both = both

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            half = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(half), weight.to(half), None if bias is None else bias.to(half)
        if not fast(weight):
            return F.linear(x, weight, bias)
        y = _Sparse.apply(x.reshape(-1, x.shape[-1]), weight, self.both).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


def fast(weight: Tensor) -> bool:
    """Whether this is a weight that torch has sparse kernels for: 16 bits, whole tiles, compute capability 8.0 on."""
    whole = all(size % 64 == 0 for size in weight.shape) and weight.dtype in (torch.float16, torch.bfloat16)
    if not whole or weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    try:
        from torch.sparse import to_sparse_semi_structured
    except ImportError:
        return False
    return callable(to_sparse_semi_structured)


class _Sparse(Function):
    """x [m, k], weight [n, k] -> [m, n], and its gradients; that of the weight is a dense product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, both: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.both = both
        return sparse_product(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = sparse_product(g.contiguous(), weight.t().contiguous()) if ctx.both else g @ weight
        if ctx.needs_input_grad[1]:
            dw = g.t() @ x
        return dx, dw, None


def sparse_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by torch's kernel."""
    from torch.sparse import to_sparse_semi_structured

    return F.linear(x, to_sparse_semi_structured(weight.detach().contiguous()))
