"""Sparse training at 4.4 % of the weights: what a method that chooses its weights is worth.

    python benchmarks/sparsity.py                       # all rows; about half an hour on one thread
    python benchmarks/sparsity.py --only rigl --seeds 1 # the rows whose names hold the word
    python benchmarks/sparsity.py --again               # what is in evidence/sparsity.json is run again

A net of 64, 128, 64 and 10 units on 600 of scikit-learn's digits, tested on the last 597 of a fixed shuffle, with Adam
and a batch of 128. `400` is 400 steps at a constant learning rate; `1000` is 1000 steps of a cosine to zero. All three
matrices are pruned, to 767 weights of 17,024, each by the technique of the catalogue through Scrimp's trainer. A row is
a method, a length and a seed; rows are written as they come, and those that are there are not run again.

`flops` is the share of the dense run's training FLOPs that products with sparse operands would take: 3 products a step,
of which the weight gradient's is dense in a step of rigl that exchanges; scoring counts as 1 (snip) and 4 (grasp) dense
steps, and a lottery as all its rounds. `seconds` shows that dense-stored masks save none. Batch and interval
were chosen among six pairs by set and rigl with two other seeds (100, 101), on the same test digits; the rest is
untuned and shared by all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.folder import environment
from scrimp.models.seams import Linear
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.technique import Technique
from scrimp.training import train

ROOT = Path(__file__).parents[1]
OUT = ROOT / "evidence" / "sparsity.json"
DENSITY, ROUNDS = 0.8**14, 14
"""Fourteen rounds of a lottery that prunes 20 %: 4.4 %."""
LENGTHS = {"400": 400, "1000": 1000}
EVERY = {"400": "20 step", "1000": "50 step"}
SCORING = {"snip": 1.0, "grasp": 4.0}
"""Dense steps that scoring costs."""


class MLP(nn.Module):
    """images [B, 64] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = (Linear(i, o, std=(2 / i) ** 0.5) for i, o in ((64, 128), (128, 64), (64, 10)))

    def forward(self, images: Tensor, sample: Tensor | None = None) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(images)))))


@dataclass(frozen=True)
class Net:
    """The options of a model of our own."""

    head: str = "classes"

    def build(self) -> nn.Module:
        """The model."""
        return MLP()


