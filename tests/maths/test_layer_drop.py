"""Layer dropping: which blocks, how often, what is computed, and that outputs are right on average."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scrimp
from scrimp.errors import UserError
from scrimp.run import Run
from scrimp.techniques.incremental.layer_drop import LayerDrop, chance, depths, drawn
from scrimp.training import train
from tiny import example, recipe, run_of, step
from tiny_tasks import recipe_for

MODEL = {"layers": 12, "width": 16, "heads": 2, "dropout": 0.0}


def made(**settings: Any) -> Run:
    return run_of(recipe(example("layer_drop", **settings), model=MODEL, dtype="float64", duration="1000 step"))


def calls(run: Run) -> list[int]:
    """Blocks whose attention a forward pass runs."""
    seen: list[int] = []
    hooks = [
        block.attention.register_forward_hook(lambda *_, i=i: seen.append(i))
        for i, block in enumerate(run.model.blocks)  # type: ignore[arg-type]
    ]
    assert run.loss
    run.loss(run.model, run.batch(run.clock.step))
    for hook in hooks:
        hook.remove()
    return seen


def test_chances_by_hand() -> None:
    """At theta = 0.5 and L = 12 the last block is kept with 1 - 11/24, and the mean is 0.7708."""
    found = [chance(i, 12, 0.5) for i in range(12)]
    assert found[0] == 1
    assert found[11] == pytest.approx(1 - 11 / 24, abs=1e-15)
    assert sum(found) / 12 == pytest.approx(1 - 11 / 24 * 0.5, abs=1e-12)
    assert round(sum(found) / 12, 4) == 0.7708


def test_theta_falls_with_progress() -> None:
    run, technique = made(), LayerDrop(keep=0.5, gamma=100.0)
    assert technique.theta(run) == 1
    for at in (1, 10, 100):
        run.clock.step = at
        assert technique.theta(run) == pytest.approx(0.5 * math.exp(-100 * at / 1000) + 0.5, abs=1e-12)
    run.clock.step = 1
    assert LayerDrop(mode="constant", keep=0.3).theta(run) == pytest.approx(0.3, abs=1e-15)


def test_draws_are_uniform_and_apart() -> None:
    values = torch.tensor([drawn(0, i, "blocks.1") for i in range(4000)], dtype=torch.float64)
    assert 0 <= float(values.min()) < 0.01
    assert 0.99 < float(values.max()) < 1
    assert float(values.mean()) == pytest.approx(0.5, abs=0.02)
    other = torch.tensor([drawn(0, i, "blocks.2") for i in range(4000)], dtype=torch.float64)
    assert abs(float(torch.corrcoef(torch.stack([values, other]))[0, 1])) < 0.05
    assert drawn(0, 1, "blocks.1") != drawn(1, 1, "blocks.1")


def test_blocks_are_left_out_as_often_as_said_and_not_computed() -> None:
    run = made(mode="constant", keep=0.5)
    assert calls(run) == list(range(12))
    kept = torch.zeros(12)
    for i in range(1, 401):
        run.clock.step = i
        if i <= 20:
            seen = calls(run)
            assert run.gauges["layer_drop_kept"] == len(seen) / 12
            assert seen == [j for j in range(12) if drawn(run.seed, i, f"blocks.{j}") < chance(j, 12, 0.5)]
        kept += torch.tensor([drawn(run.seed, i, f"blocks.{j}") < chance(j, 12, 0.5) for j in range(12)])
    assert kept[0] == 400
    assert float(kept.mean()) / 400 == pytest.approx(0.7708, abs=0.02)


@dataclass(frozen=True)
class Always:
    """A clock at one step."""

    step: int = 1
    position: int = 1
    begun: int = 0
    progress: float = 0.5


def bare() -> Any:
    """What the technique reads of a run."""
    return SimpleNamespace(task=1, clock=Always(), seed=0, where=lambda *_: "here", log=lambda *_, **__: None)


class Linear(nn.Module):
    """A block that is linear, so that the mean of outputs is the output of the mean."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.pre = True
        self.weight = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.weight


