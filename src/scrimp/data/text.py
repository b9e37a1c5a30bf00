"""Text for language models: a corpus becomes two memory-mapped streams of tokens, built once and cached by content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from scrimp.data.documents import documents, find, held_out
from scrimp.data.stream import Tokens
from scrimp.data.tokenizer import Tokenizer, bytes_tokenizer, train_bpe
from scrimp.errors import UserError

FORMAT: Final = 1
"""Raised whenever the same settings would give other tokens, so that old caches are not used."""
BPE_CHARACTERS: Final = 200_000_000
"""A BPE is trained on the first training documents up to this many characters."""
SPLITS: Final = ("train", "validation")


@dataclass(frozen=True)
class Data:
    """An opened corpus."""

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    meta: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Text from files."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    source: str = "python-stdlib"
    """A file, a folder, a glob, or python-stdlib: the running interpreter's own library sources."""
    field: str = "text"
    """Field of .jsonl and .parquet records that holds the text."""
    tokenizer: str = "bpe"
    """bytes; bpe, trained on the corpus; or the path of a tokenizer.json or of a folder that has one."""
    vocab: int = 8192
    """Size of the trained BPE."""
    end: str = ""
    """End-of-text token of a given tokenizer.json; found by itself when it has a usual name."""
    context: int = 256
    """Tokens of a training window."""
    holdout: float = 0.05
    """Share of the documents that is held out, by content."""
    cache: str = ""
    """Folder of built corpora; default $SCRIMP_CACHE or ~/.cache/scrimp."""

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout must be between 0 and 1, not {self.holdout}.")
        if self.context < 1:
            raise UserError(f"context must be at least 1, not {self.context}.")

    def open(self) -> Data:
        """The corpus, built if it is not in the cache.

        Raises:
            UserError: if there is no text, a record is faulty, or a split is too short for one window.
        """
        files = find(self.source)
        root = Path(self.cache or os.environ.get("SCRIMP_CACHE", "~/.cache/scrimp")).expanduser() / "text"
        root.mkdir(parents=True, exist_ok=True)
        folder = root / self._key(files, root)
        if not _complete(folder):
            _build(self, files, folder)
        meta = json.loads((folder / "meta.json").read_text())
        tokens = [Tokens(folder / f"{s}.bin", meta["dtype"], meta["tokens"][s], self.context) for s in SPLITS]
        for name, split in zip(SPLITS, tokens, strict=True):
            if len(split) < 1:
                what = f"the {name} split has {split.count} tokens, too few for a window of {self.context}."
                raise UserError(what, "data.context", "Use a shorter context, more text, or another holdout.")
        return Data(tokens[0], tokens[1], Tokenizer.read(folder, meta["end_token"]), meta)

    def _key(self, files: list[Path], root: Path) -> str:
        digest = hashlib.blake2b(digest_size=16)
        settings = {"field": self.field, "tokenizer": self.tokenizer, "end": self.end, "holdout": self.holdout}
        if self.tokenizer == "bpe":
            settings["vocab"] = self.vocab
        elif self.tokenizer != "bytes":
            given = Path(self.tokenizer)
            file = given / "tokenizer.json" if given.is_dir() else given
            settings["tokenizer"] = content_hash([file], root)[0] if file.is_file() else self.tokenizer
        digest.update(json.dumps([FORMAT, settings, content_hash(files, root)], sort_keys=True).encode())
        return digest.hexdigest()


def content_hash(files: list[Path], root: Path) -> list[str]:
    """A hash of each file's content, remembered by path, size and time of change so that a second start is fast."""
    memory = root / "hashes.json"
    try:
        known: dict[str, str] = json.loads(memory.read_text())
    except (OSError, json.JSONDecodeError):
        known = {}
    found: list[str] = []
    added = False
    for path in files:
        stat = path.stat()
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in known:
            with path.open("rb") as file:
                known[key] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            added = True
        found.append(known[key])
    if added:
        with tempfile.NamedTemporaryFile("w", dir=root, delete=False) as file:
            json.dump(known, file)
        os.replace(file.name, memory)
    return found


def _complete(folder: Path) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        width = np.dtype(meta["dtype"]).itemsize
        return all((folder / f"{s}.bin").stat().st_size == meta["tokens"][s] * width for s in SPLITS)
    except (OSError, json.JSONDecodeError, KeyError):
        return False


def _build(settings: TextData, files: list[Path], folder: Path) -> None:
    """Build in a temporary folder and rename: a half-built corpus is never seen, and two builders do no harm."""
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        tokenizer = _tokenizer(settings, files)
        meta = _write(settings, files, tokenizer, partial)
        tokenizer.save(partial)
        (partial / "meta.json").write_text(json.dumps(asdict(settings) | meta, indent=1))
        if folder.exists() and not _complete(folder):
            shutil.rmtree(folder)
        try:
            partial.rename(folder)
        except OSError:
            if not _complete(folder):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tokenizer(settings: TextData, files: list[Path]) -> Tokenizer:
    if settings.tokenizer == "bytes":
        return bytes_tokenizer()
    if settings.tokenizer != "bpe":
        return Tokenizer.read(Path(settings.tokenizer), settings.end)
    texts = (t for t in documents(files, settings.field, {}) if not held_out(t, settings.holdout))
    return train_bpe(_first(texts, BPE_CHARACTERS), settings.vocab)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _write(settings: TextData, files: list[Path], tokenizer: Tokenizer, partial: Path) -> dict[str, Any]:
    dtype = "uint16" if tokenizer.vocab <= 2**16 else "uint32"
    tokens, counts, bad = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0), dict[str, int]()
    outputs = {split: (partial / f"{split}.bin").open("wb") for split in SPLITS}
    try:
        for batch in _batches(_watched(documents(files, settings.field, bad), files)):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                split = SPLITS[held_out(text, settings.holdout)]
                np.asarray([*ids, tokenizer.end], dtype=dtype).tofile(outputs[split])
                tokens[split] += len(ids) + 1
                counts[split] += 1
    finally:
        for file in outputs.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
    end = tokenizer.inner.id_to_token(tokenizer.end)
    return {"dtype": dtype, "tokens": tokens, "documents": counts, "end_token": end,
            "vocab": tokenizer.vocab, "undecodable": bad.get("undecodable", 0)}  # fmt: skip


def _batches(texts: Iterable[str], characters: int = 4_000_000) -> Iterator[list[str]]:
    """Lists of documents of about `characters` together: what is held in memory at once."""
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


def _watched(texts: Iterator[str], files: list[Path]) -> Iterator[str]:
    """The same documents, with a progress bar on a terminal."""
    if not sys.stderr.isatty():
        yield from texts
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizing", total=sum(path.stat().st_size for path in files))
        for text in texts:
            yield text
            bar.advance(task, len(text.encode("utf-8", "replace")))
