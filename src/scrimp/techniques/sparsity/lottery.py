"""The lottery ticket: train, prune, rewind, and train what is left, round after round.

    repeat:  train;   m <- m without the `fraction` of the remaining weights with the smallest |w|, over all layers;
             w <- w_k * m                        w_k: the weights after a small part of the first round

After r rounds (1 - fraction)^r of the weights remain: 0.8^8 = 17 %. Papers: Frankle and Carbin, "The Lottery Ticket
Hypothesis", ICLR 2019, arXiv 1803.03635; rewinding: Frankle et al., "Stabilizing the Lottery Ticket Hypothesis",
arXiv 1903.01611.

The duration of the recipe is that of all rounds together, and a round has 1/(rounds + 1) of it (more with `rewind`, as
later rounds then skip their beginning). The learning-rate schedule runs once a round, from the point of rewinding; in
it, durations are shares of a round. Moments of the optimizer and memories of other techniques begin anew with each
round. Controls: `reinit` gives the survivors other values, `shuffle` keeps as many weights a layer in other places;
both should do worse, or the tickets are none.

Saves: nothing in training; the ticket is a sparse model that, the papers find, can train as well as the dense one, for
hardware with sparse products. Costs: rounds + 1 trainings, a copy of the weights, and a mask. Not for: saving time, for
which the other methods of this section were found, nor beside techniques with stages of their own, such as stack, with
whose growth the rewinding to the first round's weights does not go.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.sparse.masks import (
    MASK,
    full,
    masked_backward,
    masked_evaluate,
    masked_export,
    masked_step,
    prunable,
    shapes,
    size,
)
from scrimp.sparse.patterns import Pattern, best
from scrimp.technique import Card, Technique, at_least, below_one

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scrimp.run import Run
    from scrimp.technique import Backward, Evaluate, State, Step

REWIND: Final = "#rewind"
"""Follows a parameter's name in memory: its value to go back to."""
ROUND, SAVED = "#round", "#saved"
"""In memory: the rounds that were pruned, and whether the weights to go back to were saved."""


