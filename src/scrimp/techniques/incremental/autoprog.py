"""Automated progressive learning: at the start of each part, find out how deep and how long to train in it.

    candidates   depth and length from linspace(start, 1, parts) of the whole, no less than before, three each at most
    search       a supernet of the largest candidate; each step trains one candidate, all take turns in a drawn order
    choice       argmin loss time^w, w = -a1 of loss = a2 time^a1 fitted to all candidates
    growth       new blocks are copies of their neighbors' moving averages: a <- m a + (1 - m) w

Paper: Li et al., "Automated Progressive Learning for Efficient Training of Vision Transformers", CVPR 2022,
arXiv 2203.14509. There the resolution of images grows; here the length of sequences does, by truncation. Images grow
in depth only.

The run has `parts` equal parts. The last one trains the whole model, without a search. Each of the others begins with a
search, and then trains what was chosen, with the supernet's weights; blocks that were not chosen are dropped. A
candidate's loss is the mean of its last four visits. w is 0, so that the least loss is chosen, where a fit says
nothing: with two candidates or fewer, or where more time does not lower the loss. A candidate that the search did not
come to is not chosen; with none measured it is the largest, which is also what a plan counts with. m begins small,
min(m, (1 + t) / (10 + t)) after t updates. Where a step skips blocks, their gradients are None. Validation during a
search runs the whole supernet.

Saves: time, since early parts run a shallow model on short sequences. Costs: the searches, which train small and large
candidates alike; moving averages of the blocks. Not for: runs so short that a search cannot visit its candidates, nor
initializations that depend on depth (t_fixup).
`measure: seconds` compares by the clock, so that a rerun may choose otherwise; `flops` counts matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from scrimp import supernet
from scrimp.errors import UserError
from scrimp.groups import trainable
from scrimp.growth import block_names, check_identity, cut, deepened
from scrimp.models.subsets import shortened
from scrimp.technique import Card, Technique, above_zero, at_least, below_one

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.supernet import Choice
    from scrimp.technique import Backward, Batch, State, Step

VISITS: Final = 4
"""Losses that are kept of a candidate."""
MOST: Final = supernet.WIDEST**2
"""Candidates of a search at most."""


@dataclass(frozen=True, kw_only=True)
class AutoProg(Technique):
    """Find out how deep and how long to train, part by part."""

    card = Card(
        paper="arXiv:2203.14509",
        section="Incremental learning",
        claim="trains vision Transformers up to 85.1% faster without a drop (abstract of arXiv 2203.14509)",
        saves="time of early parts",
        costs="the searches; moving averages of the blocks",
        sets=("depth schedule", "length schedule"),
        phase={
            "model": "sizes",
            "wrap": "elastic",
            "carry": "grow",
            "batch": "length",
            "backward": "watched",
            "step": "averaged",
        },
        held="it averages weights between steps.",
        example={"parts": 2, "search": 0.5},
        neutral={"parts": 1},
    )
    parts: int = 4
    """Equal parts of the run; the last one trains the whole model."""
    search: float = 0.1
    """Share of each part but the last that is spent on its search."""
    start: float = 0.5
    """Least depth, as a share of the recipe's."""
    length: float = 0.5
    """Least length, as a share of the context; 1 grows in depth only."""
    multiple: int = 8
    """Lengths are rounded up to a multiple of this."""
    measure: Literal["flops", "seconds"] = "flops"
    """What a candidate's time is."""
    momentum: float = 0.998
    """m of the moving averages that new blocks are copied from; 0 copies the weights themselves."""
    order: Literal["interleave", "stack"] = "interleave"
    """interleave puts each copy beside its original; stack puts copies on top."""
    states: Literal["copy", "reset"] = "copy"
    """What new blocks get of the optimizer's states."""
    zero_new: bool = False
    """Start new blocks as the identity, so that growth keeps the function."""

    def __post_init__(self) -> None:
        at_least(1, self, "parts", "multiple")
        below_one(self, "search", "momentum")
        above_zero(self, "search", "start", "length")

    def stages(self) -> tuple[str | float, ...]:
        """The end of each search, and of each part."""
        return tuple((k + share) / self.parts for k in range(self.parts - 1) for share in (self.search, 1.0))

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Keep as many blocks as the largest candidate, or the choice, has."""
        if self.parts == 1:
            return model
        path, full = supernet.mark(model, run.where(self))
        if self.zero_new:
            check_identity(model.get_submodule(f"{path}.0".lstrip(".")), run.where(self, "zero_new"))
        cut(model, path, self._stage(run, full).options[-1][0])
        return model

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """While searching, training steps skip the blocks that their candidate does not have."""
        if self.parts == 1:
            return model
        _, layers, full = supernet.marked(model)
        stage, memory = self._stage(run, full), run.memory(self)
        # On the host, where the loop reads them at every step.
        memory["#begun"] = torch.tensor(run.clock.step, device="cpu")
        memory["#updates"] = torch.zeros((), dtype=torch.int64, device="cpu")
        memory["#visits"] = torch.zeros(MOST, dtype=torch.int64, device="cpu")
        memory["#losses"] = torch.zeros(MOST, VISITS, dtype=torch.float32, device=run.device)
        if self.measure == "seconds":
            memory["#seconds"] = torch.zeros(MOST, VISITS, dtype=torch.float64, device="cpu")
            memory["#since"] = torch.zeros((), dtype=torch.float64, device="cpu")
        if stage.searching:
            small, whole = stage.small(), len(layers)
            runs = [frozenset(supernet.active(small, whole, d, self.order)) for d, _ in stage.options]
            turn = self._turns(run, stage)
            supernet.elastic(layers, lambda: runs[turn(run.clock.step)[0]])
            self._tell(run, len(runs))
        else:
            depth, length = stage.options[0]
            run.log(self, depth=depth, length=length)
            of = f" and {length} of {self._context(run)} tokens" if length else ""
            run.remarks.append(f"autoprog trains {depth} of {full} blocks{of} from here.")
        return model

    def carry(self, state: State, run: Run) -> State:
        """Drop what was not chosen; then copies for what is new. A resume within a stage has it all."""
        if self.parts == 1 or "model" not in state:
            return state
        path, layers, full = supernet.marked(run.model)
        stage, old = self._stage(run, full), supernet.depth_of(state["model"], path)
        own = f"memory.{run.order.key(self)}"
        how = supernet.Growth(self.order, own, self.states == "reset", self.zero_new)
        if run.clock.stage == 0:
            if old > len(layers):
                what = f"the weights to start from have {old} blocks, the first part has {len(layers)} at most."
                raise UserError(what, run.where(self), "Start from fewer blocks, or raise `start`.")
            return supernet.grown(state, path, old, len(layers), how)
        if not self._entering(run):
            return state
        chosen, small = stage.ended()
        if old > chosen:
            keep = supernet.active(small, old, chosen, self.order)
            state = {kind: deepened(tensors, path, keep) for kind, tensors in state.items()}
        state = supernet.grown(state, path, min(old, chosen), len(layers), how)
        memory = {n: t for n, t in state[own].items() if n.startswith("#") or not self._last(run)}
        if stage.searching:
            memory |= {n: t for n, t in run.memory(self).items() if n.startswith("#") and n != "#updates"}
        return {**state, own: memory}

    def batch(self, batch: Callable[[int], Batch], run: Run) -> Callable[[int], Batch]:
        """Truncate what has the context's length, to that of the step's candidate."""
        context = self._context(run)
        if self.parts == 1 or not context:
            return batch
        stage = self._stage(run, supernet.marked(run.model)[2])
        turn = self._turns(run, stage)
        return lambda step: shortened(batch(step), context, stage.options[turn(step)[0]][1])

    def backward(self, backward: Backward, run: Run) -> Backward:
        """While searching, note the loss of the step's candidate."""
        if self.parts == 1:
            return backward
        stage, memory = self._stage(run, supernet.marked(run.model)[2]), run.memory(self)
        if not stage.searching:
            return backward
        turn = self._turns(run, stage)

        def watched(batch: Batch, count: Tensor) -> Tensor:
            place, visits = turn(run.clock.step)
            run.log(self, depth=stage.options[place][0], length=stage.options[place][1])
            if self.measure == "seconds":
                memory["#since"].fill_(supernet.now(run.device))
            loss = backward(batch, count)
            memory["#losses"][place, visits % VISITS].copy_(run.world.total(loss))
            memory["#visits"][place].fill_(visits + 1)
            return loss

        return watched

    def step(self, step: Step, run: Run) -> Step:
        """Average the blocks after an update, as long as the model will grow."""
        if self.parts == 1:
            return step
        path, _, full = supernet.marked(run.model)
        stage, memory = self._stage(run, full), run.memory(self)
        weights = {n: p for n, p in trainable(run.model).items() if block_names(path).match(n)}
        averages = {} if self._last(run) else weights
        for name, p in averages.items():
            memory[name] = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        turn = self._turns(run, stage)

        def averaged() -> bool:
            updated = step()
            if updated:
                memory["#updates"] += 1
                t = run.read(memory["#updates"], worst=1e9)
                supernet.follow({n: memory[n] for n in averages}, weights, min(self.momentum, (1 + t) / (10 + t)))
            if stage.searching and self.measure == "seconds":
                place, visits = turn(run.clock.step)
                memory["#seconds"][place, visits % VISITS].copy_(supernet.now(run.device) - memory["#since"])
            return updated

        return averaged

    def decide(self, last: Run) -> dict[str, Any]:
        """At the end of a search, the choice: depth, length, and the table it rests on."""
        before = last.decisions.get(last.order.key(self), {})
        if self.parts == 1:
            return before
        _, layers, full = supernet.marked(last.model)
        stage, memory = self._stage(last, full), last.memory(self)
        if not stage.searching:
            return before
        visits = [round(last.read(memory["#visits"][i], worst=0)) for i in range(len(stage.options))]
        rows: list[list[float]] = []
        for i, (depth, length) in enumerate(stage.options):
            if kept := min(visits[i], VISITS):
                spent = (
                    float(memory["#seconds"][i, :kept].mean())
                    if self.measure == "seconds"
                    else supernet.flops(last.model, layers, depth, length)
                )
                rows.append([depth, length, float(memory["#losses"][i, :kept].mean()), spent])
        # Seconds are each rank's own, and all must choose alike.
        rows = last.world.told(rows)
        (depth, length), w = stage.options[-1], 0.0
        if rows:
            best, w = supernet.choose([row[2] for row in rows], [row[3] for row in rows])
            depth, length = round(rows[best][0]), round(rows[best][1])
        path = [list(choice) for choice in (*stage.path, (depth, length))]
        return {"depth": depth, "length": length, "weight": w, "table": rows, "path": path}

    def _stage(self, run: Run, full: int) -> supernet.Stage:
        """Where the run is. What is not decided yet, as when a resumed run is planned, is taken to be the largest."""
        part, trains = divmod(run.clock.passed(self.stages()), 2)
        context = self._context(run)
        depths = supernet.grid(self.start, self.parts, full)
        lengths = supernet.grid(self.length, self.parts, context, self.multiple)
        made = run.decisions.get(run.order.key(self), {}).get("path", [])
        path: list[Choice] = []
        before: Choice | None = None
        for k in range(min(part + trains, self.parts - 1)):
            before = (made[k][0], made[k][1]) if k < len(made) else supernet.candidates(depths, lengths, before)[-1]
            path.append(before)
        last = part == self.parts - 1
        options = [(full, context)] if last else path[-1:] if trains else supernet.candidates(depths, lengths, before)
        return supernet.Stage(not (trains or last), path, options, min(len(made) or 99, len(path)), depths[0])

    def _tell(self, run: Run, count: int) -> None:
        """Say how long a search is."""
        clock, points = run.clock, self.stages()
        steps = (clock.at(points[clock.passed(points)]) - clock.begun) / clock.per_step[clock.unit]
        what = f"compares {count} candidates of" if count > 1 else "has one candidate only, hence no choice, of"
        run.remarks.append(f"autoprog {what} depth and length in about {steps:.0f} steps.")

    def _last(self, run: Run) -> bool:
        """Whether the model has its whole depth for good."""
        return run.clock.passed(self.stages()) == 2 * (self.parts - 1)

    def _context(self, run: Run) -> int:
        """Length of the data's sequences; 0 where there are none, as of images."""
        context = getattr(run.data.train, "context", 0)
        return context if context > 1 else 0

    def _turns(self, run: Run, stage: supernet.Stage) -> Callable[[int], tuple[int, int]]:
        """step -> (which option it trains, how often it was trained before in this search)."""
        memory, built, count = run.memory(self), run.clock.step, len(stage.options)

        def turn(step: int) -> tuple[int, int]:
            if not stage.searching:
                return 0, 0
            begun = round(run.read(memory["#begun"], worst=built))
            return supernet.turn(count, run.seed, begun, step), (step - begun) // count

        return turn

    def _entering(self, run: Run) -> bool:
        """Whether this is built from what another search or part ended with."""
        clock, points = run.clock, self.stages()
        previous = clock.cuts[clock.stage - 2] if clock.stage > 1 else 0
        ended = sum(clock.at(point) <= previous for point in points)
        return clock.position == clock.begun and clock.passed(points) != ended
