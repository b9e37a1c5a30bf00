"""Optimizer states on disk, brought into memory a tile at a time.

    for tile n of all weights:   read states of n+1  |  update n  |  write states of n-1

The three go on at once, in three sets of buffers, so that a step takes as long as the slowest of them. The update is
that of the rule itself, on a piece of each weight, so that every number is bitwise that of a run in memory.

Paper: Rajbhandari et al., "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning", SC 2021,
arXiv 2104.07857, which keeps states on NVMe disks.

Saves: the optimizer's states: 8 bytes a weight with adamw, 4 with lion. Costs: each of them is read and written once a
step; a disk of 1 GB/s takes 16 s for adamw's states of a billion weights. Not for: states that fit; a folder in memory
(tmpfs), which saves nothing; flash that wears out, as a long run writes many times its states.

The file has no name: it is gone when the process ends, however it ends. Checkpoints hold the states, as ever.
Rules that look at whole tensors (lamb, lars, muon) get tensors whole; their largest one bounds the buffers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scrimp.disk import PAGE, Extent, Imagined, Scratch, aligned, extent_of, fetch, home, in_memory
from scrimp.errors import UserError
from scrimp.groups import Group, parts
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run

SLOTS: Final = 3
"""Sets of buffers: one is read, one updated, one written."""


@dataclass(frozen=True, kw_only=True)
class OffloadStates(Technique):
    """Optimizer states on disk, brought into memory a tile at a time."""

    card = Card(
        paper="arXiv:2104.07857",
        section="Offloading",
        claim="over 25 petaflops on 512 V100 GPUs, 40 % of their peak (abstract of 2104.07857)",
        saves="the optimizer's states in memory",
        costs="disk traffic: each state is read and written once a step",
        sets=("place of optimizer states",),
        refuses={"sharding": "Shards of optimizer states are not offloaded."},
        phase={"optimizer": "states"},
        whole="files hold tiles of whole weights.",
        example={"tile": 1024},
        remedies=({},),
        neutral={"tile": 1024},
    )
    folder: str = ""
    """Where the file shall be; empty means where the run's folder is. A fast local disk."""
    tile: int = 4_194_304
    """Weights updated at a time. Three tiles of each state are in memory."""

    def __post_init__(self) -> None:
        at_least(1, self, "tile")

    def anchored(self) -> OffloadStates:
        """With an absolute path."""
        return replace(self, folder=str(Path(self.folder).absolute())) if self.folder else self

    def optimizer(self, make: Callable[[list[Group]], Optimizer], run: Run) -> Callable[[list[Group]], Optimizer]:
        """The same optimizer, whose states are elsewhere."""

        def made(groups: list[Group]) -> Optimizer:
            optimizer = make(groups)
            folder = home(self.folder, run.recipe.out)
            if in_memory(folder):
                run.remarks.append(f"offload_states saves nothing: {folder} is kept in memory. Set its `folder`.")
            file = Scratch(folder, run.where(self, "folder")) if detect_fake_mode() is None else None
            for rule in parts(optimizer):
                if getattr(rule, "clip", 0):
                    fix = "Set its `clip` to 0 and use the technique clip."
                    what = f"{type(rule).__name__} clips all gradients together, which needs all tensors at once."
                    raise UserError(what, run.where(self), fix)
                if any(is_traceable_wrapper_subclass(p) for g in rule.param_groups for p in g["params"]):
                    raise UserError("sharded weights cannot be updated in tiles.", run.where(self), "Drop one of them.")
                offload(rule, file, self.tile)
            return optimizer

        return made


def offload(rule: Optimizer, file: Scratch | None, tile: int) -> None:
    """Keep a rule's states in a file and let it step in tiles. Only this instance changes.

    Args:
        file: None while planning.
        tile: weights at a time, rounded up to whole pages.
    """
    whole = rule.step
    states = States(file)
    rule.state = states
    size = -(-tile // PAGE) * PAGE if elementwise(rule) else 0

    def step(closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = rule.param_groups
        try:
            with torch.no_grad():
                stream([piece for group in groups for piece in pieces(group, size, states)], states, rule, whole)
        finally:
            rule.param_groups, rule.state = groups, states
        return loss

    rule.step = step  # type: ignore[method-assign]


def elementwise(rule: Optimizer) -> bool:
    """Whether a rule treats each weight on its own, so that pieces of a tensor are updated like the whole."""
    return getattr(rule, "elementwise", isinstance(rule, SGD | Adam | AdamW))


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
