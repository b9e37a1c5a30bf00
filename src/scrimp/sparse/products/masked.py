# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Masked attention as products of sparse matrices.

    SDDMM   S = (Q K^T) at the entries of a pattern          dQ = dS K,    dK = dS^T Q
    SpMM    O = P V with P sparse                            dV = P^T dO,  dP = (dO V^T) at the entries of P

Only what the pattern holds is computed and kept, in both directions. A batch of masks is one pattern, with a block on
the diagonal for each (`CSR.of_mask`). On a CPU float32 and float64 go through torch's own sparse products (MKL), which
compute the same sums in another order; everything else is gathered and added, piece by piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from scrimp.errors import UserError
from scrimp.sparse.products.csr import CSR, PIECE


def sddmm(q: Tensor, k: Tensor, pattern: CSR) -> CSR:
    """q k^T where the pattern has entries; its values are not read.

    Shapes: q [rows, D], k [columns, D].

    Raises:
        UserError: if they do not fit the pattern.
    """
    _fits("sddmm", (q.shape[0], k.shape[0]) == pattern.shape and q.shape[1:] == k.shape[1:], q, k, pattern)
    return pattern.with_values(_Sampled.apply(q, k, pattern.detach()))


def spmm(p: CSR, v: Tensor) -> Tensor:
    """p v of a sparse matrix p [rows, columns] and v [columns, D] -> [rows, D].

    Raises:
        UserError: if they do not fit.
    """
    _fits("spmm", v.ndim == 2 and v.shape[0] == p.columns, v, p)
    return _Summed.apply(p.values, v, p.detach())


def softmax(scores: CSR) -> CSR:
    """Softmax of each row over its entries. A row without entries stays empty."""
    rows, count = scores.rows(), scores.shape[0]
    values = scores.values
    most = values.detach().new_full((count,), -torch.inf).scatter_reduce(0, rows, values.detach(), "amax")
    powers = (values - most[rows]).exp()
    total = torch.zeros_like(most).index_add(0, rows, powers)
    return scores.with_values(powers / total[rows])


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: CSR, scale: float | None = None) -> Tensor:
    """Attention of queries to the keys that a pattern gives each. Shapes: [B, H, T, D], pattern of a mask [B, H, T, T].

    Any leading dimensions will do, if the mask had them too. Queries without keys get zeros.

    Args:
        scale: of the scores; D^-1/2 by default.
    """
    by: float = q.shape[-1] ** -0.5 if scale is None else scale
    flat_q, flat_k, flat_v = (x.flatten(0, -2) for x in (q, k, v))
    return spmm(softmax(sddmm(flat_q * by, flat_k, pattern)), flat_v).view(*q.shape[:-1], v.shape[-1])


class _Sampled(Function):
    """q [rows, D], k [columns, D] -> values [entries]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, pattern: CSR) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.pattern = pattern
        return sampled(q, k, pattern)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k = ctx.saved_tensors
        g = ctx.pattern.with_values(grads[0])
        return (multiplied(g, k) if ctx.needs_input_grad[0] else None,
                multiplied(g.t(), q) if ctx.needs_input_grad[1] else None, None)  # fmt: skip


class _Summed(Function):
    """values [entries], v [columns, D] -> [rows, D]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, v: Tensor, pattern: CSR) -> Tensor:
        ctx.save_for_backward(values, v)
        ctx.pattern = pattern
        return multiplied(pattern.with_values(values), v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, v = ctx.saved_tensors
        p = ctx.pattern.with_values(values)
        return (sampled(grads[0], v, p) if ctx.needs_input_grad[0] else None,
                multiplied(p.t(), grads[0]) if ctx.needs_input_grad[1] else None, None)  # fmt: skip


def library(x: Tensor) -> bool:
    """Whether torch's own kernels take it."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and torch.backends.mkl.is_available()


def sampled(q: Tensor, k: Tensor, pattern: CSR) -> Tensor:
    """Dot products of rows of q [rows, D] and k [columns, D] at the entries of a pattern."""
    if library(q) and pattern.entries:
        none = pattern.with_values(q.new_zeros(pattern.entries)).torch()
        return torch.sparse.sampled_addmm(none, q.contiguous(), k.t(), beta=0.0).values()
    size = max(1, PIECE // max(1, q.shape[1]))
    parts = zip(pattern.rows().split(size), pattern.col.split(size), strict=True)
    return torch.cat([(q[row] * k[col]).sum(-1) for row, col in parts])


def multiplied(p: CSR, v: Tensor) -> Tensor:
    """p v."""
    if library(v) and p.entries:
        return torch.sparse.mm(p.torch(), v.contiguous())
    out = v.new_zeros(p.shape[0], v.shape[1])
    size = max(1, PIECE // max(1, v.shape[1]))
    for row, col, value in zip(p.rows().split(size), p.col.split(size), p.values.split(size), strict=True):
        out.index_add_(0, row, v[col] * value[:, None])
    return out


def _fits(where: str, fits: bool, *parts: Tensor | CSR) -> None:
    if not fits:
        sizes = " and ".join(str(tuple(part.shape)) for part in parts)
        raise UserError(f"{sizes} do not fit.", where, "Rows and columns must be those of the pattern.")
