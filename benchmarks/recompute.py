"""What running blocks again saves and costs: bytes and seconds of a training step, for each mode.

    python benchmarks/recompute.py                 # about six minutes on one thread
    python benchmarks/recompute.py --rounds 1 --evidence /tmp/try.json

A decoder of 12 blocks, width 256, context 256, batch 4. `kept` is what waits for the backward pass, `peak` the most
live bytes of forward and backward, both without weights and as shares of plain training. `time` is the processor's
seconds of a step over plain ones: medians of rounds in which every mode takes a step in turn. `predicted` is the time
that the schedule promises, a backward pass being twice a forward pass.

`sqrt` is what segments hold on chains of 4 to 48 blocks like these, as measured on tensors without values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from scrimp.folder import environment
from scrimp.meter import LiveBytes
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.remat.chain import Piece, best_segment, everything, segments, simulate
from scrimp.remat.given import Given
from scrimp.remat.measure import Link, measured
from scrimp.remat.program import cheapest
from scrimp.remat.rotor import optimal
from scrimp.run import Run, build
from scrimp.stages import new_clock

OUT: Final = Path(__file__).parents[1] / "evidence" / "recompute.json"
MODEL: Final = {"layers": 12, "width": 256, "heads": 4, "dropout": 0.0}
BATCH, CONTEXT, VOCAB = 4, 256, 512
MODES: Final[dict[str, dict[str, Any] | None]] = {
    "plain": None,
    "selective products": {"mode": "selective"},
    "selective half": {"mode": "selective", "save": "half"},
    "selective attention": {"mode": "selective", "save": "attention"},
    "every 2": {"mode": "block", "every": 2},
    "block": {"mode": "block"},
    "sqrt": {"mode": "sqrt"},
    "sqrt, segments of 3": {"mode": "sqrt", "segment": 3},
    "optimal 0.5": {"mode": "optimal", "budget": 0.5},
    "optimal 0.25": {"mode": "optimal", "budget": 0.25},
    "milp 0.5": {"mode": "milp", "budget": 0.5},
    "milp 0.25": {"mode": "milp", "budget": 0.25},
    "dynamic 0.5": {"mode": "dynamic", "budget": 0.5},
    "dynamic 0.25": {"mode": "dynamic", "budget": 0.25},
    "budget 0.5": {"budget": 0.5},
    "budget 0.25": {"budget": 0.25},
}


@dataclass(frozen=True)
class Noise:
    """Random tokens in memory."""

    context: int = CONTEXT

    def open(self) -> Any:
        """The opened data set."""
        return Opened(Windows(), Windows(), Letters())


@dataclass
class Opened:
    """What a run reads."""

    train: Windows
    validation: Windows
    tokenizer: Letters


class Letters:
    """The size of a vocabulary."""

    vocab, end = VOCAB, 0


class Windows:
    """Windows of random tokens."""

    count, context, vocab = 64, CONTEXT, VOCAB

    def __len__(self) -> int:
        return self.count

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Tokens of windows."""
        return {"tokens": self.windows(ids)}

    def windows(self, ids: np.ndarray) -> np.ndarray:
        """The same without names."""
        return np.random.default_rng(0).integers(0, VOCAB, (self.count, CONTEXT + 1))[np.asarray(ids)]


def made(settings: dict[str, Any] | None) -> Run:
    """A run of a mode."""
    more = [] if settings is None else [technique_class("recompute")(**settings)]
    model = MODEL | {"vocab": VOCAB, "context": CONTEXT}
    recipe = Recipe(
        model=model, data=Noise(), batch=BATCH, duration="8 step", techniques=(technique_class("sgd")(), *more)
    )
    data = recipe.data.open()
    return build(recipe, data, new_clock(recipe, data))


def one(run: Run) -> None:
    """Forward and backward."""
    assert run.backward and run.optimizer
    batch = run.batch(0)
    run.backward(batch, run.task.count(batch))
    run.optimizer.zero_grad(set_to_none=True)


def highest(run: Run) -> int:
    """Most live bytes of forward and backward."""
    with LiveBytes() as meter:
        one(run)
    return meter.peak


def waiting(run: Run) -> int:
    """Bytes that wait for the backward pass."""
    assert run.loss
    with LiveBytes() as meter:
        batch = run.batch(0)
        loss = run.loss(run.model, batch)
        found = meter.live
        del loss
    return found


def seconds(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Processor's seconds of a step: medians over rounds."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.process_time()
            one(run)
            found[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in found.items()}


def pieces_of(run: Run) -> list[Piece]:
    """What its blocks cost and hold."""
    links = [Link.of(block) for block in run.model.get_submodule("blocks").children()]
    given = Given.of((torch.empty(BATCH, CONTEXT, MODEL["width"], requires_grad=True), None, None, None), {}, False)
    assert given is not None
    return measured(links, given)


def promised(pieces: list[Piece], settings: dict[str, Any] | None) -> float | None:
    """Extra cost of a schedule, over a step without."""
    solve = {"optimal": optimal, "milp": cheapest}.get((settings or {}).get("mode", ""))
    if solve is None or settings is None:
        return None
    schedule = solve(pieces, int(settings["budget"] * everything(pieces)))
    assert schedule is not None
    return simulate(pieces, schedule)[1] / (3 * sum(p.cost for p in pieces))


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each mode")
    parser.add_argument("--only", default="", help="words that names of modes begin with, beside plain")
    parser.add_argument("--evidence", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {n: s for n, s in MODES.items() if n == "plain" or n.startswith(tuple(args.only.split(",")))}
    runs = {name: made(settings) for name, settings in chosen.items()}
    bytes_: dict[str, tuple[int, int]] = {}
    for name, run in runs.items():
        bytes_[name] = waiting(run), highest(run)
        print(f"{name:22s} {bytes_[name]}", flush=True)
    times = seconds(runs, args.rounds)
    pieces = pieces_of(runs["plain"])
    rows: dict[str, Any] = {}
    for name, settings in chosen.items():
        held, peak = bytes_[name]
        ratios = {"kept": held / bytes_["plain"][0], "peak": peak / bytes_["plain"][1]}
        rows[name] = {key: round(value, 4) for key, value in ratios.items()}
        rows[name] |= {"time": round(times[name] / times["plain"], 3), "kept_bytes": held, "peak_bytes": peak}
        extra = promised(pieces, settings)
        if extra is not None:
            rows[name]["predicted"] = round(1 + extra, 3)
        print(f"{name:22s} {rows[name]}", flush=True)
    chains: dict[str, Any] = {}
    for count in (4, 8, 12, 16, 24, 48):
        chain = (pieces * 4)[:count]
        root = round(count**0.5)
        held = {size: simulate(chain, segments(count, size))[0] / everything(chain) for size in {1, root}}
        chains[str(count)] = {"best": best_segment(chain), "block": round(held[1], 3), "naive": round(held[root], 3)}
        print(count, chains[str(count)])
    args.evidence.write_text(json.dumps({"about": environment(), "rows": rows, "sqrt": chains}, indent=1) + "\n")


if __name__ == "__main__":
    main()
