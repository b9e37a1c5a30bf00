"""Large batches: the linear scaling law, what its ramp is for, and whether the noise scale recommends the right batch.

    python benchmarks/large_batch.py                    # all rows that evidence/large_batch.json lacks
    python benchmarks/large_batch.py --only noise       # of one part: law, ramp or noise
    python benchmarks/large_batch.py --samples 256 --evidence try.json

law: distance between k steps of SGD on small batches and one step on all of them at k times the rate; it should fall by
four whenever the rate halves. ramp: a small batch, and one 16 times larger at 16 times the rate, without and with the
ramp from the unscaled rate, all on as many samples, on three seeds; a run that diverges has no loss. noise: the scale
measured along a run, and the held-out loss after as many samples for several batches, each at a rate scaled by the
square root of its batch. All train a `gpt-1m` on the interpreter's own library sources.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from scrimp.errors import UserError
from scrimp.folder import environment
from scrimp.recipe import Recipe
from scrimp.run import Run, build
from scrimp.stages import new_clock
from scrimp.training import train

ROOT: Final = Path(__file__).resolve().parents[1]
EVIDENCE: Final = ROOT / "evidence" / "large_batch.json"
PARTS: Final = ("law", "ramp", "noise")
SEEDS: Final = (0, 1, 2)
SMALL, LARGE, RATE = 8, 128, 0.1
"""Batches, and the rate of SGD for the small one."""
BATCHES: Final = (4, 8, 16, 32, 64, 128)
MEASURED: Final = 64
"""Batch of the run in which the noise scale is measured."""


def recipe(techniques: dict[str, Any], batch: int, samples: int, seed: int = 0, **more: Any) -> Recipe:
    """A small GPT on as many samples."""
    return Recipe.read(
        {
            "model": {"preset": "gpt-1m"},
            "data": {"source": "python-stdlib", "vocab": 2048, "context": 64},
            "batch": batch,
            "duration": f"{samples // batch} step",
            "seed": seed,
            "techniques": techniques,
            "validate": {"every": 1.0, "batches": max(1, 512 // batch)},
            "checkpoint": {"every": 0},
            "log": {"tensorboard": False},
            "sample": {"tokens": 0},
            **more,
        }
    )


def trained(made: Recipe) -> dict[str, Any]:
    """Held-out loss, steps and seconds of a run, and every line of its metrics."""
    with tempfile.TemporaryDirectory() as out:
        try:
            result = train(Recipe.read(made.dump() | {"out": out}))
        except UserError as error:
            return {"loss": None, "reason": error.what}
        if result.reason == "interrupted":
            raise KeyboardInterrupt
        assert result.folder is not None
        lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "updated" in line]
    seconds = sum(line["seconds"] for line in steps)
    return {"loss": result.validation["loss"], "steps": len(steps), "seconds": seconds, "lines": steps}


def law(lr: float, k: int = 8, size: int = 4) -> dict[str, Any]:
    """Distance between k steps at a rate and one at k times it, and the length of the latter."""
    sgd = {"lr": lr, "momentum": 0.0}
    scaled = {"sgd": sgd, "linear_scaling": {"base": size, "warmup": 0}}
    large = built(recipe(scaled, k * size, k * size, dtype="float64"))
    small = built(recipe({"sgd": sgd}, size, k * size, dtype="float64"))
    whole = large.batch(0)
    parts = [{name: t[i * size : (i + 1) * size] for name, t in whole.items()} for i in range(k)]
    start = [p.detach().clone() for p in large.model.parameters()]
    for run, batches in ((large, [whole]), (small, parts)):
        assert run.backward and run.step and run.optimizer
        for batch in batches:
            run.set_lr()
            run.backward(batch, run.task.count(batch))
            run.step()
            run.optimizer.zero_grad(set_to_none=True)
    return {"distance": apart(large, small.model.parameters()), "length": apart(large, start), "lr": lr, "k": k}


def built(made: Recipe) -> Run:
    """A run, ready to step."""
    data = made.data.open()
    return build(made, data, new_clock(made, data))


def apart(run: Run, others: Any) -> float:
    """Distance of a run's weights from others."""
    pairs = zip(run.model.parameters(), others, strict=True)
    return float(sum((a - b).detach().square().sum() for a, b in pairs)) ** 0.5


def ramp(kind: str, seed: int, samples: int) -> dict[str, Any]:
    """small, or large without or with the ramp."""
    techniques: dict[str, Any] = {"sgd": {"lr": RATE}, "warmup_linear": {"warmup": 0}}
    if kind != "small":
        techniques["linear_scaling"] = {"base": SMALL, "warmup": 0.25 if kind == "with" else 0}
    found = trained(recipe(techniques, SMALL if kind == "small" else LARGE, samples, seed))
    found["worst"] = max((line["loss"] for line in found.pop("lines", ())), default=None)
    return found


def adapted() -> dict[str, Any]:
    """AdamW, its rate scaled by the square root of the batch."""
    return {
        "adamw": {"lr": 1e-3},
        "warmup_cosine": {"warmup": 0.1},
        "linear_scaling": {"base": 32, "rule": "sqrt", "warmup": 0},
    }


def measured(samples: int) -> dict[str, Any]:
    """The noise scale along a run."""
    techniques = adapted() | {"noise_scale": {"parts": 8}}
    found = trained(recipe(techniques, MEASURED, samples))
    lines = found.pop("lines", ())
    shown = lines[:: max(1, len(lines) // 20)] + lines[-1:] if lines else ()
    found["scale"] = [
        {"step": line["step"], "loss": line["loss"], "b_simple": line["noise_scale_b_simple"]}
        for line in shown
        if "noise_scale_b_simple" in line
    ]
    return found


def swept(batch: int, seed: int, samples: int) -> dict[str, Any]:
    """The held-out loss of a batch."""
    found = trained(recipe(adapted(), batch, samples, seed))
    found.pop("lines", None)
    return found


def rows(samples: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every row's name and what measures it."""
    for lr in (4e-3, 2e-3, 1e-3, 5e-4):
        yield f"law/{lr:g}", partial(law, lr)
    for kind in ("small", "without", "with"):
        for seed in SEEDS:
            yield f"ramp/{kind}/{seed}", partial(ramp, kind, seed, samples)
    yield "noise/scale", partial(measured, samples)
    for batch in BATCHES:
        for seed in SEEDS:
            yield f"noise/batch-{batch}/{seed}", partial(swept, batch, seed, samples)


def main() -> None:
    """Measure what is missing; each row is written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--row", help="One row, by name, measured again.")
    parser.add_argument("--samples", type=int, default=6400, help="That each run trains on.")
    parser.add_argument("--evidence", type=Path, default=EVIDENCE)
    options = parser.parse_args()
    kept: dict[str, Any] = json.loads(options.evidence.read_text()) if options.evidence.exists() else {}
    for name, measure in rows(options.samples):
        wanted = name == options.row if options.row else name not in kept
        if not wanted or (options.only and not name.startswith(f"{options.only}/")):
            continue
        kept[name] = measure() | {"samples": options.samples, "environment": environment()}
        options.evidence.write_text(json.dumps(kept, indent=1) + "\n")
        print(name, {k: v for k, v in kept[name].items() if k not in ("environment", "scale")}, flush=True)


if __name__ == "__main__":
    main()
