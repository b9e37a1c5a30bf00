"""BitFit: what it trains, what a block keeps, and models that have no biases."""

from __future__ import annotations

import pytest
import torch

from scrimp.errors import UserError
from scrimp.run import exported
from scrimp.techniques.tuning.bitfit import BitFit
from tiny import example, step
from tiny_tuning import SMALL, kept_more, made, merge_error, outputs


@pytest.mark.parametrize("norms", [False, True])
def test_only_biases_move(norms: bool) -> None:
    run = made(BitFit(norms=norms))
    assert torch.equal(outputs(run), outputs(made()))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in range(2):
        step(run)
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(before[n], p)}
    wanted = {n for n in before if n.endswith(".bias") or (norms and "norm" in n)}
    assert moved == wanted
    assert "blocks.0.attention.qkv.bias" in moved
    assert set(exported(run)) == set(run.base)
    assert merge_error(run) == 0


def test_a_block_keeps_no_more_than_a_frozen_one() -> None:
    assert kept_more(BitFit()) == 0
    assert kept_more(BitFit(norms=True)) == 0


def test_a_model_without_biases_is_refused() -> None:
    with pytest.raises(UserError, match="the model has no biases"):
        made(BitFit(), model={**SMALL, "bias": False})


def test_norms_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="matches no weight of a norm"):
        made(BitFit(norms=True), example("rezero"))
    made(BitFit(), example("rezero"))
