"""Activation compressed training: what the backward pass needs is kept in a few bits.

    kept:      q = floor((x - low) / scale + u),   scale = (max - low) / (2^bits - 1) of each 256 numbers, u in [0, 1)
    backward:  x' = low + scale q,   E[x'] = x
    bytes a number:  bits / 8 + 1 / 64             against 4 in float32: 7.5 times less at 4 bits

The forward pass is exact. Papers: Chen et al., "ActNN: Reducing Training Memory Footprint via 2-Bit Activation
Compressed Training", ICML 2021, arXiv 2104.14129; for any network, by what is saved rather than by layer: Liu et al.,
"GACT: Activation Compressed Training for Generic Network Architectures", ICML 2022, arXiv 2206.11357; Transformers:
Pan et al., "Mesa", arXiv 2111.11124.

`average` gives the tensors of a block bits of their own: after `measure`, one backward pass for each saved tensor finds
how much its rounding disturbs the gradient, and 8, 4, 2 or 1 bits are dealt out so that the sum of
sensitivity / (2^bits - 1)^2 is least while the average stays within the budget.

Saves: activations of the blocks; gradients stay right on average where the backward pass is linear in what it kept (the
weights of linear layers), and nearly so in norms, activations and attention. Costs: passes over every kept tensor, and
noise in gradients, which falls fourfold with each bit. Not for: memory that is taken by weights, states or logits, and
2 bits without a check of the loss. Statistics of norms and of attention, integers and weights are kept as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.models.seams import blocks, matching
from scrimp.numerics.allocation import allocate
from scrimp.numerics.blocks import dequantize, quantize
from scrimp.numerics.rounding import contents
from scrimp.saved import treat
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run

SMALL = 8
"""A tensor with less than this part of the numbers of a block's input is a statistic."""


@dataclass(frozen=True, kw_only=True)
class Act(Technique):
    """Activation compressed training: what the backward pass needs is kept in a few bits."""

    card = Card(
        paper="arXiv:2104.14129",
        section="Quantized training",
        claim="12 times less memory for activations at 2 bits a number (README of the paper's code)",
        saves="activations of blocks: 7.5 times fewer bytes at 4 bits",
        costs="passes over every kept tensor, and noise in gradients",
        sets=("activation compression",),
        phase={"wrap": "saved"},
        example={"bits": 4},
        remedies=({"bits": 8}, {"bits": 4}),
    )
    bits: Literal[2, 4, 8] = 4
    """Of each kept number; with `average`, until sensitivities are measured."""
    average: float = 0.0
    """Average bits of a number, dealt out by measured sensitivity; 0 gives all tensors `bits`."""
    measure: str | float = "20 step"
    """When sensitivities are measured; read with `average` only."""
    blocks: str = ""
    """Pattern of the modules to treat; empty means the model's blocks."""

    def __post_init__(self) -> None:
        if self.average and not 1 <= self.average <= 8:
            raise UserError(f"average must be 0, or from 1 to 8, not {self.average}.")

    def stages(self) -> tuple[str | float, ...]:
        """The measurement, if there is one."""
        return (self.measure,) if self.average else ()

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Compression of what the chosen blocks save."""
        if self.average and run.world.ranks("pipeline") > 1:
            what = "sensitivities are measured with the whole model, of which a rank holds a part."
            raise UserError(what, run.where(self, "average"), "Leave it out: all tensors get `bits`.")
        chosen = self._chosen(model, run)
        if self.average and run.clock.at(self.measure) >= run.clock.end:
            run.remarks.append(f"act keeps all tensors in {self.bits} bits: the run ends before sensitivities are "
                               "measured. Lower its `measure`.")  # fmt: skip
        shelf = Shelf(self.bits, run.decisions.get(run.order.key(self), {}).get("bits", {}),
                      generator(run.seed, "act").initial_seed())  # fmt: skip
        for number, module in enumerate(chosen):
            module.register_forward_pre_hook(Opening(shelf, number), with_kwargs=True)
        treat(chosen, "compress", shelf.pack, dequantized)
        return model

    def decide(self, last: Run) -> dict[str, Any]:
        """Bits of each kept tensor, when the measurement is due."""
        before = last.decisions.get(last.order.key(self), {})
        if not self.average or before or last.clock.position < last.clock.at(self.measure):
            return before
        shelf = shelf_of(self._chosen(last.model, last)[0])
        sensitivity = sensitivities(last, shelf)
        chosen = allocate({name: (shelf.sizes[name], found) for name, found in sensitivity.items()}, self.average)
        return {"bits": chosen}

    def _chosen(self, model: nn.Module, run: Run) -> list[nn.Module]:
        if not self.blocks:
            return list(blocks(model, run.where(self)).values())
        modules = dict(model.named_modules())
        found = matching(self.blocks, [n for n in modules if n], "module", run.where(self, "blocks"))
        return [modules[name] for name in found]


class Shelf:
    """Which tensor of which block gets how many bits. Tensors of a block are numbered in the order they are saved.

    Args:
        chosen: "block.number" -> bits, of those that do not get `bits`.
        salt: of the noise.
    """

    def __init__(self, bits: int, chosen: dict[str, int], salt: int) -> None:
        self.bits, self.chosen, self.salt = bits, chosen, salt
        self.sizes: dict[str, int] = {}
        """Numbers of each tensor, of the last forward pass."""
        self.next: dict[int, int] = {}
        self.least: dict[int, int] = {}
        self.given: dict[int, set[int]] = {}
        self.masks: dict[int, set[int]] = {}
        self.alone = ""
        """While sensitivities are measured: the only tensor that is compressed; "-" for none."""

    def open(self, number: int, tensors: list[Tensor]) -> None:
        """Begin the count of a block's tensors anew; it gets these."""
        self.next[number], self.least[number] = 0, tensors[0].numel() // SMALL
        # Angles, masks and states come from outside, and other blocks need them too.
        self.given[number] = {storage(t) for t in tensors[1:]}
        # Kernels make numbers of boolean masks, with minus infinity among them, and save those.
        self.masks[number] = {t.numel() for t in tensors[1:] if t.dtype == torch.bool}

    def pack(self, tensor: Tensor, number: int) -> Any:
        """What is kept of a tensor: codes, scales, lows and their grid; or the tensor itself."""
        activation = tensor.is_floating_point() and tensor.element_size() >= 2
        outside = storage(tensor) in self.given[number] or tensor.numel() in self.masks[number]
        if not activation or outside or tensor.numel() <= self.least[number]:
            return tensor
        name = f"{number}.{self.next[number]}"
        self.next[number] += 1
        self.sizes[name] = tensor.numel()
        if self.alone and name != self.alone:
            return tensor
        bits = 2 if self.alone else self.chosen.get(name, self.bits)
        return quantize(tensor, bits, contents(tensor, self.salt))


