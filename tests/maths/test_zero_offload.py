"""The delayed update against a loop written out: every gradient is used one step late, with its own learning rate."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scrimp.meter import LiveBytes
from scrimp.run import Run
from scrimp.training import train
from tiny import TinyData, assert_equal, example, flat, recipe, run_of, step

MODEL = {"layers": 2, "width": 16, "heads": 2, "dropout": 0.1}
RULES = [("adam",), ("sgd", "clip", "accumulate"), ("adamw", "clip", "warmup_linear"), ("lamb",), ("muon", "adam")]


def techniques(*names: str) -> list[Any]:
    more = {"muon": {"params": "blocks.*.mlp.*.weight"}} if "muon" in names else {}
    return [example(name, **more.get(name, {})) for name in names]


def made(*names: str, offload: dict[str, Any] | None = None, **settings: Any) -> Run:
    extra = [] if offload is None else [example("zero_offload", **offload)]
    return run_of(recipe(*techniques(*names), *extra, **{"model": MODEL, **settings}))


def weights(run: Run) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}


def simulated(run: Run, steps: int, first: int) -> None:
    """Steps of a plain run, whose gradients are exchanged for the last step's from `first` on; the last makes both."""
    assert run.optimizer
    update, optimizer = run.optimizer.step, run.optimizer
    waiting: list[tuple[dict[Tensor, Tensor | None], list[float]]] = []

    def due() -> None:
        grads, rates = waiting.pop()
        parameters = list(run.model.parameters())
        now, lrs = [p.grad for p in parameters], [g["lr"] for g in optimizer.param_groups]
        for p in parameters:
            p.grad = grads[p]
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        update()
        for p, grad in zip(parameters, now, strict=True):
            p.grad = grad
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr

    def late(*args: Any) -> None:
        if waiting:
            due()
        if first <= run.clock.step < steps - 1:
            grads = {p: None if p.grad is None else p.grad.clone() for p in run.model.parameters()}
            waiting.append((grads, [g["lr"] for g in optimizer.param_groups]))
        else:
            update()

    optimizer.step = late  # type: ignore[method-assign]
    for _ in range(steps):
        step(run)


@pytest.mark.parametrize("names", RULES, ids="-".join)
def test_a_delayed_update_is_the_sequential_one(names: tuple[str, ...]) -> None:
    plain, delayed = made(*names), made(*names, offload={"warmup": "2 step"})
    simulated(plain, 8, first=2)
    seen: list[dict[str, Tensor]] = []
    for _ in range(8):
        step(delayed)
        seen.append(weights(delayed))
    # The first delayed step changes nothing; the last makes two updates.
    assert all(torch.equal(seen[1][n], seen[2][n]) for n in seen[1])
    assert_equal(weights(plain), seen[-1])
    assert not delayed.memories["zero_offload"]["#given"].any()


@pytest.mark.parametrize("names", RULES, ids="-".join)
def test_without_delay_it_is_the_plain_update(names: tuple[str, ...]) -> None:
    plain, other = made(*names), made(*names, offload={"delay": False})
    for _ in range(4):
        step(plain)
        step(other)
    assert_equal(flat(plain.state()), flat(other.state()))


@pytest.mark.parametrize("delay", [False, True])
def test_weights_of_16_bits_have_float32_copies_which_the_host_updates_beside(delay: bool) -> None:
    """Against float32 weights that are rounded only where the model reads them."""
    plain, offload = (
        example("sgd", momentum=0.0, weight_decay=0.0),
        example("zero_offload", delay=delay, warmup="1 step"),
    )
    run = run_of(recipe(plain, offload, model=MODEL, dtype="bfloat16"))
    exact = {n: p.detach().float() for n, p in run.model.named_parameters()}
    waiting: dict[str, Tensor] = {}
    for number in range(4):
        batch = run.batch(run.clock.step)
        rate = run.set_lr()
        assert run.backward
        assert run.step
        run.backward(batch, run.task.count(batch))
        assert all(p.grad is None for p in run.model.parameters())
        grads = dict(run.optimizer.left)  # type: ignore[union-attr]
        assert len(grads) == len(exact)
        for n, grad in waiting.items():
            exact[n].add_(grad, alpha=-rate)
        run.step()
        run.optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        waiting = grads if delay and number >= 1 else {}
        if not waiting:
            for n, grad in grads.items():
                exact[n].add_(grad, alpha=-rate)
        assert_equal({n: e.bfloat16() for n, e in exact.items()}, weights(run))
        run.clock.tick(4, 64)


