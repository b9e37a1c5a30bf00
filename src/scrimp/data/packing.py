"""Conversations in windows: what is too long is shortened, what fits shares a window.

A conversation of n tokens takes n - 1 places: each token but the last is an input, each but the first a target. Packing
is best-fit decreasing: the longest first, each into the window that it leaves the least room in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Packed:
    """Windows of conversations, read from a stream of tokens."""

    tokens: np.ndarray = field(repr=False)
    """Of all conversations, [tokens]."""
    learn: np.ndarray = field(repr=False)
    """Whether a token is learned, uint8 [tokens]."""
    spans: np.ndarray = field(repr=False)
    """Where the conversations begin and end, int64 [conversations, 2]."""
    windows: list[list[int]] = field(repr=False)
    """The conversations of each window."""
    context: int
    pad: int
    """Token of the places that are left."""

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def count(self) -> int:
        """Tokens of all conversations."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    @property
    def filled(self) -> float:
        """Share of the places that are no padding."""
        return (self.count - len(self.spans)) / (len(self) * self.context)

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Windows as a task takes them: `tokens`, `targets` and `documents`, int64 [len(ids), context].

        Targets are -100 where nothing is learned. Padding is a document of its own, after all others.

        Raises:
            IndexError: if there is no such window.
        """
        shape = (len(ids), self.context)
        tokens, targets = np.full(shape, self.pad, dtype=np.int64), np.full(shape, -100, dtype=np.int64)
        documents = np.zeros(shape, dtype=np.int64)
        for row, i in enumerate(np.asarray(ids).tolist()):
            if not 0 <= i < len(self):
                raise IndexError(f"windows are 0 to {len(self) - 1}, not {i}")
            place = 0
            for number, which in enumerate(self.windows[i]):
                begin, end = self.spans[which]
                part, learned = self.tokens[begin:end].astype(np.int64), self.learn[begin + 1 : end]
                after = place + len(part) - 1
                tokens[row, place:after] = part[:-1]
                targets[row, place:after] = np.where(learned, part[1:], -100)
                documents[row, place:] = number
                place = after
            documents[row, place:] += 1
        return {"tokens": tokens, "targets": targets, "documents": documents}


def shortened(spans: np.ndarray, learn: np.ndarray, context: int, too_long: str) -> tuple[np.ndarray, int, int]:
    """Conversations that fit into the context.

    Args:
        spans: int64 [conversations, 2].
        learn: whether a token is learned, [tokens].
        too_long: what is cut off, `end` or `start`; or `drop`.
    Returns:
        Spans, how many were too long, and how many of the others are left out as nothing in them is learned.
    """
    begin, end = spans[:, 0].copy(), spans[:, 1].copy()
    long = end - begin > context + 1
    if too_long == "drop":
        begin, end = begin[~long], end[~long]
    elif too_long == "end":
        end = np.minimum(end, begin + context + 1)
    else:
        begin = np.maximum(begin, end - context - 1)
    # The first token of a span is no target.
    sums = np.concatenate([[0], np.cumsum(learn, dtype=np.int64)])
    heard = sums[end] > sums[np.minimum(begin + 1, end)]
    return np.stack([begin, end], 1)[heard], int(long.sum()), int((~heard).sum())


def packed(tokens: np.ndarray, learn: np.ndarray, spans: np.ndarray, context: int, pack: bool, pad: int) -> Packed:
    """Windows of conversations, several in each or one.

    Args:
        spans: int64 [conversations, 2], each of 2 to context + 1 tokens.
    """
    windows = together(spans[:, 1] - spans[:, 0] - 1, context) if pack else [[i] for i in range(len(spans))]
    return Packed(tokens, learn, spans, windows, context, pad)


def together(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Best-fit decreasing: lists of items whose lengths sum up to at most `room`.

    Args:
        lengths: int64 [items], each from 1 to `room`.
    """
    windows: list[list[int]] = []
    left: list[list[int]] = [[] for _ in range(room + 1)]
    """room left -> windows"""
    some = np.zeros(room + 1, dtype=bool)
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        best = length + int(np.argmax(some[length:]))
        if some[best]:
            chosen = left[best].pop()
            some[best] = bool(left[best])
        else:
            chosen, best = len(windows), room
            windows.append([])
        windows[chosen].append(item)
        left[best - length].append(chosen)
        some[best - length] = best - length > 0
    return windows
