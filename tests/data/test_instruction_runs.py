"""A run on instructions: it plans, trains, resumes bitwise, answers, and exports its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scrimp.data.chat import open_tokenizer
from scrimp.inference import continue_text, evaluate, export
from scrimp.planning import plan
from scrimp.recipe import Recipe
from scrimp.training import train
from tiny import assert_equal, flat

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("SCRIMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {i} + {i}?", "response": f"{2 * i}."} for i in range(60)]
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("words").mkdir()
    words = open_tokenizer("bytes")
    words.inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    words.inner.save("words/tokenizer.json")
    Path("words/tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|im_end|>"}))
    return {
        "model": {"layers": 2, "width": 32, "heads": 2, "norm": "rmsnorm", "positions": "rotary", "bias": False,
                  "activation": "swiglu"},
        "data": {"name": "instructions", "source": "t.jsonl", "tokenizer": "words", "context": 128, "holdout": 0.2},
        "techniques": {"adamw": {"lr": 1e-2}}, "batch": 2, "duration": "8 step", "name": "r",
        "checkpoint": {"every": "4 step", "keep": 9}, "log": {"tensorboard": False}, "sample": {"tokens": 4},
    }  # fmt: skip


def test_it_trains_resumes_and_is_used_without_its_table(made: dict[str, Any], tmp_path: Path) -> None:
    whole = train(Recipe.read(made))
    assert whole.folder is not None
    assert whole.validation["loss"] < 5
    resumed = train(resume=whole.folder / "checkpoints/step-000000004")
    assert_equal(flat(whole.run.state()), flat(resumed.run.state()))
    assert evaluate(whole.folder)["loss"] > 0
    Path("t.jsonl").unlink()
    said = continue_text(whole.folder, "What is 3 + 3?", 4, 0.0, 0)
    assert said.startswith("<|im_start|>user\nWhat is 3 + 3?")
    export(whole.folder, "out")
    assert Path("out/chat_template.jinja").read_text() == CHATML
    assert json.loads(Path("out/config.json").read_text())["eos_token_id"] == 258
    assert open_tokenizer("out").prompted("Hi") == open_tokenizer("words").prompted("Hi")


def test_plans_of_a_table_that_is_not_read_yet_are_those_of_one_that_is(made: dict[str, Any]) -> None:
    recipe = Recipe.read(made)
    before = plan(recipe)
    recipe.data.open()
    after = plan(recipe)
    assert "not built yet" in " ".join(before.notes)
    assert before.live == after.live > 0


def test_padding_and_packing_learn_the_same_answers(made: dict[str, Any]) -> None:
    found: list[int] = []
    for pack in (True, False):
        data = Recipe.read({**made, "data": {**made["data"], "pack": pack}}).data.open()
        items = data.train.read(np.arange(len(data.train)))
        found.append(int((items["targets"] != -100).sum()))
        if not pack:
            assert len(data.train) == data.meta["documents"]["train"]
    assert found[0] == found[1] > 0
