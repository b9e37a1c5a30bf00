# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The loop. Fine-tuning, pre-training, every task and every layout go through it."""

from __future__ import annotations

import gc
import math
import signal
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scrimp import checkpoint
from scrimp.allocator import lean
from scrimp.clock import Clock, Duration
from scrimp.errors import LostError, UserError
from scrimp.folder import RunFolder
from scrimp.plain import counted
from scrimp.products import fast_products
from scrimp.recipe import Recipe
from scrimp.restore import anew, base_of, reopened, same_data, starting_weights
from scrimp.restore import whole as restored
from scrimp.room import check_room, explained, out_of_memory
from scrimp.run import Run, build, device_of
from scrimp.session import (
    Observe,
    Session,
    measure,
    non_finite,
    record,
    release,
    sample,
    snapshot,
)
from scrimp.stages import new_clock, stage_end, validation_batches
from scrimp.world import arranged, joined, lost, ranks, spread

if TYPE_CHECKING:
    from scrimp.technique import State

ECHO: Final = 1.0
"""Seconds within which another SIGTERM is taken for the first one."""


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
    mesh: Mapping[str, int] | None = None,
    start: str | Path | None = None,
    observe: Observe = lambda event, fields: None,
    save: bool = True,
    data: Any = None,
    force: bool = False,
) -> Result:
    """Train a recipe, or continue a run.

    Args:
        recipe: what to train; not with `resume`, which reads the run's own.
        resume: a run's folder, or one of its checkpoints; continues bitwise. One that is at its end stays as it is.
        extend: with `resume`, a duration to add to the run; from where it stopped, if it was stopped early.
        mesh: with `resume`, another mesh of ranks than the run's own, such as `{"tensor": 2}`.
        start: a run whose final weights a new run starts from.
        observe: is told of every step.
        save: whether to write a run folder.
        data: an opened data set to use instead of opening the recipe's.
        force: start even when the plan says that memory will not suffice.
    Raises:
        UserError: for what a user can mend; a checkpoint is never lost by it.
    """
    _check_arguments(recipe, resume, extend, start, mesh)
    lean()
    with joined():
        session = Session(None, observe, start=str(Path(start).absolute()) if start is not None else None)
        if resume is not None:
            return _guarded(session, lambda: _resumed(resume, extend, mesh, data, session, force))
        assert recipe is not None
        return _guarded(session, lambda: _new(recipe, data, session, save, force))


def _guarded(session: Session, begin: Callable[[], Begun]) -> Result:
    """A run from its beginning to its end, whatever ends it."""
    begun: Begun | None = None
    try:
        begun = begin()
        if session.folder is not None:
            session.folder.open(begun.clock.step, begun.recipe)
        with _interruptible(session), fast_products():
            return _stages(begun, session)
    except (MemoryError, RuntimeError) as error:
        if ranks() > 1 and lost(error):
            raise LostError("another rank has ended, or does not answer.", "", "Its log says why.") from None
        if begun is None or not out_of_memory(error):
            raise
        # The frames hold the run; without them its memory is free for the plans that follow.
        traceback.clear_frames(error.__traceback__)
        begun.last = begun.source = None
        if session.world.size > 1:
            raise UserError(f"memory ran out on rank {session.world.rank}.", "memory", "Plan with --ranks.") from None
        raise explained(begun.recipe, begun.data) from None
    finally:
        if session.folder is not None:
            session.folder.close()


@dataclass
class Begun:
    """What the first stage of this process is built from."""

    recipe: Recipe
    data: Any
    clock: Clock
    last: State | None = None
    """The checkpoint that is resumed; let go once a run is built from it."""
    source: State | None = None
    """Weights that a new run starts from; let go as well."""
    decisions: dict[str, Any] = field(default_factory=dict[str, Any])


def _new(recipe: Recipe, data: Any, session: Session, save: bool, force: bool) -> Begun:
    recipe = spread(recipe, ranks())
    session.world = arranged(recipe.mesh, device_of(recipe).type)
    data = session.world.after_first(recipe.data.open) if data is None else data
    if not force and session.world.size == 1:
        check_room(recipe, data)
    session.base = base_of(recipe, session.start)
    begun = Begun(recipe, data, new_clock(recipe, data), source=starting_weights(recipe, data, session.start))
    if begun.source is not None and (new := anew(begun.source["model"], recipe, data)):
        verb = "begins" if len(new) == 1 else "begin"
        session.observe("note", {"text": f"Note: {' and '.join(new)} {verb} anew: the weights have none that fit."})
    if save:
        session.folder = RunFolder.create(recipe, getattr(data, "tokenizer", None), session.world)
    return begun


def _resumed(
    place: str | Path, extend: str | None, mesh: Mapping[str, int] | None, data: Any, session: Session, force: bool
) -> Begun:
    session.folder = RunFolder(RunFolder.newest(place).parent.parent)
    recipe = Recipe.load(session.folder.path / "recipe.yaml")
    if mesh is not None:
        recipe = replace(recipe, mesh=mesh)
    # Ranks that the run did not have may share its batches: that changes no number, and needs no state.
    recipe = spread(recipe, ranks())
    session.folder.world = session.world = arranged(recipe.mesh, device_of(recipe).type)
    # Locked before anything is read, which another process might replace meanwhile.
    session.folder.lock()
    state, meta = checkpoint.load(RunFolder.newest(place), session.world)
    data = session.world.after_first(lambda: reopened(recipe, meta)) if data is None else data
    same_data(data, meta)
    clock = Clock(**meta["clock"])
    session.restore(meta)
    if extend is not None:
        # A run that was stopped early is extended from where it stopped.
        clock.end = clock.position if session.ended else clock.end
        clock.end += clock.at(Duration.parse(extend, "--extend"))
        session.go_on()
    if not (force or session.ended or session.world.size > 1):
        check_room(recipe, data, clock)
    return Begun(recipe, data, clock, restored(recipe, data, state, meta), decisions=meta["decisions"])


