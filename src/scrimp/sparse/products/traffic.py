# pyright: strict
"""What a product of two sparse matrices multiplies and moves, in closed form.

    P = sum over k of nnz(A[:, k]) nnz(B[k, :])        compression = P / nnz(C)
    outer        e (nnz A + nnz B) + 2 e P + e nnz C            parts are written once and read once
    gustavson    e (nnz A + c P + nnz C)                        c from nnz(B) / P, all of B cached, to 1, nothing cached
    inner        e (ceil(N / n) nnz A + ceil(M / m) nnz B + nnz C)      in tiles of m rows and n columns of C

for an entry of e = 12 bytes (an index of 4, a number of 8), A [M, K] and B [K, N].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from scrimp.sparse.products.csr import CSR

ENTRY: Final = 12
"""Bytes of an entry: an index and a double."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Counts of a product, and the bytes that each dataflow moves between a processor and its memory."""

    rows: int
    """M."""
    columns: int
    """N."""
    a: int
    """Entries of A."""
    b: int
    """Entries of B."""
    c: int
    """Entries of C."""
    products: int
    """P: scalar products."""
    entry: int = ENTRY
    """Bytes of an entry."""

    @classmethod
    def of(cls, a: CSR, b: CSR, c: CSR | int) -> Traffic:
        """Count; C is the product, or how many entries it has."""
        entries = c if isinstance(c, int) else c.entries
        done = count(a, b)
        return cls(rows=a.shape[0], columns=b.columns, a=a.entries, b=b.entries, c=entries, products=done)

    @property
    def compression(self) -> float:
        """Products an entry of C is the sum of, on average."""
        return self.products / self.c if self.c else 0.0

    @property
    def least(self) -> int:
        """Every entry once: below this no dataflow comes."""
        return self.entry * (self.a + self.b + self.c)

    @property
    def outer(self) -> int:
        """Bytes of the outer product, with its parts written and read."""
        return self.least + 2 * self.entry * self.products

    def gustavson(self, reread: float = 1.0) -> float:
        """Bytes row by row.

        Args:
            reread: c: entries of B that are read, as a share of P; at least `cached`.
        """
        return self.entry * (self.a + max(reread, self.cached) * self.products + self.c)

    @property
    def cached(self) -> float:
        """The least c: every entry of B is read once."""
        return min(1.0, self.b / self.products) if self.products else 0.0

    def inner(self, high: int = 1, wide: int = 1) -> int:
        """Bytes of the inner product.

        Args:
            high: rows of C of which A's entries are held at once.
            wide: columns of C of which B's entries are held at once.
        """
        return self.entry * (-(-self.columns // wide) * self.a + -(-self.rows // high) * self.b + self.c)

    @property
    def compared(self) -> int:
        """Indices that the inner product compares at most: each row's with each column's."""
        return self.columns * self.a + self.rows * self.b


def count(a: CSR, b: CSR) -> int:
    """P, without multiplying."""
    return int(torch.dot(torch.bincount(a.col, minlength=a.columns), b.lengths()))
