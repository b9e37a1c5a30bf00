# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""C = A B of two sparse matrices, in the three orders in which the sum can be taken.

    C[m, n] = sum over k of A[m, k] B[k, n],      P = sum over k of nnz(A[:, k]) nnz(B[k, :]) products that are not zero

    inner       for m, n: where row A[m, :] and column B[:, n] meet. One number is finished at a time; what does not
                meet is compared in vain, rows times entries of B.
    gustavson   for m: for k in A[m, :]: add A[m, k] B[k, :] to an accumulator of a row. Rows of B are read again.
    outer       for k: column A[:, k] times row B[k, :], whose P parts are stored, by rows of C; then they are merged.

All give the same entries: C has one wherever a product falls, also where products cancel. They add in different
orders, so that sums differ by rounding. Gustavson: ACM Transactions on Mathematical Software 4(3), 1978; the outer
product's two phases: Pal et al., "OuterSPACE", HPCA 2018.

The gradient stays on what is stored: dA = (dC B^T) at the entries of A, dB = (A^T dC) at those of B, by P products
each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from scrimp.errors import UserError, did_you_mean
from scrimp.sparse.products.csr import CSR, PIECE, compressed, pieces

CELLS: Final = 1 << 18
"""Places of a dense accumulator."""
SCAN: Final = 32
"""Places that are looked through in the time in which one product is sorted in."""
TESTED: Final = 64
"""Rows whose entries the inner product looks up at once."""
Parts = tuple[Tensor, Tensor, Tensor]
"""crow, col and values of a product."""


def spgemm(a: CSR, b: CSR, dataflow: Literal["inner", "gustavson", "outer"] = "gustavson") -> CSR:
    """The product of two sparse matrices, with gradients to the stored values of both.

    Args:
        a: [rows, inner].
        b: [inner, columns].
        dataflow: the order in which it is computed; the entries are the same.
    Raises:
        UserError: if the sizes do not fit, or the dataflow is unknown.
    """
    if dataflow not in DATAFLOWS:
        raise UserError(f"there is no dataflow `{dataflow}`.", "spgemm", did_you_mean(dataflow, list(DATAFLOWS)))
    if a.columns != b.shape[0]:
        raise UserError(f"{a.shape} and {b.shape} cannot be multiplied.", "spgemm", "Transpose one by .t().")
    crow, col, values = _Product.apply(a.values, b.values, a.detach(), b.detach(), dataflow)
    return CSR(crow, col, values, b.columns)


def work(a: CSR, b: CSR) -> Tensor:
    """int64 [entries of a]: products that each entry of A takes part in."""
    return b.lengths()[a.col]


def row_work(a: CSR, b: CSR) -> Tensor:
    """int64 [rows]: products of each row of C."""
    done = torch.cat([a.crow.new_zeros(1), work(a, b).cumsum(0)])
    return done[a.crow].diff()


@dataclass(frozen=True)
class Products:
    """Some of the P products: row by row of A, entry by entry, each with a whole row of B."""

    of_a: Tensor
    """Index of each one's entry of A, ascending."""
    of_b: Tensor
    """Index of its entry of B."""
    key: Tensor
    """Its place in C, counted from the first row of the piece: row x columns + column."""


def products(a: CSR, b: CSR, begin: int, end: int) -> Products:
    """All products of rows from `begin` to before `end`."""
    first, last = int(a.crow[begin]), int(a.crow[end])
    inner = a.col[first:last]
    starts, counts = b.crow[inner], b.crow[inner + 1] - b.crow[inner]
    before = counts.cumsum(0) - counts
    entry = torch.repeat_interleave(counts)
    of_b = (starts - before)[entry] + torch.arange(len(entry), device=entry.device)
    row = torch.repeat_interleave(a.crow[begin : end + 1].diff(), output_size=last - first) * b.columns
    return Products(entry + first, of_b, row[entry] + b.col[of_b])


