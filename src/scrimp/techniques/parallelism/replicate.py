# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Data parallelism: every rank holds the whole model and computes its part of each batch.

    g = sum over ranks of grad(summed loss of the rank's samples) / count of the whole batch

The denominator is the whole batch's, so that a rank whose samples have few targets weighs little: the gradient is
that of one process with the whole batch, to float error. Dropout is keyed by sample, and does not depend on ranks.

Paper: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020,
arXiv 2006.15704. The engine is torch's.

Saves: time, as long as a rank's part keeps its device busy; activations, to 1/ranks of theirs. Costs: each gradient is
sent once a step (2 (N - 1) / N of its bytes a rank), in buckets, while earlier layers are still computed; with
`accumulate` twice, with the first and the last part, however many there are. The buckets stay between steps, so that
gradients take memory in the forward pass too. Not for: a model whose weights and states do
not fit into one device; see `zero`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from scrimp.errors import UserError
from scrimp.replicas import summed
from scrimp.technique import Card, Technique
from scrimp.world import PARTS

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward


@dataclass(frozen=True, kw_only=True)
class Replicate(Technique):
    """Every rank holds the whole model and computes its part of each batch."""

    card = Card(
        paper="arXiv:2006.15704",
        section="Parallelism",
        saves="time and activations, to 1/ranks of them",
        costs="an all-reduce of all gradients a step",
        sets=("data parallelism",),
        axes=("replica", "data"),
        phase={"backward": "summed"},
        example={},
        neutral={},
    )
    bucket: float = 25.0
    """Megabytes of gradients that are sent together."""

    def __post_init__(self) -> None:
        if not self.bucket > 0:
            raise UserError(f"bucket must be positive, not {self.bucket}.", "bucket")

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Gradients summed over the ranks; a single rank has nothing to sum."""
        return backward if run.world.ranks(*PARTS) == 1 else summed(backward, run, self.bucket)
