"""Records of .jsonl, .tsv and .parquet files.

A faulty one is left out, counted and named; more than a share of faulty ones is an error.
"""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from scrimp.errors import UserError, did_you_mean

KINDS: Final = (".jsonl", ".tsv", ".parquet")
NAMED: Final = 5
"""Faulty items that are named; the others are only counted."""


@dataclass
class Faults:
    """Items that were left out."""

    share: float
    """Of all items that may be faulty."""
    total: int = 0
    """Items seen, the faulty ones too."""
    count: int = 0
    first: list[str] = field(default_factory=list[str])
    """Where and why, of a few."""

    def add(self, place: str, reason: str) -> None:
        """An item that is left out."""
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(f"{place}: {reason}")

    def check(self, where: str = "data.source") -> None:
        """Tell of what was left out, on stderr.

        Raises:
            UserError: if there was no item, or too many were faulty.
        """
        named = "; ".join(self.first) + (f"; and {self.count - NAMED} more" if self.count > NAMED else "")
        if self.total == self.count:
            raise UserError(f"no item can be used. {named}".strip(), where, "Give some that can.")
        if self.count > self.share * self.total:
            what = f"{self.count} of {self.total} items are faulty, more than {self.share:.3g} of them. {named}."
            raise UserError(what, where, "Mend or remove them, or raise `data.skip`.")
        if self.count:
            sys.stderr.write(f"scrimp: {self.count} of {self.total} items were left out. {named}.\n")


def records(files: Iterable[Path], faults: Faults, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each line or row; those that cannot be read are faults.

    The first line of a .tsv file names its columns, unless the wanted fields are numbers: then they are those of
    columns, from 0.

    Args:
        wanted: names of the fields.
    Raises:
        UserError: if a file cannot be read at all.
    """
    for path in files:
        kind = path.suffix.lower()
        if kind == ".jsonl":
            yield from _lines(path, faults)
        elif kind == ".tsv":
            yield from _table(path, faults, all(name.isdigit() for name in wanted))
        elif kind == ".parquet":
            yield from _columns(path, faults, wanted)
        else:
            raise UserError("is not a file of records.", str(path), f"Give one of {', '.join(KINDS)}.")


def _lines(path: Path, faults: Faults) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            place = f"{path}, line {number}"
            faults.total += 1
            try:
                record = json.loads(raw.removeprefix(b"\xef\xbb\xbf"))
            except (ValueError, RecursionError):
                faults.add(place, "is not JSON")
                continue
            if isinstance(record, dict):
                yield place, record
            else:
                faults.add(place, f"is not a record but a {type(record).__name__}")


def _table(path: Path, faults: Faults, numbered: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    names: list[str] = []
    # Bytes that are not UTF-8 become lone surrogates, which `text_of` finds in the fields that matter.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            row = line.rstrip("\r\n").split("\t")
            if row == [""]:
                continue
            if not numbered and not names:
                names = row
                continue
            faults.total += 1
            if numbered:
                names = [str(i) for i in range(len(row))]
            yield f"{path}, line {number}", dict(zip(names, row, strict=False))


def _columns(path: Path, faults: Faults, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("pyarrow is not installed.", str(path), "pip install 'scrimp[data]'.") from None
    try:
        file = parquet.ParquetFile(path, buffer_size=2**20)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"is not a parquet file: {error}.", str(path)) from None
    names: list[str] = file.schema_arrow.names
    tops = [name if name in names else name.partition(".")[0] for name in wanted]
    columns = tops if set(tops) <= set(names) else None  # all, so that an error can name the nearest
    number = 0
    with file:
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for record in _rows(batch):
                number += 1
                faults.total += 1
                if isinstance(record, dict):
                    yield f"{path}, row {number}", record
                else:
                    faults.add(f"{path}, row {number}", record)


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Each row, or why it has none."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                row: dict[str, Any] | str = batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                row = "is not UTF-8"
            yield row


def text_of(record: Mapping[str, Any], name: str) -> str:
    """A field's text; `translation.en` is a field of a field.

    Raises:
        ValueError: saying what is wrong with it.
    """
    value: Any = record
    for part in [name] if name in record else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = [str(key) for key, found in record.items() if isinstance(found, str)]
            raise ValueError(f"has no field `{name}`. {did_you_mean(name, known)}".strip())
        value = value[part]
    if not isinstance(value, str):
        raise ValueError(f"its field `{name}` is not text but {json.dumps(value, default=str)[:40]}")
    if not value.strip():
        raise ValueError(f"its field `{name}` is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"its field `{name}` is not Unicode") from None
    return value


def found_files(source: str, kinds: tuple[str, ...]) -> list[Path]:
    """The files of a source: a file, a folder (searched through for some endings) or a glob; sorted.

    Raises:
        UserError: if there are none.
    """
    place = Path(source).expanduser()
    if place.is_dir():
        files = [p for p in place.rglob("*") if p.suffix.lower() in kinds and p.is_file()]
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(place).parts)]
    else:
        files = [place] if place.is_file() else [Path(p) for p in glob.glob(str(place), recursive=True)]
        files = [p for p in files if p.is_file()]
    if not files:
        fix = f"Give a file, a folder or a glob with {', '.join(kinds)}."
        raise UserError(f"`{source}` has no data.", "data.source", fix)
    return sorted(set(files))
