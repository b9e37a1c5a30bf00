"""A run that is killed at any moment resumes bitwise, and loses nothing that was saved."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scrimp import checkpoint
from scrimp.errors import UserError
from scrimp.training import train

KILLS = int(os.environ.get("SCRIMP_KILLS", "4"))
STEPS = 60
RECIPE = f"""
model: {{layers: 4, width: 32, heads: 2, dropout: 0.1}}
data: {{source: text, tokenizer: bytes, context: 32, holdout: 0.2}}
batch: 4
duration: {STEPS} step
techniques:
  lion: {{lr: 1e-3}}
  warmup_cosine: {{}}
  ema: {{decay: 0.9}}
  accumulate: {{parts: 2}}
  stack: {{at: [0.3, 0.6]}}
  length_warmup: {{start: 0.5, until: 0.5, levels: 2}}
checkpoint: {{every: 1 step, keep: 3}}
validate: {{every: 10 step, batches: 1}}
log: {{tensorboard: false}}
sample: {{tokens: 4}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text and a recipe, and the run that was never disturbed."""
    folder = tmp_path_factory.mktemp("kill")
    (folder / "text").mkdir()
    for i in range(12):
        (folder / f"text/{i}.txt").write_text("".join(random.Random(i).choices("abcde \n", k=700)))
    (folder / "recipe.yaml").write_text(RECIPE)
    assert scrimp(folder, "train", "recipe.yaml", "name=whole").wait() == 0, said(folder)
    return folder


def said(folder: Path) -> str:
    """What the last process wrote."""
    return (folder / "log.txt").read_text()


def scrimp(folder: Path, *words: str, limit: int | None = None) -> subprocess.Popen[bytes]:
    def full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit or 0, limit or 0))

    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "scrimp", *words],
            cwd=folder,
            stdout=log,
            stderr=log,
            preexec_fn=full_disk if limit else None,
        )


def final(run: Path) -> dict[str, torch.Tensor]:
    state, _ = checkpoint.load(checkpoint.snapshots(run / "checkpoints")[-1])
    return {f"{kind}/{name}": t for kind, tensors in state.items() for name, t in tensors.items()}


def steps(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_killed_at_random_and_resumed_is_bitwise_the_same(place: Path) -> None:
    run = place / "runs/killed"
    shutil.rmtree(run, ignore_errors=True)
    chance = random.Random(7)
    process = scrimp(place, "train", "recipe.yaml", "name=killed")
    for _ in range(KILLS):
        _wait_for_progress(run, process)
        time.sleep(chance.uniform(0.0, 0.15))
        process.kill()
        process.wait()
        process = scrimp(place, "train", "--resume", str(run))
    assert process.wait() == 0, said(place)
    whole, killed = final(place / "runs/whole"), final(run)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[n], killed[n]) for n in whole)
    assert steps(run) == list(range(1, STEPS + 1))
    assert not list((run / "checkpoints").glob(".partial-*"))


def _wait_for_progress(run: Path, process: subprocess.Popen[bytes]) -> None:
    """Until this process has written a checkpoint of its own, possibly into the middle of the next one."""
    before = checkpoint.snapshots(run / "checkpoints")[-1:]
    while process.poll() is None and checkpoint.snapshots(run / "checkpoints")[-1:] == before:
        time.sleep(0.01)


def test_ctrl_c_saves_and_leaves(place: Path) -> None:
    process = scrimp(place, "train", "recipe.yaml", "name=stopped")
    run = place / "runs/stopped"
    _wait_for_progress(run, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, said(place)
    assert "scrimp train --resume" in said(place)
    assert scrimp(place, "train", "--resume", str(run)).wait() == 0
    whole, stopped = final(place / "runs/whole"), final(run)
    assert all(torch.equal(whole[n], stopped[n]) for n in whole)


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "meta"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_offered(
    place: Path, tmp_path: Path, harm: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "runs/whole", run)
    last = checkpoint.snapshots(run / "checkpoints")[-1]
    target = last / ("state.json" if harm == "meta" else "model.safetensors")
    raw = bytearray(target.read_bytes())
    if harm == "truncate":
        target.write_bytes(raw[:-10])
    elif harm == "remove":
        target.unlink()
    else:
        raw[-5] ^= 1
        target.write_bytes(raw)
    with pytest.raises(UserError) as error:
        train(resume=run)
    assert target.name in str(error.value)
    before = checkpoint.snapshots(run / "checkpoints")[-2]
    assert f"scrimp train --resume {before}" in str(error.value)


def test_a_full_disk_leaves_earlier_checkpoints_whole(place: Path) -> None:
    size = (checkpoint.snapshots(place / "runs/whole/checkpoints")[-1] / "model.safetensors").stat().st_size
    process = scrimp(place, "train", "recipe.yaml", "name=full", limit=size - 1000)
    assert process.wait(timeout=120) == 2, said(place)
    assert "cannot write the checkpoint" in said(place)
    kept = checkpoint.snapshots(place / "runs/full/checkpoints")
    assert kept, "the stages before the last have smaller checkpoints"
    checkpoint.load(kept[-1])
    assert scrimp(place, "train", "--resume", str(place / "runs/full")).wait() == 0
    whole, full = final(place / "runs/whole"), final(place / "runs/full")
    assert all(torch.equal(whole[n], full[n]) for n in whole)
