"""Models that shrink while they train, or are larger than they need be, against dense training.

    python benchmarks/slimming.py                    # all rows that evidence/slimming.json lacks
    python benchmarks/slimming.py --only expand      # rows whose names hold the word
    python benchmarks/slimming.py --steps 4 --seeds 1 --evidence /tmp/try.json

A decoder of about 3 million parameters on the library text of Python, with AdamW and a schedule that decays to zero at
the run's own end. Each arm is trained for the same steps; `dense@ARM` is dense training for as many steps as fit into
the arm's seconds, `small@dense` is the small model (of early_bird's sizes) in the dense run's seconds. Seconds are the
processor's, of training steps: for each stage its median step times its steps, so that other processes do not count.
Building stages and validation are not among them.

`lp` is Arora et al.'s demonstration: linear regression with an l2 and an l4 loss, of which the second is said to gain
from depth; for each depth the best of 17 learning rates after 3000 steps of gradient descent.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import torch

from scrimp.folder import environment
from scrimp.models.seams import Linear
from scrimp.recipe import Recipe
from scrimp.techniques.overparameterization.expand import Factors
from scrimp.training import train

OUT: Final = Path(__file__).parents[1] / "evidence" / "slimming.json"
MODEL: Final = {"layers": 4, "width": 192, "heads": 6}
SMALL: Final = {**MODEL, "heads": 4, "head_width": 32, "hidden": 460}
EARLY: Final = {"every": 0.02, "until": 0.25}
ARMS: Final[dict[str, dict[str, Any]]] = {
    "dense": {},
    "small": {},
    "early_bird, start": {"early_bird": {**EARLY, "rewind": "start"}},
    "early_bird, continue": {"early_bird": {**EARLY, "rewind": "continue"}},
    "expand": {"expand": {}},
    "expand, depth 3": {"expand": {"depth": 3}},
    "train_large": {"train_large": {}},
    "train_large, distill": {"train_large": {"distill": 0.5}},
}


def main() -> None:
    """Fill in the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word that a row's name must hold")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evidence", type=Path, default=OUT)
    parser.add_argument("--set", dest="data", action="append", default=[], help="of the data, such as vocab=512")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(args.evidence.read_text()) if args.evidence.exists() else {}
    rows = found.setdefault("rows", {})
    found["environment"], found["model"], found["small"], found["steps"] = environment(), MODEL, SMALL, args.steps
    more = {key: json.loads(value) for key, _, value in (word.partition("=") for word in args.data)}

    def fill(name: str, arm: str, seed: int, steps: int) -> None:
        key = f"{name}/{seed}"
        if key not in rows:
            rows[key] = measured(arm, seed, steps, more)
            args.evidence.write_text(json.dumps(found, indent=1) + "\n")
            print(key, {k: v if isinstance(v, list) else round(v, 4) for k, v in rows[key].items()}, flush=True)

    for seed in range(args.seeds):
        for arm in ARMS:
            # What others are compared with at equal seconds is always there.
            if args.only in arm or arm in ("dense", "small"):
                fill(arm, arm, seed, args.steps)
        dense = rows[f"dense/{seed}"]["seconds"] / args.steps
        for arm in ARMS:
            if arm not in ("dense", "small") and args.only in arm:
                fill(f"dense@{arm}", "dense", seed, max(1, round(rows[f"{arm}/{seed}"]["seconds"] / dense)))
        if args.only in "small@dense":
            each = rows[f"small/{seed}"]["seconds"] / args.steps
            fill("small@dense", "small", seed, max(1, round(dense * args.steps / each)))
    found["summary"] = summary(rows)
    if args.only in "lp" and "lp" not in found:
        found["lp"] = lp(3000 if args.steps > 50 else 30)
        print("lp", found["lp"])
    args.evidence.write_text(json.dumps(found, indent=1) + "\n")
    for name, line in found["summary"].items():
        print(
            f"{name:30} loss {line['loss']:.4f} ± {line['spread']:.4f}  {line['seconds']:.1f} s  {line['steps']} steps"
        )


def measured(arm: str, seed: int, steps: int, data: dict[str, Any]) -> dict[str, Any]:
    """Train an arm: validation loss, seconds, parameters at the end, and where it was cut."""
    raw = {
        "model": SMALL if arm == "small" else MODEL,
        "data": {"source": "python-stdlib", "tokenizer": "bpe", "vocab": 4096, "context": 128, **data},
        "techniques": {"adamw": {"lr": 2e-3}, "warmup_cosine": {"warmup": 0.1, "floor": 0.0}, "clip": {}, **ARMS[arm]},
        "batch": 8, "duration": f"{steps} step", "seed": seed,
        "validate": {"every": f"{steps} step", "batches": 32}, "sample": {"tokens": 0},
    }  # fmt: skip
    each: dict[int, list[float]] = defaultdict(list)
    last = time.process_time()

    def see(event: str, fields: dict[str, Any]) -> None:
        nonlocal last
        if event == "step":
            each[fields["stage"]].append(time.process_time() - last)
        last = time.process_time()

    result = train(Recipe.read(raw), observe=see, save=False)
    if result.reason == "interrupted":
        raise SystemExit("Interrupted; rows that are written are kept.")
    return {
        "loss": result.validation["loss"], "steps": steps,
        "seconds": sum(len(s) * statistics.median(s) for s in each.values()),
        "step_seconds": [statistics.median(s) for s in each.values()],
        "parameters": sum(p.numel() for p in result.run.model.parameters()), "cuts": result.run.clock.cuts,
    }  # fmt: skip


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds."""
    seeds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for key, row in rows.items():
        seeds[key.rpartition("/")[0]].append(row)
    return {
        name: {
            "loss": statistics.mean(r["loss"] for r in found),
            "spread": statistics.stdev(r["loss"] for r in found) if len(found) > 1 else 0.0,
            "seconds": statistics.mean(r["seconds"] for r in found), "steps": found[0]["steps"], "seeds": len(found),
        }
        for name, found in seeds.items()
    }  # fmt: skip


def lp(steps: int) -> dict[str, dict[str, float]]:
    """Loss of linear regression, 400 rows of 8 badly scaled columns: power of the loss -> depth -> the best loss."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=chance, dtype=torch.float64) * torch.logspace(0, -1, 8, dtype=torch.float64)
    y = x @ torch.randn(8, 1, generator=chance, dtype=torch.float64)
    first = torch.randn(1, 8, generator=chance, dtype=torch.float64) * 0.1

    def descended(power: int, depth: int, lr: float) -> float:
        layer = Linear(8, 1, bias=False).double()
        layer.load_state_dict({"weight": first})
        if depth > 1:
            factors = Factors(layer, depth, 1.0)
            for name, p in factors.named_parameters():
                factors.initialize(name, p.data, chance)
            layer.on("weight", "expand", "expand", factors)
        loss = torch.tensor(math.inf)
        for _ in range(steps):
            loss = ((layer(x) - y).abs() ** power).mean()
            if not torch.isfinite(loss):
                return math.inf
            parameters = list(layer.parameters())
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.data -= lr * g
        return float(loss.detach())

    rates = torch.logspace(-3, 1, 17).tolist()
    return {f"l{power}": {f"depth {depth}": min(descended(power, depth, lr) for lr in rates) for depth in (1, 2, 3)}
            for power in (2, 4)}  # fmt: skip


if __name__ == "__main__":
    main()