def test_outputs_are_right_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all 2^3 choices of four blocks, weighted by their chances."""
    model = nn.Sequential(*(Linear(i) for i in range(4)))
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    wanted = model(x)
    run = bare()
    gates = dict[str, bool]()
    monkeypatch.setattr(
        "scrimp.techniques.incremental.layer_drop.drawn", lambda seed, step, name: 0.0 if gates[name] else 0.9999
    )
    example("layer_drop", mode="constant", keep=0.5).wrap(model, run)
    mean, share = torch.zeros_like(wanted), 0.0
    for choice in itertools.product((False, True), repeat=3):
        gates.update(dict(zip("0123", (True, *choice), strict=True)))
        odds = math.prod(chance(i + 1, 4, 0.5) if on else 1 - chance(i + 1, 4, 0.5) for i, on in enumerate(choice))
        mean, share = mean + odds * model(x), share + odds
    assert share == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(mean, wanted, rtol=1e-12, atol=1e-12)
    model.eval()
    assert torch.equal(model(x), wanted)


def test_both_passes_and_all_parts_leave_out_the_same_blocks() -> None:
    run = run_of(recipe(example("layer_drop", mode="constant"), example("sam"), example("accumulate"), model=MODEL))
    step(run)
    batch, seen = run.batch(1), list[list[bool]]()
    assert run.backward and run.loss
    inner = run.loss

    def watched(model: nn.Module, part: Any) -> Tensor:
        hits = [False] * 12
        hooks = [
            b.attention.register_forward_hook(lambda *_, i=i: hits.__setitem__(i, True))
            for i, b in enumerate(model.blocks)  # type: ignore[arg-type]
        ]
        loss = inner(model, part)
        for hook in hooks:
            hook.remove()
        seen.append(hits)
        return loss

    run.loss = watched
    run.backward(batch, run.task.count(batch))
    assert len(seen) == 4
    assert all(hits == seen[0] for hits in seen)
    assert not all(seen[0])
    for i, block in enumerate(run.model.blocks):  # type: ignore[arg-type]
        assert all((p.grad is not None) == seen[0][i] for p in block.parameters())


def test_weights_left_out_stay_with_their_counters() -> None:
    run = run_of(recipe(example("layer_drop", mode="constant"), example("adamw"), model=MODEL))
    step(run)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    out = next(i for i in range(12) if drawn(0, 1, f"blocks.{i}") >= chance(i, 12, 0.5))
    step(run)
    blocks = run.model.get_submodule("blocks").named_parameters("blocks")
    moved = {n.split(".")[1] for n, p in blocks if not torch.equal(before[n], p)}
    assert str(out) not in moved
    assert "0" in moved
    assert run.optimizer
    counts = {n: int(run.optimizer.state[p]["step"]) for n, p in run.model.named_parameters()}
    assert counts[f"blocks.{out}.mlp.up.weight"] == 1
    assert counts["blocks.0.mlp.up.weight"] == 2


def test_validation_uses_all_blocks() -> None:
    run, plain = made(mode="constant"), run_of(recipe(model=MODEL, dtype="float64"))
    run.clock.step = 7
    batch = run.batch(7)
    scores = [r.evaluate(lambda model, r=r: r.task.evaluate(model, [batch]))["loss"] for r in (run, plain)]  # type: ignore[misc]
    assert scores[0] == scores[1]


def test_the_first_step_of_a_stage_keeps_all() -> None:
    found = train(recipe(example("layer_drop", mode="constant"), example("stack", at=(0.5,)), model=MODEL), save=False)
    run, technique = found.run, LayerDrop(mode="constant")
    assert run.clock.begun == 4
    run.clock.step = 4
    assert technique.theta(run) == 1
    run.clock.step = 5
    assert technique.theta(run) == 0.5


def test_lists_count_on_their_own() -> None:
    assert depths(["a.0", "a.1", "b.0"]) == {"a.0": (0, 2), "a.1": (1, 2), "b.0": (0, 1)}
    run = run_of(recipe_for("seq2seq", "layer_drop"))
    wrapped = [n for n, m in run.model.named_modules() if "forward" in vars(m)]
    assert len(wrapped) == 8


class Pair(nn.Module):
    """A block that returns more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


def test_what_it_refuses() -> None:
    with pytest.raises(UserError, match=r"norms after their branches.*norm_at: pre"):
        run_of(recipe(example("layer_drop"), model=MODEL | {"norm_at": "post"}))
    with pytest.raises(UserError, match="no list has a second block"):
        run_of(recipe(example("layer_drop"), model=MODEL | {"layers": 1}))
    with pytest.raises(UserError, match="your own loop does not have"):
        scrimp.apply(nn.Sequential(Linear(0), Linear(1)), [example("layer_drop")])
    with pytest.raises(UserError, match="keep must be more than 0"):
        example("layer_drop", keep=0.0)
    run = bare()
    model = nn.Sequential(Pair(), Pair())
    example("layer_drop").wrap(model, run)
    with pytest.raises(UserError, match="does not map a tensor to one of the same shape"):
        model(torch.zeros(2, 3))


def test_a_growing_model_may_begin_with_one_block() -> None:
    stack = example("stack", at=("2 step",), depths=(1, 2))
    result = train(recipe(stack, example("layer_drop"), model=MODEL | {"layers": 2}, duration="4 step"), save=False)
    assert result.validation["loss"] > 0
