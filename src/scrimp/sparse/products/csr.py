# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Sparse matrices in compressed rows, and what all products of them need: transposition and pieces of work."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from scrimp.errors import UserError

PIECE: Final = 1 << 16
"""Numbers that a piece of work handles at once: their temporaries stay in a core's cache."""


@dataclass(frozen=True, eq=False)
class CSR:
    """A sparse matrix in compressed rows. Gradients flow to `values`; what is not stored is no variable."""

    crow: Tensor
    """int64 [rows + 1]: row i has the entries from crow[i] to before crow[i + 1]."""
    col: Tensor
    """int64 [entries]: their columns, ascending within a row and without duplicates."""
    values: Tensor
    """[entries]: their numbers; a stored zero is an entry."""
    columns: int

    def __post_init__(self) -> None:
        if self.crow.dtype != torch.int64 or self.col.dtype != torch.int64:
            raise UserError("indices must be int64.", "CSR", "Convert them by .long().")
        if self.values.ndim != 1 or self.values.shape != self.col.shape:
            what = f"{tuple(self.values.shape)} values do not fit {tuple(self.col.shape)} columns."
            raise UserError(what, "CSR", "Give one number an entry.")

    @classmethod
    def of_dense(cls, matrix: Tensor, mask: Tensor | None = None) -> CSR:
        """The numbers of a matrix [rows, columns] where a mask is, or where it is not zero."""
        rows, col = (matrix != 0 if mask is None else mask).nonzero(as_tuple=True)
        return cls(compressed(rows, matrix.shape[0]), col, matrix[rows, col], matrix.shape[1])

    @classmethod
    def of_mask(cls, mask: Tensor, dtype: torch.dtype = torch.float32) -> CSR:
        """Ones where a mask [..., rows, columns] is. Leading dimensions become blocks on the diagonal of one matrix."""
        flat = mask.reshape(-1, *mask.shape[-2:])
        block, row, col = flat.nonzero(as_tuple=True)
        count, high, wide = flat.shape
        ones = torch.ones(len(col), dtype=dtype, device=mask.device)
        return cls(compressed(block * high + row, count * high), block * wide + col, ones, count * wide)

    @classmethod
    def of_torch(cls, matrix: Tensor) -> CSR:
        """From a torch tensor of layout sparse_csr or sparse_coo.

        Raises:
            UserError: if it is no such matrix.
        """
        if matrix.layout == torch.sparse_coo and matrix.ndim == 2:
            matrix = matrix.coalesce().to_sparse_csr()
        if matrix.layout != torch.sparse_csr or matrix.ndim != 2:
            what = f"a tensor of layout {matrix.layout} with {matrix.ndim} dimensions is no sparse matrix."
            raise UserError(what, "CSR.of_torch", "Convert it by .to_sparse_csr().")
        crow, col = matrix.crow_indices().long(), matrix.col_indices().long()
        return cls(crow, col, matrix.values(), matrix.shape[1])

    @classmethod
    def of_scipy(cls, matrix: Any) -> CSR:
        """From any sparse matrix or array of scipy; duplicates are summed."""
        kept = matrix.tocsr(copy=True)
        kept.sum_duplicates()
        crow, col = (torch.as_tensor(index, dtype=torch.int64) for index in (kept.indptr, kept.indices))
        return cls(crow, col, torch.as_tensor(kept.data), kept.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return len(self.crow) - 1, self.columns

    @property
    def entries(self) -> int:
        """How many numbers are stored."""
        return len(self.col)

    def lengths(self) -> Tensor:
        """int64 [rows]: entries of each row."""
        return self.crow.diff()

    def rows(self) -> Tensor:
        """int64 [entries]: the row of each entry."""
        return torch.repeat_interleave(self.lengths(), output_size=self.entries)

    def with_values(self, values: Tensor) -> CSR:
        """Other numbers in the same places."""
        return replace(self, values=values)

    def detach(self) -> CSR:
        """The same without gradients."""
        return self.with_values(self.values.detach())

    def torch(self) -> Tensor:
        """As a torch tensor of layout sparse_csr."""
        with warnings.catch_warnings():
            # torch calls the layout a beta, once a process.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            return torch.sparse_csr_tensor(self.crow, self.col, self.values, self.shape, check_invariants=False)

    def scipy(self) -> Any:
        """As scipy's csr_array, without gradients.

        Raises:
            UserError: if scipy is missing.
        """
        try:
            from scipy.sparse import csr_array  # pyright: ignore[reportMissingTypeStubs]
        except ImportError:
            raise UserError("this needs scipy.", "CSR.scipy", "pip install scipy") from None
        parts = (part.detach().cpu().numpy() for part in (self.values, self.col, self.crow))
        return csr_array(tuple(parts), shape=self.shape)

    def dense(self) -> Tensor:
        """[rows, columns], with zeros for what is not stored."""
        flat = self.values.new_zeros(self.shape[0] * self.columns)
        return flat.index_put((self.rows() * self.columns + self.col,), self.values).view(self.shape)

    def transposition(self) -> tuple[Tensor, CSR]:
        """(which entry of this one each entry of the transposed is, the transposed matrix)."""
        order = stable_order(self.col, self.columns)
        counts = torch.bincount(self.col, minlength=self.columns)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return order, CSR(crow, self.rows()[order], self.values[order], self.shape[0])

    def t(self) -> CSR:
        """The transposed matrix: this one by columns."""
        return self.transposition()[1]


def compressed(rows: Tensor, count: int) -> Tensor:
    """Rows of entries, ascending -> `crow` [count + 1]."""
    return torch.cat([rows.new_zeros(1), torch.bincount(rows, minlength=count).cumsum(0)])


def stable_order(key: Tensor, buckets: int) -> Tensor:
    """What sorts whole numbers below `buckets`, equal ones in the order they have: a counting sort.

    Pieces are sorted in the cache and then dealt out to the buckets, which is several times as fast as one long sort.
    """
    if len(key) <= PIECE:
        return key.sort(stable=True).indices
    counts = torch.bincount(key, minlength=buckets)
    free, order = counts.cumsum(0) - counts, torch.empty_like(key)
    for begin in range(0, len(key), PIECE):
        sorted_, inside = key[begin : begin + PIECE].sort(stable=True)
        bucket, runs = torch.unique_consecutive(sorted_, return_counts=True)
        at = free[bucket]
        place = torch.repeat_interleave(at - (runs.cumsum(0) - runs), runs) + torch.arange(
            len(inside), device=key.device
        )
        order[place] = inside + begin
        free[bucket] = at + runs
    return order


def pieces(work: Tensor, most: int, longest: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows with work of at most `most` together and of at most `longest` rows; one row is never cut."""
    done = [0, *work.cumsum(0).tolist()]
    begin = 0
    while begin < len(work):
        end = bisect_right(done, done[begin] + most, lo=begin + 1) - 1
        end = min(max(end, begin + 1), begin + longest, len(work))
        if done[end] > done[begin]:
            yield begin, end
        begin = end
