"""The peer of the thrifty recipe: a loop as one writes it by hand, on the same tokens, held-out windows and shape.

AdamW, linear warm-up, cosine to a tenth, clipping at 1: fully decayed over its own length. Prints one line of JSON.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))
from peer_loop import GPT, adamw  # pyright: ignore[reportMissingImports]
from workloads import Workload  # pyright: ignore[reportMissingImports]

from scrimp.data.text import TextData

HELD = 128
"""Held-out windows."""


def main(lr: float, batch: int, steps: int, seed: int) -> dict[str, Any]:
    """Train once.

    Args:
        batch: windows a step.
    """
    data = TextData(source="python-stdlib", vocab=8192, context=256).open()
    torch.manual_seed(seed)
    model = GPT(Workload(blocks=4, width=256, heads=4, vocab=data.tokenizer.vocab, context=256, batch=batch))
    optimizer = adamw(model)
    order = np.random.default_rng(seed).permutation(len(data.train))
    clock, curve = 0.0, list[tuple[int, float, float]]()
    for step in range(1, steps + 1):
        ids = order[np.arange((step - 1) * batch, step * batch) % len(order)]
        began = time.perf_counter()
        warm, done = min(1.0, step / (0.1 * steps)), max(0.0, (step / steps - 0.1) / 0.9)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        tokens = torch.from_numpy(data.train.windows(ids))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        if step > 1:
            clock += time.perf_counter() - began
        if step % max(steps // 10, 1) == 0 or step == steps:
            curve.append((step * batch * 256, clock * step / (step - 1), held_out(model, data, batch)))
    with open("/proc/self/status", encoding="ascii") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return {"lr": lr, "batch": batch, "steps": steps, "seed": seed, "loss": curve[-1][2], "seconds": curve[-1][1],
            "peak_bytes": peak, "curve": curve}  # fmt: skip


@torch.no_grad()
def held_out(model: GPT, data: Any, batch: int) -> float:
    """Mean loss of the held-out windows, in nats a token."""
    total = 0.0
    for first in range(0, HELD, batch):
        tokens = torch.from_numpy(data.validation.windows(np.arange(first, min(first + batch, HELD))))
        total += float(model(tokens[:, :-1], tokens[:, 1:])) * len(tokens)
    return total / HELD


if __name__ == "__main__":
    print(json.dumps(main(float(sys.argv[1]), *map(int, sys.argv[2:5]))))
