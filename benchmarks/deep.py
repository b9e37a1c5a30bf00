"""Very deep and very thin: 48 blocks of 64 channels without warm-up, with norms, without, and with what replaces them.

    python benchmarks/deep.py                    # half an hour on an idle core; rows that are there are not run again
    python benchmarks/deep.py --only rezero      # the rows whose names hold the word
    python benchmarks/deep.py --steps 2 --out /tmp/deep.json

Every arm trains on the interpreter's own library sources with Adam at 1e-3 from the first step on, falling to zero over
the last fifth; all settings but the initialization are the same. `bare` takes the norms out and puts nothing in their
place; its weights are drawn as those of `rezero`. A row holds the first and the last loss (the mean of the last ten
steps), the highest, the validation's, and whether the run diverged: its loss is no number, or ends above that of
guessing every token with the same chance. `change` is the root mean square of what the first update does to the logits.
Rows of `evidence/deep.json` are written one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from scrimp.errors import UserError
from scrimp.folder import environment
from scrimp.normless import fill, take_out_norms
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.run import Run
from scrimp.technique import Card, Technique
from scrimp.training import train

ROOT: Final = Path(__file__).resolve().parents[1]
VOCAB: Final = 2048
ARMS: Final = ("bare", "pre-norm", "fixup", "rezero", "skipinit", "t_fixup")


@dataclass(frozen=True, kw_only=True)
class Bare(Technique):
    """No norms, and nothing instead."""

    card = Card(paper="none", section="Initialization", sets=("initialization", "normalization"))

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """No norms."""
        take_out_norms(model)
        return model

    def init(self, model: nn.Module, run: Run) -> nn.Module:
        """The weights that others draw without norms."""
        fill(model, run.seed, "rezero")
        return model


Bare.name = "bare"


def recipe(arm: str, seed: int, steps: int) -> Recipe:
    """The recipe of an arm."""
    names = {"bare": (Bare(),), "pre-norm": ()}
    own = names[arm] if arm in names else (technique_class(arm)(),)
    made = Recipe.read(
        {
            "model": {"layers": 48, "width": 64, "heads": 4},
            "data": {"source": "python-stdlib", "tokenizer": "bpe", "vocab": VOCAB, "context": 64},
            "batch": 8,
            "duration": f"{steps} step",
            "seed": seed,
            "techniques": {"adam": {"lr": 1e-3}, "wsd": {"warmup": 0, "decay": 0.2}},
            "validate": {"every": 1.0, "batches": 16},
            "checkpoint": {"every": 0},
            "sample": {"tokens": 0},
        }
    )
    return replace(made, techniques=(*made.techniques, *own))


def row(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """One run. A loss that is no number ends it, and is a result."""
    losses: list[float] = []
    seconds: list[float] = []
    change: list[float] = []
    before: list[Any] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            before.append((fields["run"], logits(fields["run"])))
        elif event == "step":
            losses.append(fields["loss"])
            seconds.append(fields["seconds"])
            if len(losses) == 1:
                run, first = before.pop()
                change.append(float((logits(run) - first).pow(2).mean().sqrt()))

    validation: dict[str, float] = {}
    error = ""
    try:
        result = train(recipe(arm, seed, steps), save=False, observe=see)
        validation = result.validation
        if result.reason == "interrupted":
            raise SystemExit("Interrupted; the rows that are written are whole.")
    except UserError as raised:
        error = str(raised)
    last = statistics.fmean(losses[-10:]) if losses and not error else math.nan
    return {
        "arm": arm, "seed": seed, "steps": len(losses), "first": number(losses[0]) if losses else None,
        "last": number(last), "highest": number(max(losses, default=math.nan)),
        "validation": number(validation.get("loss", math.nan)), "change": number(change[0]) if change else None,
        "diverged": not last < math.log(VOCAB), "error": error, "seconds_a_step": statistics.median(seconds or [0.0]),
        "losses": [number(loss) for loss in losses], "about": about(),
    }  # fmt: skip


@torch.no_grad()
def logits(run: Run) -> torch.Tensor:
    """Of the run's first batch."""
    return run.model(run.batch(0)["tokens"][:2, :64])


def number(value: float) -> float | None:
    """A number as JSON has it: six digits, and none for what is none."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def line(found: dict[str, Any]) -> str:
    """A row for reading."""
    verdict = "DIVERGED" if found["diverged"] else ""
    return (
        f"{found['arm']:10} seed {found['seed']}  {found['first']} -> {found['last']}, held out {found['validation']}, "
        f"first change {found['change']}, {found['seconds_a_step']:.2f} s a step {verdict}"
    )


def about() -> dict[str, Any]:
    """Where and on what this was made."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    known = {key: value for key, value in environment().items() if key != "command"}
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "environment": known}


def main() -> None:
    """Run the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word that an arm's name must hold")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "evidence" / "deep.json", help="JSON to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    for seed in range(args.seeds):
        for arm in ARMS:
            key = f"{arm}, seed {seed}"
            if args.only in arm and rows.get(key, {}).get("wanted") != args.steps:
                rows[key] = row(arm, seed, args.steps) | {"wanted": args.steps}
                args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                print(line(rows[key]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
