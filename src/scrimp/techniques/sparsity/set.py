"""SET: sparse from the start, with weights that are dropped by magnitude and grown at random.

    every interval, in each layer with n weights:   drop share * n of them,   grow as many others at random

The number of weights of a layer never changes. Paper: Mocanu et al., "Scalable training of artificial neural networks
with adaptive sparse connectivity inspired by network science", Nature Communications 2018, arXiv 1707.04780. The paper
drops the smallest positive and the largest negative weights (`drop: signed`), a constant share of both.

`explore` is the schedule of in-time overparameterization, Liu et al., "Do We Actually Need Dense
Over-Parameterization?", ICML 2021, arXiv 2102.02887: the share falls from 0.5 to 0.005 along half a cosine over the
whole run. It wants long intervals (the paper's code: 1500 steps at a batch of 128), so that new weights are trained
before they are judged. The rate of exploration, the share of all prunable weights that were ever active, is logged.

Saves: FLOPs and bytes on hardware with sparse products; no seconds on a CPU or GPU, where masks are stored dense.
Costs: a sort of each layer's weights every interval. Not for: densities at which a random mask (static_sparse)
does as well.
The exchange follows the update. The moments of dropped weights are zeroed, new ones begin at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scrimp.clock import Duration
from scrimp.errors import UserError
from scrimp.sparse.dynamic import EXPLORE, Calendar, exchange, noise, started, told
from scrimp.sparse.masks import masked_backward, masked_evaluate, masked_export, masked_step, prunable
from scrimp.technique import Card, Technique, above_zero

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scrimp.run import Run
    from scrimp.technique import Backward, Evaluate, State, Step


@dataclass(frozen=True, kw_only=True)
class SET(Technique):
    """Sparse evolutionary training: drop by magnitude, grow at random."""

    card = Card(
        paper="arXiv:1707.04780",
        section="Sparse training",
        saves="FLOPs on sparse hardware; no seconds on a CPU or GPU: masks are stored dense",
        costs="a sort of each layer's weights every interval",
        sets=("sparsity",),
        phase={"carry": "masked", "backward": "masked", "step": "masked", "evaluate": "masked", "export": "merged"},
        refuses={
            "frozen weights": "masks are of weights that are trained, and tuning freezes them.",
            "width schedule": "masks have the shapes of their weights, which it changes.",
        },
        whole="masks are of whole weights.",
        example={"density": 0.5, "interval": "2 step"},
        neutral={"density": 1.0},
    )
    density: float = 0.2
    """Share of all prunable weights together that remains."""
    share: float = 0.3
    """Share of a layer's weights that is exchanged; not read with `explore`."""
    interval: str | float = "100 step"
    """From one exchange to the next."""
    decay: Literal["constant", "cosine"] = "constant"
    """Of the share: constant as in the paper, or half a cosine to 0 at `until`, as in later comparisons with rigl."""
    until: str | float = 1.0
    """Masks stay after it; not read with `explore`. Weights that are grown at the very end stay untrained."""
    explore: bool = False
    """Exchange by the schedule of in-time overparameterization."""
    drop: Literal["magnitude", "signed"] = "magnitude"
    """signed takes the same share of the smallest positive and of the largest negative weights, as the paper does."""
    grown: Literal["zero", "random"] = "zero"
    """Values of new weights; random ones are uniform with the standard deviation of the layer's active weights."""
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
        """Mask the gradients."""
        return masked_backward(backward, run, self, prunable(run, self, self.params))

    def step(self, step: Step, run: Run) -> Step:
        """Update, mask the weights, and exchange some when it is time."""
        weights = prunable(run, self, self.params)
        calendar = self._calendar(run)
        if self.density < 1:
            calendar.check(run, self)
        masked = masked_step(step, run, self, weights)
        shown = False

        def moving() -> bool:
            nonlocal shown
            updated = masked()
            if updated and calendar.due(run):
                exchange(run, self, weights, calendar.share(run), lambda name: noise(run, self, name, weights[name]),
                         self.drop, (lambda name: self._values(run, name, weights[name])) if self.grown == "random"
                         else None)  # fmt: skip
            elif not shown:
                told(run, self, weights)
            shown = True
            return updated

        return moving

    def _calendar(self, run: Run) -> Calendar:
        first, last = EXPLORE if self.explore else (self.share, self.share if self.decay == "constant" else 0.0)
        until = run.clock.length if self.explore else run.clock.at(self.until)
        return Calendar(run.clock.steps(self.interval), until, first, last)

    def _values(self, run: Run, name: str, weight: nn.Parameter) -> Tensor:
        active = (weight != 0).sum().clamp(min=1)
        deviation = (weight.detach().square().sum() / active).sqrt()
        return (noise(run, self, name, weight, "value") * 2 - 1) * (deviation * 3**0.5)

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        """Mask averaged weights."""
        return masked_evaluate(evaluate, run, self, prunable(run, self, self.params))

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Masked."""
        return masked_export(named, run, self)
