"""Where documents come from: files, folders, globs, or the running interpreter's own library."""

from __future__ import annotations

import glob
import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from scrimp.errors import UserError, did_you_mean

KINDS: Final = (".txt", ".md", ".py", ".jsonl", ".parquet")
STDLIB: Final = "python-stdlib"
NOT_LIBRARY: Final = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
BLOCK: Final = 4096
"""Characters of a text that is cut, gathered into one document: at the next blank line, or the next line after four
times as many."""
LARGE: Final = 2**22
"""Bytes from which a text file is cut even if it is one of several."""
LINE: Final = 2**20
"""Bytes of a line that are held in memory at once."""


def find(source: str) -> list[Path]:
    """The files of a source, sorted.

    Args:
        source: a file, a folder (read recursively, without hidden files), a glob, or `python-stdlib`. A file or a glob
            may also name text with another ending than those a folder is searched for.
    Raises:
        UserError: if there are none.
    """
    place = Path(source).expanduser()
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in root.rglob("*.py") if not NOT_LIBRARY & set(p.relative_to(root).parts[:-1])]
    elif place.is_dir():
        files = [p for p in place.rglob("*") if p.suffix.lower() in KINDS and p.is_file()]
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(place).parts)]
    elif place.is_file():
        files = [place]
    else:
        files = [Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file()]
    if not files:
        fix = f"Give a file, a folder or a glob with {', '.join(KINDS)}, or {STDLIB}."
        raise UserError(f"`{source}` has no text.", "data.source", fix)
    return sorted(set(files))


def located(source: str) -> str:
    """The same place by its absolute path; a source that is no path or is not there stays as it is."""
    place = Path(source).expanduser()
    if source == STDLIB or not (place.exists() or any(glob.iglob(str(place), recursive=True))):
        return source
    return str(place.absolute())


def documents(files: list[Path], field: str, tally: Counter[str]) -> Iterator[str]:
    """Every document that is not empty, one at a time; all are valid Unicode without lone surrogates.

    A record of .jsonl or .parquet is a document, and so is a text file. A source of a single text file, or a text file
    of more than 4 MiB, is cut at blank lines into documents of about 4,096 characters (16,384 where there are no blank
    lines), so that some can be held out and none is too large for memory.

    Args:
        field: of a record that holds the text.
        tally: counts under "undecodable" the sequences that are not UTF-8 (each becomes U+FFFD) and the lone
            surrogates (each becomes "?"), and under "empty" the documents left out.
    Raises:
        UserError: if a file is binary, a record is not JSON or has no such field, or a column is not text.
    """
    for path in files:
        kind = path.suffix.lower()
        if kind == ".jsonl":
            found = _records(path, field, tally)
        elif kind == ".parquet":
            found = _columns(path, field, tally)
        else:
            found = _texts(path, tally, cut=len(files) == 1 or path.stat().st_size > LARGE)
        for text in found:
            if text:
                yield text
            else:
                tally["empty"] += 1


def fingerprint(text: str) -> int:
    """64 bits of a document's content, so that copies get the same split; spaces and line ends do not count."""
    plain = " ".join(text.split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")


def _decoded(raw: bytes, tally: Counter[str]) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        text = raw.decode(errors="replace")
        tally["undecodable"] += text.count("\ufffd") - raw.count("\ufffd".encode())
        return text


def _texts(path: Path, tally: Counter[str], cut: bool) -> Iterator[str]:
    with path.open("rb") as file:
        if b"\0" in file.peek(1024)[:1024]:  # type: ignore[attr-defined]
            raise UserError("holds null bytes, so it is not UTF-8 text.", str(path), "Convert it or leave it out.")
        if file.peek(3).startswith(b"\xef\xbb\xbf"):  # type: ignore[attr-defined]
            file.read(3)  # a byte order mark is no text
        if cut:
            yield from _blocks(file, tally)
        else:
            yield _decoded(file.read(), tally)


def _blocks(file: IO[bytes], tally: Counter[str]) -> Iterator[str]:
    gathered: list[str] = []
    size = 0
    for raw in _lines(file):
        line = _decoded(raw, tally)
        gathered.append(line)
        size += len(line)
        if (size >= BLOCK and not line.strip()) or size >= 4 * BLOCK:
            yield "".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield "".join(gathered)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines; one that is too long comes in parts, which end between characters."""
    rest = b""
    while raw := file.readline(LINE):
        raw, rest = rest + raw, b""
        if not raw.endswith(b"\n"):
            start = len(raw) - 1
            while start > len(raw) - 4 and start > 0 and raw[start] & 0xC0 == 0x80:
                start -= 1
            if raw[start] & 0xC0 == 0xC0:
                raw, rest = raw[:start], raw[start:]
        if raw:
            yield raw
    if rest:
        yield rest


def _records(path: Path, field: str, tally: Counter[str]) -> Iterator[str]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decoded(raw, tally).removeprefix("\ufeff")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deeply nested"
                raise UserError(f"line {number} is not JSON: {reason}.", str(path)) from None
            yield _valid(_field(record, field, f"{path}, line {number}"), tally)


def _field(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"is not a record but a {type(record).__name__}.", where, 'Each line is {"text": "..."}.')
    if field not in record:
        names = [str(name) for name, value in record.items() if isinstance(value, str)]
        fix = f"{did_you_mean(field, names)} Set `data.field`.".strip()
        raise UserError(f"has no field `{field}`.", where, fix)
    value = record[field]
    if not isinstance(value, str | None):
        raise UserError(f"its field `{field}` is not text but {json.dumps(value)[:40]}.", where, "Set `data.field`.")
    return value or ""


def _valid(text: str, tally: Counter[str]) -> str:
    """The text without lone surrogates, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        tally["undecodable"] += sum("\ud800" <= letter <= "\udfff" for letter in text)
        return text.encode(errors="replace").decode()
    return text


def open_parquet(path: Path) -> Any:
    """A parquet file, to be read in batches and closed.

    Raises:
        UserError: if it is none, or pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("pyarrow is not installed.", str(path), "pip install 'scrimp[data]'.") from None
    try:
        # Without a buffer size a whole column of a row group is read at once.
        return parquet.ParquetFile(path, buffer_size=2**20)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"is not a parquet file: {error}.", str(path)) from None


def _columns(path: Path, field: str, tally: Counter[str]) -> Iterator[str]:
    with open_parquet(path) as file:
        import pyarrow

        if field not in file.schema_arrow.names:
            fix = f"{did_you_mean(field, file.schema_arrow.names)} Set `data.field`."
            raise UserError(f"has no column `{field}`.", str(path), fix)
        kind = file.schema_arrow.field(field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UserError(f"its column `{field}` is not text but {kind}.", str(path), "Set `data.field`.")
        for batch in file.iter_batches(batch_size=64, columns=[field]):
            # As bytes, since pyarrow refuses text that is not UTF-8.
            for value in batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist():
                yield _decoded(value or b"", tally)
