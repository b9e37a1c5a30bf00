"""Texts of different lengths on disk, read as batches as wide as their longest, rounded up to a multiple of 8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

MULTIPLE: Final = 8
"""To which widths are rounded up, so that there are few different ones."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """One split of labelled texts on disk, mapped read-only at the first use."""

    folder: Path
    split: str
    count: int
    context: int
    pad: int
    """Id that fills up; which one does not matter, since it is not attended."""
    streams: tuple[str, ...] = ("tokens",)
    """tokens, and pair_tokens where the two texts of a pair stay apart."""
    segments: bool = False
    """Whether a pair is one sequence, whose two segments are told apart."""
    target: str = ""
    """labels, scores, or nothing."""
    stretch: int = 1
    """Training batches that are sorted by length among each other."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each item, of both texts where they are apart: int64, [items]."""
        return np.sum([np.diff(self._arrays[f"{name}_starts"]) for name in self.streams], axis=0)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        found = self.folder.glob(f"{self.split}.*.npy")
        return {path.name.split(".")[1]: np.load(path, mmap_mode="r", allow_pickle=False) for path in found}

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """`tokens` int64 and `attended` bool, [B, T]; `segments` int64 [B, T], or `pair_tokens` and `pair_attended`
        [B, S]; `labels` int64 or `scores` float32, [B].

        Raises:
            IndexError: if there is no such item.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.count:
            raise IndexError(f"items are 0 to {self.count - 1}, not {ids.min()} to {ids.max()}")
        items: dict[str, np.ndarray] = {}
        for name in self.streams:
            places, attended = self._places(name, ids)
            items[name] = np.where(attended, self._arrays[name][places], self.pad).astype(np.int64)
            items[name.replace("tokens", "attended")] = attended
            if self.segments:
                items["segments"] = np.where(attended, self._arrays["segments"][places], 0).astype(np.int64)
        if self.target:
            items[self.target] = np.array(self._arrays[self.target][ids])
        return items

    def _places(self, name: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the tokens of items are in the stream, and which of them are theirs: [B, T] each."""
        starts = self._arrays[f"{name}_starts"]
        first, length = starts[ids], starts[ids + 1] - starts[ids]
        width = min(self.context, -(-int(length.max(initial=1)) // MULTIPLE) * MULTIPLE)
        steps = np.arange(width)
        attended = steps < length[:, None]
        return np.where(attended, first[:, None] + steps, 0), attended


def save(folder: Path, split: str, name: str, sequences: Sequence[np.ndarray], dtype: str) -> None:
    """Write sequences behind each other, and where each begins."""
    starts = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    whole = np.concatenate([*sequences, np.zeros(0)]).astype(dtype)
    np.save(folder / f"{split}.{name}.npy", whole, allow_pickle=False)
    np.save(folder / f"{split}.{name}_starts.npy", starts, allow_pickle=False)


@dataclass(frozen=True)
class Longest:
    """As many items as a split has, all as long as its longest: what a plan must have room for."""

    like: Texts
    length: int
    """Tokens of the longest item."""

    @property
    def context(self) -> int:
        """Most tokens of an item."""
        return self.like.context

    def __len__(self) -> int:
        return len(self.like)

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Items of zeros, all attended."""
        width = min(self.context, -(-self.length // MULTIPLE) * MULTIPLE)
        shape = (len(ids), width)
        items: dict[str, Any] = {}
        for name in self.like.streams:
            items[name], items[name.replace("tokens", "attended")] = np.zeros(shape, np.int64), np.ones(shape, bool)
        if self.like.segments:
            items["segments"] = np.zeros(shape, np.int64)
        if self.like.target:
            items[self.like.target] = np.zeros(len(ids), np.int64 if self.like.target == "labels" else np.float32)
        return items