class Digits:
    """Rows of the digits."""

    context = 1

    def __init__(self, rows: slice) -> None:
        self.x, self.y = (part[rows] for part in digits())

    def __len__(self) -> int:
        return len(self.y)

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Some rows."""
        return {"images": self.x[ids], "labels": self.y[ids]}


@dataclass(frozen=True)
class Data:
    """600 to train on, 597 to test with."""

    def open(self) -> Any:
        """The rows in memory."""
        return SimpleNamespace(train=Digits(slice(600)), validation=Digits(slice(-597, None)), tokenizer=None,
                               gives=("images", "labels"), sizes={})  # fmt: skip


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels in units of their deviation, float32 [1797, 64], and labels, in a fixed order."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
    return x[order].astype(np.float32), y[order].astype(np.int64)


def arms(length: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """row -> technique and its settings."""
    moving = {"density": DENSITY, "interval": EVERY[length], "until": 0.75}
    return {
        "dense": ("", {}),
        "lottery": ("lottery", {"rounds": ROUNDS, "fraction": 0.2}),
        "lottery, other values": ("lottery", {"rounds": ROUNDS, "fraction": 0.2, "control": "reinit"}),
        "rigl": ("rigl", moving),
        "rigl, exploring": ("rigl", {**moving, "explore": True}),
        "set": ("set", {**moving, "decay": "cosine"}),
        "snip": ("snip", {"density": DENSITY}),
        "grasp": ("grasp", {"density": DENSITY}),
        "static, erk": ("static_sparse", {"density": DENSITY, "allocation": "erk"}),
        "static, uniform": ("static_sparse", {"density": DENSITY, "allocation": "uniform"}),
    }


def recipe(name: str, settings: dict[str, Any], length: str, seed: int) -> Recipe:
    """One row's recipe; a lottery's is as long as all its rounds."""
    steps = LENGTHS[length] * (ROUNDS + 1 if name == "lottery" else 1)
    made: list[Technique] = [technique_class("adam")(lr=1.2e-3, weight_decay=0.0)]  # type: ignore[call-arg]
    if length == "1000":
        made.append(technique_class("warmup_cosine")(warmup=0.0, floor=0.0))  # type: ignore[call-arg]
    if name:
        made.append(technique_class(name)(**{**settings, "params": "*"}))
    return Recipe(
        model=Net(), data=Data(), task="classify", techniques=tuple(made), batch=128, duration=f"{steps} step",
        seed=seed, device="cpu", validate={"every": 0}, checkpoint={"every": 0}, log={"tensorboard": False},  # type: ignore[arg-type]
        sample={"tokens": 0},  # type: ignore[arg-type]
    )  # fmt: skip


def row(name: str, settings: dict[str, Any], length: str, seed: int) -> dict[str, float]:
    """One run: test accuracy, what was left of the weights and of the FLOPs, seconds."""
    flops, spent, last = SCORING.get(name, 0.0), 0.0, {}

    def see(event: str, fields: dict[str, Any]) -> None:
        nonlocal flops, spent, last
        if event == "step":
            last = fields
            share = fields.get(f"{name}_flops", 1.0)
            flops += share if fields["updated"] else (2 * share + 1) / 3
            spent += fields["seconds"]

    run = train(recipe(name, settings, length, seed), save=False, observe=see, force=True).run
    held = run.data.validation
    batch = run.task.batch(held.read(np.arange(len(held))), np.arange(len(held)))
    assert run.evaluate is not None
    found = run.evaluate(lambda model: run.task.evaluate(model, [batch]))
    weights = [p for p in run.model.parameters() if p.ndim == 2]
    return {
        "accuracy": found["accuracy"],
        "density": sum(int((p != 0).sum()) for p in weights) / sum(p.numel() for p in weights),
        "exploration": last.get(f"{name}_exploration", last.get(f"{name}_density", 1.0)),
        "flops": flops / LENGTHS[length],
        "seconds": spent,
    }


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """Means and deviations over seeds."""
    tables: dict[str, dict[str, list[dict[str, float]]]] = {}
    for key, found in sorted(rows.items()):
        length, arm, _ = key.split("/")
        tables.setdefault(length, {}).setdefault(arm, []).append(found)
    return {
        length: {
            arm: {"seeds": len(found), "mean": statistics.mean(r["accuracy"] for r in found),
                  "std": statistics.stdev([r["accuracy"] for r in found]) if len(found) > 1 else 0.0,
                  **{k: statistics.mean(r[k] for r in found) for k in ("density", "exploration", "flops", "seconds")}}
            for arm, found in table.items()
        }
        for length, table in tables.items()
    }  # fmt: skip


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose names hold this")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="run rows that are there again")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(given.out.read_text())["rows"] if given.out.exists() else {}
    for seed in range(given.seeds):
        for length in LENGTHS:
            for arm, (name, settings) in arms(length).items():
                key = f"{length}/{arm}/{seed}"
                if given.only not in key or (key in rows and not given.again):
                    continue
                rows[key] = row(name, settings, length, seed)
                print(key, {k: round(v, 4) for k, v in rows[key].items()}, flush=True)
                given.out.write_text(json.dumps({"about": about(), "summary": summary(rows), "rows": rows}, indent=1))
    for length, table in summary(rows).items():
        print(f"\n{length} steps{'':17} accuracy          density  explored  FLOPs   seconds")
        for arm, r in sorted(table.items(), key=lambda item: -item[1]["mean"]):
            print(f"{arm:24} {r['mean']:.4f} +- {r['std']:.4f}  {r['density']:7.4f}  {r['exploration']:8.3f} "
                  f"{r['flops']:6.3f}  {r['seconds']:8.2f}")  # fmt: skip


def about() -> dict[str, Any]:
    """Where and on what this was made."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    known = {key: value for key, value in environment().items() if key != "command"}
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "environment": known}


if __name__ == "__main__":
    sys.exit(main())
