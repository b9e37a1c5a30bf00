"""Attention to parts that arrive in turn is attention to all: arXiv 2105.13120, arXiv 2310.01889."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scrimp.ring import Ringed, Sight, attend, attend_back, grouped, merge, zigzag


@dataclass
class Single:
    """A ring of one rank."""

    count: int = 1
    place: int = 0

    def turn(self, x: Tensor) -> Any:
        raise AssertionError("nobody is there")


def drawn(tokens: int, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    shapes = [(2, heads, tokens, 3), (2, kv_heads, tokens, 3), (2, kv_heads, tokens, 3), (2, heads, tokens, 3)]
    q, k, v, g = (torch.randn(shape, generator=chance, dtype=torch.float64) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), g


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", ["", "padding", "documents"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_give_what_one_process_gives(ranks: int, causal: bool, masked: str) -> None:
    tokens = 4 * ranks
    q, k, v, g = drawn(tokens)
    attended = documents = None
    seen = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
    if masked == "padding":
        attended = torch.arange(tokens).expand(2, -1) < torch.tensor([[tokens - 3], [tokens]])
        seen = seen & attended[:, None, None]
    if masked == "documents":
        documents = (torch.arange(tokens).expand(2, -1) > torch.tensor([[2], [5]])).long()
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    wanted = F.scaled_dot_product_attention(q, k, v, seen.tril() if causal else seen, enable_gqa=True)
    wanted.backward(g)
    sight = Sight(zigzag(tokens, ranks), causal, attended, documents)
    own = [torch.cat([torch.arange(tokens)[s] for s in stretches]) for stretches in sight.owned]
    kv = [torch.stack([k, v])[..., places, :].detach() for places in own]
    dkv = [torch.zeros_like(part) for part in kv]
    for rank, places in enumerate(own):
        queries, grad = q[:, :, places].detach(), g[:, :, places]
        arrivals = [((rank - step) % ranks, kv[(rank - step) % ranks]) for step in range(ranks)]
        out, lse = attend(queries, arrivals, rank, sight)
        torch.testing.assert_close(out, wanted[:, :, places], rtol=1e-12, atol=1e-13)
        dq = torch.zeros_like(grouped(queries, kv[rank]))
        for arrival in arrivals:
            dkv[arrival[0]] += attend_back(grad, queries, out, lse, arrival, rank, sight, dq)
        assert q.grad is not None
        torch.testing.assert_close(dq.view(queries.shape), q.grad[:, :, places], rtol=1e-12, atol=1e-13)
    assert k.grad is not None and v.grad is not None
    for places, part in zip(own, dkv, strict=True):
        torch.testing.assert_close(part, torch.stack([k.grad, v.grad])[..., places, :], rtol=1e-12, atol=1e-13)


def test_gradient() -> None:
    q, k, v, _ = drawn(4)
    assert torch.autograd.gradcheck(lambda *x: Ringed.apply(*x, Single(), Sight(zigzag(4, 1), True)), (q, k, v))


def test_rows_that_see_nothing_add_nothing() -> None:
    out, lse = torch.zeros(1, 2), torch.full((1, 1), float("-inf"))
    merge(out, lse, torch.zeros(1, 2), torch.full((1, 1), float("-inf")))
    assert out.tolist() == [[0, 0]] and lse.item() == float("-inf")
    merge(out, lse, torch.ones(1, 2), torch.zeros(1, 1))
    assert out.tolist() == [[1, 1]] and lse.item() == 0


@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_ranks_compute_as_many_pairs(ranks: int) -> None:
    owned = zigzag(2 * ranks, ranks)
    assert sorted(s.start for stretches in owned for s in stretches) == list(range(2 * ranks))
    assert {sum(s.stop for s in stretches) for stretches in owned} == {2 * ranks + 1}
