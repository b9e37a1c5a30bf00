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

import pytest
import torch
from typer.testing import CliRunner

from scrimp import checkpoint
from scrimp.cli import app
from scrimp.errors import LostError, UserError
from scrimp.launching import INTERRUPTED, culprit, restarted
from scrimp.training import train

RECIPE = """
model: {layers: 2, width: 32, heads: 2, dropout: 0.1}
data: {source: text, tokenizer: bytes, context: 32, holdout: 0.2}
batch: 4
duration: 100 step
techniques: {adamw: {lr: 1e-3}}
checkpoint: {every: 2 step, keep: 60}
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


def saved(snapshot: Path) -> dict[str, torch.Tensor]:
    state, _ = checkpoint.load(snapshot)
    return {f"{kind}/{name}": t for kind, tensors in state.items() for name, t in tensors.items()}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found in /proc")
def test_a_rank_that_is_killed_is_named_and_all_go_on_to_the_same_bits(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, run = launched("--restarts", "1", "--logs", "logs", "recipe.yaml", "name=killed"), place / "runs/killed"
    early, late = run / "checkpoints/step-000000004", run / "checkpoints/step-000000012"
    until(lambda: late in checkpoint.snapshots(late.parent))
    first = ranks(killed.pid)
    os.kill(first[1], signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in first.values()), 20)
    # What has been trained without a break is kept for comparison, and trained again.
    for snapshot in checkpoint.snapshots(late.parent):
        if snapshot.name > early.name:
            snapshot.rename(place / snapshot.name)
    until(lambda: late in checkpoint.snapshots(late.parent))
    # Ctrl-C and SIGTERM are passed on to ranks, which save.
    killed.send_signal(signal.SIGINT)
    said, faults = killed.communicate(timeout=120)
    assert killed.returncode == 130, faults
    assert "Saved. Go on with: scrimp launch --ranks 2 --resume runs/killed" in said
    assert "rank 1 of 2 was killed (SIGKILL)" in faults and "Its log is logs/attempt-0/" in faults
    assert "All ranks start again (1 of 1)." in faults and "Traceback" not in faults
    wanted, found = saved(place / late.name), saved(late)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)
    with monkeypatch.context() as patch:
        knows_its_run(run, checkpoint.meta(late)["launch"], patch)
    # Another mesh: what two ranks have begun a single process ends.
    train(resume=early, mesh={"data": 1})
    alone = saved(late)
    assert all(torch.allclose(wanted[n], alone[n], rtol=1e-3, atol=1e-5) for n in wanted)
    assert checkpoint.meta(checkpoint.snapshots(late.parent)[-1])["ended"] == "finished"


def knows_its_run(run: Path, launch: str, patch: pytest.MonkeyPatch) -> None:
    """A launch's name is its own; of one given to torchrun only ranks that were started again go on with the run."""

    def found(name: str, count: str) -> Path | None:
        patch.setenv("TORCHELASTIC_RUN_ID", name)
        patch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        return restarted(run.parent)

    assert (found(launch, "0"), found("another", "1")) == (run, None)
    patch.setattr("scrimp.checkpoint.meta", lambda snapshot: {"launch": "run-7"})
    assert (found("run-7", "0"), found("run-7", "1")) == (None, run)


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
    monkeypatch.setattr("scrimp.launching.launch", lambda *given: pytest.fail("ranks were started"))
    result = CliRunner().invoke(app, ["launch", *words])
    assert result.exit_code != 0
    assert said in result.output + str(result.exception)
    assert isinstance(result.exception, UserError | SystemExit)


@pytest.mark.parametrize(
    ("codes", "first"),
    [
        ({0: LostError.code, 1: -signal.SIGKILL}, 1),
        ({0: LostError.code, 1: 1}, 1),
        ({2: 1, 0: LostError.code, 1: 1}, 1),
        ({1: UserError.code, 0: UserError.code}, 0),
        ({0: UserError.code, 1: -signal.SIGTERM}, 0),
        ({0: LostError.code, 1: -signal.SIGTERM}, 1),
        ({0: INTERRUPTED, 1: UserError.code}, 1),
        ({0: INTERRUPTED, 1: INTERRUPTED}, None),
        ({0: -signal.SIGTERM, 1: INTERRUPTED}, None),
    ],
)
def test_the_rank_that_others_follow_is_the_one_that_failed(codes: dict[int, int], first: int | None) -> None:
    assert culprit(codes) == first
