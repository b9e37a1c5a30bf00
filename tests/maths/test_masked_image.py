"""Masked images: the loss by hand, what the encoder sees, and runs that pre-train and fine-tune."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pairs import grid
from scrimp.errors import UserError
from scrimp.models.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderConfig
from scrimp.planning import plan
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.tasks.masked_image import MaskedImage, target, visible
from scrimp.training import train
from scrimp.weights import initialize
from tiny import assert_equal, example, flat

SIZE: dict[str, Any] = {"image": 8, "patch": 2, "channels": 1, "layers": 2, "width": 16, "heads": 2}
MAE: dict[str, Any] = {"decoder_layers": 1, "decoder_width": 8, "decoder_heads": 2}


def made(**options: Any) -> MaskedAutoencoder:
    model = MaskedAutoencoderConfig(**{**SIZE, **MAE, **options}).build().double()
    initialize(model, 0)
    return model.eval()


def batch_of(task: MaskedImage, count: int = 3) -> dict[str, Tensor]:
    images = np.random.default_rng(0).normal(size=(count, 1, 8, 8))
    return task.batch({"images": images}, np.arange(count) + 100)


def test_a_mask_is_a_partition_and_a_function_of_the_sample() -> None:
    task = MaskedImage(patch=2)
    batch = batch_of(task)
    assert batch["kept"].shape == (3, 4) and batch["restore"].shape == (3, 16)
    for i in range(3):
        assert sorted(batch["restore"][i].tolist()) == list(range(16))
        # The first four places belong to the kept patches, in their order.
        assert batch["restore"][i][batch["kept"][i]].tolist() == [0, 1, 2, 3]
    again = task.batch({"images": batch["images"].numpy()[1:2]}, np.array([101]))
    assert torch.equal(again["kept"], batch["kept"][1:2]) and torch.equal(again["restore"], batch["restore"][1:2])
    assert len({tuple(row) for row in batch["kept"].tolist()}) == 3
    assert int(task.count(batch)) == 36 and int(task.tokens(batch)) == 3


def test_the_loss_by_hand() -> None:
    square = torch.tensor([[[[1.0, 2.0, 5.0, 5.0], [3.0, 4.0, 5.0, 5.0]]]])
    found = target(square, 2, True)
    # Mean 2.5, unbiased variance 5/3; a patch of one color is all zeros.
    root = (5 / 3 + 1e-6) ** -0.5
    torch.testing.assert_close(found, torch.tensor([[[-1.5, -0.5, 0.5, 1.5], [0, 0, 0, 0]]]) * root)
    task = MaskedImage(patch=1, normalize=False, ratio=0.5)
    values = torch.tensor([[[[2.0, 4.0]], [[1.0, 1.0]]]])  # two channels, one row of two patches
    batch = {"images": values, "kept": torch.tensor([[1]]), "restore": torch.tensor([[1, 0]]), "sample": torch.zeros(1)}
    guess: Any = lambda *inputs: torch.tensor([[[1.0, 4.0], [9.0, 9.0]]])  # noqa: E731
    # Patch 0 is hidden: ((1 - 2)^2 + (4 - 1)^2) / 2 = 5. Patch 1 is visible and does not count.
    assert float(task.loss(guess, batch)) == 5.0
    assert task.evaluate(guess, [batch, batch]) == {"loss": 5.0}


@pytest.mark.parametrize("drop", [True, False])
def test_hidden_pixels_reach_the_loss_only_as_targets(drop: bool) -> None:
    task = MaskedImage(patch=2)
    batch, model = batch_of(task), made(drop=drop)
    pixels = batch["images"].clone().requires_grad_()
    out = model(pixels, batch["kept"], batch["restore"])
    out.sum().backward()
    assert pixels.grad is not None
    used = torch.nn.functional.unfold(pixels.grad.abs(), 2, stride=2).sum(1) > 0  # [B, N]
    assert torch.equal(used, batch["restore"] < 4)


def test_the_gradient_at_visible_patches_is_zero() -> None:
    task = MaskedImage(patch=2)
    batch = batch_of(task)
    values = torch.randn(3, 16, 4, dtype=torch.float64, requires_grad=True)
    given: Any = lambda *inputs: values  # noqa: E731
    task.loss(given, batch).backward()
    assert values.grad is not None
    assert torch.equal(values.grad.abs().sum(2) > 0, batch["restore"] >= 4)


@torch.no_grad()
def test_the_order_of_the_kept_patches_does_not_matter() -> None:
    batch, model = batch_of(MaskedImage(patch=2)), made()
    order = batch["restore"].argsort(1)
    swapped = order[:, [2, 0, 3, 1, *range(4, 16)]]
    a = model(batch["images"], order[:, :4], order.argsort(1))
    b = model(batch["images"], swapped[:, :4], swapped.argsort(1))
    torch.testing.assert_close(a, b)


def test_names_of_the_encoder_are_those_of_vision() -> None:
    from scrimp.models.vision import VisionConfig

    vision = {n: p.shape for n, p in VisionConfig(**SIZE, head="classes", classes=3).build().named_parameters()}
    for drop in (True, False):
        mae = {n: p.shape for n, p in made(drop=drop).named_parameters()}
        shared = {n: shape for n, shape in mae.items() if not n.startswith(MaskedAutoencoderConfig.outer)}
        assert shared == {n: shape for n, shape in vision.items() if not n.startswith("head.")}
        assert ("mask_token.weight" in mae) != drop and ("decoder.mask_token.weight" in mae) == drop


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    datasets = import_module("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, x=(x.reshape(-1, 8, 8) * 15).astype(np.uint8), y=y)
    return {"name": "images", "source": str(path), "holdout": 0.2}


def recipe_of(digits: dict[str, Any], model: dict[str, Any], task: Any, out: Path, **more: Any) -> Recipe:
    settings = {"batch": 16, "duration": "6 step", "log": {"tensorboard": False}, "validate": {"batches": 4}} | more
    rule = technique_class("adamw")(lr=2e-3)  # type: ignore[call-arg]
    return Recipe(model=model, data=digits, task=task, techniques=(rule,), out=str(out), **settings)


TRUNK: dict[str, Any] = {"patch": 2, "layers": 2, "width": 16, "heads": 2}


@pytest.mark.parametrize("drop", [True, False])
def test_plans_to_the_byte(drop: bool, digits: dict[str, Any], tmp_path: Path) -> None:
    model = {"name": "masked_autoencoder", **TRUNK, **MAE, "drop": drop, "dropout": 0.1}
    planned, measured = grid.planned_and_measured(recipe_of(digits, model, "masked-image", tmp_path))
    assert planned == measured > 0


@pytest.mark.parametrize("name", ["lora", "recompute", "clip", "muon", "ema", "autocast", "accumulate"])
def test_techniques_work_on_vision(name: str, digits: dict[str, Any], tmp_path: Path) -> None:
    made = recipe_of(digits, {"name": "vision", **TRUNK}, "classify", tmp_path, duration="2 step")
    kept = made.techniques if "update rule" not in technique_class(name).card.sets else ()
    planned, measured = grid.planned_and_measured(replace(made, techniques=(*kept, example(name))))
    assert planned == measured > 0


def test_pre_training_resumes_bitwise_and_is_planned(digits: dict[str, Any], tmp_path: Path) -> None:
    model = {"name": "masked_autoencoder", **TRUNK, **MAE, "dropout": 0.1, "positions": "sincos"}
    made = recipe_of(digits | {"crop": 1, "flip": True}, model, "masked-image", tmp_path,
                     checkpoint={"every": "2 step", "keep": 9}, name="whole")  # fmt: skip
    whole = train(made)
    wanted = flat(whole.run.state())
    assert torch.equal(wanted["model/positions.weight"][0], torch.zeros(16))
    resumed = train(resume=tmp_path / "whole/checkpoints/step-000000002")
    assert_equal(wanted, flat(resumed.run.state()))
    planned = plan(made)
    assert planned.stages[0].steps == 6 and planned.stages[0].tokens == 16
    assert planned.live > 0


def test_the_encoder_is_fine_tuned_and_the_decoder_stays_behind(digits: dict[str, Any], tmp_path: Path) -> None:
    before = train(recipe_of(digits, {"name": "masked_autoencoder", **TRUNK, **MAE}, "masked-image", tmp_path))
    assert before.folder is not None
    made = recipe_of(digits, {"name": "vision", **TRUNK}, "classify", tmp_path, duration="1 step")
    from scrimp.restore import starting_weights
    from scrimp.run import build
    from scrimp.stages import new_clock

    data = made.data.open()
    source = starting_weights(made, data, str(before.folder))
    assert source is not None and not any(name.startswith(("decoder.", "mask_token.")) for name in source["model"])
    run = build(made, data, new_clock(made, data), source=source)
    trained, taken = flat(before.run.state()), flat(run.state())
    body = [name for name in taken if not name.startswith("model/head.") and name.startswith("model/")]
    assert len(body) > 20 and all(torch.equal(trained[name], taken[name]) for name in body)
    notes: list[str] = []
    after = train(made, start=before.folder, observe=lambda event, said: notes.append(said["text"])
                  if event == "note" else None)  # fmt: skip
    assert "Note: head begins anew: the weights have none that fit." in notes
    assert 0 <= after.validation["accuracy"] <= 1


def test_digits_are_learned(digits: dict[str, Any], tmp_path: Path) -> None:
    model = {"name": "vision", **TRUNK, "width": 64, "heads": 4, "pooling": "mean", "init_std": 0.1}
    made = recipe_of(digits, model, "classify", tmp_path, duration="60 step", batch=64)
    result = train(made, save=False)
    assert result.validation["accuracy"] > 0.6  # chance is 0.1


@pytest.mark.parametrize(
    ("model", "task", "said"),
    [
        ({"name": "vision", **TRUNK}, "masked-image", "needs a model that predicts patches"),
        ({"name": "masked_autoencoder", **TRUNK, **MAE}, "classify", "needs a model with a head `classes`"),
        ({"name": "masked_autoencoder", **TRUNK, **MAE}, {"name": "masked-image", "patch": 4}, "patch is 4, the model"),
        ({"name": "masked_autoencoder", **TRUNK, **MAE}, {"name": "masked-image", "ratio": 0.99}, "leaves 0 of 16"),
        ({"name": "vision", **TRUNK, "classes": 7}, "classify", "the data's classes is 10, the model's 7"),
        ({"name": "vision", **TRUNK, "patch": 3}, "classify", "images of 8 pixels cannot be cut"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    model: dict[str, Any], task: Any, said: str, digits: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        train(recipe_of(digits, model, task, tmp_path), save=False)
    assert said in str(error.value)


def test_how_many_patches_are_visible() -> None:
    assert [visible(196, 0.75), visible(49, 0.75), visible(49, 0.5)] == [49, 12, 24]
    with pytest.raises(UserError, match="ratio must be between 0 and 1"):
        MaskedImage(ratio=1.0)
