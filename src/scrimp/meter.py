"""What a run uses: live bytes, resident memory, FLOPs, and the machine's own matrix-product rate."""

from __future__ import annotations

import resource
import sys
import time
import weakref
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

from scrimp.disk import extent_of

PACKED: Final = 2
"""Packed weights a byte."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages made inside the context, and their peak. Works on real and on fake tensors.

    A storage counts from the operator that returns it until its last tensor is gone; views and aliases count once.
    What an operator needs only while it runs is not seen. What an engine such as `fully_shard` fills by an operator of
    its own, it may also empty and grow again, of which no operator tells: those storages are looked at before each one.

    Attributes:
        live: bytes alive now, of storages made or registered since the context began.
        peak: the largest `live` so far.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._loose: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        """Storages that may be resized."""

    def register(self, value: Any) -> None:
        """Count the storages of tensors made before the context began."""
        for tensor in tree_iter(value):
            if isinstance(tensor, torch.Tensor):
                for storage in storages(tensor):
                    self._add(storage)

    def _add(self, storage: torch.UntypedStorage) -> None:
        # The Python object of a storage lives as long as the storage does, so its end is the end of the memory.
        key, size = storage._cdata, storage.nbytes()  # pyright: ignore[reportPrivateUsage]
        if key not in self._sizes:
            weakref.finalize(storage, self._drop, key).atexit = False
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator, with what was resized before it."""
        for key, found in list(self._loose.items()):
            storage = found()
            if storage is not None and storage.nbytes() != self._sizes.get(key):
                self._add(storage)
            if storage is None or not storage.nbytes():
                del self._loose[key]
        out = func(*args, **kwargs)
        if func.namespace == "fsdp":
            for tensor in tree_iter((args, kwargs)):
                for storage in storages(tensor) if isinstance(tensor, torch.Tensor) else ():
                    self._add(storage)
                    self._loose[storage._cdata] = weakref.ref(storage)  # pyright: ignore[reportPrivateUsage]
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._run(func, args, kwargs or {})
        self.register(out)
        return out


def storages(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """The memory behind a tensor; that of its parts when it wraps others, none if it is on disk or only shapes."""
    if not is_traceable_wrapper_subclass(tensor):
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        without = device.type == "meta" or extent_of(tensor) is not None
        return [] if without else [tensor.untyped_storage()]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = [getattr(tensor, name) for name in names]
    return [storage for part in parts if isinstance(part, torch.Tensor) for storage in storages(part)]


def resident_peak() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def memory_peak(device: torch.device) -> int:
    """Peak memory in bytes: allocated on a CUDA device, resident on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()


def weights(model: nn.Module) -> tuple[int, int, int]:
    """How many weights a model has, how many of them are trained, and how many are packed.

    Packed ones count as what they stand for, two a byte; the scales beside them, which are vectors of bytes, do not.
    """
    packed = sum(PACKED * p.numel() for p in model.parameters() if p.dtype == torch.uint8 and p.ndim >= 2)
    plain = [p for p in model.parameters() if p.dtype != torch.uint8]
    trained = sum(p.numel() for p in plain if p.requires_grad)
    return packed + sum(p.numel() for p in plain), trained, packed


def flops_per_token(model: nn.Module, tokens: int) -> float:
    """Algorithmic FLOPs of one training token: 6 a weight of a matrix product, and the causal half of attention.

    Args:
        tokens: length of a sequence. Recomputation is not counted.
    """
    config = getattr(model, "config", None)
    # A tensor with several names works under each of them, but a tied head's table does so only as the head.
    ours = type(model).__module__.startswith("scrimp.")
    tables = (".positions.weight", ".embed.weight")
    weights = sum(
        p.numel() * (PACKED if p.dtype == torch.uint8 else 1)
        for n, p in model.named_parameters(remove_duplicate=not ours)
        if p.ndim >= 2 and not f".{n}".endswith(tables)
    )
    layers = len(model.blocks) if isinstance(getattr(model, "blocks", None), nn.ModuleList) else 0  # type: ignore[arg-type]
    attention = 6 * layers * getattr(config, "heads", 0) * getattr(config, "head_dim", 0) * tokens
    return 6 * weights + attention


def gemm_rate(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 0.15) -> float:
    """FLOP/s of a square matrix product on this device, the best of a few; takes about `seconds`."""
    size = 1024 if device.type == "cpu" else 4096
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best
