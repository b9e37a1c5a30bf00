"""Tasks over pairs go through the one loop: they resume bitwise, plan to the byte, and their folders come back."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from scrimp.inference import continue_text, evaluate, export
from scrimp.meter import LiveBytes
from scrimp.planning import plan
from scrimp.recipe import Recipe
from scrimp.run import Run, build
from scrimp.stages import new_clock
from scrimp.training import train
from tiny import assert_equal, flat

BART = {"preset": "bart-1m", "width": 32, "dropout": 0.1}
CLIP = {"preset": "clip-1m", "width": 32, "dropout": 0.1, "projection": 16}
SHARED = {"batch": 4, "duration": "6 step", "log": {"tensorboard": False}, "techniques": {"adamw": {"lr": 0.01}},
          "checkpoint": {"every": "4 step", "keep": 99}, "validate": {"every": "3 step", "batches": 2},
          "sample": {"prompt": "number 3", "tokens": 4}}  # fmt: skip
CASES = ("seq2seq", "denoise", "contrastive")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of pairs, with pictures."""
    folder = tmp_path_factory.mktemp("pairs")
    lines: list[str] = []
    image: Any = import_module("PIL.Image")
    for i in range(60):
        colors = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image.fromarray(colors).resize((18, 18)).save(folder / f"{i}.png")
        pair = {"source": f"number {i} and more", "target": f"{i * i} is its square" + "." * (i % 9)}
        lines.append(json.dumps(pair | {"image": f"{i}.png", "text": f"picture {i}", "class": f"kind {i % 3}"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


def recipe(case: str, place: Path, out: Path, **changes: Any) -> Recipe:
    """A tiny run of a case."""
    source = {"source": str(place / "pairs.jsonl"), "tokenizer": "bytes", "holdout": 0.2}
    text = source | {"name": "text", "field": "source", "context": 24}
    parts: dict[str, Any] = {
        "seq2seq": {"model": BART, "task": "seq2seq", "data": source | {"name": "parallel", "context": 40}},
        "denoise": {"model": BART, "task": "denoise", "data": text},
        "t5": {"model": BART, "task": {"name": "denoise", "style": "t5"}, "data": text},
        "contrastive": {"model": CLIP, "task": "contrastive",
                        "data": source | {"name": "image_text", "image": 16, "context": 16}},
    }  # fmt: skip
    return Recipe.read({**SHARED, **parts[case], "out": str(out), "name": case, **changes})


@pytest.mark.parametrize("case", CASES)
def test_resumes_bitwise(case: str, place: Path, tmp_path: Path) -> None:
    whole = train(recipe(case, place, tmp_path), force=True)
    shutil.copytree(tmp_path / case, tmp_path / "copy")
    resumed = train(resume=tmp_path / "copy/checkpoints/step-000000004", force=True)
    assert_equal(flat(whole.run.state()), flat(resumed.run.state()))
    assert resumed.validation == whole.validation and resumed.text == whole.text


@pytest.mark.parametrize("case", [*CASES, "t5"])
def test_plans_on_fake_tensors_to_the_byte(case: str, place: Path, tmp_path: Path) -> None:
    made = recipe(case, place, tmp_path)
    real = built(made)
    batch = real.batch(0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = built(made)
        planned = peak(fake, {name: mode.from_tensor(t) for name, t in batch.items()})
    assert planned == peak(real, batch) > 0
    assert plan(made).live > 0


def built(made: Recipe) -> Run:
    data = made.data.open()
    return build(made, data, new_clock(made, data))


def peak(run: Run, batch: dict[str, Any]) -> int:
    """Live bytes at the highest point of a step."""
    assert run.backward and run.step
    count = run.task.count(batch)
    run.set_lr()
    with LiveBytes() as meter:
        run.backward(batch, count)
        run.step()
    return meter.peak


@pytest.mark.parametrize("case", CASES)
def test_a_folder_holds_what_was_trained(case: str, place: Path, tmp_path: Path) -> None:
    made = recipe(case, place, tmp_path)
    trained = train(made, force=True)
    assert trained.folder is not None
    export(trained.folder, tmp_path / "folder")
    again = recipe(case, place, tmp_path, model={"from": str(tmp_path / "folder")}, name="again", duration="1 step",
                   techniques={"sgd": {"lr": 0.0}})  # fmt: skip
    assert type(again.model) is type(made.model)
    assert train(again, force=True).validation == pytest.approx(trained.validation, abs=1e-6)


def test_what_is_written_needs_no_corpus(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "moved")
    trained = train(recipe("seq2seq", tmp_path / "moved", tmp_path), force=True)
    assert trained.folder is not None
    assert set(evaluate(trained.folder)) == {"loss", "perplexity", "accuracy"}
    shutil.rmtree(tmp_path / "moved")
    text = continue_text(trained.folder, "number 3", 6, 0.0, 0)
    assert isinstance(text, str) and "number 3" not in text


def test_an_encoder_decoder_learns_pairs(place: Path, tmp_path: Path) -> None:
    """Squares cannot be guessed for held-out numbers; the words around them can."""
    model = {"preset": "bart-1m", "layers": 1, "width": 32}
    made = recipe("seq2seq", place, tmp_path, model=model, duration="60 step", checkpoint={"every": 0})
    begun = built(made)
    data = begun.data
    ids = np.arange(len(data.validation))
    before = begun.task.evaluate(begun.model.eval(), [begun.task.batch(data.validation.read(ids), ids)])
    after = train(made, data=data, save=False).validation
    assert after["loss"] < 0.5 * before["loss"] and after["accuracy"] > 0.5
