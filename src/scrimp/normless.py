"""Models without norms: what the initializations that replace them share.

    x <- x + branch(x)        in every block, whether its norms stood before the branches or after the sums

Taken out are the norms of the blocks and those that a stack of blocks begins and ends with. The norm in BERT's head
over hidden tokens stays, since it is in no residual stream, and so do the norms of queries and keys where they are
not asked for. Without norms the scale of the first weights matters, so that these are drawn anew, by the sizes of
each matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.groups import Multipliers, trainable
from scrimp.models.layers import MLP, Attention, CrossAttention, Embedding, Norm
from scrimp.models.seams import Linear, blocks
from scrimp.sharding import put, shape

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import State

OUTPUTS: Final = {"attention": "attention.proj", "cross": "cross.proj", "mlp": "mlp.down"}
"""Branch of a block -> its last layer."""
ENDS: Final = ("norm", "embed_norm", "pre_norm")
"""Norms that the owner of a stack of blocks has, after the last block and after the embeddings."""
Factor = Callable[[str, str], float]
"""(name of a parameter, "q", "k", "v" or "") -> what its standard first values are multiplied by."""


@dataclass(frozen=True)
class Branch:
    """A branch of a block."""

    path: str
    """Of the block in the model."""
    block: nn.Module
    kind: str
    """attention, cross or mlp."""

    @property
    def output(self) -> str:
        """Path of its last layer in the model."""
        return f"{self.path}.{OUTPUTS[self.kind]}"


@dataclass(frozen=True)
class Stack:
    """Blocks that one residual stream goes through."""

    path: str
    """Of the module that owns the list of blocks; empty for the model itself."""
    branches: tuple[Branch, ...]
    depth: int
    """Blocks."""

    @property
    def causal(self) -> bool:
        """Whether each token sees only itself and those before it, as in a decoder."""
        return bool(self.branches[0].block.get_submodule("attention").causal)


def stacks(model: nn.Module, where: str = "") -> list[Stack]:
    """The model's stacks of blocks; an encoder-decoder, a masked autoencoder and two towers have two.

    Raises:
        UserError: if the blocks are not ours, with the first seam that is missing.
    """
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, block in blocks(model, where).items():
        found.setdefault(path.rpartition(".")[0], []).append((path, block))
    made: list[Stack] = []
    for path, own in found.items():
        branches = tuple(branch for name, block in own for branch in _branches(name, block, where))
        made.append(Stack(path.rpartition(".")[0], branches, len(own)))
    return made


def _branches(path: str, block: nn.Module, where: str) -> Iterator[Branch]:
    kinds = ["attention", *(["cross"] if getattr(block, "cross", None) is not None else []), "mlp"]
    for kind in kinds:
        for seam, what in ((f"{kind}_norm", "to remove"), (f"{kind}_scale", "to put a scale on")):
            if not isinstance(getattr(block, seam, None), nn.Module):
                raise UserError(f"`{path}` has no `{seam}` {what}.", where, "Use one of the house models.")
        yield Branch(path, block, kind)


def take_out_norms(model: nn.Module, where: str = "", inner: bool = False) -> list[Stack]:
    """Remove the norms of all stacks.

    Args:
        inner: those of queries and keys too.
    Returns:
        The stacks, each with its branches.
    """
    found = stacks(model, where)
    for stack in found:
        owner = model.get_submodule(stack.path)
        for name in ENDS:
            if isinstance(getattr(owner, name, None), Norm):
                setattr(owner, name, nn.Identity())
        for branch in stack.branches:
            setattr(branch.block, f"{branch.kind}_norm", nn.Identity())
            # Without norms both orders are the same, and others may ask for this one.
            branch.block.pre = True  # type: ignore[assignment]
            attention = getattr(branch.block, branch.kind)
            if inner and isinstance(attention, Attention):
                attention.q_norm = attention.k_norm = None
    return found


def put_scale(branch: Branch, scale: nn.Module, where: str = "") -> None:
    """Scale what a branch adds to the stream, before dropout.

    Raises:
        UserError: if something scales it already.
    """
    seam = f"{branch.kind}_scale"
    if not isinstance(getattr(branch.block, seam), nn.Identity):
        raise UserError(f"`{branch.path}.{seam}` is taken by another technique.", where, "Drop one of them.")
    setattr(branch.block, seam, scale)


def like(branch: Branch) -> Tensor:
    """A weight whose type and device new parameters of a branch take."""
    return branch.block.get_submodule(OUTPUTS[branch.kind]).get_parameter("weight")


class Scale(nn.Module):
    """x -> alpha x, of one trained number.

    Args:
        first: value at first.
        like: whose type and device it takes.
    """

    def __init__(self, first: float, like: Tensor) -> None:
        super().__init__()
        self.first = first
        self.alpha = nn.Parameter(like.new_empty(()))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The first value; nothing is drawn."""
        value.fill_(self.first)

    def forward(self, x: Tensor) -> Tensor:
        # Of no dimension, so that it takes part in half precision without widening x.
        return x * self.alpha


