# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Heads and neurons cut out of a Transformer's blocks: the smaller layers, and the tensors that go with them.

A unit of attention is a key/value head with the query heads that share it: one head in plain attention, a group in
grouped-query attention. Legend of shapes: K units, G query heads a unit, D head width, C width, N neurons.

    attention.qkv   [K (G + 2) D, C]    rows of q, then of k, then of v
    attention.proj  [C, K G D]          columns
    mlp.up, gate    [N, C]              rows, and biases
    mlp.down        [C, N]              columns
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.seams import Linear

Choice = dict[str, Any]
"""What stays of a block, as JSON: `units` and `neurons` are numbers that stay, of `of_units` and `of_neurons`.
`cross` and `of_cross` are units of its attention to another sequence, where those are cut."""


@dataclass(frozen=True)
class Cut:
    """What of a tensor stays: numbers along one dimension, of so many."""

    dim: int
    kept: list[int]
    of: int

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has the uncut size."""
        return tensor.ndim > self.dim and tensor.shape[self.dim] == self.of

    def applied(self, tensor: Tensor) -> Tensor:
        """The part that stays."""
        return tensor.detach().index_select(self.dim, torch.tensor(self.kept, device=tensor.device))

    def padded(self, tensor: Tensor) -> Tensor:
        """The uncut size again, with zeros for what is gone."""
        shape = list(tensor.shape)
        shape[self.dim] = self.of
        index = torch.tensor(self.kept, device=tensor.device)
        return tensor.new_zeros(shape).index_copy_(self.dim, index, tensor.detach())


def check(block: nn.Module, path: str, where: str) -> None:
    """Whether a block has the layers that are cut.

    Raises:
        UserError: naming the seam that it lacks.
    """
    for seam in ("attention.qkv", "attention.proj", "mlp.up", "mlp.down"):
        module: Any = block
        for part in seam.split("."):
            module = getattr(module, part, None)
        if not isinstance(module, Linear):
            raise UserError(f"`{path}` has no `{seam}` to cut.", where, "Use a model of the house.")


def units(block: nn.Module, part: str = "attention") -> int:
    """Units of a block's attention, K."""
    return int(getattr(block, part).kv_heads)


def unit_width(block: nn.Module, part: str = "attention") -> int:
    """Columns of `attention.proj` that belong to a unit, G D."""
    attention: Any = getattr(block, part)
    return attention.heads // attention.kv_heads * attention.width


def neurons(block: nn.Module) -> int:
    """Neurons of a block's MLP, N."""
    return int(block.mlp.down.weight.shape[1])  # type: ignore[union-attr, index]


def choice(block: nn.Module, kept_units: list[int], kept_neurons: list[int]) -> Choice:
    """What stays of a block that is whole."""
    return {"units": kept_units, "of_units": units(block), "neurons": kept_neurons, "of_neurons": neurons(block)}


def narrow(block: nn.Module, kept: Choice) -> None:
    """Make a block's layers as small as what stays. On meta tensors: nothing is copied."""
    cuts = block_cuts("", block, kept)
    for name, cut in cuts.items():
        path, _, leaf = name.rpartition(".")
        layer = block.get_submodule(path)
        old = getattr(layer, leaf)
        shape = list(old.shape)
        shape[cut.dim] = len(cut.kept)
        setattr(layer, leaf, nn.Parameter(old.new_empty(shape)))
    attention: Any = block.attention
    group = attention.heads // attention.kv_heads
    attention.kv_heads = len(kept["units"])
    attention.heads = group * attention.kv_heads


