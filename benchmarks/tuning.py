"""Tuning methods on one small GPT: what each trains, holds and takes, and how far it gets in the same steps.

    python benchmarks/tuning.py                                   # under ten minutes on one core; writes its evidence
    python benchmarks/tuning.py --only lora --only bitfit
    python benchmarks/tuning.py --pretrain 20 --steps 4 --seeds 1 --out /tmp/tuning.json     # does it run?
    python benchmarks/tuning.py --plan                            # the table of docs/guides/prompts.md, in a minute

gpt-1m is trained on the interpreter's own library sources, and then tuned on other text: what their docstrings say,
which is English prose. Every registered tuning method takes part, with its defaults and in the variants of `ARMS`,
beside full tuning. Each is tried at the rates of `--rates` at the first seed, and trains with the other seeds at the
best of them. A seed draws what a method adds and the order of the data; the pre-trained weights are the same.

    trained      numbers that are trained, all biases and norms that belong to the method included
    peak_bytes   of live tensors in a step: weights, gradients, states and activations
    seconds      of the processor, a step; the median
    loss         of held-out windows after the last step, for each seed

`--plan` trains nothing: it prints what ways to tune a larger model would need, which has 12 blocks of width 768, 2048
rows in its vocabulary, four sequences of 512 tokens a batch, AdamW and float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from docstrings import pairs

from scrimp.errors import UserError
from scrimp.folder import environment
from scrimp.meter import LiveBytes
from scrimp.planning import plan
from scrimp.recipe import Recipe
from scrimp.registry import catalogue
from scrimp.restore import starting_weights
from scrimp.run import build
from scrimp.stages import new_clock
from scrimp.training import train

ROOT: Final = Path(__file__).resolve().parents[1]
EVIDENCE: Final = ROOT / "evidence" / "tuning.json"
SECTION: Final = "Parameter-efficient tuning"
ARMS: Final[dict[str, dict[str, Any]]] = {
    "full": {},
    "lora": {"lora": {}},
    "lora, attention.qkv": {"lora": {"targets": "attention.qkv"}},
    "lora, magnitude": {"lora": {"magnitude": True}},
    "adapter": {"adapter": {"bottleneck": 16}},
    "adapter, pfeiffer": {"adapter": {"placement": "pfeiffer", "bottleneck": 16}},
    "adapter, parallel": {"adapter": {"placement": "parallel", "bottleneck": 16}},
    "compacter": {"compacter": {"bottleneck": 16}},
}
"""Name -> techniques beside the update rule. Methods that stand in none have an arm with their defaults."""
QKV: Final = {"lora": {"rank": 8, "targets": "attention.qkv"}}
PLANNED: Final[dict[str, dict[str, Any]]] = {
    "all weights": {},
    "`lora` of rank 8 on attention.qkv": QKV,
    "`prompt` of 20": {"prompt": {}},
    "`prefix` of 20": {"prefix": {}},
    "`ladder`": {"ladder": {}},
    "`lora`, `quantized_base`": {**QKV, "quantized_base": {}},
    "`ladder`, `quantized_base`": {"ladder": {}, "quantized_base": {}},
    "`share` with `distinct: 1`": {"share": {"distinct": 1}},
}
"""Row of the table of `--plan` -> techniques beside AdamW."""
SHARED: Final[dict[str, Any]] = {"device": "cpu", "sample": {"tokens": 0}, "validate": {"every": 0, "batches": 0}}
DATA: Final[dict[str, Any]] = {"vocab": 2048, "context": 128}


def arms() -> dict[str, dict[str, Any]]:
    """Every arm."""
    known = {name for techniques in ARMS.values() for name in techniques}
    methods = [entry.name for entry in catalogue().values() if entry.card.section == SECTION]
    return ARMS | {name: {name: {}} for name in methods if name not in known}


@dataclass
class Bench:
    """The model, the texts, and the rows that are done."""

    place: Path
    out: Path
    steps: int
    seeds: int
    rates: list[float]
    pretrain: int
    rows: dict[str, Any] = field(default_factory=dict[str, Any])

    def prepare(self) -> dict[str, float]:
        """Train the base and write the text it is tuned on; returns the base's loss on that text."""
        folder = self.place / "base"
        raw = {**SHARED, "model": "gpt-1m", "data": DATA, "batch": 8, "duration": f"{self.pretrain} step",
               "techniques": {"adamw": {"lr": 2e-3}, "warmup_cosine": {}}, "out": str(self.place), "name": "base",
               "checkpoint": {"every": 0}, "log": {"tensorboard": False}}  # fmt: skip
        train(Recipe.read(raw))
        (self.place / "prose").mkdir()
        for i, found in enumerate(pairs()):
            with (self.place / f"prose/{i // 20:04d}.txt").open("a", encoding="utf-8") as file:
                file.write(found["doc"] + "\n")
        self.tokenizer = str(folder / "tokenizer.json")
        run = self.built(self.recipe({"sgd": {"lr": 0.0}}, 0))
        return self.held_out(run)

    def recipe(self, techniques: dict[str, Any], seed: int) -> Recipe:
        data = {**DATA, "source": str(self.place / "prose"), "tokenizer": self.tokenizer, "holdout": 0.1}
        raw = {**SHARED, "model": "gpt-1m", "data": data, "batch": 8, "duration": f"{self.steps} step", "seed": seed}
        return Recipe.read({**raw, "techniques": techniques})

    def built(self, recipe: Recipe) -> Any:
        """A run that starts from the base."""
        data = recipe.data.open()
        source = starting_weights(recipe, data, str(self.place / "base"))
        return build(recipe, data, new_clock(recipe, data), source=source)

    def held_out(self, run: Any) -> dict[str, float]:
        """Loss on held-out text."""
        held, size = run.data.validation, run.recipe.batch
        spans = [np.arange(i, i + size) for i in range(0, min(len(held), 16 * size) - size + 1, size)]
        batches = [run.task.batch(held.read(span), span) for span in spans]
        return run.evaluate(lambda model: run.task.evaluate(model, batches))

    def arm(self, name: str, techniques: dict[str, Any]) -> dict[str, Any]:
        """A row: all seeds at the best rate."""
        try:
            tried = {rate: self.trained(techniques, rate, 0) for rate in self.rates}
        except UserError as error:
            return {"refused": " ".join(str(error).split())}
        best = min(tried, key=lambda rate: tried[rate]["loss"])
        runs = [tried[best], *(self.trained(techniques, best, seed) for seed in range(1, self.seeds))]
        return {
            "techniques": techniques, "rate": best, "losses": [run["loss"] for run in runs],
            "rates": {str(rate): run["loss"] for rate, run in tried.items()},
            **{key: runs[0][key] for key in ("trained", "parameters", "peak_bytes")},
            "seconds": statistics.median(run["seconds"] for run in runs),
        }  # fmt: skip

    def trained(self, techniques: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
        """One run, step by step, so that its processor time and its live bytes are seen."""
        rules = {"adamw": {"lr": rate, "weight_decay": 0.0}, "warmup_cosine": {"warmup": 0.1}}
        run = self.built(self.recipe({**rules, **techniques}, seed))
        sizes = [(p.numel(), p.requires_grad) for p in run.model.parameters()]
        seconds: list[float] = []
        peak = 0
        for i in range(self.steps):
            began = time.process_time()
            if i == 1:  # with the optimizer's states, which the first step makes
                with LiveBytes() as meter:
                    meter.register([run.state(), dict(run.model.named_buffers())])
                    self.step(run)
                peak = meter.peak
            else:
                self.step(run)
                seconds.append(time.process_time() - began)
        return {
            "loss": self.held_out(run)["loss"], "trained": sum(n for n, on in sizes if on),
            "parameters": sum(n for n, _ in sizes), "peak_bytes": peak, "seconds": statistics.median(seconds),
        }  # fmt: skip

    def step(self, run: Any) -> None:
        """One step, as the loop does it."""
        batch = run.batch(run.clock.step)
        count = run.task.count(batch)
        run.set_lr()
        run.backward(batch, count)
        run.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.clock.tick(run.recipe.batch, int(count))

    def write(self, before: dict[str, float]) -> None:
        """All rows so far."""
        about = {"steps": self.steps, "seeds": self.seeds, "rates": self.rates, "pretrain": self.pretrain,
                 "model": "gpt-1m", "data": DATA, "batch": 8, "before": before["loss"]}  # fmt: skip
        self.out.write_text(
            json.dumps({"about": about, "rows": self.rows, "environment": environment()}, indent=1) + "\n"
        )


def planned(place: Path) -> None:
    """Print what tuning a larger model would need."""
    (place / "text.txt").write_text("A text of some words. " * 4000)
    print("| trained | numbers trained | peak, MiB | forward, GFLOP | backward, GFLOP |")
    print("| --- | --- | --- | --- | --- |")
    for name, techniques in PLANNED.items():
        raw = {**SHARED, "model": {"layers": 12, "width": 768, "heads": 12, "dropout": 0.0, "vocab": 2048},
               "data": {"source": str(place / "text.txt"), "tokenizer": "bytes", "context": 512},
               "batch": 4, "duration": "2 step", "techniques": {"adamw": {}, **techniques}}  # fmt: skip
        found = plan(Recipe.read(raw))
        (stage,) = found.stages
        flops = [round(stage.flops()[phase] / 1e9) for phase in ("forward", "backward")]
        print(f"| {name} | {stage.trained:,} | {found.live / 2**20:,.0f} | {flops[0]} | {flops[1]} |", flush=True)


def main() -> None:
    """Pre-train, tune with every arm, and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(arms()))
    parser.add_argument("--pretrain", type=int, default=600, help="Steps of the base.")
    parser.add_argument("--steps", type=int, default=40, help="Of tuning.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-2])
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    parser.add_argument("--plan", action="store_true", help="Print the plans of a larger model, and end.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if options.plan:
            planned(Path(place))
            return
        given = (options.steps, options.seeds, options.rates, options.pretrain)
        bench = Bench(Path(place), options.out, *given)
        before = bench.prepare()
        print(f"before: loss {before['loss']:.3f}", flush=True)
        for name, techniques in arms().items():
            if options.only and name not in options.only:
                continue
            row = bench.rows[name] = bench.arm(name, techniques)
            bench.write(before)
            print(f"{name:20} {told(row)}", flush=True)


def told(row: dict[str, Any]) -> str:
    """A row in words."""
    if "refused" in row:
        return row["refused"]
    loss, size = statistics.mean(row["losses"]), f"{row['trained']:9,} trained, {row['peak_bytes'] / 1e6:6.1f} MB"
    return f"{size}, {1000 * row['seconds']:5.0f} ms, loss {loss:.3f} at {row['rate']:g}"


if __name__ == "__main__":
    main()
