# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A record of every operator of a run: where it belongs, what it computes, reads and writes, and what memory it makes.

Real tensors and fake ones leave the same record, so that a plan is a run that was recorded and never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter

from scrimp.meter import LiveBytes, storages
from scrimp.ops import Op, described

KINDS: Final = ("weights", "gradients", "states", "gathered", "activations", "workspace")
"""What memory is for, in the order of a table. Gathered are whole weights of which this rank holds a part; workspace is
what backward passes and updates hold in between."""


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
    """(bytes, module, operator or kind) of the largest holders."""


class Trace(LiveBytes):
    """Records operators and the life of storages.

    `part` names what the run does now: build, step, update, validation. Operators carry it as their phase when autograd
    does nothing; in `step` they are then forward ones.

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
            # A storage that was resized is still for what it was for.
            kind = self.blocks[self._live[key]].kind
            self._end(key)
        else:
            kind = self._kind()
        op = self.ops[self._current] if self._current >= 0 else None
        self._live[key], self._given[key] = len(self.blocks), self._sizes[key]
        size = self._size(self._sizes[key], op, self._output)
        self.blocks.append(Block(size, self._current, kind, self._tick()))

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
        return "activations" if self._stack or self._phase() in ("forward", "recompute") else "workspace"

    @property
    def module(self) -> str:
        """Path of the module that runs now."""
        return self._stack[-1] if self._stack else ""

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
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # Asked for more often than all operators run: without the way through the mode.
        if func.namespace not in ("aten", "c10d", "_c10d_functional"):
            out = self._run(func, args, kwargs)
            self.register(out)
            if func._schema.name == "fsdp::split_with_sizes_copy":
                self.mark(kwargs["out"], "gathered")
            return out
        module, phase = self._module(), self._phase()
        out = self._run(func, args, kwargs)
        op = described(func, args, kwargs, out, module, phase)
        self._current, before = len(self.ops), self.live
        self.ops.append(op)
        for self._output, tensor in enumerate(tree_iter(out)):
            self.register(tensor)
        op.fresh = max(self.live - before, 0)
        self._current = -1
        return out


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


def most(trace: Trace) -> dict[str, int]:
    """Kind of memory -> its highest bytes, each at a moment of its own."""
    live: dict[str, int] = dict.fromkeys(KINDS, 0)
    found = dict(live)
    changes = [(b.born, b.size, b.kind) for b in trace.blocks]
    changes += [(b.died, -b.size, b.kind) for b in trace.blocks if b.died >= 0]
    for _, change, kind in sorted(changes):
        live[kind] += change
        found[kind] = max(found[kind], live[kind])
    return found


def moment(trace: Trace, at: int) -> Moment:
    """Memory after an event. Activations and workspace are told by who made them; each other kind is one holder."""
    kinds: dict[str, int] = dict.fromkeys(KINDS, 0)
    holders: dict[tuple[str, str], int] = {}
    for block in trace.blocks:
        if block.born <= at and (block.died < 0 or block.died > at):
            kinds[block.kind] += block.size
            op = trace.ops[block.op] if block.op >= 0 else None
            single = block.kind in KINDS[:4] or op is None
            key = ("", block.kind) if single or op is None else (op.module, op.name)
            holders[key] = holders.get(key, 0) + block.size
    newest = max((b for b in trace.blocks if b.born <= at), key=lambda b: b.born, default=None)
    op = trace.ops[newest.op] if newest is not None and newest.op >= 0 else None
    held = sorted(((size, *key) for key, size in holders.items()), reverse=True)[:5]
    return Moment(sum(kinds.values()), kinds, op, trace.parts[at] if trace.parts else "", held)
