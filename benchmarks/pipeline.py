"""What the orders of a pipeline idle: `python benchmarks/pipeline.py` -> evidence/pipeline.json.

Each row is an order with so many ranks and micro-batches, and has two figures. `idle`: the timetable's, every stage as
fast as the others and sending free. `measured`: torch's schedules with processes that send over gloo, each stage
sleeping for as long as a stage would compute, so that the figure is the order's and not that of a machine whose ranks
share cores; what is above the computed one is sending. Backward passes sleep once for their inputs and once for their
weights, so that orders which split them can. Torch's first stage has no inputs to wait for: it does all at its weights'
turn. Rows of `tables` draw each order's timetable.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed import pipelining

from scrimp.folder import environment
from scrimp.timetable import CLASSES, SINGLE, actions, idle, in_flight, timed

ORDERS: Final = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1, "zbv": 2}
"""Orders -> stages a rank."""
SIZES: Final = ((2, 4), (4, 4), (4, 8), (4, 16))
"""Ranks, micro-batches."""
EVIDENCE: Final = Path(__file__).parents[1] / "evidence" / "pipeline.json"
Spans = list[tuple[float, float]]


class Sleep(torch.autograd.Function):
    """Hands a tensor on after a while in each direction, and notes when."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float, spans: Spans) -> Tensor:
        ctx.seconds, ctx.spans = backward, spans
        _sleep(forward, spans)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _sleep(ctx.seconds, ctx.spans)
        return grads[0], None, None, None


def _sleep(seconds: float, spans: Spans) -> None:
    if seconds:
        began = time.monotonic()
        time.sleep(seconds)
        spans.append((began, time.monotonic()))


class Stage(nn.Module):
    """A stage that sleeps."""

    def __init__(self, seconds: float, spans: Spans) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seconds, self.spans = seconds, spans

    def forward(self, x: Tensor) -> Tensor:
        x = Sleep.apply(x, self.seconds, self.seconds, self.spans)  # type: ignore[assignment]
        return x * Sleep.apply(self.weight, 0.0, self.seconds, self.spans)  # type: ignore[operator]


def ranked(rank: int, ranks: int, counts: list[int], steps: int, seconds: float, folder: str) -> None:
    """A rank: steps of each order with each number of micro-batches, and the share of time in which ranks slept not."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = [
        {"order": order, "ranks": ranks, "micro_batches": parts, "measured": measured(order, parts, steps, seconds)}
        for parts in counts
        for order in ORDERS
    ]
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def measured(order: str, parts: int, steps: int, seconds: float) -> float:
    """The median of some steps, without the first."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    each, shares, spans = ORDERS[order], list[float](), Spans()
    x = torch.ones(1, 64, requires_grad=True)
    places = [rank, 2 * ranks - 1 - rank] if order == "zbv" else [i * ranks + rank for i in range(each)]
    stages = [pipelining.PipelineStage(Stage(seconds / each, spans), place, ranks * each, torch.device("cpu"),
                                       input_args=x, output_args=x)
              for place in places]  # fmt: skip
    kind = getattr(pipelining.schedules, CLASSES[order])
    schedule = kind(stages[0] if order in SINGLE else stages, parts, loss_fn=lambda out, _: out.sum())
    batch = torch.ones(parts, 64, requires_grad=True)
    for _ in range(steps + 1):
        spans.clear()
        torch.distributed.barrier()
        ends = {"target": batch.detach(), "losses": list[Tensor]()} if ranks * each - 1 in places else {}
        schedule.step(*([batch] if 0 in places else []), return_outputs=False, **ends)
        rows: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(rows, spans)
        every = [span for row in rows for span in row]
        length = max(end for _, end in every) - min(begin for begin, _ in every)
        shares.append(1 - sum(end - begin for begin, end in every) / (length * ranks))
    return round(statistics.median(shares[1:]), 4)


def main() -> None:
    """Compute, measure and write."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--steps", type=int, default=3)
    given.add_argument("--seconds", type=float, default=0.08, help="what a micro-batch sleeps forward, on each rank")
    given.add_argument("--out", type=Path, default=EVIDENCE)
    asked = given.parse_args()
    rows: list[dict[str, Any]] = []
    for ranks in sorted({ranks for ranks, _ in SIZES}):
        counts = [parts for each, parts in SIZES if each == ranks]
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(ranked, (ranks, counts, asked.steps, asked.seconds, folder), nprocs=ranks)
            rows += json.loads(Path(folder, "found.json").read_text())
    for row in rows:
        table = timed(actions(row["order"], row["ranks"], row["micro_batches"], ORDERS[row["order"]]))
        row |= {"stages_per_rank": ORDERS[row["order"]], "idle": round(idle(table), 4),
                "in_flight": [in_flight(line) for line in table]}  # fmt: skip
        print(row)
    about = {"sleep": asked.seconds, "environment": environment()}
    asked.out.write_text(json.dumps({"rows": rows, "about": about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
