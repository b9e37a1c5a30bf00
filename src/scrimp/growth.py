"""How a model grows in depth between stages: lists of blocks are cut, and copies fill them up again.

A stage's model is the recipe's with fewer blocks. At a boundary the names in the state that the last stage left are
compared with the model's, and what is missing is made of copies; a resume within a stage finds all in place, so that
nothing is done twice. `widths.py` does the same with shapes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.seams import blocks, matching

OUTPUTS = ("attention.proj", "cross.proj", "mlp.down")
"""Last layers of the branches: zero there makes a block the identity."""


def lists_of_blocks(model: nn.Module, pattern: str, where: str = "") -> dict[str, int]:
    """Path of every list of blocks that a pattern matches -> how many it holds. Empty is the model's own path.

    Raises:
        UserError: if there is none, or one's blocks are not numbered.
    """
    counts = Counter(name.rpartition(".")[0] for name in blocks(model, where))
    chosen = matching(pattern, list(counts), "list of blocks", where)
    for path in chosen:
        names = [name for name, _ in model.get_submodule(path).named_children()]
        if names != [str(i) for i in range(len(names))]:
            fix = "Put them into an nn.ModuleList."
            raise UserError(f"the blocks {names[:3]} are not numbered from 0.", where, fix)
    return {path: counts[path] for path in chosen}


def cut(model: nn.Module, path: str, depth: int) -> None:
    """Keep the first blocks of a list, in place: it may be an nn.Sequential that is called, or the model itself."""
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList | nn.Sequential)
    del layers[depth:]


def share_of(total: int, depth: int, longest: int) -> int:
    """Depth of a list while the longest list has `depth` of its `longest` blocks: in proportion, and at least one."""
    return max(1, total * depth // longest)


def halved(total: int, points: int) -> tuple[int, ...]:
    """Depths of the stages between some points: half for each point that is still to come."""
    return tuple(total >> n for n in range(points, -1, -1))


def origins(old: int, new: int, order: str) -> list[int]:
    """Of which of the old blocks each new one is a copy; `stack` puts copies on top, `interleave` by the originals."""
    return [i % old if order == "stack" else i * old // new for i in range(new)]


def added(old: int, new: int, order: str) -> list[int]:
    """Which of the new blocks are copies beside an original."""
    origin = origins(old, new, order)
    return [i for i, o in enumerate(origin) if o in origin[:i]]


def empty_outputs(rest: str, tensor: Tensor) -> bool:
    """Whether a tensor of a block is zero where the block begins as the identity; never masks, which would stay so.

    Args:
        rest: of its name, within the block.
    """
    return rest.rpartition(".")[0] in OUTPUTS and tensor.is_floating_point()


def check_identity(block: nn.Module, where: str) -> None:
    """Whether zeros in the last layers of a block's branches make it the identity.

    Raises:
        UserError: if they do not.
    """
    own = {name for name, _ in block.named_parameters()}
    lacking = [f"{n}.weight" for n in OUTPUTS if n != "cross.proj" and f"{n}.weight" not in own]
    if lacking:
        raise UserError(f"blocks have no `{lacking[0]}` to zero.", where, "Leave it off, or use the house Transformer.")
    if not getattr(block, "pre", True):
        what = "a block with norms after its branches is never the identity."
        raise UserError(what, where, "Leave it off, or set `model.norm_at: pre`.")


def block_names(path: str) -> re.Pattern[str]:
    """Names of what is in a list: (number of the block, rest of the name)."""
    return re.compile(rf"{re.escape(path + '.') if path else ''}(\d+)\.(.*)")


def shallower(model: nn.Module, given: Iterable[str], pattern: str) -> list[tuple[str, int, int]]:
    """The lists of which the given names hold another number of children: (path, that number, the model's).

    Not simply the model's longest lists: once the blocks are cut to a few, a list within a block may be longer. Lists
    within one that is found are left out.
    """
    names, own = list(given), [name for name, _ in model.named_parameters()]
    found: list[tuple[str, int, int]] = []
    for path, module in model.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer, _, _ in found)
        if inside or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        mine = block_names(path)
        held, wanted = ({m[1] for name in many if (m := mine.fullmatch(name))} for many in (names, own))
        if held and len(held) != len(wanted):
            found.append((path, len(held), len(wanted)))
    chosen = matching(pattern, [path for path, _, _ in found], "list of blocks") if found else []
    return [entry for entry in found if entry[0] in chosen]


def deepened(
    tensors: Mapping[str, Tensor], path: str, origin: list[int], zero: Callable[[str, Tensor], bool] = lambda *_: False
) -> dict[str, Tensor]:
    """The tensors of one kind, with block i of a list made of block `origin[i]`.

    Copies share memory in what is returned: whatever loads it copies.

    Args:
        zero: (rest of the name, tensor) -> whether a copy of it is zeros instead. A block's first successor is no copy.
    """
    pattern = block_names(path)
    copies = {i for i, source in enumerate(origin) if source in origin[:i]}
    grown = {name: t for name, t in tensors.items() if not pattern.match(name)}
    for name, tensor in tensors.items():
        match = pattern.match(name)
        for i, source in enumerate(origin) if match else ():
            if source == int(match[1]):  # type: ignore[index]
                rest = match[2]  # type: ignore[index]
                empty = i in copies and zero(rest, tensor)
                grown[f"{path}.{i}.{rest}".lstrip(".")] = torch.zeros_like(tensor) if empty else tensor
    return grown
