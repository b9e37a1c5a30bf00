# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What a run asks of an accelerator: attention with the keys that each query keeps, sparse and dense products.

Legend of shapes: H heads, N queries, S keys, K inner dimension of a product, M its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from scrimp.errors import UserError

Counts = np.ndarray[Any, np.dtype[np.int64]]
Bits = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """What chose the keys before the exact scores were known."""

    kind: str = "none"
    """Of the attention core: a3, elsa, sanger, dota, vitcod; none for dense attention."""
    bits: int = 0
    """Of its numbers; 0 for the machine's own choice."""
    rank: int = 0
    """Of its scores, or length of its hashes; 0 for the machine's own choice."""
    ratio: float = 0.0
    """Heads that queries and keys are stored as, over all; 0 for the machine's own choice."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionTrace:
    """Attention of one layer: which of its keys each query keeps. Heads of several sequences may be counted together.

    Without a mask, query i keeps its first `rows[h, i]` keys, which is exact for dense and for causal attention.
    """

    rows: Counts
    """Keys that each query keeps, [H, N]."""
    keys: int
    width: int
    """Of a head."""
    mask: Bits | None = None
    """Which they are, [H, N, S]."""
    candidates: Counts | None = None
    """Keys whose exact scores each query needed before it kept some of them, [H, N]; those kept where None."""
    real: int = 0
    """Tokens that are no padding; 0 for all. A machine that pads knows `queries` and `keys`, others skip the rest."""
    predictor: Predictor = field(default_factory=Predictor)
    bits: int = 16
    """Of queries, keys and values."""

    @classmethod
    def of(
        cls,
        mask: Any,
        *,
        head_width: int,
        predictor: Predictor | str = "none",
        candidates: Any = None,
        real: int = 0,
        bits: int = 16,
    ) -> AttentionTrace:
        """From a boolean mask [H, N, S] (true where a key is kept), or [B, H, N, S] whose first two are merged.

        Args:
            predictor: what chose the keys, or its name alone.
            candidates: keys whose exact scores each query needed, [H, N] or [B, H, N].
        Raises:
            UserError: if the mask has another type or shape.
        """
        found = np.asarray(mask)
        if found.dtype != np.bool_ or found.ndim not in (3, 4) or 0 in found.shape:
            what = f"a mask is boolean, [heads, queries, keys], not {found.dtype} of {list(found.shape)}."
            raise UserError(what, "AttentionTrace.of", "Add an axis, or compare with what is left out: `scores > t`.")
        found = found.reshape(-1, *found.shape[-2:])
        if not 0 <= real <= found.shape[2]:
            raise UserError(f"{real} tokens of {found.shape[2]} cannot be real.", "AttentionTrace.of")
        rows = found.sum(2, dtype=np.int64)
        asked = None if candidates is None else np.asarray(candidates, np.int64).reshape(rows.shape)
        named = Predictor(kind=predictor) if isinstance(predictor, str) else predictor
        return cls(rows=rows, keys=found.shape[2], width=head_width, mask=found, candidates=asked, real=real,
                   predictor=named, bits=bits)  # fmt: skip

    @classmethod
    def dense(
        cls, heads: int, queries: int, keys: int, width: int, causal: bool = False, bits: int = 16
    ) -> AttentionTrace:
        """Every query keeps every key, or those up to its own place, counted from the end."""
        row = np.arange(keys - queries + 1, keys + 1).clip(0) if causal else np.full(queries, keys)
        return cls(rows=np.tile(row.astype(np.int64), (heads, 1)), keys=keys, width=width, bits=bits)

    @classmethod
    def random(
        cls, heads: int, queries: int, keys: int, width: int, kept: float, seed: int = 0, predictor: str = "none"
    ) -> AttentionTrace:
        """As many keys for each query, drawn evenly; for figures that were published without masks."""
        count = min(max(round(kept * keys), 1), keys)
        drawn = np.random.default_rng(seed).random((heads, queries, keys), dtype=np.float32)
        mask = np.zeros(drawn.shape, bool)
        np.put_along_axis(mask, drawn.argpartition(count - 1, axis=2)[:, :, :count], True, axis=2)
        return cls.of(mask, head_width=width, predictor=predictor)

    @property
    def heads(self) -> int:
        """How many there are."""
        return self.rows.shape[0]

    @property
    def queries(self) -> int:
        """Of each head, with padding."""
        return self.rows.shape[1]

    @property
    def kept(self) -> int:
        """Scores that are needed, over all heads."""
        return int(self.rows.sum())

    @property
    def density(self) -> float:
        """Share of all scores that is needed."""
        return self.kept / (self.heads * self.queries * self.keys)

    @cached_property
    def columns(self) -> Counts:
        """Queries that keep each key, [H, S]."""
        if self.mask is not None:
            return self.mask.sum(1, dtype=np.int64)
        return (self.rows[:, :, None] > np.arange(self.keys)).sum(1, dtype=np.int64)

    def full(self) -> Bits:
        """The mask, [H, N, S], made where there is none."""
        return self.mask if self.mask is not None else self.rows[:, :, None] > np.arange(self.keys)

    def banks(self, count: int) -> Counts:
        """Kept keys of each query in each bank, [H, N, count]; key j lies in bank j modulo count."""
        padded = _padded(self.full(), count)
        return padded.reshape(*padded.shape[:2], -1, count).sum(2, dtype=np.int64)

    def segments(self, size: int) -> Counts:
        """Kept keys of each query in each run of neighboring keys, [H, N, ceil(S / size)]."""
        padded = _padded(self.full(), size)
        return padded.reshape(*padded.shape[:2], -1, size).sum(3, dtype=np.int64)

    def trimmed(self) -> AttentionTrace:
        """Without padding."""
        if self.real in (0, self.keys):
            return self
        n = min(self.real, self.queries)
        asked = None if self.candidates is None else self.candidates[:, :n]
        return AttentionTrace.of(self.full()[:, :n, : self.real], head_width=self.width, predictor=self.predictor,
                                 candidates=asked, bits=self.bits)  # fmt: skip

    def unmasked(self) -> AttentionTrace:
        """The same attention with every key kept."""
        return AttentionTrace.dense(self.heads, self.queries, self.keys, self.width, bits=self.bits)


def _padded(mask: Bits, size: int) -> Bits:
    """With so many more keys, none of them kept, that their number is a multiple."""
    return np.pad(mask, ((0, 0), (0, 0), (0, -mask.shape[2] % size)))


@dataclass(frozen=True, eq=False, kw_only=True)
class ProductTrace:
    """A product C = A B of two sparse matrices, by what a machine needs to know of it."""

    left: Counts
    """Entries of each column of A, [K]."""
    right: Counts
    """Entries of each row of B, [K]."""
    ways: Counts
    """Rows of B that each row of C is merged from, [M]: the entries of A's rows."""
    merged: Counts
    """Scalar products of each row of C, [M]."""
    nonzeros: int
    """Entries of C."""

    @classmethod
    def of(cls, a: tuple[Any, Any], b: tuple[Any, Any], columns: int) -> ProductTrace:
        """From two matrices in CSR.

        Args:
            a: row pointers and column indices of A; b: of B.
            columns: of B.
        Raises:
            UserError: if they do not fit.
        """
        (starts, inner), (b_starts, b_columns) = ([np.asarray(x, np.int64) for x in pair] for pair in (a, b))
        rows, right = len(starts) - 1, np.diff(b_starts)
        if inner.size and inner.max() >= len(right):
            raise UserError(f"A has a column {inner.max()}, and B only {len(right)} rows.", "ProductTrace.of")
        ways = np.diff(starts)
        row = np.repeat(np.arange(rows), ways)
        merged = np.bincount(row, right[inner], rows).astype(np.int64)
        # Every scalar product's place in B, in the order of A's entries: the start of its row of B and an offset in it.
        counts = right[inner]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        places = b_columns[np.repeat(b_starts[inner], counts) + offsets]
        nonzeros = len(np.unique(np.repeat(row, counts) * columns + places))
        return cls(left=np.bincount(inner, minlength=len(right)), right=right, ways=ways, merged=merged,
                   nonzeros=nonzeros)  # fmt: skip

    @property
    def products(self) -> int:
        """Scalar products."""
        return int(self.left @ self.right)

    @property
    def entries(self) -> tuple[int, int]:
        """Of A, and of B."""
        return int(self.left.sum()), int(self.right.sum())


@dataclass(frozen=True, kw_only=True)
class MatmulTrace:
    """A dense product [rows, inner] x [inner, columns]; of the second, 2 of every 4 numbers may be kept."""

    rows: int
    inner: int
    columns: int
    bits: int = 16
    two_four: bool = False
    count: int = 1
    """How often it is done."""

    @property
    def macs(self) -> int:
        """Multiplications of the dense product."""
        return self.rows * self.inner * self.columns * self.count

    def weight_bits(self) -> float:
        """Storage of the second matrix: of every 4 numbers 2, and 2 bits of index for each of them."""
        numbers = self.inner * self.columns * self.count
        return numbers / 4 * (2 * self.bits + 4) if self.two_four else numbers * self.bits


Trace = AttentionTrace | ProductTrace | MatmulTrace
"""What a machine may be asked to do."""
