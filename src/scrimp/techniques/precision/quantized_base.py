"""QLoRA's base: frozen weights in four bits, made whole one layer at a time.

    y = x unpack(w)^T + b         dx = dy unpack(w)          w: 4.127 bits a weight, never trained

A layer's weight exists in full only while the layer runs, forward and again backward; it is not kept in between. What
tuning methods add, such as LoRA's factors, stays as it is and learns what is lost too. Paper: Dettmers et al., "QLoRA:
Efficient Finetuning of Quantized LLMs", NeurIPS 2023, arXiv 2305.14314. The numbers are explained in `numerics/nf4.py`.

Saves: seven eighths of the memory of frozen weights in float32, three quarters in bfloat16. Costs: unpacking a layer
twice a step; an error of the weights, of about a tenth of their size. Not for: training from scratch, or tuning all
weights; layers whose weights are shared, such as a tied head.

Weights of a checkpoint are packed one by one as they come. Without a tuning method, what is not packed is trained.
Export gives the weights as the run used them, unpacked, with what others merge into them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.models.seams import linears, matches
from scrimp.numerics import nf4
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import State


@dataclass(frozen=True, kw_only=True)
class QuantizedBase(Technique):
    """Frozen weights in four bits."""

    card = Card(
        paper="arXiv:2305.14314",
        section="Quantized training",
        saves="seven eighths of the memory of frozen weights in float32",
        costs="unpacking each layer twice a step; an error of the weights",
        scope="targets",
        refuses={
            "sparsity": "Masks and scores are of weights that are trained, and packed ones are not.",
            "width schedule": "Packed weights are as wide as they are.",
            "initialization": "It fills or scales weights that are given and packed.",
            "shared blocks": "Shared weights are trained; export them, and pack the export.",
        },
        phase={"model": "frozen", "init": "packed", "carry": "packed", "export": "packed"},
        whole="weights are packed whole.",
        example={"targets": "attention.*"},
        remedies=({},),
    )
    targets: str = "attention.*|mlp.*"
    """Pattern of the linear layers whose weights are packed."""
    double: bool = True
    """Whether the scales are quantized too: 4.127 bits a weight instead of 4.5."""

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Give each matching layer a packed weight under the same name."""
        self._check(model, run)
        for layer in self._layers(model, run).values():
            given = None if layer.weight.is_meta else layer.weight.detach()
            layer.nf4 = Packed(layer.weight, self.double)
            layer.weight = layer.nf4.codes_of(layer.weight)
            if given is not None:
                layer.nf4.fill(layer.weight, given)
            if layer.on_weight or layer.product is not F.linear:
                # Other steps want the weight itself; it is then kept until the backward pass.
                layer.on_weight.insert(0, (-1, "nf4"))
            else:
                layer.product = partial(_product, layer.nf4)
        return model

    def init(self, model: nn.Module, run: Run) -> nn.Module:
        """The weights that the layers would have begun with; only of a run that starts from none do they remain."""
        if run.task is None:
            return model
        for name, layer in self._layers(model, run).items():
            if not isinstance(layer.weight, FakeTensor):
                value = torch.empty(layer.nf4.shape)
                layer.initialize("weight", value, generator(run.seed, f"{name}.weight"))
                layer.nf4.fill(layer.weight, value)
        return model

    def carry(self, state: State, run: Run) -> State:
        """Pack weights that come in full; a checkpoint of this run has them packed."""
        given = dict(state.get("model", {}))
        for name, layer in self._layers(run.model, run).items():
            weight = given.get(f"{name}.weight")
            if weight is not None and weight.is_floating_point() and weight.shape == layer.nf4.shape:
                kept = nf4.pack(weight.to(layer.weight.device), self.double)
                given |= zip((f"{name}.weight", f"{name}.nf4.scales", f"{name}.nf4.factors"), kept, strict=True)
        return {**state, "model": given} if given else state

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """The weights in full."""
        plain = dict(named)
        for name, layer in self._layers(run.model, run).items():
            plain[f"{name}.weight"] = layer.nf4(plain[f"{name}.weight"])
            del plain[f"{name}.nf4.scales"], plain[f"{name}.nf4.factors"]
        return plain

    def _check(self, model: nn.Module, run: Run) -> None:
        """Whether the matching layers can be packed.

        Raises:
            UserError: naming one whose weight is shared or trained, or has an odd number of inputs; if there is none.
        """
        where = run.where(self, "targets")
        counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        for name, layer in linears(model, self.targets, where).items():
            if counts[id(layer.weight)] > 1:
                raise UserError(f"the weight of `{name}` is shared with another layer.", where, "Leave it out.")
        # What a task trains, such as a new head, only matters where tuning methods freeze the rest.
        tuned = [(f"`{t.name}`", pattern) for t in run.order.techniques for pattern in t.trained]
        task = [("the task", pattern) for pattern in getattr(run.task, "trains", ())] if tuned else []
        layers = self._layers(model, run)
        if not layers:
            raise UserError(f"`{self.targets}` matches no layer of the model's own.", where, "Name some that it has.")
        for name, layer in layers.items():
            if layer.weight.shape[1] % 2:
                what = f"`{name}` has {layer.weight.shape[1]} inputs, and two weights share a byte."
                raise UserError(what, where, "Leave it out.")
            for other, pattern in [*tuned, *task]:
                if matches(pattern, f"{name}.weight"):
                    raise UserError(f"{other} trains the weight of `{name}`.", where, "Leave it out, or drop one.")

    def _layers(self, model: nn.Module, run: Run) -> dict[str, Any]:
        """The matching layers of the original architecture; none that another technique added."""
        found = linears(model, self.targets, run.where(self, "targets"))
        return {name: layer for name, layer in found.items() if f"{name}.weight" in run.base}


