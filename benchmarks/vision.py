"""Vision: a classifier from scratch, a masked autoencoder, and a classifier that goes on from it.

    python benchmarks/vision.py                  # about ten minutes on one thread; writes evidence/vision.json
    python benchmarks/vision.py --only digits    # two minutes; replaces the rows whose names hold the word

The rows of `fashion` are the recipes of `recipes/` on Debian's dataset-fashion-mnist; those of `digits` are smaller,
on the 8 x 8 digits that scikit-learn ships. Accuracy is that of all held-out images, before the first step and after
the last; a masked autoencoder has a loss instead. Seconds are those of the steps, by the wall clock, on one thread; the
processor's seconds, of the whole run with its validations, tell how much of that was waiting for other processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from scrimp.folder import environment
from scrimp.plain import to_device
from scrimp.recipe import Recipe
from scrimp.run import Run
from scrimp.training import train

ROOT = Path(__file__).parents[1]
OUT = ROOT / "evidence" / "vision.json"
TRUNK = {"patch": 2, "layers": 3, "width": 64, "heads": 4, "init_std": 0.1}
RULES = {"adamw": {"lr": 2e-3, "weight_decay": 0.05}, "warmup_cosine": {"warmup": 0.1, "floor": 0.0}}
CLASSIFY = {"task": "classify", "batch": 32, "duration": "400 step", "techniques": RULES}


def main() -> None:
    """Train the arms that are asked for, print a table and replace their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word that a row's name must hold")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    with TemporaryDirectory() as folder:
        for name, (recipe, start) in (fashion(Path(folder)) | digits(Path(folder))).items():
            if args.only in name:
                rows[name] = row(name, recipe, start)
                OUT.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def fashion(folder: Path) -> dict[str, tuple[Recipe, Path | None]]:
    """The shipped recipes and what they are to be compared with: name -> recipe, run to start from."""

    def load(name: str, *words: str) -> Recipe:
        quiet = ("log.tensorboard=false", f"out={folder}")
        return Recipe.load(ROOT / "recipes" / f"{name}.yaml", [*quiet, *words])

    return {
        "mae-fashion": (load("mae-fashion"), None),
        "mae-fashion-finetune": (load("mae-fashion-finetune"), folder / "mae-fashion"),
        "mae-fashion-finetune, from scratch": (load("mae-fashion-finetune", "name=scratch"), None),
        "mae-fashion, 40 steps": (load("mae-fashion", "steps=40", "name=a"), None),
        "mae-fashion, 40 steps, mask tokens": (load("mae-fashion", "steps=40", "name=b", "model.drop=false"), None),
        "vit-fashion": (load("vit-fashion"), None),
    }


def digits(folder: Path) -> dict[str, tuple[Recipe, Path | None]]:
    """The same on images of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    np.savez(folder / "digits.npz", x=(x.reshape(-1, 8, 8) * 15).astype(np.uint8), y=y)
    common = {
        "data": {"name": "images", "source": f"{folder}/digits.npz", "holdout": 0.3, "cache": str(folder)},
        "log": {"tensorboard": False},
        "out": str(folder),
    }
    vision = {"name": "vision", **TRUNK, "pooling": "mean"}
    mae = {"name": "masked_autoencoder", **TRUNK, "positions": "sincos", "decoder_width": 32, "decoder_layers": 1}

    def read(name: str, **more: Any) -> Recipe:
        return Recipe.read({**common, "name": name, **more})

    pre = {"model": mae, "task": "masked-image", "batch": 64, "duration": "800 step", "techniques": RULES}
    short = {**CLASSIFY, "duration": "100 step"}
    return {
        "mae-digits": (read("mae", **pre), None),
        "mae-digits-finetune": (read("tuned", model=vision, **short), folder / "mae"),
        "mae-digits-finetune, from scratch": (read("short", model=vision, **short), None),
        "vit-digits": (read("vit", model=vision, **CLASSIFY), None),
    }


def row(name: str, recipe: Recipe, start: Path | None = None) -> dict[str, Any]:
    """One run: held-out scores before and after, steps, seconds."""
    seconds: list[float] = []
    before: dict[str, float] = {}

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage":
            before.update(scores(fields["run"]))
        elif event == "step":
            seconds.append(fields["seconds"])

    began = time.process_time()
    result = train(recipe, start=start, observe=see)
    spent = time.process_time() - began
    if result.reason != "finished":
        raise SystemExit(f"{name} was {result.reason}: its row is not written.")
    found = {
        "recipe": recipe.dump(),
        "from": start.name if start else None,
        "parameters": sum(p.numel() for p in result.run.model.parameters()),
        "held_out": len(result.run.data.validation),
        "before": before,
        "after": scores(result.run),
        "steps": len(seconds),
        "images": len(seconds) * recipe.batch,
        "seconds": sum(seconds),
        "seconds_a_step": statistics.median(seconds),
        "processor_seconds": spent,
        "about": about(),
    }
    print(line(name, found), flush=True)
    return found


def scores(run: Run) -> dict[str, float]:
    """The task's metrics over all held-out images."""
    held, size = run.data.validation, 250
    spans = [np.arange(i, min(i + size, len(held))) for i in range(0, len(held), size)]
    parts = (to_device(run.task.batch(held.read(span), span), run.device) for span in spans)
    assert run.evaluate is not None
    return run.evaluate(lambda model: run.task.evaluate(model, parts))


def line(name: str, found: dict[str, Any]) -> str:
    """A row for reading."""
    before, after = (
        f"accuracy {100 * part['accuracy']:.2f} %" if "accuracy" in part else f"loss {part['loss']:.4f}"
        for part in (found["before"], found["after"])
    )
    spent = f"{found['seconds']:.0f} s, {found['processor_seconds']:.0f} s of the processor"
    return f"{name:36} {found['parameters']:>9,} weights  {before} -> {after}  {found['steps']} steps, {spent}"


def about() -> dict[str, Any]:
    """Where and on what this was made."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    known = {key: value for key, value in environment().items() if key != "command"}
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "environment": known}


if __name__ == "__main__":
    sys.exit(main())
