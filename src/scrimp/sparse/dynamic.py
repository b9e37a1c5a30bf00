"""Training with masks that move: what set and rigl have in common, and how much of the weights they have tried.

exploration R_s = |union of all masks so far| / |prunable weights|            (arXiv 2102.02887)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor, nn

from scrimp.draws import generator
from scrimp.sparse.allocation import counts
from scrimp.sparse.exchange import cosine, exchanged, signed_key
from scrimp.sparse.masks import MASK, apply, begun, full, mask_moments, random_mask, report, shapes, size

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import State, Technique

FIRED: Final = "#fired"
"""Follows a weight's name in memory: where it has ever been active."""
EXPLORE: Final = (0.5, 0.005)
"""Share of a layer that is exchanged with ITOP's schedule: at the start, and at the end."""


@dataclass(frozen=True)
class Calendar:
    """When masks move, and by how much.

    Args:
        interval: steps from one exchange to the next.
        until: position after which masks stay.
        first: share of a layer's weights exchanged at position 0, and `last` at `until`, along half a cosine.
    """

    interval: int
    until: int
    first: float
    last: float

    def due(self, run: Run) -> bool:
        """Whether this step exchanges."""
        step = run.clock.step
        return step > 0 and step % self.interval == 0 and run.clock.position < self.until

    def check(self, run: Run, technique: Technique) -> None:
        """Say so where no step will ever exchange."""
        first, last = self.interval * run.clock.per_step[run.clock.unit], min(self.until, run.clock.end)
        if first >= last and not run.clock.stage:
            run.remarks.append(
                f"{technique.name} never exchanges weights: its first exchange would be after {self.interval} steps, "
                f"and masks stay, or the run ends, after {last:,} {run.clock.unit}."
            )

    def share(self, run: Run) -> float:
        """Share of a layer's weights that is exchanged now."""
        return cosine(self.first, self.last, run.clock.position / max(self.until, 1))


def started(
    state: State, run: Run, technique: Technique, weights: Mapping[str, nn.Parameter], density: float, allocation: str
) -> State:
    """Random masks, and the memory of where they have been, for a run that begins."""
    memory = full(run, technique, weights)
    kept = counts(shapes(weights), density, allocation)
    for name, shape in shapes(weights).items():
        memory[name + MASK] = random_mask(shape, kept[name], run.seed, name, run.device)
        memory[name + FIRED] = memory[name + MASK].clone()
    return begun(state, run, technique, dict(weights))


@torch.no_grad()
def exchange(
    run: Run, technique: Technique, weights: Mapping[str, nn.Parameter], share: float,
    score: Callable[[str], Tensor | None], drop: Literal["magnitude", "signed"] = "magnitude",
    fresh: Callable[[str], Tensor] | None = None,
) -> None:  # fmt: skip
    """Drop and grow in every layer.

    Args:
        score: name -> growth scores; None leaves a layer as it is.
        fresh: name -> values of new weights; zeros when it is None.
    """
    memory = run.memory(technique)
    for name, w in weights.items():
        grown = score(name)
        mask = memory[name + MASK]
        active = int(run.read(mask.sum(), worst=mask.numel()))
        count = min(round(share * active), mask.numel() - active)
        if grown is None or count == 0:
            continue
        key = signed_key(w, mask) if drop == "signed" else w.abs()
        new = exchanged(key, mask, active, count, grown)
        if fresh is not None:
            w.copy_(torch.where(new & ~mask, fresh(name).to(w.dtype), w))
        mask.copy_(new)
        memory[name + FIRED].logical_or_(new)
    apply(memory, weights)
    mask_moments(run, memory, weights)
    told(run, technique, weights)


def told(run: Run, technique: Technique, weights: Mapping[str, nn.Parameter]) -> None:
    """Log the density and the exploration rate."""
    memory = run.memory(technique)
    tried = sum(run.read(memory[name + FIRED].sum(), worst=w.numel()) for name, w in weights.items())
    report(run, technique, weights, exploration=tried / size(weights))


def noise(run: Run, technique: Technique, name: str, like: Tensor, what: str = "growth") -> Tensor:
    """Uniform numbers in [0, 1) that depend on the seed, the step and the weight's name."""
    chance = generator(run.seed, f"{technique.name}/{what}/{run.clock.step}/{name}")
    return torch.rand(like.shape, generator=chance, dtype=torch.float32).to(like.device)
