"""RigL: sparse from the start, with weights that are dropped by magnitude and grown where the gradient is largest.

    every interval until T_end, in each layer with n weights:
        k = f(t) n,   f(t) = share / 2 (1 + cos(pi t / T_end))
        drop the k smallest |w|,   grow the k largest |dL/dw| of all that are then inactive, at zero

The gradient of inactive weights is the dense one, which is computed anyway; only steps that exchange read it. A weight
that is dropped and grown at once keeps its value and its moments. Paper: Evci et al., "Rigging the Lottery: Making All
Tickets Winners", ICML 2020, arXiv 1911.11134. As in its code, a step that exchanges does not update (`skip_step`).

`explore` is the schedule of in-time overparameterization (arXiv 2102.02887): the share falls from 0.5 to 0.005 along
half a cosine over the whole run. It wants long intervals (the paper's code: 4000 steps at a batch of 128). The rate of
exploration, the share of all prunable weights that were ever active, is logged.

Saves: FLOPs and bytes on hardware with sparse products; no seconds on a CPU or GPU, where masks are stored dense.
Costs: a sort of each layer's weights and gradients every interval, and that step's update. Not for: densities at which
a random mask (static_sparse) does as well. Gradients are the whole step's: all parts of an accumulated batch, unscaled.
In a step that exchanges sam perturbs inactive weights too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scrimp.clock import Duration
from scrimp.errors import UserError
from scrimp.sparse.dynamic import EXPLORE, Calendar, exchange, started, told
from scrimp.sparse.masks import (
    mask_gradients,
    masked_backward,
    masked_evaluate,
    masked_export,
    masked_step,
    prunable,
)
from scrimp.technique import Card, Technique, above_zero

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scrimp.run import Run
    from scrimp.technique import Backward, Evaluate, State, Step


@dataclass(frozen=True, kw_only=True)
class RigL(Technique):
    """Drop by magnitude, grow by the dense gradient."""

    card = Card(
        paper="arXiv:1911.11134",
        section="Sparse training",
        claim="75.1 % top-1 on ImageNet at 0.42 of the training FLOPs, ResNet-50 at density 0.2; 76.8 % dense "
        "(google-research/rigl)",
        saves="FLOPs on sparse hardware; no seconds on a CPU or GPU: masks are stored dense",
        costs="a sort of each layer's weights and gradients every interval, and that step's update",
        sets=("sparsity",),
        phase={"carry": "masked", "backward": "masked", "step": "masked", "evaluate": "masked", "export": "merged"},
        refuses={
            "frozen weights": "masks are of weights that are trained, and tuning freezes them.",
            "width schedule": "masks have the shapes of their weights, which it changes.",
        },
        whole="masks are of whole weights.",
        example={"density": 0.5, "interval": "2 step"},
        neutral={"density": 1.0, "interval": "1000 step"},
    )
    density: float = 0.2
    """Share of all prunable weights together that remains."""
    share: float = 0.3
    """Share of a layer's weights that is exchanged at the start; not read with `explore`."""
    interval: str | float = "100 step"
    """From one exchange to the next."""
    until: str | float = 0.75
    """T_end: masks stay after it; not read with `explore`."""
    explore: bool = False
    """Exchange by the schedule of in-time overparameterization."""
    skip_step: bool = True
    """Whether a step that exchanges leaves the update out, as the paper's code does."""
    allocation: Literal["erk", "uniform", "first_dense"] = "erk"
    """erk leaves small matrices denser; first_dense keeps the first layer whole and treats the others alike."""
    params: str = "blocks.*"
    """Pattern of the linear layers' weights to prune."""

    def __post_init__(self) -> None:
        if not Duration.parse(self.interval, "interval").value:
            raise UserError("interval must be more than 0.", "", "For masks that stay, use static_sparse.")
        Duration.parse(self.until, "until")
        above_zero(self, "density")
        if not 0 <= self.share <= 1:
            raise UserError(f"share must be from 0 to 1, not {self.share}.")

    def carry(self, state: State, run: Run) -> State:
        """Draw the masks; a run that begins begins masked."""
        return started(state, run, self, prunable(run, self, self.params), self.density, self.allocation)

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Mask the gradients, but for steps that exchange: those read the dense ones."""
        calendar = self._calendar(run)
        return masked_backward(backward, run, self, prunable(run, self, self.params), lambda: calendar.due(run))

    def step(self, step: Step, run: Run) -> Step:
        """Exchange weights when it is time; otherwise update, and mask the weights."""
        weights = prunable(run, self, self.params)
        calendar = self._calendar(run)
        if self.density < 1:
            calendar.check(run, self)
        masked = masked_step(step, run, self, weights)
        shown = False

        def moving() -> bool:
            nonlocal shown
            if calendar.due(run):
                exchange(run, self, weights, calendar.share(run), lambda name: _magnitude(weights[name]))
                mask_gradients(run.memory(self), weights)
                for p in run.model.parameters() if self.skip_step else ():
                    p.grad = None
            elif not shown:
                told(run, self, weights)
            shown = True
            return masked()

        return moving

    def _calendar(self, run: Run) -> Calendar:
        first, last = EXPLORE if self.explore else (self.share, 0.0)
        until = run.clock.length if self.explore else run.clock.at(self.until)
        return Calendar(run.clock.steps(self.interval), until, first, last)

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        """Mask averaged weights."""
        return masked_evaluate(evaluate, run, self, prunable(run, self, self.params))

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Masked."""
        return masked_export(named, run, self)


def _magnitude(weight: nn.Parameter) -> Tensor | None:
    """Of the gradient; None where this step computed none, such as in a layer that is left out."""
    return None if weight.grad is None else weight.grad.abs()
