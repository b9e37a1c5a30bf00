"""What users do wrong, and what they are told."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scrimp.errors import RecipeError, UserError
from scrimp.progress import Progress
from scrimp.recipe import Recipe
from scrimp.training import train
from tiny import MODEL, TinyData, example, recipe, run_of

GOOD: dict[str, Any] = {"techniques": {"adamw": {}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": "gpt-4m"}, "modle: unknown key `modle`. Did you mean model"),
        ({"lion": {}}, "`lion` is a technique: put it under `techniques:`"),
        ({"model": "gpt-5m"}, "model.preset: there is no preset `gpt-5m`. Did you mean"),
        ({"model": {"widht": 3}}, "model.widht: unknown setting `widht`. Did you mean width"),
        ({"model": {"width": 30, "heads": 4}}, "width 30 is not a multiple of heads 4"),
        ({"model": {"heads": 0}}, "model: heads must be at least 1, not 0"),
        ({"model": {"dropout": float("nan")}}, "model: dropout must be at least 0 and less than 1, not nan"),
        ({"techniques": {"adamv": {}}}, "techniques.adamv: there is no technique `adamv`. Did you mean"),
        (
            {"techniques": {"adamw": {"lr": "fast"}}},
            "techniques.adamw.lr: must be a number, not 'fast'. Write for example",
        ),
        (
            {"techniques": {"adamw": {}, "clip": 1}},
            "clip: must be a mapping of settings, not 1. Write for example `clip: {",
        ),
        (
            {"techniques": {"adamw": {"betas": 0.9}}},
            "must be a list of 2 values, not 0.9. Write for example `betas: [0.9, 0.95]`",
        ),
        ({"techniques": {"adamw": {"betas": [0.9]}}}, "adamw.betas: must be a list of 2 values, not [0.9]. Write"),
        ({"techniques": {"adamw": {"betas": [1, 2, 3]}}}, "adamw.betas: must be a list of 2 values, not [1, 2, 3]."),
        ({"techniques": {"adamw": {"betas": ["x", 1]}}}, "techniques.adamw.betas.0: must be a number, not 'x'."),
        ({"techniques": {"sgd": {"nesterov": 3}}}, "techniques.sgd.nesterov: must be true or false, not 3."),
        (
            {"techniques": {"adamw": {}, "warmup_cosine": {"warmup": [1]}}},
            "warmup: must be a text or a number, not [1].",
        ),
        ({"techniques": {"adamw": {}, "wsd": {"shape": "round"}}}, "wsd.shape: `round` is not one of linear, sqrt."),
        ({"techniques": {"adamw": {}, "act": {"bits": 3}}}, "techniques.act.bits: `3` is not one of 2, 4, 8."),
        ({"techniques": {"adamw": {"params": 3}}}, "techniques.adamw.params: must be a text, not 3."),
        ({"batch": "many"}, "batch: must be a whole number, not 'many'."),
        ({"batch": 2.5}, "batch: must be a whole number, not 2.5."),
        (
            {"validate": 8},
            "validate: must be a mapping of settings, not 8. Write for example `validate: {every: 0.1}`.",
        ),
        ({"groups": 8}, "groups: must be a mapping, not 8."),
        ({"groups": {"embed.*": {"lrr": 8}}}, "groups.embed.*.lrr: unknown setting `lrr`. Did you mean lr?"),
        ({"model": {"rope_scaling": 2}}, "model.rope_scaling: must be a mapping, not 2."),
        ({"techniques": {"adamw": {"larning": 1}}}, "unknown setting `larning`"),
        ({"techniques": {"adamw": {"learning_rate": 1}}}, "unknown setting `learning_rate`. Did you mean lr?"),
        ({"techniques": {"adamw": {}, "lion": {}}}, "`adamw` and `lion` both set the update rule. Drop one of them"),
        ({"techniques": {"clip": {}}}, "no technique sets the update rule. Add one of adamw"),
        ({"techniques": {"adamw": {}, "clip": {"norm": -1}}}, "techniques.clip: norm must"),
        ({"techniques": "adamv"}, "techniques.adamv: there is no technique `adamv`. Did you mean adam"),
        ({"techniques": 5}, "techniques: must be a mapping or a list, not 5. Write for example `{adamw: {lr: 1e-3}}`."),
        ({"techniques": [{"adamw": {}, "clip": {}}]}, "techniques[0]: is not a technique: {'adamw': {}, 'clip': {}}."),
        ({"techniques": ["adamw", "adamw"]}, "`adamw` appears twice"),
        ({"duration": "5 minutes"}, "duration: `5 minutes` is not a duration. Write it as"),
        (
            {"duration": 0.25},
            "duration: `0.25` has no unit, and a run's own duration cannot be a fraction of it. Write",
        ),
        ({"duration": "0.25"}, "duration: `0.25` has no unit, and a run's own duration cannot be a fraction of it."),
        ({"duration": "0 step"}, "duration: `0 step` trains nothing. Write how long it is"),
        ({"duration": 0}, "duration: `0 step` trains nothing."),
        ({"steps": 0}, "duration: `0 step` trains nothing."),
        ({"duration": "9 step", "steps": 9}, "steps: `steps` and `duration` are both given. Keep one of them."),
        (
            {"checkpoint": {"best": True}, "validate": {"every": "0 step"}},
            "checkpoint.best: keeps the checkpoint of the lowest",
        ),
        ({"stop": {"patience": 2}, "validate": {"batches": 0}}, "stop.patience: waits for the lowest validation loss,"),
        ({"name": "a/b"}, "name: `a/b` is not the name of a folder. Set `out`"),
        ({"name": ".."}, "name: `..` is not the name of a folder."),
        ({"batch": 0}, "batch: must be at least 1"),
        ({"device": "tpu"}, "device: `tpu` is not one of auto, cpu, cuda"),
        ({"data": {"holdout": 2}}, "data: holdout must be between 0 and 1"),
        ({"checkpoint": {"keeep": 2}}, "checkpoint.keeep: unknown setting `keeep`. Did you mean keep"),
        ({"task": "casual-lm"}, "task: there is no task `casual-lm`. Did you mean causal-lm"),
    ],
)
def test_a_fault_says_what_where_and_what_to_do(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.read(GOOD | change)
    assert words in str(error.value)


def test_all_faults_are_told_at_once() -> None:
    raw = {"modle": 1, "batch": -1, "duration": "x", "techniques": {"adamw": {}, "sgd": {}, "clipp": {}}}
    with pytest.raises(RecipeError) as error:
        Recipe.read(raw)
    assert len(error.value.faults) == 5
    assert "The recipe has 5 faults" in str(error.value)


def test_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("seed: 010\ntechniques:\n  adamw: {lr: 1e-4}\n")
    assert Recipe.load(path).techniques[0].lr == 1e-4  # type: ignore[attr-defined]
    again = Recipe.load(path, ["lion.lr=3e-4", "adamw=off", "steps=200", "data.context=64", "clip=on"])
    assert {t.name for t in again.techniques} == {"lion", "clip"}
    assert (again.duration, again.data.context) == ("200 step", 64)


@pytest.mark.parametrize(("key", "inner"), [("data", "source"), ("model", "from")])
def test_a_path_instead_of_a_name_is_told_where_paths_go(
    key: str, inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for word in ("texts", "./elsewhere"):
        with pytest.raises(RecipeError) as error:
            Recipe.read(GOOD | {key: word})
        assert f"For a path write `{key}: {{{inner}: {word}}}`." in str(error.value)
    with pytest.raises(RecipeError) as error:
        Recipe.read(GOOD | {key: "txt"})
    assert "For a path" not in str(error.value)


def test_a_file_that_a_model_names_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.from \(nofolder\): there is no config.json"):
        Recipe.read(GOOD | {"model": {"from": "nofolder"}})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecipeError) as error:
        Recipe.read(GOOD | {"model": {"from": str(tmp_path)}})
    assert f"model.from ({tmp_path}/config.json): is not valid JSON" in str(error.value)


def test_a_single_technique_may_be_a_word() -> None:
    assert [t.name for t in Recipe.read({"techniques": "adamw"}).techniques] == ["adamw"]
    assert [t.name for t in Recipe.read({"techniques": "adamw"}, ["clip=on", "adamw.lr=1"]).techniques] == [
        "adamw",
        "clip",
    ]


def test_a_model_on_the_command_line_is_a_preset_or_a_mapping() -> None:
    assert Recipe.read(GOOD | {"model": {"layers": 2}}, ["model=gpt-1m"]).model.layers == 2
    assert Recipe.read(GOOD, ["model={layers: 3}"]).model.layers == 3


def test_a_word_of_the_file_keeps_its_meaning_beside_an_override() -> None:
    assert Recipe.read(GOOD | {"task": "causal-lm"}, ["task.label_smoothing=0.1"]).task.label_smoothing == 0.1
    with pytest.raises(RecipeError, match="task: there is no task `mine`"):
        Recipe.read(GOOD | {"task": "mine"}, ["task.label_smoothing=0.1"])
    with pytest.raises(RecipeError, match="data: there is no dataset `mine`"):
        Recipe.read(GOOD | {"data": "mine"}, ["data.context=8"])
    assert [t.name for t in Recipe.read(GOOD, ["techniques=[lion, clip]", "clip=off"]).techniques] == ["lion"]


def test_overrides_without_a_recipe_say_what_comes_first() -> None:
    with pytest.raises(UserError, match="steps=5: cannot read the recipe: .* The recipe's file comes first"):
        Recipe.load("steps=5")


def test_the_command_lines_duration_wins() -> None:
    for raw in ({"duration": "9 tok"}, {"steps": 9}):
        assert Recipe.read(GOOD | raw, ["steps=5"]).duration == "5 step"
        assert Recipe.read(GOOD | raw, ["duration=5 tok"]).duration == "5 tok"
    assert Recipe.read(GOOD | {"duration": 7}).duration == "7 step"
    with pytest.raises(RecipeError, match="command line: `steps` and `duration` are both given"):
        Recipe.read(GOOD, ["steps=5", "duration=5 tok"])


@pytest.mark.parametrize(
    ("text", "words"),
    [("techniques: [", "not valid YAML"), ("- 1", "must be a mapping"), ("a: 1\na: 2", "given twice"),
     ("x: !!python/object:os.system {}", "not valid YAML")],
)  # fmt: skip
def test_files_that_are_no_recipes(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        Recipe.load(path)


def test_a_fault_of_yaml_says_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("batch: 8\ntechniques: {adamw: {lr: 1e-3}\nseed: 1\n")
    with pytest.raises(UserError) as error:
        Recipe.load(path)
    assert str(error.value).startswith(
        f"{path}, line 3, column 1: is not valid YAML: while parsing a flow mapping of line 2"
    )
    assert "unicode string" not in str(error.value)
    path.write_text("a: 1\na: 2")
    with pytest.raises(UserError, match=r"r.yaml, line 2, column 1: is not valid YAML: the key `a` is given twice"):
        Recipe.load(path)


def test_a_loss_that_is_no_number_stops_with_step_and_parameter() -> None:
    made = recipe(example("sgd", lr=1e30), dtype="float32")
    with pytest.raises(UserError) as error:
        train(made, save=False)
    text = str(error.value)
    assert "at step" in text
    assert "the largest gradient is that of `" in text
    assert "lower learning rate" in text


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run's folder"):
        train(resume=tmp_path)


def impatient(out: Path) -> Recipe:
    """A run that gets no better, and stops early."""
    return recipe(
        example("sgd", lr=1e-30),
        data="text",
        out=str(out),
        name="r",
        duration="60 step",
        validate={"every": "1 step", "batches": 1},
        stop={"patience": 3},
        checkpoint={"every": 0, "best": True},
    )


def test_early_stop_and_best(tmp_path: Path) -> None:
    result = train(impatient(tmp_path), data=TinyData().open())
    assert result.reason == "stopped early"
    assert result.run.clock.step < 60
    assert (tmp_path / "r/checkpoints/best/model.safetensors").exists()
    assert math.isfinite(result.validation["loss"])


def test_a_run_that_is_at_its_end_says_so(tmp_path: Path) -> None:
    data, out = TinyData().open(), io.StringIO()
    for made in (recipe(data="text", out=str(tmp_path), name="whole"), impatient(tmp_path)):
        first = train(made, data=data)
        before = contents(tmp_path / made.name)
        with Progress(out) as view:
            again = train(resume=tmp_path / made.name, data=data, observe=view)
        assert (again.reason, again.validation) == (first.reason, first.validation)
        assert contents(tmp_path / made.name) == before
    said = [line.partition(": ")[0] for line in out.getvalue().splitlines() if "held-out" in line]
    assert said == ["already finished at step 8, --extend goes on", "already stopped early at step 4, --extend goes on"]


def contents(run: Path) -> dict[str, tuple[int, bytes]]:
    """What a run has written: times of change and bytes."""
    files = [run / "metrics.jsonl", *(p for p in (run / "checkpoints").rglob("*") if p.is_file())]
    return {str(p): (p.stat().st_mtime_ns if "checkpoints" in p.parts else 0, p.read_bytes()) for p in files}


def test_a_run_that_was_stopped_early_is_extended_from_there(tmp_path: Path) -> None:
    data = TinyData().open()
    stopped = train(impatient(tmp_path), data=data).run.clock.step
    longer = train(resume=tmp_path / "r", extend="2 step", data=data)
    assert (longer.reason, longer.run.clock.step) == ("finished", stopped + 2)


def test_a_run_that_stops_early_at_its_last_step_is_finished(tmp_path: Path) -> None:
    first = train(impatient(tmp_path), data=TinyData().open(), save=False)
    last = replace(impatient(tmp_path), duration=f"{first.run.clock.step} step")
    assert train(last, data=TinyData().open(), save=False).reason == "finished"


def test_a_new_run_may_start_from_old_weights(tmp_path: Path) -> None:
    made = recipe(out=str(tmp_path), name="old")
    old = train(made, data=TinyData().open())
    fresh = run_of(recipe(example("adamw")), source={"model": old.run.state()["model"]})
    assert torch.equal(fresh.model.get_parameter("embed.weight"), old.run.model.get_parameter("embed.weight"))


def test_weights_of_another_shape_say_what_to_give() -> None:
    weights = run_of(recipe(example("adamw"))).state()["model"]
    with pytest.raises(UserError) as error:
        run_of(recipe(example("adamw"), model=MODEL | {"width": 16}), source={"model": weights})
    assert "misshapen: embed.weight [32, 32] instead of [32, 16]" in str(error.value)
    assert "Give the `model`, and the `data.tokenizer` and `data.vocab`, that the weights" in str(error.value)
