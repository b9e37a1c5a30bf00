"""One run of a recipe with so many tokens, its clock and its peak memory. Prints one line of JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from scrimp.allocator import lean

lean()


def main(path: str, tokens: int, seed: int, more: list[str]) -> dict[str, Any]:
    """Train once; the run's folder is thrown away."""
    from scrimp.comparing import measured
    from scrimp.recipe import Recipe
    from scrimp.training import train

    with tempfile.TemporaryDirectory() as out:
        batch = Recipe.load(path, more).batch
        fixed = [
            f"duration={tokens} tok", f"seed={seed}", f"out={out}", "name=run", "validate.every=0.1", "sample.tokens=0",
            f"validate.batches={128 // batch}", "checkpoint.every=0", "log.tensorboard=false",
        ]  # fmt: skip
        recipe = Recipe.load(path, [*more, *fixed])
        train(recipe)
        return {
            "tokens": tokens,
            "seed": seed,
            "more": more,
            **measured(Path(out) / "run", recipe.data.open(), recipe.task),
        }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
