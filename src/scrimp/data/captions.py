"""Pictures with texts as they are found: .jsonl lists beside image files, or .tar shards."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scrimp.data.faults import Faults
from scrimp.data.tables import rows, text_of
from scrimp.errors import UserError

KINDS: Final = (".jsonl", ".tar")
IMAGES: Final = ("png", "jpg", "jpeg", "webp", "bmp", "gif")
TEXTS: Final = ("txt", "cls", "json")


@dataclass(frozen=True)
class Picture:
    """An image that is not decoded yet, with its texts."""

    place: str
    content: bytes
    texts: tuple[str, ...]
    """At least one; any of them is a caption."""
    label: str
    """Name of its class, or empty."""


def listed(files: Iterable[Path], names: tuple[str, str, str]) -> list[Path]:
    """The image files that .jsonl lists name, those that are there.

    Args:
        names: fields of the path, relative to the list's folder; of the text; of the class.
    """
    found = [path.parent / str(row.values.get(names[0])) for path in files if path.suffix.lower() == ".jsonl"
             for row in rows(path)]  # fmt: skip
    return [path for path in found if _there(path)]


def _there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for one
        return False


def pictures(files: Iterable[Path], names: tuple[str, str, str], faults: Faults) -> Iterator[Picture]:
    """Every picture with a text.

    In a shard, members of one name but for the ending are one item: `a/7.png` with `a/7.txt`, a caption a line, and
    `a/7.cls`, its class; or with `a/7.json`, a record with the fields of a list.

    Raises:
        UserError: if a file cannot be read at all.
    """
    for path in files:
        if path.suffix.lower() == ".tar":
            yield from _shard(path, names, faults)
            continue
        for row in rows(path, names[:2]):
            faults.total += 1
            try:
                if row.fault:
                    raise ValueError(row.fault)
                image = path.parent / text_of(row.values, names[0])
                yield Picture(row.where, image.read_bytes(), _texts(row.values, names[1]), _label(row.values, names[2]))
            except ValueError as error:
                faults.add(row.where, str(error))
            except OSError as error:
                faults.add(row.where, f"its image cannot be read: {error.strerror}")


def _texts(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """One caption, or a list of them."""
    value = record.get(name)
    if isinstance(value, list) and value:
        return tuple(text_of({name: each}, name) for each in value)
    return (text_of(record, name),)


def _label(record: Mapping[str, Any], name: str) -> str:
    return text_of(record, name) if record.get(name) not in (None, "") else ""


def _shard(path: Path, names: tuple[str, str, str], faults: Faults) -> Iterator[Picture]:
    """Items in the order of their last members, which stand side by side in usual shards."""
    held: dict[str, bytes] = {}
    stem = ""
    try:
        with tarfile.open(path) as shard:
            for member in shard:
                # A name's key ends at the first dot of its last part, so that folders may have dots.
                folder, _, last = member.name.rpartition("/")
                key, _, ending = last.partition(".")
                if not member.isfile() or not key or ending.lower() not in (*IMAGES, *TEXTS):
                    continue
                if f"{folder}/{key}" != stem:
                    yield from _item(f"{path}, {stem}", held, names, faults)
                    held, stem = {}, f"{folder}/{key}"
                file = shard.extractfile(member)
                held[ending.lower()] = file.read() if file is not None else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"is not a whole tar file: {error}.", str(path), "Fetch it again.") from None
    yield from _item(f"{path}, {stem}", held, names, faults)


def _item(place: str, held: dict[str, bytes], names: tuple[str, str, str], faults: Faults) -> Iterator[Picture]:
    if not held:
        return
    faults.total += 1
    content = next((held[kind] for kind in IMAGES if kind in held), None)
    try:
        record = json.loads(held["json"]) if "json" in held else {}
        if not isinstance(record, dict):
            raise ValueError("its .json is not a record")
        if "txt" in held:
            record[names[1]] = [line for line in held["txt"].decode().splitlines() if line.strip()]
        if "cls" in held:
            record[names[2]] = held["cls"].decode().strip()
        if content is None:
            raise ValueError("has no image")
        yield Picture(place, content, _texts(record, names[1]), _label(record, names[2]))
    except (ValueError, RecursionError) as error:
        faults.add(place, str(error))
