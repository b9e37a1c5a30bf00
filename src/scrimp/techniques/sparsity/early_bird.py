"""Early-bird tickets: learn early in training which heads and neurons matter, cut the others out, train what is left.

    search:   head h of a block times c_h before attention.proj, neuron j times c_j before mlp.down, c = 1 at first
              loss + l1 sum |c|
    a mask:   1 where |c| is not among the smallest (a share of each block's heads, of all neurons or each block's)
    ticket:   when the newest mask differs from each of the four before it in less than `distance` of its places
    after:    smaller attention and MLP; the coefficients are gone

Paper: Chen et al., "EarlyBERT", ACL 2021, arXiv 2101.00063, after You et al., "Drawing Early-Bird Tickets", ICLR 2020,
arXiv 1909.11957. The paper ranks by c and waits a fixed time; here it is |c|, which differs only where a coefficient
turned negative, and the masks' distance that ends the search, at the latest at `until`. Heads' and neurons' masks are
compared apart, and the larger distance counts.

`rewind: start` is the paper's: the run goes on with the weights that it began with, new states of the optimizer and a
schedule of its own from 0 to 1; until then a copy of all weights is kept in the host's memory. `rewind: continue` goes
on with the trained weights, into which the coefficients are folded; moments are cut like the weights they belong to.

In grouped-query attention a key/value head goes together with the heads that share it. Attention to another sequence
keeps all heads. What is exported has the recipe's architecture, with zeros for what was cut, and loads anywhere.

Saves: time and memory of all steps after the search; the smaller layers are dense, hence faster everywhere. Costs: the
search's steps when rewinding, and the capacity that is cut. Not for: models whose blocks are not the house's, since
heads and neurons are found by the seams' names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from scrimp.clock import Duration
from scrimp.errors import UserError
from scrimp.models.seams import blocks
from scrimp.slimming import (
    all_cuts,
    check,
    choice,
    cut_state,
    cut_table,
    keep_largest,
    listed,
    narrow,
    neurons,
    pruned,
    unit_width,
    units,
)
from scrimp.technique import Card, Technique, at_least, below_one

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch, Loss, State, Step

KEPT: Final = 5
"""Masks that are compared: the newest and four before it."""
MASKS: Final = "#masks"
"""Name of the masks in memory; no parameter can be called so."""
TAIL: Final = ".early_bird.coefficients"
HEADS, NEURONS = "attention.proj", "mlp.down"


@dataclass(frozen=True, kw_only=True)
class EarlyBird(Technique):
    """Find unneeded heads and neurons early, and cut them out."""

    card = Card(
        paper="arXiv:2101.00063",
        section="Sparse training",
        claim="35 to 45% less training time at comparable performance on BERT (abstract)",
        saves="time and memory after the search",
        costs="the steps of the search, and capacity",
        sets=("depth schedule", "width schedule", "sparsity", "schedule's time"),
        needs=("qkv", "proj", "up", "down"),
        refuses={"frozen weights": "Its coefficients train with the weights, and rewinding begins them anew."},
        phase={"model": "sizes", "carry": "rewind", "schedule": "rounds", "loss": "auxiliary", "export": "whole"},
        whole="heads and neurons are ranked by whole weights.",
        undivided="it compares the heads of all blocks, and its loss takes them all in.",
        example={"heads": 0.5, "every": "1 step", "until": "4 step", "distance": 0.0},
    )
    heads: float = 0.3334
    """Share of each block's heads that is cut, rounded down."""
    neurons: float = 0.4
    """Share of the MLPs' neurons that is cut."""
    ranked: Literal["layerwise", "global"] = "global"
    """Whether neurons compete within their block or across all; heads always compete within their block."""
    l1: float = 1e-4
    """Factor of the sum of absolute coefficients in the loss."""
    every: str | float = 0.01
    """How often a mask is drawn."""
    until: str | float = 0.2
    """End of the search, if the masks do not settle before."""
    distance: float = 0.1
    """Share of places in which masks may differ for the ticket to count as found; 0 always waits for `until`."""
    rewind: Literal["start", "continue"] = "start"
    """Go on from the first weights, or from the trained ones."""

    def __post_init__(self) -> None:
        below_one(self, "heads", "neurons")
        at_least(0, self, "l1", "distance")
        for setting in ("every", "until"):
            if not Duration.parse(getattr(self, setting), setting).value:
                raise UserError(f"{setting} must be more than 0.")
        if not self.heads and not self.neurons:
            raise UserError("heads and neurons of 0 cut nothing.", "", "Set one of them.")

    def stages(self) -> tuple[str | float, ...]:
        """The end of the search, at the latest."""
        return (self.until,)

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Coefficients while searching, smaller blocks afterwards."""
        found, left = blocks(model, run.where(self)), self._decided(run)
        for path, block in found.items():
            check(block, path, run.where(self))
        self._check_cuts(list(found.values()), run, searching=not left)
        for path, block in found.items():
            if left:
                narrow(block, left[path])
                continue
            for name, count, width in ((HEADS, units(block), unit_width(block)), (NEURONS, neurons(block), 1)):
                layer: Any = block.get_submodule(name)
                layer.on("weight", "mask", self.name, Coefficients(layer.weight, count, width))
        if left:
            told = [f"{sum(len(b[k]) for b in left.values()):,} of {sum(b['of_' + k] for b in left.values()):,}"
                    for k in ("units", "neurons")]  # fmt: skip
            kept = f"{told[0]} heads and {told[1]} neurons"
            run.remarks.append(f"early_bird keeps {kept}; what is exported has zeros for the others.")
        return model

    def _check_cuts(self, found: list[nn.Module], run: Run, searching: bool) -> None:
        """Whether anything is cut, and whether the search can end before `until`."""
        sizes = [neurons(block) for block in found]
        of_neurons = sizes if self.ranked == "layerwise" else [sum(sizes)]
        if not any(pruned(units(b), self.heads) for b in found) and not any(
            pruned(n, self.neurons) for n in of_neurons
        ):
            what = (
                f"shares of {self.heads:g} of the heads and {self.neurons:g} of the neurons are less than one of each."
            )
            raise UserError(what, run.where(self), "Raise heads or neurons.")
        clock = run.clock
        masks = clock.at(self.until) / clock.per_step[clock.unit] // clock.steps(self.every)
        if searching and self.distance and masks < KEPT:
            run.remarks.append(
                f"early_bird draws {masks:.0f} masks until {self.until}, and compares {KEPT}: it searches until then."
            )

    def carry(self, state: State, run: Run) -> State:
        """Out of the search: the first weights or the trained ones, cut."""
        left, own = self._decided(run), f"memory.{run.order.key(self)}"
        if not left or not any(name.endswith(TAIL) for name in state.get("model", {})):
            return state
        cuts = all_cuts(run.model, left)
        if self.rewind == "continue":
            whole = {kind: t if kind.startswith("optimizer.") else folded(t, state["model"])
                     for kind, t in state.items() if kind != own}  # fmt: skip
            return cut_state({kind: without(tensors) for kind, tensors in whole.items()}, cuts)
        first = {name: t for name, t in state[own].items() if name != MASKS}
        rest = {name: t for name, t in state["model"].items() if name not in first and not name.endswith(TAIL)}
        # What others remember of each weight, such as an average, is of weights that are no more.
        others = {kind: t for kind, t in state.items()
                  if kind.startswith("memory.") and kind != own and not first.keys() & t.keys()}  # fmt: skip
        return {"model": rest | cut_table(first, cuts), **others}

    def schedule(self, factor: Callable[[float], float], run: Run) -> Callable[[float], float]:
        """A whole schedule for what is trained from the start."""
        if self.rewind == "continue" or not self._decided(run):
            return factor
        at = run.decisions[run.order.key(self)]["at"] / max(run.clock.end, 1)
        return lambda progress: factor(max(progress - at, 0.0) / max(1 - at, 1e-9))

    def loss(self, loss: Loss, run: Run) -> Loss:
        """While searching: the penalty, and a copy of the weights as they are before the first step."""
        found: list[Tensor] = [c for _, c in coefficients(run.model)]
        if not found:
            return loss
        if self.rewind == "start":
            run.memory(self).update({name: p.detach().to("cpu", copy=True) for name, p in run.model.named_parameters()
                                     if not name.endswith(TAIL)})  # fmt: skip

        def penalized(model: nn.Module, batch: Batch) -> Tensor:
            # The loss is a sum over what is counted, and divided by the count later.
            return loss(model, batch) + self.l1 * torch.cat(found).abs().sum() * run.task.count(batch)

        return penalized

    def step(self, step: Step, run: Run) -> Step:
        """Draw a mask now and then, and end the search when masks stay alike."""
        kinds = [[c for name, c in coefficients(run.model) if name.endswith(kind + TAIL)] for kind in (HEADS, NEURONS)]
        if not kinds[0]:
            return step
        every, sizes = run.clock.steps(self.every), [sum(len(c) for c in kind) for kind in kinds]
        run.memory(self)[MASKS] = torch.zeros(KEPT, sum(sizes), dtype=torch.uint8, device=run.device)

        def drawn() -> bool:
            updated, done = step(), run.clock.step + 1
            if done % every == 0:
                number, newest = done // every, (done // every - 1) % KEPT
                ring = run.memory(self)[MASKS]
                ring[newest] = torch.cat(self._masks(*kinds)).to(torch.uint8)
                apart = (ring != ring[newest]).split(sizes, 1)
                value = run.read(torch.stack([part.float().mean(1).max() for part in apart]).max(), worst=1.0)
                if number >= KEPT:
                    run.log(self, distance=value)
                    if value < self.distance:
                        run.signals.append(f"{self.name}: the masks differ in {value:.3g} of their places")
            return updated

        return drawn

    def decide(self, last: Run) -> dict[str, Any]:
        """What stays of each block, when this technique's search is what ended."""
        key, clock = last.order.key(self), last.clock
        found = any(reason.startswith(f"{self.name}:") for reason in last.signals)
        if self._decided(last) or not (found or clock.position >= clock.at(self.until)):
            return last.decisions.get(key, {})
        paths = blocks(last.model)
        of = dict(coefficients(last.model))
        kinds = [[of[f"{path}.{kind}{TAIL}"] for path in paths] for kind in (HEADS, NEURONS)]
        masks = self._masks(*kinds)
        heads, others = masks[: len(paths)], masks[len(paths) :]

        def left(mask: Tensor, share: float) -> list[int]:
            return listed(mask, len(mask) - pruned(len(mask), share), last.read)

        chosen = {path: choice(block, left(h, self.heads), left(n, self.neurons))
                  for (path, block), h, n in zip(paths.items(), heads, others, strict=True)}  # fmt: skip
        return {"at": clock.position, "blocks": chosen}

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """The recipe's architecture: coefficients folded in, zeros for what was cut."""
        cuts = all_cuts(run.model, self._decided(run))
        plain = without(folded(named, named))
        return {name: cuts[name].padded(t) if name in cuts else t for name, t in plain.items()}

    def _decided(self, run: Run) -> dict[str, Any]:
        return run.decisions.get(run.order.key(self), {}).get("blocks", {})

    @torch.no_grad()
    def _masks(self, heads: list[nn.Parameter], others: list[nn.Parameter]) -> list[Tensor]:
        """Of the heads of each block, then of the neurons of each."""
        ranked = self.ranked == "layerwise"
        return [*keep_largest([c.abs() for c in heads], self.heads, layerwise=True),
                *keep_largest([c.abs() for c in others], self.neurons, ranked)]  # fmt: skip


