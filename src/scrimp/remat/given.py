"""What a block is called with, so that it can be called again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from copy import copy
from typing import Any

import torch
from torch import Tensor

from scrimp.errors import UserError

Forward = Callable[..., Any]


class Given:
    """The arguments of a block and the state that it runs in.

    Args:
        draws: whether it may draw from torch's generator.
    """

    def __init__(self, place: int | str, args: Any, kwargs: Any, draws: bool) -> None:
        self.place, self.draws, self._args, self._kwargs = place, draws, args, kwargs
        kinds = {"cpu", self.input().device.type}
        self._casts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in kinds
        ]
        self._devices = [self.input().device] if draws and self.input().is_cuda else []
        self._random = torch.get_rng_state() if draws else None
        self._random_there = [torch.cuda.get_rng_state(device) for device in self._devices]

    @classmethod
    def of(cls, args: Any, kwargs: Any, draws: bool) -> Given | None:
        """None where no argument is a tensor."""
        if args and isinstance(args[0], Tensor):
            return cls(0, args, kwargs, draws)
        key = next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None) if not args else None
        return cls(key, args, kwargs, draws) if key is not None else None

    def input(self) -> Tensor:
        """What the block works on."""
        return self._args[self.place] if isinstance(self.place, int) else self._kwargs[self.place]

    def rest(self) -> Given:
        """The same without the input."""
        return self.mapped(lambda value: None if value is self.input() else value)

    def mapped(self, change: Callable[[Any], Any]) -> Given:
        """The same with every argument changed."""
        other = copy(self)
        other._args = tuple(change(value) for value in self._args)
        other._kwargs = {key: change(value) for key, value in self._kwargs.items()}
        return other

    def call(self, forward: Forward, x: Tensor) -> Any:
        """A block's output on x."""
        if isinstance(self.place, int):
            return forward(*self._args[: self.place], x, *self._args[self.place + 1 :], **self._kwargs)
        return forward(*self._args, **{**self._kwargs, self.place: x})

    def restored(self) -> AbstractContextManager[Any]:
        """The state again: autocast, and torch's generator."""
        stack = ExitStack()
        for kind, dtype, enabled, cached in self._casts:
            stack.enter_context(torch.autocast(kind, dtype, enabled, cached))
        if self._random is not None:
            stack.enter_context(torch.random.fork_rng(self._devices))
            torch.set_rng_state(self._random)
            for device, state in zip(self._devices, self._random_there, strict=True):
                torch.cuda.set_rng_state(state, device)
        return stack


def handed_on(out: Any) -> Tensor:
    """What the next block gets: the output, or the first of several.

    Raises:
        UserError: if it is no tensor.
    """
    first = out[0] if isinstance(out, tuple | list) and out else out
    if not isinstance(first, Tensor):
        raise UserError(f"a block hands on {type(out).__name__}, not a tensor.", "", "Use mode block.")
    return first
