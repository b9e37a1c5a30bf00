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
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scrimp.errors import UserError
from scrimp.sharding import cut_of, sharded, whole
from scrimp.world import ALONE, World

if TYPE_CHECKING:
    from scrimp.technique import State

PARTIAL = ".partial-"
ASIDE = f"{PARTIAL}old-"
"""Before the name of a snapshot that is being replaced."""


def save(folder: Path, state: State, meta: Mapping[str, Any], world: World = ALONE) -> Path:
    """Write a snapshot. Of several ranks each writes a share of the tensors, whole, so that any mesh can resume it.

    Args:
        folder: where it shall be; a snapshot of that name is replaced.
        state: `{kind: {name: tensor}}`. Kinds up to the first dot share a file.
        meta: JSON.
        world: the ranks that save together; all must call.
    Raises:
        UserError: if the disk is full or the folder cannot be written, on any rank; no earlier snapshot is touched.
    """
    partial = folder.parent / f"{PARTIAL}{folder.name}"
    files = _files(state, world)
    try:
        _together(world, lambda: _begin(partial) if world.first else None)
        digests = _together(world, lambda: _write(partial, files))
        found = {name: digest for told in world.gathered(digests) for name, digest in told.items()}
        _together(world, lambda: _finish(partial, folder, meta, found) if world.first else None)
    except OSError as error:
        if world.first:
            with suppress(OSError):
                clear(folder.parent)
        fix = "Earlier checkpoints are intact. Free some space, or set `out` to another disk, then use --resume."
        raise UserError(f"cannot write the checkpoint: {error}.", str(folder), fix) from error
    return folder


def _together(world: World, job: Callable[[], Any]) -> Any:
    """Do a job on every rank; where it fails on one, it fails on all.

    Raises:
        OSError: with the reason, and the rank where there are several.
    """
    found, fault = None, ""
    try:
        found = job()
    except (OSError, SafetensorError) as error:
        fault = getattr(error, "strerror", None) or str(error)
    for rank, told in enumerate(world.gathered(fault)):
        if told:
            raise OSError(told if world.size == 1 else f"rank {rank}: {told}")
    return found


def _files(state: State, world: World) -> dict[str, dict[str, Tensor]]:
    """This rank's share of a state, by file. What several ranks hold is shared out evenly among them."""
    named = {(kind, name): t for kind, tensors in state.items() for name, t in tensors.items()}
    holders: dict[tuple[str, str], list[int]] = {}
    for rank, names in enumerate(world.gathered(list(named))):
        for name in names:
            holders.setdefault(name, []).append(rank)
    files: dict[str, dict[str, Tensor]] = {}
    for i, (name, ranks) in enumerate(holders.items()):
        if name not in named:
            continue
        own, tensor = named[name], whole(named[name])
        if ranks[i % len(ranks)] == world.rank:
            # What was put together from parts waits for the disk on the host: the device has no room for it.
            tensor = tensor.cpu() if sharded(own) or cut_of(own) is not None else tensor
            part, _, rest = name[0].partition(".")
            file = f"{part}.safetensors" if world.size == 1 else f"{part}-{world.rank:05d}.safetensors"
            files.setdefault(file, {})[f"{rest}/{name[1]}" if rest else name[1]] = tensor.contiguous()
    return files


def _begin(partial: Path) -> None:
    clear(partial.parent)
    partial.mkdir(parents=True)


def _write(partial: Path, files: Mapping[str, dict[str, Tensor]]) -> dict[str, str]:
    """Tensors to disk; returns the checksum of each file."""
    digests: dict[str, str] = {}
    for name, tensors in files.items():
        save_tensors(tensors, partial / name)
        digests[name] = digest(partial / name)
        _flush(partial / name)
    return digests


def _finish(partial: Path, folder: Path, meta: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """What is no tensor, then the name under which the snapshot is complete."""
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


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the rights that other new files get; `save_file` alone leaves it to its owner only."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(stat.S_IMODE(mode))


def load(folder: Path, world: World = ALONE) -> tuple[State, dict[str, Any]]:
    """Read a snapshot and verify it. Tensors are memory-mapped until they are used.

    Args:
        world: the ranks that load together; all must call, and each verifies a share of the files for all.
    Raises:
        UserError: if a file is missing, truncated or altered, by name, with the snapshot before it.
    """
    if not folder.exists() and _aside(folder).exists():
        folder = _aside(folder)
    meta, files = _read_state(folder)
    own = dict(list(files.items())[world.rank :: world.size])
    for name, how in (fault for faults in world.gathered(_faults(folder, own)) for fault in faults):
        raise _damaged(folder, name, how)
    state: State = {}
    for name in files:
        path = folder / name
        part = path.stem.partition("-")[0]
        for key, tensor in load_file(path).items():
            rest, slash, parameter = key.partition("/")
            kind, parameter = (f"{part}.{rest}", parameter) if slash else (part, key)
            state.setdefault(kind, {})[parameter] = tensor  # type: ignore[index]
    return state, meta


def _faults(folder: Path, files: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, how it is damaged) of files that are not as their checksums say."""
    found: list[tuple[str, str]] = []
    for name, expected in files.items():
        if not (folder / name).is_file():
            found.append((name, "is missing"))
        elif digest(folder / name) != expected:
            found.append((name, "is truncated or altered (its checksum differs)"))
    return found


def meta(folder: Path) -> dict[str, Any]:
    """What a snapshot holds beside tensors.

    Raises:
        UserError: if it is damaged.
    """
    return _read_state(folder if folder.exists() else _aside(folder))[0]


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
