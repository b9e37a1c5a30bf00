"""What the shipped recipes for pairs learn: `python benchmarks/pair_tasks.py [NAME ...]` -> evidence/pairs_tasks.json.

Each recipe is trained once, on one thread; its task's metrics over held-out items are measured before and after, on the
same items. clip-emoji needs the folder that benchmarks/emoji.py made, as --emoji.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scrimp
from scrimp.clock import Clock
from scrimp.run import Run, build
from scrimp.stages import new_clock

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "evidence" / "pairs_tasks.json"
NAMES = ("bart-denoise", "clip-emoji")
MOST = 32
"""Batches of held-out items."""


def scores(run: Run) -> dict[str, float]:
    """The task's metrics over held-out items."""
    held, size = run.data.validation, run.recipe.batch
    count = min(len(held), MOST * size)
    spans = [np.arange(i, min(i + size, count)) for i in range(0, count, size)]
    batches = (run.task.batch(held.read(span), span) for span in spans)
    assert run.evaluate is not None
    return run.evaluate(lambda model: run.task.evaluate(model, batches))


def measured(name: str, changes: list[str]) -> dict[str, Any]:
    """One recipe, before and after."""
    recipe = scrimp.Recipe.load(ROOT / "recipes" / f"{name}.yaml", [*changes, "validate.every=0.25"])
    data = recipe.data.open()
    clock: Clock = new_clock(recipe, data)
    before = scores(build(recipe, data, clock))
    began, used = time.perf_counter(), time.process_time()
    result = scrimp.train(recipe, data=data, save=False)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    parameters = sum(p.numel() for p in result.run.model.parameters())
    kept = {
        key: value for key, value in data.meta.items() if key in ("documents", "tokens", "vocab", "classes", "faulty")
    }
    return {
        "recipe": recipe.dump(),
        "data": kept,
        "parameters": parameters,
        "held_out": len(data.validation),
        "before": before,
        "after": scores(result.run),
        "training_seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
    }


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    return {"commit": commit, "torch": torch.__version__, "python": platform.python_version(), "processor": model,
            "threads": torch.get_num_threads(), "cores": os.cpu_count()}  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the recipes for pairs, and write what they learned.")
    parser.add_argument("names", nargs="*", default=list(NAMES))
    parser.add_argument("--emoji", default="emoji", help="the folder that benchmarks/emoji.py made")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(EVIDENCE.read_text()) if EVIDENCE.exists() else {"runs": {}}
    for name in given.names:
        changes = [f"data.source={given.emoji}/emoji.jsonl"] if name == "clip-emoji" else []
        row = measured(name, changes)
        row["recipe"]["data"]["source"] = Path(row["recipe"]["data"]["source"]).name
        found["runs"][name] = row | {"environment": environment()}
        EVIDENCE.write_text(json.dumps(found, indent=1) + "\n")
        print(name, "before", row["before"], "after", row["after"], f"{row['training_seconds']} s")


if __name__ == "__main__":
    main()