class Coefficients(nn.Module):
    """weight -> weight, whose columns are multiplied by a coefficient for each `width` of them.

    Shapes: weight [outputs, count * width], coefficients [count].
    """

    def __init__(self, weight: Tensor, count: int, width: int) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(weight.new_empty(count))

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """The layer begins as it was."""
        value.fill_(1.0)

    def forward(self, weight: Tensor) -> Tensor:
        return scaled(weight, self.coefficients)


def scaled(weight: Tensor, c: Tensor) -> Tensor:
    """Columns times the coefficient of their unit."""
    return (weight.unflatten(1, (len(c), -1)) * c[:, None]).flatten(1)


def coefficients(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All of a model, by name."""
    return [(name, p) for name, p in model.named_parameters() if name.endswith(TAIL)]


def folded(tensors: Mapping[str, Tensor], fallback: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights times their coefficients, which are in the same table or in the fallback."""
    found = dict(tensors)
    for name in [n for n in fallback if n.endswith(TAIL)]:
        weight = name.removesuffix(TAIL) + ".weight"
        if weight in found:
            c = tensors.get(name, fallback[name])
            found[weight] = scaled(found[weight].detach(), c.detach().to(found[weight].dtype))
    return found


def without(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A table without the coefficients."""
    return {name: t for name, t in tensors.items() if not name.endswith(TAIL)}
