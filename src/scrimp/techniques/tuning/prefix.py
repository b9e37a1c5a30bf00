"""Prefix tuning: trained keys and values that every token of every layer sees, the model itself frozen.

    y = attention(q, [K, k], [V, v])        K and V [heads, length, D] trained, others in each layer

    K, V free                               encoder: none, P-tuning v2
    K, V = W tanh(U E + a) + b              encoder: mlp, prefix tuning: one E [length, C] and U for all layers

Papers: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021, arXiv 2101.00190; Liu et
al., "P-Tuning v2", ACL 2022, arXiv 2110.07602. The encoder only helps training: export drops it and keeps K and V.

Saves: gradients and states of all weights of the model, and disk: 2 * layers * length * C numbers are all that a task
needs. Costs: `length` more keys in every attention, and as many idle queries where it is causal, so that torch's fast
kernel does the masking. Not for: memory taken by activations, which stay, as gradients go through all blocks; tasks of
few steps, since what the prefix begins with is far from anything the model knows.

Prefixes have no positions: keys are not rotated, and no learned position is added. With `shift`, tokens stand `length`
places further right, as other libraries have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.seams import matching
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run

ROOT = "prefix_root"
"""Name of the part of the encoder that all layers share."""


@dataclass(frozen=True, kw_only=True)
class Prefix(Technique):
    """Trained keys and values before those of the tokens."""

    card = Card(
        paper="arXiv:2101.00190",
        section="Parameter-efficient tuning",
        saves="gradients and states of the model's weights, and disk",
        costs="`length` more keys in every attention",
        sets=("prefixes",),
        scope="targets",
        trains=("*.prefix.*|prefix_root.*",),
        phase={"model": "seams", "export": "merged"},
        example={"length": 2},
    )
    length: int = 20
    """Keys and values a layer and head."""
    targets: str = "*attention"
    """Pattern of the attentions that get some."""
    encoder: Literal["none", "mlp"] = "none"
    """mlp: they are outputs of a network that is dropped after training."""
    hidden: int = 512
    """Width of the encoder's hidden layer."""
    std: float = 0.02
    """Standard deviation of first values, of free ones or of the encoder's inputs."""
    shift: bool = False
    """Whether tokens stand `length` places further right; learned positions must have rows for that."""

    def __post_init__(self) -> None:
        at_least(1, self, "length", "hidden")
        at_least(0, self, "std")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Give each matching attention its keys and values."""
        chosen: dict[str, Any] = self._attentions(model, run)
        root = None
        if self.encoder == "mlp":
            if hasattr(model, ROOT):
                raise UserError(
                    "the model already has a prefix with an encoder.", run.where(self, "encoder"), "Use one."
                )
            like = next(iter(chosen.values())).qkv.weight
            root = Root(self.length, like, self.hidden, self.std)
            model.add_module(ROOT, root)
        for attention in chosen.values():
            shape = (2, attention.kv_heads, self.length, attention.width)
            like = attention.qkv.weight.new_empty(shape)
            attention.prefix = KeysValues(like, self.std) if root is None else Encoded(shape, root)
        if self.shift:
            self._move(model, run)
        return model

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """The keys and values that the encoder gives, without it."""
        if self.encoder == "none":
            return named
        own = self._attentions(run.model, run)
        dropped = (f"{ROOT}.", *(f"{name}.prefix." for name in own))
        plain = {n: t for n, t in named.items() if not n.startswith(dropped)}
        with torch.no_grad():
            return plain | {f"{name}.prefix.weight": a.prefix().detach() for name, a in own.items()}

    def _attentions(self, model: nn.Module, run: Run) -> dict[str, Any]:
        """Modules with the seam, by name.

        Raises:
            UserError: if the pattern matches none.
        """
        found = {name: m for name, m in model.named_modules() if hasattr(m, "prefix") and hasattr(m, "kv_heads")}
        return {name: found[name] for name in matching(self.targets, list(found), "attention", run.where(self))}

    def _move(self, model: nn.Module, run: Run) -> None:
        """Let the tokens stand further right."""
        nets: list[Any] = [m for m in model.modules() if hasattr(m, "shift") and hasattr(m, "room")]
        if not nets:
            what = f"the tokens of {type(model).__name__} have no places that could be shifted."
            raise UserError(what, run.where(self, "shift"), "Leave it out.")
        for net in nets:
            room = net.config.context - getattr(getattr(run.data, "train", None), "context", 0)
            if net.positions is not None and room < net.shift + self.length:
                what = f"the learned positions have room for {max(room, 0)} places beside the data's tokens."
                fix = "Lower `data.context`, raise `model.context`, or set `shift: false`."
                raise UserError(what, run.where(self, "shift"), fix)
            net.shift += self.length


class KeysValues(nn.Module):
    """() -> trained keys and values [2, K, P, D].

    Args:
        like: of their shape, type and device.
    """

    def __init__(self, like: Tensor, std: float) -> None:
        super().__init__()
        self.std, self.weight = std, nn.Parameter(like)

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Normal."""
        value.normal_(0.0, self.std, generator=generator)

    def forward(self) -> Tensor:
        return self.weight


class Root(nn.Module):
    """() -> tanh(U E + a), [P, hidden]: what all layers' keys and values are made of."""

    def __init__(self, length: int, like: Tensor, hidden: int, std: float) -> None:
        super().__init__()
        width = like.shape[1]
        self.std = std
        self.weight = nn.Parameter(like.new_empty(length, width))
        self.up = nn.Parameter(like.new_empty(hidden, width))
        self.up_bias = nn.Parameter(like.new_empty(hidden))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Normal; the matrix by its number of inputs."""
        std = {"weight": self.std, "up": value.shape[-1] ** -0.5, "up_bias": 0.0}[name]
        value.normal_(0.0, std, generator=generator)

    def forward(self) -> Tensor:
        return torch.tanh(F.linear(self.weight, self.up, self.up_bias))


class Encoded(nn.Module):
    """() -> a layer's keys and values [2, K, P, D], one linear layer after the root.

    The root belongs to the model, and is run once a layer: it is small, and a layer that is recomputed needs nothing
    that an earlier one left. No `Linear`, which other techniques' patterns of layers would find.
    """

    def __init__(self, shape: tuple[int, ...], root: Root) -> None:
        super().__init__()
        self.shape = shape
        self.root = (root,)  # in a tuple, so that its parameters keep one name
        both, heads, _, width = shape
        self.weight = nn.Parameter(root.up.new_empty(both * heads * width, len(root.up)))
        self.bias = nn.Parameter(root.up.new_empty(both * heads * width))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Normal, by the number of inputs; no bias."""
        value.normal_(0.0, 0.0 if name == "bias" else value.shape[1] ** -0.5, generator=generator)

    def forward(self) -> Tensor:
        both, heads, length, width = self.shape
        made = F.linear(self.root[0](), self.weight, self.bias)
        return made.view(length, both, heads, width).permute(1, 2, 0, 3)
