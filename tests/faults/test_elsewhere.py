"""A run is used from another working directory, and its model without the corpus."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from scrimp.data.text import TextData
from scrimp.data.tokenizer import bytes_tokenizer
from scrimp.errors import UserError
from scrimp.inference import continue_text, evaluate, export
from scrimp.recipe import Recipe
from scrimp.training import train
from tiny import example, recipe


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with text and a tokenizer."""
    (tmp_path / "home/text").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    for i in range(20):
        Path(f"text/{i}.txt").write_text(f"item {i} " * 60)
    bytes_tokenizer().save(Path())
    return tmp_path / "home"


def made(*techniques: Any, **settings: Any) -> Recipe:
    data = {"source": "text/*.txt", "tokenizer": "tokenizer.json", "cache": "cache", "context": 16, "holdout": 0.3}
    settings.setdefault("name", "r")
    return recipe(*techniques, data=data | settings.pop("data", {}), out="runs", **settings)


@pytest.mark.parametrize("source", ["text", "text/*.txt", "text/../text"])
def test_a_run_is_used_from_another_folder(home: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    first = train(made(data={"source": source}))
    export("runs/r", "hf")
    kept = {"adapter_only": True}
    train(made(example("lora"), model={"from": "hf"}, name="on-a-folder", checkpoint=kept))
    train(made(example("lora"), name="on-a-run", checkpoint=kept), start="runs/r")
    (home.parent / "away").mkdir()
    monkeypatch.chdir(home.parent / "away")
    for name in ("on-a-folder", "on-a-run", "r"):
        run = Path(f"../home/runs/{name}")
        assert evaluate(run, 8)["loss"] > 0
        assert continue_text(run, "item", 4, 0.0, 0)
        export(run, f"hf-{name}")
        assert train(resume=run, extend="2 step").run.clock.step == first.run.clock.step + 2
    assert sorted(p.name for p in Path().iterdir()) == ["hf-on-a-folder", "hf-on-a-run", "hf-r"]


def test_generating_and_exporting_need_no_corpus(home: Path) -> None:
    train(made(sample={"tokens": 0}))
    text = continue_text("runs/r", "item", 8, 0.0, 0)
    export("runs/r", "with")
    for gone in ("text", "cache", "tokenizer.json"):
        (shutil.rmtree if Path(gone).is_dir() else Path.unlink)(Path(gone))
    assert continue_text("runs/r", "item", 8, 0.0, 0) == text
    export("runs/r", "without")
    for file in Path("with").iterdir():
        assert file.read_bytes() == Path("without", file.name).read_bytes(), file.name


def test_a_corpus_that_is_gone_is_named(home: Path) -> None:
    train(made())
    shutil.rmtree("text")
    for use in (lambda: evaluate("runs/r"), lambda: train(resume="runs/r", extend="2 step")):
        with pytest.raises(UserError) as error:
            use()
        assert f"data.source: the corpus at {home}/text/*.txt is gone" in str(error.value)


def test_what_is_no_path_stays(home: Path) -> None:
    for data in (TextData(), TextData(source="nowhere/*.txt"), TextData(tokenizer="bytes")):
        assert data.anchored() == data
    shown = TextData(source="text", tokenizer="tokenizer.json", cache="~/c").anchored()
    assert (shown.source, shown.tokenizer) == (f"{home}/text", f"{home}/tokenizer.json")
    assert shown.cache == str(Path.home() / "c")
