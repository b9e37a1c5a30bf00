"""Hugging Face folders in and out: config.json and safetensors, sharded too, without importing transformers.

Families: GPT-2, Llama, Mistral, Qwen2, Qwen3. `hub_names.py` says how each calls its options and its tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scrimp.errors import UserError, did_you_mean
from scrimp.models.hub_names import FAMILIES, family_of, options_from, options_to, tensors

if TYPE_CHECKING:
    from scrimp.models.transformer import TransformerConfig

MARK = "scrimp"
"""Key of config.json by which our own folders are known, so that they may be written again."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """The options of a folder's model.

    Raises:
        UserError: if there is no config.json, or it asks for something the Transformer does not do.
    """
    raw = _config(Path(folder))
    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        fix = did_you_mean(family, FAMILIES)
        raise UserError(f"models of type `{family}` cannot be read.", f"{folder}/config.json", fix)
    return options_from(family, raw, f"{folder}/config.json")


def read_weights(folder: str | Path, config: TransformerConfig) -> dict[str, Tensor]:
    """A folder's weights under our names, memory-mapped.

    Raises:
        UserError: with every missing, unexpected and misshapen tensor, by the folder's names.
    """
    folder = Path(folder)
    family = str(_config(folder).get("model_type"))
    expected = tensors(family, config)
    held = _open(folder)
    prefix = _prefix(family, set(held), set(expected))
    ignored = {"lm_head.weight"} if config.tied else set[str]()
    names = {name.removeprefix(prefix) if prefix and name.startswith(prefix) else name: name for name in held}
    wanted = {name.removeprefix(_root(family)): name for name in expected}
    found = {w: names.get(w) or names.get(full) for w, full in wanted.items()}
    missing = [full for w, full in wanted.items() if found[w] is None]
    used = {name for name in found.values() if name}
    unexpected = [n for n in held if n not in used and n not in ignored and not _harmless(n)]
    wrong: list[str] = []
    read: dict[str, Tensor] = {}
    for short, full in wanted.items():
        name = found[short]
        if name is None:
            continue
        shape = tuple(expected[full])
        tensor = held[name]()
        if tuple(tensor.shape) != shape:
            wrong.append(f"{name} {list(tensor.shape)} instead of {list(shape)}")
        read[full] = tensor
    if missing or unexpected or wrong:
        parts = (("missing", missing), ("unexpected", unexpected), ("misshapen", wrong))
        what = "; ".join(f"{kind}: {', '.join(rows)}" for kind, rows in parts if rows)
        raise UserError(f"the weights do not fit the configuration. {what}.", str(folder))
    return FAMILIES[family].read(read, config)


def write(
    folder: str | Path,
    config: TransformerConfig,
    named: Mapping[str, Tensor],
    tokenizer: Any = None,
    family: str = "",
    shard_bytes: int = 5_000_000_000,
) -> str:
    """Write a folder that `transformers` loads; returns its family.

    Args:
        named: weights under our names; a tied head is absent.
        tokenizer: with `save(folder)` and `end`, or None.
        family: which one, where several can hold the model; chosen from the options when empty.
        shard_bytes: largest file.
    Raises:
        UserError: if no family can hold the model, or the folder holds something else.
    """
    folder = Path(folder)
    family = family or family_of(config)
    theirs = {n: t.contiguous() for n, t in FAMILIES[family].write(dict(named), config).items()}
    expected = tensors(family, config)
    off = sorted(set(expected) ^ set(theirs))
    if off:
        what = f"the trained weights are not those of a {family} model: {', '.join(off[:6])}."
        raise UserError(what, str(folder), "A technique changed the architecture in a way that format cannot say.")
    if folder.exists() and any(folder.iterdir()) and MARK not in _config(folder, missing={}):
        raise UserError("is not empty and was not written by scrimp.", str(folder), "Choose another folder.")
    partial = folder.parent / f".partial-{folder.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    raw = options_to(family, config) | {MARK: True, "dtype": str(next(iter(theirs.values())).dtype)[6:]}
    if tokenizer is not None:
        raw |= {"bos_token_id": tokenizer.end, "eos_token_id": tokenizer.end}
        tokenizer.save(partial)
    (partial / "config.json").write_text(json.dumps(raw, indent=2))
    _save(partial, theirs, shard_bytes)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return family


def _config(folder: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise UserError("there is no config.json.", str(folder), "Give a Hugging Face model folder.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"is not valid JSON: {error}.", f"{folder}/config.json") from None


def _open(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """name -> how to read it, over all shards."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    held: dict[str, Callable[[], Tensor]] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            fix = "Convert it to safetensors first." if list(folder.glob("*.bin")) else "Fetch the whole folder."
            raise UserError(f"{name} is missing.", str(folder), fix)
        handle = safe_open(path, framework="pt")
        for key in handle.keys():  # noqa: SIM118
            held[key] = lambda handle=handle, key=key: handle.get_tensor(key)
    return held


def _root(family: str) -> str:
    return FAMILIES[family].root


def _prefix(family: str, held: set[str], expected: set[str]) -> str:
    """Base models are saved without the root (`h.0...` instead of `transformer.h.0...`)."""
    root = _root(family)
    return root if any(name.startswith(root) for name in held) else ""


def _harmless(name: str) -> bool:
    """Buffers that older versions saved."""
    return name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))


def _save(folder: Path, named: Mapping[str, Tensor], shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in named.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
    total = sum(t.nbytes for t in named.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def loaded(folder: str | Path) -> torch.nn.Module:
    """A folder's model with its weights, in float32, for use outside a run."""
    from scrimp.models.transformer import TransformerConfig

    config = TransformerConfig(**read_config(folder))
    model = config.build()
    weights = read_weights(folder, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model
