"""The file of scores: a parquet table with a row an item, a column a run, and their mean.

It names the data it was made of, so that scores are never used for other items.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from scrimp.errors import UserError

ABOUT: Final = b"scrimp"
"""Key of what the file says of itself."""


@dataclass(frozen=True)
class Scores:
    """Scores of all items of a training set."""

    runs: np.ndarray
    """float64, [runs, items]; high is hard."""
    about: dict[str, Any]
    """by: the method; data: what identifies the training set; recipe: what was trained; seed: of the first run."""

    @property
    def mean(self) -> np.ndarray:
        """Over runs: float64, [items]."""
        return self.runs.mean(0)


def write(path: Path, scores: Scores) -> None:
    """Write all at once: a file that is there is whole."""
    arrow, parquet = _pyarrow(path)
    columns = {"item": np.arange(scores.runs.shape[1]), "score": scores.mean}
    columns |= {f"run_{n}": run for n, run in enumerate(scores.runs)}
    table = arrow.table(columns).replace_schema_metadata({ABOUT: json.dumps(scores.about)})
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}.", str(path)) from None


def read(path: Path, where: str = "") -> Scores:
    """Read a file of scores.

    Raises:
        UserError: if there is none, or it holds something else.
    """
    arrow, parquet = _pyarrow(path)
    fix = "Make one with `scrimp score RECIPE --by el2n`."
    try:
        table = parquet.read_table(path)
    except FileNotFoundError:
        raise UserError(f"there is no file of scores at `{path}`.", where, fix) from None
    except (OSError, arrow.ArrowInvalid) as error:
        raise UserError(f"`{path}` cannot be read: {str(error).splitlines()[0]}.", where, fix) from None
    said = (table.schema.metadata or {}).get(ABOUT)
    names = sorted((n for n in table.column_names if n.startswith("run_")), key=lambda name: int(name[4:]))
    if said is None or not names:
        raise UserError(f"`{path}` is no file of scores.", where, fix)
    return Scores(np.stack([table[name].to_numpy() for name in names]), json.loads(said))


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("pyarrow is not installed.", str(path), "pip install 'scrimp[data]'.") from None
    return pyarrow, parquet
