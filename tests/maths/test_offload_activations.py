"""Offloaded activations: the same bits, fewer live bytes, in the order in which they are needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.applied import apply
from scrimp.disk import PAGE, Scratch
from scrimp.errors import UserError
from scrimp.meter import LiveBytes
from scrimp.run import Run
from scrimp.spill import PIECE, Spill
from scrimp.technique import Cost
from scrimp.techniques.offloading.offload_activations import Line, Moved, OffloadActivations
from tiny import assert_equal, example, recipe, run_of

MODEL = {"layers": 4, "width": 16, "heads": 2, "dropout": 0.1}


def made(*others: str, offload: dict[str, Any] | None = None, **settings: Any) -> Run:
    extra = [] if offload is None else [example("offload_activations", **offload)]
    return run_of(recipe(*map(example, others), *extra, **{"model": MODEL, **settings}))


def stepped(run: Run) -> tuple[dict[str, Tensor], int, int]:
    """Gradients, bytes that wait between the passes, and the peak."""
    batch, waiting = run.batch(0), 0
    count = run.task.count(batch)
    assert run.loss
    with LiveBytes() as meter:
        loss = run.loss(run.model, batch) / count
        waiting = meter.live
        loss.backward()
    return {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}, waiting, meter.peak


@pytest.mark.parametrize(
    ("others", "offload"),
    [((), {}), ((), {"depth": 0}), ((), {"depth": 9, "buffer": 2}), ((), {"fraction": 0.5})]
    + [((other,), {}) for other in ("recompute", "autocast", "lora")],
    ids=str,
)
def test_gradients_are_those_without(others: tuple[str, ...], offload: dict[str, Any]) -> None:
    plain, other = stepped(made(*others)), stepped(made(*others, offload=offload))
    assert_equal(plain[0], other[0])
    assert other[1] < plain[1]


def test_what_waits_is_what_the_last_blocks_keep() -> None:
    """In float64, B T C = 4 16 16: a block keeps 16 B T C numbers; all of least bytes leave."""
    block = 16 * 4 * 16 * 16 * 8
    settings = {"dtype": "float64", "model": MODEL | {"dropout": 0.0}}
    plain = stepped(made(**settings))[1]
    for keep, fraction, moved in [(1, 1.0, 3), (2, 1.0, 2), (0, 1.0, 4), (9, 1.0, 1), (1, 0.5, 2), (1, 0.0, 0)]:
        left = plain - stepped(made(offload={"keep": keep, "fraction": fraction}, **settings))[1]
        # The statistics of norms and attention are small and stay; the input of a block is the sum of the last one.
        assert left == pytest.approx(moved * block, rel=0.07), (keep, fraction)


def test_small_tensors_stay_and_the_host_of_a_cpu_is_no_other_memory() -> None:
    plain = stepped(made())[1]
    assert stepped(made(offload={"least": 1 << 20}))[1] == plain
    host = made(offload={"to": "host"})
    assert stepped(host)[1] == plain
    assert "saves nothing" in host.remarks[0]


def test_a_pattern_and_somebodys_own_model(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()) for _ in range(3)))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    technique = OffloadActivations(blocks="0|1", keep=0, least=1, folder=str(tmp_path))
    other = torch.autograd.grad(apply(model, [technique])(x).sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(wanted, other, strict=True))


class Notes:
    """A store that notes what it is asked."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def put(self, tensor: Tensor) -> Any:
        self.said.append(f"put {int(tensor[0])}")
        return tensor.clone()

    def fetch(self, kept: Any) -> bool:
        self.said.append(f"fetch {int(kept[0])}")
        return int(kept[0]) != 1

    def take(self, kept: Any, like: Moved) -> Tensor:
        self.said.append(f"take {int(kept[0])}")
        return kept


def test_those_of_the_block_before_are_fetched_backwards_while_there_is_room() -> None:
    notes = Notes()
    line = Line(notes, least=1, depth=1)
    # Tensors 0 and 1 of block 0, 2 and 3 of block 1, 4 of block 2.
    moved: list[Any] = [line.pack(torch.full((2,), float(i)), i // 2) for i in range(5)]
    notes.said.clear()
    line.unpack(moved.pop())
    assert notes.said == ["take 4", "fetch 3", "fetch 2"]
    notes.said.clear()
    line.unpack(moved.pop())
    assert notes.said == ["take 3", "fetch 2", "fetch 1"], "0 waits until there is room"
    moved.clear()
    line.pack(torch.zeros(2), 0)
    assert len(line.waiting) == 1, "what is gone does not wait"


@pytest.mark.parametrize("direct", [True, False])
def test_bytes_come_back_through_a_buffer_that_is_smaller(direct: bool, tmp_path: Path) -> None:
    file = Scratch(tmp_path, "test")
    file.direct = file.direct if direct else file.fd
    spill = Spill(file, 2 * PIECE)
    sizes = [1, PAGE - 1, PIECE, 3 * PIECE + 5, 100]
    given = [torch.arange(size, dtype=torch.int64).to(torch.uint8) for size in sizes]
    for _ in range(2):
        held: list[Any] = [spill.put(x.data_ptr(), x.nbytes) for x in given]
        assert not spill.fetch(held[3]), "there is room for one piece only"
        assert not os.listdir(tmp_path), "the file has no name, so nothing can be left behind"
        for number, x in enumerate(given):
            y = torch.empty_like(x)
            spill.take(held[number], y.data_ptr())
            assert torch.equal(x, y)
        held.clear()
        assert (spill.live, spill.end) == (0, 0), "places are used again"
    assert spill.reading.qsize() == 1


def test_the_buffer_is_in_the_plan() -> None:
    run = made(offload={"buffer": 8})
    assert run.fold("price", Cost()).bytes == 8 << 20


def test_more_than_all_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="fraction must be at most 1"):
        OffloadActivations(fraction=2.0)
