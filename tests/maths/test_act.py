"""Activation compression: exact forward, right on average backward, and the bytes that the formula says."""

from __future__ import annotations

import torch

from scrimp.meter import LiveBytes
from scrimp.run import Run
from tiny import example, recipe, run_of

WIDE = {"layers": 2, "width": 64, "heads": 4, "dropout": 0.0}


def held(*techniques: object) -> int:
    """Bytes that the graph holds of the blocks after a forward pass."""
    found = []
    for layers in (2, 3):
        run = run_of(recipe(*techniques, model=WIDE | {"layers": layers}))  # type: ignore[arg-type]
        batch = run.batch(0)
        assert run.loss
        meter = LiveBytes()
        meter.register([*run.model.parameters(), *batch.values()])
        before = meter.live
        with meter:
            loss = run.loss(run.model, batch)
        found.append(meter.live - before)
        del loss
    return found[1] - found[0]


def test_a_block_keeps_what_the_formula_says() -> None:
    """16 numbers for each of its input: bits / 8 + 1 / 64 bytes each, and the statistics of norms and attention."""
    unit, statistics = 4 * 16 * 64, 4 * 4 * 4 * 16 + 16 * 4 * 16
    plain = held()
    assert plain == 16 * 4 * unit + statistics
    for bits, factor in ((8, 3.5), (4, 6.0), (2, 9.0)):
        mine = held(example("act", bits=bits, average=0.0))
        assert mine == 16 * unit * (bits / 8 + 1 / 64) + statistics
        assert plain / mine > factor


def gradients(run: Run) -> torch.Tensor:
    batch = run.batch(0)
    assert run.backward
    run.backward(batch, run.task.count(batch))
    return torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]).double()
