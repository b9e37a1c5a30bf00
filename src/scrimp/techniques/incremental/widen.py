"""Width growth: train with narrow MLPs, copy their hidden units, and go on.

    up'[j, :] = up[j mod h, :]        down'[:, j] = down[:, j mod h] / copies(j mod h) + noise

for the units j of the wider MLP, where h is how many there were; a gate's rows go with those of `up`. With `heads` the
same is done to heads of attention: keys, values and queries are copied, and the projection's columns are divided. The
noise sums to zero over the copies of a unit. So the function stays, up to rounding, and copies still part: without
noise they would get the same gradients for ever. Papers: Net2Net, Chen et al., ICLR 2016, arXiv 1511.05641, which adds
its noise to the copies themselves; bert2BERT, Chen et al., ACL 2022, arXiv 2110.07143, which does it to Transformers.
The width of the residual stream does not change here.

Moments are carried as if the wide model had always been there: those of what leads into a unit are divided by the
number of copies (by its square where squares are averaged), as their gradients are; those of what leads out are copied.

The recipe's model is the widest one, and the run ends with it. Weights that a run starts from are widened when they are
narrower than its first stage, and refused when they are wider.

Saves: time and memory of early steps, which run narrow layers. Costs: the last steps have to part the copies.
Not for: models whose time does not go into the MLP; masks of a given sparsity, which the copies inherit.
Compare against a baseline with a fully decayed schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from scrimp.clock import Duration
from scrimp.errors import UserError
from scrimp.technique import Card, Technique, at_least
from scrimp.widths import head_units, hidden_units, narrow, rounded, widened

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import State


@dataclass(frozen=True, kw_only=True)
class Widen(Technique):
    """Grow width by copying units."""

    card = Card(
        paper="arXiv:1511.05641",
        section="Incremental learning",
        saves="time and memory of early steps",
        costs="copies that must part again",
        sets=("width schedule",),
        refuses={"frozen weights": "frozen layers are as wide as they are."},
        phase={"model": "sizes", "carry": "widen"},
        example={"at": (0.5,), "heads": True},
        neutral={"at": (), "shares": ()},
    )
    at: tuple[str | float, ...] = (0.25,)
    """Points at which the model grows to its next width; the recipe's model is the last one."""
    shares: tuple[float, ...] = (0.5,)
    """Share of the MLP's width in each stage but the last."""
    multiple: int = 8
    """Widths of MLPs are rounded up to a multiple of this."""
    heads: bool = False
    """Attention has the same share of its heads, rounded up, and grows with the MLP."""
    noise: float = 0.1
    """What keeps copies apart, as a share of the standard deviation of the weights that lead out of them. It does not
    change the function; with 0 copies stay alike for ever."""

    def __post_init__(self) -> None:
        at_least(0, self, "noise")
        at_least(1, self, "multiple")
        for point in self.at:
            Duration.parse(point, "at")
        if len(self.shares) != len(self.at):
            raise UserError(f"{len(self.at)} points need as many shares, not {len(self.shares)}.", "shares")
        if list(self.shares) != sorted(self.shares) or any(not 0 < share <= 1 for share in self.shares):
            raise UserError(f"shares must grow, from above 0 to at most 1, not {list(self.shares)}.", "shares")

    def stages(self) -> tuple[str | float, ...]:
        """The points of growth."""
        return self.at

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Narrow the layers."""
        share = (*self.shares, 1.0)[run.clock.passed(self.at)]
        found = [(units, self.multiple) for units in hidden_units(model, run.where(self))]
        found += [(units, 1) for units in (head_units(model, run.where(self, "heads")) if self.heads else ())]
        first = min(self.shares, default=1.0)
        if first < 1 and all(rounded(first, units.count, multiple) == units.count for units, multiple in found):
            what = f"a share of {first:g}, rounded up to a multiple of {self.multiple}, is the whole width."
            raise UserError(what, run.where(self, "shares"), "Lower `shares` or `multiple`.")
        for units, multiple in found:
            narrow(model, units, rounded(share, units.count, multiple))
        return model

    def carry(self, state: State, run: Run) -> State:
        """Copies for the units that the state does not have; a resume within a stage has them all."""
        units = hidden_units(run.model) + (head_units(run.model) if self.heads else [])
        return widened(state, units, run.seed, self.noise, run.where(self))
