"""Rows of tables: .jsonl, .csv, .tsv, .parquet and .arrow files, and folders that Hugging Face's `datasets` saved.

A .csv quotes as spreadsheets do, so that a field may hold line breaks; in a .tsv a quote is a letter like any other.
A row that cannot be read is handed on with what is wrong, so that a few of them cost no run and are told.
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

KINDS: Final = (".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
LONGEST: Final = 2**24
"""Characters of the longest field of a .csv or .tsv."""
AT_ONCE: Final = 64
"""Rows of a .parquet or .arrow file that are held in memory at once."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        where: file and line, or file and number of the row.
        values: column -> value, as the file has it.
        fault: what is wrong with it, or empty.
    """

    where: str
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fault: str = ""


def find(source: str, where: str = "data.source", kinds: Sequence[str] = KINDS) -> list[Path]:
    """The files of a source, sorted.

    Args:
        source: a file, a glob, a folder (read recursively, without hidden files), or a folder saved by `datasets`; of
            one with several splits, `train` is taken.
        where: the key that names it. kinds: endings that are known.
    Raises:
        UserError: if there are none, or one of another kind.
    """
    place = Path(source).expanduser()
    if (place / "dataset_dict.json").is_file():
        place = place / "train"
    if (place / "state.json").is_file() and ".arrow" in kinds:
        files = _shards(place)
    elif place.is_dir():
        files = [p for p in place.rglob("*") if p.suffix.lower() in kinds and p.is_file()]
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(place).parts)]
    elif place.is_file():
        files = [place]
    else:
        files = [Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file()]
    if not source or not files:
        raise UserError(f"`{source}` has no table.", where, f"Give a file, a folder or a glob with {', '.join(kinds)}.")
    if other := [p for p in files if p.suffix.lower() not in kinds]:
        raise UserError(f"`{other[0]}` is not a table.", where, f"Known endings: {', '.join(kinds)}.")
    return sorted(set(files))


def _shards(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `datasets` saved, as its state.json says."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise UserError("is not the state of a saved data set.", str(folder / "state.json")) from None
    if missing := [path.name for path in files if not path.is_file()]:
        raise UserError(f"lacks {', '.join(missing[:3])}.", str(folder), "Save the data set again.")
    return files


def rows(path: Path, needed: Sequence[str] = (), columns: Sequence[str] = ()) -> Iterator[Row]:
    """Every row of a file, a few at a time, so that no file need fit into memory.

    Args:
        needed: the columns that are used, such as `label`, or `translation.en` in one of records; all when empty.
        columns: names of the columns of a .csv or .tsv that has no line with them.
    Raises:
        UserError: if a file with named columns lacks one, or cannot be read at all.
    """
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            yield from _lines(path, needed, columns)
        elif kind in (".parquet", ".arrow"):
            yield from (_parquet if kind == ".parquet" else _arrow)(path, needed)
        else:
            yield from _records(path, needed)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}.", str(path)) from None


def value_of(values: Mapping[str, Any], name: str) -> Any:
    """A row's value; `translation.en` is a field of a field.

    Raises:
        ValueError: saying that there is none.
    """
    value: Any = values
    for part in [name] if name in values else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            near = did_you_mean(name, [str(key) for key in values])
            raise ValueError(f"has no field `{name}`. {near}".strip().rstrip("."))
        value = value[part]
    return value


def text_of(values: Mapping[str, Any], name: str) -> str:
    """A row's text.

    Raises:
        ValueError: saying what is wrong with it.
    """
    value = value_of(values, name)
    if not isinstance(value, str):
        raise ValueError(f"its field `{name}` is not text but {json.dumps(value, default=str)[:40]}")
    if not value.strip():
        raise ValueError(f"its field `{name}` is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"its field `{name}` is not Unicode") from None
    return value


def _check(needed: Sequence[str], names: Sequence[str], path: Path) -> None:
    for name in needed:
        if name not in names and name.partition(".")[0] not in names:
            fix = f"{did_you_mean(name, names)} Name the columns in `data`."
            if path.suffix.lower() in (".csv", ".tsv"):
                fix += " If the first line is none of names, set `data.columns`."
            raise UserError(f"has no column `{name}`.", str(path), fix)


def _lines(path: Path, needed: Sequence[str], columns: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(LONGEST)
    # Bytes that are not UTF-8 become lone surrogates, which `text_of` finds in the fields that matter.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        tabs = path.suffix.lower() == ".tsv"
        # strict: a quote that is never closed is told as a fault, instead of making the rest of the file one text.
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file, strict=True)
        try:
            names = list(columns) or next(reader, [])
        except csv.Error as error:
            raise UserError(
                f"its first line is none of a table: {error}.", str(path), "Are its quotes closed?"
            ) from None
        _check(needed, names, path)
        while True:
            first = reader.line_num + 1
            where = f"{path}, line {first}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # Each line that was swallowed, so that a quote which is never closed does not pass for one faulty row.
                for line in range(first, reader.line_num + 1):
                    yield Row(f"{path}, line {line}", fault=f"is not a line of a table: {error}")
                continue
            if len(values) == len(names):
                yield Row(where, dict(zip(names, values, strict=True)))
            elif values:
                yield Row(where, fault=f"has {len(values)} fields instead of {len(names)}")


def _records(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(raw.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield Row(where, fault="is not UTF-8")
                continue
            except (ValueError, RecursionError):
                yield Row(where, fault="is not JSON")
                continue
            if not isinstance(record, dict):
                yield Row(where, fault=f"is not a record but a {type(record).__name__}")
                continue
            yield _row(where, record, needed)


def _row(where: str, record: dict[str, Any], needed: Sequence[str]) -> Row:
    try:
        for name in needed:
            value_of(record, name)
    except ValueError as error:
        return Row(where, fault=str(error))
    return Row(where, record)


def _parquet(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    with open_parquet(path) as file:
        names: list[str] = file.schema_arrow.names
        _check(needed, names, path)
        tops = [name if name in names else name.partition(".")[0] for name in needed]
        yield from _numbered(path, file.iter_batches(batch_size=AT_ONCE, columns=tops or None), needed)


def _arrow(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow
    except ImportError:
        raise UserError("pyarrow is not installed.", str(path), "pip install 'scrimp[data]'.") from None
    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                reader = pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                whole = pyarrow.ipc.open_file(file)
                _check(needed, whole.schema.names, path)
                reader = (whole.get_batch(i) for i in range(whole.num_record_batches))
            else:
                _check(needed, reader.schema.names, path)
            parts = (batch.slice(start, AT_ONCE) for batch in reader for start in range(0, batch.num_rows, AT_ONCE))
            yield from _numbered(path, parts, needed)
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot be read: {error}.", str(path)) from None


def _numbered(path: Path, parts: Iterator[Any], needed: Sequence[str]) -> Iterator[Row]:
    number = 0
    for part in parts:
        for record in _decoded(part):
            number += 1
            where = f"{path}, row {number}"
            yield Row(where, fault="is not UTF-8") if record is None else _row(where, record, needed)


def _decoded(batch: Any) -> Iterator[dict[str, Any] | None]:
    """Each row, or None where its text is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None
