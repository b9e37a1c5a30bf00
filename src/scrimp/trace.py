# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A record of every operator of a run: where it belongs, what it computes, reads and writes, and what memory it makes.

Real tensors and fake ones leave the same record, so that a plan is a run that was recorded and never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from scrimp.meter import LiveBytes, storages

PHASES: Final = ("forward", "backward", "recompute")
"""What autograd is doing. An operator of none of them carries the part of the run instead: build, step, validation."""
KINDS: Final = ("weights", "gradients", "states", "activations", "workspace")
"""What memory is for, in the order of a table. Workspace is what backward passes and updates hold in between."""


@dataclass(slots=True)
class Op:
    """One operator as it ran."""

    name: str
    """As torch writes it, without overload: aten.addmm."""
    module: str
    """Path of the module that ran it, or whose gradient it computes."""
    phase: str
    flops: float
    read: int
    """Bytes of its inputs."""
    written: int
    """Bytes of its outputs; 0 for views."""
    fresh: int
    """Bytes of memory that it asked for."""
    shape: tuple[int, ...]
    """(batch, m, n, k) of a product; (batch * heads, T, S, D) of attention; else the largest tensor's shape."""
    layout: str
    """Of a product: which operands lie column by column, such as nt. Of attention: grouped, when k has fewer heads."""
    dtype: torch.dtype


@dataclass(slots=True)
class Block:
    """One storage: how long it lived, in numbers of events, and what it was for."""

    size: int
    op: int
    """Number of the operator that made it; -1 for what was there before."""
    kind: str
    born: int
    died: int = -1


@dataclass
class Moment:
    """Memory at one point of a run."""

    total: int
    kinds: dict[str, int]
    op: Op | None
    """The operator that ran."""
    part: str = ""
    """The part of the run, such as step or validation."""
    held: list[tuple[int, str, str]] = field(default_factory=list[tuple[int, str, str]])
    """(bytes, module, operator) of the largest holders."""


class Trace(LiveBytes):
    """Records operators and the life of storages. `part` names what the run does now.

    Args:
        size: (bytes, operator, which output) -> bytes that a storage takes on the target.
    """

    def __init__(self, size: Callable[[int, Op | None, int], int] = lambda size, op, output: size) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.blocks: list[Block] = []
        self.parts: list[str] = []
        """The part of the run during each event."""
        self.part = "build"
        self.kind = ""
        """What storages made now are for, where the phase does not say it."""
        self._size = size
        self._events = 0
        self._live: dict[int, int] = {}
        self._given: dict[int, int] = {}
        self._output = 0
        self._stack: list[str] = []
        self._nodes: dict[int, str] = {}
        self._current = -1

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        known = key in self._sizes
        super()._add(storage)
        if known and self._sizes[key] == self._given[key]:
            return
        if known:
            self._end(key)
        op = self.ops[self._current] if self._current >= 0 else None
        self._live[key], self._given[key] = len(self.blocks), self._sizes[key]
        size = self._size(self._sizes[key], op, self._output)
        self.blocks.append(Block(size, self._current, self._kind(), self._tick()))

    def _drop(self, key: int) -> None:
        super()._drop(key)
        self._end(key)

    def _end(self, key: int) -> None:
        self.blocks[self._live.pop(key)].died = self._tick()

    def _tick(self) -> int:
        self._events += 1
        self.parts.append(self.part)
        return self._events - 1

    def _kind(self) -> str:
        if self.kind:
            return self.kind
        return "activations" if self._phase() in ("forward", "recompute") else "workspace"

    def mark(self, value: Any, kind: str) -> None:
        """Say what the storages of these tensors are for; those not seen before are registered."""
        before, self.kind = self.kind, kind
        self.register(value)
        self.kind = before
        for tensor in tree_iter(value):
            if isinstance(tensor, Tensor):
                for storage in storages(tensor):
                    self.blocks[self._live[storage._cdata]].kind = kind  # pyright: ignore[reportPrivateUsage]

    def _phase(self) -> str:
        node: Any = torch._C._current_autograd_node()  # pyright: ignore[reportPrivateUsage]
        forward = torch.is_grad_enabled() or bool(self._stack)
        if node is not None:
            return "recompute" if forward else "backward"
        return "forward" if forward and self.part == "step" else self.part

    def _module(self) -> str:
        node: Any = torch._C._current_autograd_node()  # pyright: ignore[reportPrivateUsage]
        if self._stack:
            # The node of this operator is made before it runs, so that its number is the last one given.
            if node is None:
                number = torch.autograd._get_sequence_nr() - 1  # pyright: ignore
                self._nodes.setdefault(number, self._stack[-1])
            return self._stack[-1]
        return self._nodes.get(node._sequence_nr(), "") if node is not None else ""

    @contextmanager
    def watching(self, model: nn.Module) -> Generator[None]:
        """Operators get the paths of the model's modules, and gradients are told from other memory."""

        def enter(name: str) -> Callable[[nn.Module, Any], None]:
            def push(module: nn.Module, args: Any) -> None:
                self._stack.append(name)

            return push

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self._stack.pop()

        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.mark(parameter.grad, "gradients")

        hooks: list[Any] = []
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(enter(name), prepend=True))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        hooks += [p.register_post_accumulate_grad_hook(arrived) for p in model.parameters() if p.requires_grad]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "c10d", "_c10d_functional"):
            out = func(*args, **kwargs)
            self.register(out)
            return out
        module, phase = self._module(), self._phase()
        out = func(*args, **kwargs)
        op = described(func, args, kwargs, out, module, phase)
        self._current, before = len(self.ops), self.live
        self.ops.append(op)
        for self._output, tensor in enumerate(tree_iter(out)):
            self.register(tensor)
        op.fresh = max(self.live - before, 0)
        self._current = -1
        return out


