"""Every two techniques that share a slot, in all orders that no card declares: same weights, same peak memory."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from scrimp.arrange import Arrangement, arrange, clash, declared
from scrimp.meter import LiveBytes
from scrimp.recipe import Recipe
from scrimp.registry import modules, technique_class
from scrimp.run import Run, exported
from scrimp.technique import SLOTS, overrides
from tiny import example, flat, recipe, run_of

NOT_FOLDED = {"stages", "decide", "price"}
STEPS = 8


def pairs() -> Iterator[tuple[str, str, str]]:
    """(slot, a, b) for every two techniques that share a slot, do not clash, and whose order no card declares."""
    for a, b in itertools.combinations(sorted(modules()), 2):
        one, two = example(a), example(b)
        if clash(one, two):
            continue
        for slot in SLOTS:
            if slot in NOT_FOLDED or not (overrides(one, slot) and overrides(two, slot)):
                continue
            if not declared(slot, one, two):
                yield slot, a, b


def sampled(pair: tuple[str, str, str], share: int = 3) -> bool:
    """A fixed third of the grid, and everything that touches `step` and `backward`."""
    if os.environ.get("SCRIMP_PAIRS") == "full":
        return True
    return pair[0] in ("step", "backward") or zlib.crc32("/".join(pair).encode()) % share == 0


def recipe_of(a: str, b: str) -> Recipe:
    """A recipe of both in float64, with SGD where neither is a rule. (Adam and Lion hide a wrong gradient scale.)"""
    wide = "float32" if "autocast" in (a, b) else "float64"
    return recipe(example(a), example(b), dtype=wide, duration=f"{STEPS} step")


def swapped(made: Recipe, slot: str, a: str, b: str) -> Arrangement:
    """The arrangement with two techniques of one slot exchanged."""
    order = arrange(made.techniques)
    place = {a: b, b: a}
    by_name = {t.name: t for t in made.techniques}
    line = tuple(by_name[place.get(t.name, t.name)] for t in order.slots[slot])
    return replace(order, slots={**order.slots, slot: line})


def outcome(run: Run) -> tuple[dict[str, torch.Tensor], int]:
    """Weights after a few steps, and the peak of live bytes of the steps."""
    assert run.backward and run.step and run.optimizer
    peak = 0
    for _ in range(STEPS):
        batch = run.batch(run.clock.step)
        count = run.task.count(batch)
        run.set_lr()
        with LiveBytes() as meter:
            run.backward(batch, count)
            run.step()
        peak = max(peak, meter.peak)
        run.optimizer.zero_grad(set_to_none=True)
        run.clock.tick(run.recipe.batch, int(count))
    weights = {n: t for n, t in flat(run.state()).items() if n.startswith("model/")}
    plain = {f"export/{n}": t.detach().clone() for n, t in exported(run).items()}
    assert run.evaluate is not None
    scores = run.evaluate(lambda model: run.task.evaluate(model, [run.batch(0)]))
    return weights | plain | {"loss": torch.tensor(scores["loss"])}, peak


def differences(slot: str, a: str, b: str) -> tuple[float, int]:
    """Largest difference of weights and difference of peak bytes between the two orders."""
    made = recipe_of(a, b)
    first, peak = outcome(run_of(made))
    second, other = outcome(run_of(made, order=swapped(made, slot, a, b)))
    assert first.keys() == second.keys()
    worst = max(float((first[n] - second[n]).abs().max()) for n in first)
    return worst, other - peak


def rule_names() -> list[str]:
    """Names of the update rules."""
    return [n for n in modules() if "update rule" in technique_class(n).card.sets]
