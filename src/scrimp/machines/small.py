# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A run whose model is next to nothing: what remains is the price of operators, of a step, and of the process."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

TEXT = "To train on less is to think about what the rest was for.\n\n"


def small(device: str) -> tuple[float, float, int]:
    """(seconds per operator, further seconds per step, resident bytes before there is a model)."""
    import torch

    from scrimp.recipe import Recipe
    from scrimp.run import build
    from scrimp.stages import new_clock
    from scrimp.trace import Trace
    from scrimp.training import train

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text.txt"
        source.write_text(TEXT * 800)
        recipe = Recipe.read({
            "model": {"layers": 2, "width": 16, "heads": 2},
            "data": {"source": str(source), "tokenizer": "bytes", "context": 8, "cache": folder},
            "techniques": {"adamw": {}}, "batch": 1, "duration": "60 step", "device": device, "out": folder,
            "validate": {"every": 0}, "checkpoint": {"every": 0}, "sample": {"tokens": 0},
        })  # fmt: skip
        data = recipe.data.open()
        run = build(recipe, data, new_clock(recipe, data))
        assert run.backward and run.step and run.optimizer
        batch = run.batch(0)
        count = run.task.count(batch)

        def step() -> None:
            assert run.backward and run.step and run.optimizer
            run.backward(batch, count)
            run.step()
            run.optimizer.zero_grad(set_to_none=True)

        times: list[float] = []
        for _ in range(60):
            begin = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        with Trace() as trace:
            step()
        raw = statistics.median(times[10:])
        whole: list[float] = []

        def observe(event: str, fields: dict[str, Any]) -> None:
            if event == "step":
                whole.append(fields["seconds"])

        train(recipe, data=data, observe=observe)
    return raw / len(trace.ops), max(statistics.median(whole[10:]) - raw, 0.0), resident()


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
