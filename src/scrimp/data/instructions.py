"""Instructions for language models: conversations of which only the assistant's answers are learned.

A table becomes one memory-mapped stream of tokens with a mark on each token of an answer, built once and cached by
content. What depends on the context (what is too long, what shares a window) is decided when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import numpy as np

from scrimp.data.cache import read_meta
from scrimp.data.chat import ChatTokenizer, open_tokenizer
from scrimp.data.conversations import Columns, Store
from scrimp.data.documents import located
from scrimp.data.outline import Outline, Vocabulary, Windows
from scrimp.data.packing import Packed, packed, shortened
from scrimp.data.tables import find
from scrimp.errors import UserError

SPLITS: Final = ("train", "validation")


@dataclass(frozen=True)
class Data:
    """Opened conversations."""

    train: Packed
    validation: Packed
    tokenizer: ChatTokenizer
    meta: dict[str, Any]
    """key; tokens, documents (conversations) and windows of each split; vocab, dtype, end (id) and end_token (text);
    skipped: rows left out, too_long: conversations that exceeded the context, silent: those without an answer left."""
    gives: tuple[str, ...] = ("tokens", "targets", "documents")


@dataclass(frozen=True, kw_only=True)
class InstructionData:
    """Conversations from tables, of which the answers are learned."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    source: str
    """A .jsonl, .csv, .parquet or .arrow file, a folder or a glob of them, or a folder saved by Hugging Face's
    `datasets`; of one with several splits, `train`."""
    validation: str = ""
    """A source of its own for held-out conversations; a share of `source` when empty."""
    prompt: str = "prompt"
    """Column of the request; several, joined by an empty line, as `instruction|input`."""
    response: str = "response"
    """Column of the answer."""
    messages: str = "messages"
    """Column of whole conversations, lists of `{role, content}`; used where a row has it."""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json or of a folder that has one, such as the model's."""
    template: str = ""
    """How conversations become text: the tokenizer folder's own chat template when empty, if there is one; `plain`;
    or the path of a Jinja file."""
    end: str = ""
    """End-of-text token of a given tokenizer.json; found by itself when its folder says it, or it has a usual name."""
    context: int = 512
    """Tokens of a training window."""
    pack: bool = True
    """Several conversations share a window, without seeing each other; else each has its own, padded."""
    too_long: Literal["end", "start", "drop"] = "end"
    """What is cut off a conversation that exceeds the context: its end, its start, or all of it."""
    holdout: float = 0.05
    """Share of the conversations that is held out, by what comes before the first answer; at least one."""
    skip: float = 0.01
    """Share of rows that may be faulty; they are left out and told."""
    cache: str = ""
    """Folder of built tables; default $SCRIMP_CACHE or ~/.cache/scrimp."""

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("source is empty.", "", "Name a table of instructions.")
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout must be between 0 and 1, not {self.holdout}.")
        if not 0 <= self.skip < 1:
            raise UserError(f"skip must be at least 0 and less than 1, not {self.skip}.")
        if self.context < 1:
            raise UserError(f"context must be at least 1, not {self.context}.")

    def open(self) -> Data:
        """The conversations, built if they are not in the cache.

        Raises:
            UserError: if there is no table, too many rows are faulty, or a split has nothing to learn.
        """
        tokenizer = open_tokenizer(self.tokenizer, self.end, self.template)
        stores = {
            name: Store.of(self._columns(), source, tokenizer, self.cache) for name, source in self._sources().items()
        }
        chosen = split(stores, self.holdout)
        kept: dict[str, Packed] = {}
        long = silent = 0
        for name, (store, ids) in chosen.items():
            spans, cut, mute = shortened(store.spans[ids], store.learn, self.context, self.too_long)
            long, silent = long + cut, silent + mute
            if not len(spans):
                fix = "Raise `data.context`, or choose another `data.too_long`."
                raise UserError(f"no conversation of the {name} split has an answer within the context.", "data", fix)
            kept[name] = packed(store.tokens, store.learn, spans, self.context, self.pack, tokenizer.end)
        meta = self._meta(stores, kept, tokenizer) | {"too_long": long, "silent": silent}
        _tell(self, stores, meta)
        return Data(kept["train"], kept["validation"], tokenizer, meta)

    def anchored(self) -> InstructionData:
        """The same settings with absolute paths, which hold from any working directory."""
        places = {name: getattr(self, name) for name in ("source", "validation", "tokenizer", "template")}
        absolute = {name: located(place) for name, place in places.items() if place not in ("", "bytes", "plain")}
        cache = str(Path(self.cache).expanduser().absolute()) if self.cache else ""
        return replace(self, **absolute, cache=cache)

    def found(self) -> bool:
        """Whether the tables are there."""
        try:
            return all(find(source) for source in self._sources().values())
        except UserError:
            return False

    def used(self, folder: Path, tokens: Mapping[str, int]) -> Outline:
        """What using a trained model needs of its data, without the tables.

        Args:
            folder: has the tokenizer.json, and the chat template if there was one.
            tokens: of each split.
        """
        train, validation = (Windows(max(1, tokens.get(s, 0) // self.context), self.context, True) for s in SPLITS)
        return Outline(train, validation, open_tokenizer(str(folder)))

    def outline(self) -> Data | Outline:
        """The conversations if they are built, else their sizes, without reading them."""
        tokenizer = open_tokenizer(self.tokenizer, self.end, self.template)
        places = [Store.place(self._columns(), source, tokenizer, self.cache)[0] for source in self._sources().values()]
        if all(read_meta(place) for place in places):
            return self.open()
        size = sum(path.stat().st_size for source in self._sources().values() for path in find(source))
        windows = max(2, int(size / (1 if self.tokenizer == "bytes" else 4) / self.context))
        held = max(1, int(windows * self.holdout))
        note = f"The conversations are not built yet: {windows:,} windows are an estimate from {size:,} bytes of files."
        train, validation = (Windows(count, self.context, True) for count in (windows - held, held))
        return Outline(train, validation, Vocabulary(tokenizer.vocab, tokenizer.end), note)

    def _sources(self) -> dict[str, str]:
        return {"train": self.source} | ({"validation": self.validation} if self.validation else {})

    def _columns(self) -> Columns:
        return Columns(self.prompt, self.response, self.messages, self.skip)

    def _meta(self, stores: dict[str, Store], kept: dict[str, Packed], tokenizer: ChatTokenizer) -> dict[str, Any]:
        chosen = [self.context, self.pack, self.too_long, self.holdout, *(store.path.name for store in stores.values())]
        key = hashlib.blake2b(json.dumps(chosen).encode(), digest_size=16).hexdigest()
        return {
            "key": key, "tokens": {name: part.count for name, part in kept.items()},
            "documents": {name: len(part.spans) for name, part in kept.items()},
            "windows": {name: len(part) for name, part in kept.items()}, "vocab": tokenizer.vocab,
            "dtype": next(iter(stores.values())).dtype, "end": tokenizer.end, "end_token": tokenizer.chat.end,
            "skipped": sum(store.skipped for store in stores.values()),
        }  # fmt: skip


def split(stores: Mapping[str, Store], holdout: float) -> dict[str, tuple[Store, np.ndarray]]:
    """Which conversations are in which split: a file's own, or by fingerprint, so that copies stay together.

    Raises:
        UserError: if all have one fingerprint.
    """
    train = stores["train"]
    if "validation" in stores:
        return {name: (store, np.arange(len(store.marks))) for name, store in stores.items()}
    marks = train.marks
    low, high = marks.min(), marks.max()
    if low == high:
        fix = "Give another table as `data.validation`."
        raise UserError("all conversations begin alike, so that none can be held out.", "data.source", fix)
    edge = np.uint64(min(round(holdout * 2**64), 2**64 - 1))
    edge = min(max(edge, low + np.uint64(1)), high)
    held = marks < edge
    return {"train": (train, np.flatnonzero(~held)), "validation": (train, np.flatnonzero(held))}


def _tell(settings: InstructionData, stores: Mapping[str, Store], meta: Mapping[str, Any]) -> None:
    """Say on stderr what was left out or cut."""
    lines = [store.told for store in stores.values() if store.told]
    done = {"end": "their ends were cut", "start": "their starts were cut", "drop": "they were left out"}
    if meta["too_long"]:
        long = f"{meta['too_long']:,} conversations exceed the context of {settings.context}"
        lines.append(f"{long}: {done[settings.too_long]}.")
    if meta["silent"]:
        lines.append(f"{meta['silent']:,} conversations have no answer within the context and were left out.")
    for line in lines:
        sys.stderr.write(f"scrimp: data: {line}\n")
