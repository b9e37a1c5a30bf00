"""GGUF files, llama.cpp's format: metadata, a table of tensors, and the tensors as float32.

    "GGUF", version, number of tensors, number of metadata, metadata (key, type, value), table (name, dimensions, type,
    offset), padding to a multiple of `general.alignment`, tensors

All little-endian; the dimension that runs fastest comes first. A file is not trusted: every length is checked against
its size.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from scrimp.errors import UserError
from scrimp.models.gguf_types import KINDS

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
NUMBERS: Final = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8",
                  11: "<i8", 12: "<f8"}  # fmt: skip
STRING: Final = 8
ARRAY: Final = 9
UNKNOWN: Final = {4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
                  20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
                  39: "MXFP4"}  # fmt: skip
"""Types that are not read."""


@dataclass(frozen=True)
class Entry:
    """A tensor's line in the table."""

    name: str
    shape: tuple[int, ...]
    """As numpy has it: the dimension that runs fastest is the last."""
    kind: int
    """Number of its type."""
    offset: int
    """Where in the file it begins, in bytes."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Gguf:
    """An opened file, mapped into memory."""

    path: Path
    metadata: dict[str, Any]
    entries: dict[str, Entry]
    raw: np.ndarray = field(repr=False)
    """uint8 [bytes of the file]"""

    @classmethod
    def open(cls, path: str | Path) -> Gguf:
        """Read a file's metadata and table.

        Raises:
            UserError: if it is not a whole GGUF file, or holds numbers of a type that is not known.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError("there is no such file.", str(path), "Give a .gguf file.")
        raw = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, dtype=np.uint8)
        cursor = Cursor(raw, path)
        if cursor.take(4) != MAGIC:
            raise UserError("is not a GGUF file.", str(path), "Give a .gguf file.")
        version = cursor.number("<u4")
        if version not in VERSIONS:
            fix = "Convert it with a newer llama.cpp." if version == 1 else "Only little-endian files are read."
            raise UserError(f"is GGUF of version {version}, not 2 or 3.", str(path), fix)
        tensors, count = cursor.number("<u8"), cursor.number("<u8")
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = cursor.text()
            metadata[key] = cursor.value(cursor.number("<u4"))
        table = [cursor.line() for _ in range(tensors)]
        aligned = int(metadata.get("general.alignment", 32))
        if aligned < 1:
            raise UserError(f"is damaged: its alignment is {aligned}.", str(path), "Fetch it again.")
        base = -(-cursor.place // aligned) * aligned
        return cls(path, metadata, {line[0]: _entry(path, len(raw), base, *line) for line in table}, raw)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float32."""
        entry = self.entries[name]
        kind = KINDS[entry.kind]
        blocks = self.raw[entry.offset : entry.offset + entry.size].reshape(-1, kind.bytes)
        return kind.read(blocks).reshape(entry.shape)

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata.

        Raises:
            UserError: if it is not there and there is no default.
        """
        found = self.metadata.get(key, default)
        if found is None:
            raise UserError(f"does not say `{key}`.", str(self.path), "Convert the model again with llama.cpp.")
        return found

    def types(self) -> Counter[str]:
        """How many tensors there are of each type."""
        return Counter(KINDS[entry.kind].name for entry in self.entries.values())


def _entry(path: Path, size: int, base: int, name: str, dims: list[int], kind: int, offset: int) -> Entry:
    if kind not in KINDS:
        known = ", ".join(k.name for k in KINDS.values())
        what = f"`{name}` is of type {UNKNOWN.get(kind, kind)}, which is not read."
        raise UserError(what, str(path), f"Take a file with {known}.")
    block, count = KINDS[kind], math.prod(dims)
    bytes_ = count // block.size * block.bytes
    if not dims or dims[0] % block.size or base + offset + bytes_ > size:
        raise UserError(f"is damaged or cut off: `{name}` is not whole.", str(path), "Fetch it again.")
    return Entry(name, tuple(reversed(dims)), kind, base + offset, bytes_)


class Cursor:
    """Reads a header front to back."""

    def __init__(self, raw: np.ndarray, path: Path) -> None:
        self.raw, self.path, self.place = raw, path, 0

    def take(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            UserError: if the file ends before.
        """
        if not 0 <= count <= len(self.raw) - self.place:
            raise UserError("is damaged or cut off: it ends within its header.", str(self.path), "Fetch it again.")
        self.place += count
        return self.raw[self.place - count : self.place].tobytes()

    def number(self, dtype: str) -> Any:
        """A number, as Python's."""
        width = np.dtype(dtype).itemsize
        return np.frombuffer(self.take(width), dtype)[0].item()

    def text(self) -> str:
        """A length and UTF-8."""
        (length,) = struct.unpack("<Q", self.take(8))
        return self.take(length).decode(errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A value of the metadata: a number, a text, or a list of them; lists of numbers are arrays."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth > 4:
            raise UserError(f"is damaged: its metadata have a value of type {kind}.", str(self.path), "Fetch it again.")
        inner, count = self.number("<u4"), self.number("<u8")
        if inner in NUMBERS:
            return np.frombuffer(self.take(count * np.dtype(NUMBERS[inner]).itemsize), NUMBERS[inner])
        return [self.value(inner, depth + 1) for _ in range(count)]

    def line(self) -> tuple[str, list[int], int, int]:
        """A line of the table: name, dimensions, type, offset."""
        name, rank = self.text(), self.number("<u4")
        if rank > 8:
            raise UserError(f"is damaged: `{name[:40]}` has {rank} dimensions.", str(self.path), "Fetch it again.")
        dims = [self.number("<u8") for _ in range(rank)]
        return name, dims, self.number("<u4"), self.number("<u8")
