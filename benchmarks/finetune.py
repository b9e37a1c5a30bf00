"""Fine-tuning a small encoder: accuracy before and after, against TF-IDF with logistic regression on the same rows.

    python benchmarks/finetune.py minilm data                      # all three recipes
    python benchmarks/finetune.py minilm data --only minilm-sst2

The first folder is the model's, the second has `sst2` and `banking77`; recipes/minilm-sst2.yaml says where the model
comes from. Rows of `evidence/finetune.json` are replaced one by one. Accuracy is over all held-out rows; before, it is
that of an untrained head. Seconds are those of training steps, without validation.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from scrimp.data.faults import Faults
from scrimp.data.labelling import gathered, parted
from scrimp.data.tables import find
from scrimp.folder import environment
from scrimp.recipe import Recipe
from scrimp.restore import starting_weights
from scrimp.run import build
from scrimp.stages import new_clock
from scrimp.training import train

ROOT: Final = Path(__file__).resolve().parents[1]
EVIDENCE: Final = ROOT / "evidence" / "finetune.json"
RECIPES: Final = ("minilm-sst2", "minilm-sst2-lora", "minilm-banking77")


def loaded(name: str, minilm: Path, data: Path, words: list[str]) -> Recipe:
    """A recipe with the two folders where they are."""
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    for folder in ("sst2/", "banking77/"):
        text = text.replace(f" {folder}", f" {data / folder}/")
    text = text.replace("from: minilm", f"from: {minilm}").replace("tokenizer: minilm", f"tokenizer: {minilm}")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"{name}.yaml"
        path.write_text(text)
        return Recipe.load(path, words)


def linear(settings: Any) -> dict[str, float]:
    """The usual baseline: TF-IDF of words and pairs of words, and the better of two logistic regressions.

    It chooses by the held-out rows themselves, so that it is not put at a disadvantage.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    faults = Faults(settings.skip)
    table = gathered(settings, find(settings.source), faults)
    held = gathered(settings, find(settings.validation), faults) if settings.validation else None
    table, held = (table, held) if held is not None else parted(table, settings.holdout)
    began = time.perf_counter()
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    x, y = words.fit_transform(table.texts), words.transform(held.texts)
    found = {c: LogisticRegression(C=c, max_iter=300).fit(x, table.targets).score(y, held.targets) for c in (1, 10)}
    best = max(found, key=lambda c: found[c])
    return {"accuracy": float(found[best]), "C": best, "seconds": time.perf_counter() - began}


def measured(recipe: Recipe, out: Path) -> dict[str, Any]:
    """A recipe before and after training."""
    data = recipe.data.open()
    run = build(recipe, data, new_clock(recipe, data), source=starting_weights(recipe, data, None))
    spans = [np.arange(i, min(i + 64, len(data.validation))) for i in range(0, len(data.validation), 64)]
    parts = [run.task.batch(data.validation.read(span), span) for span in spans]
    assert run.evaluate is not None
    task, sizes = run.task, [(p.numel(), p.requires_grad) for p in run.model.parameters()]
    before: dict[str, float] = run.evaluate(lambda model: task.evaluate(model, parts))
    del run
    # The recipes validate on all held-out rows.
    assert recipe.validate.batches * recipe.batch >= len(data.validation)
    result = train(replace(recipe, out=str(out)), observe=told)
    assert result.folder is not None
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return {
        "rows": data.meta["rows"],
        "trained": sum(n for n, on in sizes if on), "parameters": sum(n for n, _ in sizes),
        "before": before,
        "after": result.validation, "steps": len(steps), "seconds": sum(s["seconds"] for s in steps),
        "peak_bytes": max(s["peak_bytes"] for s in steps),
    }  # fmt: skip


def told(event: str, fields: dict[str, Any]) -> None:
    """Print how it goes."""
    if event == "validation" or (event == "step" and fields["step"] % 20 == 0):
        print({k: round(v, 4) for k, v in fields.items() if k in ("step", "loss", "accuracy", "seconds")}, flush=True)
    elif event == "note":
        print(fields["text"], flush=True)


def main() -> None:
    """Train, measure, and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minilm", type=Path, help="Folder of the model.")
    parser.add_argument("data", type=Path, help="Folder with sst2 and banking77.")
    parser.add_argument("--only", choices=RECIPES)
    parser.add_argument("--evidence", type=Path, default=EVIDENCE)
    parser.add_argument("--set", dest="words", action="append", default=[], help="An override, such as steps=20.")
    options = parser.parse_args()
    rows: dict[str, Any] = json.loads(options.evidence.read_text()) if options.evidence.exists() else {}
    for name in [options.only] if options.only else RECIPES:
        recipe = loaded(name, options.minilm.resolve(), options.data.resolve(), options.words)
        with tempfile.TemporaryDirectory() as out:
            row = {"linear": linear(recipe.data), **measured(recipe, Path(out))}
        shown = {"techniques": {t.name: t.settings() for t in recipe.techniques}, "batch": recipe.batch,
                 "duration": recipe.duration, "seed": recipe.seed}  # fmt: skip
        rows[name] = {"recipe": shown, **row, "environment": environment() | {"command": sys.argv[1:]}}
        options.evidence.write_text(json.dumps(rows, indent=1) + "\n")
        print(name, {k: row[k] for k in ("linear", "before", "after", "steps", "seconds")}, flush=True)


if __name__ == "__main__":
    main()
