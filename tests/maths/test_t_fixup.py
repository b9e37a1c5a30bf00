"""T-Fixup: scales against the formulas, no norms, and training without warm-up."""

from __future__ import annotations

import math

import pytest
import torch

from tiny import example, recipe, run_of, step


@pytest.mark.parametrize(("constants", "scale"), [("decoder", (9 * 4) ** -0.25), ("encoder", 0.67 * 4**-0.25)])
def test_scales(constants: str, scale: float) -> None:
    width = 128
    run = run_of(recipe(example("t_fixup", constants=constants), model={"layers": 4, "width": width, "heads": 2}))
    block = run.model.blocks[1]

    def ratio(weight: torch.Tensor) -> float:
        """Standard deviation over that of a Xavier uniform matrix."""
        return float(weight.detach().std()) / math.sqrt(2 / sum(weight.shape))

    q, k, v = block.attention.qkv.weight.split(width)
    for weight, expected in ((q, 1.0), (k, 1.0), (v, scale), (block.attention.proj.weight, scale),
                             (block.mlp.up.weight, scale), (block.mlp.down.weight, scale)):  # fmt: skip
        assert ratio(weight) == pytest.approx(expected, rel=0.02)
    embedding = float(run.model.embed.weight.detach().std()) * math.sqrt(width)
    assert embedding == pytest.approx((9 * 4) ** -0.25, rel=0.05)


def test_no_norm_is_left() -> None:
    run = run_of(recipe(example("t_fixup")))
    assert not [n for n, _ in run.model.named_parameters() if "norm" in n]


def test_one_adam_step_moves_the_output_less_than_without_norms_alone() -> None:
    """Deep, no warm-up: removing norms alone explodes, T-Fixup does not."""
    from scrimp.registry import technique_class

    deep = {"layers": 16, "width": 32, "heads": 2}
    adam = technique_class("adam")(lr=1e-3)
    run = run_of(recipe(adam, example("t_fixup"), model=deep))
    batch = run.batch(0)
    before = run.model(batch["tokens"]).detach()
    step(run)
    change = float((run.model(batch["tokens"]).detach() - before).pow(2).mean().sqrt())
    assert change < 0.5
    losses = []
    for _ in range(10):
        step(run)
        losses.append(float(run.task.loss(run.model, batch).detach()) / 64)
    assert all(math.isfinite(x) and x < 5 for x in losses)
