"""Recomputation: the same gradients, fewer bytes; and the counter of bytes itself."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from scrimp.applied import apply
from scrimp.errors import UserError
from scrimp.meter import LiveBytes
from scrimp.run import Run
from scrimp.technique import Technique
from tiny import TinyData, assert_equal, example, recipe, run_of

LONG = {"layers": 6, "width": 32, "heads": 2, "dropout": 0.0}
MODES = [("block", "products"), ("selective", "products"), ("selective", "half"), ("selective", "attention")]


class Products(TorchDispatchMode):
    """Counts matrix products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        self.products += name in ("mm", "addmm")
        self.attention += name == "_scaled_dot_product_flash_attention_for_cpu"
        return func(*args, **(kwargs or {}))


def gradients(run: Run) -> dict[str, Tensor]:
    batch = run.batch(0)
    assert run.backward
    loss = run.backward(batch, run.task.count(batch))
    return {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None} | {"loss": loss}


def live(run: Run) -> int:
    """Bytes that wait for the backward pass."""
    batch = run.batch(0)
    meter = LiveBytes()
    meter.register([*run.model.parameters(), *batch.values()])
    before = meter.live
    assert run.loss
    with meter:
        loss = run.loss(run.model, batch)
    return meter.live - before + 0 * loss.ndim


def peak(run: Run) -> int:
    """Of forward and backward."""
    batch = run.batch(0)
    count = run.task.count(batch)
    assert run.backward
    with LiveBytes() as meter:
        run.backward(batch, count)
    return meter.peak


@pytest.mark.parametrize(("mode", "save"), MODES)
@pytest.mark.parametrize("norm_at", ["pre", "post"])
def test_gradients_are_those_without(mode: str, save: str, norm_at: str) -> None:
    model = LONG | {"dropout": 0.2, "norm_at": norm_at}
    plain = gradients(run_of(recipe(model=model)))
    assert_equal(plain, gradients(run_of(recipe(example("recompute", mode=mode, save=save), model=model))))


def test_what_runs_again() -> None:
    """A block has 4 products (qkv, proj, up, down); the last one's output is needed by nobody, but SAC keeps it."""
    found = {}
    for mode, save in [("none", ""), *MODES]:
        techniques = () if mode == "none" else (example("recompute", mode=mode, save=save),)
        run = run_of(recipe(*techniques, model=LONG))
        with Products() as counts:
            gradients(run)
        found[mode, save] = (counts.products, counts.attention)
    products, attention = found.pop(("none", ""))
    assert attention == 6
    again = {key: (p - products, a - attention) for key, (p, a) in found.items()}
    assert again["selective", "products"] == (0, 0)
    # Recomputation stops at the last tensor that is needed, which is the input of `down`.
    assert again["block", "products"] == (6 * 3, 6)
    assert again["selective", "half"] == (6 * 1, 0)
    assert again["selective", "attention"] == (6 * 3, 0)


def test_the_less_is_kept_the_fewer_bytes() -> None:
    settings = {"model": LONG, "batch": 16, "data": TinyData(context=64)}
    runs = [run_of(recipe(**settings))]
    runs += [run_of(recipe(example("recompute", mode=m, save=s), **settings)) for m, s in reversed(MODES)]
    none, attention, half, products, block = [live(run) for run in runs]
    assert block < attention < half < products < none
    peaks = [peak(run) for run in runs]
    assert peaks[-1] < 0.5 * peaks[0]
    assert max(peaks[1:]) < peaks[0]


def test_a_block_keeps_its_input_only() -> None:
    """Each further block costs one [B, T, C] of activations: 4 * 16 * 32 floats."""
    few, more = (live(run_of(recipe(example("recompute"), model=LONG | {"layers": n}))) for n in (4, 5))
    assert more - few == 4 * 16 * 32 * 4


