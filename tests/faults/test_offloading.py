"""A disk that is full, cut off or damaged while activations are on it: an error that says so, and no wrong gradient."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from scrimp.errors import UserError
from scrimp.run import Run
from scrimp.spill import Spill
from scrimp.training import train
from tiny import TinyData, assert_equal, example, flat, recipe, run_of

MODEL = {"layers": 3, "width": 32, "heads": 2, "dropout": 0.0}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write beyond, as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def made(folder: Path, **settings: Any) -> Any:
    return recipe(example("offload_activations", folder=str(folder)), model=MODEL, **settings)


def test_a_full_disk_ends_the_run_with_a_reason_and_it_resumes(tmp_path: Path) -> None:
    settings = {"data": "text", "out": str(tmp_path), "checkpoint": {"every": "1 step", "keep": 9}}
    whole = train(made(tmp_path, name="whole", **settings), data=TinyData().open())

    def shrink(event: str, fields: dict[str, Any]) -> None:
        if event == "checkpoint" and "step-000000003" in str(fields["path"]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))

    with files_of_at_most(1 << 40), pytest.raises(UserError, match="cannot write: File too large.*Set `folder`"):
        train(made(tmp_path, name="full", **settings), data=TinyData().open(), observe=shrink)
    resumed = train(resume=tmp_path / "full", data=TinyData().open())
    assert resumed.run.clock.step == 8
    assert_equal(flat(whole.run.state()), flat(resumed.run.state()))


def spill_of(run: Run) -> Spill:
    """The file of a run's activations."""
    blocks: Any = run.model.blocks
    return blocks[0].forward.saver.steps[0][1].__self__.store.spill


@pytest.mark.parametrize("damage", ["cut", "changed"])
@pytest.mark.parametrize("depth", [0, 1])
def test_what_comes_back_wrong_is_no_gradient(damage: str, depth: int, tmp_path: Path) -> None:
    technique = example("offload_activations", folder=str(tmp_path), depth=depth)
    run = run_of(recipe(technique, model=MODEL))
    batch = run.batch(0)
    assert run.loss
    loss = run.loss(run.model, batch)
    spill = spill_of(run)
    spill.writer.shutdown()
    if damage == "cut":
        os.ftruncate(spill.file.fd, 4096)
    else:
        os.pwrite(spill.file.fd, memoryview(spill.spare)[:4096], 4096)
    with pytest.raises(UserError, match="the disk gave back other bytes|the file is truncated"):
        loss.backward()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = run_of(recipe(example("offload_activations", folder=str(tmp_path / "none")), model=MODEL))
    assert run.backward
    with pytest.raises(UserError, match="there is no folder .*none"):
        run.backward(run.batch(0), torch.tensor(1))