def test_what_others_write_into_a_weight_is_kept() -> None:
    """A mask, say; what it leaves alone keeps the bits that 16 bits do not show."""
    run = made("sgd", offload={"delay": False}, dtype="bfloat16")
    step(run)
    name, copy = "blocks.0.mlp.up.weight", "#weight.blocks.0.mlp.up.weight"
    before = run.memories["zero_offload"][copy].clone()
    with torch.no_grad():
        run.model.get_parameter(name)[0].zero_()
    for group in run.optimizer.param_groups:  # type: ignore[union-attr]
        group["base_lr"] = 0.0
    step(run)
    after = run.memories["zero_offload"][copy]
    assert torch.equal(after[1:], before[1:])
    assert not after[0].any()


def test_a_skipped_step_makes_the_update_that_is_due_and_leaves_none() -> None:
    run = made("adam", "autocast", offload={"warmup": "0 step"})
    memory, state = run.memories["zero_offload"], []
    assert run.step
    step(run)
    assert memory["#given"].all()
    state.append(weights(run))
    run.step()  # Without gradients.
    run.clock.tick(4, 64)
    state.append(weights(run))
    assert not memory["#given"].any()
    assert any(not torch.equal(state[0][n], state[1][n]) for n in state[0])
    step(run)
    assert_equal(state[1], weights(run))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_while_a_gradient_waits(dtype: str, tmp_path: Path) -> None:
    parts = (example("adam"), example("stack", at=(0.5,)), example("zero_offload", warmup="1 step"))
    settings = {"out": str(tmp_path), "name": "whole", "checkpoint": {"every": "1 step", "keep": 99}, "dtype": dtype}
    whole = train(recipe(*parts, data="text", model=MODEL, **settings), data=TinyData().open())
    for cut in (3, 6):
        copy = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "whole", copy)
        resumed = train(resume=copy / f"checkpoints/step-{cut:09d}", data=TinyData().open(), force=True)
        assert_equal(flat(whole.run.state()), flat(resumed.run.state()))


OTHERS = [(), ("clip",), ("accumulate",), ("ema",)]


@pytest.mark.parametrize("delay", [False, True])
def test_gradients_leave_at_once_or_together_and_give_the_same_weights(delay: bool) -> None:
    """Clipping at a norm that is never reached changes nothing but the place of the gradients."""
    apart, together = (made(*more, "sgd", offload={"delay": delay, "warmup": "1 step"}, dtype="bfloat16")
                       for more in ((), ("clip",)))  # fmt: skip
    clip = together.recipe.techniques[0]
    together = run_of(replace(together.recipe, techniques=(replace(clip, norm=1e9), *together.recipe.techniques[1:])))
    most = {id(run): 0 for run in (apart, together)}
    for run in (apart, together):
        for p in run.model.parameters():
            p.register_post_accumulate_grad_hook(lambda p, run=run: most.update(
                {id(run): max(most[id(run)], sum(q.grad is not None for q in run.model.parameters()))}))  # fmt: skip
        for _ in range(4):
            step(run)
    assert most == {id(apart): 0, id(together): len(list(together.model.parameters()))}
    assert_equal(weights(apart), weights(together))
    assert not any("clip" in remark for remark in apart.remarks)
    assert any("until `clip` had all of them" in remark for remark in together.remarks)


@pytest.mark.parametrize("others", OTHERS, ids="-".join)
@pytest.mark.parametrize("delay", [False, True])
def test_16_bits_are_planned_to_the_byte(others: tuple[str, ...], delay: bool) -> None:
    peaks = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = made(*others, "sgd", offload={"delay": delay, "warmup": "0 step"}, dtype="bfloat16")
    real = made(*others, "sgd", offload={"delay": delay, "warmup": "0 step"}, dtype="bfloat16")
    assert bool(real.optimizer.holders) == (others in [("clip",), ("accumulate",)])  # type: ignore[union-attr]
    for run, inside in ((real, nullcontext()), (fake, mode)):
        batch = real.batch(0) if run is real else {k: mode.from_tensor(v) for k, v in real.batch(0).items()}
        assert run.backward and run.step and run.optimizer
        with inside, LiveBytes() as meter:
            for _ in range(2):
                run.backward(batch, run.task.count(batch))
                run.step()
                run.optimizer.zero_grad(set_to_none=True)
        peaks.append(meter.peak)
    assert peaks[0] == peaks[1]
