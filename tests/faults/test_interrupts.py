"""Ctrl-C, SIGTERM and a full disk at awkward moments: what was saved is whole, and a resumed run ends bitwise equal."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scrimp import checkpoint
from scrimp.errors import UserError
from scrimp.recipe import Recipe
from scrimp.training import Result, train
from tiny import TinyData, assert_equal, example, flat, recipe

STEPS = 8


def made(out: Path, name: str, **settings: Any) -> Recipe:
    techniques = (example("adamw"), example("ema"), example("stack", at=(0.5,)))
    return recipe(*techniques, data="text", out=str(out), name=name, duration=f"{STEPS} step", **settings)


def at(step: int, act: Callable[[], None]) -> Callable[[str, dict[str, Any]], None]:
    """An observer that acts once, as soon as a step was made."""

    def observe(event: str, fields: dict[str, Any]) -> None:
        if event == "step" and fields["step"] == step:
            act()

    return observe


@pytest.fixture(scope="module")
def whole() -> Result:
    data = TinyData().open()
    return train(made(Path(), ""), data=data, save=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize("step", [1, STEPS // 2, STEPS], ids=["first", "edge-of-a-stage", "last"])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, whole: Result, number: int, step: int) -> None:
    before = signal.getsignal(number)
    told = at(step, lambda: os.kill(os.getpid(), number))
    result = train(made(tmp_path, "r", checkpoint={"every": 0}), data=TinyData().open(), observe=told)
    assert signal.getsignal(number) is before, "the handler is put back"
    assert result.reason == ("finished" if step == STEPS else "interrupted")
    assert result.run.clock.step == step
    assert checkpoint.snapshots(tmp_path / "r/checkpoints")[-1].name == f"step-{step:09d}"
    resumed = train(resume=tmp_path / "r", data=TinyData().open())
    assert resumed.reason == "finished"
    assert_equal(flat(whole.run.state()), flat(resumed.run.state()))
    assert resumed.validation == whole.validation
    assert _steps(tmp_path / "r") == list(range(1, STEPS + 1))


@pytest.mark.parametrize("event", ["validation", "checkpoint", "end"])
def test_a_signal_after_the_last_step_changes_nothing(tmp_path: Path, whole: Result, event: str) -> None:
    def observe(heard: str, fields: dict[str, Any]) -> None:
        at_the_end = fields.get("step", STEPS) == STEPS and str(fields.get("path", STEPS)).endswith(str(STEPS))
        if heard == event and at_the_end:
            os.kill(os.getpid(), signal.SIGTERM)

    settings: dict[str, Any] = {"checkpoint": {"every": 0}, "validate": {"every": 1}}
    result = train(made(tmp_path, "r", **settings), data=TinyData().open(), observe=observe)
    assert (result.reason, result.text, result.validation) == ("finished", whole.text, whole.validation)


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(made(tmp_path, "r"), data=TinyData().open(), observe=at(3, twice))
    resumed = train(resume=tmp_path / "r", data=TinyData().open())
    assert resumed.run.clock.step == STEPS


def test_sigterm_that_comes_twice_at_once_is_one(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    assert train(made(tmp_path, "r"), data=TinyData().open(), observe=at(3, twice)).reason == "interrupted"


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file of this process may grow beyond a size in bytes; Python ignores the signal, so that writing fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "victim"), [(1600, "metrics.jsonl"), (100_000, "checkpoint"), (100, "recipe.yaml")])
def test_a_full_disk_says_which_file(tmp_path: Path, size: int, victim: str) -> None:
    # No technique that rebuilds the run: the first checkpoint comes when the log is longer than the recipe.
    plain = recipe(data="text", out=str(tmp_path), name="r", duration="20 step", checkpoint={"every": "15 step"})
    with disk_of(size), pytest.raises(UserError) as error:
        train(plain, data=TinyData().open())
    assert victim in str(error.value)
    assert "File too large" in str(error.value)
    assert "set `out` to another disk" in str(error.value)


def test_a_full_disk_loses_no_checkpoint(tmp_path: Path, whole: Result) -> None:
    """The log fills the disk after a checkpoint; the half line it leaves is dropped."""
    run = tmp_path / "r"

    def shrink() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        limits.append(soft)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "metrics.jsonl").stat().st_size + 40, hard))

    limits: list[int] = []
    settings: dict[str, Any] = {"checkpoint": {"every": "5 step"}, "validate": {"every": 0}}
    try:
        with pytest.raises(UserError, match="metrics.jsonl: cannot be written"):
            train(made(tmp_path, "r", **settings), data=TinyData().open(), observe=at(6, shrink))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0], resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert not (run / "metrics.jsonl").read_text().endswith("\n"), "no half line was written"
    assert [path.name[-1] for path in checkpoint.snapshots(run / "checkpoints")] == ["4", "5"]
    resumed = train(resume=run, data=TinyData().open())
    assert_equal(flat(whole.run.state()), flat(resumed.run.state()))
    assert _steps(run) == list(range(1, STEPS + 1))


def _steps(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]
