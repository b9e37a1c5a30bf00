"""A plan says what a run needs: compared with runs that were measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scrimp import room
from scrimp.dryrun import CannotPlanError
from scrimp.errors import UserError
from scrimp.machines.machine import KNOWN, Machine, machine
from scrimp.meter import LiveBytes
from scrimp.planning import plan
from scrimp.planview import text
from scrimp.recipe import Recipe
from scrimp.registry import modules
from scrimp.technique import Card, Cost, Technique, overrides
from scrimp.techniques.incremental.stack import Stack
from scrimp.techniques.optimizers.sgd import SGD
from scrimp.trace import Trace
from scrimp.training import train
from tiny import MODEL, TinyData, example, recipe, run_of, step
from tiny_tasks import Memory

BATCHES = 4096
"""Bytes of the batches that a run holds and a plan does not count."""
CPU = Machine(name="any", device="cpu", memory=1 << 34, flops={"float32": 1e11}, bandwidth=1e10, overhead=1e-5)


def measured(made: Recipe, monkeypatch: pytest.MonkeyPatch) -> int:
    """The highest live bytes of a whole run."""
    monkeypatch.setenv("SCRIMP_PRODUCTS", "default")
    with LiveBytes() as meter:
        train(made, data=made.data.open(), force=True)
    return meter.peak


@pytest.mark.parametrize("name", sorted(set(modules()) - {"compile"}))
def test_plans_the_live_bytes_of_the_whole_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(example(name), out=str(tmp_path))
    planned = plan(made, CPU, made.data.open())
    run = run_of(made)
    priced = run.fold("price", Cost()).bytes  # Of memory that is no tensor's, so that the counter does not see it.
    off = measured(made, monkeypatch) - (planned.live - priced)
    images = 4 * sum(t.nbytes for t in run.batch(0).values())
    assert off <= max(BATCHES, images)
    assert off >= 0 or overrides(example(name), "decide"), "what a run decides is planned at its largest"


@pytest.mark.parametrize("changes", [
    {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False},
    {"heads": 4, "kv_heads": 2, "positions": "rotary", "qk_norm": True},
    {"tied": False}, {"embed_width": 8}, {"norm_at": "post"}, {"dropout": 0.0}, {"activation": "gelu_tanh"},
])  # fmt: skip
def test_plans_every_kind_of_model(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(example("adamw"), model=MODEL | changes, out=str(tmp_path))
    planned = plan(made, CPU, made.data.open())
    assert 0 <= measured(made, monkeypatch) - planned.live <= BATCHES


def test_plans_tokens_that_are_dropped_by_their_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(example("token_drop", mode="loss", levels=1), model=MODEL | {"causal": False}, task="masked-lm",
                  data=Memory("masked-lm"), duration="4 step", out=str(tmp_path))  # fmt: skip
    planned = plan(made, CPU, made.data.open())
    assert 0 <= measured(made, monkeypatch) - planned.live <= BATCHES


def test_the_kinds_add_up_and_say_what_is_what() -> None:
    made = recipe(example("adamw"), model=MODEL | {"dropout": 0.0})
    stage = plan(made, CPU, made.data.open()).stages[0]
    weights = stage.parameters * 4
    assert stage.peak.kinds["weights"] == weights
    assert 2 * weights <= stage.peak.kinds["states"] <= 2 * weights + 4 * 60
    assert stage.peak.op is not None and stage.peak.op.module
    assert max(live for live, _ in stage.line) == stage.peak.total


def test_frozen_weights_have_neither_gradients_nor_states() -> None:
    made = recipe(example("adamw"), example("lora"))
    stage = plan(made, CPU, made.data.open()).stages[0]
    assert stage.trained < stage.parameters / 5
    assert stage.peak.kinds["states"] <= 8 * stage.trained + 4 * 60


def test_packed_weights_count_as_what_they_stand_for() -> None:
    plain, packed = (plan(recipe(example("sgd"), example("lora"), *more), CPU, TinyData().open())
                     for more in ((), (example("quantized_base", targets="mlp.*"),)))  # fmt: skip
    (one,), (two,) = plain.stages, packed.stages
    assert (one.parameters, one.trained, one.packed) == (two.parameters, two.trained, 0)
    assert two.packed == 4 * 2 * 32 * 128
    assert "32.8k packed in four bits" in text(packed) and "packed" not in text(plain)


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
        described = machine(name).device == "cuda" and not torch.cuda.is_available()
        assert any("no CUDA" in note for note in planned.notes) == described
        assert (planned.joules is None) == (machine(name).power is None)
    gpu = plan(made, "A100-80", made.data.open())
    assert gpu.live >= plan(made, CPU, made.data.open()).live
    assert gpu.stages[0].reserved >= gpu.stages[0].segments >= gpu.live


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

    def price(self, cost: Cost, run: Any) -> Cost:
        """A megabyte and a second."""
        return replace(cost, bytes=cost.bytes + 10**6, seconds=cost.seconds + 1.0)


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
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert trace.module == ""


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


def test_ranks_share_a_batch_and_average_gradients() -> None:
    made = recipe(example("adamw"), batch=8, duration="64 sample")
    one, four = (plan(made, "H100", made.data.open(), ranks=n) for n in (1, 4))
    a, b = one.stages[0], four.stages[0]
    assert a.steps == b.steps == 8 and a.tokens == b.tokens == 8 * 16
    # Buckets of gradients stay through the forward pass, and activations are a fourth.
    assert b.peak.total < a.peak.total
    assert (a.sent, b.sent) == (0, int(1.5 * 4 * b.trained))
    assert sum(b.flops().values()) == pytest.approx(sum(a.flops().values()) / 4, rel=0.01)
    with pytest.raises(UserError, match="cannot be shared by 3 ranks"):
        plan(made, "H100", made.data.open(), ranks=3)
    assert any("links" in note for note in plan(made, "M4-Max", made.data.open(), ranks=2).notes)


@dataclass(frozen=True, kw_only=True)
class Averaged(Technique):
    """Averages the loss over the ranks, as a collective that a plan must see."""

    card: ClassVar[Card] = Card(paper="none", section="Data", saves="nothing", costs="communication")

    def backward(self, backward: Any, run: Any) -> Any:
        """With an all-reduce of a kilobyte."""
        import torch.distributed as dist

        def averaged(batch: Any, count: Any) -> Any:
            dist.all_reduce(torch.ones(256))
            return backward(batch, count)

        return averaged


def test_collectives_are_counted_by_their_volume() -> None:
    made = recipe(Averaged())
    stage = plan(made, "H100", made.data.open(), ranks=2).stages[0]
    assert stage.sent == 1024 + 4 * stage.trained
    assert not torch.distributed.is_initialized()


def test_states_of_several_rules_are_states() -> None:
    made = recipe(example("adamw"), SGD(params="blocks.*"))
    stage = plan(made, CPU, made.data.open()).stages[0]
    weights = {n: p.numel() * 4 for n, p in run_of(made).model.named_parameters()}
    wanted = sum(size * (1 if n.startswith("blocks") else 2) for n, size in weights.items())
    assert wanted <= stage.peak.kinds["states"] <= wanted + 4 * len(weights)


def test_a_point_beyond_the_end_is_none() -> None:
    made = recipe(example("adamw"), Stack(at=("500 step",)), duration="8 step")
    assert [s.steps for s in plan(made, CPU, made.data.open()).stages] == [8]


def test_phases_of_a_step() -> None:
    made = recipe(example("adamw"), example("clip"), example("ema"), example("recompute"))
    found = {op.phase for op in plan(made, CPU, made.data.open()).stages[0].ops}
    assert found == {"forward", "backward", "recompute", "update"}


@dataclass(frozen=True, kw_only=True)
class Looks(Technique):
    """Reads a scalar without `run.read`."""

    card: ClassVar[Card] = Card(paper="none", section="Data", saves="nothing", costs="nothing")

    def wrap(self, model: nn.Module, run: Any) -> nn.Module:
        """With a look at the output."""

        def looking(module: nn.Module, args: Any, out: Tensor) -> None:
            out.sum().item()

        model.register_forward_hook(looking)
        return model


def test_what_cannot_be_planned_says_so_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(Looks())
    with pytest.raises(CannotPlanError, match="run.read"):
        plan(made, CPU, made.data.open())
    monkeypatch.setattr(room, "available", lambda: 1)
    assert train(made, data=made.data.open(), save=False).reason == "finished"


def test_agrees_with_torchs_own_tracker(tmp_path: Path) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    for more in ((), (example("recompute"),), (example("clip"),)):
        made = recipe(example("adamw"), *more, model=MODEL | {"dropout": 0.0})
        run = run_of(made)
        assert run.optimizer is not None
        tracker = MemTracker()
        tracker.track_external(run.model, run.optimizer)
        with tracker:
            step(run)
            tracker.reset_mod_stats()
            step(run)
        theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        assert plan(made, CPU, made.data.open()).live == pytest.approx(theirs, rel=0.01)
