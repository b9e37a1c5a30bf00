"""What an update rule costs: its share of a training step, and the bytes it keeps for a weight.

    python benchmarks/optimizers.py                     # minutes on one core; writes evidence/optimizers.json
    python benchmarks/optimizers.py --workload A16k --batch 4 --only lamb
    python benchmarks/optimizers.py --steps 2 --out /tmp/optimizers.json     # does it run?

Every rule trains the same GPT on the same random tokens, as its card's defaults say. A step is the backward slot and
the rule's `step()`; validation, data and logging are left out. Each is timed by the wall clock and by the processor's,
which what else runs on the machine lengthens less; shares are of the processor's. Medians over the steps, of which the
first is not counted. What depends on the batch is the rest of the step: the rule's own part does not.

Bytes are those of all tensors of the optimizer's state, over the number of weights, against the states that the card
promises. Workloads are those of benchmarks/peers, and `small`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))

from workloads import WORKLOADS, Workload  # noqa: E402  # pyright: ignore[reportMissingImports]

from scrimp.folder import environment  # noqa: E402
from scrimp.groups import moments  # noqa: E402
from scrimp.recipe import Recipe  # noqa: E402
from scrimp.registry import modules, technique_class  # noqa: E402
from scrimp.run import Run, build  # noqa: E402
from scrimp.stages import new_clock  # noqa: E402

SMALL: Final = Workload(blocks=4, width=256, heads=4, vocab=8192, context=256, batch=4)
STATES: Final = {"adam": (2, 2), "adamw": (2, 2), "lamb": (2, 2), "lars": (1, 1), "lion": (1, 1), "sgd": (1, 1),
                 "muon": (1, 2)}  # fmt: skip
"""Rule -> the least and the most states a weight that its card promises, at its defaults. Muon's are one for hidden
matrices and two for the rest."""


class Windows:
    """Random tokens, the same for every rule."""

    def __init__(self, workload: Workload) -> None:
        self.context = workload.context
        self.tokens = np.random.default_rng(0).integers(0, workload.vocab, (64, workload.context + 1))

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        return {"tokens": self.windows(ids)}

    def windows(self, ids: np.ndarray) -> np.ndarray:
        return self.tokens[ids]


@dataclass(frozen=True)
class Random:
    """A data set of random tokens."""

    workload: Workload

    def open(self) -> Any:
        held = Windows(self.workload)
        return SimpleNamespace(train=held, validation=held, tokenizer=SimpleNamespace(vocab=self.workload.vocab, end=0))


def main() -> None:
    """Measure the rules that are asked for, print a table and replace their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="small", choices=["small", *WORKLOADS])
    parser.add_argument("--batch", type=int, default=0, help="windows a step, instead of the workload's")
    parser.add_argument("--steps", type=int, default=12, help="steps that count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="one rule")
    parser.add_argument("--out", type=Path, default=ROOT / "evidence" / "optimizers.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    workload = SMALL if args.workload == "small" else WORKLOADS[args.workload]
    workload = replace(workload, batch=args.batch or workload.batch)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    for name in rules():
        if args.only in ("", name):
            rows[name] = row(name, args.workload, workload, args.steps)
            print(line(name, rows[name]), flush=True)
            args.out.parent.mkdir(exist_ok=True)
            args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def rules() -> list[str]:
    """Every update rule there is."""
    return [name for name in sorted(modules()) if "update rule" in technique_class(name).card.sets]


def row(name: str, title: str, workload: Workload, steps: int) -> dict[str, Any]:
    """One rule's costs."""
    run = run_of(name, workload)
    times = [timed(run) for _ in range(steps + 1)][1:]
    weights = sum(p.numel() for p in run.model.parameters())
    assert run.optimizer is not None
    kinds = moments(run.optimizer, dict(run.model.named_parameters()))
    kept = sum(t.numel() * t.element_size() for tensors in kinds.values() for t in tensors.values())
    card, (least, most) = technique_class(name).card, STATES.get(name, (None, None))
    width = next(run.model.parameters()).element_size()
    update, whole = (statistics.median(t[key] for t in times) for key in ("cpu", "cpu_step"))
    return {
        "workload": {"name": title, **vars(workload)},
        "weights": weights,
        "steps": steps,
        "seconds": {key: statistics.median(t[key] for t in times) for key in times[0]},
        "share": update / whole,
        "shares": sorted(t["cpu"] / t["cpu_step"] for t in times),
        "nanoseconds_a_weight": 1e9 * update / weights,
        "state_bytes": kept,
        "state_bytes_a_weight": kept / weights,
        "promised_bytes_a_weight": None if least is None else [least * width, most * width],
        "card": {"saves": card.saves, "costs": card.costs},
        "about": about(),
    }


def run_of(name: str, workload: Workload) -> Run:
    """A run of the workload with a rule."""
    raw = {
        "model": {"layers": workload.blocks, "width": workload.width, "heads": workload.heads, "dropout": 0.0},
        "batch": workload.batch, "duration": "1000 step", "techniques": {name: {}}, "log": {"tensorboard": False},
    }  # fmt: skip
    recipe = replace(Recipe.read(raw), data=Random(workload))
    data = recipe.data.open()
    return build(recipe, data, new_clock(recipe, data))


def timed(run: Run) -> dict[str, float]:
    """Seconds of a step: of the rule and of the whole, by both clocks."""
    assert run.backward and run.step and run.optimizer
    batch = run.batch(run.clock.step)
    count = run.task.count(batch)
    run.set_lr()
    began = time.perf_counter(), time.process_time()
    run.backward(batch, count)
    middle = time.perf_counter(), time.process_time()
    run.step()
    end = time.perf_counter(), time.process_time()
    run.optimizer.zero_grad(set_to_none=True)
    run.clock.tick(run.recipe.batch, int(count))
    return {
        "wall": end[0] - middle[0],
        "wall_step": end[0] - began[0],
        "cpu": end[1] - middle[1],
        "cpu_step": end[1] - began[1],
    }


def line(name: str, found: dict[str, Any]) -> str:
    """A row for reading."""
    promised, bytes_ = found["promised_bytes_a_weight"], found["state_bytes_a_weight"]
    kept = "unknown" if promised is None else "-".join(str(b) for b in sorted(set(promised)))
    return (
        f"{name:8} {1000 * found['seconds']['cpu']:8.1f} ms of {1000 * found['seconds']['cpu_step']:8.1f} ms a step, "
        f"{100 * found['share']:5.1f} %, {found['nanoseconds_a_weight']:5.2f} ns a weight; "
        f"{bytes_:5.2f} bytes of state a weight, promised {kept}"
    )


def about() -> dict[str, Any]:
    """Where and on what this was made."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    known = {key: value for key, value in environment().items() if key != "command"}
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "environment": known}


if __name__ == "__main__":
    sys.exit(main())
