"""What users rely on is frozen: the command line and the recipes' schema.

A change on purpose: `SCRIMP_UPDATE_SURFACE=1 pytest tests/surface`, then look at the diff.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from scrimp.cli import app
from scrimp.errors import UserError
from scrimp.schema import schema

HERE = Path(__file__).parent


def command_line() -> dict[str, Any]:
    """Every command with its parameters and defaults."""
    group: Any = typer.main.get_command(app)
    return {
        name: {p.name: [p.opts, str(p.default)] for p in command.params if p.name != "help"}
        for name, command in sorted(group.commands.items())
    }


def frozen(name: str, now: Any) -> Any:
    path = HERE / name
    if os.environ.get("SCRIMP_UPDATE_SURFACE"):
        path.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    return json.loads(path.read_text())


def test_the_command_line_is_frozen() -> None:
    now = json.loads(json.dumps(command_line()))
    assert now == frozen("cli.json", now)


def test_the_schema_is_frozen() -> None:
    now = json.loads(json.dumps(schema()))
    assert now == frozen("schema.json", now)


def test_the_schema_describes_a_setting() -> None:
    lion = schema()["properties"]["techniques"]["anyOf"][0]["properties"]["lion"]["anyOf"][0]
    assert lion["properties"]["lr"] == {
        "default": 1e-4,
        "description": "Learning rate before the schedule.",
        "title": "Lr",
        "type": "number",
    }
    assert lion["additionalProperties"] is False


def test_import_and_list_do_not_import_torch() -> None:
    code = "import sys, scrimp, scrimp.cli, scrimp.registry as r; r.catalogue(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_show_says_what_a_technique_clashes_with() -> None:
    done = subprocess.run([sys.executable, "-m", "scrimp", "show", "lion"], capture_output=True, text=True, check=True)
    assert "Clashes with: adam, adamw, lamb, lars, muon, sgd" in done.stdout
    assert "weight_decay: float = 1.0" in done.stdout


def test_a_mistake_on_the_command_line_is_two_lines_and_exit_2(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "scrimp", "show", "lyon"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "scrimp: there is no technique `lyon`. Did you mean lion or muon or lora?"
    done = subprocess.run(
        [sys.executable, "-m", "scrimp", "train", "none.yaml"], capture_output=True, text=True, cwd=tmp_path
    )
    assert "cannot read the recipe" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["eval", "runs/x", "--batches", "-3"],
            "--batches: must be at least 0, not -3. 0 is",
        ),
        (["generate", "runs/x", "--tokens", "-1"], "--tokens: must be at least 0, not -1."),
        (["generate", "runs/x", "--temperature", "nan"], "--temperature: must be at least 0"),
        (["generate", "runs/x", "--temperature", "-1"], "not -1.0. 0 takes the likeliest token."),
        (["generate", "runs/x", "--seed", "-1"], "--seed: must be at least 0"),
        (["demo", "--steps", "-1"], "--steps: must be at least 0"),
    ],
)
def test_numbers_of_the_command_line_have_bounds(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        app(words, standalone_mode=False)
    assert message in str(error.value)


@pytest.mark.parametrize("words", [["steps=5"], ["recipe.yaml"], ["recipe.yaml", "steps=5"], ["--from", "runs/y"]])
def test_a_resumed_run_takes_nothing_else(words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        app(["train", *words, "--resume", "runs/x"], standalone_mode=False)
    assert "--resume: a resumed run keeps its recipe" in str(error.value)
    assert "no recipe, overrides or --from can be given with it." in str(error.value)
    assert "begin a new run: scrimp train RECIPE --from runs/x." in str(error.value)


def test_a_hugging_face_folder_is_no_run_to_start_from(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        app(["train", "recipe.yaml", "--from", str(tmp_path)], standalone_mode=False)
    assert f"Write `model: {{from: {tmp_path}}}` in the recipe, without --from." in str(error.value)


def test_adapters_on_random_weights_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("one two three\n\n" * 900)
    Path("r.yaml").write_text(
        "model: {layers: 1, width: 16, heads: 2}\nduration: 1 step\nbatch: 2\ntechniques: {sgd: {}, lora: {}}\n"
        "data: {source: text.txt, tokenizer: bytes, context: 16, holdout: 0.3}\nlog: {tensorboard: false}\n"
    )
    note = "Note: `lora` freezes all other weights, and they are random. Start from a folder (`model: {from: FOLDER}`)"
    train = [sys.executable, "-m", "scrimp", "train", "r.yaml"]
    assert note in subprocess.run(train, capture_output=True, text=True, check=True).stderr
    plain = subprocess.run([*train, "lora=off"], capture_output=True, text=True, check=True)
    assert "Note" not in plain.stderr
    assert plain.stdout.splitlines()[-1].strip()
    begun = subprocess.run([*train, "--from", "runs/run-sgd-2"], capture_output=True, text=True, check=True)
    assert "Note" not in begun.stderr
