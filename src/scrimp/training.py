# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The loop. Fine-tuning, pre-training, every task and every layout go through it."""

from __future__ import annotations

import gc
import math
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scrimp import checkpoint
from scrimp.clock import Clock, Duration
from scrimp.errors import UserError
from scrimp.folder import RunFolder
from scrimp.meter import memory_peak
from scrimp.models.generate import generate
from scrimp.products import fast_products
from scrimp.restore import fingerprint, same_data, starting_weights
from scrimp.restore import whole as restored
from scrimp.room import check_room, explained, out_of_memory
from scrimp.run import Run, build
from scrimp.stages import new_clock, stage_end

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.technique import Batch, State

Observe = Callable[[str, dict[str, Any]], None]
"""(event, fields): what a progress view hears. Events: start, stage, step, validation, checkpoint, sample, end."""


@dataclass
class Result:
    """What a run ended with."""

    folder: Path | None
    run: Run
    validation: dict[str, float]
    text: str = ""
    reason: str = "finished"
    """finished, interrupted, or stopped early."""


@dataclass
class Session:
    """One process's part of a run: what is not a function of the recipe, and is never checkpointed."""

    folder: RunFolder | None
    observe: Observe
    validation: Sequence[Batch] = ()
    best: float = math.inf
    worse: int = 0
    interrupted: bool = False
    latest: dict[str, float] = field(default_factory=dict[str, float])
    start: str | None = None
    """The run whose weights this one began with."""

    def restore(self, meta: dict[str, Any]) -> None:
        """What a checkpoint remembers."""
        self.best, self.worse = meta["best"] if meta["best"] is not None else math.inf, meta["worse"]
        self.latest, self.start = meta["validation"], meta["from"]


def train(
    recipe: Recipe | None = None,
    *,
    resume: str | Path | None = None,
    extend: str | None = None,
    start: str | Path | None = None,
    observe: Observe = lambda event, fields: None,
    save: bool = True,
    data: Any = None,
    force: bool = False,
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
        force: start even when the plan says that memory will not suffice.
    Raises:
        UserError: for what a user can mend; a checkpoint is never lost by it.
    """
    _check_arguments(recipe, resume, extend, start)
    session = Session(None, observe, start=str(start) if start is not None else None)
    decisions: dict[str, Any] = {}
    states: list[State] = []
    if resume is not None:
        session.folder, recipe, state, meta = RunFolder.reopen(resume)
        data = recipe.data.open() if data is None else data
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
    if not force:
        check_room(recipe, data)
    source = None if states else starting_weights(recipe, data, session.start)
    if session.folder is None and save:
        session.folder = RunFolder.create(recipe)
    if session.folder is not None:
        session.folder.open(clock.step, recipe)
    handlers = _catch_interrupts(session)
    try:
        with fast_products():
            return _stages(recipe, data, clock, session, states, source, decisions)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        # The frames hold the run; without them its memory is free for the plans that follow.
        traceback.clear_frames(error.__traceback__)
        states.clear()
        gc.collect()
        raise explained(recipe, data) from None
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


def release(run: Run, decisions: dict[str, Any], session: Session) -> State:
    """A finished stage as named tensors, on disk when there is a run folder, so that no two models are held."""
    run.decisions = decisions
    if session.folder is None:
        return {kind: {n: t.detach().cpu() for n, t in tensors.items()} for kind, tensors in run.state().items()}
    state, _ = checkpoint.load(snapshot(run, session, whole=True))
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
        "data": fingerprint(run.data),
        "clock": run.clock.state(),
        "decisions": run.decisions,
        "best": session.best if math.isfinite(session.best) else None,
        "worse": session.worse,
        "validation": session.latest,
    }
    path = session.folder.save(run.state(partial), meta, run.clock.step, kept.keep, name)
    session.observe("checkpoint", {"path": path})
    return path


def validation_batches(run: Run) -> list[Batch]:
    """The fixed validation set: the first windows of the held-out documents."""
    import numpy as np

    from scrimp.run import to_device

    size, held = run.recipe.batch, run.data.validation
    count = min(run.recipe.validate.batches * size, len(held))
    spans = [np.arange(i, min(i + size, count)) for i in range(0, count, size)]
    return [to_device(run.task.batch(held.windows(ids), ids), run.device) for ids in spans]


def measure(run: Run, session: Session) -> bool:
    """Validate; returns whether the run shall stop for want of progress."""
    assert run.evaluate is not None
    scores: dict[str, float] = run.evaluate(lambda model: run.task.evaluate(model, session.validation))
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


def record(run: Run, session: Session, fields: dict[str, Any]) -> None:
    """One step's line for metrics.jsonl and for the progress view."""
    line = {"step": run.clock.step, **fields, "position": run.clock.position, "stage": run.clock.stage,
            "peak_bytes": memory_peak(run.device)}  # fmt: skip
    if session.folder is not None:
        session.folder.write(line)
    session.observe("step", line)


def non_finite(run: Run, value: float) -> UserError:
    """The error for a loss that is no number: the step, the parameter with the largest gradient, what to try."""
    norms = {n: float(p.grad.float().norm()) for n, p in run.model.named_parameters() if p.grad is not None}
    bad = [n for n, norm in norms.items() if not math.isfinite(norm)]
    worst = bad[0] if bad else max(norms, key=lambda n: norms[n], default="none")
    at = f"the largest gradient is that of `{worst}` ({norms.get(worst, 0):.3g})"
    what = f"the loss is {value} at step {run.clock.step + 1}; {at}."
    fix = "Try a lower learning rate, a longer warm-up, or clip; resume from a checkpoint before it."
    return UserError(what, "training", fix)


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


def sample(run: Run) -> str:
    """A text from the model, when it is a causal one with a tokenizer."""
    wanted, tokenizer = run.recipe.sample, getattr(run.data, "tokenizer", None)
    if not wanted.tokens or tokenizer is None or not getattr(getattr(run.model, "config", None), "causal", False):
        return ""
    assert run.evaluate is not None
    prompt = [tokenizer.end, *tokenizer.encode(wanted.prompt)]
    chance = torch.Generator(run.device).manual_seed(run.seed)

    def job(model: nn.Module) -> list[int]:
        ids = torch.tensor(prompt, device=run.device)
        return generate(model, ids, wanted.tokens, wanted.temperature, chance, tokenizer.end).tolist()

    return tokenizer.decode([i for i in run.evaluate(job) if i != tokenizer.end])
