"""The code blocks of the documentation run, and its recipes are valid."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from scrimp.models.hub import write
from scrimp.models.transformer import TransformerConfig
from scrimp.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (page.name, i, language, code)
    for page in PAGES
    for i, (language, code) in enumerate(re.findall(r"```(python|yaml)\n(.*?)```", page.read_text(), re.DOTALL))
]
FOLDERS = {
    "minilm": {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "num_hidden_layers": 6,
               "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
}  # fmt: skip
"""Folders that shipped recipes start from -> what their config.json says at least."""


@pytest.mark.parametrize(("page", "i", "code"), [(p, i, c) for p, i, kind, c in BLOCKS if kind == "python"])
def test_python_runs(page: str, i: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{page}:{i}", "exec", dont_inherit=True), {"__name__": f"docs_{i}"})


@pytest.mark.parametrize(("page", "i", "code"), [(p, i, c) for p, i, kind, c in BLOCKS if kind == "yaml"])
def test_recipes_are_valid(page: str, i: int, code: str) -> None:
    raw = yaml.safe_load(code.replace("1e-", "1.0e-"))
    if "model" in raw or "techniques" in raw:
        Recipe.read({"techniques": {"adamw": {}}} | raw)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = yaml.safe_load(path.read_text())["model"]
    if isinstance(model, dict) and "from" in model:  # a small folder in place of the one that the recipe asks for
        if model["from"] in FOLDERS:
            (tmp_path / model["from"]).mkdir()
            (tmp_path / model["from"] / "config.json").write_text(json.dumps(FOLDERS[model["from"]]))
        else:
            config = TransformerConfig(layers=1, width=8, heads=2, vocab=9, context=8)
            write(model["from"], config, dict(config.build().named_parameters()))
    Recipe.load(path)
