"""What data sets of items have in common, which are not one stream of tokens: how they open, tokenize and split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from scrimp.data.cache import content_hash
from scrimp.data.tokenizer import END, Tokenizer, bytes_tokenizer, train_bpe
from scrimp.errors import UserError

BPE_SAMPLE: Final = 200_000_000
"""Characters that a BPE is trained on at most."""


@dataclass(frozen=True)
class Opened:
    """An opened data set of items, or its sizes."""

    train: Any
    validation: Any
    tokenizer: Any
    gives: tuple[str, ...]
    """What its items hold."""
    sizes: dict[str, int]
    meta: dict[str, Any] = field(default_factory=dict[str, Any])
    note: str = ""
    """What a plan should say of sizes that are estimates."""


@dataclass(frozen=True)
class Blanks:
    """Items of zeros, as many as a data set is thought to have."""

    count: int
    context: int
    shapes: Mapping[str, tuple[int, ...]]
    """Name of an array -> its shape without the batch; numbers are float32 where there are three axes, else int64."""

    def __len__(self) -> int:
        return self.count

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Items as a task takes them; lengths are the longest."""
        return {
            name: np.zeros((len(ids), *shape), dtype=np.float32 if len(shape) == 3 else np.int64)
            if shape
            else np.full(len(ids), self.context)
            for name, shape in self.shapes.items()
        }


def tokenizer_of(kind: str, vocab: int, end: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that a data set's settings ask for.

    Args:
        kind: bytes; bpe, trained on the texts; or the path of a tokenizer.json or of a folder that has one.
    Raises:
        UserError: if there is no such tokenizer.
    """
    if kind == "bytes":
        return bytes_tokenizer()
    if kind != "bpe":
        try:
            return Tokenizer.read(Path(kind).expanduser(), end)
        except UserError as error:
            raise UserError(error.what, f"data.tokenizer ({error.where})", error.fix) from None
    return train_bpe(_up_to(iter(texts), BPE_SAMPLE), vocab)


def _up_to(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def tokenizer_key(kind: str, vocab: int, end: str, root: Path) -> list[Any]:
    """What a tokenizer is a function of, beside the texts."""
    if kind in ("bytes", "bpe"):
        return [kind, vocab if kind == "bpe" else 0]
    given = Path(kind).expanduser()
    file = given / "tokenizer.json" if given.is_dir() else given
    return [content_hash([file], root) if file.is_file() else [str(file)], end]


def end_token(kind: str, end: str) -> str:
    """The end-of-text token of a tokenizer that was made of such settings."""
    return END if kind in ("bytes", "bpe") else end


def clipped(tokenizer: Tokenizer, texts: list[str], context: int) -> tuple[list[np.ndarray], int]:
    """Ids of texts with the end token after each, at most `context`; and how many texts were cut."""
    found = tokenizer.encode_batch(texts)
    cut = sum(len(ids) >= context for ids in found)
    return [np.array([*ids[: context - 1], tokenizer.end], dtype=np.int64) for ids in found], cut


def edge_of(marks: list[int], holdout: float) -> int:
    """Items whose fingerprint is below this are held out: about a share of them, and at least one on each side.

    Raises:
        UserError: if all items are alike.
    """
    edge, lowest, highest = round(holdout * 2**64), min(marks), max(marks)
    if lowest == highest:
        raise UserError(
            "there is only one item, or copies of one, and another must be held out.",
            "data.source",
            "Give two at least.",
        )
    return min(max(edge, lowest + 1), highest)


def distinct(named: Mapping[str, Any]) -> str:
    """A short name for settings and contents: equal exactly when they are."""
    return hashlib.blake2b(json.dumps(named, sort_keys=True).encode(), digest_size=16).hexdigest()


def take(texts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of so many of them, the last one shorter."""
    source = iter(texts)
    while batch := list(islice(source, size)):
        yield batch