@dataclass(frozen=True, kw_only=True)
class Lottery(Technique):
    """Iterative magnitude pruning with rewinding."""

    # It owns depth and width too: stages that change shapes would leave nothing to rewind to.
    card = Card(
        paper="arXiv:1803.03635",
        section="Sparse training",
        saves="FLOPs of the ticket on sparse hardware; no seconds on a CPU or GPU: masks are stored dense",
        costs="rounds + 1 trainings; a copy of the weights",
        sets=("sparsity", "depth schedule", "width schedule", "schedule's time"),
        phase={
            "carry": "rewind", "schedule": "rounds", "backward": "masked", "step": "masked", "evaluate": "masked",
            "export": "merged",
        },
        refuses={"frozen weights": "masks are of weights that are trained, and tuning freezes them."},
        whole="masks are of whole weights.",
        undivided="it compares the weights of all blocks to choose which to drop.",
        example={"rounds": 2, "fraction": 0.5, "rewind": 0.25},
        neutral={"rounds": 0},
    )  # fmt: skip
    rounds: int = 8
    """How often the model is pruned; it is trained once more."""
    fraction: float = 0.2
    """Share of the remaining weights that a round prunes."""
    density: float = 0.0
    """Share that remains in the end; above 0, `fraction` follows from it."""
    rewind: float = 0.0
    """Point of the first round to whose weights later ones go back, as a share of it; 0 means the initial weights."""
    control: Literal["", "reinit", "shuffle"] = ""
    """reinit: survivors begin with other values of their layer. shuffle: masks are random with the layers' counts."""
    pattern: str = "weights"
    """What is pruned together: `weights` one by one, or blocks such as `4x4`."""
    params: str = "blocks.*"
    """Pattern of the linear layers' weights to prune."""

    def __post_init__(self) -> None:
        at_least(0, self, "rounds")
        below_one(self, "fraction", "density", "rewind")
        if self.density and not self.rounds:
            raise UserError("0 rounds prune nothing, whatever the density.", "rounds", "Set it to 1 or more.")
        if Pattern.parse(self.pattern).group:
            raise UserError("groups such as 2:4 cannot be pruned in rounds.", "pattern", "Use weights or blocks.")

    def stages(self) -> tuple[str | float, ...]:
        """The ends of all rounds but the last."""
        return tuple(self._points())

    def _points(self) -> list[float]:
        """Shares of the run: every round ends at the same point of its schedule; later ones begin at `rewind`."""
        length = 1 / (1 + self.rounds * (1 - self.rewind))
        return [length * (1 + i * (1 - self.rewind)) for i in range(self.rounds)]

    def carry(self, state: State, run: Run) -> State:
        """At the start of a round: prune, and go back."""
        weights = prunable(run, self, self.params)
        for name, shape in shapes(weights).items():
            Pattern.parse(self.pattern).check(name, shape, run.where(self, "pattern"))
        memory, current = full(run, self, weights), run.clock.passed(self.stages())
        for name, p in run.model.named_parameters():
            memory[name + REWIND] = p.detach().clone()
        for name, value in ((ROUND, current), (SAVED, 0)):
            memory[name] = torch.tensor(value)
        kept = state.get(f"memory.{run.order.key(self)}")
        if kept is None or run.read(kept[ROUND], worst=current - 1) == current:
            return state
        return self._rewound(state, dict(kept), run, weights, current)

    def _rewound(
        self, state: State, kept: dict[str, Tensor], run: Run, weights: dict[str, nn.Parameter], current: int
    ) -> State:
        trained, pattern = state["model"], Pattern.parse(self.pattern)
        # Pruned weights rank below all others, also below survivors that are zero.
        scores = {n: torch.where(kept[n + MASK], trained[n].abs(), -1.0) for n in weights}
        masks = best(scores, self.left(size(weights), current), pattern)
        model = {n: kept.get(n + REWIND, t) for n, t in trained.items()}
        for name, mask in masks.items():
            if self.control == "shuffle":
                masks[name] = mask = _shuffled(mask, run.seed, f"lottery/mask/{current}/{name}")
            if self.control == "reinit":
                model[name] = _shuffled(model[name], run.seed, f"lottery/value/{current}/{name}")
            model[name] = model[name] * mask
        rest = {n: t for n, t in kept.items() if n.endswith(REWIND)} | {n + MASK: m for n, m in masks.items()}
        memory = {**rest, ROUND: torch.tensor(current), SAVED: kept[SAVED]}
        return {"model": model, f"memory.{run.order.key(self)}": memory}

    def left(self, total: int, rounds: int) -> int:
        """How many weights remain after some rounds: each prunes its share, rounded up, as the paper's code does."""
        if self.density:
            return round(total * self.density ** (rounds / self.rounds))
        for _ in range(rounds):
            total -= math.ceil(self.fraction * total - 1e-9)
        return total

    def schedule(self, factor: Callable[[float], float], run: Run) -> Callable[[float], float]:
        """The schedule once a round; from the second on it begins at the point of rewinding."""
        points, clock = self._points(), run.clock
        if not points:
            return factor
        end = clock.end / clock.length

        def of_round(progress: float) -> float:
            place = progress * end
            index = bisect_right(points, place + 1e-12)
            first = points[index - 1] if index else 0.0
            last = points[index] if index < len(points) else end
            skipped = self.rewind if index else 0.0
            return factor(min(1.0, skipped + (1 - skipped) * (place - first) / max(last - first, 1e-12)))

        return of_round

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Mask the gradients."""
        return masked_backward(backward, run, self, prunable(run, self, self.params))

    def step(self, step: Step, run: Run) -> Step:
        """Mask the weights; in the first round, save those to go back to when their time comes."""
        memory, masked = run.memory(self), masked_step(step, run, self, prunable(run, self, self.params))
        place = run.clock.at(self.rewind * (self._points() or [0.0])[0])

        def saving() -> bool:
            if run.clock.position >= place and not run.read(memory[SAVED], worst=0):
                with torch.no_grad():
                    for name, p in run.model.named_parameters():
                        memory[name + REWIND].copy_(p)
                memory[SAVED].fill_(1)
            return masked()

        return saving

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        """Mask averaged weights."""
        return masked_evaluate(evaluate, run, self, prunable(run, self, self.params))

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Masked."""
        return masked_export(named, run, self)


def _shuffled(tensor: Tensor, seed: int, name: str) -> Tensor:
    """The same values in other places, by (seed, name)."""
    order = torch.randperm(tensor.numel(), generator=generator(seed, name)).to(tensor.device)
    return tensor.flatten()[order].view(tensor.shape)
