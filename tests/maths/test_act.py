"""Activation compression: exact forward, right on average backward, and the bytes that the formula says."""

from __future__ import annotations

import itertools

import torch

from scrimp.meter import LiveBytes
from scrimp.numerics.allocation import WIDTHS, allocate, error
from scrimp.numerics.blocks import dequantize, quantize, stored_bytes
from scrimp.numerics.packing import packed, unpacked
from scrimp.run import Run
from scrimp.techniques.precision.act import Act, shelf_of
from scrimp.training import train
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


def test_gradients_are_right_on_average() -> None:
    """Of a linear layer the error falls with the root of the count; of a whole model at 8 bits too."""
    exact, total, count = gradients(run_of(recipe(model=WIDE))), torch.zeros(()), 8
    first = 0.0
    for seed in range(count):
        run = run_of(recipe(example("act", bits=8, average=0.0), model=WIDE))
        shelf_of(run.model.get_submodule("blocks.0")).salt = seed
        found = gradients(run)
        first = first or float((found - exact).norm() / exact.norm())
        total = total + found
    assert 0 < first < 0.02
    assert float((total / count - exact).norm() / exact.norm()) < 1.4 * first / count**0.5


def test_the_forward_pass_is_exact() -> None:
    losses = []
    for extra in ((), (example("act", bits=2, average=0.0),)):
        run = run_of(recipe(*extra, model=WIDE))
        batch = run.batch(0)
        assert run.loss
        losses.append(float(run.loss(run.model, batch).detach()))
    assert losses[0] == losses[1]


def test_groups_are_right_on_average_and_stay_on_their_grid() -> None:
    x = torch.linspace(-3, 5, 256).repeat(4000)
    for bits in (1, 2, 4, 8):
        kept = quantize(x, bits, 1)
        y = dequantize(*kept)
        assert kept[0].numel() + kept[1].nbytes + kept[2].nbytes == stored_bytes(x.numel(), bits)
        assert len(y[:256].unique()) <= 2**bits
        mean = y.view(4000, 256).double().mean(0)
        spread = (8 / (2**bits - 1)) / 2 / 4000**0.5
        assert (mean - x[:256]).abs().max() < 4.5 * spread + 1e-6
        # Variance of stochastic rounding: frac (1 - frac), a sixth of a step squared on average.
        step = 8 / (2**bits - 1)
        assert abs(float((y - x).double().square().mean()) / (step**2 / 6) - 1) < 0.05


def test_groups_that_are_odd() -> None:
    for x in (torch.zeros(7), torch.full((300,), 3.0), torch.full((5,), 1e-39)):
        torch.testing.assert_close(dequantize(*quantize(x, 2, 0)), x, rtol=0.02, atol=1e-30)
    x = torch.ones(512)
    x[3] = float("nan")
    y = dequantize(*quantize(x, 8, 0))
    assert not y[:256].isfinite().any()
    assert y[256:].isfinite().all()


def test_packing_is_lossless() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    for bits in (1, 2, 4, 8):
        few = codes & (2**bits - 1)
        assert packed(few, bits).shape == (2, 128 * bits // 8)
        assert torch.equal(unpacked(packed(few, bits), bits), few)


def test_bits_go_where_they_matter() -> None:
    tensors = {"a": (100, 50.0), "b": (100, 1.0), "c": (400, 2.0)}
    best = min(
        (sum(tensors[n][1] * error(b) for n, b in zip(tensors, bits, strict=True)), bits)
        for bits in itertools.product(WIDTHS, repeat=3)
        if sum(tensors[n][0] * b for n, b in zip(tensors, bits, strict=True)) <= 3 * 600
    )
    found = allocate(tensors, 3.0)
    cost = sum(tensors[n][1] * error(b) for n, b in found.items())
    assert sum(tensors[n][0] * b for n, b in found.items()) <= 3 * 600
    assert cost <= 1.5 * best[0]
    assert found["a"] == 8


def test_measured_bits_hold_the_budget() -> None:
    made = recipe(example("act", bits=2, average=3.0, measure="2 step"), model=WIDE, duration="4 step")
    result = train(made, save=False)
    bits = result.run.decisions["act"]["bits"]
    assert set(bits) == {f"{block}.{i}" for block in range(2) for i in range(8)}
    assert len(set(bits.values())) > 1
    sizes = shelf_of(result.run.model.get_submodule("blocks.0")).sizes
    assert sum(bits[n] * size for n, size in sizes.items()) <= 3 * sum(sizes.values())


def test_a_run_that_ends_before_the_measurement_is_told() -> None:
    short = run_of(recipe(Act(average=3.0, measure="100 step")))
    assert any("ends before sensitivities are measured" in remark for remark in short.remarks)
    assert not any("sensitivities" in remark for remark in run_of(recipe(Act(average=3.0, measure="1 step"))).remarks)