def block_cuts(path: str, block: nn.Module, kept: Choice) -> dict[str, Cut]:
    """Name of a parameter of a block -> what of it stays. Works on the whole block and on the narrow one."""
    attention: Any = block.attention
    width, total, stay = attention.width, kept["of_units"], kept["units"]
    queries = spans(stay, unit_width(block))
    q, kv = total * unit_width(block), total * width
    keys = [q + i for i in spans(stay, width)]
    rows = Cut(0, [*queries, *keys, *(kv + i for i in keys)], q + 2 * kv)
    up, down = (Cut(dim, kept["neurons"], kept["of_neurons"]) for dim in (0, 1))
    found = {"attention.qkv": rows, "attention.proj": Cut(1, queries, q)}
    found |= {"mlp.up": up, "mlp.gate": up, "mlp.down": down}
    if "cross" in kept:
        found |= _cross_cuts(block, kept["cross"], kept["of_cross"])
    cuts: dict[str, Cut] = {}
    for name, cut in found.items():
        layer: Any = block
        for part in name.split("."):
            layer = getattr(layer, part, None)
        for leaf in ("weight", "bias") if layer is not None else ():
            # An output's bias belongs to the stream, not to a head or neuron.
            if getattr(layer, leaf) is not None and not (leaf == "bias" and cut.dim == 1):
                cuts[f"{path}.{name}.{leaf}".lstrip(".")] = cut
    return cuts


def _cross_cuts(block: nn.Module, stay: list[int], total: int) -> dict[str, Cut]:
    """Of attention to another sequence, whose queries have a layer of their own."""
    cross: Any = block.cross
    columns = unit_width(block, "cross")
    queries, keys, kv = spans(stay, columns), spans(stay, cross.width), total * cross.width
    q = Cut(0, queries, total * columns)
    return {"cross.q": q, "cross.kv": Cut(0, [*keys, *(kv + i for i in keys)], 2 * kv), "cross.proj": replace(q, dim=1)}


def all_cuts(model: nn.Module, choices: Mapping[str, Choice]) -> dict[str, Cut]:
    """`block_cuts` of every block, by its path."""
    return {name: cut for path, kept in choices.items()
            for name, cut in block_cuts(path, model.get_submodule(path), kept).items()}  # fmt: skip


def spans(kept: Iterable[int], width: int) -> list[int]:
    """Numbers of the rows of units that are `width` rows each."""
    return [unit * width + i for unit in kept for i in range(width)]


def cut_table(tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
    """A table by the parameters' names, cut. What has another size than the parameter, such as a counter, stays."""
    return {n: cuts[n].applied(t) if n in cuts and cuts[n].fits(t) else t for n, t in tensors.items()}


def cut_state(state: Mapping[str, Mapping[str, Tensor]], cuts: Mapping[str, Cut]) -> dict[str, Mapping[str, Tensor]]:
    """Weights, moments and what other techniques remember by the weights' names, cut.

    A parameter one of whose moments has another size, as blocks of low-bit states have, loses all of its moments.
    """
    odd = {name for kind, tensors in state.items() if kind.startswith("optimizer.")
           for name, t in tensors.items() if name in cuts and t.ndim and not cuts[name].fits(t)}  # fmt: skip

    def left(kind: str) -> dict[str, Tensor]:
        return {n: t for n, t in state[kind].items() if not (n in odd and kind.startswith("optimizer."))}

    return {kind: cut_table(left(kind), cuts) for kind in state}


def keep_largest(scores: Sequence[Tensor], share: float, layerwise: bool) -> list[Tensor]:
    """Which scores are not among the given share of smallest ones, as masks; each layer keeps at least one.

    Args:
        scores: of each layer, [units of it].
        layerwise: whether each layer loses the share, or all together do.
    """
    if layerwise:
        return [largest(s, pruned(len(s), share)) for s in scores]
    sizes = [len(s) for s in scores]
    masks = largest(torch.cat(list(scores)), pruned(sum(sizes), share)).split(sizes)
    return [mask.scatter(0, s.argmax(keepdim=True), True) for mask, s in zip(masks, scores, strict=True)]


def pruned(count: int, share: float) -> int:
    """How many a share is, rounded down, so that one is left."""
    return min(count - 1, int(share * count + 1e-9))


def largest(scores: Tensor, dropped: int) -> Tensor:
    """All but so many of the smallest, as a mask; of equal ones the first go."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.index_fill_(0, scores.argsort(stable=True)[:dropped], False)


def listed(mask: Tensor, kept: int, read: Callable[..., float]) -> list[int]:
    """Numbers that a mask keeps, read by a run; the first `kept` while planning, when it has no values."""
    mask = mask.cpu()
    return [i for i in range(len(mask)) if read(mask[i], worst=float(i < kept))]
