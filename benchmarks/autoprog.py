"""Automated progressive learning against hand stacking and fully decayed baselines, at equal and at less time.

    python benchmarks/autoprog.py                             # six arms, three seeds, about an hour on one thread
    python benchmarks/autoprog.py --only seconds              # the arms whose names hold a word
    python benchmarks/autoprog.py --steps 24 --out /tmp/a.json    # does it run? the numbers mean nothing

A GPT of 12 narrow blocks on the Python library's own text. Every arm decays its learning rate fully within its own
steps; `baseline, 150 steps` is what progressive learning has to beat, as it saves a quarter of the time by itself.
Seconds are those of all steps, searches included, by the wall clock; `rest` is everything else: building stages and
validating. The processor's seconds, of both, tell how much was waiting for other processes. Sequences that a candidate
truncates count with what is left, so that tokens differ between arms. Rows that `evidence/autoprog.json` has are kept,
unless `--again`: a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch

from scrimp.folder import environment
from scrimp.recipe import Recipe
from scrimp.training import train

ROOT: Final = Path(__file__).resolve().parents[1]
OUT: Final = ROOT / "evidence" / "autoprog.json"
STEPS: Final = 200
SEEDS: Final = (0, 1, 2)
SEARCH: Final = 0.36
"""Of each part of 50 steps: each of nine candidates is visited twice."""
BASE: Final[dict[str, Any]] = {
    "model": {"layers": 12, "width": 96, "heads": 4},
    "data": {"source": "python-stdlib", "vocab": 4096, "context": 128},
    "batch": 16,
    "validate": {"every": 1.0, "batches": 16},
    "checkpoint": {"every": 0},
    "sample": {"tokens": 0},
    "log": {"tensorboard": False},
}
RULES: Final[dict[str, Any]] = {
    "adamw": {"lr": 1e-3},
    "warmup_cosine": {"warmup": 0.1, "floor": 0.0},
    "clip": {"norm": 1.0},
}
ARMS: Final[dict[str, tuple[float, dict[str, Any]]]] = {
    "baseline": (1.0, {}),
    "baseline, three quarters": (0.75, {}),
    "autoprog, flops": (1.0, {"autoprog": {"search": SEARCH}}),
    "autoprog, seconds": (1.0, {"autoprog": {"search": SEARCH, "measure": "seconds"}}),
    "stack": (1.0, {"stack": {}}),
    "stack, evenly": (1.0, {"stack": {"at": [0.25, 0.5, 0.75], "depths": [6, 8, 10, 12], "order": "interleave"}}),
}
"""Name -> (share of the steps, techniques)."""


def main() -> None:
    """Train the rows that are missing, write each as it is done, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word that an arm's name must hold")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a whole run")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--again", action="store_true", help="replace rows that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    # Seeds outermost, so that what slows the machine for a while hits all arms alike.
    for seed in args.seeds:
        for arm, (share, techniques) in ARMS.items():
            name = f"{arm}, seed {seed}"
            if args.only not in arm or (name in rows and not args.again):
                continue
            rows[name] = row(arm, seed, round(share * args.steps), techniques)
            args.out.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n")
            print(line(name, rows[name]), flush=True)
    print(table(rows))


def row(arm: str, seed: int, steps: int, techniques: dict[str, Any]) -> dict[str, Any]:
    """One run: its loss, its seconds, and what it chose."""
    lines: list[dict[str, Any]] = []
    searching: list[bool] = []
    chosen: list[dict[str, Any]] = []
    stage: dict[str, Any] = {}

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            stage.update(search=any("compares" in remark for remark in fields["run"].remarks))
            decided = fields["run"].decisions.get("autoprog", {})
            if decided and decided["path"] not in [made["path"] for made in chosen]:
                chosen.append(decided)
        elif event == "step":
            lines.append(fields)
            searching.append(stage["search"])

    with tempfile.TemporaryDirectory() as folder:
        made = {**BASE, "techniques": {**RULES, **techniques}, "duration": f"{steps} step", "seed": seed}
        recipe = Recipe.read({**made, "out": folder, "name": "run"})
        data = recipe.data.open()
        began, spent = time.perf_counter(), time.process_time()
        result = train(recipe, data=data, save=False, observe=see)
        wall, spent = time.perf_counter() - began, time.process_time() - spent
    if result.reason != "finished":
        raise SystemExit(f"{arm} was {result.reason}: its row is not written.")
    seconds = [at["seconds"] for at in lines]
    return {
        "arm": arm,
        "seed": seed,
        "steps": len(lines),
        "tokens": sum(at["tokens"] for at in lines),
        "loss": result.validation["loss"],
        "seconds": sum(seconds),
        "search_seconds": sum(s for s, search in zip(seconds, searching, strict=True) if search),
        "rest": wall - sum(seconds),
        "processor_seconds": spent,
        "searches": chosen,
        "parameters": sum(p.numel() for p in result.run.model.parameters()),
        "recipe": {key: value for key, value in recipe.dump().items() if key not in ("out", "name")},
        "date": time.strftime("%Y-%m-%d"),
    }


def line(name: str, found: dict[str, Any]) -> str:
    """A row for reading; of an arm that searches, with the path of (depth, length)."""
    path = found["searches"][-1]["path"] if found["searches"] else []
    said = f", searches {found['search_seconds']:.1f} s, path {path}" if path else ""
    return f"{name:34} loss {found['loss']:.4f}, {found['steps']} steps, {found['seconds']:.1f} s{said}"


def table(rows: dict[str, Any]) -> str:
    """The mean of each arm over its seeds, and the range of the loss."""
    lines = ["arm                          seeds    loss   (range)            seconds  of them search   tokens"]
    for arm in ARMS:
        mine = [found for found in rows.values() if found["arm"] == arm]
        if mine:
            losses = [found["loss"] for found in mine]
            mean = {k: statistics.mean(found[k] for found in mine) for k in ("seconds", "search_seconds", "tokens")}
            lines.append(
                f"{arm:28} {len(mine):>5}  {statistics.mean(losses):.4f}  ({min(losses):.4f} to {max(losses):.4f})"
                f"  {mean['seconds']:>7.1f}  {mean['search_seconds']:>14.1f}  {mean['tokens']:>7,.0f}"
            )
    return "\n".join(lines)


def about() -> dict[str, Any]:
    """Where and on what this was made."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    known = {key: value for key, value in environment().items() if key != "command"}
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "environment": known}


if __name__ == "__main__":
    sys.exit(main())
