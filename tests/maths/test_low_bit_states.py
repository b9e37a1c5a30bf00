"""Optimizer states in few bits: codebooks by hand, rules on one parameter at a time, bytes, stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scrimp.numerics.codebooks import decode, encode, entries
from scrimp.training import train
from tiny import MODEL, assert_equal, example, flat, recipe, run_of, step


def test_books() -> None:
    assert entries("linear", 4) == tuple(i / 16 for i in range(1, 17))
    # Three decades: one entry in the lowest, two and four above it, with both signs; then 0 and 1.
    middle, top = (0.325, 0.775), (0.2125, 0.4375, 0.6625, 0.8875)
    half = [0.0055, *(m / 10 for m in middle), *top]
    assert entries("dynamic", 4) == pytest.approx(sorted([-h for h in half] + [0.0] + half + [1.0]))
    for book in ("dynamic", "positive", "linear"):
        for bits in (4, 8):
            values = entries(book, bits)  # type: ignore[arg-type]
            assert len(set(values)) == 2**bits
            assert max(values) == 1


def test_the_nearest_entry_of_each_block() -> None:
    x = torch.zeros(300)
    x[0], x[1], x[256], x[257] = 8.0, -4.0, 1e-6, 1e-12
    codes, scales = encode(x, 8, "dynamic")
    assert codes.shape == (2, 256)
    assert scales.flatten().tolist() == pytest.approx([8.0, 1e-6])
    y = decode(codes, scales, 8, "dynamic", x)
    assert y[0] == 8
    assert abs(float(y[1]) / -4 - 1) < 0.01
    assert y[2:256].count_nonzero() == 0
    assert abs(float(y[257]) / 1e-12 - 1) < 0.5
    assert torch.equal(decode(*encode(torch.zeros(5), 4, "dynamic"), 4, "dynamic", torch.zeros(5)), torch.zeros(5))
    assert (decode(*encode(x.abs(), 4, "linear"), 4, "linear", x)[:128] >= 0.5).all(), "no zero to divide by"


@pytest.mark.parametrize("rule", ["adam", "adamw", "lion", "sgd", "lamb", "lars", "muon"])
def test_rules_step_as_they_do_whole(rule: str) -> None:
    """One parameter at a time, a rule does what it does on all: the first step is the same, later ones nearly so."""
    ends = []
    for extra in ((), (example("low_bit_states", smallest=10**9),), (example("low_bit_states"),)):
        run = run_of(recipe(example(rule), *extra, model=MODEL | {"layers": 1}))
        step(run)
        first = flat({"model": run.state()["model"]})
        for _ in range(3):
            step(run)
        ends.append((first, flat({"model": run.state()["model"]})))
    for (a, b), (c, d) in ((ends[0], ends[1]), (ends[0], ends[2])):
        for n in a:
            torch.testing.assert_close(a[n], c[n], rtol=1e-5, atol=1e-7)
        if c is ends[1][0]:
            for n in b:
                torch.testing.assert_close(b[n], d[n], rtol=1e-5, atol=1e-6)
    moved = sum(float((ends[0][1][n] - ends[0][0][n]).norm()) for n in ends[0][1])
    off = sum(float((ends[0][1][n] - ends[2][1][n]).norm()) for n in ends[0][1])
    assert 0 < off < 0.2 * moved


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes(bits: int) -> None:
    run = run_of(recipe(example("adamw"), example("low_bit_states", bits=bits, smallest=4096)))
    step(run)
    kinds = run.state()
    name, block = "blocks.0.mlp.up.weight", {8: 256, 4: 128}[bits]
    for moment in ("exp_avg", "exp_avg_sq"):
        held = [kinds[f"optimizer.{moment}.{part}"][name].nbytes for part in ("codes", "scales")]
        assert held == [4096 * bits // 8, 4096 // block * 4]
        assert name not in kinds[f"optimizer.{moment}"]
        assert "blocks.0.mlp.up.bias" in kinds[f"optimizer.{moment}"]


def test_growth_carries_numbers() -> None:
    made = recipe(example("adamw"), example("low_bit_states"), example("stack"))
    grown = train(made, save=False)
    plain = train(recipe(example("adamw"), example("stack")), save=False)
    name = "optimizer.exp_avg_sq"
    codes, whole = grown.run.state()[f"{name}.codes"], plain.run.state()[name]
    assert set(codes) <= set(whole)
    assert any(".3." in n for n in codes)
    assert abs(grown.validation["loss"] - plain.validation["loss"]) < 0.02


def test_pruning_masks_the_moments() -> None:
    run = run_of(recipe(example("adamw"), example("low_bit_states"), example("rigl", interval="1 step")))
    for _ in range(3):
        step(run)
    memory: dict[str, Any] = run.memories["rigl"]
    name = next(n.removesuffix("#mask") for n in memory if n.endswith("mlp.up.weight#mask"))
    state = run.state()["optimizer.exp_avg.codes"][name], run.state()["optimizer.exp_avg.scales"][name]
    values = decode(*state, 8, "dynamic", run.model.get_parameter(name))
    assert values[~memory[f"{name}#mask"]].count_nonzero() == 0
    assert values.count_nonzero() > 0


def test_a_resume_within_a_stage_keeps_codes() -> None:
    made = recipe(example("adamw"), example("low_bit_states"))
    run = run_of(made)
    for _ in range(2):
        step(run)
    state = {kind: {n: t.clone() for n, t in tensors.items()} for kind, tensors in run.state().items()}
    from scrimp.run import build
    from scrimp.stages import new_clock

    data = made.data.open()
    clock = new_clock(made, data)
    clock.tick(4, 64)
    clock.tick(4, 64)
    assert_equal(flat(state), flat(build(made, data, clock, last=state).state()))
