"""A table of conversations becomes tokens with a mark on each that is of an answer, cached by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from scrimp.data.cache import cache_folder, content_hash, publish, read_meta
from scrimp.data.chat import CannotRenderError, ChatTokenizer, Messages
from scrimp.data.documents import fingerprint
from scrimp.data.faults import Faults
from scrimp.data.tables import find, rows
from scrimp.errors import did_you_mean

FORMAT: Final = 2
"""Raised whenever the same settings would give other tokens."""
BATCH: Final = 512
"""Conversations that are tokenized at once."""
ROLES: Final = {"human": "user", "gpt": "assistant"}
"""Other names of roles, as ShareGPT has them."""


@dataclass(frozen=True)
class Columns:
    """Where a table has what.

    Attributes:
        prompt: columns of the request, as `instruction|input`.
        response: column of the answer.
        messages: column of whole conversations.
        skip: share of rows that may be faulty.
    """

    prompt: str
    response: str
    messages: str
    skip: float


@dataclass(frozen=True)
class Store:
    """A built table: all conversations one after another."""

    path: Path
    dtype: str
    skipped: int
    told: str
    """What was left out, a sentence."""
    tokens: np.ndarray = field(repr=False)
    """[tokens], mapped."""
    learn: np.ndarray = field(repr=False)
    """Whether a token is of an answer: uint8 [tokens], mapped."""
    spans: np.ndarray = field(repr=False)
    """Where each conversation begins and ends: int64 [conversations, 2]."""
    marks: np.ndarray = field(repr=False)
    """Fingerprint of what comes before the first answer: uint64 [conversations]."""

    @staticmethod
    def place(columns: Columns, source: str, tokenizer: ChatTokenizer, cache: str) -> tuple[Path, list[Path]]:
        """The folder of a built table, named by all that its tokens are a function of, and the table's files."""
        files, root = find(source), cache_folder(cache, "instructions")
        contents = list(zip([path.suffix.lower() for path in files], content_hash(files, root), strict=True))
        named = [FORMAT, asdict(columns), tokenizer.inner.to_str(), asdict(tokenizer.chat), contents]
        return root / hashlib.blake2b(json.dumps(named, sort_keys=True).encode(), digest_size=16).hexdigest(), files

    @classmethod
    def of(cls, columns: Columns, source: str, tokenizer: ChatTokenizer, cache: str) -> Store:
        """The built table of a source."""
        folder, files = cls.place(columns, source, tokenizer, cache)
        meta = read_meta(folder) or publish(folder, lambda partial: build(columns, source, files, tokenizer, partial))
        edges = np.load(folder / "edges.npy")
        spans = np.stack([edges[:-1], edges[1:]], 1)
        tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        learn = np.memmap(folder / "learn.bin", dtype=np.uint8, mode="r")
        return cls(folder, meta["dtype"], meta["skipped"], meta["told"], tokens, learn, spans,
                   np.load(folder / "marks.npy"))  # fmt: skip


def build(columns: Columns, source: str, files: list[Path], tokenizer: ChatTokenizer, partial: Path) -> dict[str, Any]:
    """Fill a folder with the tokens of a table; returns what to say about them."""
    dtype = "uint16" if tokenizer.vocab <= 2**16 else "uint32"
    faults, edges, marks = Faults(columns.skip), [0], list[int]()
    texts = rendered(conversations(columns, files, faults), tokenizer, faults)
    with (partial / "tokens.bin").open("wb") as tokens, (partial / "learn.bin").open("wb") as learn:
        while some := list(islice(texts, BATCH)):
            encoded = tokenizer.inner.encode_batch([text for text, _, _ in some], add_special_tokens=False)
            for (_, answers, mark), one in zip(some, encoded, strict=True):
                tokens.write(np.array(one.ids, dtype=dtype).data)
                learn.write(marked(one.offsets, answers).data)
                edges.append(edges[-1] + len(one.ids))
                marks.append(mark)
    faults.check()
    np.save(partial / "edges.npy", np.array(edges, dtype=np.int64))
    np.save(partial / "marks.npy", np.array(marks, dtype=np.uint64))
    return {"dtype": dtype, "skipped": faults.count, "told": faults.told(), "conversations": len(marks)}


def conversations(columns: Columns, files: list[Path], faults: Faults) -> Iterator[tuple[str, Messages]]:
    """Every conversation with its place; rows that are none are noted."""
    for row in (row for path in files for row in rows(path)):
        faults.total += 1
        try:
            if row.fault:
                raise CannotRenderError(row.fault)
            yield row.where, conversation(row.values, columns)
        except CannotRenderError as error:
            faults.add(row.where, str(error))


def rendered(
    found: Iterator[tuple[str, Messages]], tokenizer: ChatTokenizer, faults: Faults
) -> Iterator[tuple[str, list[tuple[int, int]], int]]:
    """Every conversation as text, with the places of its answers and the mark of what comes before the first."""
    for place, messages in found:
        try:
            text, answers = tokenizer.chat.answers(messages)
        except CannotRenderError as error:
            faults.add(place, str(error))
            continue
        yield text, answers, fingerprint(text[: answers[0][0]])


def conversation(record: Mapping[str, Any], columns: Columns) -> Messages:
    """A row's messages.

    Raises:
        CannotRenderError: if it has none.
    """
    if record.get(columns.messages) is not None:
        return _messages(record[columns.messages], columns.messages)
    names = [*columns.prompt.split("|"), columns.response]
    for name in names:
        if name not in record:
            near = did_you_mean(name, [str(key) for key in record])
            raise CannotRenderError(f"has no column `{name}`. {near}".strip().rstrip("."))
        if not isinstance(record[name], str | None):
            raise CannotRenderError(f"its column `{name}` is not text but {json.dumps(record[name], default=str)[:40]}")
    *asked, answer = (_clean(record[name] or "") for name in names)
    question = "\n\n".join(part for part in asked if part.strip())
    if not question or not answer.strip():
        raise CannotRenderError(f"its column `{columns.response if question else names[0]}` is empty")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _messages(given: Any, column: str) -> Messages:
    found: list[dict[str, str]] = []
    for entry in given if isinstance(given, list) else ():
        if not isinstance(entry, dict):
            raise CannotRenderError(f"`{column}` holds a {type(entry).__name__} instead of a message")
        role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
        if not (isinstance(role, str) and role and isinstance(content, str)):
            raise CannotRenderError(f"`{column}` holds a message without a role and a text")
        found.append({"role": ROLES.get(role, role), "content": _clean(content)})
    if not found:
        raise CannotRenderError(f"`{column}` is not a list of messages")
    if any(message["role"] == "assistant" and not message["content"].strip() for message in found):
        raise CannotRenderError(f"`{column}` holds an empty answer")
    return found


def _clean(text: str) -> str:
    """Text without lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode(errors="replace").decode()


def marked(offsets: list[tuple[int, int]], answers: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens are of answers: uint8 [tokens]. A token that holds some of an answer is.

    Args:
        offsets: from where to where in the text each token is, in characters.
        answers: likewise of each answer.
    """
    learn = np.zeros(len(offsets), dtype=np.uint8)
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    for begin, end in answers:
        first = int(np.searchsorted(places[:, 1], begin, side="right"))
        learn[first : int(np.searchsorted(places[:, 0], end, side="left"))] = 1
    return learn
