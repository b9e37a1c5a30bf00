"""Parameters in pieces of a bounded size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scrimp.chunks import CHUNK, chunks, norms

SHAPES = [(7, 5), (0,), (), (3,), (1, 40), (40, 1), (2, 3, 4), (0, 4)]


@pytest.mark.parametrize("limit", [1, 6, 35, 1000])
def test_every_weight_comes_once_with_its_states_and_its_scalar(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", limit)
    rows: list[tuple[Tensor, ...]] = []
    for i, shape in enumerate(SHAPES):
        weight = torch.zeros(shape)
        rows.append((weight, torch.full(shape, float(i)), torch.tensor(float(i))))
    for weights, states, scalars in chunks(rows):
        assert len(weights) == 1 or sum(w.numel() for w in weights) <= limit
        for weight, state, scalar in zip(weights, states, scalars, strict=True):
            assert weight.shape == state.shape and scalar.ndim == 0
            assert bool((state == scalar).all())
            weight += 1
    assert all(bool((row[0] == 1).all()) for row in rows)


def test_norms_are_those_of_whole_tensors_in_at_least_single_precision() -> None:
    tensors = [torch.full((300,), 300.0, dtype=torch.bfloat16), torch.tensor([[3.0], [4.0]])]
    found = norms(tensors)
    assert [n.dtype for n in found] == [torch.float32, torch.float32]
    assert [float(n) for n in found] == pytest.approx([300 * 300**0.5, 5.0], rel=1e-6)
    assert norms([torch.ones(4, dtype=torch.float64)])[0].dtype == torch.float64
    assert norms([]) == []
