# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A rank's own time in a step: that in which it waits for no other rank.

    replicate, zero at stage 1    loading its part of a batch, the forward pass, the backward pass up to its last
                                  gradient, and the update
    zero at stages 2 and 3        loading, the forward pass of each block once its weights are there, and the update
    tensor, context               loading and the update: within each layer a rank waits for the others
    pipeline                      nothing: stages have different work

An update in which ranks send each other something counts with the time that this takes. Waiting makes ranks equal: it
can hide who is slow, and accuses nobody.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

    from scrimp.world import World


class Stopwatch:
    """A rank's own time, step by step. It runs between `resume` and the last `pause` behind it.

    On a CUDA device it is the device's time; nothing waits for the device before `read`. Until the first `begin`
    nothing is measured.
    """

    def __init__(self) -> None:
        self.steps: list[list[tuple[Any, Any]]] = []
        self.cuda = self.running = False
        self.since: Any = None
        self.until: Any = None

    def begin(self, device: torch.device, world: World) -> None:
        """A step begins. It is measured if ranks can be compared: stages of a pipeline have different work."""
        if world.size == 1 or world.ranks("pipeline") > 1:
            return
        self.cuda, self.running = device.type == "cuda", True
        self.steps.append([])
        self.since = self.until = None
        self.resume()

    def resume(self) -> None:
        """From here on this rank works on its own."""
        self._keep()
        self.since = self._now() if self.running else None

    def pause(self) -> None:
        """From here on this rank may be waiting, unless it says the same again later."""
        if self.since is not None:
            self.until = self._now()

    def end(self) -> None:
        """The step ends."""
        self.pause()
        self._keep()
        self.running = False

    def read(self) -> float:
        """Seconds of the median step since the last reading; 0 if there was none."""
        if self.cuda:
            torch.cuda.synchronize()
        found = [sum(self._seconds(*span) for span in spans) for spans in self.steps]
        self.steps.clear()
        return statistics.median(found) if found else 0.0

    def _keep(self) -> None:
        if self.until is not None:
            self.steps[-1].append((self.since, self.until))
        self.since = self.until = None

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, since: Any, until: Any) -> float:
        return since.elapsed_time(until) / 1e3 if self.cuda else until - since


def watch(block: nn.Module, clock: Stopwatch) -> None:
    """Count the forward pass of a block whose weights are gathered before it: without the wait for them."""
    block.register_forward_pre_hook(lambda module, args: clock.resume())
    block.register_forward_hook(lambda module, args, out: clock.pause())
