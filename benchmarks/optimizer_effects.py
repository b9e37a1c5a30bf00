"""What update rules and the sharpness-aware family do to the loss of a small GPT, seed by seed against AdamW.

    python benchmarks/optimizer_effects.py                       # an hour or two on one core; writes its evidence
    python benchmarks/optimizer_effects.py --only esam+looksam
    python benchmarks/optimizer_effects.py --steps 5 --seeds 2 --factors 1 --out /tmp/effects.json    # does it run?

Every arm trains gpt-1m on the interpreter's own library sources, with a warm-up and a cosine over its own length. It
is tried at its learning rate times each of `--factors` at the first seed; at the best of them it trains with the other
seeds. The sharpness-aware arms use AdamW, at the rate that was best for AdamW. Losses are those of held-out windows
after the last step. Differences are paired by seed, with Student's t (`scrimp.significance`): with three seeds only
large ones are seen. The number of steps is the same for all, and a step of sam is twice the work: `processor_seconds`
tells what it took.

A run's row is written when it is done, and none is made twice; rows made with other settings are refused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from scrimp.folder import environment
from scrimp.recipe import Recipe
from scrimp.significance import paired
from scrimp.training import train

ROOT: Final = Path(__file__).resolve().parents[1]
BASE: Final = "adamw"
RATES: Final = {"adamw": 1e-3, "adam": 1e-3, "lamb": 5e-3, "lars": 3.0, "lion": 3e-4, "muon": 3e-3, "sgd": 0.3}
"""Rule -> its learning rate at a factor of 1."""
SHARPER: Final[dict[str, dict[str, Any]]] = {
    "sam": {},
    "esam": {},
    "looksam": {},
    "looksam, k=2": {"k": 2},
}
"""Arms beside AdamW -> settings of the technique that the name begins with."""


@dataclass
class Effects:
    """The runs in a file, and what was asked for."""

    out: Path
    steps: int
    seeds: int
    factors: list[float]
    runs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def __post_init__(self) -> None:
        if self.out.exists():
            found = json.loads(self.out.read_text())
            if found["recipe"] != self.base():
                raise SystemExit(f"{self.out} is of another recipe; give another --out, or remove it.")
            self.runs = found["runs"]

    def base(self) -> dict[str, Any]:
        """The recipe that all arms share."""
        return common(self.steps) | {"techniques": {BASE: {"lr": RATES[BASE]}, "warmup_cosine": {"warmup": 0.1}}}

    def arm(self, name: str) -> list[dict[str, Any]]:
        """The runs of an arm at its best rate, made where they are missing."""
        factor = self.best(name)
        return [self.run(name, factor, seed) for seed in range(self.seeds)]

    def best(self, name: str) -> float:
        """The factor of the learning rate with the least loss at the first seed."""
        name = BASE if rule_of(name) == BASE else name
        return min(self.factors, key=lambda factor: self.run(name, factor, 0)["loss"])

    def run(self, name: str, factor: float, seed: int) -> dict[str, Any]:
        """One run, from the file if it is there."""
        key = f"{name}, rate x {factor:g}, seed {seed}"
        if key not in self.runs:
            self.runs[key] = {"arm": name, "factor": factor, "seed": seed, **trained(name, factor, seed, self.steps)}
            print(f"{key:40} loss {self.runs[key]['loss']:.4f}  {self.runs[key]['seconds']:.0f} s", flush=True)
            self.write({})
        return self.runs[key]

    def write(self, arms: dict[str, Any]) -> None:
        """The file, with what the arms come to once all are done."""
        self.out.parent.mkdir(exist_ok=True)
        found = {"about": about(), "recipe": self.base(), "arms": arms, "runs": self.runs}
        self.out.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Make what is missing, print a table and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.3, 1.0, 3.0], help="of the learning rates tried")
    parser.add_argument("--only", default="", help="arms besides adamw, with + between them; all if empty")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "evidence" / "optimizer_effects.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    effects = Effects(args.out, args.steps, args.seeds, args.factors)
    known = [*RATES, *SHARPER]
    wanted = [name for name in args.only.split("+") if name] or known
    if set(wanted) - set(known):
        parser.error(f"--only knows {', '.join(known)}")
    base = effects.arm(BASE)
    arms = {name: summary(effects.arm(name), base) for name in [BASE, *(n for n in wanted if n != BASE)]}
    effects.write(arms)
    for name, found in arms.items():
        print(line(name, found))


def rule_of(name: str) -> str:
    """The update rule of an arm."""
    return BASE if name in SHARPER else name


def common(steps: int) -> dict[str, Any]:
    """What all runs share, as a recipe is written."""
    return {
        "model": {"preset": "gpt-1m"},
        "data": {"name": "text", "source": "python-stdlib", "vocab": 4096, "context": 128},
        "batch": 8, "duration": f"{steps} step", "validate": {"every": 1.0, "batches": 32}, "sample": {"tokens": 0},
        "log": {"tensorboard": False},
    }  # fmt: skip


def recipe_of(name: str, factor: float, seed: int, steps: int) -> Recipe:
    """An arm's recipe."""
    rule = rule_of(name)
    techniques = {rule: {"lr": RATES[rule] * factor}, "warmup_cosine": {"warmup": 0.1}}
    if name in SHARPER:
        techniques[name.partition(",")[0]] = SHARPER[name]
    return Recipe.read({**common(steps), "seed": seed, "techniques": techniques})


