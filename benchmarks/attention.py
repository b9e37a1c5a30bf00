"""What attention loses when pairs are left out: `python benchmarks/attention.py [--steps 400] [--seeds 2]`.

Two small models, one of images (digits of 8 x 8 squares, a token each) and one of text (Python's own library), are
trained in full. Then every core that chooses pairs is put into them, at several settings, in two ways: `as it is`, on
batches that calibrate thresholds and draw masks but change no weight, and `tuned`, with as many steps of training. Rows
have `loss` and, of images, `accuracy` on held-out items; `kept`, the share of the pairs seen that some held-out items
computed; and `machines`, the seconds and joules that each accelerator needs for the masks of these items. The rows of
`all pairs` are for the same accelerators without their approximation: speed-ups are ratios to them.

`memory` rows have the live bytes that the forward and the backward pass of one head of 64 numbers need at their peak:
tiled, and with the matrix of scores; they are counted on tensors without values.

All go into evidence/attention.json, one by one; those that are there are not measured again. A full run takes under an
hour on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from growth import digits, kept
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scrimp.cores import traced
from scrimp.machines.accelerators.architecture import Accelerator, accelerator
from scrimp.machines.accelerators.collect import collect, held_out
from scrimp.machines.accelerators.report import simulate
from scrimp.meter import LiveBytes
from scrimp.recipe import Recipe
from scrimp.run import Run
from scrimp.techniques.attention.flash import FlashCore
from scrimp.training import train

EVIDENCE: Final = Path(__file__).resolve().parents[1] / "evidence" / "attention.json"
CORES: Final[dict[str, list[dict[str, Any]]]] = {
    "a3": [{"steps": s, "weight": w} for s, w in ((4.0, 0.02), (2.0, 0.05), (0.5, 0.05), (0.125, 0.1))],
    "elsa": [{"p": p, "calibrate": 4} for p in (0.5, 1.0, 2.0, 4.0)],
    "sanger": [{"threshold": t} for t in (0.005, 0.01, 0.02, 0.05)],
    "dota": [{"keep": share} for share in (0.5, 0.25, 0.1, 0.05)],
    "vitcod": [{"theta": theta, "heads": 1.0} for theta in (0.9, 0.7, 0.5, 0.3)],
}
EXACT: Final = {"a3": "a3", "elsa": "elsa_base", "sanger": "sanger", "dota": "dota", "vitcod": "vitcod"}
"""Technique -> its accelerator without approximation; DOTA's detector is off."""
ITEMS: Final = 8
"""Held-out items whose masks are counted and simulated."""
LENGTHS: Final = (512, 1024, 2048, 4096, 8192)
RULE: Final = {"adamw": {"lr": 2e-3, "weight_decay": 0.05}, "warmup_cosine": {"warmup": 0.1, "floor": 0.0}, "clip": {}}
GENTLE: Final = {**RULE, "adamw": {"lr": 3e-4, "weight_decay": 0.05}}
STILL: Final = {"sgd": {"lr": 0.0}}
"""A rule that changes no weight."""


def recipe_of(model: str, source: str, steps: int, seed: int, folder: Path, techniques: dict[str, Any]) -> Recipe:
    """A run of one of the two models."""
    kinds: dict[str, dict[str, Any]] = {
        "images": {
            "model": {"name": "vision", "patch": 4, "layers": 3, "width": 64, "heads": 4, "init_std": 0.1},
            "task": "classify",
            "data": {"name": "images", "source": source, "holdout": 0.3, "cache": str(folder)},
        },
        "text": {
            "model": {"layers": 3, "width": 64, "heads": 4},
            "data": {"source": source, "tokenizer": "bytes", "context": 64},
        },
    }
    raw = {
        **kinds[model],
        "batch": 32,
        "duration": f"{steps} step",
        "seed": seed,
        "out": str(folder),
        "name": f"{model}-{seed}",
        "log": {"tensorboard": False},
        "validate": {"every": f"{steps} step", "batches": 16},
        "sample": {"tokens": 0},
        "techniques": techniques,
    }
    return Recipe.read(raw)