def gustavson(a: CSR, b: CSR) -> Parts:
    """Row by row, with a sparse accumulator.

    Where C's rows fill up, it is a dense one with a flag for each place; else the products' places are sorted.
    """
    each = row_work(a, b)
    scans = int(each.sum()) * SCAN > a.shape[0] * b.columns
    longest = max(1, CELLS // max(1, b.columns)) if scans else a.shape[0]
    room = longest * b.columns if scans else 0
    sums, full = a.values.new_zeros(room), torch.zeros(room, dtype=torch.bool, device=a.col.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for begin, end in pieces(each, PIECE, longest):
        some = products(a, b, begin, end)
        numbers = a.values[some.of_a] * b.values[some.of_b]
        if scans:
            full[some.key] = True
            sums.index_add_(0, some.key, numbers)
            at = full[: (end - begin) * b.columns].nonzero().squeeze(1)
            value = sums[at]
            # Only what was touched is cleared.
            full[at] = False
            sums[at] = 0
        else:
            at, place = torch.unique(some.key, return_inverse=True)
            value = numbers.new_zeros(len(at)).index_add_(0, place, numbers)
        keys.append(at + begin * b.columns)
        values.append(value)
    return _parts(keys, values, a, b)


def outer(a: CSR, b: CSR) -> Parts:
    """All parts first, then a merge of each row.

    A part is written where the list of its row of C has room for it: rows of parts are as many as A has entries, in
    the order of A's rows, so that the lists need no pointers.
    """
    order, by_column = a.transposition()
    size = work(a, b)
    before = size.cumsum(0) - size
    total = int(size.sum())
    # 12 bytes a part in float64.
    columns = torch.empty(total, dtype=torch.int32, device=a.col.device)
    numbers = a.values.new_empty(total)
    for begin, end in pieces(by_column.lengths() * b.lengths(), PIECE, b.shape[0]):
        first, last = int(by_column.crow[begin]), int(by_column.crow[end])
        inner = torch.repeat_interleave(by_column.crow[begin : end + 1].diff()) + begin
        counts = b.crow[inner + 1] - b.crow[inner]
        entry = torch.repeat_interleave(counts)
        steps = torch.arange(len(entry), device=entry.device) - (counts.cumsum(0) - counts)[entry]
        of_b = b.crow[inner][entry] + steps
        place = before[order[first:last]][entry] + steps
        columns[place] = b.col[of_b].int()
        numbers[place] = by_column.values[first:last][entry] * b.values[of_b]
    return _merged(a, b, columns, numbers)


def _merged(a: CSR, b: CSR, columns: Tensor, numbers: Tensor) -> Parts:
    """Sort each row's list and add what has the same column."""
    each = row_work(a, b)
    bounds = [0, *each.cumsum(0).tolist()]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for begin, end in pieces(each, PIECE, a.shape[0]):
        some = slice(bounds[begin], bounds[end])
        row = torch.repeat_interleave(each[begin:end]) * b.columns
        key, which = (row + columns[some]).sort(stable=True)
        at, place = torch.unique_consecutive(key, return_inverse=True)
        keys.append(at + begin * b.columns)
        values.append(numbers.new_zeros(len(at)).index_add_(0, place, numbers[some][which]))
    return _parts(keys, values, a, b)


def inner(a: CSR, b: CSR) -> Parts:
    """Every row with every column: entries of B, by columns, are looked up in a table of a few rows of A."""
    by_column = b.t()
    column = by_column.rows()
    lengths = a.lengths()
    filled = lengths.nonzero().squeeze(1)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for rows in filled.split(TESTED) if len(filled) else ():
        table = torch.zeros(b.shape[0], len(rows), dtype=torch.int64, device=rows.device)
        # Rows between these have no entries, so that theirs are in one piece.
        entries = torch.arange(int(a.crow[rows[0]]), int(a.crow[rows[-1] + 1]), device=rows.device)
        local = torch.repeat_interleave(lengths[rows])
        table[a.col[entries], local] = entries + 1
        stored = table != 0
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for begin in range(0, by_column.entries, PIECE):
            asked = by_column.col[begin : begin + PIECE]
            of_b, row = stored[asked].nonzero(as_tuple=True)
            found.append((table[asked[of_b], row] - 1, of_b + begin, row))
        of_a, of_b, row = (torch.cat(part) for part in zip(*found, strict=True)) if found else (rows[:0],) * 3
        key, which = (rows[row] * b.columns + column[of_b]).sort(stable=True)
        at, place = torch.unique_consecutive(key, return_inverse=True)
        numbers = (a.values[of_a] * by_column.values[of_b])[which]
        keys.append(at)
        values.append(numbers.new_zeros(len(at)).index_add_(0, place, numbers))
    return _parts(keys, values, a, b)


def _parts(keys: list[Tensor], values: list[Tensor], a: CSR, b: CSR) -> Parts:
    """Places and numbers of pieces, in ascending order -> compressed rows."""
    if not keys:
        return torch.zeros_like(a.crow), a.col[:0], a.values[:0] * b.values[:0]
    key = torch.cat(keys)
    row = torch.div(key, b.columns, rounding_mode="floor")
    return compressed(row, a.shape[0]), key - row * b.columns, torch.cat(values)


DATAFLOWS: Final[dict[str, Callable[[CSR, CSR], Parts]]] = {"inner": inner, "gustavson": gustavson, "outer": outer}
"""Name -> the function that computes it."""


class _Product(Function):
    """Values of A and B -> C, and their gradients."""

    @staticmethod
    def forward(ctx: Any, of_a: Tensor, of_b: Tensor, a: CSR, b: CSR, dataflow: str) -> Parts:
        kind = torch.promote_types(of_a.dtype, of_b.dtype)
        a, b = a.with_values(of_a.to(kind)), b.with_values(of_b.to(kind))
        crow, col, values = DATAFLOWS[dataflow](a, b)
        ctx.mark_non_differentiable(crow, col)
        ctx.save_for_backward(of_a, of_b, crow, col)
        ctx.a, ctx.b = a, b
        return crow, col, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_a, of_b, crow, col = ctx.saved_tensors
        wanted_a, wanted_b = ctx.needs_input_grad[:2]
        grad_a, grad_b = restricted(ctx.a, ctx.b, CSR(crow, col, grads[2], ctx.b.columns))
        return (grad_a.to(of_a.dtype) if wanted_a else None, grad_b.to(of_b.dtype) if wanted_b else None, None, None,
                None)  # fmt: skip


def restricted(a: CSR, b: CSR, c: CSR) -> tuple[Tensor, Tensor]:
    """(C B^T at the entries of A, A^T C at those of B), for C with an entry wherever a product of A and B falls."""
    grad_a, grad_b = torch.zeros_like(a.values), torch.zeros_like(b.values)
    row = c.rows()
    for begin, end in pieces(row_work(a, b), PIECE, a.shape[0]):
        some = products(a, b, begin, end)
        own = slice(int(c.crow[begin]), int(c.crow[end]))
        key = (row[own] - begin) * c.columns + c.col[own]
        g = c.values[own][torch.searchsorted(key, some.key)]
        grad_a.index_add_(0, some.of_a, g * b.values[some.of_b])
        grad_b.index_add_(0, some.of_b, g * a.values[some.of_a])
    return grad_a, grad_b
