"""What growing saves: `python benchmarks/growth.py [--suite text|images] [--steps 300]` -> evidence/growth.json.

Each arm trains a small model for the same number of steps, with a learning rate that decays to zero at its own end, and
is held against a baseline that does so too, as "No Train No Gain" (arXiv 2307.06440) asks. For each arm there is also a
second baseline, shortened to the arm's seconds and fully decayed by then: that is what the time would have bought
without the technique. Seconds are the processor's, on one thread: of all steps and of rebuilding at stages, not of
validation. Rows are written one by one, and those that are there are not measured again.

A row has `loss` (and `accuracy`), `seconds`, `curve` (step, seconds, loss) and, of arms, `ratio`, the arm's seconds by
the baseline's; `reached`, the seconds at which the arm first was as good as the baseline at its end, or null; and
`same_time`, the shortened baseline's row.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from scrimp.folder import environment
from scrimp.recipe import Recipe
from scrimp.registry import modules
from scrimp.training import train

ROOT: Final = Path(__file__).resolve().parents[1]
EVIDENCE: Final = ROOT / "evidence" / "growth.json"
TEXT: Final[dict[str, Any]] = {
    "model": {"layers": 12, "width": 96, "heads": 4},
    "data": {"source": "python-stdlib", "tokenizer": "bpe", "vocab": 2048, "context": 128},
}
IMAGES: Final[dict[str, Any]] = {
    "model": {"name": "vision", "layers": 6, "width": 64, "heads": 4, "patch": 4},
    "task": "classify",
}
ARMS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "text": {
        "stack": {"stack": {}},
        "stack, zero_new": {"stack": {"zero_new": True}},
        "widen": {"widen": {}},
        "compound_grow": {"compound_grow": {}},
        "layer_drop": {"layer_drop": {}},
        "length_warmup": {"length_warmup": {}},
        "autoprog": {"autoprog": {}},
    },
    "images": {
        "resolution_warmup": {"resolution_warmup": {}},
        "stack": {"stack": {}},
        "autoprog": {"autoprog": {}},
    },
}
"""Arm -> its techniques, with their defaults where nothing else is said."""


def recipe_of(suite: str, source: str, arm: dict[str, dict[str, Any]], steps: int, seed: int) -> Recipe:
    """A recipe of the suite with an arm's techniques."""
    base = TEXT if suite == "text" else IMAGES | {"data": {"name": "images", "source": source, "holdout": 0.2}}
    raw = base | {
        "batch": 16,
        "duration": f"{steps} step",
        "seed": seed,
        "validate": {"every": f"{max(1, steps // 10)} step", "batches": 16},
        "sample": {"tokens": 0},
        "techniques": {
            "adamw": {"lr": 1e-3},
            "warmup_cosine": {"warmup": 0.05, "floor": 0.0},
            "clip": {"norm": 1.0},
            **arm,
        },
    }
    return Recipe.read(raw)


def measured(recipe: Recipe, metric: str = "loss", **how: Any) -> dict[str, Any]:
    """One run, and a curve of a metric; `how` goes to `train`."""
    seconds, last, built = 0.0, time.process_time(), False
    curve: list[tuple[int, float, float]] = []

    def see(event: str, fields: dict[str, Any]) -> None:
        nonlocal seconds, last, built
        now = time.process_time()
        if event == "step" or (event == "stage" and built):
            seconds += now - last
        built = built or event == "stage"
        if event == "validation":
            curve.append((fields["step"], round(seconds, 3), fields[metric]))
        last = time.process_time()

    result = train(recipe, **{"save": False, "force": True, **how}, observe=see)
    if result.reason == "interrupted":
        raise SystemExit("The run was interrupted: its row is not written.")
    steps = result.run.clock.step
    return {
        **result.validation,
        "steps": steps,
        "seconds": round(seconds, 3),
        "parameters": sum(p.numel() for p in result.run.model.parameters()),
        "curve": curve,
    }


def compared(row: dict[str, Any], baseline: dict[str, Any], shorter: Any) -> dict[str, Any]:
    """An arm's row beside its baselines.

    Args:
        shorter: steps -> the row of a baseline with so many.
    """
    reached = next((seconds for _, seconds, loss in row["curve"] if loss <= baseline["loss"]), None)
    steps = max(1, round(row["seconds"] * baseline["steps"] / baseline["seconds"]))
    ratio = round(row["seconds"] / baseline["seconds"], 4)
    return row | {"ratio": ratio, "reached": reached, "same_time": shorter(steps)}


def digits(folder: Path) -> str:
    """scikit-learn's digits, 8 x 8 pixels, four times as large."""
    from sklearn.datasets import load_digits

    found = load_digits()
    large = (found.images * 15).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    np.savez(folder / "digits.npz", x=large, y=found.target.astype(np.int64))
    return str(folder / "digits.npz")


def kept(out: Path, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row: read if it is there, else measured and written."""
    found = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    if key not in found["rows"]:
        found["rows"][key] = {**make(), "date": time.strftime("%Y-%m-%d")}
        found["environment"] = {name: value for name, value in environment().items() if name != "command"}
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(key, {name: found["rows"][key].get(name) for name in ("loss", "seconds", "ratio", "reached")}, flush=True)
    return found["rows"][key]


def run(suite: str, source: str, steps: int, seed: int, arms: list[str], out: Path) -> None:
    """The rows of a suite and a seed that are not there yet."""

    def plain(count: int) -> dict[str, Any]:
        return measured(recipe_of(suite, source, {}, count, seed))

    plain(3)  # The first steps of a process are slow: they are not measured.
    baseline = kept(out, f"{suite}/baseline/{steps}/{seed}", lambda: plain(steps))
    for name, arm in ARMS[suite].items():
        if name in (arms or ARMS[suite]) and set(arm) <= set(modules()):
            recipe = recipe_of(suite, source, arm, steps, seed)
            kept(out, f"{suite}/{name}/{steps}/{seed}", lambda r=recipe: compared(measured(r), baseline, plain))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=["text", "images"], action="append", help="default both")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arm", action="append", default=[], help="one arm; default all")
    parser.add_argument("--images", default="", help="source of other images, such as Fashion-MNIST's folder")
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        for suite in given.suite or ["text", "images"]:
            source = given.images or digits(Path(place)) if suite == "images" else ""
            for seed in range(given.seeds):
                run(suite, source, given.steps, seed, given.arm, given.out)


if __name__ == "__main__":
    main()
