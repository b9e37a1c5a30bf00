"""Techniques, models, tasks and data sets of somebody's own package join by entry points."""

from __future__ import annotations

import json
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

CODE = '''
"""Half the loss. Saves: nothing. Costs: nothing. Not for: anyone."""
from dataclasses import dataclass
from torch import nn
import numpy as np
from scrimp.technique import Card, Technique
from scrimp.tasks.causal_lm import CausalLM

@dataclass(frozen=True, kw_only=True)
class Half(Technique):
    card = Card(paper="none", section="Optimization", saves="nothing", costs="nothing")
    factor: float = 0.5
    """Of the loss."""
    def loss(self, loss, run):
        return lambda model, batch: loss(model, batch) * self.factor

@dataclass(frozen=True)
class Bigram:
    vocab: int = 0
    def build(self):
        return Table(self.vocab)

class Table(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.table = nn.Embedding(vocab, vocab)
    def forward(self, tokens, targets=None, sample=None, smoothing=0.0):
        logits = self.table(tokens)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

@dataclass(frozen=True)
class MyTask(CausalLM):
    pass
'''
POINTS = """
[scrimp.techniques]
half = mine:Half
[scrimp.models]
bigram = mine:Bigram
[scrimp.tasks]
my-task = mine:MyTask
"""


@pytest.fixture
def package(tmp_path: Path) -> dict[str, str]:
    """An installed package, as pip would leave it."""
    (tmp_path / "mine.py").write_text(CODE)
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


def scrimp(env: dict[str, str], *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "scrimp", *words], env=env, cwd=cwd, capture_output=True, text=True)


def test_a_technique_of_others_is_listed_and_shown(package: dict[str, str]) -> None:
    listed = {t["name"]: t for t in json.loads(scrimp(package, "list", "--json").stdout)}
    assert listed["half"]["settings"]["factor"]["default"] == 0.5
    assert listed["half"]["module"] == "mine"
    shown = scrimp(package, "show", "half").stdout
    assert "Half the loss" in shown
    assert "factor: float = 0.5\n      Of the loss.\n" in shown


def test_settings_of_a_base_and_a_package_without_source_are_shown(package: dict[str, str], tmp_path: Path) -> None:
    with (tmp_path / "mine.py").open("a") as file:
        file.write(
            '@dataclass(frozen=True, kw_only=True)\nclass Heir(Half):\n    more: int = 2\n    """Of its own."""\n'
        )
    (tmp_path / "mine-1.0.dist-info/entry_points.txt").write_text(POINTS.replace("mine:Half", "mine:Heir"))
    shown = scrimp(package, "show", "half").stdout
    assert "factor: float = 0.5\n      Of the loss.\n" in shown
    assert "more: int = 2\n      Of its own.\n" in shown
    py_compile.compile(str(tmp_path / "mine.py"), cfile=str(tmp_path / "mine.pyc"))
    (tmp_path / "mine.py").unlink()
    shown = scrimp(package, "show", "half").stdout
    assert "factor: float = 0.5" in shown


BAD = {
    "absent": ("absent_module:Half", "cannot be loaded: ModuleNotFoundError: No module named 'absent_module'."),
    "misspelt": ("mine:Hafl", "cannot be loaded: AttributeError: module 'mine' has no attribute 'Hafl'."),
    "no-class": ("mine", "does not name a class that derives from scrimp.Technique."),
    "other-class": ("mine:Bigram", "does not name a class that derives from scrimp.Technique."),
    "cardless": ("mine:Cardless", "names a class without a card."),
    "lion": ("mine:Half", "two techniques are called `lion`: this one and `scrimp.techniques.optimizers.lion`."),
}


def test_broken_techniques_of_others_are_told_and_the_rest_is_listed(package: dict[str, str], tmp_path: Path) -> None:
    lines = "".join(f"{name} = {value}\n" for name, (value, _) in BAD.items())
    (tmp_path / "mine-1.0.dist-info/entry_points.txt").write_text(POINTS + "[scrimp.techniques]\n" + lines)
    (tmp_path / "mine.py").write_text(CODE + "class Cardless(Technique):\n    pass\n")
    listed = scrimp(package, "list", "--json")
    names = {t["name"] for t in json.loads(listed.stdout)}
    assert {"half", "lion", "adamw"} <= names
    assert not names & (BAD.keys() - {"lion"})
    (tmp_path / "r.yaml").write_text("data: {tokenizer: bytes}\ntechniques: {sgd: {}}\n")
    for name, (value, words) in BAD.items():
        told = f"entry point `{name} = {value}` of mine 1.0: {words} Ask its authors to "
        assert told in listed.stderr
        shown = scrimp(package, "show", name)
        assert shown.returncode == 2
        assert shown.stderr.startswith(f"scrimp: {told}")
    used = scrimp(package, "train", "r.yaml", "no-class=on", cwd=tmp_path)
    assert used.returncode == 2
    assert BAD["no-class"][1] in used.stderr
    assert scrimp(package, "show", "adamw").returncode == 0


def test_broken_parts_of_others_are_told(package: dict[str, str], tmp_path: Path) -> None:
    points = "[scrimp.models]\nabsent = absent_module:Model\n[scrimp.tasks]\nno-class = mine\n"
    (tmp_path / "mine-1.0.dist-info/entry_points.txt").write_text(points)
    (tmp_path / "r.yaml").write_text("model: {name: absent}\ntask: no-class\ntechniques: {sgd: {}}\n")
    used = scrimp(package, "train", "r.yaml", cwd=tmp_path)
    assert used.returncode == 2
    assert (
        "entry point `absent = absent_module:Model` of mine 1.0): cannot be loaded: ModuleNotFoundError" in used.stderr
    )
    assert "entry point `no-class = mine` of mine 1.0): does not name a dataclass." in used.stderr


def test_a_recipe_of_others_parts_trains(package: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three\n\n" * 900)
    (tmp_path / "r.yaml").write_text(
        "model: {name: bigram}\ntask: {name: my-task}\n"
        "data: {source: text.txt, tokenizer: bytes, context: 16, holdout: 0.3}\n"
        "duration: 3 step\nbatch: 2\ntechniques: {sgd: {}, half: {}}\n"
    )
    done = scrimp(package, "train", "r.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = scrimp(package, "train", "--resume", "runs/run-sgd", "--extend", "2 step", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert len((tmp_path / "runs/run-sgd/metrics.jsonl").read_text().splitlines()) >= 5
