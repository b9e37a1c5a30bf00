"""Progressive resolution: what a small image and its positions are, when they grow, and what is left alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pairs.grid import train as trained
from scrimp.errors import UserError
from scrimp.planning import plan
from scrimp.recipe import Recipe
from scrimp.run import Run
from scrimp.stages import validation_batches
from scrimp.techniques.incremental.resolution_warmup import Resized, ResolutionWarmup, shrinking
from scrimp.training import train
from tiny import TinyData, assert_equal, example, flat, recipe, run_of
from tiny_tasks import TINY, Memory

GROWING = ResolutionWarmup(start=0.5, until="4 step", levels=2)
ENTRIES = ("classify, images", "masked-image", "contrastive")


def of_task(entry: str, *techniques: Any, duration: str = "8 step", **settings: Any) -> Recipe:
    tiny = TINY[entry]
    settings = {"model": dict(tiny.model), "dtype": "float64"} | settings
    if "model" in settings and entry == "contrastive":
        settings["model"]["patch"] = 4
    return recipe(*techniques, data=Memory(entry), task=tiny.name or entry, duration=duration, **settings)


def test_small_images_are_torchs_antialiased_ones() -> None:
    images = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    for side in (7, 14, 20, 28):
        weights = torch.from_numpy(shrinking(28, side))
        expected = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        torch.testing.assert_close(weights @ images @ weights.T, expected, atol=1e-12, rtol=0)
    assert np.array_equal(shrinking(5, 5), np.eye(5))
    # By hand: two of four points; each sees its own two and half as much of the two beside them.
    np.testing.assert_allclose(shrinking(4, 2)[0], np.array([0.75, 0.75, 0.25, 0.0]) / 1.75)


def test_positions_are_those_of_the_whole_table_read_at_the_smaller_grid() -> None:
    run = run_of(of_task("classify, images", GROWING))
    table = run.model.positions.weight  # type: ignore[union-attr]
    assert table.shape == (17, 32)
    read = run.model.positions(torch.arange(5))  # type: ignore[operator]
    grid = table[1:].T.reshape(1, 32, 4, 4)
    small = F.interpolate(grid, size=(2, 2), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(read[1:], small.flatten(2)[0].T, atol=1e-7, rtol=0)
    assert torch.equal(read[0], table[0]), "the class token's stays"
    read.sum().backward()
    assert bool((table.grad != 0).all()), "every row of the whole table is trained"


def seen(made: Recipe) -> tuple[list[tuple[int, ...]], list[int], Run]:
    """Sides of the images of each step and of each stage's validation."""
    sides: list[tuple[int, ...]] = []
    held: list[int] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            run = fields["run"]
            held.append(validation_batches(run)[0]["images"].shape[-1])
            inner = run.batch

            def batch(step: int) -> dict[str, Tensor]:
                found = inner(step)
                sides.append(tuple(found["images"].shape[2:]))
                return found

            run.batch = batch

    result = train(made, save=False, observe=see, force=True)
    return sides, held, result.run


@pytest.mark.parametrize("entry", ENTRIES)
def test_images_grow_in_training_and_validation(entry: str) -> None:
    sides, held, run = seen(of_task(entry, example("adamw"), GROWING, duration="6 step"))
    assert [side for side, _ in sides] == [8, 8, 12, 12, 16, 16]
    assert held == [8, 12, 16]
    plain = run_of(of_task(entry))
    assert {n: p.shape for n, p in run.model.named_parameters()} == {
        n: p.shape for n, p in plain.model.named_parameters()
    }
    assert not isinstance(run.task, Resized), "the last stage is the untouched model and task"
    assert not [n for n, _ in run.model.named_buffers() if "shrink" in n]


def test_a_run_that_begins_with_whole_images_is_the_baseline() -> None:
    base, tried = (train(of_task("classify, images", *more), save=False, force=True)
                   for more in ((), (ResolutionWarmup(start=1.0),)))  # fmt: skip
    assert_equal(flat(base.run.state()), flat(tried.run.state()))


def test_fixed_waves_stay_fixed() -> None:
    tiny = dict(TINY["masked-image"].model) | {"positions": "sincos"}
    made = of_task("masked-image", GROWING, model=tiny)
    before = run_of(made).model.get_parameter("positions.weight").clone()
    after = train(made, save=False, force=True).run.model.get_parameter("positions.weight")
    assert torch.equal(before, after)


@pytest.mark.parametrize("entry", ENTRIES)
def test_resumes_bitwise_inside_and_between_stages(entry: str, tmp_path: Path) -> None:
    made = of_task(entry, example("adamw"), example("ema"), GROWING, duration="6 step", out=str(tmp_path), name="a",
                   checkpoint={"every": "1 step", "keep": 99}, validate={"every": "99 step"})  # fmt: skip
    whole = train(made, data=Memory(entry).open(), force=True)
    for cut in (1, 2) if entry == "classify, images" else (3,):
        copy = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "a", copy)
        raw = yaml.safe_load((copy / "recipe.yaml").read_text())
        (copy / "recipe.yaml").write_text(yaml.safe_dump(raw | {"data": "text"}))
        resumed = train(resume=copy / f"checkpoints/step-{cut:09d}", data=Memory(entry).open(), force=True)
        assert_equal(flat(whole.run.state()), flat(resumed.run.state()))
        assert whole.validation == resumed.validation


@pytest.mark.parametrize("entry", ENTRIES)
def test_is_planned_to_the_byte(entry: str) -> None:
    made = of_task(entry, GROWING)
    real = run_of(made)
    batch = real.batch(0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        planned, _ = trained(run_of(made), [{k: mode.from_tensor(v) for k, v in batch.items()}])
    assert planned == trained(real, [batch])[0]


def test_every_stage_is_planned_for_its_size() -> None:
    stages = plan(of_task("classify, images", GROWING), data=Memory("classify, images").open()).stages
    assert len(stages) == 3
    assert sum(stages[0].flops().values()) < sum(stages[2].flops().values())


def test_what_reads_no_images_is_refused() -> None:
    with pytest.raises(UserError, match=r"techniques\.resolution_warmup: the model reads no images"):
        run_of(recipe(GROWING, data=TinyData()))
    with pytest.raises(UserError, match=r"techniques\.resolution_warmup\.start: .* leaves 0 of 1 patches"):
        run_of(of_task("masked-image", ResolutionWarmup(start=0.1)))
    with pytest.raises(UserError, match="above 0 and at most 1"):
        ResolutionWarmup(start=0.0)
    with pytest.raises(UserError, match="is the whole side"):
        run_of(of_task("classify, images", ResolutionWarmup(start=0.9)))
