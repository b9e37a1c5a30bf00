"""Models, tasks and data that do not belong together are refused before anything is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scrimp.errors import UserError
from scrimp.inference import evaluate
from scrimp.models.transformer import TransformerConfig
from scrimp.recipe import Recipe
from scrimp.training import train
from scrimp.weights import initialize
from tiny_tasks import TINY, tried

TRUNK = {"layers": 1, "width": 8, "heads": 2}
VISION = {"name": "vision", "patch": 4, **TRUNK}


@pytest.mark.parametrize(
    ("entry", "model", "said"),
    [
        ("classify, images", {**TRUNK, "causal": False}, "reads none of what the data"),
        ("classify", VISION, "reads none of what the data"),
        ("regress", VISION, "reads none of what the data"),
        ("masked-lm", VISION, "reads none of what the data"),
        ("masked-image", {"name": "encoder_decoder", **TRUNK}, "reads none of what the data"),
        ("causal-lm", {**TRUNK, "causal": False}, "which this model sees"),
    ],
)
def test_a_model_that_cannot_do_the_task_is_refused(
    entry: str, model: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TINY, entry, replace(TINY[entry], model=model, name=TINY[entry].name or entry))
    found = tried(entry)
    assert found["verdict"] == "refused" and said in found["reason"], found


def test_a_causal_classifier_sees_the_whole_text() -> None:
    """Its first token would say nothing of the others."""
    model = TransformerConfig(**TRUNK, vocab=9, context=8, head="classes", classes=2, init_std=0.5).build()
    initialize(model, 0)
    tokens, attended = torch.tensor([[1, 2, 3, 4], [1, 5, 6, 0]]), torch.tensor([[True] * 4, [True] * 3 + [False]])
    both = model(tokens, attended=attended)
    assert not torch.allclose(both[0], both[1])
    torch.testing.assert_close(both[1], model(tokens[1:, :3])[0])


def test_other_images_are_seen_as_the_run_saw_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held out of all there is or alone in a file, darker and of fewer classes: the same numbers and classes."""
    monkeypatch.setenv("SCRIMP_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (24, 8, 8), dtype=np.uint8), np.array(["a", "b", "c"])[np.arange(24) % 3]
    dark = y != "a"
    x[dark] //= 4
    np.savez(tmp_path / "train.npz", x=x, y=y)
    np.savez(tmp_path / "held.npz", x=x[dark], y=y[dark])
    data = {"name": "images", "source": str(tmp_path / "train.npz"), "validation": str(tmp_path / "held.npz")}
    given = {"model": VISION, "task": "classify", "data": data, "batch": 5, "steps": 2, "out": str(tmp_path / "run"),
             "techniques": {"adamw": {"lr": 1e-2}}}  # fmt: skip
    run = train(Recipe.read(given)).folder
    own = evaluate(run)
    other = evaluate(run, data=[str(tmp_path / "held.npz")])
    assert other == pytest.approx(own, rel=1e-5)
    np.savez(tmp_path / "strange.npz", x=x, y=np.char.add(y, "z"))
    with pytest.raises(UserError, match="does not have"):
        evaluate(run, data=[str(tmp_path / "strange.npz")])
