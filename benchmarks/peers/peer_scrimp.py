"""Scrimp: `scrimp train recipe.yaml`, measured from outside by its metrics.jsonl and /proc. Standard library only."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import Recorder
from workloads import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Job, read_job

POLL = 0.02
"""Seconds between two looks at the metrics."""


def recipe(job: Job) -> dict[str, Any]:
    """The workload as a recipe. `options.techniques` are added to AdamW and clipping."""
    w = job.workload
    return {
        "model": {"layers": w.blocks, "width": w.width, "heads": w.heads, "activation": "gelu", "dropout": 0.0},
        "data": {
            "source": f"{job.data}/text.jsonl", "tokenizer": f"{job.data}/tokenizer.json", "context": w.context,
            "cache": f"{job.data}/scrimp",
        },
        "batch": w.batch, "duration": f"{job.steps} step", "device": "cpu", "dtype": "float32",
        "techniques": {
            "adamw": {"lr": LEARNING_RATE, "betas": list(BETAS), "weight_decay": WEIGHT_DECAY},
            "clip": {"norm": CLIP},
            **{name: {} for name in job.options["techniques"]},
        },
        "validate": {"every": 0, "batches": 1}, "checkpoint": {"every": 0}, "sample": {"tokens": 0},
        "log": {"tensorboard": False}, "out": job.scratch, "name": "run",
    }  # fmt: skip


def steps(path: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """The lines of training steps, each as soon as it is written."""
    while not path.exists():
        if process.poll() is not None:
            return
        time.sleep(POLL)
    with path.open(encoding="utf-8") as file:
        partial = ""
        while True:
            partial += file.readline()
            if partial.endswith("\n"):
                line, partial = json.loads(partial), ""
                if "seconds" in line:
                    yield line
            elif process.poll() is not None:
                return
            else:
                time.sleep(POLL)


def main() -> None:
    """Start the command line, record its steps, and end with its exit code."""
    job = read_job()
    path = Path(job.scratch) / "recipe.yaml"
    path.write_text(json.dumps(recipe(job), indent=1), encoding="utf-8")  # JSON is YAML
    process = subprocess.Popen([job.options["scrimp"], "train", str(path)])
    record = Recorder(job.lines, process.pid)
    before = None
    for line in steps(Path(job.scratch) / "run" / "metrics.jsonl", process):
        # From line to line, so that what Scrimp does between two steps counts, as it does for the other peers.
        record.mark(line["seconds"] if before is None else line["time"] - before)
        before = line["time"]
        if record.steps == job.steps:
            break
    sys.exit(process.wait())


if __name__ == "__main__":
    main()
