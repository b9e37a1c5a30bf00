"""As many techniques at once as fit together: what each promises alone must hold in company.

A crowd begins with one technique and takes in, in turn, all others that do not clash with those it has.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pairs.grid import planned_and_measured
from scrimp import checkpoint
from scrimp.arrange import clash
from scrimp.models.dropout import keep
from scrimp.registry import modules
from scrimp.technique import Technique
from scrimp.training import train
from tiny import assert_equal, at_home, example, flat, recipe, run_of

NAMES = sorted(modules())
SLOW = {"compile"}
"""Tried in one crowd only, as it compiles at every stage."""


@cache
def crowd(first: str) -> tuple[Technique, ...]:
    at = NAMES.index(first)
    found: list[Technique] = []
    for name in NAMES[at:] + NAMES[:at]:
        one = example(name)
        fits = not any(clash(one, other) for other in found) and at_home(*(t.name for t in found), name)
        if (name not in SLOW or name == first) and fits:
            found.append(one)
    return tuple(found)


@cache
def crowds() -> list[str]:
    """First names of crowds, as few as it takes for every technique to be in one of them."""
    chosen: list[str] = []
    met: set[str] = set()
    for name in NAMES:
        if name not in met:
            chosen.append(name)
            met |= {t.name for t in crowd(name)}
    return chosen


def test_every_technique_is_in_a_crowd() -> None:
    assert {t.name for first in crowds() for t in crowd(first)} == set(NAMES)
    assert max(len(crowd(first)) for first in crowds()) > 8


@pytest.mark.parametrize("first", crowds())
def test_a_crowd_resumes_bitwise_from_files_in_any_order(first: str, tmp_path: Path) -> None:
    data = recipe(*crowd(first)).data
    made = recipe(*crowd(first), data="text", out=str(tmp_path), name="r", checkpoint={"every": "3 step", "keep": 9})
    whole = train(made, data=data.open(), force=True)
    assert math.isfinite(whole.validation["loss"])
    # Without files, and in the other order of the recipe.
    back = train(recipe(*crowd(first)[::-1]), save=False, force=True)
    assert_equal(flat(whole.run.state()), flat(back.run.state()))
    assert back.validation == whole.validation
    cuts = checkpoint.snapshots(tmp_path / "r/checkpoints")[:-1]
    assert len(cuts) >= 2
    # Behind the first lie all the others; the middle one has all that the first half has made.
    for cut in dict.fromkeys((cuts[0], cuts[len(cuts) // 2])):
        resumed = train(resume=cut, data=data.open(), force=True)
        assert_equal(flat(whole.run.state()), flat(resumed.run.state()))
        assert resumed.validation == whole.validation
        assert resumed.text == whole.text


@pytest.mark.parametrize("first", [n for n in crowds() if n not in SLOW])
def test_a_crowd_is_planned_to_the_byte(first: str) -> None:
    planned, measured = planned_and_measured(recipe(*crowd(first)))
    assert planned == measured > 0


@pytest.mark.parametrize("seed", [1, 20_260_101, 2**40 + 1, 2**63 - 1])
def test_another_seed_is_another_run(seed: int) -> None:
    """Weights, order of the data and dropout follow from it, however large it is."""
    zero, other = run_of(recipe()), run_of(recipe(seed=seed))
    assert not torch.equal(*(run.model.get_parameter("embed.weight") for run in (zero, other)))
    ours, theirs = zero.batch(0), other.batch(0)
    assert not torch.equal(ours["tokens"], theirs["tokens"])
    shape = torch.Size((4, 16, 32))
    masks = [keep(shape, batch["sample"], 1, 0.5, torch.arange(shape[1])) for batch in (ours, theirs)]
    assert 0.4 < float((masks[0] == masks[1]).float().mean()) < 0.6, "the masks are related"
    assert len(other.batch(0)["sample"].unique()) == 4


def test_planning_draws_nothing_and_changes_nothing() -> None:
    before = torch.random.get_rng_state()
    with FakeTensorMode(allow_non_fake_inputs=True):
        run_of(recipe(example("adamw")))
    assert torch.equal(before, torch.random.get_rng_state())
