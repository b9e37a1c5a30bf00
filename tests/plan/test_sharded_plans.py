"""Plans of many ranks: pieces of weights are made for the rank that is planned only, and come out as torch's."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from scrimp.machines.machine import Machine
from scrimp.planning import Plan, plan
from scrimp.planview import as_json, duration, text
from scrimp.ranks import pretended
from scrimp.sharding import Alike, put
from scrimp.techniques.parallelism import zero
from tiny import TinyData, example, recipe

DATA = TinyData(context=16)
LINKED = Machine(name="any", device="cpu", memory=1 << 34, flops={"float32": 1e11}, bandwidth=1e10, link=1e9, node=4)


def planned(ranks: int) -> Plan:
    made = recipe(example("adamw"), example("zero"), example("clip"), model={"width": 24, "heads": 2}, data=DATA,
                  batch=ranks)  # fmt: skip
    return plan(made, "H100", DATA.open(), ranks=ranks)


def test_alike_pieces_change_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = planned(10)  # of which a width of 24 has uneven pieces
    monkeypatch.setattr(zero, "Alike", nullcontext)
    slow = planned(10)
    assert quick.stages == slow.stages and quick.memory == slow.memory


@given(st.integers(1, 200), st.integers(1, 70), st.integers(0, 1))
def test_alike_pieces_have_the_shapes_of_torchs(length: int, ranks: int, dim: int) -> None:
    whole = torch.empty((length, 3) if dim == 0 else (3, length), device="meta")
    pieces = torch.chunk(whole, ranks, dim)
    with Alike():
        alike = torch.chunk(whole, ranks, dim)
    assert [p.shape for p in alike[: len(pieces)]] == [p.shape for p in pieces]
    assert len({id(p) for p in alike}) <= 3, "as many tensors as ranks are slow to make"
    assert len(alike) == ranks and not any(p.numel() for p in alike[len(pieces) :])


def test_values_are_cut_as_ever() -> None:
    with Alike():
        pieces = torch.chunk(torch.arange(5), 2)
    assert [p.tolist() for p in pieces] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("rank", range(6))
@pytest.mark.parametrize("length", [1, 4, 7])
def test_a_rank_takes_its_own_piece_of_values(length: int, rank: int) -> None:
    whole = torch.arange(2.0 * length).view(length, 2)
    with pretended(6, rank):
        mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("replica", "data"))
        wanted = distribute_tensor(whole, mesh, [Replicate(), Shard(0)], src_data_rank=None)
        own = distribute_tensor(torch.zeros_like(whole), mesh, [Replicate(), Shard(0)], src_data_rank=None)
        put(own, whole)
        assert torch.equal(own.to_local(), wanted.to_local())


def test_weights_that_are_given_up_after_a_block_are_not_counted() -> None:
    def live(layers: int, stage: int) -> int:
        techniques = example("sgd"), example("recompute"), zero.Zero(stage=stage)
        model = {"width": 128, "heads": 2, "layers": layers, "dropout": 0.0}
        made = recipe(*techniques, model=model, data=DATA, batch=16)
        return plan(made, "H100", DATA.open(), ranks=16).live

    block = 4 * 12 * 128**2  # bytes of a block's matrices
    assert live(6, stage=3) - live(2, stage=3) < 2 * block
    assert live(6, stage=2) - live(2, stage=2) > 4 * block


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_gradients_and_states_are_those_of_the_paper(stage: int) -> None:
    made = recipe(example("adamw"), zero.Zero(stage=stage), model={"width": 64, "heads": 2}, data=DATA, batch=4)
    found = plan(made, LINKED, DATA.open(), ranks=4).stages[0]
    whole = 4 * found.parameters
    shares = {"weights": 4 if stage > 1 else 1, "gradients": 4 if stage > 1 else 1, "states": 4}
    # Stage 1 gives out whole parameters, the largest first, so that the first rank has no less than its share.
    slack = 1.01 if stage > 1 else 1.5
    for kind, ranks in shares.items():
        wanted = whole * (2 if kind == "states" else 1) / ranks
        assert wanted <= found.most[kind] <= wanted * slack + 500, kind
    assert (found.most["gathered"] >= whole) == (stage == 2)
    assert (found.most["gathered"] > 0) == (stage > 1)


def test_text_and_json_say_what_a_stage_sends_and_how_long_it_waits() -> None:
    made = recipe(example("sgd"), example("pipeline"), mesh={"pipeline": 2}, data=DATA, batch=8)
    found = plan(made, LINKED, DATA.open(), ranks=2)
    stage = found.stages[0]
    assert 0 < stage.sending < stage.seconds and 0 < stage.waiting < stage.seconds
    assert f"for {duration(stage.sending)}, and waits for others {duration(stage.waiting)}" in text(found)
    told = as_json(found)["stages"][0]
    assert (told["sending"], told["waiting"], told["kinds"]) == (stage.sending, stage.waiting, stage.most)
