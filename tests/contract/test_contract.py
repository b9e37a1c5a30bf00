"""What every technique must do, whoever wrote it. A new file under techniques/ joins by itself."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from scrimp.errors import RecipeError, UserError
from scrimp.meter import LiveBytes
from scrimp.models.seams import matching
from scrimp.recipe import Recipe
from scrimp.registry import catalogue, describe, modules, technique_class
from scrimp.run import Run
from scrimp.training import train
from tiny import assert_equal, example, flat, home, recipe, run_of, step

NAMES = sorted(modules())
SECTIONS = {
    "Optimization", "Initialization", "Sparse training", "Overparameterization", "Large batch training",
    "Incremental learning", "Token masking", "Importance sampling", "Parallelism", "Quantized training",
    "Rematerialization", "Offloading", "Parameter-efficient tuning", "Hardware/algorithm co-design",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_trains(name: str) -> None:
    made = recipe(example(name))
    before = run_of(made)
    result = train(made, save=False)
    assert math.isfinite(result.validation["loss"])
    start, end = flat(before.state()), flat(result.run.state())
    # A later stage may have removed what only an earlier one needs.
    # Packed weights are integers, which nothing trains.
    weights = {n: p for n, p in before.model.named_parameters() if f"model/{n}" in end and p.is_floating_point()}
    trains = example(name).trained or ("*",)
    trained = {n for pattern in trains for n in matching(pattern, list(weights), "parameter")}
    moved = {n for n in weights if not torch.equal(start[f"model/{n}"], end[f"model/{n}"])}
    assert moved == trained, f"left or moved by mistake: {sorted(moved ^ trained)[:4]}"


@pytest.mark.parametrize("name", NAMES)
def test_resumes_bitwise_at_three_cuts(name: str, tmp_path: Path) -> None:
    made = recipe(example(name), out=str(tmp_path), name="whole", checkpoint={"every": "1 step", "keep": 99})
    whole = train(made)
    wanted = flat(whole.run.state())
    for cut in (1, 4, 7):
        copy = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "whole", copy)
        _use_tiny_data(copy)
        resumed = train(resume=copy / f"checkpoints/step-{cut:09d}", data=made.data.open(), force=True)
        assert_equal(wanted, flat(resumed.run.state()))
        assert resumed.validation == whole.validation


def _use_tiny_data(folder: Path) -> None:
    """The recipe names the tests' own data set, which is handed over opened instead. Nothing is resumed from it."""
    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    raw["data"], raw["checkpoint"]["every"] = "text", 0
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))


@pytest.mark.parametrize("name", NAMES)
def test_plans_on_fake_tensors_to_the_byte(name: str) -> None:
    made = recipe(example(name))
    real = run_of(made)
    batch = real.batch(0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run_of(made)
        planned = _peak(fake, {k: mode.from_tensor(v) for k, v in batch.items()})
    if name == "compile":  # planned before fusion, and compiled code is not seen op by op
        return
    assert planned == _peak(real, batch) > 0


def _peak(run: Run, batch: dict[str, torch.Tensor]) -> int:
    assert run.backward and run.step
    count = run.task.count(batch)
    run.set_lr()
    with LiveBytes() as meter:
        run.backward(batch, count)
        run.step()
    return meter.peak


@pytest.mark.parametrize("name", NAMES)
def test_renames_no_parameter(name: str) -> None:
    run = run_of(recipe(example(name)))
    names = {n for n, _ in run.model.named_parameters()}
    lost = run.base - names
    added = names - run.base
    card = technique_class(name).card
    removes = {"depth schedule", "width schedule", "normalization", "shared blocks"} & set(card.sets)
    assert not lost or removes, f"renamed or lost: {sorted(lost)[:3]}"
    assert not (lost and added) or removes, f"renamed: {sorted(lost)[:3]} to {sorted(added)[:3]}"
    tuning = card.section == "Parameter-efficient tuning"
    assert not (added and tuning) or card.trains, f"added, and no pattern trains it: {sorted(added)[:3]}"


PATTERNED = [n for n in NAMES if technique_class(n).card.scope]


@pytest.mark.parametrize("name", PATTERNED)
def test_a_pattern_that_hits_nothing_raises(name: str) -> None:
    scope = technique_class(name).card.scope
    with pytest.raises(UserError, match="matches no"):
        run_of(recipe(example(name, **{scope: "nothing_like_this"})))


@pytest.mark.parametrize("name", NAMES)
def test_round_trips_through_yaml(name: str, tmp_path: Path) -> None:
    made = recipe(example(name), data="text")
    assert Recipe.read(made.dump()) == made
    (tmp_path / "r.yaml").write_text(made.yaml())
    assert Recipe.load(tmp_path / "r.yaml") == made


@pytest.mark.parametrize("name", [n for n in NAMES if technique_class(n).card.neutral is not None])
def test_neutral_settings_equal_the_baseline(name: str) -> None:
    neutral = technique_class(name).card.neutral
    assert neutral is not None
    base = train(recipe(**home(name)), save=False)
    tried = train(recipe(example(name, **neutral)), save=False)
    tried.run.memories.clear()
    assert_equal(flat(base.run.state()), flat(tried.run.state()))
    assert base.validation == tried.validation


@pytest.mark.parametrize("name", NAMES)
def test_the_card_read_from_source_is_the_card(name: str) -> None:
    read, true = catalogue()[name], describe(name, technique_class(name))
    assert read.card == true.card
    assert read.slots == true.slots
    assert [(s.name, s.default) for s in read.settings] == [(s.name, s.default) for s in true.settings]
    assert all(s.about for s in read.settings), "every setting has a docstring"


@pytest.mark.parametrize("name", NAMES)
def test_the_card_and_the_page_are_whole(name: str) -> None:
    entry = catalogue()[name]
    assert entry.card.section in SECTIONS
    assert entry.card.paper
    assert entry.card.saves
    assert entry.card.costs
    assert not entry.card.claim or "(" in entry.card.claim, "a claim names its source"
    for word in ("Saves:", "Costs:", "Not for:"):
        assert word in entry.about


@pytest.mark.parametrize("name", NAMES)
def test_is_frozen_and_refuses_unknown_settings(name: str) -> None:
    technique = example(name)
    field = dataclasses.fields(technique)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(technique, field, None)
    raw: dict[str, Any] = {"techniques": {"sgd": {}, name: {f"{field}x": 1}}}
    with pytest.raises(RecipeError, match=f"unknown setting `{field}x`.*{field}"):
        Recipe.read(raw)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_leaves_no_gradient_and_counts(name: str) -> None:
    run = run_of(recipe(example(name)))
    step(run)
    assert all(p.grad is None for p in run.model.parameters())
    assert run.clock.step == 1
