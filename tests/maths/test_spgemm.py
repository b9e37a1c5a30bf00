"""Products of sparse matrices: equal to scipy's in every dataflow, with gradients on what is stored only."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scrimp.errors import UserError
from scrimp.sparse.products import CSR, DATAFLOWS, Traffic, attend, csr, dataflows, masked, sddmm, softmax, spgemm, spmm

sparse: Any = import_module("scipy.sparse")
NAMES = sorted(DATAFLOWS)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices in many pieces."""
    for module in (csr, dataflows, masked):
        monkeypatch.setattr(module, "PIECE", 64)
    monkeypatch.setattr(dataflows, "CELLS", 128)


def pair(rows: int = 37, inner: int = 29, columns: int = 41, density: float = 0.1, seed: int = 0) -> tuple[CSR, CSR]:
    """Two matrices with empty rows and columns."""
    draw = np.random.default_rng(seed)
    sizes = (rows, inner), (inner, columns)
    made = [sparse.random(*size, density, format="csr", random_state=draw) for size in sizes]
    for one in made:
        one.data *= draw.choice([-1, 1], one.nnz)
    return CSR.of_scipy(made[0]), CSR.of_scipy(made[1])


def entries(c: CSR) -> set[tuple[int, int]]:
    return set(zip(c.rows().tolist(), c.col.tolist(), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.6])
def test_every_dataflow_gives_scipys_product(name: str, density: float) -> None:
    a, b = pair(density=density)
    c = spgemm(a, b, name)  # type: ignore[arg-type]
    want = a.scipy() @ b.scipy()
    assert torch.allclose(c.dense(), torch.from_numpy(want.toarray()), rtol=1e-12, atol=1e-14)
    ones = (a.scipy() != 0).astype(int) @ (b.scipy() != 0).astype(int)
    assert entries(c) == set(zip(*ones.nonzero(), strict=True))
    assert all(row.diff().gt(0).all() for row in c.col.split(c.lengths().tolist())), "columns ascend"


@pytest.mark.parametrize("name", NAMES)
def test_a_product_by_hand(name: str) -> None:
    """Row 0 meets two rows, whose products cancel in column 3; row 2 is empty; A's column 2 meets an empty row."""
    a = CSR.of_dense(torch.tensor([[1.0, 2, 0, 0], [0, 0, 5, 3], [0, 0, 0, 0], [0, 4, 0, 0]], dtype=torch.float64))
    b = CSR.of_dense(torch.tensor([[7.0, 0, 0, 2], [0, 6, 0, -1], [0, 0, 0, 0], [0, 0, 8, 0]], dtype=torch.float64))
    c = spgemm(a, b, name)  # type: ignore[arg-type]
    assert c.crow.tolist() == [0, 3, 4, 4, 6]
    assert c.col.tolist() == [0, 1, 3, 2, 1, 3]
    assert c.values.tolist() == [7, 12, 0, 24, 24, -4]
    seen = Traffic.of(a, b, c)
    # Columns of A hold 1, 2, 1, 1 entries and rows of B 2, 2, 0, 1.
    assert (seen.products, seen.a, seen.b, seen.c) == (1 * 2 + 2 * 2 + 1 * 0 + 1 * 1, 5, 5, 6)
    assert seen.outer == 12 * (5 + 5) + 24 * 7 + 12 * 6
    assert seen.gustavson() == 12 * (5 + 7 + 6) and seen.gustavson(0.0) == seen.least == 12 * 16
    assert seen.inner() == 12 * (4 * 5 + 4 * 5 + 6) and seen.inner(high=4, wide=3) == 12 * (2 * 5 + 5 + 6)
    assert seen.compared == 4 * 5 + 4 * 5


def test_products_and_entries_count_what_they_say() -> None:
    a, b = pair(density=0.2)
    c = spgemm(a, b)
    seen = Traffic.of(a, b, c)
    ones = a.dense().ne(0).double() @ b.dense().ne(0).double()
    assert seen.products == int(ones.sum()) == int(dataflows.row_work(a, b).sum())
    assert seen.c == int(ones.count_nonzero())
    assert seen.compression == pytest.approx(seen.products / seen.c)
    listed = [dataflows.products(a, b, i, i + 1) for i in range(a.shape[0])]
    assert sum(len(part.key) for part in listed) == seen.products
    outer = Traffic.of(a, b, 0)
    assert outer.outer - outer.least == 2 * 12 * seen.products


