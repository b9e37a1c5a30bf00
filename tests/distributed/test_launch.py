"""`scrimp launch`: ranks train, one that dies is named, all go on from a checkpoint, mistakes are told at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from scrimp import checkpoint
from scrimp.cli import app
from scrimp.errors import LostError, UserError
from scrimp.launching import Crew
from scrimp.training import train

RECIPE = """
model: {layers: 2, width: 32, heads: 2, dropout: 0.1}
data: {source: text, tokenizer: bytes, context: 32, holdout: 0.2}
batch: 4
duration: 60 step
techniques: {adamw: {lr: 1e-3}}
checkpoint: {every: 2 step, keep: 40}
validate: {every: 0}
log: {tensorboard: false}
sample: {tokens: 0}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with text and a recipe, which is the working directory."""
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / f"text/{i}.txt").write_text("".join(random.Random(i).choices("abcde \n", k=700)))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launched(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scrimp", "launch", "--ranks", "2", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ranks(parent: int) -> dict[int, int]:
    """rank -> process, of a launch."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{parent}\n" in (folder / "status").read_text():
                values = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
                found[int(values["RANK"])] = int(folder.name)
        except (OSError, KeyError):
            continue
    return found


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def final(run: Path) -> dict[str, torch.Tensor]:
    state, meta = checkpoint.load(checkpoint.snapshots(run / "checkpoints")[-1])
    assert meta["ended"] == "finished"
    return {f"{kind}/{name}": t for kind, tensors in state.items() for name, t in tensors.items()}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found in /proc")
def test_a_rank_that_is_killed_is_named_and_all_go_on_to_the_same_bits(place: Path) -> None:
    whole = launched("recipe.yaml", "name=whole")
    said, faults = whole.communicate(timeout=120)
    assert (whole.returncode, faults) == (0, ""), faults
    assert "finished" in said
    killed, run = launched("--restarts", "1", "--logs", "logs", "recipe.yaml", "name=killed"), place / "runs/killed"
    until(lambda: len(checkpoint.snapshots(run / "checkpoints")) > 1)
    first = ranks(killed.pid)
    os.kill(first[1], signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in first.values()), 20)
    _, faults = killed.communicate(timeout=120)
    assert killed.returncode == 0, faults
    assert "rank 1 of 2 was killed (SIGKILL)" in faults and "Its log is logs/attempt-0/rank-1.log." in faults
    assert "All ranks start again (1 of 1)." in faults and "Traceback" not in faults
    wanted, found = final(place / "runs/whole"), final(run)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)
    # Another mesh: what two ranks have begun a single process ends.
    train(resume=run / "checkpoints/step-000000050", mesh={"data": 1})
    alone = final(run)
    assert all(torch.allclose(wanted[n], alone[n], rtol=1e-3, atol=1e-5) for n in wanted)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "0", "recipe.yaml"], "Invalid value for '--ranks'"),
        (["--restarts", "-1", "recipe.yaml"], "Invalid value for '--restarts'"),
        (["--ranks", "2"], "give either a recipe or --resume RUN"),
        (["--ranks", "2", "missing.yaml"], "missing.yaml: cannot read the recipe"),
        (["--ranks", "2", "recipe.yaml", "--bogus"], "No such option: --bogus"),
        (["--ranks", "2", "recipe.yaml", "mesh.tensor=3"], "the mesh (tensor: 3) has 3 ranks, and 2 run"),
        (["--ranks", "2", "recipe.yaml", "--mesh", "tensor=2"], "a new run's mesh stands in its recipe"),
        (["--ranks", "2", "--resume", "text"], "text: is not a run's folder"),
    ],
)
def test_mistakes_are_told_before_any_rank_starts(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setattr(Crew, "start", lambda crew, arguments: pytest.fail("ranks were started"))
    result = CliRunner().invoke(app, ["launch", *words])
    assert result.exit_code != 0
    assert said in result.output + str(result.exception)
    assert isinstance(result.exception, UserError | SystemExit)


@pytest.mark.parametrize(
    ("codes", "first"),
    [
        ({0: LostError.code, 1: -signal.SIGKILL}, 1),
        ({0: LostError.code, 1: 1}, 1),
        ({2: 1, 0: LostError.code, 1: 1}, 2),
        ({1: UserError.code, 0: UserError.code}, 0),
        ({0: 0, 1: 130}, None),
    ],
)
def test_the_rank_that_others_follow_is_the_one_that_failed(
    tmp_path: Path, codes: dict[int, int], first: int | None
) -> None:
    crew = Crew(len(codes), tmp_path, "name")
    for rank, code in codes.items():
        crew.running[rank] = cast(Any, None)
        crew.ended.put((rank, code))
    assert crew.wait() == first
