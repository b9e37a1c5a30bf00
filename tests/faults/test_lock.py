"""Two processes never write into one run, and a lock dies with its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scrimp.errors import UserError
from scrimp.inference import evaluate, export
from scrimp.training import train
from tiny import recipe

HANGS = """
import sys, time
from scrimp.training import train
def observe(event, fields):
    if event == "checkpoint":
        print("saved", flush=True)
        time.sleep(600)
train(resume=sys.argv[1], observe=observe)
"""


def begun(folder: Path) -> Path:
    """A run of 8 steps that was cut off at step 4."""
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"item {i} " * 60)
    data = {"source": str(folder / "*.txt"), "tokenizer": "bytes", "context": 16, "holdout": 0.3}

    def cut(event: str, fields: dict[str, Any]) -> None:
        if event == "checkpoint":
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        train(recipe(data=data, out=str(folder), name="r", checkpoint={"every": "4 step"}), observe=cut)
    return folder / "r"


def test_a_run_has_one_writer_and_any_readers(tmp_path: Path) -> None:
    run, heard = begun(tmp_path), list[str]()

    def meanwhile(event: str, fields: dict[str, Any]) -> None:
        if event == "step" and fields["step"] == 6:
            with pytest.raises(UserError) as error:
                train(resume=run)
            heard.append(str(error.value))
            assert evaluate(run, 1)["loss"] > 0
            export(run, tmp_path / "hf")

    assert train(resume=run, observe=meanwhile).run.clock.step == 8
    assert heard == [f"{run}: process {os.getpid()} is training this run. "
                     "Wait until it ends, or stop it; then use --resume."]  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    run = begun(tmp_path)
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", HANGS, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"saved\n"
        with pytest.raises(UserError, match=f"process {process.pid} is training this run"):
            train(resume=run)
        process.kill()
    assert train(resume=run).run.clock.step == 8