def machines(core: dict[str, Any]) -> dict[str, Accelerator]:
    """Technique -> its accelerator: exact where no core is given; A3 searches as many steps as the core."""
    if not core:
        found = {name: accelerator(exact) for name, exact in EXACT.items()}
        return found | {"dota": with_setting(found["dota"], "detect", 0.0)}
    approximate = {"a3": "a3_conservative", "elsa": "elsa"}
    found = {name: accelerator(approximate.get(name, exact)) for name, exact in EXACT.items()}
    if "a3" in core:
        found["a3"] = with_setting(found["a3"], "iterations", core["a3"]["steps"])
    return found


def with_setting(machine: Accelerator, name: str, value: float) -> Accelerator:
    """A machine with another number."""
    return machine.model_copy(update={"settings": {**machine.settings, name: value}})


def scores(run: Run, validation: dict[str, float], core: dict[str, Any]) -> dict[str, Any]:
    """The last validation's, the share of the pairs seen that held-out items compute, and what machines need for it."""
    assert run.evaluate is not None
    items = list(held_out(run, ITEMS))
    computed = seen = 0
    with traced(run.model) as cores:
        for item in items:
            run.evaluate(lambda model, batch=item: run.task.loss(model, batch))
            masks = [each.trace for each in cores.values()]
            computed += sum(int(t.mask.sum()) for t in masks)
            seen += sum(int(t.seen.expand_as(t.mask).sum()) for t in masks)
    traces = collect(run, items)
    reports = {name: simulate(traces, machine) for name, machine in machines(core).items()}
    needed = {
        name: {"seconds": each.seconds, "joules": each.joules_by_events, "joules_by_power": each.joules_by_power}
        for name, each in reports.items()
    }
    return {**validation, "kept": round(computed / seen, 5) if seen else 1.0, "machines": needed}


def rows_of(model: str, source: str, given: argparse.Namespace, seed: int, folder: Path) -> None:
    """The rows of a model and a seed."""
    whole = recipe_of(model, source, given.steps, seed, folder, RULE)
    start = folder / f"{model}-{seed}"

    def trained() -> Path:
        if not start.exists():
            train(whole, force=True)
        return start

    def row(rule: dict[str, Any], core: dict[str, Any]) -> dict[str, Any]:
        recipe = recipe_of(model, source, given.tune, seed + 1000, folder, {**rule, **core})
        result = train(recipe, start=trained(), save=False, force=True)
        return scores(result.run, result.validation, core)

    for way, rule in (("as it is", STILL), ("tuned", GENTLE)):
        place = f"{given.steps}+{given.tune}/{seed}"
        kept(given.out, f"{model}/all pairs/{way}/{place}", lambda r=rule: row(r, {}))
        for name, arms in CORES.items():
            for settings in arms:
                said = ", ".join(f"{key} {value}" for key, value in settings.items())
                key = f"{model}/{name}, {said}/{way}/{place}"
                kept(given.out, key, lambda r=rule, n=name, s=settings: row(r, {n: s}))


def peak(tokens: int, tiled: bool) -> int:
    """Live bytes at the peak of both passes of one causal head."""

    def scored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        return ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v

    core = FlashCore("tiled", 196608)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 1, tokens, 64, requires_grad=True) for _ in range(3))
        with LiveBytes() as meter:
            y = core(q, k, v, True) if tiled else scored(q, k, v)
            y.backward(torch.empty_like(y))
    return meter.peak


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tune", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--models", default="images text")
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for tokens in LENGTHS:
        kept(given.out, f"memory/{tokens}", lambda n=tokens: {"tiled": peak(n, True), "scores": peak(n, False)})
    with TemporaryDirectory() as place:
        folder = Path(place)
        for model in given.models.split():
            source = digits(folder) if model == "images" else "python-stdlib"
            for seed in range(given.seeds):
                rows_of(model, source, given, seed, folder)


if __name__ == "__main__":
    main()
