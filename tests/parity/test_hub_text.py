"""The exported folder continues a prompt as the run itself does, and is no other tokenizer when it is read again."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from scrimp.data.text import Data, TextData
from scrimp.data.tokenizer import END
from scrimp.inference import continue_text, export
from scrimp.training import train
from tiny import MODEL, example, recipe

transformers: Any = import_module("transformers")
LLAMA = {**MODEL, "norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False}


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    (folder / "text").mkdir(exist_ok=True)
    for i in range(20):
        (folder / f"text/{i}.txt").write_text(f"item {i} is {i * i} " * 60)
    return {"source": str(folder / "text"), "context": 32, "holdout": 0.3, **more}


@pytest.fixture(scope="module", params=[("bpe", MODEL), ("bytes", LLAMA)], ids=["bpe-gpt2", "bytes-llama"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its export."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer, model = request.param
    data = settings(folder, tokenizer=tokenizer, vocab=300)
    rule = example("adamw", lr=3e-3)
    train(recipe(rule, data=data, model=model, duration="40 step", out=str(folder), name="run", sample={"tokens": 0}))
    export(folder / "run", folder / "hf")
    return folder


@pytest.mark.parametrize("prompt", ["", "item 3", "is", f"item 3{END}"])
def test_greedy_text_equals_that_of_transformers(place: Path, prompt: str) -> None:
    read = transformers.AutoTokenizer.from_pretrained(place / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "hf")
    given = read(prompt, return_tensors="pt")
    out = model.generate(**given, max_new_tokens=20, do_sample=False)[0].tolist()
    text = read.decode([i for i in out if i != read.eos_token_id])
    assert text == continue_text(place / "run", prompt, 20, 0.0, 0)


def test_the_exported_tokenizer_gives_documents_the_same_tokens(place: Path) -> None:
    def tokens(tokenizer: str) -> list[bytes]:
        data: Data = TextData(**settings(place, tokenizer=tokenizer, vocab=300)).open()
        return [split.path.read_bytes() for split in (data.train, data.validation)]

    own = "bytes" if "bytes" in (place / "run/recipe.yaml").read_text() else "bpe"
    assert tokens(str(place / "hf")) == tokens(own)


def test_exporting_with_an_exported_tokenizer_adds_nothing_more(place: Path, tmp_path: Path) -> None:
    data = settings(place, tokenizer=str(place / "hf"))
    train(recipe(data=data, duration="1 step", out=str(tmp_path), name="run", sample={"tokens": 0}))
    export(tmp_path / "run", tmp_path / "hf")
    once, twice = (transformers.AutoTokenizer.from_pretrained(f / "hf") for f in (place, tmp_path))
    assert once("item 3")["input_ids"] == twice("item 3")["input_ids"]
    assert once("item 3")["input_ids"].count(once.bos_token_id) == 1
