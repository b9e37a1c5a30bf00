"""Chains of blocks that are run again: the same gradients, and no more bytes than promised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scrimp.applied import apply
from scrimp.errors import UserError
from scrimp.meter import LiveBytes
from scrimp.remat import choose
from scrimp.remat.chain import Piece, everything, simulate
from scrimp.run import Run
from scrimp.technique import Technique
from scrimp.trace import Trace
from tiny import TinyData, assert_equal, example, recipe, run_of, step
from tiny_tasks import TINY, Memory

MODEL = {"layers": 4, "width": 16, "heads": 2, "dropout": 0.1}
LONG: dict[str, Any] = {"model": MODEL, "data": TinyData(context=32)}
MODES: list[dict[str, Any]] = [
    {"mode": "sqrt"}, {"mode": "sqrt", "segment": 3}, {"mode": "optimal", "budget": 0.5},
    {"mode": "optimal", "budget": 0.7}, {"mode": "milp", "budget": 0.6}, {"mode": "dynamic", "budget": 0.5},
    {"budget": 0.5}, {"budget": 0.75}, {"budget": "1MB"},
]  # fmt: skip
NAMES = [json.dumps(mode) for mode in MODES]


def mode(settings: dict[str, Any]) -> Technique:
    return example("recompute", **{"mode": "auto", **settings})


def gradients(run: Run) -> dict[str, Tensor]:
    batch = run.batch(0)
    assert run.backward
    loss = run.backward(batch, run.task.count(batch))
    return {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None} | {"loss": loss}


@contextmanager
def seen() -> Iterator[list[list[Piece]]]:
    """What is measured inside."""
    found: list[list[Piece]] = []
    true = choose.measured

    def kept(*args: Any) -> list[Piece]:
        found.append(true(*args))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "measured", kept)
        yield found


@pytest.mark.parametrize("settings", MODES, ids=NAMES)
@pytest.mark.parametrize("others", [(), ("autocast", "lora")], ids=["plain", "autocast-lora"])
def test_gradients_are_those_without(settings: dict[str, Any], others: tuple[str, ...]) -> None:
    more = [example(name) for name in others]
    plain = gradients(run_of(recipe(*more, **LONG)))
    assert len(plain) > 8
    assert_equal(plain, gradients(run_of(recipe(mode(settings), *more, **LONG))))


@pytest.mark.parametrize("settings", MODES, ids=NAMES)
def test_the_planned_peak_is_the_measured_one(settings: dict[str, Any]) -> None:
    made = recipe(mode(settings), **LONG)
    real = run_of(made)
    batch = real.batch(0)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        planned = peak(run_of(made), {k: fake.from_tensor(v) for k, v in batch.items()})
    assert planned == peak(real, batch) > 0
    # The second pass, too, whose schedule is known.
    step(real)
    assert peak(real, batch) > 0


def peak(run: Run, batch: dict[str, Tensor]) -> int:
    assert run.backward and run.step and run.optimizer
    count = run.task.count(batch)
    run.set_lr()
    with LiveBytes() as meter:
        run.backward(batch, count)
        run.step()
    run.optimizer.zero_grad(set_to_none=True)
    return meter.peak


def blocks_peak(run: Run) -> int:
    """Most bytes that operators of blocks made in forward passes, first or again, and that were there at once."""
    batch = run.batch(0)
    assert run.loss
    trace = Trace()
    trace.part = "step"
    trace.mark([*run.model.parameters(), *batch.values()], "weights")
    with trace.watching(run.model), trace:
        run.loss(run.model, batch).backward()
    inside = [b for b in trace.blocks if b.op >= 0 and trace.ops[b.op].module.startswith("blocks.")]
    inside = [b for b in inside if trace.ops[b.op].phase in ("forward", "recompute")]
    changes = sorted([(b.born, b.size) for b in inside] + [(b.died, -b.size) for b in inside if b.died >= 0])
    live = most = 0
    for _, size in changes:
        live += size
        most = max(most, live)
    return most


@pytest.mark.parametrize("settings", [s for s in MODES if s.get("budget") in (0.45, 0.5, 0.6, 0.7, 0.75)])
def test_blocks_stay_within_the_budget(settings: dict[str, Any]) -> None:
    """What blocks hold, but for x_0, which is made before them, and the last output, which is the head's."""
    with seen() as found:
        run = run_of(recipe(mode(settings), **LONG))
        held = blocks_peak(run)
    (pieces,) = found
    assert held <= settings["budget"] * everything(pieces)
    between = pieces[-1].full - pieces[-1].pack
    assert 0.9 * everything(pieces) < blocks_peak(run_of(recipe(**LONG))) <= everything(pieces) + between


