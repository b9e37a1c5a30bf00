"""What fewer bits save and cost: `python benchmarks/precision.py [--steps 300] [--seeds 3]` -> evidence/precision.json.

Each arm trains a small GPT for the same number of steps. A row has `loss`, held out; `seconds` of the processor for all
steps, which are those of an emulation where `emulated` is true; `block_bytes`, what one more block keeps for its
backward pass; and `state_bytes`, the optimizer's states after the last step. Rows are written one by one, and those
that are there are not measured again. A full run takes about eight minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, Final

import torch

from scrimp.arrange import emulated
from scrimp.folder import environment
from scrimp.meter import LiveBytes
from scrimp.recipe import Recipe
from scrimp.run import build
from scrimp.stages import new_clock
from scrimp.training import train

EVIDENCE: Final = Path(__file__).resolve().parents[1] / "evidence" / "precision.json"
ARMS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "plain": {},
    "autocast": {"autocast": {}},
    "fp8, current": {"fp8": {"save": "fp8"}},
    "fp8, delayed": {"fp8": {"save": "fp8", "scaling": "delayed"}},
    "int8": {"int8": {"save": "int8"}},
    "int8, weights too": {"int8": {"save": "int8", "weights": "int8"}},
    "act, 8 bits": {"act": {"bits": 8}},
    "act, 4 bits": {"act": {"bits": 4}},
    "act, 2 bits": {"act": {"bits": 2}},
    "act, 3 bits on average": {"act": {"average": 3.0}},
    "low_bit_states, 8 bits": {"low_bit_states": {"bits": 8}},
    "low_bit_states, 4 bits": {"low_bit_states": {"bits": 4}},
}


def recipe_of(arm: dict[str, dict[str, Any]], steps: int, seed: int, layers: int = 2) -> Recipe:
    """The small GPT with an arm's techniques."""
    raw = {
        "model": {"layers": layers, "width": 64, "heads": 4},
        "data": {"source": "python-stdlib", "tokenizer": "bytes", "context": 64},
        "batch": 16,
        "duration": f"{steps} step",
        "seed": seed,
        "validate": {"every": f"{steps} step", "batches": 16},
        "sample": {"tokens": 0},
        "techniques": {"adamw": {"lr": 2e-3}, "warmup_cosine": {"warmup": 0.05}, "clip": {}, **arm},
    }
    return Recipe.read(raw)


def block_bytes(arm: dict[str, dict[str, Any]]) -> int:
    """What one more block keeps for its backward pass."""
    found: list[int] = []
    for layers in (2, 3):
        recipe = recipe_of(arm, 10, 0, layers)
        data = recipe.data.open()
        run = build(recipe, data, new_clock(recipe, data))
        batch, meter = run.batch(0), LiveBytes()
        meter.register([*run.model.parameters(), *run.model.buffers(), *batch.values()])
        before = meter.live
        assert run.loss is not None
        with meter:
            loss = run.loss(run.model, batch)
        found.append(meter.live - before)
        del loss
    return found[1] - found[0]


def measured(arm: dict[str, dict[str, Any]], steps: int, seed: int) -> dict[str, Any]:
    """One row."""
    recipe = recipe_of(arm, steps, seed)
    seconds, last = 0.0, time.process_time()

    def see(event: str, fields: dict[str, Any]) -> None:
        nonlocal seconds, last
        if event == "step":
            seconds += time.process_time() - last
        last = time.process_time()

    result = train(recipe, save=False, observe=see, force=True)
    states = [t for kind, tensors in result.run.state().items() if kind.startswith("optimizer.")
              for t in tensors.values()]  # fmt: skip
    return {
        "loss": result.validation["loss"],
        "steps": result.run.clock.step,
        "seconds": round(seconds, 3),
        "emulated": bool(emulated({t.name: t.card for t in recipe.techniques}, result.run.device.type)),
        "block_bytes": block_bytes(arm),
        "state_bytes": sum(t.nbytes for t in states),
    }


def main() -> None:
    """All rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default="", help="names with `; ` between them; all by default")
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [name for name in ARMS if not given.arms or name in given.arms.split("; ")]
    found = json.loads(given.out.read_text()) if given.out.exists() else {"rows": {}}
    for seed in range(given.seeds):
        for name in chosen:
            key = f"{name}/{given.steps}/{seed}"
            if key in found["rows"]:
                continue
            found["rows"][key] = {**measured(ARMS[name], given.steps, seed), "date": time.strftime("%Y-%m-%d")}
            found["environment"] = {k: v for k, v in environment().items() if k != "command"}
            given.out.write_text(json.dumps(found, indent=1) + "\n")
            print(key, found["rows"][key], flush=True)


if __name__ == "__main__":
    main()
