"""A trained detector: its estimate, its loss, and rows of equal length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scrimp.cores import collected, sparse_cores, traced
from scrimp.draws import generator
from scrimp.run import exported
from scrimp.techniques.attention.dota import Detector, Dota, rounded, ternary
from tiny import example, recipe, run_of, step


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def detector(width: int = 8, heads: int = 2, **settings: float) -> Detector:
    """A detector whose A and B are the identity."""
    made = Detector(Dota(**settings), torch.empty(heads, width), 0)  # type: ignore[arg-type]
    made.refill()
    for name, p in made.named_parameters():
        made.initialize(name, p.data, torch.Generator())
    return made


def square(tokens: int, causal: bool = False) -> Tensor:
    every = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    return every.tril() if causal else every


def test_the_projection_keeps_products_on_average() -> None:
    parts = torch.stack([ternary(8, 4, generator(i, "p")) for i in range(1000)])
    assert sorted(set(parts.unique().tolist())) == pytest.approx([-((3 / 4) ** 0.5), 0, (3 / 4) ** 0.5])
    mean = (parts @ parts.transpose(1, 2)).mean(0)
    torch.testing.assert_close(mean, torch.eye(8), atol=0.15, rtol=0)


def test_the_estimate_is_the_product_of_projected_heads() -> None:
    made, (q, k) = detector(bits=0, rank=0.5), drawn(2, 1, 2, 5, 8)
    with torch.no_grad():
        made.queries.add_(drawn(2, 4, 4))
    for h in range(2):
        a = q[0, h] @ made.projection @ made.queries[h]
        b = k[0, h] @ made.projection @ made.keys[h]
        torch.testing.assert_close(made.estimate(q, k)[0, h], a @ b.T / 8**0.5)


def test_its_loss_moves_it_only_and_makes_it_better() -> None:
    made, (q, k) = detector(width=16, bits=0, rank=0.25), drawn(2, 4, 2, 24, 16)
    k = q + 0.1 * k  # products with a structure that a few numbers can hold
    k[..., 4:], q[..., 4:] = 0.0, 0.0
    rule = torch.optim.Adam(made.parameters(), 0.05)
    first = None
    for _ in range(80):
        loss = made.error(q, k, square(24))
        first = first if first is not None else loss.detach()
        rule.zero_grad()
        loss.backward()
        rule.step()
    assert first is not None
    assert loss.detach() < 0.25 * first
    keep, true = made(q, k, square(24)), (q @ k.transpose(-1, -2)).topk(3, -1).indices
    assert keep.gather(-1, true).float().mean() > 0.6


def test_rows_are_of_equal_length() -> None:
    made, (q, k) = detector(keep=0.3), drawn(2, 2, 2, 10, 8)
    assert (made(q, k, square(10)).sum(-1) == 3).all()
    keep = made(q, k, square(10, causal=True))
    assert torch.equal(keep.sum(-1), torch.arange(1, 11).clamp(max=3).expand(2, 2, -1))
    assert not (keep & ~square(10, causal=True)).any()


def test_few_bits_pass_gradients() -> None:
    x = drawn(3, 8).requires_grad_()
    y = rounded(x, 4)
    assert (y.detach() / (x.detach().abs().amax(-1, keepdim=True) / 7)).round().unique().abs().max() <= 7
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(3, 8))
    assert rounded(x, 0) is x


def test_products_of_few_bits_are_whole_numbers() -> None:
    """A scale along the sum would be no number of few bits to hardware: those of A and B are of their columns."""
    made, (q, k) = detector(bits=4, rank=0.5), drawn(2, 1, 2, 5, 8)
    with torch.no_grad():
        made.queries.add_(drawn(2, 4, 4))
    x, w = rounded(q @ made.projection, 4), rounded(made.queries.mT, 4).mT
    steps = x.abs().amax(-1, keepdim=True) / 7 * w.abs().amax(-2, keepdim=True)[None] / 7
    sums = (x @ w / steps).detach()
    torch.testing.assert_close(sums, sums.round(), atol=1e-3, rtol=0)
    y = rounded(x @ w, 4)
    b = rounded(rounded(k @ made.projection, 4) @ rounded(made.keys.mT, 4).mT, 4)
    torch.testing.assert_close(made.estimate(q, k), y @ b.mT / 8**0.5)


@pytest.mark.parametrize("when", ["always", "evaluation"])
def test_joins_the_task_once_with_and_without_recomputing(when: str) -> None:
    runs = [run_of(recipe(example("dota", when=when), *more)) for more in ((), (example("recompute"),))]
    for run in runs:
        step(run)
        assert collected(sparse_cores(run.model, "dota")) is None, "a second pass leaves nothing behind"
    one, two = (dict(run.model.named_parameters()) for run in runs)
    assert all(torch.equal(p, two[n]) for n, p in one.items())
    moved = one["blocks.0.attention.core.select.queries"]
    assert not torch.equal(moved, torch.eye(moved.shape[-1]).expand_as(moved))
    run = runs[0]
    assert run.loss and run.evaluate
    assert set(exported(run)) == set(run.base)
    with traced(run.model) as cores:
        run.evaluate(lambda model: run.task.loss(model, run.batch(0)))
    trace = cores["blocks.0.attention.core"].trace
    assert int(trace.mask.sum(-1).max()) == 4
    assert trace.details == {"rank": 4, "bits": 4}