def test_every_and_patterns_choose_blocks() -> None:
    wrapped = {}
    for key, settings in {"every": {"every": 4}, "pattern": {"blocks": "mlp"}}.items():
        run = run_of(recipe(example("recompute", **settings), model=LONG))
        wrapped[key] = [n for n, m in run.model.named_modules() if "forward" in vars(m)]
    assert wrapped["every"] == ["blocks.0", "blocks.4"]
    assert wrapped["pattern"] == [f"blocks.{i}.mlp" for i in range(6)]
    with pytest.raises(
        UserError, match=r"techniques.recompute.blocks: `mpl` matches no module. Did you mean blocks\.\*\.mlp\?"
    ):
        run_of(recipe(example("recompute", blocks="mpl")))
    with pytest.raises(UserError, match="at least 1"):
        example("recompute", every=0)


def test_without_gradients_nothing_is_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(recipe(example("recompute")))
    monkeypatch.setattr("scrimp.remat.selective.checkpoint", None)
    assert run.evaluate
    run.evaluate(lambda model: run.task.evaluate(model, [run.batch(0)]))
    with pytest.raises(TypeError):
        gradients(run)


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_a_foreign_model_draws_the_same_dropout_again(mode: str) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.GELU()) for _ in range(3)]
        return nn.Sequential(*layers).double()

    found = []
    for techniques in ([], [example("recompute", mode=mode)]):
        net = apply(model(), techniques)
        torch.manual_seed(1)
        net(torch.ones(4, 8, dtype=torch.float64)).sum().backward()
        found.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert_equal(*found)


class Hidden(nn.Module):
    """Drops activations without an `nn.Dropout` that could be found."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.linear(x), 0.5).tanh()


def test_a_foreign_model_draws_the_same_hidden_dropout_again() -> None:
    found = []
    for techniques in ([], [example("recompute")]):
        torch.manual_seed(0)
        net = apply(nn.Sequential(Hidden(), Hidden()), techniques)
        torch.manual_seed(1)
        net(torch.ones(4, 8)).sum().backward()
        found.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert_equal(*found)


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(
    "techniques",
    [(), (example("adamw"),), (example("recompute"),), (example("recompute", mode="selective"),),
     (example("fused_loss"),), (example("autocast"),)],
    ids=lambda techniques: "-".join(t.settings().get("mode", t.name) for t in techniques) or "none",
)  # fmt: skip
def test_live_bytes_are_those_of_torch(techniques: tuple[Technique, ...], fake: bool) -> None:
    """Peak and end of a step, against torch's own tracker."""
    ours = LiveBytes()
    found = used(ours, lambda run, given: ours.register([*run.model.parameters(), *given]), techniques, fake)
    theirs = MemTracker()
    wanted = used(theirs, lambda run, given: theirs.track_external(run.model, run.optimizer, *given), techniques, fake)
    assert found == wanted


def used(meter: Any, register: Any, techniques: tuple[Technique, ...], fake: bool) -> tuple[int, int]:
    """(peak, end) of a step in bytes."""
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext() as mode:
        run = run_of(recipe(*techniques))
        batch = {n: t if mode is None else mode.from_tensor(t) for n, t in run_of(recipe()).batch(0).items()}
        count = run.task.count(batch)
        run.set_lr()
        assert run.backward
        assert run.step
        assert run.optimizer
        register(run, [*batch.values(), count])
        with meter:
            run.backward(batch, count)
            run.step()
            run.optimizer.zero_grad(set_to_none=True)
        if isinstance(meter, LiveBytes):
            return meter.peak, meter.live
        peak, now = (next(iter(meter.get_tracker_snapshot(kind).values())) for kind in ("peak", "current"))
        return peak["Total"], now["Total"]


def test_live_bytes_count_aliases_once_and_resizes() -> None:
    with LiveBytes() as meter:
        a = torch.zeros(100)
        view = a[50:].view(5, 10)
        assert meter.live == 400
        del a
        assert meter.live == 400
        view.resize_(100, 10)
        assert meter.live == 4200
        del view
    assert meter.live == 0
    assert meter.peak == 4200