@pytest.mark.parametrize("name", NAMES)
def test_gradients_stay_on_what_is_stored(name: str) -> None:
    a, b = pair(7, 6, 8, density=0.4)

    def values(of_a: Tensor, of_b: Tensor) -> Tensor:
        return spgemm(a.with_values(of_a), b.with_values(of_b), name).values  # type: ignore[arg-type]

    leaves = [m.values.clone().requires_grad_() for m in (a, b)]
    assert torch.autograd.gradcheck(values, leaves)
    dense = [m.with_values(v.detach()).dense().requires_grad_() for m, v in zip((a, b), leaves, strict=True)]
    c = spgemm(a.with_values(leaves[0]), b.with_values(leaves[1]), name)  # type: ignore[arg-type]
    g = torch.randn(c.entries, dtype=torch.float64)
    c.values.backward(g)
    (dense[0] @ dense[1]).backward(c.with_values(g).dense())
    for matrix, leaf, whole in zip((a, b), leaves, dense, strict=True):
        assert leaf.grad is not None and whole.grad is not None
        assert torch.allclose(leaf.grad, whole.grad[matrix.rows(), matrix.col], rtol=1e-12, atol=1e-14)


def test_conversions_come_back() -> None:
    a, _ = pair()
    ways: list[Callable[[], CSR]] = [
        lambda: CSR.of_scipy(a.scipy()), lambda: CSR.of_torch(a.torch()), lambda: CSR.of_dense(a.dense()),
        lambda: CSR.of_torch(a.torch().to_sparse_coo()), lambda: a.t().t(),
    ]  # fmt: skip
    for way in ways:
        found = way()
        assert found.shape == a.shape
        assert all(torch.equal(getattr(found, part), getattr(a, part)) for part in ("crow", "col", "values"))
    assert torch.equal(a.t().dense(), a.dense().t())
    key = torch.randint(0, 9, (1000,))
    assert torch.equal(csr.stable_order(key, 9), key.sort(stable=True).indices)


def test_what_does_not_fit_is_refused() -> None:
    a, _ = pair()
    with pytest.raises(UserError, match="cannot be multiplied"):
        spgemm(a, a)
    with pytest.raises(UserError, match="gustavson"):
        spgemm(a, a.t(), "gustafson")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no sparse matrix"):
        CSR.of_torch(torch.eye(3))
    with pytest.raises(UserError, match="do not fit"):
        sddmm(torch.ones(3, 2), torch.ones(4, 2), a)


@pytest.mark.parametrize("own", [True, False], ids=["torch", "pieces"])
def test_masked_attention_equals_the_dense_one(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not own:
        monkeypatch.setattr(masked, "library", lambda x: False)
    torch.manual_seed(0)
    shape = (2, 3, 9, 4)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 3, 9, 9) < 0.4
    mask[..., 0] = True
    g = torch.randn(shape, dtype=torch.float64)
    grads: list[tuple[Tensor, ...]] = []
    for out in (attend(q, k, v, CSR.of_mask(mask)), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)):
        grads.append((out, *torch.autograd.grad(out, (q, k, v), g)))
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("own", [True, False], ids=["torch", "pieces"])
def test_products_of_attention_pass_gradcheck(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not own:
        monkeypatch.setattr(masked, "library", lambda x: False)
    torch.manual_seed(0)
    pattern = CSR.of_mask(torch.rand(5, 7) < 0.4, torch.float64)
    q, k, v = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    p = torch.randn(pattern.entries, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: sddmm(q, k, pattern).values, (q, k))
    assert torch.autograd.gradcheck(lambda p, v: spmm(pattern.with_values(p), v), (p, v))
    assert torch.autograd.gradcheck(lambda p: softmax(pattern.with_values(p)).values, (p,))
    empty = CSR.of_mask(torch.zeros(5, 7, dtype=torch.bool), torch.float64)
    assert attend(q, k, v, empty).count_nonzero() == 0
