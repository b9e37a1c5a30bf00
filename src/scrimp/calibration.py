# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Two runs that a probe makes: one whose model is next to nothing, which leaves the price of operators, of a step and
of the process; and a usual one, whose steps say by how much the sum of single operators is off.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from scrimp.limits import resident

TEXT: Final = "To train on less is to think about what the rest was for.\n\n"
NOTHING: Final = {"layers": 2, "width": 16, "heads": 2}
USUAL: Final = {"layers": 6, "width": 384, "heads": 6, "vocab": 8192}


def small(device: str) -> dict[str, float]:
    """overhead: seconds an operator; step: further seconds a step; resident: bytes before there is a model;
    usual: seconds of a step of the usual run.
    """  # fmt: skip
    from scrimp.run import build
    from scrimp.stages import new_clock
    from scrimp.trace import Trace
    from scrimp.training import train

    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(NOTHING, 8, 1, 60, device, folder)
        data = recipe.data.open()
        run = build(recipe, data, new_clock(recipe, data))
        raw = statistics.median(_steps(run, 60)[10:])
        with Trace() as trace:
            _steps(run, 1)
        held = resident()
        steps: dict[int, list[float]] = {60: [], 6: []}

        def observe(event: str, fields: dict[str, Any]) -> None:
            if event == "step":
                steps[60 if recipe.model.width == 16 else 6].append(fields["seconds"])

        train(recipe, data=data, observe=observe)
        recipe = recipe_of(USUAL, 256, 8, 6, device, folder)
        train(recipe, observe=observe)
    return {
        "overhead": raw / len(trace.ops),
        "step": max(statistics.median(steps[60][10:]) - raw, 0.0),
        "resident": held,
        "usual": statistics.median(steps[6][1:]),
    }


def recipe_of(model: dict[str, int], context: int, batch: int, steps: int, device: str, folder: str) -> Any:
    """A recipe on a text of its own."""
    from scrimp.recipe import Recipe

    source = Path(folder) / "text.txt"
    source.write_text(TEXT * 800)
    return Recipe.read({
        "model": dict(model), "device": device, "out": folder, "batch": batch, "duration": f"{steps} step",
        "data": {"source": str(source), "tokenizer": "bytes", "context": context, "cache": folder, "holdout": 0.2},
        "techniques": {"adamw": {}}, "validate": {"every": 0, "batches": 0}, "checkpoint": {"every": 0},
        "sample": {"tokens": 0},
    })  # fmt: skip


def _steps(run: Any, count: int) -> list[float]:
    """Seconds of bare steps."""
    import torch

    batch = run.batch(0)
    tokens = run.task.count(batch)
    times: list[float] = []
    for _ in range(count):
        begin = time.perf_counter()
        run.backward(batch, tokens)
        run.step()
        run.optimizer.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return times
