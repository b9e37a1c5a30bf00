"""Ranks of which one is slow: it sleeps within its first block."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from distributed.jobs import layout, made, mesh
from scrimp.models.seams import blocks, wrap_forward
from scrimp.run import Run
from scrimp.technique import Card, Technique
from scrimp.training import train

SLOW = 1
SLEEP = 0.04


@dataclass(frozen=True, kw_only=True)
class Sleepy(Technique):
    """A block that takes longer on one rank."""

    card = Card(paper="none", section="Parallelism", saves="", costs="", phase={"wrap": "compile"})

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        def asleep(forward: Callable[..., object]) -> Callable[..., object]:
            def slower(*args: Any, **kwargs: Any) -> object:
                time.sleep(SLEEP * (run.world.rank == SLOW))
                return forward(*args, **kwargs)

            return slower

        wrap_forward(next(iter(blocks(model).values())), asleep)
        return model


def reported() -> dict[str, Any]:
    """layout -> what the lines of metrics say of the slowest rank, and what the user is told."""
    found: dict[str, Any] = {}
    for name in ("replicate", "zero, stage 3", "pipeline"):
        lines: list[dict[str, Any]] = []
        notes: list[str] = []

        def hear(event: str, fields: dict[str, Any], lines: Any = lines, notes: Any = notes) -> None:
            if event == "step":
                lines.append({k: v for k, v in fields.items() if k == "step" or k.startswith("slowest")})
            elif event == "note":
                notes.append(fields["text"])

        axes, steps = mesh(name, 2), 10 if name == "pipeline" else 30
        train(made(*layout(name), Sleepy(), mesh=axes, duration=f"{steps} step", validate={"every": 0}), save=False,
              force=True, observe=hear)  # fmt: skip
        found[name] = {"lines": [line for line in lines if "slowest_rank" in line], "notes": notes}
    return found