class Packed(nn.Module):
    """codes -> the weight [out, in]; holds what the codes need beside them.

    Args:
        like: of the weight's shape, type and device.
        double: whether scales are quantized too.
    """

    def __init__(self, like: Tensor, double: bool) -> None:
        super().__init__()
        self.shape, self.dtype, self.doubled = tuple(like.shape), like.dtype, double
        scales, factors = nf4.sizes(like.numel(), double)
        self.scales, self.factors = (_frozen(like, (size,)) for size in (scales, factors))

    def codes_of(self, like: Tensor) -> nn.Parameter:
        """Room for the codes [out, in / 2], on the device of a tensor."""
        return _frozen(like, (self.shape[0], self.shape[1] // 2))

    @torch.no_grad()
    def fill(self, codes: Tensor, weight: Tensor) -> None:
        """Pack a weight into the codes and what is kept beside them."""
        for own, value in zip((codes, self.scales, self.factors), nf4.pack(weight, self.doubled), strict=True):
            own.copy_(value)

    def forward(self, codes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return nf4.unpack(codes.detach(), self.scales, self.factors, dtype or self.dtype)


class PackedProduct(torch.autograd.Function):
    """x W^T + b with W unpacked in both directions. Shapes: x [..., in], bias [out] -> [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Packed, codes: Tensor) -> Tensor:
        ctx.packed, ctx.codes = packed, codes
        ctx.bias = bias is not None and ctx.needs_input_grad[1]
        return F.linear(x, packed(codes, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        into = grad @ ctx.packed(ctx.codes, grad.dtype) if ctx.needs_input_grad[0] else None
        return into, grad.flatten(0, -2).sum(0) if ctx.bias else None, None, None


def _product(packed: Packed, x: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer with packed weights, in the type in which it would multiply."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        half = torch.get_autocast_dtype(kind)
        x, bias = x.to(half), None if bias is None else bias.to(half)
    run: Callable[..., Tensor] = PackedProduct.apply  # type: ignore[assignment]
    return run(x, bias, packed, codes)


def _frozen(like: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(like.new_zeros(shape, dtype=torch.uint8), requires_grad=False)
