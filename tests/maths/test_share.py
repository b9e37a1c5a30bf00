"""Shared blocks: gradients are sums, names and sizes, and what a plain model gets of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from scrimp.applied import apply
from scrimp.errors import UserError
from scrimp.meter import flops_per_token
from scrimp.run import exported
from scrimp.techniques.parallelism.share import Share
from tiny import example, recipe, run_of, step

SMALL = {"layers": 4, "width": 16, "heads": 2}


def made(*techniques: Any, **more: Any) -> Any:
    return run_of(recipe(*techniques, model=SMALL, dtype="float64"), **more)


@pytest.mark.parametrize(("order", "places"), [("cycle", [0, 1, 0, 1]), ("runs", [0, 0, 1, 1])])
def test_the_gradient_of_shared_weights_is_the_sum_of_those_of_copies(order: Any, places: list[int]) -> None:
    run = made(Share(distinct=2, order=order))
    plain = made(source={"model": exported(run)})
    firsts = [places.index(place) for place in range(2)]
    assert {n for n, _ in run.model.named_parameters()} == {
        n for n in run.base if not n.startswith("blocks.") or int(n.split(".")[1]) in firsts
    }
    batch = run.batch(0)
    for one in (run, plain):
        one.loss(one.model, batch).backward()
    for name, p in run.model.named_parameters():
        uses = [name]
        if name.startswith("blocks."):
            _, first, rest = name.split(".", 2)
            uses = [f"blocks.{i}.{rest}" for i, place in enumerate(places) if place == places[int(first)]]
        wanted = sum(plain.model.get_parameter(use).grad for use in uses)
        torch.testing.assert_close(p.grad, wanted, rtol=1e-12, atol=1e-12)


def test_parameters_and_states_are_divided_and_the_work_is_not() -> None:
    run, plain = made(Share(distinct=1), example("adamw")), made(example("adamw"))
    step(run)
    block = sum(p.numel() for p in plain.model.blocks[0].parameters())
    count, whole = (sum(p.numel() for p in one.model.parameters()) for one in (run, plain))
    assert whole - count == 3 * block
    assert sum(t.numel() for t in run.state()["optimizer.exp_avg"].values()) == count
    assert flops_per_token(run.model, 16) == flops_per_token(plain.model, 16)


def test_an_export_comes_back_and_blocks_that_differ_are_told() -> None:
    run = made(Share(distinct=2))
    step(run)
    plain = exported(run)
    assert set(plain) == set(run.base)
    assert len({t.data_ptr() for t in plain.values()}) == len(plain), "files hold each tensor on its own"
    again = made(Share(distinct=2), source={"model": plain})
    assert not again.remarks
    assert all(torch.equal(p, run.model.get_parameter(n)) for n, p in again.model.named_parameters())
    other = made(Share(distinct=1), source={"model": plain})
    assert any("the given blocks differ" in remark for remark in other.remarks)


def test_blocks_that_are_not_alike_are_refused() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    with pytest.raises(UserError, match="`2` has other parameters than `0`"):
        apply(layers, [Share(distinct=1)])


def test_nothing_to_share_is_refused() -> None:
    with pytest.raises(UserError, match="no more than 4 blocks"):
        made(Share(distinct=4))
    with pytest.raises(UserError, match="does not go with"):
        made(Share(), example("stack"))
