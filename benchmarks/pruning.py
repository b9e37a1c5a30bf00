"""Pruning curves: test error against the share of the training set that is kept, for each score and a random choice.

    python benchmarks/pruning.py                       # images and the crossing; about twenty minutes on one thread
    python benchmarks/pruning.py --texts FOLDER        # FOLDER has sst2/train.tsv and sst2/dev.tsv
    python benchmarks/pruning.py --seeds 1 --only el2n

Images are scikit-learn's digits, 8 x 8, a small vision Transformer; texts are sentences of SST-2, a small encoder from
scratch. Scores are made once a method, of runs whose seeds no arm uses, and their seconds are told; every arm trains
the same number of steps, so that what is kept is seen more often. The crossing is that of Sorscher et al.: a perceptron
learns from a teacher's labels of Gaussian inputs, and the items kept are those with the smallest margin (hard), the
largest (easy), or random ones.

A row is written when it is done, and a finished one is not repeated. Writes evidence/pruning.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from scrimp.folder import environment
from scrimp.recipe import Recipe
from scrimp.registry import technique_class
from scrimp.scoring.score import score
from scrimp.techniques.importance_sampling.prune import ranked
from scrimp.training import train

ROOT = Path(__file__).parents[1]
OUT = ROOT / "evidence" / "pruning.json"
KEPT = (0.75, 0.5, 0.25, 0.1)
SCORES = {"el2n": "8 epoch", "grand": "8 epoch", "forgetting": "12 epoch", "prototypes": "8 epoch"}
"""Method -> how long each scoring run is."""
SCORING_RUNS = {"el2n": 5, "grand": 3, "forgetting": 2, "prototypes": 1}
CROSSING = (2, 3, 5, 10, 20, 40)
"""Items over dimensions."""
RULES = {"adamw": {"lr": 2e-3, "weight_decay": 0.05}, "warmup_cosine": {"warmup": 0.1, "floor": 0.0}}


def main() -> None:
    """Run what is asked for and not there yet, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="a folder that has sst2/")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--only", default="", help="a word that a row's name must hold")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(OUT.read_text()) if OUT.exists() else {"about": environment(), "rows": {}}
    with TemporaryDirectory() as place:
        sets = {"digits": digits(Path(place))} | ({"sst2": sst2(args.texts, Path(place))} if args.texts else {})
        for name, recipe in sets.items():
            curves(name, recipe, Path(place), args.seeds, args.only, found)
    if args.only in "crossing":
        for ratio in CROSSING:
            if f"crossing, {ratio}" not in found["rows"]:
                found["rows"][f"crossing, {ratio}"] = crossing(ratio, args.seeds)
                save(found)
    for name, row in found["rows"].items():
        print(f"{name:44} {json.dumps(row)}")


def save(found: dict[str, Any]) -> None:
    """Write the evidence."""
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n")


