"""What ranks must agree on, tried where one of them would say something else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from distributed.jobs import apart, files, layout, made, state
from scrimp import checkpoint, replicas
from scrimp.errors import UserError
from scrimp.recipe import Mesh
from scrimp.run import Run
from scrimp.technique import Card, Technique
from scrimp.training import train
from scrimp.world import World, arranged
from tiny import example

if TYPE_CHECKING:
    from scrimp.technique import Evaluate


@dataclass(frozen=True, kw_only=True)
class Unlike(Technique):
    """Validation that finds something else on each rank."""

    card = Card(paper="none", section="Parallelism", saves="", costs="")

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        def other(job: Callable[[nn.Module], Any]) -> Any:
            found = evaluate(job)
            return {"loss": float(run.world.rank)} if isinstance(found, dict) else found

        return other


def agreed() -> dict[str, Any]:
    """Check -> what each rank found."""
    two = arranged(Mesh(data=2), "cpu")
    found = {
        "any": [two.any(two.rank == 1), two.any(False)],
        "numbers": two.numbers(two.rank + 0.5),
        "first": first(two),
        "damaged": damaged(two),
        "norm": norm(arranged(Mesh(pipeline=2, data=1), "cpu")),
        "parts": parts(),
        "validation": train(made(*layout("replicate"), Unlike(), mesh={"data": 2}), save=False).validation["loss"],
    }
    told = two.gathered(found)
    return {name: [one[name] for one in told] for name in found}


def first(two: World) -> bool:
    """Whether the others do a job after the first, though it takes longer than they wait for anything else."""
    place = files() / "built"

    def build() -> bool:
        if two.first:
            time.sleep(2)
            place.touch()
        return place.exists()

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)  # pyright: ignore
    found = two.after_first(build)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=120), dist.group.WORLD)  # pyright: ignore
    return found


def damaged(two: World) -> list[Any]:
    """What is said of a file that is altered, and how many files this rank has read for it."""
    folder = files() / "step-000000001"
    checkpoint.save(folder, {"model": {f"w{i}": torch.full((4,), float(i)) for i in range(4)}}, {}, two)
    if two.first:
        victim = folder / "model-00001.safetensors"
        victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    two.wait()
    with patch.object(checkpoint, "digest", wraps=checkpoint.digest) as read:
        try:
            checkpoint.load(folder, two)
        except UserError as error:
            return [error.what, read.call_count]
    return ["nothing", 0]


def norm(stages: World) -> float:
    """Of gradients that only the second stage has, in another type than torch's zero."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    weight.grad = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    run: Any = SimpleNamespace(world=stages, model=nn.Module(), repeated=frozenset(), device=torch.device("cpu"))
    return float(Run.norm(run, [weight] if stages.rank else []))


def parts() -> list[float]:
    """Buckets of gradients that a rank sends in two steps of four parts each, and the gap to whole batches."""
    sent: list[Any] = []

    def counted(state, bucket):  # pyright: ignore  # as of `_mean`: torch looks at annotations
        sent.append(bucket.index())
        return mean(state, bucket)

    mean, ends = replicas._mean, list[Any]()
    with patch.object(replicas, "_mean", counted):
        for more in ((), (example("accumulate", parts=4),)):
            sent.clear()
            made_of = made(*layout("replicate"), *more, mesh={"data": 2}, duration="2 step", validate={"every": 0})
            ends.append(state(train(made_of, save=False).run))
    return [sent.count(0), apart(*ends)]
