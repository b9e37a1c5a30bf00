"""How a model grows in width between stages: layers are narrowed, and copies of their units widen them again.

A stage's model is the recipe's with narrower layers. At a boundary the shapes in the state that the last stage left are
compared with the model's, and what is missing is made of copies; a resume within a stage finds all in place.

A width is counted in units: hidden units of an MLP, or key/value heads with the queries that share them. Unit j of the
wider layer is a copy of unit j mod h of the one with h, and what leads out of it is divided by the number of copies:

    up'[j, :] = up[j mod h, :]          down'[:, j] = down[:, j mod h] / copies(j mod h) + noise

so that the function stays (Net2Net, Chen et al., arXiv 1511.05641). Copies that are alike get the same gradients and
would stay alike for ever; the noise keeps them apart. It sums to zero over the copies of a unit, hence the function
stays with it as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.models.seams import Linear, blocks
from scrimp.sharding import shape

if TYPE_CHECKING:
    from scrimp.technique import State


@dataclass(frozen=True)
class Side:
    """A layer whose rows (dim 0) lead into units, or whose columns (dim 1) lead out of them."""

    layer: str
    dim: int
    sizes: tuple[int, ...]
    """Rows of a unit in each section of the layer, such as those of queries, of keys and of values."""


@dataclass(frozen=True)
class Units:
    """A module's units and the layers on their two sides."""

    path: str
    count: int
    sides: tuple[Side, ...]


def hidden_units(model: nn.Module, where: str = "") -> list[Units]:
    """The MLPs in the blocks: modules with `up`, `down` and maybe `gate`.

    Raises:
        UserError: if there is none.
    """
    found: list[Units] = []
    for path, module in _inside(model, where):
        if _linear(module, "up") and _linear(module, "down"):
            into = [name for name in ("up", "gate") if _linear(module, name)]
            sides = [Side(f"{path}.{name}", 0, (1,)) for name in into] + [Side(f"{path}.down", 1, (1,))]
            found.append(Units(path, shape(module.get_parameter("up.weight"))[0], tuple(sides)))
    return _some(found, "MLPs with layers `up` and `down`", where)


