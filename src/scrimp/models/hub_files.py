"""The files of a Hugging Face folder: JSON and safetensors, in one file or in several with an index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from scrimp.checkpoint import save_tensors
from scrimp.errors import UserError

MARK: Final = "scrimp"
"""Key of config.json that lists the files of a folder that we wrote, so that it may be written again."""
INDEX: Final = "model.safetensors.index.json"
BUFFERS: Final = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", "embeddings.position_ids")
"""Endings of what older versions saved beside the weights."""
OLD_NAMES: Final = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
"""Endings of BERT's first checkpoints, which came from TensorFlow, and what they became."""


@dataclass(frozen=True)
class Held:
    """A tensor in an open file."""

    file: Any
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Without reading it."""
        return tuple(self.file.get_slice(self.key).get_shape())

    def tensor(self) -> Tensor:
        """Memory-mapped."""
        return self.file.get_tensor(self.key)


def read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"is not valid JSON: {error}.", str(path)) from None
    if not isinstance(raw, dict):
        raise UserError("is not a JSON object.", str(path))
    return raw


def _newer(name: str) -> str:
    return next((name.removesuffix(old) + new for old, new in OLD_NAMES.items() if name.endswith(old)), name)


def open_weights(folder: Path) -> dict[str, Held]:
    """name -> where it is, over all shards; buffers are left out."""
    files = ["model.safetensors"]
    if (folder / INDEX).is_file():
        files = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
    held: dict[str, Held] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            fix = "Convert it to safetensors first." if list(folder.glob("*.bin")) else "Fetch the whole folder."
            raise UserError(f"{name} is missing.", str(folder), fix)
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"is not a safetensors file: {error}.", str(path), "Fetch it again.") from None
        held |= {_newer(key): Held(file, key) for key in file.keys() if not key.endswith(BUFFERS)}  # noqa: SIM118
    return held


def misfit(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], listed: int = 20) -> str:
    """What is missing, unexpected and misshapen, or nothing."""
    lists = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "misshapen": [f"{name} {list(shape)} instead of {list(wanted[name])}" for name, shape in given.items()
                      if name in wanted and shape != wanted[name]],
    }  # fmt: skip
    parts = [f"{kind}: {', '.join(found[:listed])}" + (f" and {len(found) - listed} more" if found[listed:] else "")
             for kind, found in lists.items() if found]  # fmt: skip
    return "; ".join(parts)


def refuse_foreign(folder: Path) -> None:
    """Only an empty folder, or one whose every file we wrote, may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError("is a file.", str(folder), "Choose a folder.")
    config = folder / "config.json"
    mark = read_json(config).get(MARK) if config.is_file() else None
    ours = mark if isinstance(mark, list) else []
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in ours)
    if foreign:
        what = f"is not empty and holds what scrimp did not write: {', '.join(foreign[:6])}."
        raise UserError(what, str(folder), "Choose another folder.")


def save_weights(folder: Path, named: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Weights in one file, or in several with an index; only one file's transposed copies exist at a time."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in named.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    where: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_tensors({n: named[n].contiguous() for n in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in named.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def replace_folder(folder: Path, partial: Path) -> None:
    """Put a finished folder into place; the one before is deleted last."""
    before = folder.parent / f".before-{folder.name}"
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    partial.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A file of JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
