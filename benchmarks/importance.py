"""Importance sampling against uniform batches: what variance it saves, and what that is worth in seconds.

    python benchmarks/importance.py              # some minutes on one thread; writes evidence/importance.json

A small vision Transformer learns scikit-learn's digits. `uniform` and the other arms train as many steps; `importance`
samples when the paper's rule says that it pays, `importance, always` from the first step. `uniform, same seconds`
trains for as many steps as fit into the seconds of the latter, fully decayed. tau is how many times larger a uniform
batch would have to be for as little variance; `sampling` is the share of the steps that sampled. `variance` is measured
on the model that `uniform` ends with: the mean squared distance of one item's weighted gradient from that of all
candidates, for items drawn uniformly, by the bound, and by the exact norms of their gradients, the least there can be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrimp.folder import environment
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.run import Run
from scrimp.scoring.outputs import logits_and_targets, squared_errors
from scrimp.training import train

ROOT = Path(__file__).parents[1]
OUT = ROOT / "evidence" / "importance.json"
CANDIDATES = 96


def main() -> None:
    """Run what is not there yet, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {"about": environment(), "rows": {}}
    with TemporaryDirectory() as place:
        base = digits(Path(place), args.steps)
        for seed in range(args.seeds):
            rows = found["rows"].setdefault(str(seed), {})
            if "uniform" not in rows:
                rows["uniform"], run = measured(base, seed)
                rows["variance"] = variance(run)
            for name, threshold in {"importance": 0.0, "importance, always": 1e-9}.items():
                if name not in rows:
                    chosen = (*base.techniques, technique_class("importance")(threshold=threshold))
                    rows[name], _ = measured(replace(base, techniques=chosen), seed)
            if "uniform, same seconds" not in rows:
                steps = round(args.steps * rows["importance, always"]["seconds"] / rows["uniform"]["seconds"])
                rows["uniform, same seconds"], _ = measured(replace(base, duration=f"{steps} step"), seed)
            OUT.write_text(json.dumps(found, indent=1) + "\n")
            print(seed, json.dumps(rows), flush=True)


def digits(place: Path, steps: int) -> Recipe:
    """Images: 1,258 to train on."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    np.savez(place / "digits.npz", x=(x.reshape(-1, 8, 8) * 15).astype(np.uint8), y=y)
    return Recipe.read({
        "model": {"name": "vision", "patch": 2, "layers": 3, "width": 48, "heads": 4, "init_std": 0.1},
        "data": {"name": "images", "source": f"{place}/digits.npz", "holdout": 0.3, "cache": str(place)},
        "task": "classify", "batch": 32, "duration": f"{steps} step", "log": {"tensorboard": False},
        "techniques": {"adamw": {"lr": 2e-3, "weight_decay": 0.05}, "warmup_cosine": {"warmup": 0.1, "floor": 0.0}},
        "validate": {"every": 1.0, "batches": 100}, "checkpoint": {"every": 0},
    })  # fmt: skip


def measured(recipe: Recipe, seed: int) -> tuple[dict[str, float], Run]:
    """Error, loss, seconds of the processor, and the means of tau and of sampling; and the run."""
    lines: list[dict[str, Any]] = []
    began = time.process_time()
    result = train(replace(recipe, seed=seed), save=False, force=True,
                   observe=lambda event, fields: lines.append(fields) if event == "step" else None)  # fmt: skip
    scores = result.validation
    row = {"error": 1 - scores["accuracy"], "loss": scores["loss"], "steps": len(lines),
           "seconds": time.process_time() - began}  # fmt: skip
    for name in ("tau", "sampling"):
        seen = [line[f"importance_{name}"] for line in lines if f"importance_{name}" in line]
        row |= {name: statistics.mean(seen)} if seen else {}
    return row, result.run


def variance(run: Run) -> dict[str, float]:
    """Mean squared distance of one drawn item's weighted gradient from the mean over candidates, by how it is drawn."""
    draw = np.random.default_rng(0).choice(len(run.data.train), CANDIDATES, replace=False)
    batch = run.task.batch(run.data.train.read(draw), draw)
    run.model.eval()
    grads = torch.stack([gradient(run, {name: value[i : i + 1] for name, value in batch.items()})
                         for i in range(CANDIDATES)])  # fmt: skip
    logits, targets = logits_and_targets(run.task, run.model, batch, "")
    bound = squared_errors(logits, targets).sum(1).sqrt().detach()
    mean, found = grads.mean(0), dict[str, float]()
    for name, lengths in {"uniform": torch.ones(CANDIDATES), "bound": bound, "exact": grads.norm(dim=1)}.items():
        chances = (lengths + 1e-9) / (lengths + 1e-9).sum()
        second = (grads.square().sum(1) / (CANDIDATES**2 * chances)).sum()
        found[name] = float(second - mean.square().sum())
    return found


def gradient(run: Run, item: dict[str, Tensor]) -> Tensor:
    """Of one item's loss, flat."""
    run.model.zero_grad()
    run.task.loss(run.model, item).backward()
    flat = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
    run.model.zero_grad()
    return flat


if __name__ == "__main__":
    main()
