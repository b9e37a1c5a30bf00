# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The loop. Fine-tuning, pre-training, every task and every layout go through it."""

from __future__ import annotations

import gc
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scrimp.clock import Clock, Duration
from scrimp.errors import UserError
from scrimp.folder import RunFolder
from scrimp.products import fast_products
from scrimp.restore import base_of, reopened, same_data, starting_weights
from scrimp.restore import whole as restored
from scrimp.run import Run, build
from scrimp.session import (
    Observe,
    Session,
    measure,
    non_finite,
    record,
    release,
    sample,
    snapshot,
    validation_batches,
)
from scrimp.stages import new_clock, stage_end

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.technique import State


@dataclass
class Result:
    """What a run ended with."""

    folder: Path | None
    run: Run
    validation: dict[str, float]
    text: str = ""
    reason: str = "finished"
    """finished, interrupted, or stopped early."""


def train(
    recipe: Recipe | None = None,
    *,
    resume: str | Path | None = None,
    extend: str | None = None,
    start: str | Path | None = None,
    observe: Observe = lambda event, fields: None,
    save: bool = True,
    data: Any = None,
) -> Result:
    """Train a recipe, or continue a run.

    Args:
        recipe: what to train; not with `resume`, which reads the run's own.
        resume: a run's folder, or one of its checkpoints; continues bitwise.
        extend: with `resume`, a duration to add to the run.
        start: a run whose final weights a new run starts from.
        observe: is told of every step.
        save: whether to write a run folder.
        data: an opened data set to use instead of opening the recipe's.
    Raises:
        UserError: for what a user can mend; a checkpoint is never lost by it.
    """
    _check_arguments(recipe, resume, extend, start)
    session = Session(None, observe, start=str(Path(start).absolute()) if start is not None else None)
    decisions: dict[str, Any] = {}
    states: list[State] = []
    if resume is not None:
        session.folder, recipe, state, meta = RunFolder.reopen(resume)
        data = reopened(recipe, meta) if data is None else data
        same_data(data, meta)
        states.append(restored(recipe, data, state, meta))
        clock, decisions = Clock(**meta["clock"]), meta["decisions"]
        session.restore(meta)
        if extend is not None:
            clock.end += clock.at(Duration.parse(extend, "--extend"))
            session.latest = {}
        del state
    else:
        assert recipe is not None
        data = recipe.data.open() if data is None else data
        clock = new_clock(recipe, data)
        session.base = base_of(recipe, session.start)
    source = None if states else starting_weights(recipe, data, session.start)
    if session.folder is None and save:
        session.folder = RunFolder.create(recipe, getattr(data, "tokenizer", None))
    if session.folder is not None:
        session.folder.open(clock.step, recipe)
    handlers = _catch_interrupts(session)
    try:
        with fast_products():
            return _stages(recipe, data, clock, session, states, source, decisions)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if session.folder is not None:
            session.folder.close()


def _check_arguments(recipe: Any, resume: Any, extend: Any, start: Any) -> None:
    if (recipe is None) == (resume is None):
        raise UserError("give either a recipe or a run to resume.", "train")
    if extend is not None and resume is None:
        raise UserError("there is no run to extend.", "--extend", "Give it together with --resume.")
    if start is not None and resume is not None:
        raise UserError("a resumed run keeps its weights.", "--from", "Begin a new run with it.")


def _stages(
    recipe: Recipe,
    data: Any,
    clock: Clock,
    session: Session,
    states: list[State],
    source: State | None,
    decisions: dict[str, Any],
) -> Result:
    """All stages that are left. `states` holds the last one's tensors until the next is built from them."""
    while True:
        run = build(recipe, data, clock, states.pop() if states else None, source, decisions)
        source = None
        session.validation = validation_batches(run)
        session.observe("stage", {"run": run, "clock": clock})
        reason = _stage(run, stage_end(run), session)
        if clock.done or reason != "finished":
            break
        decisions = run.decisions | {run.order.key(t): t.decide(run) for t in run.order.slots["decide"]}
        clock.cuts.append(clock.position)
        clock.stage += 1
        states.append(release(run, decisions, session))
        # Closures and the run refer to each other, so that only a collection frees the old model before the new one.
        del run
        gc.collect()
    return _finish(run, session, reason)


def _stage(run: Run, end: int, session: Session) -> str:
    """Train to the end of a stage. The loop itself: everything else is a small function called here."""
    assert run.backward and run.step and run.optimizer
    clock, recipe = run.clock, run.recipe
    validate = clock.steps(recipe.validate.every) if Duration.parse(recipe.validate.every).value else 0
    validate = validate if session.validation else 0
    save = clock.steps(recipe.checkpoint.every) if Duration.parse(recipe.checkpoint.every).value else 0
    while clock.position < end and not clock.done:
        began = time.perf_counter()
        batch = run.batch(clock.step)
        count = run.task.count(batch)
        lr = run.set_lr()
        loss = run.backward(batch, count)
        value = run.read(loss, worst=0.0)
        if not math.isfinite(value):
            raise non_finite(run, value)
        updated = run.step()
        run.optimizer.zero_grad(set_to_none=True)
        clock.tick(recipe.batch, int(count))
        record(run, session, {"loss": value, "lr": lr, "updated": updated, "tokens": int(count),
                              "seconds": time.perf_counter() - began})  # fmt: skip
        del batch, loss
        if validate and (clock.step % validate == 0 or clock.done) and measure(run, session):
            return "stopped early"
        if session.interrupted:
            snapshot(run, session)
            return "interrupted"
        if save and clock.step % save == 0 and not clock.done:
            snapshot(run, session)
    return "finished"


def _catch_interrupts(session: Session) -> dict[int, Any]:
    """Ctrl-C and SIGTERM finish the step, save, and leave. Only the main thread can listen."""

    def stop(number: int, frame: Any) -> None:
        if session.interrupted:
            raise KeyboardInterrupt
        session.interrupted = True

    try:
        return {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        return {}


def _finish(run: Run, session: Session, reason: str) -> Result:
    if reason != "interrupted":
        if session.validation and not session.latest:
            measure(run, session)
        snapshot(run, session)
    text = sample(run) if reason != "interrupted" else ""
    if session.folder is not None and text:
        session.folder.write_text("sample.txt", text)
    session.observe("end", {"reason": reason, "text": text, "run": run, **session.latest})
    return Result(session.folder.path if session.folder else None, run, session.latest, text, reason)
