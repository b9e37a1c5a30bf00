"""A plan says what a run needs: compared with runs that were measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scrimp.machines.machine import KNOWN, Machine, machine
from scrimp.meter import LiveBytes
from scrimp.planning import plan
from scrimp.recipe import Recipe
from scrimp.registry import modules
from scrimp.technique import Card, Technique
from scrimp.trace import Trace
from scrimp.training import train
from tiny import MODEL, TinyData, example, recipe

BATCHES = 4096
"""Bytes of the batches that a run holds and a plan does not count."""
CPU = Machine(name="any", device="cpu", memory=1 << 34, flops={"float32": 1e11}, bandwidth=1e10, overhead=1e-5)


def measured(made: Recipe, monkeypatch: pytest.MonkeyPatch) -> int:
    """The highest live bytes of a whole run."""
    monkeypatch.setenv("SCRIMP_PRODUCTS", "default")
    with LiveBytes() as meter:
        train(made, data=made.data.open())
    return meter.peak


@pytest.mark.parametrize("name", sorted(set(modules()) - {"compile"}))
def test_plans_the_live_bytes_of_the_whole_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(example(name), out=str(tmp_path))
    planned = plan(made, CPU, made.data.open())
    assert 0 <= measured(made, monkeypatch) - planned.live <= BATCHES


@pytest.mark.parametrize("changes", [
    {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False},
    {"heads": 4, "kv_heads": 2, "positions": "rotary", "qk_norm": True},
    {"tied": False}, {"norm_at": "post"}, {"dropout": 0.0}, {"activation": "gelu_tanh"},
])  # fmt: skip
def test_plans_every_kind_of_model(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(example("adamw"), model=MODEL | changes, out=str(tmp_path))
    planned = plan(made, CPU, made.data.open())
    assert 0 <= measured(made, monkeypatch) - planned.live <= BATCHES


def test_the_kinds_add_up_and_say_what_is_what() -> None:
    made = recipe(example("adamw"), model=MODEL | {"dropout": 0.0})
    stage = plan(made, CPU, made.data.open()).stages[0]
    weights = stage.parameters * 4
    assert sum(stage.peak.kinds.values()) == stage.peak.total
    assert stage.peak.kinds["weights"] == weights
    assert 2 * weights <= stage.peak.kinds["states"] <= 2 * weights + 4 * 60
    assert stage.peak.op is not None and stage.peak.op.module
    assert max(live for live, _ in stage.line) == stage.peak.total


def test_frozen_weights_have_neither_gradients_nor_states() -> None:
    made = recipe(example("adamw"), example("lora"))
    stage = plan(made, CPU, made.data.open()).stages[0]
    assert stage.trained < stage.parameters / 5
    assert stage.peak.kinds["states"] <= 8 * stage.trained + 4 * 60


def test_stages_are_planned_one_by_one() -> None:
    made = recipe(example("adamw"), example("stack"), example("length_warmup"))
    stages = plan(made, CPU, made.data.open()).stages
    assert [s.steps for s in stages] == [2, 2, 4]
    assert [s.tokens for s in stages] == [32, 64, 64]
    assert stages[0].parameters < stages[2].parameters
    assert stages[0].peak.total < stages[1].peak.total < stages[2].peak.total


@pytest.mark.parametrize(("duration", "steps"), [("12 step", 12), ("640 tok", 10), ("2 epoch", 20), ("44 sample", 11)])
def test_durations_in_every_unit(duration: str, steps: int) -> None:
    made = recipe(duration=duration)
    assert sum(s.steps for s in plan(made, CPU, made.data.open()).stages) == steps


def test_flops_are_those_of_the_algorithm() -> None:
    made = recipe(example("sgd"), model=MODEL | {"dropout": 0.0})
    stage = plan(made, CPU, made.data.open()).stages[0]
    flops, tokens, width, layers, vocab = stage.flops(), 64, 32, 4, 32
    products = 2 * tokens * (layers * 12 * width * width + vocab * width)
    attention = 2 * layers * 4 * 16 * 16 * width
    assert flops["forward"] == products + attention
    # Twice the products of the forward pass; attention computes its scores again.
    assert flops["backward"] == 2 * products + 2.5 * attention


def test_recomputation_is_told_apart() -> None:
    plain, again = (plan(recipe(example("sgd"), *more), CPU, TinyData().open()).stages[0]
                    for more in ((), (example("recompute"),)))  # fmt: skip
    assert "recompute" not in plain.flops()
    assert 0 < again.flops()["recompute"] < again.flops()["forward"]
    assert again.flops()["backward"] == plain.flops()["backward"]
    assert again.peak.total < plain.peak.total


def test_a_gpu_is_planned_without_one() -> None:
    made = recipe(example("adamw"))
    for name in KNOWN:
        planned = plan(made, name, made.data.open())
        assert planned.fits and planned.seconds > 0
        assert any("no CUDA" in note for note in planned.notes) or torch.cuda.is_available()
        assert (planned.joules is None) == (machine(name).power is None)
    gpu = plan(made, "A100-80", made.data.open())
    assert gpu.live >= plan(made, CPU, made.data.open()).live
    assert gpu.stages[0].reserved >= gpu.live


def test_a_gpu_without_bfloat16_is_noted() -> None:
    made = recipe(example("adamw"), example("autocast"))
    assert any("no fast bfloat16" in note for note in plan(made, "V100", made.data.open()).notes)
    assert not any("no fast" in note for note in plan(made, "L4", made.data.open()).notes)


@dataclass(frozen=True, kw_only=True)
class Longer(Technique):
    """Batches that grow within a stage, with a cost that no dry run sees."""

    card: ClassVar[Card] = Card(paper="none", section="Data", saves="nothing", costs="time")

    def batch(self, batch: Any, run: Any) -> Any:
        """Twice as long from step 6 on."""
        return lambda step: {n: t[:, : 16 if step >= 6 else 8] if t.ndim > 1 else t for n, t in batch(step).items()}

    def price(self, cost: dict[str, float], run: Any) -> dict[str, float]:
        """A megabyte and a second."""
        return cost | {"bytes": cost["bytes"] + 1e6, "seconds": cost["seconds"] + 1.0}


def test_the_largest_batch_of_a_stage_counts_and_so_does_price() -> None:
    base = recipe()
    made = recipe(Longer())
    plain, priced = plan(base, CPU, base.data.open()).stages[0], plan(made, CPU, made.data.open()).stages[0]
    assert priced.tokens == plain.tokens == 64
    assert priced.peak.total == pytest.approx(plain.peak.total + 1e6, abs=BATCHES)
    assert priced.seconds == pytest.approx(plain.seconds + 1.0, rel=0.01)


def test_a_plan_reads_no_text_that_is_not_tokenized(tmp_path: Path) -> None:
    import argparse

    text = Path(argparse.__file__).read_text()
    (tmp_path / "text.txt").write_text(text * 4)
    made = Recipe.read({
        "model": "gpt-1m", "techniques": {"adamw": {}}, "duration": "1 epoch", "batch": 4,
        "data": {"source": str(tmp_path), "vocab": 600, "context": 64, "cache": str(tmp_path / "cache")},
    })  # fmt: skip
    planned = plan(made, CPU)
    assert any("not built yet" in note for note in planned.notes)
    assert planned.stages[0].steps == pytest.approx(len(text) * 4 / 4 / 64 * 0.95 / 4, rel=0.01)
    assert not list((tmp_path / "cache").rglob("train.bin"))
    real = made.data.open()
    assert plan(made, CPU).stages[0].peak.total == planned.stages[0].peak.total
    assert real.tokenizer.vocab == 600


class Two(nn.Module):
    """Two layers of which one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.first(x)))


def test_operators_know_their_module_and_phase() -> None:
    model, x = Two(), torch.randn(3, 4, requires_grad=True)
    trace = Trace()
    trace.part = "step"
    with trace.watching(model), trace:
        model(x).sum().backward()
    found = [(op.module, op.phase) for op in trace.ops if op.name in ("aten.addmm", "aten.mm")]
    assert found[:3] == [("first", "forward"), ("first", "forward"), ("second", "forward")]
    assert set(found[3:]) == {("second", "backward"), ("first", "backward")}
    kinds = {block.kind for block in trace.blocks if block.died < 0}
    assert "gradients" in kinds
    assert all(not module._forward_hooks for module in model.modules())


def test_a_trace_counts_as_the_meter_does() -> None:
    with LiveBytes() as meter:
        a = torch.ones(1000)
        b = (a + 1) * 2
        del a
        c = b.view(10, 100) + 1
    with Trace() as trace:
        a = torch.ones(1000)
        b = (a + 1) * 2
        del a
        c = b.view(10, 100) + 1
    assert trace.peak == meter.peak
    assert sum(block.size for block in trace.blocks if block.died < 0) == b.nbytes + c.nbytes
    assert np.isfinite(trace.peak)
