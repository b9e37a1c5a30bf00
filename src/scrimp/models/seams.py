"""The few places on a model where techniques meet. They meet here, never on each other.

`Linear` has five seams: its input, its weight and its bias on the way in, the product itself, and its output. So
low-rank updates, masks, quantization and scales can share one layer. Names of parameters never change: a seam only adds
children.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError, did_you_mean, nearest

INPUT: Final = ("scale",)
"""Order in which steps on an input run."""
WEIGHT: Final = ("expand", "scale", "low-rank", "mask", "quantize")
"""Order in which steps on a weight run."""
BIAS: Final = ("scale",)
"""Order in which steps on a bias run."""
OUTPUT: Final = ("scale", "shift", "adapter", "gate")
"""Order in which steps on an output run."""


class Linear(nn.Module):
    """y = x W^T + b, with seams.

    Shapes: x [..., inputs], weight [outputs, inputs], bias [outputs], y [..., outputs].

    Args:
        std: standard deviation of the initial weights.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, std: float = 0.02) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.on_input: list[tuple[int, str]] = []
        self.on_weight: list[tuple[int, str]] = []
        self.on_bias: list[tuple[int, str]] = []
        self.on_output: list[tuple[int, str]] = []
        self.product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear

    @classmethod
    def of(cls, layer: nn.Linear) -> Linear:
        """The same layer with seams, around the same parameters."""
        new = cls(0, 0, bias=False)
        new.weight, new.bias = layer.weight, layer.bias
        new.training = layer.training
        return new

    def on(self, seam: str, phase: str, name: str, step: nn.Module) -> None:
        """Add a step: `input`, `weight` and `bias` steps map a tensor to another, `output` steps map (x, y) -> y.

        A step on the bias is not called where there is none. x of an output's step is what the product got.

        Raises:
            UserError: if the layer already has a child of that name.
        """
        if name in self._modules:
            raise UserError(f"a layer already has a `{name}`.", "", "Give the two techniques disjoint patterns.")
        steps, phases = {
            "input": (self.on_input, INPUT),
            "weight": (self.on_weight, WEIGHT),
            "bias": (self.on_bias, BIAS),
            "output": (self.on_output, OUTPUT),
        }[seam]
        self.add_module(name, step)
        steps.append((phases.index(phase), name))
        steps.sort()

    def weight_before(self, step: str) -> Tensor:
        """The weight as a step on it gets it: after all steps before."""
        weight: Tensor = self.weight
        for _, name in self.on_weight:
            if name == step:
                break
            weight = self._modules[name](weight)  # pyright: ignore[reportOptionalCall]
        return weight

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Fill one of the layer's own parameters."""
        if name == "bias":
            value.zero_()
        else:
            value.normal_(0.0, self.std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        for _, name in self.on_input:
            x = self._modules[name](x)  # pyright: ignore[reportOptionalCall]
        for _, name in self.on_weight:
            weight = self._modules[name](weight)  # pyright: ignore[reportOptionalCall]
        for _, name in self.on_bias if bias is not None else ():
            bias = self._modules[name](bias)  # pyright: ignore[reportOptionalCall]
        y = self.product(x, weight, bias)
        for _, name in self.on_output:
            y = self._modules[name](x, y)  # pyright: ignore[reportOptionalCall]
        return y


class CrossEntropy(nn.Module):
    """Head and loss: hidden states to the summed cross entropy. Materializes the logits; techniques replace it."""

    def forward(self, hidden: Tensor, head: nn.Module, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Summed loss of hidden [B, T, C] against targets [B, T]; targets of -100 do not count."""
        logits = head(hidden).flatten(0, -2)
        return F.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=smoothing)


def matching(pattern: str, names: list[str], what: str, where: str = "") -> list[str]:
    """The names that a pattern matches: `*` matches across dots, `|` separates alternatives, `.` parts may be a suffix.

    Raises:
        UserError: if it matches none, with the nearest names. A technique that hits nothing is a mistake.
    """
    found = [name for name in names if matches(pattern, name)]
    if not found:
        raise UserError(f"`{pattern}` matches no {what}.", where, _nearest_names(pattern.split("|")[0].strip(), names))
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern, read as in `matching`, matches one name."""
    parts = [part.strip() for part in pattern.split("|")]
    return any(fnmatch.fnmatchcase(name, part) or fnmatch.fnmatchcase(name, f"*.{part}") for part in parts)


def _nearest_names(word: str, names: list[str]) -> str:
    """A sentence with the whole names whose last parts are nearest; numbers of blocks are written as `*`."""
    if not names:
        return "The model has none."
    wholes = [re.sub(r"\.\d+(?=\.)", ".*", name) for name in names if name]
    ends = {".".join(whole.split(".")[-count:]): whole for count in (1, 2, 99) for whole in wholes}
    near = list(dict.fromkeys(ends[end] for end in nearest(word, ends)))
    return f"Did you mean {' or '.join(near)}?" if near else did_you_mean(word, wholes)


def linears(model: nn.Module, pattern: str, where: str = "") -> dict[str, Linear]:
    """The linear layers that a pattern matches, by name; a plain `nn.Linear` is given seams in place.

    Raises:
        UserError: if it matches none.
    """
    found = [n for n, m in model.named_modules() if isinstance(m, Linear | nn.Linear)]
    return {name: seamed(model, name) for name in matching(pattern, found, "linear layer", where)}


def seamed(model: nn.Module, name: str) -> Linear:
    """A linear layer; a plain `nn.Linear` is given seams in place."""
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Linear):
        layer = Linear.of(layer)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    assert isinstance(layer, Linear)
    return layer


def mergeable(model: nn.Module, names: Sequence[str], where: str = "") -> dict[str, Linear]:
    """Linear layers by name, where what is added to them can be merged into a weight of their own.

    Raises:
        UserError: if a layer shares its weight with another, or is never called.
    """
    named = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    chosen: dict[str, Linear] = {}
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            what = f"`{name}` is never called: nn.MultiheadAttention uses its weight directly."
            raise UserError(what, where, "Leave it out of `targets`.")
        layer = seamed(model, name)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # In evaluation its fast path uses weights directly too, unless some hook is attached.
            layer.register_forward_pre_hook(_no_change)
        if named.count(id(layer.weight)) > 1:
            fix = "Leave it out of `targets`, or untie it (`model.tied: false`)."
            raise UserError(f"the weight of `{name}` is shared with another layer.", where, fix)
        chosen[name] = layer
    return chosen


def _no_change(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    return None


def blocks(model: nn.Module, where: str = "") -> dict[str, nn.Module]:
    """The repeated blocks: the children of the model's longest `nn.ModuleList` or `nn.Sequential` of one class.

    Where other lists hold the same class, as those of a decoder and of an encoder do, their children are blocks too.

    Raises:
        UserError: if the model has none.
    """
    lists: list[dict[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            children = {f"{name}.{i}" if name else i: child for i, child in module.named_children()}
            if len({type(child) for child in children.values()}) == 1:
                lists.append(children)
    if not lists:
        raise UserError("the model has no list of blocks of one class.", where, "Use a model with an nn.ModuleList.")
    kind = type(next(iter(max(lists, key=len).values())))
    return {name: child for found in lists for name, child in found.items() if type(child) is kind}


def wrap_forward(module: nn.Module, around: Callable[[Callable[..., object]], Callable[..., object]]) -> None:
    """Run a module's forward inside `around(forward)`. Only this instance changes, and no name does."""
    module.forward = around(module.forward)  # type: ignore[method-assign]
