"""Chained hooks on saved activations: what reaches them, in which order, and that nothing else is held."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp import saved
from scrimp.meter import LiveBytes
from scrimp.models.seams import blocks
from scrimp.run import Run
from tiny import assert_equal, example, recipe, run_of

MODEL = {"layers": 2, "width": 16, "heads": 2, "dropout": 0.0}


class Log:
    """A step that copies what it gets and notes it."""

    def __init__(self, name: str = "", notes: list[str] | None = None) -> None:
        self.name, self.notes = name, notes if notes is not None else []
        self.seen: list[tuple[int, torch.Size]] = []

    def pack(self, tensor: Tensor, number: int) -> dict[str, Tensor]:
        assert tensor.is_contiguous()
        assert tensor.nbytes == tensor.untyped_storage().nbytes()
        self.seen.append((number, tensor.shape))
        self.notes.append(f"{self.name} packs")
        return {"copy": tensor.clone()}

    def unpack(self, kept: dict[str, Tensor]) -> Tensor:
        self.notes.append(f"{self.name} unpacks")
        return kept["copy"]


def run(*techniques: Any, **settings: Any) -> Run:
    return run_of(recipe(*techniques, **{"model": MODEL, **settings}))


def treated(made: Run, *logs: Log, phases: tuple[str, ...] = ("move", "compress")) -> Run:
    for log, phase in zip(logs, phases, strict=False):
        saved.treat(list(blocks(made.model).values()), phase, log.pack, log.unpack)
    return made


def gradients(made: Run) -> dict[str, Tensor]:
    batch = made.batch(0)
    assert made.backward
    loss = made.backward(batch, made.task.count(batch))
    return {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None} | {"loss": loss}


@pytest.mark.parametrize("others", [(), ("recompute",), ("autocast",), ("lora",), ("recompute", "autocast")])
def test_gradients_are_those_without(others: tuple[str, ...]) -> None:
    log = Log()
    wanted = gradients(run(*map(example, others)))
    assert_equal(wanted, gradients(treated(run(*map(example, others)), log)))
    assert log.seen


def test_each_storage_of_a_block_comes_once_and_no_weight() -> None:
    """B T C = 4 16 16: input, norm, qkv (three views), attention (two views), sum, norm, up, gelu; and statistics."""
    log = Log()
    gradients(treated(run(), log))
    numels = sorted(shape.numel() for number, shape in log.seen if number == 0)
    unit = 4 * 16 * 16
    # Two norms have a mean and a deviation a token; attention a log-sum-exp a token and head.
    assert [n for n in numels if n >= unit] == [unit] * 5 + [3 * unit, 4 * unit, 4 * unit]
    assert [n for n in numels if n < unit] == [4 * 16] * 4 + [4 * 16 * 2]


def test_casts_of_weights_and_what_lora_makes_of_them_are_no_activations() -> None:
    for technique in ("autocast", "lora"):
        log = Log()
        made = treated(run(example(technique)), log)
        gradients(made)
        weights = {s for p in made.model.parameters() for s in (p.shape, p.t().shape if p.ndim == 2 else p.shape)}
        # What of a block has two dimensions and is square or flat came in rows of tokens: B T = 64.
        assert not [s for _, s in log.seen if s in weights and s[0] != 4 * 16]


def test_compression_comes_before_moving_whoever_was_added_first() -> None:
    notes: list[str] = []
    gradients(treated(run(), Log("move", notes), Log("compress", notes)))
    assert notes[:2] == ["compress packs", "move packs"]
    assert notes[-2:] == ["move unpacks", "compress unpacks"]


def test_a_step_may_leave_a_tensor_alone() -> None:
    made, log = run(), Log()
    saved.treat(list(blocks(made.model).values()), "compress", lambda t, _: t, lambda kept: pytest.fail("not packed"))
    assert_equal(gradients(run()), gradients(treated(made, log)))


def test_of_a_recomputed_block_only_its_input_comes() -> None:
    log = Log()
    gradients(treated(run(example("recompute")), log))
    # The numbers of the samples, which key dropout, are one tensor for all blocks.
    assert log.seen == [(0, (4, 16, 16)), (0, (4,)), (1, (4, 16, 16))]


@pytest.mark.parametrize("others", [(), ("recompute",)])
def test_nothing_of_a_block_is_held(others: tuple[str, ...]) -> None:
    """With steps that throw everything away, what waits for the backward pass is what is outside the blocks."""
    live: list[int] = []
    for layers in (2, 6):
        made = run(*map(example, others), model=MODEL | {"layers": layers})
        saved.treat(list(blocks(made.model).values()), "move", lambda t, _: None, lambda _: torch.empty(0))
        batch, meter = made.batch(0), LiveBytes()
        meter.register([*made.model.parameters(), *batch.values()])
        before = meter.live
        assert made.loss
        with meter:
            loss = made.loss(made.model, batch)
        live.append(meter.live - before + 0 * loss.ndim)
    assert live[0] == live[1]


class Square(nn.Module):
    """Saves its input, and again after it has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        held = (x * self.weight).detach()
        first = self.weight * held.clone().mul_(2)
        held += 1
        return first.sum() + (self.weight * held).sum()


def test_a_storage_that_has_changed_comes_again_and_the_graph_holds_all() -> None:
    module, log = Square(), Log()
    saved.treat([module], "move", log.pack, log.unpack)
    out = module(torch.arange(3.0))
    out.backward()
    assert module.weight.grad is not None
    assert module.weight.grad.item() == 2 * 3 + (3 + 3)
    saver: Any = module.forward
    alive = [weakref.ref(found()) for _, found in saver.saver.known.values() if found() is not None]
    del out
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]
    assert not saver.saver.known
