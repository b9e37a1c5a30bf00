"""Layer to layer against plain training: the same bits, and the order in which things happen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scrimp.disk import extent_of
from scrimp.errors import UserError
from scrimp.run import Run
from scrimp.technique import Technique
from scrimp.techniques.offloading.layer_to_layer import divided
from tiny import assert_equal, example, flat, recipe, run_of, step

SMALL = {"layers": 2, "width": 32, "heads": 2, "dropout": 0.1}


def built(*techniques: Technique, **settings: Any) -> Run:
    return run_of(recipe(example("adamw"), *techniques, model=SMALL, **settings))


def streamed(*techniques: Technique, parts: int = 1, eager: bool = False, **settings: Any) -> Run:
    return built(example("layer_to_layer", parts=parts, eager=eager), *techniques, **settings)


def assert_same(plain: Run, other: Run, steps: int = 4) -> None:
    for _ in range(steps):
        step(plain)
        step(other)
    assert_equal(flat(plain.state()), flat(other.state()))


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_is_bitwise_plain_training(eager: bool, states: bool) -> None:
    assert_same(built(), streamed(*[example("offload_states")] * states, eager=eager))


def test_is_bitwise_with_what_needs_all_gradients() -> None:
    both = example("clip"), example("accumulate")
    assert_same(built(*both), streamed(*both))


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_parts_are_gradient_accumulation(parts: int) -> None:
    plain, parted = built(dtype="float64"), streamed(parts=parts, dtype="float64")
    for _ in range(3):
        step(plain)
        step(parted)
    a, b = flat(plain.state()), flat(parted.state())
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-9)


def gradients(run: Run) -> list[torch.Tensor]:
    assert run.backward
    batch = run.batch(0)
    run.backward(batch, run.task.count(batch))
    return [p.grad for p in run.model.parameters() if p.grad is not None]


def test_weights_and_gradients_lie_on_disk() -> None:
    run = streamed()
    assert all(extent_of(p) is not None for p in run.model.parameters())
    found = gradients(run)
    assert len(found) == len(list(run.model.parameters()))
    assert all(extent_of(grad) is not None for grad in found)


def test_eager_updates_all_blocks_but_the_first_in_the_backward_pass() -> None:
    run = streamed(eager=True)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    left = gradients(run)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(before[name], p)}
    held = {name for name, p in run.model.named_parameters() if p.grad is not None}
    assert {name for name in before if name.startswith("blocks.1.")} <= moved
    assert held == {n for n in before if n not in moved}
    assert any(name.startswith("blocks.0.") for name in held)
    assert left


def test_a_shared_weight_stays_shared() -> None:
    run = streamed()
    assert run.model.get_parameter("head.weight") is run.model.get_parameter("embed.weight")


@pytest.mark.parametrize("other", ["clip", "accumulate"])
def test_eager_refuses_what_needs_all_gradients(other: str) -> None:
    with pytest.raises(UserError, match=f"leaves `{other}` no gradients"):
        streamed(example(other), eager=True)


def test_rows_are_divided_and_tables_are_not() -> None:
    x, angles, sample = torch.arange(12.0).view(4, 3, 1), torch.zeros(4, 2), torch.arange(4)
    shares = divided(((x, (angles, angles), None, sample), {}), 3)
    assert [len(a[0]) for a, _ in shares] == [2, 1, 1]
    assert all(a[1][0] is angles for a, _ in shares)
    assert torch.equal(torch.cat([a[3] for a, _ in shares]), sample)
