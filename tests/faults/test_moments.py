"""Killed just before any change of the file system, a run resumes bitwise.

`test_kill.py` kills processes at random times. Here nothing is left to chance: an audit hook of the interpreter hears
every file that is opened for writing, renamed or removed, and the run dies at the n-th, for every n.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from scrimp import checkpoint
from scrimp.errors import UserError
from scrimp.recipe import Recipe
from scrimp.training import train
from tiny import TinyData, assert_equal, example, recipe

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
SHARE = int(os.environ.get("SCRIMP_MOMENTS", "8"))
"""One moment in so many is tried; 1 for all."""


class Killed(BaseException):
    """Not an Exception, so that nothing cleans up after it, as after kill -9."""


class Killer:
    """Counts changes below a folder while it is armed, and raises at one of them."""

    def __init__(self) -> None:
        self.armed, self.count, self.last = "", 0, sys.maxsize

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed or (event not in CHANGES and event != "open"):
            return
        # rmtree removes by names that are relative to a folder it holds open, so that these have no path to look at.
        inside = event in ("os.remove", "os.rmdir") or str(args[0]).startswith(self.armed)
        writes = event != "open" or (isinstance(args[1], str) and args[1] != "r")
        if inside and writes:
            self.count += 1
            if self.count > self.last:
                raise Killed


@pytest.fixture(scope="module")
def killer() -> Killer:
    made = Killer()
    sys.addaudithook(made)
    return made


@contextmanager
def armed(killer: Killer, folder: Path, last: int = sys.maxsize) -> Iterator[None]:
    killer.armed, killer.count, killer.last = str(folder), 0, last
    try:
        yield
    finally:
        killer.armed = ""


def made(out: Path, name: str, keep: int) -> Recipe:
    """Stages, memories and a best checkpoint; a stage ends on a step that is saved anyway."""
    techniques = (example("adamw"), example("ema"), example("stack", at=(0.5,)))
    return recipe(
        *techniques,
        data="text",
        out=str(out),
        name=name,
        duration="4 step",
        validate={"every": "1 step", "batches": 1},
        checkpoint={"every": "1 step", "keep": keep, "best": True},
        sample={"tokens": 2},
    )


def held(folder: Path) -> dict[str, torch.Tensor]:
    state, _ = checkpoint.load(folder)
    return {f"{kind}/{name}": t for kind, tensors in state.items() for name, t in tensors.items()}


def logged(run: Path) -> list[dict[str, Any]]:
    """Every line of the log, without what depends on the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "seconds", "peak_bytes")} for line in lines]


@pytest.mark.parametrize("keep", [1, 2])
def test_killed_before_any_change_of_the_disk(tmp_path: Path, killer: Killer, keep: int) -> None:
    data = TinyData().open()
    with armed(killer, tmp_path):
        train(made(tmp_path, "whole", keep), data=data)
    count = killer.count
    assert count > 40, "the hook hears nothing"
    wanted = held(tmp_path / "whole/checkpoints/step-000000004")
    best, log = held(tmp_path / "whole/checkpoints/best"), logged(tmp_path / "whole")
    for moment in range(keep, count, SHARE):
        run = tmp_path / "killed"
        with armed(killer, tmp_path, moment), pytest.raises(Killed):
            train(made(tmp_path, "killed", keep), data=data)
        survived(run, moment)
        begun = checkpoint.snapshots(run / "checkpoints")
        # Twice, since what a kill leaves must not trip the one after it either.
        for last in (moment // 2, sys.maxsize) if begun else ():
            try:
                with armed(killer, tmp_path, last):
                    train(resume=run, data=data)
            except Killed:
                survived(run, moment)
        if begun:
            assert_equal(wanted, held(run / "checkpoints/step-000000004"))
            assert_equal(best, held(run / "checkpoints/best"))
            assert logged(run) == log
            assert len(list((run / "checkpoints").iterdir())) == keep + 1
        shutil.rmtree(run, ignore_errors=True)


def survived(run: Path, moment: int) -> None:
    """All that looks complete is complete, and progress was not lost."""
    found = checkpoint.snapshots(run / "checkpoints")
    for folder in found:
        checkpoint.load(folder)
    step = max((line["step"] for line in logged(run)), default=0) if (run / "metrics.jsonl").exists() else 0
    if step > 1:
        assert found, f"after change {moment} there is no checkpoint of {step} steps"
        assert int(found[-1].name[5:]) >= step - 1


def test_what_a_killed_save_left_is_removed_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".partial-step-000000007").mkdir()
    (tmp_path / ".partial-step-000000007/model.safetensors").write_text("half")
    checkpoint.save(tmp_path / "step-000000009", {"model": {"a": torch.zeros(3)}}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000009"]


def test_a_snapshot_that_stepped_aside_is_read_and_put_back(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / f"step-00000000{step}", {"model": {"a": torch.full((3,), float(step))}}, {"k": step})
    newest = tmp_path / "step-000000002"
    newest.rename(tmp_path / f"{checkpoint.ASIDE}{newest.name}")
    assert checkpoint.snapshots(tmp_path)[-1] == newest
    assert checkpoint.load(newest)[1] == {"k": 2}
    checkpoint.save(tmp_path / "step-000000003", {"model": {"a": torch.zeros(3)}}, {})
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize("part", ["model.safetensors", "memory.safetensors", "state.json"])
def test_no_damage_goes_unnoticed(tmp_path: Path, part: str) -> None:
    """Every byte altered in two ways, and every length cut."""
    folder = tmp_path / "step-000000001"
    checkpoint.save(folder, {"model": {"a": torch.zeros(3)}, "memory.x": {"b": torch.ones(())}}, {"text": "größe"})
    raw = (folder / part).read_bytes()
    wrong = [raw[:i] + bytes([raw[i] ^ bit]) + raw[i + 1 :] for i in range(len(raw)) for bit in (1, 0x80)]
    for damaged in wrong + [raw[:i] for i in range(len(raw))]:
        (folder / part).write_bytes(damaged)
        with pytest.raises(UserError, match=part):
            checkpoint.load(folder)
