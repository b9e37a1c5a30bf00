"""Depth and length that grow: stacking and sequence-length warm-up."""

from __future__ import annotations

import pytest
import torch

from scrimp.errors import UserError
from scrimp.training import new_clock, train
from tiny import example, recipe, run_of


def staged(stage: int, **settings: object):
    """A stacked run at a stage, from the state of the stage before."""
    made = recipe(example("stack", at=("4 step",), **settings), dtype="float64")
    first = run_of(made)
    if stage == 0:
        return first
    state = {kind: dict(tensors) for kind, tensors in first.state().items()}
    data = made.data.open()
    clock = new_clock(made, data)
    clock.step, clock.stage, clock.cuts = 4, 1, [4]
    from scrimp.run import build

    return first, build(made, data, clock, last=state)


@pytest.mark.parametrize(("order", "origin"), [("stack", [0, 1, 0, 1]), ("interleave", [0, 0, 1, 1])])
def test_copies_come_from_the_blocks_that_the_paper_names(order: str, origin: list[int]) -> None:
    small, big = staged(1, order=order)
    assert (len(small.model.blocks), len(big.model.blocks)) == (2, 4)
    for i, source in enumerate(origin):
        for a, b in zip(small.model.blocks[source].parameters(), big.model.blocks[i].parameters(), strict=True):
            assert torch.equal(a, b)
    assert big.model.blocks[2].mlp.up.weight is not big.model.blocks[0].mlp.up.weight
    assert torch.equal(small.model.embed.weight, big.model.embed.weight)


def test_zeroed_copies_keep_the_function() -> None:
    small, big = staged(1, zero_new=True)
    tokens = small.batch(0)["tokens"]
    small.model.eval()
    big.model.eval()
    assert torch.allclose(small.model(tokens), big.model(tokens), atol=1e-12)


@pytest.mark.parametrize(("states", "same"), [("copy", True), ("reset", False)])
def test_momentum_of_copies(states: str, same: bool) -> None:
    made = recipe(example("stack", at=("4 step",), states=states))
    result = train(made, save=False)
    momenta = result.run.state()["optimizer.momentum_buffer"]
    assert "blocks.3.mlp.up.weight" in momenta
    assert result.run.clock.cuts == [4]
    one = {"blocks.0.x": torch.ones(1)}
    grown = made.techniques[0].carry({"model": one, "optimizer.m": one}, result.run)
    assert bool(grown["optimizer.m"]["blocks.3.x"] == 1) is same


def test_depths_that_do_not_grow_are_refused() -> None:
    with pytest.raises(UserError, match="do not grow"):
        run_of(recipe(example("stack", at=(0.5,), depths=(3, 2))))
    with pytest.raises(UserError, match="2 points need 3 depths"):
        example("stack", at=(0.1, 0.2), depths=(1, 4))


def test_early_steps_run_fewer_blocks() -> None:
    assert len(staged(0).model.blocks) == 2


def test_lengths_grow_by_stages_and_prefixes_are_kept() -> None:
    made = recipe(example("length_warmup", start=0.5, until=0.5, levels=2, multiple=4))
    lengths: dict[int, int] = {}
    whole = run_of(recipe())

    def see(event: str, fields: dict) -> None:
        if event == "stage":
            run = fields["run"]
            batch = run.batch(run.clock.step)
            full = whole.batch(run.clock.step)["tokens"]
            assert torch.equal(batch["tokens"], full[:, : batch["tokens"].shape[1]])
            lengths[run.clock.position] = batch["tokens"].shape[1]

    result = train(made, save=False, observe=see)
    assert lengths == {0: 8, 2: 12, 4: 16}
    assert result.run.clock.tok == 4 * (2 * 8 + 2 * 12 + 4 * 16)


def test_stages_follow_tokens_when_the_run_does() -> None:
    made = recipe(example("length_warmup", start=0.5, until=0.5, levels=1), duration="512 tok")
    cuts = train(made, save=False).run.clock.cuts
    assert cuts == [256]