def trained(name: str, factor: float, seed: int, steps: int) -> dict[str, Any]:
    """The held-out loss after a run, and what it took."""
    seconds: list[float] = []
    began: list[float] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":  # The data are open by now.
            began.append(time.process_time())
        elif event == "step":
            seconds.append(fields["seconds"])

    recipe = recipe_of(name, factor, seed, steps)
    result = train(recipe, save=False, observe=see)
    if result.reason != "finished":
        raise SystemExit(f"{name} was {result.reason}: its row is not written.")
    return {
        "loss": result.validation["loss"],
        "seconds": sum(seconds),
        "processor_seconds": time.process_time() - began[0],
        "techniques": {t.name: t.settings() for t in recipe.techniques},
    }


def summary(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """What an arm comes to beside AdamW: means over seeds, and the difference paired by seed."""
    losses, other = [r["loss"] for r in runs], [r["loss"] for r in base]
    difference = paired(losses, other)
    gaps, several = [a - b for a, b in zip(losses, other, strict=True)], len(losses) > 1
    spent, usual = ([r["processor_seconds"] for r in many] for many in (runs, base))
    return {
        "factor": runs[0]["factor"],
        "techniques": runs[0]["techniques"],
        "loss": statistics.fmean(losses),
        "deviation": statistics.stdev(losses) if several else None,
        "difference": difference.mean,
        "deviation_of_differences": statistics.stdev(gaps) if several else None,
        "interval": [difference.low, difference.high] if several else None,
        "p": None if runs == base else difference.p,
        "processor_seconds": statistics.fmean(spent),
        "time": statistics.fmean(a / b for a, b in zip(spent, usual, strict=True)),
    }


def line(name: str, found: dict[str, Any]) -> str:
    """An arm for reading."""
    spread = "" if found["deviation"] is None else f" +- {found['deviation']:.4f}"
    chance = "" if found["p"] is None else f", p = {found['p']:.3f}"
    return (
        f"{name:14} rate x {found['factor']:<4g} loss {found['loss']:.4f}{spread}, "
        f"{found['difference']:+.4f} beside {BASE}{chance}; {found['time']:.2f} of its processor time"
    )


def about() -> dict[str, Any]:
    """Where and on what this was made."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    known = {key: value for key, value in environment().items() if key != "command"}
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "environment": known}


if __name__ == "__main__":
    sys.exit(main())
