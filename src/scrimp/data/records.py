"""Rows of tables: JSON lines, CSV, parquet, Arrow, and folders that Hugging Face's `datasets` saved.

A row that cannot be read is handed on with the reason, so that a few of them cost no run and are told.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from scrimp.errors import UserError

KINDS: Final = (".jsonl", ".csv", ".parquet", ".arrow")
NAMED: Final = 3
"""Faulty rows that an error names."""
PROBE: Final = 100
"""First rows after which a table of nothing but faults is given up."""

Row = tuple[str, dict[str, Any] | str]
"""Where it is, and the record or what is wrong with it."""


@dataclass
class Faults:
    """Rows that were left out: how many, and the first few by name."""

    source: str
    rows: int = 0
    """Rows seen."""
    count: int = 0
    first: list[str] = field(default_factory=list[str])

    def add(self, place: str, what: str) -> None:
        """Note a row.

        Raises:
            UserError: if the first hundred rows are all faulty.
        """
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(f"{place}: {what}")
        if self.count == self.rows == PROBE:
            self._refuse()

    def check(self, limit: float) -> None:
        """End of the table.

        Args:
            limit: share of the rows that may be left out.
        Raises:
            UserError: if more are, or nothing is left.
        """
        if self.count > limit * self.rows or self.count == self.rows:
            self._refuse()

    def told(self) -> str:
        """A sentence, or nothing."""
        return f"{self.count:,} of {self.rows:,} rows were left out: {'; '.join(self.first)}." if self.count else ""

    def _refuse(self) -> None:
        if not self.rows:
            raise UserError("has no rows.", self.source, "Give a table with some.")
        raise UserError(self.told(), self.source, "Mend them, or raise `data.skip`.")


def find_tables(source: str, where: str = "data.source") -> list[Path]:
    """The files of a source, sorted.

    Args:
        source: a file, a glob, a folder (read recursively), or a folder saved by `datasets`; of one with several
            splits, `train` is taken.
    Raises:
        UserError: if there are none.
    """
    place = Path(source).expanduser()
    if (place / "dataset_dict.json").is_file():
        place = place / "train"
    if (place / "state.json").is_file():
        files = _shards(place)
    elif place.is_dir():
        files = [path for path in place.rglob("*") if path.suffix.lower() in KINDS and path.is_file()]
    elif place.is_file():
        files = [place]
    else:
        files = [Path(path) for path in glob.glob(str(place), recursive=True) if Path(path).is_file()]
    if not files:
        raise UserError(f"`{source}` has no table.", where, f"Give a file, a folder or a glob with {', '.join(KINDS)}.")
    return sorted(set(files))


def _shards(folder: Path) -> list[Path]:
    """The Arrow files of a folder that `datasets` saved, as its state.json says."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise UserError("is not the state of a saved data set.", str(folder / "state.json")) from None
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"lacks {', '.join(missing[:3])}.", str(folder), "Save the data set again.")
    return files


def rows(files: list[Path]) -> Iterator[Row]:
    """Every row of every file, in order; one at a time, so that no file need fit into memory.

    Raises:
        UserError: if a whole file cannot be read.
    """
    readers = {".csv": _csv, ".parquet": _parquet, ".arrow": _arrow}
    for path in files:
        yield from readers.get(path.suffix.lower(), _jsonl)(path)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path.name}, line {number}"
            line = raw.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield place, f"is not JSON ({getattr(error, 'msg', None) or type(error).__name__})"
                continue
            yield place, record if isinstance(record, dict) else f"is not a record but a {type(record).__name__}"


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file)
        head = next(reader, None)
        if not head:
            raise UserError("has no line with the columns' names.", str(path))
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"{path.name}, line {reader.line_num}", f"is not CSV ({error})"
                continue
            place = f"{path.name}, line {reader.line_num}"
            if len(values) == len(head):
                yield place, dict(zip(head, values, strict=True))
            elif values:
                yield place, f"has {len(values)} values for {len(head)} columns"


def _parquet(path: Path) -> Iterator[Row]:
    _pyarrow(path)
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _numbered(path, (batch.to_pylist() for batch in file.iter_batches(batch_size=64)))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}.", str(path)) from None


def _arrow(path: Path) -> Iterator[Row]:
    _pyarrow(path)
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                reader = pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                whole = pyarrow.ipc.open_file(file)
                reader = (whole.get_batch(i) for i in range(whole.num_record_batches))
            yield from _numbered(path, (part for batch in reader for part in _parts(batch)))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}.", str(path)) from None


def _parts(batch: Any) -> Iterator[list[dict[str, Any]]]:
    """A record batch, some rows at a time."""
    for start in range(0, batch.num_rows, 64):
        yield batch.slice(start, 64).to_pylist()


def _numbered(path: Path, parts: Iterator[list[dict[str, Any]]]) -> Iterator[Row]:
    number = 0
    for part in parts:
        for record in part:
            number += 1
            yield f"{path.name}, row {number}", record


def _pyarrow(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError("pyarrow is not installed.", str(path), "pip install 'scrimp[data]'.") from None