def described(func: Any, args: Any, kwargs: Any, out: Any, module: str, phase: str) -> Op:
    """An operator's record."""
    name = str(func).removesuffix("_").rpartition(".")[0].removesuffix("_")
    inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    outputs = [t for t in tree_iter(out) if isinstance(t, Tensor)]
    free = func.is_view or name in FREE
    read, written = (0, 0) if free else (moved(inputs), moved(outputs))
    if name in GATHERS:
        read = min(read, written)
    elif name in SCATTERS:
        read = written = moved(inputs[-1:])
    packet = getattr(torch.ops.aten, name.removeprefix("aten."), func.overloadpacket)
    largest = max(inputs + outputs, key=lambda t: t.numel(), default=None)
    op = Op(name, module, phase, 0.0, read, written, 0, tuple(largest.shape) if largest is not None else (), "",
            largest.dtype if largest is not None else torch.float32)  # fmt: skip
    if name in PRODUCTS:
        a, b = inputs[-2:] if "out" not in kwargs else inputs[-3:-1]
        op.shape, op.layout, op.dtype = product_shape(a, b), letters(a) + letters(b), a.dtype
        op.flops = 2.0 * prod(op.shape)
    elif "scaled_dot_product" in name and "attention" in name:
        op.shape, op.flops, op.dtype, op.layout = attention_shape(name, args, kwargs)
    elif packet in flop_registry:
        op.flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
    return op


FREE: Final = frozenset({
    "aten.detach", "aten.alias", "aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided",
    "aten.new_empty_strided", "aten.empty_permuted", "aten._unsafe_view", "aten.lift_fresh", "aten._local_scalar_dense",
})  # fmt: skip
"""Operators that move no bytes though they are no views."""
GATHERS: Final = frozenset({"aten.embedding", "aten.index_select", "aten.gather", "aten.nll_loss_forward",
                            "aten.nll_loss_backward"})  # fmt: skip
"""Operators that read no more of their inputs than they write."""
SCATTERS: Final = frozenset({"aten.scatter_add", "aten.scatter", "aten.index_add", "aten.index_put"})
"""Operators that touch no more of their output than their last input has."""
PRODUCTS: Final = frozenset({"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"})


def moved(tensors: list[Tensor]) -> int:
    """Bytes of tensors; what is expanded counts once."""
    return sum(
        t.element_size() * prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s) if t.numel() else 0
        for t in tensors
        if t.layout == torch.strided
    )


def product_shape(a: Tensor, b: Tensor) -> tuple[int, int, int, int]:
    """(batch, m, n, k) of a [.., m, k] times b [.., k, n]."""
    return (a.shape[0] if a.ndim == 3 else 1, a.shape[-2], b.shape[-1], a.shape[-1])


def letters(matrix: Tensor) -> str:
    """n for rows that lie in memory one after another, t for columns that do."""
    return "n" if matrix.stride(-1) == 1 else "t"


def attention_shape(name: str, args: Any, kwargs: Any) -> tuple[tuple[int, int, int, int], float, torch.dtype, str]:
    """((B * H, T, S, D), FLOPs, dtype, layout) of a fused attention; causal ones compute half.

    The backward pass computes the scores again: five products for two.
    """
    backward = "backward" in name
    q, k = (args[1], args[2]) if backward else (args[0], args[1])
    batch, heads, tokens, width = q.shape
    causal = any(a is True for a in args) or bool(kwargs.get("is_causal", False))
    flops = (10.0 if backward else 4.0) * batch * heads * tokens * k.shape[2] * width
    layout = "grouped" if k.shape[1] != heads else ""
    return (batch * heads, tokens, k.shape[2], width), flops * (0.5 if causal else 1.0), q.dtype, layout


def peak(trace: Trace) -> tuple[Moment, list[tuple[int, str]]]:
    """The highest moment of a trace, and the memory after every event with the part of the run it belongs to."""
    changes = sorted(
        [(b.born, b.size, i) for i, b in enumerate(trace.blocks)]
        + [(b.died, -b.size, i) for i, b in enumerate(trace.blocks) if b.died >= 0]
    )
    live, best, at = 0, -1, 0
    line: list[tuple[int, str]] = []
    for when, change, _ in changes:
        live += change
        line.append((live, trace.parts[when]))
        if live > best:
            best, at = live, when
    return moment(trace, at), line


def moment(trace: Trace, at: int) -> Moment:
    """Memory after an event."""
    kinds: dict[str, int] = dict.fromkeys(KINDS, 0)
    holders: dict[tuple[str, str], int] = {}
    for block in trace.blocks:
        if block.born <= at and (block.died < 0 or block.died > at):
            kinds[block.kind] += block.size
            op = trace.ops[block.op] if block.op >= 0 else None
            key = (op.module, op.name) if op is not None else ("", "")
            holders[key] = holders.get(key, 0) + block.size
    newest = max((b for b in trace.blocks if b.born <= at), key=lambda b: b.born, default=None)
    op = trace.ops[newest.op] if newest is not None and newest.op >= 0 else None
    held = sorted(((size, *key) for key, size in holders.items()), reverse=True)[:5]
    return Moment(sum(kinds.values()), kinds, op, trace.parts[at] if trace.parts else "", held)
