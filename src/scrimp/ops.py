# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""One operator as a plan sees it: what it computes, reads, writes and asks for, from its schema and its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

FREE: Final = frozenset({
    "aten.detach", "aten.alias", "aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided",
    "aten.new_empty_strided", "aten.empty_permuted", "aten._unsafe_view", "aten.lift_fresh", "aten._local_scalar_dense",
})  # fmt: skip
"""Operators that move no bytes though they are no views."""
PRODUCTS: Final = frozenset({"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._int_mm"})
GATHERS: Final = frozenset({
    "aten.embedding", "aten.index_select", "aten.gather", "aten.nll_loss_forward", "aten.nll_loss_backward",
})  # fmt: skip
"""Operators that read no more of their inputs than they write."""
SCATTERS: Final = frozenset({"aten.scatter_add", "aten.scatter", "aten.index_add", "aten.index_put"})
"""Operators that touch no more of their output than their last input has."""
OVERWRITES: Final = frozenset({"aten.copy", "aten.zero", "aten.fill", "aten._foreach_zero", "aten._foreach_copy"})
"""Operators that change an argument without reading it."""


@dataclass(slots=True)
class Op:
    """One operator as it ran."""

    name: str
    """As torch writes it, without overload and without the mark of its in-place form: aten.addmm."""
    module: str
    """Path of the module that ran it, or whose gradient it computes."""
    phase: str
    """forward, backward, recompute, or the part of the run: build, update, validation."""
    flops: float
    read: int
    """Bytes of its inputs, without those it only overwrites."""
    written: int
    """Bytes of its outputs and of the arguments that it changes; 0 for views."""
    fresh: int
    """Bytes of memory that it asked for."""
    shape: tuple[int, ...]
    """(batch, m, n, k) of a product; (batch * heads, T, S, D) of attention; else the largest tensor's shape."""
    layout: str
    """Of a product: which operands lie column by column, such as nt. Empty for others."""
    dtype: torch.dtype
    grouped: bool = False
    """Attention with fewer heads of keys than of queries."""
    peers: int = 1
    """Of a collective: ranks that take part."""
    stride: int = 1
    """Of a collective: from one of its ranks to the next."""


def described(func: Any, args: Any, kwargs: Any, out: Any, module: str, phase: str) -> Op:
    """An operator's record."""
    name = func._schema.name.replace("::", ".").removesuffix("_")
    inputs, changed = arguments(func, args, kwargs)
    made = [t for t in tree_iter(out) if isinstance(t, Tensor)]
    everything = [t for t, _ in inputs] + made
    largest = max(everything, key=lambda t: t.numel(), default=None)
    shape, dtype = (tuple(largest.shape), largest.dtype) if largest is not None else ((), torch.float32)
    op = Op(name, module, phase, 0.0, 0, 0, 0, shape, "", dtype)
    if not (func.is_view or name in FREE):
        kept = [t for t, write in inputs if not write or not (overwritten(func) or name in OVERWRITES)]
        new = [t for t in made if not any(t is c for c in changed)]
        op.read, op.written = moved(kept), moved(new + changed)
        if name in GATHERS:
            op.read = min(op.read, op.written)
        elif name in SCATTERS:
            op.read = op.written = moved([inputs[-1][0]])
    packet = getattr(torch.ops.aten, name.removeprefix("aten."), func.overloadpacket)
    if func.namespace != "aten":
        op.peers, op.stride = group_of(func, args, kwargs)
    elif name in PRODUCTS:
        a, b = [t for t, write in inputs if not (write and overwritten(func))][-2:]
        op.shape, op.layout, op.dtype = product_shape(a, b), layout_of(a) + layout_of(b), a.dtype
        op.flops = 2.0 * prod(op.shape)
    elif "scaled_dot_product" in name and "attention" in name:
        describe_attention(op, func, args, kwargs)
    elif packet in flop_registry:
        op.flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
    return op


def group_of(func: Any, args: Any, kwargs: Any) -> tuple[int, int]:
    """(ranks that take part in a collective, distance from one to the next)."""
    from torch.distributed import ProcessGroup, distributed_c10d

    given = dict(_named(func, args, kwargs))
    group: Any = None
    if "process_group" in given:
        group = ProcessGroup.unbox(given["process_group"])
    elif "group_name" in given:
        group = distributed_c10d._resolve_process_group(given["group_name"])  # pyright: ignore
    ranks = [0] if group is None else distributed_c10d.get_process_group_ranks(group)
    return len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1


def arguments(func: Any, args: Any, kwargs: Any) -> tuple[list[tuple[Tensor, bool]], list[Tensor]]:
    """(tensors with whether the operator changes them, those it changes), in the order of the schema."""
    found: list[tuple[Tensor, bool]] = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        write = argument.alias_info is not None and argument.alias_info.is_write
        found += [(t, write) for t in tree_iter(value) if isinstance(t, Tensor)]
    return found, [t for t, write in found if write]


def overwritten(func: Any) -> bool:
    """Whether what the operator changes is an `out=`, which it does not read."""
    return any(argument.is_out for argument in func._schema.arguments)


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


def layout_of(matrix: Tensor) -> str:
    """n for rows that lie in memory one after another, t for columns that do."""
    return "n" if matrix.stride(-1) == 1 else "t"


def describe_attention(op: Op, func: Any, args: Any, kwargs: Any) -> None:
    """Shape and FLOPs of a fused attention; causal ones compute half.

    The backward pass computes the scores again: five products for two.
    """
    given = dict(_named(func, args, kwargs))
    q, k = given["query"], given["key"]
    batch, heads, tokens, width = q.shape
    flops = (10.0 if "backward" in op.name else 4.0) * batch * heads * tokens * k.shape[2] * width
    op.shape, op.dtype, op.grouped = (batch * heads, tokens, k.shape[2], width), q.dtype, k.shape[1] != heads
    op.flops = flops * (0.5 if given.get("is_causal") else 1.0)


def _named(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            yield argument.name, args[i]
        elif argument.name in kwargs:
            yield argument.name, kwargs[argument.name]