def head_units(model: nn.Module, where: str = "") -> list[Units]:
    """The attention of the blocks, in key/value heads, each with the queries' heads that share it.

    Raises:
        UserError: if there is none.
    """
    found: list[Units] = []
    for path, module in _inside(model, where):
        joint, apart = _linear(module, "qkv"), _linear(module, "q") and _linear(module, "kv")
        if not ((joint or apart) and _linear(module, "proj")):
            continue
        own: Any = module
        width, count = int(own.width), int(own.kv_heads)
        queries = width * (int(own.heads) // count)
        first = module.get_parameter("qkv.weight" if joint else "q.weight")
        # Of a cut layer the module knows this rank's heads.
        count *= shape(first)[0] // max(1, len(first))
        into = {"qkv": (queries, width, width)} if joint else {"q": (queries,), "kv": (width, width)}
        sides = [Side(f"{path}.{name}", 0, sizes) for name, sizes in into.items()]
        found.append(Units(path, count, (*sides, Side(f"{path}.proj", 1, (queries,)))))
    return _some(found, "attention with layers `qkv` (or `q` and `kv`) and `proj`", where)


def narrow(model: nn.Module, units: Units, count: int) -> None:
    """Make a module of the model narrower. Weights are new, and empty."""
    module = model.get_submodule(units.path)
    for side in units.sides:
        layer = model.get_submodule(side.layer)
        for name, p in list(layer.named_parameters(recurse=False)):
            if p.ndim > side.dim:
                shape = [*p.shape]
                shape[side.dim] = count * sum(side.sizes)
                setattr(layer, name, nn.Parameter(p.new_empty(shape), p.requires_grad))
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
    if hasattr(module, "kv_heads"):
        module.heads, module.kv_heads = module.heads // units.count * count, count  # type: ignore[operator, assignment]


@dataclass(frozen=True)
class Wider:
    """One side of units that have become more."""

    side: Side
    old: int
    new: int

    @property
    def size(self) -> int:
        """Rows or columns before."""
        return self.old * sum(self.side.sizes)

    def index(self) -> list[int]:
        """Row or column before of each one after."""
        found: list[int] = []
        first = 0
        for size in self.side.sizes:
            for j in range(self.new):
                start = first + j % self.old * size
                found += range(start, start + size)
            first += self.old * size
        return found


def widened(state: State, units: list[Units], seed: int, noise: float, where: str = "") -> State:
    """A state with copies for the units that it does not have.

    Moments are those that the wider model would have had with the same function: a gradient of what leads into a unit
    is shared by its copies, so that its average is divided by their number and that of its square by the number's
    square; a gradient of what leads out is the same for every copy. Averages of weights are treated like weights, masks
    are copied. A state of another shape than its weight's begins anew.

    Args:
        units: the model's own.
        noise: of what leads out of copies, as a share of its standard deviation.
    Raises:
        UserError: if the state has more units than the model.
    """
    given = state.get("model", {})
    wider: dict[str, Wider] = {}
    for group in units:
        first = group.sides[0]
        weight = given.get(f"{first.layer}.weight")
        old = 0 if weight is None else weight.shape[first.dim] // sum(first.sizes)
        if old > group.count:
            what = f"the weights to start from have {old} units in `{group.path}`, this stage has {group.count}."
            raise UserError(what, where, "Start with as many, or from a smaller model.")
        if 0 < old < group.count:
            wider |= {side.layer: Wider(side, old, group.count) for side in group.sides}
    if not wider:
        return state
    dropped = _strange(state, wider)
    grown: State = {}
    for kind, tensors in state.items():
        kept = {n: t for n, t in tensors.items() if not (kind.startswith("optimizer.") and n in dropped)}
        grown[kind] = {n: _spread(kind, n, t, _owner(n, wider), seed, noise) for n, t in kept.items()}
    return grown


def _owner(name: str, wider: Mapping[str, Wider]) -> Wider | None:
    """The layer that a tensor is in."""
    parts = name.split(".")
    return next((wider[p] for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in wider), None)


def _strange(state: State, wider: Mapping[str, Wider]) -> set[str]:
    """Parameters of the wider layers with a moment that is neither one number nor of their shape."""
    given = state["model"]
    return {
        name
        for kind, tensors in state.items()
        if kind.startswith("optimizer.")
        for name, t in tensors.items()
        if _owner(name, wider) is not None and t.numel() > 1 and name in given and t.shape != given[name].shape
    }


@torch.no_grad()
def _spread(kind: str, name: str, tensor: Tensor, wider: Wider | None, seed: int, noise: float) -> Tensor:
    if wider is None or tensor.ndim <= wider.side.dim or tensor.shape[wider.side.dim] != wider.size:
        return tensor
    dim, index = wider.side.dim, wider.index()
    place = torch.tensor(index, device=tensor.device)
    spread = tensor.index_select(dim, place)
    if not tensor.is_floating_point():
        return spread
    counts = Counter(index)
    copies = torch.tensor([float(counts[i]) for i in index], dtype=tensor.dtype, device=tensor.device)
    copies = copies.view([-1 if d == dim else 1 for d in range(tensor.ndim)])
    if kind.startswith("optimizer."):
        moment = kind.removeprefix("optimizer.")
        return spread / copies ** (2 if "sq" in moment else 1) if dim == 0 else spread
    if dim == 0 or not name.endswith(f"{wider.side.layer}.weight"):
        return spread
    spread = spread / copies
    if noise and not isinstance(tensor, FakeTensor):
        spread += _apart(tuple(spread.shape), place, seed, name).to(spread) * (
            noise * tensor.std(correction=0) / copies
        )
    return spread


def _apart(shape: tuple[int, ...], place: Tensor, seed: int, name: str) -> Tensor:
    """Normal numbers for columns, whose sum over the copies of a column is zero."""
    place = place.cpu()
    drawn = torch.empty(shape, dtype=torch.float64).normal_(generator=generator(seed, f"widen {shape[1]} {name}"))
    ones = torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add_(0, place, torch.ones(len(place)).double())
    sums = torch.zeros(shape[0], len(ones), dtype=torch.float64).index_add_(1, place, drawn)
    return drawn - (sums / ones).index_select(1, place)


def _inside(model: nn.Module, where: str) -> list[tuple[str, nn.Module]]:
    """Every module of the blocks, by path; shared ones once."""
    found = {f"{name}.{inner}" if inner else name: module
             for name, block in blocks(model, where).items() for inner, module in block.named_modules()}  # fmt: skip
    return list({id(module): (name, module) for name, module in reversed(found.items())}.values())[::-1]


def _linear(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), Linear | nn.Linear)


def _some(found: list[Units], what: str, where: str) -> list[Units]:
    if not found:
        raise UserError(f"the blocks have no {what}.", where, "Use the house Transformer, or drop it.")
    return found


def rounded(share: float, whole: int, multiple: int) -> int:
    """A share of a width, rounded up to a multiple, at most the whole."""
    return min(whole, multiple * math.ceil(share * whole / multiple - 1e-9))
