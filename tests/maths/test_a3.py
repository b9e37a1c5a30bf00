"""The greedy search against pointers into sorted columns, and what it keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scrimp.cores import traced
from scrimp.techniques.attention.a3 import A3, FixedPoint, Searched, fixed, greedy, searched
from tiny import example, recipe, run_of


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def square(tokens: int, causal: bool = False) -> Tensor:
    every = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    return every.tril() if causal else every


def by_pointers(q: list[float], keys: list[list[float]], steps: int) -> list[float]:
    """The search as the hardware does it: a pointer at each end of each sorted column."""
    width = len(q)
    columns = [sorted((q[j] * key[j], i) for i, key in enumerate(keys)) for j in range(width)]
    top, bottom = [len(keys) - 1] * width, [0] * width
    scores, total = [0.0] * len(keys), 0.0
    for _ in range(steps):
        j = max((j for j in range(width) if top[j] >= 0), key=lambda j: columns[j][top[j]])
        value, row = columns[j][top[j]]
        top[j] -= 1
        if value > 0:
            scores[row] += value
            total += value
        if total >= 0:
            j = min((j for j in range(width) if bottom[j] < len(keys)), key=lambda j: columns[j][bottom[j]])
            value, row = columns[j][bottom[j]]
            bottom[j] += 1
            if value < 0:
                scores[row] += value
                total += value
    return scores


def test_the_search_is_that_of_pointers() -> None:
    q, k = drawn(2, 1, 1, 9, 4)
    for steps in (1, 4, 13):
        found = searched(q, k, square(9), steps, torch.tensor([[[steps]]]))[0, 0]
        wanted = [by_pointers(x.tolist(), k[0, 0].tolist(), steps) for x in q[0, 0]]
        torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=1e-5)


def test_all_products_are_the_exact_product() -> None:
    q, k = drawn(2, 1, 2, 6, 4)
    q[..., 0], k[..., 0] = 9.0, 9.0  # sums stay positive, so that no negative product is left out
    torch.testing.assert_close(searched(q, k, square(6), 24, torch.tensor([[[24]]])), q @ k.transpose(-1, -2))


def test_more_steps_find_more_of_the_true_best() -> None:
    q, k = drawn(2, 1, 4, 64, 16)
    true = (q @ k.transpose(-1, -2)).topk(5, -1).indices
    recalls = []
    for steps in (4, 16, 64):
        found = searched(q, k, square(64), steps, torch.tensor([[[steps]]])) > 0
        recalls.append(float(found.gather(-1, true).float().mean()))
    assert recalls == sorted(recalls)
    assert recalls[-1] > 0.95
    assert recalls[0] < 0.7


def test_keeps_candidates_of_enough_weight_and_always_one() -> None:
    q, k = drawn(2, 2, 2, 8, 4)
    q[0, 0, 0], k[0, 0] = 1.0, -k[0, 0].abs()  # no product is above 0
    seen = square(8, causal=True)
    found, keep = (Searched(A3(weight=weight))(q, k, seen) & seen for weight in (0.0, 0.5))
    assert found.any(-1).all()
    scores = ((q @ k.transpose(-1, -2)) / 2).masked_fill(~found, -math.inf)
    wanted = scores.exp() >= 0.5 * scores.exp().amax(-1, keepdim=True)
    assert torch.equal(keep, wanted)
    assert not torch.equal(keep, found)


def test_fixed_point_numbers() -> None:
    x = torch.tensor([0.3, -0.3, 7.99, -20.0], requires_grad=True)
    assert fixed(x, 4).tolist() == [0.3125, -0.3125, 7.9375, -8.0]
    y = FixedPoint(4)(x, x, x)[0]
    y.sum().backward()
    torch.testing.assert_close(y, fixed(x, 4))
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1, 1]


def test_some_queries_at_a_time_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = drawn(2, 2, 2, 7, 4)
    seen, each = square(7, causal=True), torch.tensor([[[4]], [[9]]])
    whole = greedy(q, k, seen, 9, each)
    monkeypatch.setattr("scrimp.techniques.attention.a3.PRODUCTS", 2 * 2 * 7 * 4 * 3)
    assert torch.equal(greedy(q, k, seen, 9, each), whole)
    assert torch.equal(whole[:1], searched(q[:1], k[:1], seen, 4, each[:1])), "each sample has steps of its own"


def test_a_trace_has_what_was_kept_and_what_was_asked_for() -> None:
    run = run_of(recipe(example("a3", weight=0.99)))
    assert run.evaluate and run.loss
    with traced(run.model) as cores:
        run.evaluate(lambda model: run.task.loss(model, run.batch(0)))
    trace = cores["blocks.0.attention.core"].trace
    assert trace.predictor == "a3"
    assert trace.mask.any(-1).all()
    assert 0 < trace.mask.float().mean() < 17 / 32
    kept, needed = trace.mask.sum(-1), trace.details["candidates"]
    assert (needed >= kept).all()
    assert (needed > kept).any()
    assert needed.max() <= 8, "a step finds one candidate at most, and there are 16 keys"
