"""Where documents come from: files, folders, globs, or the running interpreter's own library."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from scrimp.errors import UserError, did_you_mean

KINDS: Final = (".txt", ".md", ".py", ".jsonl", ".parquet")
STDLIB: Final = "python-stdlib"
NOT_LIBRARY: Final = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
BLOCK: Final = 4096
"""Characters of a single text file that are gathered into one document, at blank lines."""


def find(source: str) -> list[Path]:
    """The files of a source, sorted.

    Args:
        source: a file, a folder (read recursively), a glob, or `python-stdlib`.
    Raises:
        UserError: if there are none.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in root.rglob("*.py") if not NOT_LIBRARY & set(p.relative_to(root).parts[:-1])]
    elif Path(source).is_dir():
        files = [p for p in Path(source).rglob("*") if p.suffix in KINDS and p.is_file()]
    elif Path(source).is_file():
        files = [Path(source)]
    else:
        files = [Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file()]
    if not files:
        fix = f"Give a file, a folder or a glob with {', '.join(KINDS)}, or {STDLIB}."
        raise UserError(f"`{source}` has no text.", "data.source", fix)
    return sorted(files)


def documents(files: list[Path], field: str, bad: dict[str, int]) -> Iterator[str]:
    """Every document, one at a time.

    A record of .jsonl or .parquet is a document, and so is a text file; but a source of a single text file is cut
    at blank lines into documents of about 4,096 characters, so that some can be held out.

    Args:
        field: of a record that holds the text.
        bad: counts files with bytes that are not UTF-8 (replaced) under "undecodable".
    """
    for path in files:
        if path.suffix == ".jsonl":
            yield from _records(path, field)
        elif path.suffix == ".parquet":
            yield from _parquet(path, field)
        elif len(files) == 1:
            yield from _blocks(path, bad)
        else:
            yield _text(path.read_bytes(), bad)


def _text(raw: bytes, bad: dict[str, int]) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        bad["undecodable"] = bad.get("undecodable", 0) + 1
        return raw.decode("utf-8", errors="replace")


def _blocks(path: Path, bad: dict[str, int]) -> Iterator[str]:
    gathered: list[str] = []
    size = 0
    with path.open("rb") as file:
        for raw in file:
            line = _text(raw, bad)
            gathered.append(line)
            size += len(line)
            # A text without blank lines is cut anyway, lest it be held in memory whole.
            if (size >= BLOCK and not line.strip()) or size >= 64 * BLOCK:
                yield "".join(gathered)
                gathered, size = [], 0
    if gathered:
        yield "".join(gathered)


def _records(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"line {number} is not JSON: {error.msg}.", str(path)) from None
            yield _field(record, field, f"{path}, line {number}")


def _field(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        names = [str(k) for k, v in record.items() if isinstance(v, str)] if isinstance(record, dict) else []
        fix = f"{did_you_mean(field, names)} Set `data.field`.".strip()
        raise UserError(f"has no text field `{field}`.", where, fix)
    return record[field]


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("pyarrow is not installed.", str(path), "pip install 'scrimp[data]'.") from None
    file = parquet.ParquetFile(path)
    if field not in file.schema_arrow.names:
        fix = f"{did_you_mean(field, file.schema_arrow.names)} Set `data.field`."
        raise UserError(f"has no column `{field}`.", str(path), fix)
    for batch in file.iter_batches(batch_size=256, columns=[field]):
        for value in batch.column(0).to_pylist():
            if value:
                yield str(value)


def held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out split: a function of its content, so that copies stay together."""
    key = hashlib.blake2b(re.sub(r"\s+", " ", text).encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(key, "little") < share * 2**64
