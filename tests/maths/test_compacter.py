"""Compacter against explicit Kronecker products; one shared factor, whose gradient is the sum of all layers'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scrimp.errors import UserError
from scrimp.techniques.tuning.compacter import Compacter, kronecker
from tiny_tuning import kept_more, made, outputs, shaken


def explicit(a: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([torch.kron(a[i], torch.outer(s[i], t[i])) for i in range(len(a))]).sum(0)


def test_the_sum_of_kronecker_products() -> None:
    chance = torch.Generator().manual_seed(0)
    a, s, t = (torch.randn(*shape, generator=chance, dtype=torch.float64) for shape in ((4, 4, 4), (4, 3), (4, 5)))
    torch.testing.assert_close(kronecker(a, s, t), explicit(a, s, t), rtol=0, atol=1e-13)
    assert kronecker(a, s, t).shape == (12, 20)


def test_an_adapter_by_the_equation() -> None:
    run = made(Compacter(bottleneck=8))
    shaken(run.model)
    ad, shared = run.model.blocks[1].mlp.compacter, run.model.blocks[0].attention.compacter.shared
    y = torch.randn(3, 16, dtype=torch.float64)
    hidden = F.gelu(y @ explicit(shared, ad.down_s, ad.down_t).T + ad.down_bias)
    wanted = y + hidden @ explicit(shared, ad.up_s, ad.up_t).T + ad.up_bias
    torch.testing.assert_close(ad(y, y), wanted, rtol=0, atol=1e-12)


def test_one_factor_is_shared_and_its_gradient_is_the_sum() -> None:
    run = made(Compacter(bottleneck=8))
    names = [n for n, p in run.model.named_parameters() if p.requires_grad and n.endswith("shared")]
    assert names == ["blocks.0.attention.compacter.shared"]
    shaken(run.model)
    run.model.eval()
    shared = run.model.get_parameter(names[0])
    adapters = [m.compacter for block in run.model.blocks for m in (block.attention, block.mlp)]
    run.model(run.batch(0)["tokens"]).pow(2).sum().backward()
    whole = shared.grad.clone()
    copies = []
    for adapter in adapters:  # as if each had its own
        own = adapter if adapter.owner[0] is None else torch.nn.Module()
        own.shared = torch.nn.Parameter(shared.detach().clone())
        adapter.owner = (own,)
        copies.append(own.shared)
    run.model(run.batch(0)["tokens"]).pow(2).sum().backward()
    assert all(c.grad.any() for c in copies)
    torch.testing.assert_close(whole, torch.stack([c.grad for c in copies]).sum(0), rtol=1e-12, atol=1e-12)


def test_it_trains_few_numbers_and_begins_near_the_base() -> None:
    run = made(Compacter(bottleneck=8))
    trained = {n: p.numel() for n, p in run.model.named_parameters() if p.requires_grad}
    own = sum(count for n, count in trained.items() if ".compacter." in n)
    assert own == 64 + 4 * (2 * (8 + 16) + 8 + 16)
    assert any(n.endswith("mlp_norm.weight") for n in trained)
    change = float((outputs(run) - outputs(made())).abs().max())
    assert 0 < change < 1e-2


def test_what_a_block_keeps() -> None:
    """As an adapter, and small matrices: each made of three, and itself."""
    weights = 64 * 32  # the unit: 64 tokens of width 32
    matrices = 4 * 8 * 32 / weights  # multiplied out
    rights = 4 * 4 * (8 * 32 // 16) / weights  # s t^T
    assert kept_more(Compacter(bottleneck=8)) == pytest.approx(2 + 4 * 8 / 32 + matrices + rights)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="bottleneck 6 is not a multiple of n 4"):
        Compacter(bottleneck=6)
    with pytest.raises(UserError, match="16 outputs is not a multiple of n 3"):
        made(Compacter(bottleneck=6, n=3))
