# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What one process keeps of a run beside the run itself, and what the loop calls: record, measure, save, sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scrimp import checkpoint
from scrimp.energy import Energy
from scrimp.errors import UserError
from scrimp.folder import RunFolder
from scrimp.launching import name_of_launch
from scrimp.meter import memory_peak
from scrimp.models.generate import written
from scrimp.restore import fingerprint
from scrimp.run import Run
from scrimp.sharding import whole
from scrimp.stages import shared
from scrimp.stragglers import Lookout
from scrimp.tasks.sums import evaluated
from scrimp.world import ALONE, SAMPLES, World

if TYPE_CHECKING:
    from scrimp.technique import Batch, State

Observe = Callable[[str, dict[str, Any]], None]
"""(event, fields): what a progress view hears. Events: note, stage, step, validation, checkpoint, sample, end."""


@dataclass
class Session:
    """One process's part of a run: what is not a function of the recipe, and is never checkpointed."""

    folder: RunFolder | None
    observe: Observe
    world: World = ALONE
    validation: Sequence[Batch] = ()
    best: float = math.inf
    worse: int = 0
    interrupted: bool = False
    latest: dict[str, float] = field(default_factory=dict[str, float])
    start: str | None = None
    """The run whose weights this one began with."""
    base: str = ""
    """What identifies the weights that checkpoints leave out."""
    energy: Energy = field(default_factory=Energy)
    """Of the machine, where it can be read."""
    lookout: Lookout = field(default_factory=Lookout)
    """For ranks that are slower than the others."""
    ended: str = ""
    """Why the run is at its end, if it is: finished, or stopped early."""

    def restore(self, meta: dict[str, Any]) -> None:
        """What a checkpoint remembers."""
        self.best, self.worse = meta["best"] if meta["best"] is not None else math.inf, meta["worse"]
        self.latest, self.start, self.base = meta["validation"], meta["from"], meta["base"]
        self.ended = meta["ended"]

    def go_on(self) -> None:
        """Begin anew what an end has settled, for a run that is extended."""
        self.latest, self.worse, self.ended = {}, 0, ""


def release(run: Run, decisions: dict[str, Any], session: Session) -> State:
    """A finished stage as named tensors, on disk when there is a run folder, so that no two models are held."""
    run.decisions = decisions
    if session.folder is None:
        state = run.state()
        return {kind: {n: whole(t).cpu() for n, t in tensors.items()} for kind, tensors in state.items()}
    state, _ = checkpoint.load(snapshot(run, session, whole=True), run.world)
    return state


def snapshot(run: Run, session: Session, name: str = "", whole: bool = False) -> Path:
    """Write a checkpoint into the run folder.

    Args:
        name: of the checkpoint; its step when empty.
        whole: with frozen weights, even if the recipe asks for adapters only: the next stage is built from it.
    """
    if session.folder is None:
        return Path()
    kept = run.recipe.checkpoint
    partial = kept.adapter_only and not whole
    meta = {
        "partial": partial,
        "from": session.start,
        "base": session.base,
        "data": fingerprint(run.data),
        "clock": run.clock.state(),
        "decisions": run.decisions,
        "best": session.best if math.isfinite(session.best) else None,
        "worse": session.worse,
        "validation": session.latest,
        "ended": session.ended,
        "launch": name_of_launch(),
    }
    path = session.folder.save(run.state(partial), meta, run.clock.step, kept.keep, name)
    session.observe("checkpoint", {"path": path})
    return path


def measure(run: Run, session: Session) -> bool:
    """Validate; returns whether the run shall stop for want of progress."""
    scores = _scores(run, session)
    session.latest = scores
    if session.folder is not None:
        session.folder.write({"step": run.clock.step, "tokens": run.clock.tok}
                             | {f"validation_{k}": v for k, v in scores.items()})  # fmt: skip
    session.observe("validation", {"step": run.clock.step, **scores})
    better = scores["loss"] < session.best
    session.best, session.worse = min(session.best, scores["loss"]), 0 if better else session.worse + 1
    if better and run.recipe.checkpoint.best:
        snapshot(run, session, "best")
    return 0 < run.recipe.stop.patience <= session.worse


def _scores(run: Run, session: Session) -> dict[str, float]:
    """Of the validation set; ranks that have parts of it add them up."""
    task, batches = run.task, session.validation
    assert run.evaluate is not None
    if shared(run):
        scores = run.evaluate(
            lambda model: evaluated(task, model, batches, lambda part: run.world.total(part, *SAMPLES))
        )
    else:
        scores = run.evaluate(lambda model: task.evaluate(model, batches))
    # Devices may differ in the last bit, and ranks must agree whether to save the best and whether to stop.
    return run.world.told(scores)


def record(run: Run, session: Session, fields: dict[str, Any]) -> None:
    """One step's line for metrics.jsonl and for the progress view."""
    line = {"step": run.clock.step, **fields, **run.gauges, "position": run.clock.position, "stage": run.clock.stage,
            "peak_bytes": memory_peak(run.device)}  # fmt: skip
    if (joules := session.energy.joules()) is not None:
        line["joules"] = joules
    if (slowest := session.lookout.compare(run.clock.step, fields["seconds"], run.stopwatch, run.world)) is not None:
        line |= slowest.fields()
    if session.folder is not None:
        session.folder.write(line)
    session.observe("step", line)
    for straggler in session.lookout.news():
        if run.world.first:
            session.observe("note", {"text": f"Warning: {straggler}"})


def non_finite(run: Run, value: float) -> UserError:
    """The error for a loss that is no number: the step, the parameter with the largest gradient, what to try."""
    norms = {n: float(p.grad.float().norm()) for n, p in run.model.named_parameters() if p.grad is not None}
    bad = [n for n, norm in norms.items() if not math.isfinite(norm)]
    worst = bad[0] if bad else max(norms, key=lambda n: norms[n], default="none")
    at = f"the largest gradient is that of `{worst}` ({norms.get(worst, 0):.3g})"
    what = f"the loss is {value} at step {run.clock.step + 1}; {at}."
    fix = "Try a lower learning rate, a longer warm-up, or clip; resume from a checkpoint before it."
    return UserError(what, "training", fix)


def sample(run: Run) -> str:
    """A text from the model, when it writes and has a tokenizer."""
    wanted, tokenizer = run.recipe.sample, getattr(run.data, "tokenizer", None)
    if not wanted.tokens or tokenizer is None:
        return ""
    assert run.evaluate is not None
    chance = torch.Generator(run.device).manual_seed(run.seed)
    job = partial(written, tokenizer=tokenizer, prompt=wanted.prompt, count=wanted.tokens,
                  temperature=wanted.temperature, generator=chance)  # fmt: skip
    return run.evaluate(job) or ""
