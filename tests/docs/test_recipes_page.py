"""What docs/recipes.md says about words, units, patterns and checkpoints is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import scrimp
from scrimp.clock import UNITS, Clock, Duration
from scrimp.errors import RecipeError
from scrimp.inference import evaluate
from scrimp.models.seams import matching
from scrimp.recipe import Recipe
from scrimp.restore import starting_weights

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
RAW: dict[str, Any] = {"model": {"layers": 2}, "duration": "9 tok", "techniques": {"adamw": {"eps": 1e-6}}}


def column(title: str) -> list[str]:
    """What stands in backticks in the first column of a table."""
    rows = PAGE.split(f"## {title}")[1].split("\n## ")[0].splitlines()
    return [
        word.strip('"')
        for row in rows
        if row.startswith("| `")
        for word in re.findall("`([^`]*)`", row.split(" | ")[0])
    ]


def test_the_words_of_the_command_line_do_what_the_page_says() -> None:
    words = column("On the command line")
    assert len(words) >= 9
    for word in words:
        if word == "adamw=off":
            with pytest.raises(RecipeError, match="no technique sets the update rule"):
                Recipe.read(RAW, [word])
        elif "from:" in word:
            with pytest.raises(RecipeError, match=r"model.from \(folder\)"):
                Recipe.read(RAW, [word])
        else:
            Recipe.read(RAW, ["adamw=off", word] if "lion" in word else [word])
    changed = Recipe.read(RAW, ["adamw.lr=1", "model=gpt-10m", "steps=5", "clip.norm=3", "steps=200"])
    assert (changed.model.layers, changed.model.width, changed.duration) == (2, 384, "200 step")
    assert scrimp.AdamW(lr=1.0, eps=1e-6) in changed.techniques
    reset = Recipe.read(RAW, ["adamw=on", "groups={'embed.*': {lr: 0.5}}"])
    assert reset.techniques == (scrimp.AdamW(),)
    assert reset.groups["embed.*"].lr == 0.5


def test_every_unit_is_explained() -> None:
    text = " ".join(column("Durations"))
    assert all(re.search(rf"\b{unit}\b", text) for unit in UNITS)
    clock = Clock.plan(Duration.parse("1000 step"), batch=4, tokens=8, items=400)
    assert [clock.at(d) for d in (0.25, 1, 2, 100, "320 tok", "40 sample", "2 epoch")] == [
        250,
        1000,
        2,
        100,
        10,
        10,
        200,
    ]


def test_patterns_match_what_the_page_says() -> None:
    names = [f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("mlp.up", "attention.qkv")] + ["head.weight"]
    layers = [name.removesuffix(".weight") for name in names]
    assert matching("blocks.*", names, "") == names[:4]
    assert matching("mlp.up", layers, "") == ["blocks.0.mlp.up", "blocks.1.mlp.up"]
    assert matching("attention.*|mlp.up", layers, "") == layers[:4]
    assert matching("blocks.[01].mlp.?p", layers, "") == ["blocks.0.mlp.up", "blocks.1.mlp.up"]
    assert matching("mlp.up.*", names, "") == [names[0], names[2]]
    with pytest.raises(scrimp.UserError):
        matching("mlp.up", names, "parameter")


def test_the_best_checkpoint_is_a_place_like_a_run(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three\n\n" * 900)
    data = {"source": str(tmp_path / "text.txt"), "tokenizer": "bytes", "context": 16, "holdout": 0.3}
    made = Recipe(model={"layers": 1, "width": 16, "heads": 2}, data=data, batch=2, duration="4 step",
                  techniques=(scrimp.SGD(lr=0.1),), log={"tensorboard": False}, sample={"tokens": 0},  # type: ignore[arg-type]
                  checkpoint={"best": True}, validate={"every": "1 step", "batches": 2}, out=str(tmp_path), name="r")  # type: ignore[arg-type]  # fmt: skip
    result = scrimp.train(made)
    assert result.folder is not None
    best = result.folder / "checkpoints" / "best"
    assert evaluate(best)["loss"] > 0
    weights = starting_weights(made, made.data.open(), str(best))
    assert weights is not None
    assert "embed.weight" in weights["model"]