def digits(place: Path) -> Recipe:
    """Images: 1,258 to train on."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    np.savez(place / "digits.npz", x=(x.reshape(-1, 8, 8) * 15).astype(np.uint8), y=y)
    model = {"name": "vision", "patch": 2, "layers": 3, "width": 48, "heads": 4, "init_std": 0.1}
    data = {"name": "images", "source": f"{place}/digits.npz", "holdout": 0.3, "cache": str(place)}
    return small(model, data, "400 step")


def sst2(folder: Path, place: Path) -> Recipe:
    """Texts: 6,920 sentences to train on."""
    model = {"causal": False, "layers": 2, "width": 64, "heads": 4, "pooling": "mean", "dropout": 0.1}
    data = {"name": "labelled", "source": f"{folder}/sst2/train.tsv", "validation": f"{folder}/sst2/dev.tsv",
            "columns": ["sentence", "label"], "text": "sentence", "label": "label", "vocab": 4096, "context": 48,
            "stretch": 16, "cache": str(place)}  # fmt: skip
    return small(model, data, "500 step")


def small(model: dict[str, Any], data: dict[str, Any], duration: str) -> Recipe:
    """A classifier that is validated once, on everything held out."""
    return Recipe.read({"model": model, "data": data, "task": "classify", "batch": 32, "duration": duration,
                        "techniques": RULES, "validate": {"every": 1.0, "batches": 100}, "checkpoint": {"every": 0},
                        "log": {"tensorboard": False}})  # fmt: skip


def curves(name: str, recipe: Recipe, place: Path, seeds: int, only: str, found: dict[str, Any]) -> None:
    """Every method, both ends, every share."""
    arms = [("all", "random", 1.0)] + [("random", "random", kept) for kept in KEPT]
    arms += [(by, which, kept) for by in SCORES for which in ("hard", "easy") for kept in KEPT]
    for by, which, kept in arms:
        label = f"{name}, {by}" + (f" {which}" if by in SCORES else "") + (f", {kept}" if by != "all" else "")
        if only not in label:
            continue
        row = found["rows"].setdefault(label, {"kept": kept, "by": by, "which": which, "errors": [], "seconds": []})
        path = place / f"{name}.{by}.parquet"
        while len(row["errors"]) < seeds:
            if by in SCORES and not path.exists():
                scored(name, recipe, by, path, found)
            began, seed = time.perf_counter(), len(row["errors"])
            prune = technique_class("prune")(keep=kept, which=which, scores=str(path) if by in SCORES else "")
            # Scores belong to data as they were read for them: here with a token for what is masked.
            data = unsupervised(name, recipe, place).data if by == "prototypes" else recipe.data
            arm = replace(recipe, seed=seed, data=data, techniques=(*recipe.techniques, prune))
            accuracy = train(arm, save=False).validation["accuracy"]
            row["errors"].append(round(1 - accuracy, 5))
            row["seconds"].append(round(time.perf_counter() - began, 2))
            row |= {"mean": statistics.mean(row["errors"]),
                    "std": statistics.stdev(row["errors"]) if len(row["errors"]) > 1 else 0.0}  # fmt: skip
            save(found)
        print(f"{label:44} error {row['mean']:.4f} +- {row['std']:.4f}", flush=True)


def scored(name: str, recipe: Recipe, by: str, path: Path, found: dict[str, Any]) -> None:
    """Score once, and tell what it took."""
    began, start = time.perf_counter(), None
    runs, made = SCORING_RUNS[by], replace(recipe, seed=1000, duration=SCORES[by])
    if by == "prototypes":  # By a model that was trained without labels, where there is such a task.
        unlabeled = unsupervised(name, recipe, path.parent)
        start = train(unlabeled).folder
        made = unlabeled
    score(made, by, path, runs, start, say=lambda text: None)
    found["rows"].setdefault(f"{name}, scoring by {by}", {"seconds": round(time.perf_counter() - began, 1),
                                                          "runs": runs, "duration": SCORES[by]})  # fmt: skip
    save(found)


def unsupervised(name: str, recipe: Recipe, place: Path) -> Recipe:
    """The same items, and a task that needs no labels."""
    raw = recipe.dump() | {"duration": "400 step", "out": str(place), "name": f"{name}-unlabeled", "seed": 1000}
    if name == "digits":
        raw |= {"task": "masked-image", "model": {"name": "masked_autoencoder", "patch": 2, "layers": 3, "width": 48,
                "heads": 4, "decoder_layers": 1, "decoder_width": 32, "decoder_heads": 4}}  # fmt: skip
    else:
        raw |= {"task": "masked-lm", "model": {"causal": False, "layers": 2, "width": 64, "heads": 4}}
        raw["data"] = raw["data"] | {"mask": True}
    return Recipe.read(raw)


def crossing(ratio: int, seeds: int, dimensions: int = 100, keep: float = 0.3) -> dict[str, Any]:
    """Angle between a teacher and a student that learned from a part of the teacher's items, over pi."""
    from sklearn.svm import LinearSVC

    errors: dict[str, list[float]] = {which: [] for which in ("hard", "easy", "random")}
    for seed in range(seeds):
        draw = np.random.default_rng(seed)
        teacher = draw.standard_normal(dimensions)
        items = draw.standard_normal((ratio * dimensions, dimensions))
        margin = items @ teacher
        count = round(keep * len(items))
        for which, kept in errors.items():
            order = draw.permutation(len(items)) if which == "random" else ranked(-np.abs(margin), which, 0.0)
            chosen = order[:count]
            student = LinearSVC(C=1e4, fit_intercept=False, max_iter=20_000).fit(items[chosen], margin[chosen] > 0)
            weights = student.coef_[0]
            cosine = weights @ teacher / np.linalg.norm(weights) / np.linalg.norm(teacher)
            kept.append(round(float(np.arccos(cosine) / np.pi), 4))
    return {f"{which}": statistics.mean(kept) for which, kept in errors.items()} | {"seeds": seeds}


if __name__ == "__main__":
    main()
