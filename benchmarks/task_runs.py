"""What the shipped recipes learn: `python benchmarks/task_runs.py [NAME ...]` -> evidence/task_runs.json.

Each recipe is trained once, on one thread; its task's metrics over the same held-out items are measured before the
first step and after the last. Seconds are those of the steps, by the wall clock. The working folder, or --place, has
what the recipes say that they need: `minilm`, `docstrings.jsonl` of benchmarks/docstrings.py, and `emoji` of
benchmarks/emoji.py. Rows are replaced one by one. benchmarks/finetune.py, vision.py and instructions.py measure the
other recipes.

`embed` and `regress` are also held against TF-IDF, on the same held-out texts: the nearest by cosine, and ridge
regression.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import chdir
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from scrimp.data.faults import Faults
from scrimp.data.labelled import LabelledData
from scrimp.data.labelling import Table, gathered, parted
from scrimp.data.tables import find
from scrimp.folder import environment
from scrimp.recipe import Recipe
from scrimp.run import Run
from scrimp.training import train

ROOT: Final = Path(__file__).resolve().parents[1]
EVIDENCE: Final = ROOT / "evidence" / "task_runs.json"
NAMES: Final = ("thrifty", "bert-stdlib", "bart-docstrings", "bart-denoise", "clip-emoji", "minilm-code-size",
                "minilm-code-search")  # fmt: skip
MOST: Final = 32
"""Batches of held-out items."""


def scores(run: Run) -> dict[str, float]:
    """The task's metrics over held-out items."""
    held, size = run.data.validation, run.recipe.batch
    count = min(len(held), MOST * size)
    spans = [np.arange(i, min(i + size, count)) for i in range(0, count, size)]
    batches = (run.task.batch(held.read(span), span) for span in spans)
    assert run.evaluate is not None
    return run.evaluate(lambda model: run.task.evaluate(model, batches))


def measured(name: str, changes: list[str]) -> dict[str, Any]:
    """One recipe, before and after."""
    recipe = Recipe.load(ROOT / "recipes" / f"{name}.yaml", changes)
    seconds, before = list[float](), dict[str, float]()

    def see(event: str, fields: dict[str, Any]) -> None:
        if event == "stage" and not before:
            before.update(scores(fields["run"]))
        elif event == "step":
            seconds.append(fields["seconds"])
        elif event == "validation":
            print({key: round(value, 3) for key, value in fields.items() if isinstance(value, float)}, flush=True)

    used = time.process_time()
    result = train(recipe, save=False, observe=see)
    used = time.process_time() - used
    if result.reason != "finished":
        raise SystemExit(f"{name} was {result.reason}: its row is not written.")
    run = result.run
    kept = ("documents", "rows", "tokens", "vocab", "classes", "faulty")
    row = {
        "recipe": recipe.dump(),
        "data": {key: value for key, value in run.data.meta.items() if key in kept},
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "held_out": len(run.data.validation),
        "before": before,
        "after": scores(run),
        "steps": len(seconds),
        "seconds": round(sum(seconds), 1),
        "cpu_seconds": round(used, 1),
    }
    return row | (against(recipe.data) if isinstance(recipe.data, LabelledData) else {})


def against(settings: LabelledData) -> dict[str, dict[str, float]]:
    """What TF-IDF of words and parts of words does on the same rows, for texts in pairs or with a score."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    table, held = parted(gathered(settings, find(settings.source), Faults(1.0)), settings.holdout)
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"[^\W_]+").fit([*table.texts, *table.pairs])
    x = words.transform(held.texts)
    if settings.score:
        return {"tfidf": ridged(table, held, words.transform(table.texts), x)}
    nearest = (x @ words.transform(held.pairs).T).toarray().argmax(1)
    return {"tfidf": {"recall_at_1": float((nearest == np.arange(len(nearest))).mean())}}


def ridged(table: Table, held: Table, train: Any, test: Any) -> dict[str, float]:
    """Ridge regression; the best of a few strengths by the held-out rows themselves, to its advantage."""
    from sklearn.linear_model import Ridge

    from scrimp.tasks.metrics import correlated

    y, truth = (np.array(part.targets, dtype=float) for part in (table, held))
    outputs = [Ridge(alpha=alpha).fit(train, y).predict(test) for alpha in (0.3, 1, 3, 10)]
    best = min(outputs, key=lambda output: np.square(output - truth).mean())
    return {"loss": float(np.square(best - truth).mean()), **correlated(best, truth)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NAMES), help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--place", type=Path, default=Path(), help="folder of what the recipes need; default here")
    parser.add_argument("--set", dest="words", action="append", default=[], help="an override, such as steps=20")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(EVIDENCE.read_text()) if EVIDENCE.exists() else {"runs": {}}
    for name in given.names:
        with tempfile.TemporaryDirectory() as out, chdir(given.place):
            row = measured(name, [*given.words, f"out={out}", "log.tensorboard=false"])
        about = {key: value for key, value in environment().items() if key != "command"}
        found["runs"][name] = row | {"date": time.strftime("%Y-%m-%d"), "environment": about}
        EVIDENCE.write_text(json.dumps(found, indent=1) + "\n")
        print(name, {key: row.get(key) for key in ("before", "after", "tfidf", "steps", "seconds")}, flush=True)


if __name__ == "__main__":
    main()
