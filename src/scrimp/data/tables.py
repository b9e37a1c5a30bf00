"""Tables of labelled texts: rows of .csv, .tsv, .jsonl and .parquet files, the faulty ones with what is wrong.

A .csv quotes as spreadsheets do, so that a field may hold line breaks; in a .tsv a quote is a letter like any other.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from scrimp.data.documents import open_parquet
from scrimp.errors import UserError, did_you_mean

KINDS: Final = (".csv", ".tsv", ".jsonl", ".parquet")
LONGEST: Final = 2**24
"""Characters of the longest field of a .csv or .tsv."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        where: file and line, or file and number of the record.
        values: column -> value, as the file has it.
        fault: what is wrong with it, or empty.
    """

    where: str
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fault: str = ""


def find(source: str, where: str) -> list[Path]:
    """The tables of a source, sorted: a file, a glob, or a folder, whose tables are taken.

    Raises:
        UserError: if there are none, or one of another kind.
    """
    place = Path(source).expanduser()
    if place.is_dir():
        files = [p for p in place.iterdir() if p.suffix.lower() in KINDS and p.is_file()]
    else:
        files = [place] if place.is_file() else [Path(p) for p in glob.glob(str(place), recursive=True)]
    if not source or not files:
        raise UserError(f"`{source}` has no table.", where, f"Give a file, a folder or a glob with {', '.join(KINDS)}.")
    other = [p for p in files if p.suffix.lower() not in KINDS]
    if other:
        raise UserError(f"`{other[0]}` is not a table.", where, f"Known endings: {', '.join(KINDS)}.")
    return sorted(set(files))


def rows(path: Path, needed: Sequence[str], columns: Sequence[str] = ()) -> Iterator[Row]:
    """Every row of a file.

    Args:
        needed: the columns that are used.
        columns: names of the columns of a .csv or .tsv that has no line with them.
    Raises:
        UserError: if the file lacks a column, or cannot be read at all.
    """
    kind = path.suffix.lower()
    if kind == ".jsonl":
        yield from _records(path, needed)
    elif kind == ".parquet":
        yield from _parquet(path, needed)
    else:
        yield from _lines(path, needed, columns, kind == ".tsv")


def _check(needed: Sequence[str], names: Sequence[str], path: Path) -> None:
    for name in needed:
        if name not in names:
            fix = f"{did_you_mean(name, names)} Name the columns in `data`: text, text_pair, label, score."
            if path.suffix.lower() in (".csv", ".tsv"):
                fix += " If the first line is none of names, set `data.columns`."
            raise UserError(f"has no column `{name}`.", str(path), fix)


def _lines(path: Path, needed: Sequence[str], columns: Sequence[str], tabs: bool) -> Iterator[Row]:
    csv.field_size_limit(LONGEST)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        # strict: a quote that is never closed is told as a fault, instead of making the rest of the file one text.
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file, strict=True)
        names = list(columns) or next(reader, [])
        _check(needed, names, path)
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(where, fault=f"is not a line of a table: {error}")
                continue
            if len(values) == len(names):
                yield Row(where, dict(zip(names, values, strict=True)))
            elif values:
                yield Row(where, fault=f"has {len(values)} fields instead of {len(names)}")


def _records(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    first = True
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            text = raw.decode("utf-8-sig", errors="replace")
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                yield Row(where, fault="is not JSON")
                continue
            if not isinstance(record, dict):
                yield Row(where, fault=f"is not a record but a {type(record).__name__}")
                continue
            if first:
                _check(needed, list(record), path)
                first = False
            absent = [name for name in needed if name not in record]
            yield Row(where, fault=f"has no field `{absent[0]}`") if absent else Row(where, record)


def _parquet(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    with open_parquet(path) as file:
        _check(needed, file.schema_arrow.names, path)
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=list(needed)):
            for record in batch.to_pylist():
                number += 1
                yield Row(f"{path}, record {number}", record)
