"""Forgetting: how often an item was classified rightly, and then wrongly again.

    score(x) = number of looks t with x right at t - 1 and wrong at t;  looks + 1 for what was never right

Paper: Toneva et al., "An Empirical Study of Example Forgetting during Deep Neural Network Learning", ICLR 2019,
arXiv 1812.05159. There an item is looked at when it is trained on; here all items are looked at once an epoch, by the
weights of that moment, which costs a forward pass over the training set an epoch and sees all by the same weights.

A run must be several epochs long. Of sequences, an item is right when most of its targets are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.scoring.outputs import counted, logits_and_targets, over_items
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch, Step


@dataclass(frozen=True, kw_only=True)
class Watch(Technique):
    """Count forgetting while training. It changes nothing."""

    card = Card(paper="arXiv:1812.05159", section="Importance sampling", phase={"step": "averaged"})

    def step(self, step: Step, run: Run) -> Step:
        """Look at all items after each epoch."""
        memory, count = run.memory(self), len(run.data.train)
        memory["right"] = torch.zeros(count, dtype=torch.bool)
        memory["ever"] = torch.zeros(count, dtype=torch.bool)
        memory["forgotten"] = torch.zeros(count, dtype=torch.int64)
        memory["looks"] = torch.zeros((), dtype=torch.int64)
        batch = run.recipe.batch

        def watched() -> bool:
            updated = step()
            if (run.clock.sample + batch) // count > run.clock.sample // count:
                look(run, memory)
            return updated

        return watched


def look(run: Run, memory: dict[str, Tensor]) -> None:
    """Compare what is right now with what was right at the last look."""
    now = torch.from_numpy(over_items(run, lambda model, batch: _right(run, model, batch))).bool()
    memory["forgotten"] += memory["right"] & ~now
    memory["ever"] |= now
    memory["right"].copy_(now)
    memory["looks"] += 1


def _right(run: Run, model: nn.Module, batch: Batch) -> Tensor:
    logits, targets = logits_and_targets(run.task, model, batch, "--by forgetting")
    return 2 * (logits.argmax(-1) == targets).sum(1) > counted(targets)


WATCH: Final = Watch()
"""What trains beside the recipe's own techniques."""


def score(run: Run) -> np.ndarray:
    """Of every training item: float64, [items].

    Raises:
        UserError: if the run was shorter than two epochs.
    """
    memory = next(run.memories[key] for technique in run.order.techniques
                  if isinstance(technique, Watch) for key in [run.order.key(technique)])  # fmt: skip
    looks = int(memory["looks"])
    if looks < 2:
        what = f"the run was {looks} epochs long, and nothing can be forgotten before the second."
        raise UserError(what, "--by forgetting", "Set `duration` to several epochs, such as duration='10 epoch'.")
    return torch.where(memory["ever"], memory["forgotten"], looks + 1).double().numpy()
