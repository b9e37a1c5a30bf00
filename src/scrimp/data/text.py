"""Text for language models: a corpus becomes two memory-mapped streams of tokens, built once and cached by content."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from scrimp.data.cache import cache_folder, content_hash, publish, read_meta
from scrimp.data.documents import documents, find, fingerprint, located
from scrimp.data.duplicates import unique
from scrimp.data.outline import Outline, Vocabulary, Windows, estimated
from scrimp.data.stream import Tokens
from scrimp.data.tokenizer import END, Tokenizer, bytes_tokenizer, train_bpe, with_mask
from scrimp.errors import UserError

FORMAT: Final = 2
"""Raised whenever the same settings would give other tokens, so that old caches are not used."""
BPE_SAMPLE: Final = 200_000_000
"""Characters that a BPE is trained on at most: every k-th training document, where k is the corpus' bytes over this."""
BATCH: Final = 1_000_000
"""Characters of the documents that are tokenized at once: what is held in memory."""
SPLITS: Final = ("train", "validation")
TRAINED: Final = ("bytes", "bpe")
"""Tokenizers that are made here and need no file."""


@dataclass(frozen=True)
class Data:
    """An opened corpus."""

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    meta: dict[str, Any]
    """tokens and documents of each split; vocab, dtype, end (id) and end_token (text); undecodable: sequences of bytes
    that were replaced; empty, duplicates: documents left out; files: sizes in bytes."""


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Text from files."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    source: str = "python-stdlib"
    """A file, a folder, a glob, or python-stdlib: the running interpreter's own library sources. A single text file is
    cut at blank lines into documents of about 4,096 characters; of several, each is a document."""
    field: str = "text"
    """Field of .jsonl and .parquet records that holds the text."""
    tokenizer: str = "bpe"
    """bytes; bpe, trained on the training documents; or the path of a tokenizer.json or of a folder that has one."""
    vocab: int = 8192
    """Size of the trained BPE."""
    end: str = ""
    """End-of-text token of a given tokenizer.json; found by itself when it has a usual name."""
    mask: bool = False
    """Give a tokenizer that is made here one more token, which masked language models hide others with."""
    context: int = 256
    """Tokens of a training window."""
    isolate: bool = False
    """Documents that share a window do not see each other, and positions begin anew with each. Every window then has a
    mask of its own, [context, context]."""
    holdout: float = 0.05
    """Share of the documents that is held out, by content, so that copies stay together; at least one."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """exact leaves out documents that were there before; near also those that are alike in most runs of five words."""
    cache: str = ""
    """Folder of built corpora; default $SCRIMP_CACHE or ~/.cache/scrimp."""

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout must be between 0 and 1, not {self.holdout}.")
        if self.context < 1:
            raise UserError(f"context must be at least 1, not {self.context}.")
        if self.tokenizer == "bpe" and self.vocab < 257:
            raise UserError(f"vocab must be at least 257 for a byte-level BPE, not {self.vocab}.")

    def open(self) -> Data:
        """The corpus, built if it is not in the cache.

        Raises:
            UserError: if there is no text, a record is faulty, or a split is too short for one window.
        """
        files = find(self.source)
        root = cache_folder(self.cache, "text")
        folder = root / _key(self, files, root)
        meta = read_meta(folder) or publish(folder, lambda partial: _build(self, files, partial, root))
        end = meta["end"] if self.isolate else None
        tokens = [Tokens(folder / f"{s}.bin", meta["dtype"], meta["tokens"][s], self.context, end) for s in SPLITS]
        for name, split in zip(SPLITS, tokens, strict=True):
            if len(split) < 1:
                what = f"the {name} split has {split.count} tokens, too few for a window of {self.context} + 1."
                raise UserError(what, "data.context", "Use a shorter context, more text, or another holdout.")
        tokenizer = Tokenizer.read(folder, meta["end_token"])
        if self.tokenizer == "bytes":
            tokenizer = replace(tokenizer, raw=True)
        return Data(tokens[0], tokens[1], tokenizer, meta)

    def anchored(self) -> TextData:
        """The same settings with absolute paths, which hold from any working directory."""
        given = self.tokenizer not in TRAINED
        cache = str(Path(self.cache).expanduser().absolute()) if self.cache else ""
        tokenizer = located(self.tokenizer) if given else self.tokenizer
        return replace(self, source=located(self.source), tokenizer=tokenizer, cache=cache)

    def found(self) -> bool:
        """Whether there is text at the source."""
        try:
            return bool(find(self.source))
        except UserError:
            return False

    def used(self, folder: Path, tokens: Mapping[str, int]) -> Outline:
        """What using a trained model needs of its corpus, without the corpus.

        Args:
            folder: has the tokenizer.json that the corpus was tokenized with.
            tokens: of each split.
        """
        counts = [max(1, (tokens.get(s, 0) - 1) // self.context) for s in SPLITS]
        train, validation = (Windows(count, self.context, self.isolate) for count in counts)
        end = END if self.tokenizer in TRAINED else self.end
        return Outline(train, validation, Tokenizer.read(folder, end))

    def outline(self) -> Data | Outline:
        """The corpus if it is built, else its sizes, without reading it."""
        files = find(self.source)
        root = cache_folder(self.cache, "text")
        if read_meta(root / _key(self, files, root)):
            return self.open()
        vocabulary = Vocabulary(self.vocab, mask=self.vocab - 1 if self.mask else None)
        if self.tokenizer != "bpe":
            tokenizer = _tokenizer(self, files, 0)
            vocabulary = Vocabulary(tokenizer.vocab, mask=tokenizer.mask)
        size = sum(path.stat().st_size for path in files)
        return estimated(size, self.tokenizer, vocabulary, self.context, self.holdout, self.isolate)


def _key(settings: TextData, files: list[Path], root: Path) -> str:
    """The name of the built corpus: a hash of all that its tokens are a function of."""
    named: dict[str, Any] = {"tokenizer": settings.tokenizer, "holdout": settings.holdout, "field": settings.field}
    if settings.tokenizer == "bpe":
        named["vocab"] = settings.vocab
    if settings.mask and settings.tokenizer in TRAINED:
        named["mask"] = True
    if settings.duplicates != "keep":
        named["duplicates"] = settings.duplicates
    if settings.tokenizer not in TRAINED:
        given = Path(settings.tokenizer).expanduser()
        file = given / "tokenizer.json" if given.is_dir() else given
        named |= {"tokenizer": content_hash([file], root) if file.is_file() else [str(file)], "end": settings.end}
    contents = list(zip([path.suffix.lower() for path in files], content_hash(files, root), strict=True))
    text = json.dumps([FORMAT, named, contents], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _build(settings: TextData, files: list[Path], partial: Path, root: Path) -> dict[str, Any]:
    """Fill a folder with the tokens and the tokenizer; returns what to say about them."""
    before = content_hash(files, root)
    edge = round(settings.holdout * 2**64)
    tokenizer = _tokenizer(settings, files, edge)
    meta, (lowest, highest) = _write(settings, files, tokenizer, edge, partial)
    if 0 in meta["documents"].values():
        # Few documents, and chance put all on one side: move the nearest one over, and begin again.
        if lowest == highest:
            fix = "Give at least two, or a single text of more than 16,000 characters, which is cut."
            raise UserError("there is only one document, and one more must be held out.", "data.source", fix)
        edge = lowest + 1 if meta["documents"]["validation"] == 0 else highest
        tokenizer = _tokenizer(settings, files, edge)
        meta, _ = _write(settings, files, tokenizer, edge, partial)
    if content_hash(files, root) != before:
        raise UserError("the files changed while they were read.", "data.source", "Start again when they are ready.")
    tokenizer.save(partial)
    return meta


def _tokenizer(settings: TextData, files: list[Path], edge: int) -> Tokenizer:
    if settings.tokenizer not in TRAINED:
        try:
            return Tokenizer.read(Path(settings.tokenizer).expanduser(), settings.end)
        except UserError as error:
            raise UserError(error.what, f"data.tokenizer ({error.where})", error.fix) from None
    if settings.tokenizer == "bytes":
        return with_mask(bytes_tokenizer()) if settings.mask else bytes_tokenizer()
    every = -(-sum(path.stat().st_size for path in files) // BPE_SAMPLE)
    texts = _documents(settings, files, Counter(), "reading for the tokenizer")
    training = (text for text in texts if fingerprint(text) >= edge)
    texts = _up_to(islice(training, 0, None, max(every, 1)), BPE_SAMPLE)
    return with_mask(train_bpe(texts, settings.vocab - 1)) if settings.mask else train_bpe(texts, settings.vocab)


def _documents(settings: TextData, files: list[Path], tally: Counter[str], what: str) -> Iterator[str]:
    """The documents, without those that are left out as duplicates, which are counted."""
    texts = _watched(documents(files, settings.field, tally), files, what)
    return unique(texts, settings.duplicates, lambda: tally.update(["duplicates"]))


def _up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _write(
    settings: TextData, files: list[Path], tokenizer: Tokenizer, edge: int, partial: Path
) -> tuple[dict[str, Any], tuple[int, int]]:
    """One pass over the documents. A document whose fingerprint is below `edge` is held out.

    Returns:
        What to say about the files, and the lowest and the highest fingerprint.
    """
    dtype = "uint16" if tokenizer.vocab <= 2**16 else "uint32"
    tokens, counts, tally = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0), Counter[str]()
    lowest, highest = 2**64, -1
    texts = _documents(settings, files, tally, "tokenizing")
    with (partial / "train.bin").open("wb") as train, (partial / "validation.bin").open("wb") as validation:
        outputs = {"train": train, "validation": validation}
        for batch in _batches(texts, BATCH):
            for text, ids in zip(batch, tokenizer.encode_documents(batch, dtype), strict=True):
                mark = fingerprint(text)
                split = "validation" if mark < edge else "train"
                outputs[split].write(ids.data)
                tokens[split] += len(ids)
                counts[split] += 1
                lowest, highest = min(lowest, mark), max(highest, mark)
    if highest < 0:
        raise UserError(f"`{settings.source}` has only empty documents.", "data.source", "Give some with text.")
    meta = {"tokens": tokens, "documents": counts, "vocab": tokenizer.vocab, "dtype": dtype, "end": tokenizer.end,
            "end_token": tokenizer.inner.id_to_token(tokenizer.end),
            **{name: tally[name] for name in ("undecodable", "empty", "duplicates")}}  # fmt: skip
    return meta, (lowest, highest)


def _batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Lists of documents of about `characters` together."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _watched(texts: Iterator[str], files: list[Path], title: str) -> Iterator[str]:
    """The same documents, with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        yield from texts
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=sum(path.stat().st_size for path in files))
        for text in texts:
            yield text
            bar.advance(task, len(text.encode()))