@dataclass(frozen=True)
class Opening:
    """A hook before a block's forward pass."""

    shelf: Shelf
    number: int

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.shelf.open(self.number, [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)])


def dequantized(kept: Any) -> Tensor:
    """What the backward pass gets."""
    return dequantize(*kept)


def storage(tensor: Tensor) -> int:
    """What identifies a tensor's memory while it lives."""
    return tensor.untyped_storage()._cdata


def shelf_of(module: nn.Module) -> Shelf:
    """The shelf whose hook a treated module has."""
    return next(hook.shelf for hook in module._forward_pre_hooks.values() if isinstance(hook, Opening))


def sensitivities(run: Run, shelf: Shelf) -> dict[str, float]:
    """Squared difference that each kept tensor's rounding to 2 bits makes to the gradient, times (2^2 - 1)^2."""
    weights = [p for p in run.model.parameters() if p.requires_grad]
    batch = run.batch(run.clock.step)
    count = run.task.count(batch)

    def gradient(alone: str) -> list[Tensor]:
        shelf.alone = alone
        assert run.loss is not None
        found = torch.autograd.grad(run.loss(run.model, batch) / count, weights, allow_unused=True)
        return [g for g in found if g is not None]

    exact = gradient("-")
    names, planned = list(shelf.sizes), any(isinstance(p, FakeTensor) for p in weights)

    def moved(name: str) -> float:
        pairs = zip(gradient(name), exact, strict=True)
        return 9 * sum(run.read((a - b).double().square().sum(), worst=1.0) for a, b in pairs)

    # While planning, the largest shows what each needs.
    tried = sorted(names, key=lambda n: -shelf.sizes[n])[:1] if planned else names
    found = {name: moved(name) for name in tried}
    shelf.alone = ""
    return dict.fromkeys(names, 1.0) if planned else found
