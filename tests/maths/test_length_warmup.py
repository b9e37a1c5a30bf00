"""Sequence-length warm-up: lengths worked out by hand, what is cut off, and what the clock counts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from scrimp.clock import Clock, Duration
from scrimp.errors import UserError
from scrimp.recipe import Recipe
from scrimp.run import Run
from scrimp.techniques.incremental.length_warmup import LengthWarmup
from scrimp.training import train
from tiny import TinyData, assert_equal, flat, recipe, run_of


def lengths_of(made: Recipe) -> tuple[dict[int, int], Clock]:
    """position at which a stage begins -> its length, and the clock at the end."""
    lengths: dict[int, int] = {}

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            run: Run = fields["run"]
            shapes = {run.batch(step)["tokens"].shape for step in (0, 3)}
            assert len(shapes) == 1, "the shape is constant within a stage"
            lengths[run.clock.position] = shapes.pop()[1]

    return lengths, train(made, save=False, observe=see).run.clock


@pytest.mark.parametrize(
    ("settings", "context", "lengths"),
    [
        # A quarter, a half, three quarters, the whole.
        ({"start": 0.25, "until": 0.75, "levels": 3}, 64, {0: 16, 2: 32, 4: 48, 6: 64}),
        # 0.3 of 40 is 12, and 0.65 of it 26: rounded up to multiples of 8.
        ({"start": 0.3, "until": 0.5, "levels": 2}, 40, {0: 16, 2: 32, 4: 40}),
        ({"start": 0.3, "until": 0.5, "levels": 2, "multiple": 1}, 40, {0: 12, 2: 26, 4: 40}),
        # 20 is no multiple of 8: the last length is the context all the same.
        ({"start": 0.9, "until": "4 step", "levels": 1}, 20, {0: 20, 4: 20}),
        ({"start": 1.0}, 16, {0: 16}),
    ],
)
def test_lengths_by_hand(settings: dict[str, Any], context: int, lengths: dict[int, int]) -> None:
    data = TinyData(context=context)
    found, clock = lengths_of(recipe(LengthWarmup(**settings), data=data))
    assert found == lengths
    assert clock.cuts == [position for position in lengths if position]
    ends = [*list(lengths)[1:], 8]
    steps = [end - begin for begin, end in zip(lengths, ends, strict=True)]
    assert clock.tok == 4 * sum(n * length for n, length in zip(steps, lengths.values(), strict=True))


def test_a_run_measured_in_tokens_grows_by_tokens() -> None:
    # 4 samples of 16 tokens a step; at half length a step holds 32.
    half = {"start": 0.5, "levels": 1}
    found, clock = lengths_of(recipe(LengthWarmup(until=0.5, **half), duration="512 tok"))
    assert found == {0: 8, 256: 16}
    assert (clock.step, clock.tok) == (256 // 32 + 256 // 64, 512)
    found, _ = lengths_of(recipe(LengthWarmup(until="128 tok", **half), duration="512 tok"))
    assert found == {0: 8, 128: 16}
    # Two steps are 128 tokens at the full length.
    found, _ = lengths_of(recipe(LengthWarmup(until="2 step", **half), duration="512 tok"))
    assert found == {0: 8, 128: 16}


def test_points_lie_at_equal_parts() -> None:
    points = [Duration.parse(p) for p in LengthWarmup(until="9 step", levels=3).stages()]
    assert points == [Duration(3, "step"), Duration(6, "step"), Duration(9, "step")]
    assert LengthWarmup(until=0.3, levels=2).stages() == (0.15, 0.3)
    assert LengthWarmup(start=1.0).stages() == ()


def test_a_short_batch_is_the_beginning_of_the_long_one() -> None:
    made = recipe(LengthWarmup(start=0.5, levels=1), dtype="float64", model={"layers": 1, "width": 16, "heads": 2})
    short = run_of(made)
    whole = run_of(replace(made, techniques=made.techniques[1:]))
    batch, full = short.batch(3), whole.batch(3)
    assert batch.keys() == full.keys()
    for name in ("tokens", "targets"):
        assert torch.equal(batch[name], full[name][:, :8])
        assert batch[name].is_contiguous()
    assert torch.equal(batch["sample"], full["sample"])
    assert int(short.task.count(batch)) == 4 * 8
    # What comes later changes no causal prediction: the loss is that of the first positions.
    assert short.loss
    with torch.no_grad():
        logits = whole.model(full["tokens"])[:, :8]
        expected = F.cross_entropy(logits.flatten(0, 1), full["targets"][:, :8].flatten(), reduction="sum")
        assert float(short.loss(short.model, batch)) == pytest.approx(float(expected), rel=1e-12)


def test_validation_has_the_full_length() -> None:
    runs: list[Run] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            runs.append(fields["run"])

    settings: dict[str, Any] = {"validate": {"every": "1 step", "batches": 2}, "duration": "4 step"}
    warm = train(recipe(LengthWarmup(start=0.5, until=1.0, levels=1), **settings), save=False, observe=see)
    model = runs[0].model
    assert runs[0].batch(0)["tokens"].shape == (4, 8)
    ids = np.arange(8)
    held = warm.run.task.batch(warm.run.data.validation.read(ids), ids)
    model.eval()
    with torch.no_grad():
        loss = float(model(held["tokens"], held["targets"])) / held["targets"].numel()
    assert warm.validation["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_whole_context_at_once_changes_nothing() -> None:
    warmup = LengthWarmup(start=1.0)
    run = run_of(recipe(warmup))
    assert warmup.batch(run.batch, run) is run.batch


def test_an_extension_moves_no_length(tmp_path: Path) -> None:
    warmup = LengthWarmup(start=0.5, until=0.5, levels=1)
    made = recipe(warmup, out=str(tmp_path), name="a", checkpoint={"every": "1 step", "keep": 99})
    whole = train(made, data=TinyData().open())
    for cut in (2, 4, 6):
        copy = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "a", copy)
        raw = yaml.safe_load((copy / "recipe.yaml").read_text())
        (copy / "recipe.yaml").write_text(yaml.safe_dump(raw | {"data": "text"}))
        saved = copy / f"checkpoints/step-{cut:09d}"
        longer = train(resume=saved, extend="2 step", data=TinyData().open())
        assert (longer.run.clock.step, longer.run.clock.cuts) == (10, [4])
        assert longer.run.clock.tok == whole.run.clock.tok + 2 * 4 * 16
        again = train(resume=copy / f"checkpoints/step-{cut + 1:09d}", data=TinyData().open())
        assert_equal(flat(longer.run.state()), flat(again.run.state()))


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings in ({"start": 0.0}, {"start": 1.5}, {"levels": 0}, {"multiple": 0}, {"until": "soon"}):
        with pytest.raises(UserError):
            LengthWarmup(**settings)  # type: ignore[arg-type]


def test_data_without_sequences_is_refused() -> None:
    run = run_of(recipe())
    run.data = SimpleNamespace(train=SimpleNamespace())
    with pytest.raises(UserError, match="no sequences to shorten"):
        LengthWarmup().batch(run.batch, run)
