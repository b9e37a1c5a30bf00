# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Atomic snapshots without pickle: safetensors for tensors, JSON for the rest, a checksum for each file.

A snapshot is written under a temporary name, flushed to disk, and renamed. A name without the temporary prefix is
therefore always complete. One that is replaced steps aside under another name, and stands in for the new one until that
is there. What a killed process left behind is removed by the next save.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scrimp.errors import UserError

if TYPE_CHECKING:
    from scrimp.technique import State

PARTIAL = ".partial-"
ASIDE = f"{PARTIAL}old-"
"""Before the name of a snapshot that is being replaced."""


def save(folder: Path, state: State, meta: Mapping[str, Any]) -> Path:
    """Write a snapshot.

    Args:
        folder: where it shall be; a snapshot of that name is replaced.
        state: `{kind: {name: tensor}}`. Kinds up to the first dot share a file.
        meta: JSON.
    Raises:
        UserError: if the disk is full or the folder cannot be written; no earlier snapshot is touched.
    """
    partial = folder.parent / f"{PARTIAL}{folder.name}"
    try:
        clear(folder.parent)
        partial.mkdir(parents=True)
        files: dict[str, dict[str, Tensor]] = {}
        for kind, tensors in state.items():
            part, _, rest = kind.partition(".")
            flat = {f"{rest}/{name}" if rest else name: t.detach().contiguous() for name, t in tensors.items()}
            files.setdefault(part, {}).update(flat)
        digests: dict[str, str] = {}
        for part, tensors in files.items():
            path = partial / f"{part}.safetensors"
            save_tensors(tensors, path)
            digests[path.name] = digest(path)
            _flush(path)
        text = json.dumps({"meta": meta, "files": digests}, indent=1)
        state_file = partial / "state.json"
        head = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest()})
        state_file.write_text(f"{head}\n{text}", encoding="utf-8")
        _flush(state_file)
        _flush(partial)
        if folder.exists():
            folder.rename(_aside(folder))
        partial.rename(folder)
        _flush(folder.parent)
        shutil.rmtree(_aside(folder), ignore_errors=True)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            clear(folder.parent)
        reason = getattr(error, "strerror", None) or str(error)
        fix = "Earlier checkpoints are intact. Free some space, or set `out` to another disk, then use --resume."
        raise UserError(f"cannot write the checkpoint: {reason}.", str(folder), fix) from error
    return folder


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the rights that other new files get; `save_file` alone leaves it to its owner only."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(stat.S_IMODE(mode))


def load(folder: Path) -> tuple[State, dict[str, Any]]:
    """Read a snapshot and verify it. Tensors are memory-mapped until they are used.

    Raises:
        UserError: if a file is missing, truncated or altered, by name, with the snapshot before it.
    """
    if not folder.exists() and _aside(folder).exists():
        folder = _aside(folder)
    meta, files = _read_state(folder)
    state: State = {}
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, name, "is missing")
        if digest(path) != expected:
            raise _damaged(folder, name, "is truncated or altered (its checksum differs)")
        part = path.stem
        for key, tensor in load_file(path).items():
            rest, slash, parameter = key.partition("/")
            kind, parameter = (f"{part}.{rest}", parameter) if slash else (part, key)
            state.setdefault(kind, {})[parameter] = tensor  # type: ignore[index]
    return state, meta


def identity(folder: Path) -> str:
    """A hash of a snapshot's state.json, which holds the checksums of all its files."""
    if not folder.exists() and _aside(folder).exists():
        folder = _aside(folder)
    try:
        return digest(folder / "state.json")
    except FileNotFoundError:
        raise _damaged(folder, "state.json", "is missing") from None


def _read_state(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        head, _, text = (folder / "state.json").read_text(encoding="utf-8").partition("\n")
        if json.loads(head)["sha256"] != hashlib.sha256(text.encode()).hexdigest():
            raise _damaged(folder, "state.json", "is altered (its checksum differs)")
        content = json.loads(text)
        return content["meta"], content["files"]
    except FileNotFoundError:
        raise _damaged(folder, "state.json", "is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise _damaged(folder, "state.json", "is truncated or altered") from None


def _damaged(folder: Path, name: str, how: str) -> UserError:
    before = [s for s in snapshots(folder.parent) if s.name < folder.name]
    fix = "There is no earlier checkpoint."
    if before:
        fix = f"Resume from the one before it: scrimp train --resume {before[-1]}"
    return UserError(f"{name} {how}.", str(folder), fix)


def snapshots(folder: Path) -> list[Path]:
    """Complete snapshots in a folder, oldest first; `load` reads each, also one that stepped aside."""
    names = {path.name.removeprefix(ASIDE) for path in folder.glob("*step-*") if path.is_dir()}
    return sorted(folder / name for name in names if name.startswith("step-"))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` snapshots."""
    for path in snapshots(folder)[: -max(keep, 1)]:
        remove(path)


def remove(folder: Path) -> None:
    """Delete a snapshot, under another name first, so that no half-deleted folder has a complete one's."""
    partial = folder.parent / f"{PARTIAL}{folder.name}"
    for path in (_aside(folder), folder):
        with suppress(OSError):
            path.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what killed or failed saves left; a snapshot that stepped aside for one that never came goes back."""
    for path in folder.glob(f"{PARTIAL}*"):
        place = folder / path.name.removeprefix(ASIDE)
        if path.name.startswith(ASIDE) and not place.exists():
            path.rename(place)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _aside(folder: Path) -> Path:
    return folder.parent / f"{ASIDE}{folder.name}"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
