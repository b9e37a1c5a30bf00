"""Pairs of texts, such as sentences and their translations: built once, cached by content.

Each side is tokenized by one tokenizer and ends with its end token; one that is longer than the context is cut. Pairs
of one source text are held out together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from scrimp.data.cache import cache_folder, content_hash, publish, read_meta
from scrimp.data.documents import fingerprint, located
from scrimp.data.faults import Faults
from scrimp.data.items import Blanks, Opened, clipped, distinct, edge_of, end_token, take, tokenizer_key, tokenizer_of
from scrimp.data.padding import padded
from scrimp.data.tables import find, rows, text_of
from scrimp.data.text import TRAINED
from scrimp.data.tokenizer import Tokenizer, bytes_tokenizer
from scrimp.errors import UserError

FORMAT: Final = 2
"""Raised whenever the same settings would give other tokens, so that old caches are not used."""
SPLITS: Final = ("train", "validation")
GIVES: Final = ("source", "target")
AT_ONCE: Final = 1000
"""Pairs that are tokenized at once."""
PAIR_BYTES: Final = 150
"""Of a usual pair, for plans of what is not built yet."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of one split on disk, mapped at the first use."""

    folder: Path
    name: str
    dtype: str
    """uint16 or uint32."""
    count: int
    context: int
    """Tokens of the longest side, its end among them."""

    def __len__(self) -> int:
        return self.count

    @cached_property
    def _places(self) -> np.ndarray:
        """First token, length of the source, length of the target: int64 [pairs, 3]."""
        return np.load(self.folder / f"{self.name}.npy", mmap_mode="r")

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.memmap(self.folder / f"{self.name}.bin", dtype=self.dtype, mode="r")

    def read(self, ids: np.ndarray, sample: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """`source` and `target`, int64 [len(ids), longest rounded up to 8], each with `_length`, int64 [len(ids)]."""
        places = self._places[np.asarray(ids)]
        sources = [self._tokens[a : a + s] for a, s, _ in places]
        targets = [self._tokens[a + s : a + s + t] for a, s, t in places]
        (source, read), (target, written) = padded(sources, self.context), padded(targets, self.context)
        return {"source": source, "source_length": read, "target": target, "target_length": written}


@dataclass(frozen=True, kw_only=True)
class ParallelData:
    """Pairs of texts from .jsonl, .csv, .tsv, .parquet or .arrow files, or from a folder saved by `datasets`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    source: str
    """A file, a folder, or a glob."""
    validation: str = ""
    """A file, a folder or a glob of pairs that are held out, instead of a share of the source."""
    read: str = "source"
    """Column with the text that is read, such as `source`, or `translation.en` in a column of records."""
    write: str = "target"
    """Column with the text that is to be written."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a .csv or .tsv that has no line with them."""
    tokenizer: str = "bpe"
    """bytes; bpe, trained on both sides of the training pairs; or the path of a tokenizer.json or of its folder."""
    vocab: int = 8192
    """Size of the trained BPE."""
    end: str = ""
    """End-of-text token of a given tokenizer.json; found by itself when it has a usual name."""
    context: int = 128
    """Tokens of a side at most, its end among them; longer ones are cut."""
    holdout: float = 0.05
    """Share of the pairs that is held out, by the text that is read; at least one."""
    skip: float = 0.01
    """Share of faulty pairs that are left out; with more, nothing is built."""
    cache: str = ""
    """Folder of built data; default $SCRIMP_CACHE or ~/.cache/scrimp."""

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout must be between 0 and 1, not {self.holdout}.")
        if not 0 <= self.skip < 1:
            raise UserError(f"skip must be at least 0 and less than 1, not {self.skip}.")
        if self.context < 2:
            raise UserError(f"context must be at least 2, not {self.context}.")
        if self.tokenizer == "bpe" and self.vocab < 257:
            raise UserError(f"vocab must be at least 257 for a byte-level BPE, not {self.vocab}.")

    def open(self) -> Opened:
        """The pairs, built if they are not in the cache.

        Raises:
            UserError: if there are none, or too many are faulty.
        """
        folder = self._folder()
        meta = read_meta(folder) or publish(folder, lambda partial: _build(self, partial))
        splits = [Pairs(folder, name, meta["dtype"], meta["documents"][name], self.context) for name in SPLITS]
        raw = self.tokenizer == "bytes"
        tokenizer = bytes_tokenizer() if raw else Tokenizer.read(folder, meta["end_token"])
        sizes = {"vocab": tokenizer.vocab, "context": self.context}
        told = Faults.kept(self.skip, meta["skipped"]).told()
        return Opened(splits[0], splits[1], tokenizer, GIVES, sizes, meta | {"key": folder.name}, told)

    def anchored(self) -> ParallelData:
        """The same settings with absolute paths, which hold from any working directory."""
        places = {name: located(getattr(self, name)) for name in ("source", "validation") if getattr(self, name)}
        if self.tokenizer not in TRAINED:
            places["tokenizer"] = located(self.tokenizer)
        if self.cache:
            places["cache"] = str(Path(self.cache).expanduser().absolute())
        return replace(self, **places)

    def found(self) -> bool:
        """Whether there are pairs at the source."""
        try:
            return bool(self.files())
        except UserError:
            return False

    def used(self, folder: Path, tokens: dict[str, int]) -> Opened:
        """What using a trained model needs of its data, without the data.

        Args:
            folder: has the tokenizer.json that the pairs were tokenized with.
            tokens: of each split.
        """
        return self._blank(Tokenizer.read(folder, end_token(self.tokenizer, self.end)), 1, "")

    def outline(self) -> Opened:
        """The pairs if they are built, else their sizes, without reading them."""
        if read_meta(self._folder()):
            return self.open()
        made = "bytes" if self.tokenizer == "bpe" else self.tokenizer
        tokenizer = tokenizer_of(made, self.vocab, self.end, ())
        count = max(2, sum(path.stat().st_size for path in self.files()[0]) // PAIR_BYTES)
        note = f"The data is not built yet: {count:,} pairs of {self.context} tokens a side are an estimate."
        return self._blank(tokenizer, count, note)

    def files(self) -> tuple[list[Path], list[Path]]:
        """Files of the source, and of what is held out.

        Raises:
            UserError: if there are none.
        """
        return find(self.source), find(self.validation, "data.validation") if self.validation else []

    def _blank(self, tokenizer: Tokenizer, count: int, note: str) -> Opened:
        side = (self.context,)
        shapes = {"source": side, "target": side, "source_length": (), "target_length": ()}
        held = max(1, int(count * self.holdout))
        splits = [Blanks(n, self.context, shapes) for n in (max(1, count - held), held)]
        sizes = {"vocab": self.vocab if note and self.tokenizer == "bpe" else tokenizer.vocab, "context": self.context}
        return Opened(splits[0], splits[1], tokenizer, GIVES, sizes, note=note)

    def _folder(self) -> Path:
        """Where the built pairs are: named by all that they are a function of."""
        root = cache_folder(self.cache, "parallel")
        contents = [[(path.suffix, value) for path, value in zip(files, content_hash(files, root), strict=True)]
                    for files in self.files()]  # fmt: skip
        kept = {name: getattr(self, name) for name in ("read", "write", "columns", "context", "holdout", "skip")}
        tokenizer = tokenizer_key(self.tokenizer, self.vocab, self.end, root)
        return root / distinct(kept | {"format": FORMAT, "tokenizer": tokenizer, "contents": contents})


def _pairs(settings: ParallelData, files: list[Path], faults: Faults) -> Iterator[tuple[str, str]]:
    """(source, target) of every row that has both."""
    wanted = (settings.read, settings.write)
    for row in (row for path in files for row in rows(path, wanted, settings.columns)):
        faults.total += 1
        try:
            if row.fault:
                raise ValueError(row.fault)
            yield text_of(row.values, settings.read), text_of(row.values, settings.write)
        except ValueError as error:
            faults.add(row.where, str(error))


def _split(settings: ParallelData, edge: int) -> Iterator[tuple[str, str, str]]:
    """(split, source, target) of every pair."""
    train, held = settings.files()
    for source, target in _pairs(settings, train, Faults(1.0)):
        yield "validation" if not held and fingerprint(source) < edge else "train", source, target
    for source, target in _pairs(settings, held, Faults(1.0)):
        yield "validation", source, target


def _build(settings: ParallelData, partial: Path) -> dict[str, Any]:
    """Fill a folder with the pairs and the tokenizer; returns what to say about them."""
    faults = Faults(settings.skip)
    train, held = settings.files()
    marks = [fingerprint(source) for source, _ in _pairs(settings, train, faults)]
    faults.check()
    if held:
        more = Faults(settings.skip, "data.validation")
        for _ in _pairs(settings, held, more):
            pass
        more.check()
    edge = 0 if held else edge_of(marks, settings.holdout)
    texts = (text for split, *sides in _split(settings, edge) if split == "train" for text in sides)
    tokenizer = tokenizer_of(settings.tokenizer, settings.vocab, settings.end, texts)
    meta = _write(settings, tokenizer, edge, partial)
    tokenizer.save(partial)
    return meta | {"skipped": faults.meta()}


def _write(settings: ParallelData, tokenizer: Tokenizer, edge: int, partial: Path) -> dict[str, Any]:
    dtype = "uint16" if tokenizer.vocab <= 2**16 else "uint32"
    places: dict[str, list[tuple[int, int, int]]] = {split: [] for split in SPLITS}
    tokens, cut = dict.fromkeys(SPLITS, 0), 0
    with (partial / "train.bin").open("wb") as train, (partial / "validation.bin").open("wb") as validation:
        outputs = {"train": train, "validation": validation}
        for batch in take(_split(settings, edge), AT_ONCE):
            sources, more = clipped(tokenizer, [source for _, source, _ in batch], settings.context)
            targets, again = clipped(tokenizer, [target for _, _, target in batch], settings.context)
            cut += more + again
            for (split, *_), source, target in zip(batch, sources, targets, strict=True):
                outputs[split].write(np.concatenate([source, target]).astype(dtype).data)
                places[split].append((tokens[split], len(source), len(target)))
                tokens[split] += len(source) + len(target)
    for split in SPLITS:
        np.save(partial / f"{split}.npy", np.array(places[split], dtype=np.int64).reshape(-1, 3))
    return {"tokens": tokens, "documents": {split: len(places[split]) for split in SPLITS}, "cut": cut,
            "vocab": tokenizer.vocab, "dtype": dtype, "end": tokenizer.end,
            "end_token": tokenizer.inner.id_to_token(tokenizer.end)}  # fmt: skip
