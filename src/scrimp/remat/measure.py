"""What the blocks of a chain cost and hold, measured by running each once on tensors that have shapes only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]
from torch.utils._pytree import tree_map_only

from scrimp.ops import Op
from scrimp.remat.chain import Piece
from scrimp.remat.given import Forward, Given, handed_on
from scrimp.trace import Trace

BALANCE: Final = 10.0
"""FLOPs that take as long as moving a byte: a processor's core has about ten, a large GPU some hundred."""


def price(ops: Sequence[Op]) -> float:
    """Cost of operators: each takes its products or its traffic, whichever is longer, in FLOPs."""
    return sum(max(op.flops, BALANCE * (op.read + op.written)) for op in ops)


def measured(forwards: Sequence[Forward], given: Given) -> list[Piece]:
    """The pieces of a chain; every block gets the other arguments of the first.

    Raises:
        UserError: if a block does not hand on a tensor.
    """
    pieces: list[Piece] = []
    with shapes_only(given.input()) as like:
        x, given = like(given.input()), given.mapped(like)
        for forward in forwards:
            piece, x = _piece(forward, x, given)
            pieces.append(piece)
    return pieces


def rerun(forward: Forward, given: Given) -> tuple[int, float]:
    """(bytes kept, cost of what runs again) of a block that checkpoints itself."""
    with shapes_only(given.input()) as like:
        trace = Trace()
        trace.part = "step"
        x = like(given.input()).requires_grad_()
        with trace:
            y = handed_on(given.mapped(like).call(forward, x))
            kept = trace.live - y.untyped_storage().nbytes()
            torch.autograd.grad(y, x, torch.empty_like(y))
        return kept, price([op for op in trace.ops if op.phase == "recompute"])


@contextmanager
def shapes_only(x: Tensor) -> Iterator[Callable[[Any], Any]]:
    """A place where nothing is computed and nobody watches; gives what makes tensors with shapes like others'."""
    mode = x.fake_mode if isinstance(x, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)

    def like(value: Any) -> Any:
        return tree_map_only(Tensor, lambda t: torch.empty_like(t).requires_grad_(t.requires_grad), value)

    with _disable_current_modes(), mode, torch.enable_grad():
        yield like


def _piece(forward: Forward, x: Tensor, given: Given) -> tuple[Piece, Tensor]:
    """A block's piece, and the input of the next."""
    packed: list[int] = []
    trace = Trace()
    trace.part = "step"

    def pack(t: Tensor) -> Tensor:
        packed.append(len(trace.ops))
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), trace:
        out = given.call(forward, x)
        y = handed_on(out)
        node, size = y.grad_fn, y.untyped_storage().nbytes()
    following = torch.empty_like(y).requires_grad_(y.requires_grad)
    del out, y
    kept = trace.live
    del node
    again = trace.ops[: packed[-1]] if packed else []
    return Piece(price(trace.ops), price(again), x.untyped_storage().nbytes(), kept, max(trace.peak, kept + size)), following
