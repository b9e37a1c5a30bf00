"""Products by another library: exact, restored, and off where it is not wanted."""

from __future__ import annotations

import pytest
import torch

from scrimp import products


def precision() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]


def test_products_keep_float32_and_the_setting_is_restored() -> None:
    before = precision()
    torch.manual_seed(0)
    a, b = torch.randn(200, 300), torch.randn(300, 100)
    with products.fast_products():
        got = a @ b
    assert precision() == before
    error = (got - (a.double() @ b.double())).abs().max() / got.abs().max()
    assert float(error) < 1e-6


def test_it_is_restored_after_an_error() -> None:
    before = precision()
    with pytest.raises(KeyError), products.fast_products():
        raise KeyError
    assert precision() == before


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIMP_PRODUCTS", "default")
    with products.fast_products() as fast:
        assert not fast


def test_rounding_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.bfloat16() @ b.bfloat16()).float()

    assert products.exact()
    monkeypatch.setattr(torch, "bmm", rounded)
    assert not products.exact()
