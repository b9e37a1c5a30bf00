# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What the backward pass finds: steps on the tensors that blocks save for it, chained.

torch's `saved_tensors_hooks` do not nest: of several, only the innermost acts. Techniques that treat saved activations
therefore meet here, on one pair of hooks a block:

    forward    tensor -> compress -> move -> what the graph holds
    backward   tensor <- decompress <- bring back

Each step is given each storage once, however many views of it are saved, as a contiguous tensor over all of it. It
gets the tensor and the number of its block, and returns a tensor or a tree (tuple, list, dict) with tensors, which the
next step is given one by one; or the tensor itself, to leave it alone. What it returns must not refer to the tensor
otherwise, or no memory is freed.

Weights are not activations and never come here; nor does what is made of one weight, such as autocast's copies: a
matrix that is saved as the transpose of one with a weight's shape. Recomputation is folded inside (phase "recompute"):
it saves with hooks of its own, and only what it keeps, the inputs of its block, comes through these.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

PHASES: Final = ("compress", "move")
"""Order of the steps on the way to the graph."""

Pack = Callable[[Tensor, int], Any]
"""(tensor, number of its block) -> a tree; runs without gradients."""
Unpack = Callable[[Any], Tensor]
"""The tree, with what a later step made of its tensors undone -> a tensor of the same shape, type and device."""
Step = tuple[int, Pack, Unpack]


def treat(modules: Sequence[nn.Module], phase: str, pack: Pack, unpack: Unpack) -> None:
    """Add a step to what these modules, in practice `seams.blocks`, save for the backward pass.

    Call it in the slot `wrap`, in its phase "saved". Modules that a step was added to before share its hooks.

    Args:
        phase: one of `PHASES`.
    """
    found = [m.forward for m in modules if isinstance(m.forward, Treated)]
    saver = found[0].saver if found else Saver()
    for number, module in enumerate(modules):
        if not isinstance(module.forward, Treated):
            module.forward = Treated(module, module.forward, saver, number)  # type: ignore[method-assign]
    saver.steps.append((PHASES.index(phase), pack, unpack))
    saver.steps.sort(key=lambda step: step[0])


class Treated:
    """A module's forward pass under the hooks."""

    def __init__(self, module: nn.Module, forward: Callable[..., object], saver: Saver, number: int) -> None:
        self.module, self.forward, self.saver, self.number = module, forward, saver, number

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        weights = list(self.module.parameters())
        own = {_key(p) for p in weights if not is_traceable_wrapper_subclass(p)}
        shapes = {p.shape for p in weights if p.ndim == 2}

        def pack(tensor: Tensor) -> Tensor | View:
            if is_traceable_wrapper_subclass(tensor) or _key(tensor) in own or _of_weight(tensor, shapes):
                return tensor
            return self.saver.view(tensor, self.number)

        with saved_tensors_hooks(pack, lambda saved: saved.tensor() if isinstance(saved, View) else saved):
            return self.forward(*args, **kwargs)


@dataclass
class Saver:
    """The steps of a model's blocks, and which storages the graph holds already."""

    steps: list[Step] = field(default_factory=list[Step])
    known: dict[tuple[int, torch.dtype], tuple[int, weakref.ref[Whole]]] = field(
        default_factory=dict[tuple[int, torch.dtype], tuple[int, "weakref.ref[Whole]"]]
    )
    """(storage, type) -> (version of its values, what it became)."""

    def view(self, tensor: Tensor, number: int) -> View:
        """What the graph shall hold of a tensor."""
        key, version = (_key(tensor), tensor.dtype), tensor._version
        before, found = self.known.get(key, (-1, None))
        whole = found() if found is not None and before == version else None
        if whole is None:
            if found is None:
                # The address may be used again once the storage is gone.
                weakref.finalize(tensor.untyped_storage(), self.known.pop, key, None).atexit = False
            whole = Whole(self.steps, tensor, number)
            self.known[key] = version, weakref.ref(whole)
        whole.uses += 1
        return View(whole, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


class Whole:
    """A storage as the steps left it. Only the graph refers to it, by `View`s."""

    def __init__(self, steps: list[Step], tensor: Tensor, number: int) -> None:
        self.uses = 0
        self.restored: Tensor | None = None
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        alone = tensor.is_contiguous() and tensor.numel() == size
        with torch.no_grad():
            base = tensor.detach() if alone else tensor.detach().as_strided((size,), (1,), 0)
            self.packed = packed(steps, base, number)

    def tensor(self) -> Tensor:
        """The storage again; held from the first to the last of its uses, as without hooks."""
        found = self.restored
        if found is None:
            with torch.no_grad():
                found = unpacked(self.packed)
        self.uses -= 1
        self.restored = found if self.uses > 0 else None
        return found


@dataclass(frozen=True)
class View:
    """A saved tensor: its place in a storage."""

    whole: Whole
    size: Sequence[int]
    stride: Sequence[int]
    offset: int

    def tensor(self) -> Tensor:
        """The same bits, at the same strides."""
        base = self.whole.tensor()
        if base.size() == self.size and base.stride() == self.stride:
            return base
        return base.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class Packed:
    """What a step made of a tensor, with the tensors in it treated by the steps after it."""

    leaves: list[Any]
    spec: TreeSpec
    undo: Unpack


def packed(steps: Sequence[Step], tensor: Tensor, number: int) -> Tensor | Packed:
    """A tensor through all steps."""
    if not steps:
        return tensor
    (_, pack, unpack), rest = steps[0], steps[1:]
    made = pack(tensor, number)
    if made is tensor:
        return packed(rest, tensor, number)
    leaves, spec = tree_flatten(made)
    return Packed([packed(rest, x, number) if isinstance(x, Tensor) else x for x in leaves], spec, unpack)


def unpacked(kept: Any) -> Any:
    """And back."""
    if not isinstance(kept, Packed):
        return kept
    return kept.undo(tree_unflatten([unpacked(leaf) for leaf in kept.leaves], kept.spec))


def _key(tensor: Tensor) -> int:
    """What identifies a storage while it lives."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _of_weight(tensor: Tensor, shapes: set[torch.Size]) -> bool:
    """Whether a tensor is made of a weight W: products x W^T save W^T, and nothing else is stored in this order."""
    return tensor.ndim == 2 and tensor.stride(0) == 1 and tensor.stride(1) > 1 and tensor.t().shape in shapes
