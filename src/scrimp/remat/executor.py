"""Runs a chain of blocks while keeping what a policy says, and runs parts again when the backward pass asks for them.

A block's forward pass runs under hooks that stand in for every tensor that autograd would save: autograd gets a holder.
When the backward pass opens an empty one, the policy runs blocks again until it is full. A block's call knows the call
whose output it got, so that its input need not be kept either.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from scrimp.remat.chain import Schedule
from scrimp.remat.given import Forward, Given, handed_on


class Policy(Protocol):
    """Decides what is kept."""

    def plainly(self, block: int, forward: Forward) -> Forward | None:
        """A forward pass that needs no call, because nothing of it is ever run again from here; None where one is."""
        ...

    def forward(self, call: Call, x: Tensor) -> Any:
        """Run the call for the first time; returns what the block returns."""
        ...

    def restore(self, call: Call) -> None:
        """Fill the call's holders, which the backward pass needs now."""
        ...


@dataclass(frozen=True)
class Around:
    """What keeps and runs again by itself, block by block, instead of a policy."""

    wrap: Callable[[Forward], Forward]


class Holder:
    """Stands in for a tensor that autograd saves."""

    __slots__ = ("__weakref__", "call", "value")

    def __init__(self, call: Call, value: Tensor | None) -> None:
        self.call, self.value = call, value


class StoppedError(Exception):
    """All that a block's backward pass needs is there, and its output is not wanted."""


class Call:
    """One run of a block in a forward pass, and what runs it again.

    Attributes:
        source: the call whose output was the input; None where that is not known.
        input: the input, while it is held; where there is no source, always.
    """

    def __init__(self, block: int, forward: Forward, policy: Policy, source: Call | None, given: Given) -> None:
        self.block, self.source, self.policy = block, source, policy
        self.input: Tensor | None = None
        self._forward, self._given = forward, given.rest()
        self._needs_grad = given.input().requires_grad
        self._holders: list[weakref.ref[Holder]] = []

    def begin(self, x: Tensor, keep: bool) -> Any:
        """The first run.

        Args:
            keep: whether the holders get their tensors.
        """

        def pack(t: Tensor) -> Holder:
            holder = Holder(self, t.detach() if keep else None)
            self._holders.append(weakref.ref(holder))
            return holder

        def unpack(holder: Holder) -> Tensor:
            if holder.value is None:
                self.policy.restore(self)
            value, holder.value = holder.value, None
            if value is None:
                raise RuntimeError("A block kept other tensors when it ran again: it is not deterministic.")
            return value

        if self.source is None:
            self.input = x.detach()
        with saved_tensors_hooks(pack, unpack):
            out = self._given.call(self._forward, x)
        return out

    def again(self, x: Tensor, keep: bool, stop: bool = False) -> Tensor | None:
        """Run the block again; returns its output, or None when it stopped before.

        Args:
            keep: whether the holders get their tensors.
            stop: whether the output is not wanted.
        """
        count = 0

        def pack(t: Tensor) -> Tensor | None:
            nonlocal count
            t = t.detach()
            holder = self._holders[count]() if count < len(self._holders) else None
            count += 1
            if keep and holder is not None:
                holder.value = t
            if stop and count == len(self._holders):
                raise StoppedError
            return t if keep else None

        def unpack(t: Tensor | None) -> Tensor:
            if t is None:
                raise RuntimeError("A block computes gradients in its forward pass; use mode block.")
            return t

        x = x.detach().requires_grad_(self._needs_grad)
        try:
            with torch.enable_grad(), self._given.restored(), saved_tensors_hooks(pack, unpack):
                out = self._given.call(self._forward, x)
        except StoppedError:
            return None
        return handed_on(out).detach()

    def drop(self) -> None:
        """Empty the holders."""
        for holder in self.holders():
            holder.value = None

    def holders(self) -> list[Holder]:
        """Those that autograd has not let go of."""
        return [holder for ref in self._holders if (holder := ref()) is not None]


class Scheduled:
    """Keeps and runs again what a schedule says."""

    def __init__(self, schedule: Schedule) -> None:
        self.rows = [{step.block: step for step in row} for row in schedule.before]
        self.first = {step.block: step for step in schedule.forward}

    def plainly(self, block: int, forward: Forward) -> Forward | None:
        """The block as it is, where its pack is kept from the first."""
        return forward if self.first[block].pack else None

    def forward(self, call: Call, x: Tensor) -> Any:
        """Hold the input where the schedule holds the output of the block before."""
        if call.block > 0 and self.first[call.block - 1].output:
            call.source = None
        return call.begin(x, keep=False)

    def restore(self, call: Call) -> None:
        """From the nearest input that is held, forward to the call."""
        line = lineage(call)
        x, steps = line[0].input, self.rows[call.block]
        for before, after in pairwise(line):
            step = steps.get(before.block)
            assert x is not None
            x = before.again(x, keep=step is not None and step.pack)
            if step is not None and step.output:
                after.input = x
        assert x is not None
        call.again(x, keep=True, stop=True)


def lineage(call: Call) -> list[Call]:
    """Calls from the nearest whose input is held up to this one."""
    line = [call]
    while line[-1].input is None:
        source = line[-1].source
        assert source is not None
        line.append(source)
    return line[::-1]


class Player:
    """Plays a chain.

    Args:
        forwards: of its blocks.
        policy: arguments of the first block -> what a pass is run by, asked once for each kind of input; None keeps
            all.
        draws: whether blocks may draw from torch's generator.
    """

    def __init__(
        self, forwards: Sequence[Forward], policy: Callable[[Given], Policy | Around | None], draws: bool
    ) -> None:
        self._forwards, self._decide, self._draws = forwards, policy, draws
        self._policies: dict[tuple[Any, ...], Policy | Around | None] = {}
        self._policy: Policy | Around | None = None
        self._place = -1
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[Call]] | None = None

    def run(self, block: int, /, *args: Any, **kwargs: Any) -> Any:
        """A block's forward pass."""
        forward = self._forwards[block]
        given = Given.of(args, kwargs, self._draws) if torch.is_grad_enabled() else None
        if given is None:
            return forward(*args, **kwargs)
        if block <= self._place or self._place < 0:
            self._policy = self._policy_of(given)
        self._place = block
        if self._policy is None:
            return forward(*args, **kwargs)
        if isinstance(self._policy, Around):
            return self._policy.wrap(forward)(*args, **kwargs)
        whole = self._policy.plainly(block, forward)
        if whole is not None:
            return whole(*args, **kwargs)
        x = given.input()
        call = Call(block, forward, self._policy, self._source(x), given)
        out = self._policy.forward(call, x)
        y = handed_on(out)
        self._last = (weakref.ref(y), y._version, weakref.ref(call))
        return out

    def _source(self, x: Tensor) -> Call | None:
        """The call that made x, if nothing changed it since."""
        if self._last is None:
            return None
        made, version, call = self._last
        self._last = None
        return call() if made() is x and x._version == version else None

    def _policy_of(self, given: Given) -> Policy | Around | None:
        x = given.input()
        kind = x.device.type
        cast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        key = (x.shape, x.dtype, x.requires_grad, cast)
        if key not in self._policies:
            self._policies[key] = self._decide(given)
        return self._policies[key]
