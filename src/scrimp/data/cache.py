"""A cache of built corpora: folders named by content, which appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from scrimp.errors import UserError

PARTIAL: Final = ".partial-"
STALE: Final = 24 * 3600
"""Seconds after which a folder that nobody writes to is taken for what a killed builder left."""
FRESH: Final = 2
"""Seconds within which a second change of a file may leave its time of change as it is."""


def cache_folder(cache: str, kind: str) -> Path:
    """The folder of built corpora of a kind, made if it is not there.

    Args:
        cache: as in the settings; empty means $SCRIMP_CACHE, or else ~/.cache/scrimp.
    """
    root = Path(cache or os.environ.get("SCRIMP_CACHE") or "~/.cache/scrimp").expanduser() / kind
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache cannot be made: {error}.", "data.cache", "Set it or $SCRIMP_CACHE.") from None
    return root


def content_hash(files: list[Path], root: Path) -> list[str]:
    """A hash of each file's content, remembered by path, size and time of change so that a second start is fast.

    Raises:
        UserError: if a file cannot be read.
    """
    memory = root / "hashes.json"
    known: dict[str, str] = _json(memory) or {}
    found: list[str] = []
    added = False
    for path in files:
        try:
            stat = path.stat()
            key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
            value = known.get(key)
            if value is None:
                with path.open("rb") as file:
                    value = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
                if time.time() - stat.st_mtime > FRESH:
                    known[key] = value
                    added = True
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}.", str(path)) from None
        found.append(value)
    if added:
        # Two builders may lose each other's lines, and a shared cache may be read-only: then files are hashed again.
        with contextlib.suppress(OSError):
            fresh = root / f"{PARTIAL}{uuid4().hex}.json"
            fresh.write_text(json.dumps(known))
            fresh.replace(memory)
    return found


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What `publish` wrote of a folder, or None if it is not there or a file is not as large as it was."""
    meta = _json(folder / "meta.json")
    try:
        if meta and all((folder / name).stat().st_size == size for name, size in meta["files"].items()):
            return meta
    except (OSError, KeyError, AttributeError):
        pass
    return None


def publish(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Fill a temporary folder, put it on the disk for good, and only then give it its name.

    A reader never sees a part, whenever the builder is killed. Of two builders at once, the first to finish wins.

    Args:
        fill: writes files into an empty folder and returns what to say about them.
    Returns:
        What `fill` returned, with the files' sizes in bytes as "files": the folder's meta.json.
    """
    root = folder.parent
    _sweep(root)
    partial = root / f"{PARTIAL}{uuid4().hex}"
    try:
        _set_aside(folder)
        partial.mkdir()
        meta = fill(partial)
        meta |= {"files": {path.name: path.stat().st_size for path in sorted(partial.iterdir())}}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
        for path in (*partial.iterdir(), partial):
            _sync(path)
        try:
            partial.rename(folder)
        except OSError:
            if read_meta(folder) is None:
                raise
        _sync(root)
        return read_meta(folder) or meta
    except OSError as error:
        raise UserError(f"the data could not be built: {error}.", str(root), "Set `data.cache` elsewhere?") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _set_aside(folder: Path) -> None:
    """Take a damaged folder out of the way. Before the build, so that no other builder's is taken for it after."""
    if folder.exists() and read_meta(folder) is None:
        damaged = folder.parent / f"{PARTIAL}{uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove what killed builders left."""
    for left in root.glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (left, *left.glob("*")))
            if time.time() - newest > STALE:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _sync(path: Path) -> None:
    """Have the system put a file or a folder on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