def undecayed(groups: dict[str, Multipliers], run: Run, pattern: str, lr: float) -> dict[str, Multipliers]:
    """Groups with a rate of their own and no decay for the numbers of a pattern, where scales are trained."""
    if not any(name.endswith("_scale.alpha") for name in trainable(run.model)):
        return groups
    return groups | {pattern: groups.get(pattern, Multipliers()).times(Multipliers(lr, 0.0))}


def folded(named: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Every branch's scale times its last layer: the same function without scales."""
    plain, names = dict(named), {id(p): name for name, p in model.named_parameters()}
    for stack in stacks(model):
        for branch in stack.branches:
            # Several branches may share a scale, which has one name.
            alpha = names[id(getattr(branch.block, f"{branch.kind}_scale").alpha)]
            for name in (f"{branch.output}.weight", f"{branch.output}.bias"):
                if name in plain:
                    plain[name] = plain[name] * named[alpha]
    return {name: t for name, t in plain.items() if not name.endswith("_scale.alpha")}


def refuse_norms(state: State, run: Run, where: str) -> State:
    """The state as it is, unless it has norms that the model no longer has.

    Raises:
        UserError: naming one.
    """
    own = {name for name, _ in run.model.named_parameters()}
    lost = [name for name in state.get("model", {}) if name in run.base and name not in own and "norm" in name]
    if lost:
        what = f"the weights to start from were trained with norms, such as `{lost[0]}`, which this takes out."
        raise UserError(what, where, "Drop it, or start from a run that was trained with it; or train from scratch.")
    return state


@torch.no_grad()
def fill(model: nn.Module, seed: int, prefix: str, factor: Factor = lambda name, part: 1.0) -> None:
    """Draw the first weights anew, each from a generator of its own.

    Matrices are Xavier uniform, those of queries, keys and values each by its own sizes; patches normal by their number
    of values; all that is looked up normal with standard deviation d^(-1/2). What is not trained, such as positions of
    sines and cosines, and biases stay.

    Args:
        prefix: of the generators' names.
        factor: of each.
    """
    if any(isinstance(p, FakeTensor) for p in model.parameters()):
        return
    done: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Linear | Embedding) and id(module.weight) not in done:
            done.add(id(module.weight))
            _fill_matrix(path, module, model, seed, prefix, factor)
    for name, p in model.named_parameters():
        if name.rpartition(".")[2] == "class_token":
            put(p, _normal(shape(p), p.shape[-1], seed, f"{prefix}/{name}") * factor(name, ""))


def _fill_matrix(path: str, layer: Any, model: nn.Module, seed: int, prefix: str, factor: Factor) -> None:
    name, size = f"{path}.weight", shape(layer.weight)
    above, _, child = path.rpartition(".")
    parent = model.get_submodule(above)
    if isinstance(layer, Embedding) or child == "patches":
        put(layer.weight, _normal(size, max(1, size[1]), seed, f"{prefix}/{name}") * factor(name, ""))
        return
    # Of a cut layer its parent knows this rank's heads.
    own = max(1, len(layer.weight))
    parts = {part: rows * size[0] // own for part, rows in rows_of(parent, child, own).items()}
    label = f"{prefix}/{path if isinstance(parent, Attention | CrossAttention | MLP) else name}"
    pieces = [
        _xavier(torch.Size((rows, size[1])), seed, f"{label}/{i}" if len(parts) > 1 else label) * factor(name, part)
        for i, (part, rows) in enumerate(parts.items())
    ]
    put(layer.weight, torch.cat(pieces))


def rows_of(parent: nn.Module, child: str, rows: int) -> dict[str, int]:
    """Which matrices a layer's weight consists of, and how many rows each has: {"q": 64, "k": 32, "v": 32}."""
    if isinstance(parent, Attention | CrossAttention):
        kv = parent.kv_heads * parent.width
        if child == "qkv":
            return {"q": rows - 2 * kv, "k": kv, "v": kv}
        if child == "kv":
            return {"k": kv, "v": kv}
        if child == "q":
            return {"q": rows}
    return {"": rows}


def _xavier(shape: torch.Size, seed: int, name: str) -> Tensor:
    bound = math.sqrt(6 / max(1, shape[0] + shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, name))


def _normal(shape: torch.Size, size: int, seed: int, name: str) -> Tensor:
    return torch.empty(shape).normal_(0, size**-0.5, generator=generator(seed, name))
