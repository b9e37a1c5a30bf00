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

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch._guards import detect_fake_mode
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scrimp.disk import PAGE, Scratch, home, in_memory
from scrimp.errors import UserError
from scrimp.groups import Group, parts
from scrimp.technique import Card, Technique, at_least
from scrimp.tiles import States, pieces, stream

if TYPE_CHECKING:
    from scrimp.run import Run


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
        held="tiles of weights are updated between steps, as plain tensors.",
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