def test_the_simulated_schedule_is_what_is_held() -> None:
    for settings in ({"mode": "sqrt", "segment": 2}, {"mode": "optimal", "budget": 0.5}):
        with seen() as found:
            run = run_of(recipe(mode(settings), **LONG))
            held = blocks_peak(run)
        pieces = found[0]
        schedule = (
            choose.segments(4, 2) if settings["mode"] == "sqrt" else choose.optimal(pieces, everything(pieces) // 2)
        )
        assert schedule is not None
        # Beside x_0, which is made before the blocks, there is x_L, which waits for the head's backward pass.
        assert 0.9 * simulate(pieces, schedule)[0] < held <= simulate(pieces, schedule)[0]


def test_what_is_measured_of_a_block() -> None:
    """Of [B, T, C] numbers: its input one, its pack 15 (norms' outputs 2, qkv 3, attention 1, the second norm's input
    1, up and its activation 8), with two statistics for each token and norm, and one for each head."""
    with seen() as found:
        gradients(run_of(recipe(mode({"mode": "sqrt"}), model=MODEL | {"dropout": 0.0}, data=TinyData(context=32))))
    piece, unit, tokens = found[0][0], 4 * 32 * 16 * 4, 4 * 32
    assert piece.input == unit
    assert piece.pack == 15 * unit + 4 * tokens * (4 + 2)
    assert piece.full > piece.pack + unit
    assert 0.6 * piece.cost < piece.again < piece.cost


def test_segments_of_one_block_are_mode_block() -> None:
    runs = [run_of(recipe(example("recompute", **s), **LONG)) for s in ({"mode": "sqrt"}, {"mode": "block"})]
    same = [peak(run, run.batch(0)) for run in runs]
    assert same[0] == same[1]


def test_a_budget_takes_the_cheapest_that_fits() -> None:
    names = []
    true = choose.choices
    for share in (1.0, 0.5):
        kept: list[choose.Choice] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choose, "choices", lambda *args, kept=kept: kept.extend(true(*args)) or list(kept))
            gradients(run_of(recipe(mode({"budget": share}), **LONG)))
        room = share * kept[0].bytes
        best = min((c for c in kept if c.bytes <= room), key=lambda c: c.cost)
        names.append(best.name)
        costs = {c.name: c.cost for c in kept}
        assert costs["none"] == 0 < costs["every 3"] == costs["every 2"] < costs["block"]
    assert names[0] == "none"
    assert names[-1] != "none"


def test_settings_that_say_nothing_are_refused() -> None:
    for settings, words in (
        ({"mode": "optimal"}, "needs a budget"), ({"mode": "block", "budget": 0.5}, "knows no budget"),
        ({"budget": "many"}, "not a size"), ({"mode": "block", "segment": 2}, "no segments"),
        ({"budget": 0.5, "every": 2}, "every"), ({"budget": -1}, "at least 0"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            mode(settings)
    for name in ("optimal", "milp", "dynamic", "auto"):
        with pytest.raises(UserError, match="budget"):
            gradients(run_of(recipe(mode({"mode": name, "budget": "40kB"}), **LONG)))
    with pytest.raises(UserError, match="cannot be compiled"):
        run_of(recipe(mode({"mode": "sqrt"}), example("compile"), **LONG))


def test_two_lists_of_blocks_share_no_bytes() -> None:
    tiny = TINY["seq2seq"]
    settings: dict[str, Any] = {"model": dict(tiny.model), "data": Memory("seq2seq"), "task": "seq2seq"}
    plain = gradients(run_of(recipe(**settings)))
    for own in ({"budget": 0.8, "mode": "optimal"}, {"mode": "sqrt"}, {"mode": "dynamic", "budget": 0.9}):
        assert_equal(plain, gradients(run_of(recipe(mode(own), **settings))))
    with pytest.raises(UserError, match="2 lists of blocks"):
        run_of(recipe(mode({"budget": "1MB"}), **settings))


@pytest.mark.parametrize("others", [("layer_drop",), ("accumulate",), ("sam",), ("token_drop",), ("early_bird",)])
def test_with_others_weights_are_those_without(others: tuple[str, ...]) -> None:
    made = [example(name) for name in others]
    found = []
    for more in ([], [mode({"mode": "optimal", "budget": 0.6})], [mode({"mode": "dynamic", "budget": 0.6})]):
        run = run_of(recipe(*made, *more, **LONG))
        for _ in range(3):
            step(run)
        found.append({n: p.detach() for n, p in run.model.named_parameters()})
    assert_equal(found[0], found[1])
    assert_equal(found[0], found[2])


@pytest.mark.parametrize("settings", [{"mode": "sqrt", "segment": 2}, {"mode": "dynamic", "budget": 0.6}])
def test_a_foreign_model_draws_the_same_dropout_again(settings: dict[str, Any]) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.GELU()) for _ in range(4)))

    found = []
    for techniques in ([], [mode(settings)]):
        net = apply(model(), techniques)
        torch.manual_seed(1)
        net(torch.ones(4, 8)).sum().backward()
        found.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert_equal(*found)


def test_gradients_may_be_asked_for_twice() -> None:
    run = run_of(recipe(mode({"mode": "sqrt", "segment": 2}), **LONG))
    batch, weight = run.batch(0), run.model.get_parameter("blocks.0.mlp.up.weight")
    assert run.loss
    loss = run.loss(run.model, batch)
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
