"""What FLIP saves: a small CLIP on emoji and their names, at 0, 50 and 75 % of the patches left out.

    python benchmarks/emoji.py FOLDER
    python benchmarks/flip.py FOLDER/emoji.jsonl          # about ten minutes on one core; writes evidence/flip.json

Of each seed there are rows of three kinds. `none` sees whole images. `same images` sees as many with a part of the
patches left out to its end, which tells the images a second. `same time` has the processor's seconds of `none`, hence
more images, and trains on whole ones in its last tenth; each row has a schedule that decays at its own end.

`reached` is after how many seconds a row was first as good as `none` at its end, by zero-shot accuracy, or null.
Seconds are the processor's, of steps and not of validation, on one thread. Rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

import torch
from growth import kept, measured

from scrimp.recipe import Recipe

ROOT: Final = Path(__file__).resolve().parents[1]
EVIDENCE: Final = ROOT / "evidence" / "flip.json"
BATCH: Final = 64
TUNE: Final = 0.1


def recipe_of(source: Path, steps: int, seed: int, mask: float = 0.0, tune: float = 0.0) -> Recipe:
    """A model whose image tower has most of the work: 64 patches, against names of a few tokens."""
    return Recipe.read(
        {
            "model": {"preset": "clip-1m", "width": 64, "layers": 1, "image_layers": 3, "patch": 4, "dropout": 0.0},
            "task": {"name": "contrastive", "prompt": "{}:"},
            "data": {"name": "image_text", "source": str(source), "image": 32, "kept": 40, "flip": False,
                     "tokenizer": "bpe", "vocab": 1024, "context": 24, "holdout": 0.2,
                     "cache": str(source.parent / "cache")},
            "batch": BATCH,
            "duration": f"{steps} step",
            "seed": seed,
            "validate": {"every": f"{max(1, steps // 10)} step", "batches": 6},
            "sample": {"tokens": 0},
            "techniques": {
                "adamw": {"lr": 2e-3, "weight_decay": 0.1},
                "warmup_cosine": {"warmup": 0.1},
                "clip": {"norm": 1.0},
                **({"flip": {"mask": mask, "tune": tune}} if mask else {}),
            },
        }
    )  # fmt: skip


def row(recipe: Recipe, none: dict[str, Any] | None = None) -> dict[str, Any]:
    """One run, beside the one that sees whole images."""
    found = measured(recipe, "zero_shot")
    found["images"] = found["steps"] * BATCH
    found["images_per_second"] = round(found["images"] / found["seconds"], 1)
    if none is not None:
        found["times_as_fast"] = round(found["images_per_second"] / none["images_per_second"], 3)
        found["reached"] = next((s for _, s, score in found["curve"] if score >= none["zero_shot"]), None)
    return found


def rows_of(source: Path, out: Path, steps: int, seed: int) -> None:
    """The rows of a seed."""
    place = f"{steps}/{seed}"
    none = kept(out, f"none/{place}", lambda: row(recipe_of(source, steps, seed)))

    def masked(count: int, mask: float, tune: float = 0.0) -> dict[str, Any]:
        return row(recipe_of(source, count, seed, mask, tune), none)

    for mask in (0.5, 0.75):
        images = kept(out, f"{mask:.0%}, same images/{place}", lambda m=mask: masked(steps, m))
        # The last tenth is as slow as a run on whole images.
        longer = round(steps / ((1 - TUNE) / images["times_as_fast"] + TUNE))
        kept(out, f"{mask:.0%}, same time/{place}", lambda m=mask, n=longer: masked(n, m, TUNE))


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="emoji.jsonl")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measured(recipe_of(given.source, 3, 0))  # The first steps of a process are slow: they are not measured.
    for seed in range(given.seeds):
        rows_of(given.source, given.out, given.steps, seed)


if __name__ == "__main__":
    main()
