"""Killed in the middle of an update whose states are on disk, a run resumes bitwise, and its file is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scrimp import checkpoint
from scrimp.training import train
from tiny import TinyData, recipe
from tiny import example as made_as_in_its_card

CHILD = """
import os, signal, sys
from scrimp.disk import Extent
from scrimp.training import train
from tiny import TinyData
from test_kill_offloaded import made

count, write = 0, Extent.write
def dying(self, buffer, start):
    global count
    count += 1
    if count > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, buffer, start)
Extent.write = dying
train(made(sys.argv[1], "killed"), data=TinyData().open())
"""


def made(out: str, name: str) -> object:
    """Four steps of 208 writes each, all weights, gradients and states on disk."""
    names = ("adamw", "offload_states", "layer_to_layer")
    techniques = [made_as_in_its_card(name) for name in names]
    return recipe(*techniques, data="text", out=out, name=name, duration="4 step",
                  checkpoint={"every": "1 step", "keep": 9})  # fmt: skip


@pytest.mark.parametrize("writes", [250])
def test_killed_in_the_middle_of_a_step_it_resumes_bitwise(tmp_path: Path, writes: int) -> None:
    data = TinyData().open()
    train(made(str(tmp_path), "whole"), data=data)  # pyright: ignore[reportArgumentType]
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    killed = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), str(writes)],
                            env={**os.environ, "PYTHONPATH": here}, capture_output=True)  # fmt: skip
    assert killed.returncode == -9, killed.stderr.decode()
    run = tmp_path / "killed"
    last = checkpoint.snapshots(run / "checkpoints")[-1]
    assert 1 <= int(last.name[5:]) < 4
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}, "nothing is left beside the runs"
    train(resume=run, data=data)
    a, b = (held(tmp_path / name / "checkpoints/step-000000004") for name in ("whole", "killed"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def held(folder: Path) -> dict[str, torch.Tensor]:
    state, _ = checkpoint.load(folder)
    return {f"{kind}/{name}": t for kind, tensors in state.items() for name, t in tensors.items()}
