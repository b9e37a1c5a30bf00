"""What the blocks of a chain cost and hold, measured by running each once on tensors that have shapes only."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
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


@dataclass(frozen=True)
class Link:
    """A block of a chain: what it runs, and what blocks that cost the same have in common."""

    block: nn.Module
    forward: Forward
    kind: Hashable

    @classmethod
    def of(cls, block: nn.Module) -> Link:
        """Blocks are of one kind if their modules, parameters and options are alike. Numbers of layers may differ."""
        parts = tuple(
            (name, type(m), tuple((k, v) for k, v in vars(m).items() if isinstance(v, bool | float | str)))
            for name, m in block.named_modules()
        )
        weights = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
        return cls(block, block.forward, (getattr(block.forward, "__qualname__", ""), parts, weights))


def measured(links: Sequence[Link], given: Given) -> list[Piece]:
    """The pieces of a chain; every block gets the other arguments of the first, and one of a kind is measured.

    Raises:
        UserError: if a block does not hand on a tensor.
    """
    pieces: list[Piece] = []
    known: dict[Hashable, tuple[Piece, Tensor]] = {}
    with shapes_only(given.input()) as like:
        x, given = like(given.input()), given.mapped(like)
        for link in links:
            key = (link.kind, x.shape, x.dtype, x.requires_grad)
            if key not in known:
                known[key] = _piece(link, x, given)
            piece, x = known[key]
            pieces.append(piece)
    return pieces


def reruns(links: Sequence[Link], around: Callable[[Forward], Forward], given: Given) -> list[tuple[int, float]]:
    """(bytes kept, cost of what runs again) of each block when it checkpoints itself."""
    known = {link.kind: link for link in links}
    found = {kind: _rerun(link, around(link.forward), given) for kind, link in known.items()}
    return [found[link.kind] for link in links]


def _rerun(link: Link, forward: Forward, given: Given) -> tuple[int, float]:
    with shapes_only(given.input()) as like:
        x = like(given.input()).requires_grad_()
        trace, held = watched(link.block, x)
        before = trace.live
        with trace:
            y = handed_on(given.mapped(like).call(forward, x))
            kept = trace.live - before - y.untyped_storage().nbytes()
            torch.autograd.grad(y, x, torch.empty_like(y))
        del held
        return kept, price([op for op in trace.ops if op.phase == "recompute"])


def watched(block: nn.Module, x: Tensor) -> tuple[Trace, list[Tensor]]:
    """A trace that knows a block's input and weights; they are returned, as what is not held is converted anew."""
    mode = detect_fake_mode()
    assert mode is not None
    trace = Trace()
    trace.part = "step"
    weights = [*block.parameters(), *block.buffers()]
    held = [x, *(w if isinstance(w, FakeTensor) else mode.from_tensor(w) for w in weights)]
    trace.register(held)
    return trace, held


@contextmanager
def shapes_only(x: Tensor) -> Iterator[Callable[[Any], Any]]:
    """A place where nothing is computed and nobody watches; gives what makes tensors with shapes like others'."""
    mode = x.fake_mode if isinstance(x, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)

    def like(value: Any) -> Any:
        return tree_map_only(Tensor, lambda t: torch.empty_like(t).requires_grad_(t.requires_grad), value)

    with _disable_current_modes(), mode, torch.enable_grad():
        yield like


def _piece(link: Link, x: Tensor, given: Given) -> tuple[Piece, Tensor]:
    """A block's piece, and the input of the next."""
    packed: list[int] = []
    trace, held = watched(link.block, x)
    before = trace.live

    def pack(t: Tensor) -> Tensor:
        packed.append(len(trace.ops))
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), trace:
        out = given.call(link.forward, x)
        y = handed_on(out)
        node, size = y.grad_fn, y.untyped_storage().nbytes()
    following = torch.empty_like(y).requires_grad_(y.requires_grad)
    del out, y
    kept, full = trace.live - before, max(trace.peak - before, trace.live - before + size)
    del node, held
    again = trace.ops[: packed[-1]] if packed else []
    return Piece(price(trace.ops), price(again), x.untyped_storage().nbytes(), kept, full), following
