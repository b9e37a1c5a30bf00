"""Many techniques at once, as they fit together: what each promises alone must hold in company.

A crowd begins with a technique that is in none yet and takes in all others that are in none and do not clash with those
it has; then such as are in others, until it is large.
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
LARGE = 14


def gathered(first: str, met: set[str]) -> tuple[Technique, ...]:
    """A crowd, if these techniques are in others."""
    at = NAMES.index(first)
    found: list[Technique] = []
    for name in sorted(NAMES[at:] + NAMES[:at], key=lambda name: name in met):
        one = example(name)
        wanted = name == first or (name not in SLOW and (name not in met or len(found) < LARGE))
        if wanted and not any(clash(one, other) for other in found) and at_home(*(t.name for t in found), name):
            found.append(one)
    return tuple(found)


@cache
def crowds() -> dict[str, tuple[Technique, ...]]:
    """First name -> crowd, until every technique is in one of them."""
    chosen: dict[str, tuple[Technique, ...]] = {}
    met: set[str] = set()
    for name in NAMES:
        if name not in met:
            chosen[name] = gathered(name, met)
            met |= {t.name for t in chosen[name]}
    return chosen


def crowd(first: str) -> tuple[Technique, ...]:
    return crowds()[first]


def test_every_technique_is_in_a_crowd() -> None:
    assert {t.name for crowd in crowds().values() for t in crowd} == set(NAMES)
    assert min(map(len, crowds().values())) > 8


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
