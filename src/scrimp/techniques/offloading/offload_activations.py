"""Activations leave the memory of the device between their forward and their backward pass.

    forward of block l     what it saves for the backward pass goes to the next slower memory, in the background
    backward of block l    it comes back; while it is computed, that of block l - 1 is on its way

On a GPU the slower memory is the host's (`to: host`); on a CPU, whose device memory is the machine's own, it is the
disk (`to: disk`). The last blocks stay, since they are needed at once. The file on disk has no name and vanishes with
the process; it has checksums, and it passes the page cache by.

Papers: Rhu et al., "vDNN", MICRO 2016, arXiv 1602.08124; Beaumont et al., "Optimal GPU-CPU Offloading Strategies for
Deep Neural Network Training", Euro-Par 2020; disk: Rajbhandari et al., "ZeRO-Infinity", SC 2021, arXiv 2104.07857.

Saves: activations of all blocks but the last and the one at work. Costs: twice their bytes over the bus or to the disk
each step; time, where that takes longer than the computation beside it. Not for: runs that fit, small batches, whose
peak is the update, or disks that wear out. With `recompute` only the inputs of blocks move: a sixteenth.
Gradients are bitwise those of a run without.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from scrimp.disk import Scratch, home, in_memory
from scrimp.errors import UserError
from scrimp.models.seams import blocks, matching
from scrimp.saved import treat
from scrimp.spill import Spill
from scrimp.technique import Card, Cost, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class OffloadActivations(Technique):
    """Activations in the host's memory, or on disk, until the backward pass."""

    card = Card(
        paper="arXiv:1602.08124",
        section="Offloading",
        saves="activations of all blocks but the last",
        costs="their way to the host or to disk and back, each step",
        sets=("place of activations",),
        phase={"wrap": "saved"},
        example={"least": 1024},
        neutral={"fraction": 0.0},
    )
    to: Literal["auto", "host", "disk"] = "auto"
    """host: pinned memory beside a GPU. disk: a file. auto: host on a GPU, disk on a CPU."""
    fraction: float = 1.0
    """Share of the blocks that are offloaded, from the first, whose activations wait longest."""
    keep: int = 1
    """How many of the last blocks keep their activations: the backward pass begins with them, so that these would come
    back as soon as they have left."""
    depth: int = 1
    """Blocks before the one at work whose activations are fetched early in the backward pass; 0: only its own."""
    least: int = 65536
    """Bytes of the smallest tensor that is worth moving."""
    buffer: int = 64
    """MiB of memory for what is on its way."""
    folder: str = ""
    """Where the file shall be; empty means where the run's folder is. A fast local disk."""
    blocks: str = ""
    """Pattern of the modules to treat; empty means the model's blocks."""

    def __post_init__(self) -> None:
        at_least(0, self, "fraction", "keep", "depth", "least")
        at_least(2, self, "buffer")
        if self.fraction > 1:
            raise UserError(f"fraction must be at most 1, not {self.fraction}.")

    def anchored(self) -> OffloadActivations:
        """With an absolute path."""
        return replace(self, folder=str(Path(self.folder).absolute())) if self.folder else self

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Move what the chosen blocks save."""
        if self.blocks:
            modules = dict(model.named_modules())
            found = matching(self.blocks, [n for n in modules if n], "module", run.where(self, "blocks"))
            every = [modules[name] for name in found]
        else:
            every = list(blocks(model, run.where(self)).values())
        # A model that has grown to one block only has no last one to keep.
        most = max(1, len(every) - self.keep)
        chosen = every[: min(most, round(self.fraction * len(every)))]
        if self.to == "host" and run.device.type == "cpu":
            run.remarks.append("offload_activations saves nothing: on a CPU, the host's memory is the device's. "
                               "Set its `to` to disk.")  # fmt: skip
        elif chosen:
            line = Line(self._store(run), self.least, self.depth)
            treat(chosen, "move", line.pack, line.unpack)
        return model

    def price(self, cost: Cost, run: Run) -> Cost:
        """The buffer."""
        return replace(cost, bytes=cost.bytes + (self.buffer << 20))

    def _store(self, run: Run) -> Store:
        if self.to == "host" or (self.to == "auto" and run.device.type == "cuda"):
            return Host(self.buffer << 20)
        folder = home(self.folder, getattr(run.recipe, "out", "."))
        if in_memory(folder):
            run.remarks.append(f"offload_activations saves nothing: {folder} is kept in memory. Set its `folder`.")
        return Disk(folder, self.buffer << 20, run.where(self, "folder"))


class Store(Protocol):
    """Where tensors go."""

    def put(self, tensor: Tensor) -> Any:
        """Begin to move a tensor out; what is returned stands for it, and its end frees the place."""

    def fetch(self, kept: Any) -> bool:
        """Begin to bring it back; returns whether there was room."""
        ...

    def take(self, kept: Any, like: Moved) -> Tensor:
        """The tensor, once it is back."""
        ...


@dataclass(eq=False)
class Moved:
    """A tensor that is elsewhere. Only the graph refers to it."""

    kept: Any
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    place: int
    """In the line of what waits."""
    block: int


class Line:
    """What waits for the backward pass, in the order in which it left; it comes back in the reverse one."""

    def __init__(self, store: Store, least: int, depth: int) -> None:
        self.store, self.least, self.depth = store, least, depth
        self.waiting: list[weakref.ref[Moved]] = []

    def pack(self, tensor: Tensor, block: int) -> Tensor | Moved:
        """Let a tensor go."""
        if tensor.nbytes < self.least:
            return tensor
        while self.waiting and self.waiting[-1]() is None:
            self.waiting.pop()
        kept = None if isinstance(tensor, FakeTensor) else self.store.put(tensor)
        moved = Moved(kept, tensor.shape, tensor.dtype, tensor.device, len(self.waiting), block)
        self.waiting.append(weakref.ref(moved))
        return moved

    def unpack(self, moved: Moved) -> Tensor:
        """Have it back, and let those that are needed next follow."""
        if moved.kept is None:
            return torch.empty(moved.shape, dtype=moved.dtype, device=moved.device)
        tensor = self.store.take(moved.kept, moved)
        for place in range(moved.place - 1, -1, -1):
            following = self.waiting[place]() if place < len(self.waiting) else None
            if following is None:
                continue
            if following.block < moved.block - self.depth or not self.store.fetch(following.kept):
                break
        return tensor


class Disk:
    """A file. It is made when the first tensor comes, so that building a run to look at it makes none."""

    def __init__(self, folder: Path, buffer: int, where: str) -> None:
        self.folder, self.buffer, self.where = folder, buffer, where
        self.spill: Spill | None = None

    def put(self, tensor: Tensor) -> Any:
        """Its bytes into the buffer, and from there to disk."""
        if self.spill is None:
            self.spill = Spill(Scratch(self.folder, self.where), self.buffer)
        near = tensor.cpu()
        return self.spill.put(near.data_ptr(), near.nbytes)

    def fetch(self, kept: Any) -> bool:
        """From disk into the buffer."""
        assert self.spill is not None
        return self.spill.fetch(kept)

    def take(self, kept: Any, like: Moved) -> Tensor:
        """From the buffer, or from disk."""
        assert self.spill is not None
        near = torch.empty(like.shape, dtype=like.dtype)
        self.spill.take(kept, near.data_ptr())
        return near.to(like.device)


@dataclass(eq=False)
class Pinned:
    """A tensor in the host's memory, and on its way back."""

    host: Tensor
    left: torch.cuda.Event
    back: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class Host:
    """Pinned memory beside a GPU. A stream for each direction; the tensors on their way out are held until they left.

    Args:
        buffer: bytes that may be on their way out before the computation waits for the oldest.
    """

    def __init__(self, buffer: int) -> None:
        self.buffer, self.held = buffer, 0
        self.leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def put(self, tensor: Tensor) -> Pinned:
        """Copy to the host beside the computation."""
        if self.streams is None:
            self.streams = torch.cuda.Stream(tensor.device), torch.cuda.Stream(tensor.device)
        here, out = torch.cuda.current_stream(tensor.device), self.streams[0]
        out.wait_stream(here)
        with torch.cuda.stream(out):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        left = torch.cuda.Event()
        left.record(out)
        self.leaving.append((tensor, left))
        self.held += tensor.nbytes
        self._let_go(self.buffer)
        return Pinned(host, left)

    def _let_go(self, most: int) -> None:
        """Hold no more tensors that are on their way out than so many bytes, but for those that have left."""
        while self.leaving and (self.held > most or self.leaving[0][1].query()):
            # What is freed on this stream after the event is not written over before it was copied.
            oldest, event = self.leaving.popleft()
            torch.cuda.current_stream(oldest.device).wait_event(event)
            self.held -= oldest.nbytes

    def fetch(self, kept: Pinned) -> bool:
        """Copy to the device beside the computation."""
        assert self.streams is not None
        if kept.back is None:
            device = self.streams[1].device
            kept.back = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=device)
            # The memory may still be in use by what was launched before.
            self.streams[1].wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self.streams[1]):
                self.streams[1].wait_event(kept.left)
                kept.back.copy_(kept.host, non_blocking=True)
            kept.back.record_stream(self.streams[1])
            kept.arrived = torch.cuda.Event()
            kept.arrived.record(self.streams[1])
        return True

    def take(self, kept: Pinned, like: Moved) -> Tensor:
        """The computation waits until it is there."""
        self._let_go(0)
        self.fetch(kept)
        assert kept.back is not None
        assert kept.arrived is not None
        torch.cuda.current_stream(like.device).wait_event(kept.arrived)
        back, kept.back = kept.back, None
        return back
