"""What an operator's record says it reads, writes and computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from scrimp.ops import Op
from scrimp.trace import Trace

X, Y = torch.ones(10, 100), torch.ones(10, 100)
SIZE = X.nbytes


def ops(work: Callable[[], Any]) -> list[Op]:
    with torch.no_grad(), Trace() as trace:
        work()
    return trace.ops


@pytest.mark.parametrize(("work", "name", "read", "written"), [
    (lambda: X + Y, "aten.add", 2 * SIZE, SIZE),
    (lambda: X.clone().add_(Y), "aten.add", 2 * SIZE, SIZE),
    (lambda: torch.add(X, Y, out=torch.empty_like(X)), "aten.add", 2 * SIZE, SIZE),
    (lambda: X.clone().copy_(Y), "aten.copy", SIZE, SIZE),
    (lambda: X.clone().zero_(), "aten.zero", 0, SIZE),
    (lambda: X.clone().mul_(2.0), "aten.mul", SIZE, SIZE),
    (lambda: X.expand(3, 10, 100).sum(0), "aten.sum", SIZE, SIZE),
    (lambda: torch.ops.aten._foreach_add_([X.clone(), X.clone()], [Y, Y]), "aten._foreach_add", 4 * SIZE, 2 * SIZE),
    (lambda: F.embedding(torch.tensor([1, 2]), X), "aten.embedding", 800, 800),
    (lambda: X.view(100, 10), "aten.view", 0, 0),
    (lambda: torch.empty(1000), "aten.empty", 0, 0),
])  # fmt: skip
def test_bytes(work: Callable[[], Any], name: str, read: int, written: int) -> None:
    last = ops(work)[-1]
    assert (last.name, last.read, last.written) == (name, read, written)


def test_a_fused_update_reads_and_writes_weights_and_moments() -> None:
    w = torch.nn.Parameter(X.clone())
    w.grad = Y
    rule = torch.optim.AdamW([w], fused=True)
    rule.step()
    found = next(op for op in ops(rule.step) if op.name == "aten._fused_adamw")
    assert found.written == 4 * SIZE, "by its schema it may change gradients too"
    assert found.read == 4 * SIZE + 4, "and the counter of steps"


def test_asked_for_is_what_is_new() -> None:
    assert ops(lambda: X + Y)[-1].fresh == SIZE
    assert ops(lambda: torch.add(X, Y, out=torch.empty_like(X)))[-1].fresh == 0
    assert ops(lambda: torch.ones(4, 4).t())[-1].fresh == 0


def test_products() -> None:
    a, b = torch.ones(3, 5), torch.ones(7, 5)
    found = ops(lambda: F.linear(a, b, torch.ones(7)))[-1]
    assert (found.name, found.shape, found.layout, found.flops) == ("aten.addmm", (1, 3, 7, 5), "nt", 210.0)
    found = ops(lambda: torch.mm(a.t(), torch.ones(3, 4), out=torch.empty(5, 4)))[-1]
    assert (found.name, found.shape, found.layout, found.flops) == ("aten.mm", (1, 5, 4, 3), "tn", 120.0)
    found = ops(lambda: torch.bmm(torch.ones(2, 3, 5), torch.ones(2, 5, 7)))[-1]
    assert (found.shape, found.layout, found.flops) == ((2, 3, 7, 5), "nn", 420.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_attention(causal: bool, grouped: bool) -> None:
    q, k = torch.ones(2, 4, 8, 16), torch.ones(2, 2 if grouped else 4, 8, 16)
    found = ops(lambda: F.scaled_dot_product_attention(q, k, k, is_causal=causal, enable_gqa=grouped))
    attention = next(op for op in found if "attention" in op.name)
    assert attention.shape == (8, 8, 8, 16)
    assert attention.flops == 4 * 8 * 8 * 8 * 16 * (0.5 if causal else 1.0)
    assert attention.grouped == grouped
