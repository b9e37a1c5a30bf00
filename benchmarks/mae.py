"""Does pre-training pay? A masked autoencoder and fine-tuning, against training from scratch for as long.

    python benchmarks/mae.py [FOLDER]        # about ten minutes on one core; writes evidence/mae.json

FOLDER has Fashion-MNIST's files, as Debian's package dataset-fashion-mnist brings them to the folder that is the
default. Of each seed a masked autoencoder at 75 % sees all 60,000 images without their labels; a classifier goes on
from it with the labels of all or of the first 500. `scratch` has the same classifier, batches and labels, and so many
more steps that its processor's seconds are those of both parts together; `scratch, same steps` has only the
fine-tuning's. Each part has a schedule that decays at its own end. Accuracy is that of 2,000 held-out images after the
last step. Seconds are the processor's, of steps and not of validation, on one thread. Rows that are there are not
measured again.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from growth import kept, measured

from scrimp.recipe import Recipe

ROOT: Final = Path(__file__).resolve().parents[1]
EVIDENCE: Final = ROOT / "evidence" / "mae.json"
DEFAULT: Final = Path("/usr/share/datasets/fashion-mnist")
HELD: Final = 2000
LABELS: Final = {"all labels": 60000, "500 labels": 500}
PRE: Final[dict[str, Any]] = {"adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.05}}
RULES: Final[dict[str, Any]] = {"adamw": {"lr": 2e-3, "weight_decay": 0.05}, "clip": {"norm": 1.0}}


def unpacked(source: Path, folder: Path) -> None:
    """The files of the data that are trained on, and the first held-out images."""

    def read(part: str) -> tuple[np.ndarray, np.ndarray]:
        images = gzip.decompress((source / f"{part}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((source / f"{part}-labels-idx1-ubyte.gz").read_bytes())
        return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)

    x, y = read("train")
    for name, count in LABELS.items():
        np.savez(folder / f"{name}.npz", x=x[:count], y=y[:count].astype(np.int64))
    x, y = read("t10k")
    np.savez(folder / "held.npz", x=x[:HELD], y=y[:HELD].astype(np.int64))


def recipe_of(folder: Path, labels: str, steps: int, seed: int, name: str = "", pre: bool = False) -> Recipe:
    """A masked autoencoder or a classifier with the same trunk."""
    return Recipe.read(
        {
            "name": name or "scratch",
            "out": str(folder / "runs"),
            "model": {"preset": "mae-1m" if pre else "vit-1m", "layers": 3, "width": 96, "patch": 7,
                      **({} if pre else {"pooling": "mean"})},
            "data": {"name": "images", "source": f"{folder}/{labels}.npz", "validation": f"{folder}/held.npz",
                     "crop": 1, "flip": True, "cache": str(folder / "cache")},
            "task": "masked-image" if pre else "classify",
            "batch": 128 if pre else 64,
            "duration": f"{steps} step",
            "seed": seed,
            "validate": {"every": f"{steps} step", "batches": HELD // 64},
            "checkpoint": {"every": f"{steps} step"},
            "log": {"tensorboard": False},
            "techniques": {**(PRE if pre else RULES), "warmup_cosine": {"warmup": 0.1, "floor": 0.0}},
        }
    )  # fmt: skip


def rows_of(folder: Path, out: Path, steps: tuple[int, int], seed: int) -> None:
    """The rows of a seed. Where a fine-tuned one is missing, its pre-training is done again, which gives the same."""
    before, after = steps
    place = f"{before}+{after}/{seed}"

    def pretrained() -> dict[str, Any]:
        return measured(recipe_of(folder, "all labels", before, seed, f"mae-{seed}", pre=True), save=True)

    pre = kept(out, f"pre-training/{place}", pretrained)
    for labels in LABELS:

        def classified(count: int, labels: str = labels, **how: Any) -> dict[str, Any]:
            return measured(recipe_of(folder, labels, count, seed), **how)

        def tuned(classified: Any = classified) -> dict[str, Any]:
            start = folder / "runs" / f"mae-{seed}"
            if not start.exists():
                pretrained()
            found = classified(after, start=start)
            return found | {"total_seconds": round(pre["seconds"] + found["seconds"], 3)}

        row = kept(out, f"{labels}, mae/{place}", tuned)
        longer = round(after * row["total_seconds"] / row["seconds"])
        kept(out, f"{labels}, scratch/{place}", lambda n=longer, made=classified: made(n))
        kept(out, f"{labels}, scratch, same steps/{place}", lambda made=classified: made(after))


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--steps", type=int, nargs=2, default=(200, 150), help="of pre-training, of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as place:
        unpacked(given.source, Path(place))
        # The first steps of a process are slow: they are not measured.
        measured(recipe_of(Path(place), "500 labels", 3, 0))
        for seed in range(given.seeds):
            rows_of(Path(place), given.out, tuple(given.steps), seed)


if __name__ == "__main__":
    main()
