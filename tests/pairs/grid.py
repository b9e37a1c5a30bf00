"""Every two techniques: do they fit together, and does the order in which a shared slot folds them matter?

Two techniques share a slot when both override it. An order that their cards declare is taken from the cards; every
other one must not matter: same weights to the last bit, same peak of live bytes.
"""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scrimp.arrange import Arrangement, arrange, clash, declared
from scrimp.meter import LiveBytes
from scrimp.recipe import Recipe
from scrimp.registry import modules
from scrimp.run import Run, exported
from scrimp.technique import SLOTS, Technique, overrides
from tiny import at_home, example, flat, recipe, run_of

NOT_FOLDED = {"stages", "decide", "price"}
STEPS = 5
"""Of eight: whatever acts every few steps, or until the middle, has begun, acted and gone on by then."""
SHARPER = {"autocast": {"dtype": "float16"}}
"""Settings under which more slots act than under the card's example: bfloat16 scales nothing."""


def tried(name: str) -> Technique:
    """A technique as the grid tries it."""
    return example(name, **SHARPER.get(name, {}))


def together() -> Iterator[tuple[str, str]]:
    """Every two techniques of the sample that do not clash, on a task that takes both."""
    for a, b in itertools.combinations(sorted(modules()), 2):
        if sampled(a, b) and not clash(tried(a), tried(b)) and at_home(a, b):
            yield a, b


def shared(a: str, b: str) -> Iterator[tuple[str, bool]]:
    """(slot, whether the cards declare the order) for every slot that two techniques share."""
    one, two = tried(a), tried(b)
    for slot in SLOTS:
        if slot not in NOT_FOLDED and overrides(one, slot) and overrides(two, slot):
            yield slot, declared(slot, one, two)


def pairs() -> Iterator[tuple[str, str, str]]:
    """(slot, a, b) for techniques of the sample that share a slot, do not clash, and whose order no card declares."""
    for a, b in itertools.combinations(sorted(modules()), 2):
        unknown = [slot for slot, known in shared(a, b) if not known and part(slot, a, b)]
        if unknown and not clash(tried(a), tried(b)) and at_home(a, b):
            yield from ((slot, a, b) for slot in unknown)


def part(*case: str, share: int = 6) -> bool:
    """A fixed part of the grid, and everything that touches `step` and `backward`. `SCRIMP_PAIRS=full` takes all."""
    if os.environ.get("SCRIMP_PAIRS") == "full":
        return True
    return case[0] in ("step", "backward") or zlib.crc32("/".join(case).encode()) % share == 0


def sampled(a: str, b: str) -> bool:
    """A third of the pairs that share a slot in no declared order, a sixth of the others that share one; of those
    that meet in no slot a thirtieth."""
    known = [known for _, known in shared(a, b)]
    return part(a, b, share=30 if not known else 6 if all(known) else 3)


def recipe_of(*techniques: Technique) -> Recipe:
    """A recipe in float64, with SGD where none is a rule. (Adam and Lion hide a wrong gradient scale.)"""
    wide = "float32" if any(t.name == "autocast" for t in techniques) else "float64"
    return recipe(*techniques, dtype=wide, duration="8 step")


def planned_recipe(*techniques: Technique) -> Recipe:
    """A recipe whose plan is compared; without dropout where neither technique executes the model otherwise.

    Three quarters of a step's operators draw masks, which contracts and crowds plan, and nobody else looks at.
    """
    made = recipe_of(*techniques)
    if any(overrides(t, "wrap") for t in techniques) or os.environ.get("SCRIMP_PAIRS") == "full":
        return made
    return replace(made, model=replace(made.model, dropout=0.0))


def swapped(made: Recipe, slot: str, a: str, b: str) -> Arrangement:
    """The arrangement with two techniques of one slot exchanged."""
    order = arrange(made.techniques)
    place = {a: b, b: a}
    by_name = {t.name: t for t in made.techniques}
    line = tuple(by_name[place.get(t.name, t.name)] for t in order.slots[slot])
    return replace(order, slots={**order.slots, slot: line})


def train(run: Run, batches: Sequence[dict[str, torch.Tensor]]) -> tuple[int, float]:
    """Peak of live bytes over steps on these batches, and the last loss."""
    assert run.backward and run.step and run.optimizer
    peak, loss = 0, math.nan
    for batch in batches:
        count = run.task.count(batch)
        run.set_lr()
        with LiveBytes() as meter:
            loss = run.read(run.backward(batch, count), worst=0.0)
            run.step()
        peak = max(peak, meter.peak)
        run.optimizer.zero_grad(set_to_none=True)
        run.clock.tick(run.recipe.batch, 1)
    return peak, loss


def outcome(run: Run) -> tuple[dict[str, torch.Tensor], int]:
    """All tensors after a few steps, exported and measured ones too, and the peak of live bytes of the steps."""
    peak, last = train(run, [run.batch(i) for i in range(STEPS)])
    plain = {f"export/{n}": t.detach().clone() for n, t in exported(run).items()}
    assert run.evaluate is not None
    scores = run.evaluate(lambda model: run.task.evaluate(model, [run.batch(0)]))
    return flat(run.state()) | plain | {"loss": torch.tensor(last), "score": torch.tensor(scores["loss"])}, peak


def differences(slot: str, one: Technique, two: Technique) -> tuple[float, int]:
    """Largest difference of a number and difference of peak bytes between the two orders of a slot."""
    made = recipe_of(one, two)
    first, peak = outcome(run_of(made))
    second, other = outcome(run_of(made, order=swapped(made, slot, one.name, two.name)))
    if first.keys() != second.keys():
        return math.inf, other - peak
    worst = max(float((first[n].double() - second[n].double()).abs().max()) for n in first)
    return worst, other - peak


def planned_and_measured(made: Recipe, steps: int = 2) -> tuple[int, int]:
    """Peak of live bytes of the first steps: on fake tensors, as a plan counts it, and on real ones."""
    real = run_of(made)
    batches = [real.batch(i) for i in range(steps)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        planned, _ = train(run_of(made), [{k: mode.from_tensor(v) for k, v in b.items()} for b in batches])
    measured, loss = train(real, batches)
    assert math.isfinite(loss)
    return planned, measured
