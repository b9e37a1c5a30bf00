"""What the orders of a pipeline idle: `python benchmarks/pipeline.py` -> evidence/pipeline.json.

Two figures for each order. Computed: the timetable's, every stage as fast as the others and sending free. Measured:
torch's schedules with processes that send over gloo, each stage sleeping for as long as a stage would compute, so that
the figure is the order's and not that of a machine whose ranks share cores; what is above the computed one is sending.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import pipelining

from scrimp.folder import environment
from scrimp.timetable import CLASSES, SINGLE, actions, drawn, idle, in_flight, timed

ORDERS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1, "zbv": 2}
"""Orders -> stages a rank."""
MEASURED = ("gpipe", "1f1b", "interleaved")
"""Orders whose backward passes are whole: a sleep cannot be split."""
EVIDENCE = Path(__file__).parents[1] / "evidence" / "pipeline.json"


class Sleep(torch.autograd.Function):
    """Computes nothing for a while in each direction, twice as long backward, and notes when."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float, spans: list[tuple[float, float]]) -> Tensor:
        ctx.seconds, ctx.spans = seconds, spans
        _sleep(seconds, spans)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _sleep(2 * ctx.seconds, ctx.spans)
        return grads[0], grads[0].sum(), None, None


def _sleep(seconds: float, spans: list[tuple[float, float]]) -> None:
    began = time.monotonic()
    time.sleep(seconds)
    spans.append((began, time.monotonic()))


class Stage(nn.Module):
    """A stage that sleeps."""

    def __init__(self, seconds: float, spans: list[tuple[float, float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seconds, self.spans = seconds, spans

    def forward(self, x: Tensor) -> Tensor:
        return Sleep.apply(x, self.weight, self.seconds, self.spans)  # type: ignore[no-any-return]


def ranked(rank: int, ranks: int, parts: int, steps: int, seconds: float, folder: str) -> None:
    """A rank: steps of each order, and the share of all ranks' time in which they slept not."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found: dict[str, float] = {}
    for order in MEASURED:
        each, shares = ORDERS[order], list[float]()
        spans: list[tuple[float, float]] = []
        x = torch.ones(1, 64, requires_grad=True)
        stages = [pipelining.PipelineStage(Stage(seconds / each, spans), i * ranks + rank, ranks * each,
                                           torch.device("cpu"), input_args=x, output_args=x)
                  for i in range(each)]  # fmt: skip
        kind = getattr(pipelining.schedules, CLASSES[order])
        schedule = kind(stages[0] if order in SINGLE else stages, parts, loss_fn=lambda out, _: out.sum())
        batch = torch.ones(parts, 64)
        for _ in range(steps):
            spans.clear()
            torch.distributed.barrier()
            schedule.step(*([batch] if rank == 0 else []), target=batch, losses=[], return_outputs=False)
            rows: list[Any] = [None] * ranks
            torch.distributed.all_gather_object(rows, spans)
            every = [span for row in rows for span in row]
            length = max(end for _, end in every) - min(begin for begin, _ in every)
            shares.append(1 - sum(end - begin for begin, end in every) / (length * ranks))
        found[order] = statistics.median(shares[1:])
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def main() -> None:
    """Compute, measure and write."""
    given = argparse.ArgumentParser()
    for name, default in (("--ranks", 4), ("--parts", 8), ("--steps", 4)):
        given.add_argument(name, type=int, default=default)
    given.add_argument("--seconds", type=float, default=0.03)
    asked = given.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = (asked.ranks, asked.parts, asked.steps, asked.seconds, folder)
        torch.multiprocessing.spawn(ranked, job, nprocs=asked.ranks)
        measured = json.loads(Path(folder, "found.json").read_text())
    rows: dict[str, Any] = {}
    for order, each in ORDERS.items():
        table = timed(actions(order, asked.ranks, asked.parts, each))
        rows[order] = {"stages_per_rank": each, "idle": round(idle(table), 4),
                       "measured": round(measured[order], 4) if order in measured else None,
                       "in_flight": [in_flight(row) for row in table], "table": drawn(table).splitlines()}  # fmt: skip
        print(f"{order:12} idle {rows[order]['idle']:.4f}, measured {rows[order]['measured']}")
    about = {"ranks": asked.ranks, "micro_batches": asked.parts, "environment": environment()}
    EVIDENCE.write_text(json.dumps({"rows": rows, "about": about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