def _check_arguments(recipe: Any, resume: Any, extend: Any, start: Any, mesh: Any) -> None:
    if recipe is not None and not isinstance(recipe, Recipe):
        fix = "Write scrimp.train(scrimp.Recipe.load(PATH)), or scrimp.Recipe.read(MAPPING)."
        raise UserError(f"needs a Recipe, not {recipe!r}.", "train", fix)
    if (recipe is None) == (resume is None):
        raise UserError("give either a recipe or a run to resume.", "train")
    if extend is not None and resume is None:
        raise UserError("there is no run to extend.", "--extend", "Give it together with --resume.")
    if mesh is not None and resume is None:
        raise UserError("a new run's mesh stands in its recipe.", "mesh", "Set `mesh` there.")
    if start is not None and resume is not None:
        raise UserError("a resumed run keeps its weights.", "--from", "Begin a new run with it.")


def _stages(begun: Begun, session: Session) -> Result:
    """All stages that are left. `begun` holds the last one's tensors until the next is built from them."""
    recipe, clock = begun.recipe, begun.clock
    told: list[str] = []
    while True:
        last, source, begun.last, begun.source = begun.last, begun.source, None, None
        run = build(recipe, begun.data, clock, last, source, begun.decisions, world=session.world)
        del last, source
        session.validation = validation_batches(run)
        session.observe("stage", {"run": run, "clock": clock})
        for remark in run.remarks:
            if remark not in told and session.world.first:
                session.observe("note", {"text": f"Note: {remark}"})
        told = run.remarks
        reason = session.ended or _stage(run, stage_end(run), session)
        run.close()
        if clock.done or reason != "finished":
            break
        decided = {run.order.key(t): t.decide(run) for t in run.order.slots["decide"]}
        # Shapes depend on them: those of the first rank, which checkpoints have, hold for all.
        begun.decisions = session.world.told(run.decisions | decided)
        clock.cuts.append(clock.position)
        clock.stage += 1
        begun.last = release(run, begun.decisions, session)
        # Closures and the run refer to each other, so that only a collection frees the old model before the new one.
        del run
        gc.collect()
    return _finish(run, session, reason)


def _stage(run: Run, end: int, session: Session) -> str:
    """Train to the end of a stage. The loop itself: everything else is a small function called here."""
    assert run.backward and run.step and run.optimizer
    clock, recipe = run.clock, run.recipe
    validate = clock.steps(recipe.validate.every) if session.validation else 0
    save = clock.steps(recipe.checkpoint.every) if Duration.parse(recipe.checkpoint.every).value else 0
    while clock.position < end and not clock.done:
        began = time.perf_counter()
        session.energy.joules()
        run.stopwatch.begin(run.device, run.world)
        batch = run.batch(clock.step)
        run.stopwatch.pause()
        count, tokens = counted(run, batch)
        lr = run.set_lr()
        loss = run.world.total(run.backward(batch, count))
        value = run.read(loss, worst=0.0)
        if not math.isfinite(value):
            run.close()  # All ranks have this loss; what one alone raises must not wait for the others.
            raise non_finite(run, value)
        run.stopwatch.resume()
        updated = run.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.stopwatch.end()
        clock.tick(recipe.batch, tokens)
        record(run, session, {"loss": value, "lr": lr, "updated": updated, "tokens": tokens,
                              "seconds": time.perf_counter() - began})  # fmt: skip
        del batch, loss
        if validate and (clock.step % validate == 0 or clock.done) and measure(run, session) and not clock.done:
            return "stopped early"
        # Before an interruption, which would save a run that resumes without the cut.
        if run.signals and not clock.done:
            break
        if run.world.any(session.interrupted) and not clock.done:
            snapshot(run, session)
            return "interrupted"
        if save and clock.step % save == 0 and not clock.done:
            snapshot(run, session)
    return "finished"


@contextmanager
def _interruptible(session: Session) -> Generator[None]:
    """Ctrl-C and SIGTERM finish the step, save, and leave; the last step ends the run as ever.

    Only the main thread can listen.
    """

    first = math.inf

    def stop(number: int, frame: Any) -> None:
        nonlocal first
        # When a launch is killed, Linux may send SIGTERM to its ranks once for each of its threads.
        if session.interrupted and (number == signal.SIGINT or time.monotonic() - first > ECHO):
            raise KeyboardInterrupt
        first = min(first, time.monotonic())
        session.interrupted = True

    handlers: dict[int, Any] = {}
    with suppress(ValueError):
        handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _finish(run: Run, session: Session, reason: str) -> Result:
    said = f"already {reason} at step {run.clock.step}, --extend goes on" if session.ended else reason
    if reason != "interrupted" and not session.ended:
        if session.validation and not session.latest:
            measure(run, session)
        session.ended = reason
        snapshot(run, session)
    text = sample(run) if reason != "interrupted" else ""
    if session.folder is not None and text:
        session.folder.write_text("sample.txt", text)
    session.observe("end", {"reason": said, "text": text, "run": run, **session.latest})
    return Result(session.folder.path if session.folder else None, run, session.latest, text, reason)
