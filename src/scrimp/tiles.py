# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Updates of weights a tile at a time, whose states are in a file and are read and written beside the update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scrimp.disk import PAGE, Extent, Imagined, Scratch, aligned, extent_of, fetch
from scrimp.sharding import follow

SLOTS: Final = 3
"""Sets of buffers: one is read, one updated, one written."""


class Moments(MutableMapping[str, Tensor]):
    """The states of one parameter. Scalars, such as a count of steps, stay in memory."""

    def __init__(self, file: Scratch | None) -> None:
        self.file = file
        self.scalars: dict[str, Tensor] = {}
        self.extents: dict[str, Extent | Imagined] = {}

    def extent(self, moment: str, like: Tensor, shape: torch.Size) -> Extent | Imagined:
        """Where a moment is; made when it is new."""
        if moment not in self.extents:
            file = self.file
            self.extents[moment] = Imagined(shape, like.dtype) if file is None else file.extent(shape, like.dtype)
        return self.extents[moment]

    def __getitem__(self, moment: str) -> Tensor:
        return self.scalars[moment] if moment in self.scalars else self.extents[moment].mapped()

    def __setitem__(self, moment: str, value: Tensor) -> None:
        if value.ndim == 0:
            self.scalars[moment] = value
            return
        place = self.extent(moment, value, value.shape)
        place.mapped().copy_(value)
        place.settle()

    def __delitem__(self, moment: str) -> None:
        del (self.scalars if moment in self.scalars else self.extents)[moment]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.scalars, *self.extents])

    def __len__(self) -> int:
        return len(self.scalars) + len(self.extents)


class States(defaultdict[Tensor, Any]):
    """An optimizer's table of states, as others see it: parameter -> moment -> tensor."""

    def __init__(self, file: Scratch | None) -> None:
        super().__init__()
        self.file = file

    def __missing__(self, p: Tensor) -> Moments:
        self[p] = Moments(self.file)
        return self[p]


@dataclass(frozen=True)
class Piece:
    """Some weights of one parameter."""

    p: nn.Parameter
    group: dict[str, Any]
    start: int
    """First weight, or -1: the tensor as it is."""
    stop: int
    last: bool
    """Whether the parameter ends with it."""
    scalars: dict[str, Tensor]
    extents: dict[str, Extent | Imagined]
    """States of the parameter when the step began, so that all its pieces begin alike."""

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor of the parameter's shape."""
        return tensor.reshape(-1)[self.start : self.stop] if self.start >= 0 else tensor


def pieces(group: dict[str, Any], size: int, states: States) -> Iterator[Piece]:
    """What a step updates, in order; `size` weights at a time, or whole tensors if it is 0."""
    for p in group["params"]:
        if p.grad is None:
            continue
        known = dict(states[p].scalars), dict(states[p].extents)
        if size == 0 or p.ndim == 0 or not p.is_contiguous():
            yield Piece(p, group, -1, p.numel(), True, *known)
            continue
        for start in range(0, p.numel(), size):
            yield Piece(p, group, start, min(start + size, p.numel()), start + size >= p.numel(), *known)


class Buffers:
    """Memory for the states of one piece, used again and again."""

    def __init__(self) -> None:
        self.raw: dict[str, Tensor] = {}

    def view(self, moment: str, extent: Extent | Imagined, piece: Piece) -> tuple[Tensor, Tensor, int]:
        """(whole pages as bytes, the states in them, the byte of the extent at which they begin)."""
        whole = piece.start < 0
        shape = extent.shape if whole else torch.Size([piece.stop - piece.start])
        begin = 0 if whole else piece.start * extent.dtype.itemsize
        size = shape.numel() * extent.dtype.itemsize
        pages = -(-size // PAGE) * PAGE
        if moment not in self.raw or len(self.raw[moment]) < pages:
            self.raw[moment] = aligned(pages)
        part = self.raw[moment][:pages]
        return part, part[:size].view(extent.dtype).view(shape), begin


def stream(work: list[Piece], states: States, rule: Optimizer, step: Callable[[], Any]) -> None:
    """Update all pieces, while a thread reads the next one's states and another writes the last one's."""
    slots = [Buffers() for _ in range(SLOTS)]
    writes: list[list[Future[None]]] = [[] for _ in range(SLOTS)]
    with ThreadPoolExecutor(SLOTS) as pool:
        ahead = begin(work[0], slots[0], pool) if work else ({}, [])
        for i, piece in enumerate(work):
            given, reads = ahead
            if i + 1 < len(work):
                following = (i + 1) % SLOTS
                finished(writes[following])
                ahead = begin(work[i + 1], slots[following], pool)
            finished(reads)
            update(piece, given, rule, step)
            writes[i % SLOTS] = end(piece, rule, states, slots[i % SLOTS], given, pool)
        for pending in writes:
            finished(pending)


def finished(pending: list[Future[None]]) -> None:
    """Wait; an error of a thread is raised here."""
    for future in pending:
        future.result()
    pending.clear()


def begin(piece: Piece, slot: Buffers, pool: ThreadPoolExecutor) -> tuple[dict[str, Tensor], list[Future[None]]]:
    """Start to read a piece's states; returns the tensors in which they will be."""
    given: dict[str, Tensor] = {}
    reads: list[Future[None]] = []
    if piece.start <= 0:
        fetch(piece.p)
    for moment, extent in piece.extents.items():
        raw, given[moment], at = slot.view(moment, extent, piece)
        if isinstance(extent, Extent):
            reads.append(pool.submit(extent.read, raw, at))
    return given, reads


def update(piece: Piece, given: dict[str, Tensor], rule: Optimizer, step: Callable[[], Any]) -> None:
    """One step of the rule on one piece, as if it were a parameter of its own."""
    assert piece.p.grad is not None
    part = nn.Parameter(piece.of(piece.p.detach()), requires_grad=False)
    follow(part, piece.p)
    part.grad = piece.of(piece.p.grad)
    scalars = {moment: value.clone() for moment, value in piece.scalars.items()}
    on_device = {moment: value.to(piece.p.device) for moment, value in given.items()}
    rule.param_groups = [{**piece.group, "params": [part]}]
    rule.state = defaultdict(dict, {part: {**scalars, **on_device}} if scalars or given else {})
    step()


def end(
    piece: Piece, rule: Optimizer, states: States, slot: Buffers, given: dict[str, Tensor], pool: ThreadPoolExecutor
) -> list[Future[None]]:
    """Start to write what the rule left, and let go of a parameter that is done."""
    pending: list[Future[None]] = []
    moments = states[piece.p]
    for left in rule.state.values():
        for moment, value in left.items():
            if value.ndim == 0:
                if piece.last:
                    moments.scalars[moment] = value
                continue
            extent = moments.extent(moment, value, value.shape if piece.start < 0 else piece.p.shape)
            raw, view, at = slot.view(moment, extent, piece)
            if value is not given.get(moment):
                view.copy_(value)
            if isinstance(extent, Extent):
                pending.append(pool.submit(extent.write, raw, at))
    for tensor in (piece.p, piece.p.grad) if piece.last else ():
        if tensor is not None and isinstance(place := extent_of(tensor), Extent):
            pending.append(pool.submit(place.settle))
    return pending
