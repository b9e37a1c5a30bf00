"""What a run starts from, beyond the simple resume: earlier checkpoints, adapters, other runs, other data."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scrimp import checkpoint
from scrimp.errors import UserError
from scrimp.inference import continue_text, evaluate, export, export_adapters
from scrimp.models import hub
from scrimp.recipe import Recipe
from scrimp.restore import starting_weights
from scrimp.training import train
from tiny import MODEL, assert_equal, example, flat, recipe, run_of


def text_data(folder: Path) -> dict[str, Any]:
    """A corpus on disk."""
    (folder / "text").mkdir(exist_ok=True)
    for i in range(20):
        (folder / f"text/{i}.txt").write_text(f"item {i} " * 60)
    return {"source": str(folder / "text"), "tokenizer": "bytes", "context": 16, "holdout": 0.3}


def made(folder: Path, name: str, *techniques: Any, **settings: Any) -> Recipe:
    rules = techniques or (example("sgd"),)
    return recipe(*rules, data=text_data(folder), out=str(folder), name=name, **settings)


def test_resuming_from_an_earlier_checkpoint_drops_the_later_ones(tmp_path: Path) -> None:
    whole = train(made(tmp_path, "a", checkpoint={"every": "1 step", "keep": 9}))
    folder = tmp_path / "a/checkpoints"
    again = train(resume=folder / "step-000000003")
    assert [p.name[-1] for p in checkpoint.snapshots(folder)] == list("12345678")
    assert_equal(flat(whole.run.state()), flat(again.run.state()))


@pytest.mark.parametrize("grows", [False, True])
def test_adapter_only_runs_resume_and_export(tmp_path: Path, grows: bool) -> None:
    base = train(made(tmp_path, "base"))
    more = (example("length_warmup"),) if grows else ()
    kept = {"adapter_only": True, "every": "1 step", "keep": 9}
    tuned = made(tmp_path, "tuned", example("lora"), *more, checkpoint=kept)
    whole = train(tuned, start=base.folder)
    assert whole.folder is not None
    held, _ = checkpoint.load(whole.folder / "checkpoints/step-000000007")
    assert all(".lora." in name for name in held["model"])
    for cut in (3, 5):
        copy = tmp_path / f"copy-{cut}"
        shutil.copytree(whole.folder, copy)
        again = train(resume=copy / f"checkpoints/step-{cut:09d}")
        assert_equal(flat(whole.run.state()), flat(again.run.state()))


def on_a_folder(tmp_path: Path, tuned: str = "lora", **settings: Any) -> Recipe:
    """Adapters on a folder of weights, and the folder."""
    base = train(made(tmp_path, "base", model={**MODEL, "context": 20}, sample={"tokens": 0}))
    assert base.folder is not None
    export(base.folder, tmp_path / "hf")
    model = {"from": str(tmp_path / "hf")}
    kept = {"adapter_only": True, "every": "4 step"}
    return made(tmp_path, "tuned", example(tuned, **settings), model=model, checkpoint=kept)


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_adapters_go_to_peft_and_a_run_begins_with_them(tmp_path: Path, name: str) -> None:
    tuned = on_a_folder(tmp_path, name, **({} if name == "lora" else {"shift": True}))
    first = train(tuned)
    export_adapters(tmp_path / "tuned", tmp_path / "peft")
    export_adapters(tmp_path / "tuned", tmp_path / "peft")  # an earlier one is replaced
    begun = run_of(tuned, source=starting_weights(tuned, tuned.data.open(), str(tmp_path / "peft")))
    for name, p in first.run.model.named_parameters():
        assert torch.equal(p, begun.model.get_parameter(name)), name
    second = train(tuned, start=tmp_path / "peft")
    assert second.folder is not None
    again = train(resume=second.folder / "checkpoints/step-000000004")
    assert_equal(flat(second.run.state()), flat(again.run.state()))
    export_adapters(second.folder, tmp_path / "peft2")


def test_adapters_without_a_folder_to_stand_on_are_not_exported(tmp_path: Path) -> None:
    base = train(made(tmp_path, "base", sample={"tokens": 0}))
    train(made(tmp_path, "tuned", example("lora"), sample={"tokens": 0}), start=base.folder)
    with pytest.raises(UserError, match="adapters need a folder"):
        export_adapters(tmp_path / "tuned", tmp_path / "peft")
    export(tmp_path / "tuned", tmp_path / "merged")


@pytest.mark.parametrize("name", ["adapter", "prefix"])
def test_what_does_not_merge_is_not_exported(tmp_path: Path, name: str) -> None:
    train(made(tmp_path, "tuned", example(name), sample={"tokens": 0}))
    with pytest.raises(UserError, match=f"`{name}` added layers to the model that do not merge"):
        export(tmp_path / "tuned", tmp_path / "hf")


@pytest.mark.parametrize("verb", ["resume", "evaluate", "generate", "export"])
def test_adapters_are_refused_on_weights_that_changed(tmp_path: Path, verb: str) -> None:
    train(on_a_folder(tmp_path))
    run = tmp_path / "tuned"
    verbs: dict[str, Callable[[], Any]] = {
        "resume": lambda: train(resume=run, extend="2 step"),
        "evaluate": lambda: evaluate(run, 1),
        "generate": lambda: continue_text(run, "a", 2, 0.0, 0),
        "export": lambda: export(run, tmp_path / "merged"),
    }
    weights = tmp_path / "hf/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(UserError, match=r"hf: the frozen weights are not those that the run was trained on"):
        verbs[verb]()
    raw[-1] ^= 1
    weights.write_bytes(raw)
    verbs[verb]()
    weights.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"hf: the frozen weights that the run was trained on are gone"):
        verbs[verb]()


def test_adapters_on_a_run_that_went_on_are_refused(tmp_path: Path) -> None:
    base = train(made(tmp_path, "base"))
    train(made(tmp_path, "tuned", example("lora"), checkpoint={"adapter_only": True}), start=base.folder)
    train(resume=base.folder, extend="2 step")
    with pytest.raises(UserError, match=r"base: the frozen weights are not those that the run was trained on"):
        train(resume=tmp_path / "tuned", extend="2 step")


def test_adapter_only_without_a_base_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the frozen weights could not be read again"):
        train(made(tmp_path, "lost", example("lora"), checkpoint={"adapter_only": True}))
    assert not (tmp_path / "lost").exists()


def test_other_data_is_noticed(tmp_path: Path) -> None:
    train(made(tmp_path, "a"))
    (tmp_path / "text/99.txt").write_text("something new " * 50)
    with pytest.raises(UserError, match="not what the run was trained on"):
        train(resume=tmp_path / "a")


def test_extending_goes_on_and_measures_again(tmp_path: Path) -> None:
    first = train(made(tmp_path, "a", validate={"every": 1, "batches": 2}))
    longer = train(resume=tmp_path / "a", extend="4 step")
    assert longer.run.clock.step == 12
    assert longer.validation != first.validation
    assert train(resume=tmp_path / "a").run.clock.end == 12


def test_arguments_that_contradict_each_other() -> None:
    with pytest.raises(UserError, match="no run to extend"):
        train(recipe(), extend="2 step")
    with pytest.raises(UserError, match="either a recipe or a run"):
        train()


def test_a_run_called_best_resumes(tmp_path: Path) -> None:
    train(made(tmp_path, "best"))
    assert train(resume=tmp_path / "best").run.clock.step == 8


def test_a_snapshot_that_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    train(made(tmp_path, "a", checkpoint={"every": 0, "keep": 1}))
    folder = tmp_path / "a/checkpoints"
    (folder / "step-000000008").rename(folder / ".partial-old-step-000000008")
    assert [p.name for p in checkpoint.snapshots(folder)] == ["step-000000008"]


def test_one_model_at_a_time_across_a_stage(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.nn.Module]] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            assert not [ref for ref in alive if ref() is not None]
            alive.append(weakref.ref(fields["run"].model))

    gc.disable()
    try:
        train(made(tmp_path, "a", example("stack")), observe=see)
    finally:
        gc.enable()
    assert len(alive) == 2


def test_seeds_change_dropout_and_negative_ones_are_refused() -> None:
    samples = [run_of(recipe(seed=seed)).batch(0)["sample"] for seed in (0, 1, 20240101)]
    assert len({tuple(s.tolist()) for s in samples}) == 3
    with pytest.raises(UserError, match="seed: must be at least 0"):
        recipe(seed=-1)


def test_growth_keeps_the_function_of_the_average_too() -> None:
    from scrimp.run import build
    from scrimp.stages import new_clock

    settings = recipe(example("stack", at=("4 step",), zero_new=True), example("ema"), dtype="float64")
    small = run_of(settings)
    state: Any = {kind: dict(tensors) for kind, tensors in small.state().items()}
    data = settings.data.open()
    clock = new_clock(settings, data)
    clock.step, clock.stage, clock.cuts = 4, 1, [4]
    big = build(settings, data, clock, last=state)
    batch = small.batch(0)
    losses = [run.evaluate(lambda model: float(run.task.loss(model, batch))) for run in (small, big)]  # type: ignore[misc]  # noqa: B023
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)


def test_an_adapter_on_a_tied_head_is_refused_and_on_an_untied_one_merges() -> None:
    lora = example("lora", targets="*")
    with pytest.raises(UserError, match="the weight of `head` is shared"):
        run_of(recipe(lora))
    run_of(recipe(lora, model={"layers": 1, "width": 16, "heads": 1, "tied": False}))


def test_a_run_starts_from_a_folder_and_leaves_as_one(tmp_path: Path) -> None:
    first = train(made(tmp_path, "a", sample={"tokens": 0}))
    assert first.folder is not None
    export(first.folder, tmp_path / "hf")
    raw = first.run.recipe.dump() | {"model": {"from": str(tmp_path / "hf")}, "name": "b", "duration": "1 step"}
    second = train(Recipe.read(yaml.safe_load(yaml.safe_dump(raw))))
    config = hub.read_config(tmp_path / "hf")
    assert config["width"] == 32
    assert second.validation["loss"] == pytest.approx(first.validation["loss"], abs=0.2)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        train(made(tmp_path, "a", example("adamw"), sample={"tokens": 0}))
        export(tmp_path / "a", tmp_path / "hf")
    finally:
        os.umask(before)
    files = [p for folder in ("a", "hf") for p in (tmp_path / folder).rglob("*") if p.is_file()]
    assert sum(p.suffix == ".safetensors" for p in files) >= 3
    assert {(p.name, p.stat().st_mode & 0o777) for p in files} == {(p.name, 0o666 & ~mask) for p in files}


def test_overrides_that_hit_nothing_are_told() -> None:
    with pytest.raises(UserError, match=r"there is no technique `lyon`\. Did you mean lion"):
        Recipe.read({"techniques": {"lion": {}}}, ["techniques.lyon.lr=1"])
    with pytest.raises(UserError, match="not a YAML value"):
        Recipe.read({"techniques": {"lion": {}}}, ["groups={a"])


@pytest.mark.parametrize("name", ["rezero", "t_fixup"])
def test_export_says_which_technique_took_the_norms(name: str, tmp_path: Path) -> None:
    train(made(tmp_path, "run", example(name), duration="2 step"))
    with pytest.raises(UserError, match=f"`{name}` takes the norms out"):
        export(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize(
    ("technique", "settings", "said"),
    [
        ("rezero", {}, r"`rezero`, which took out norms.*Give the new recipe `rezero` too"),
        ("early_bird", {"heads": 0.5, "every": "1 step", "until": "2 step"}, r"made the run's layers narrower.*export"),
    ],
    ids=["rezero", "early_bird"],
)
def test_a_model_that_lost_parts_says_why_a_whole_one_cannot_start_from_it(
    technique: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    old = train(made(tmp_path, "old", example(technique, **settings), duration="4 step"))
    with pytest.raises(UserError, match=rf"--from: .*{said}"):
        train(made(tmp_path, "new", duration="1 step"), start=old.folder, save=False)
    if technique == "rezero":
        train(made(tmp_path, "new", example(technique), duration="1 step"), start=old.folder, save=False)
