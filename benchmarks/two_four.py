"""2:4 training: `python benchmarks/two_four.py [--steps 500] [--seeds 3]` -> evidence/two_four.json.

A small GPT on the sources of Python's library, dense and with 2 of every 4 weights: by STE, by SR-STE, and by SR-STE
with masks that are 2:4 both ways. A row has the held-out `loss`, with masks where there are any, `sad`, how many
entries of masks changed from step to step, summed over steps, and the `weights` that have masks. Rows are written one
by one, and those that are there are not measured again. Nothing here is a time: a CPU multiplies masked dense weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

import torch

from scrimp.folder import environment
from scrimp.recipe import Recipe
from scrimp.training import train

EVIDENCE: Final = Path(__file__).resolve().parents[1] / "evidence" / "two_four.json"
ARMS: Final[dict[str, dict[str, Any]]] = {
    "dense": {},
    "STE": {"two_four": {"decay": 0.0}},
    "SR-STE": {"two_four": {}},
    "SR-STE, both ways": {"two_four": {"transposable": True}},
}


def recipe_of(arm: str, steps: int, seed: int) -> Recipe:
    """The small GPT with an arm's techniques."""
    raw = {
        "model": {"layers": 2, "width": 64, "heads": 4},
        "data": {"source": "python-stdlib", "tokenizer": "bytes", "context": 64},
        "batch": 16,
        "duration": f"{steps} step",
        "seed": seed,
        "validate": {"every": f"{steps} step", "batches": 32},
        "sample": {"tokens": 0},
        "techniques": {"adamw": {"lr": 2e-3}, "warmup_cosine": {"warmup": 0.05}, "clip": {}, **ARMS[arm]},
    }
    return Recipe.read(raw)


def measured(arm: str, steps: int, seed: int) -> dict[str, Any]:
    """One row."""
    sad = 0.0

    def see(event: str, fields: dict[str, Any]) -> None:
        nonlocal sad
        if event == "step":
            sad += fields.get("two_four_changed", 0.0)

    result = train(recipe_of(arm, steps, seed), save=False, observe=see, force=True)
    masks = [b for name, b in result.run.model.named_buffers() if name.endswith("two_four.mask")]
    return {"loss": result.validation["loss"], "sad": sad, "weights": sum(m.numel() for m in masks), "steps": steps}


def main() -> None:
    """All rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(given.out.read_text())["rows"] if given.out.exists() else {}
    for seed in range(given.seeds):
        for arm in ARMS:
            key = f"{arm}/{seed}"
            if rows.get(key, {}).get("steps") == given.steps:
                continue
            rows[key] = measured(arm, given.steps, seed)
            print(key, rows[key], flush=True)
            about = {k: v for k, v in environment().items() if k != "command"}
            given.out.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
