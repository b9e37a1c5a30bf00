"""Hugging Face folders in and out: config.json and safetensors, sharded too, without importing transformers.

Families: GPT-2, Llama, Mistral, Qwen2, Qwen3, BART, CLIP. `hub_formats.py` says which model each holds, and how it
calls its options and tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scrimp.checkpoint import save_tensors
from scrimp.data.tokenizer import frame_texts
from scrimp.errors import UserError, did_you_mean
from scrimp.models.hub_formats import Format, choose, format_of, kind_of, known
from scrimp.registry import component, component_name

if TYPE_CHECKING:
    from torch import nn

MARK: Final = "scrimp"
"""Key of config.json that lists the files of a folder that we wrote, so that it may be written again."""
INDEX: Final = "model.safetensors.index.json"
BUFFERS: Final = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".embeddings.position_ids")
"""Endings of what older versions saved beside the weights."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """The options of a folder's model.

    Raises:
        UserError: if there is no config.json, or it asks for something that the model does not do.
    """
    model_type, raw = _config(Path(folder))
    return format_of(model_type).options_from(raw, f"{folder}/config.json")


def read_kind(folder: str | Path) -> str:
    """The name of the model that a folder holds, as recipes call it.

    Raises:
        UserError: if there is no config.json, or of a type that cannot be read.
    """
    return kind_of(_config(Path(folder))[0])


def read_weights(folder: str | Path, config: Any) -> dict[str, Tensor]:
    """A folder's weights under our names, in the types of its files and memory-mapped until they are used.

    Only what is fused here, such as q, k and v, is copied. Copies of a tied embedding are left out.

    Raises:
        UserError: with every missing, unexpected and misshapen tensor, by the folder's names.
    """
    folder = Path(folder)
    form = format_of(_config(folder)[0])
    expected, copies = form.tensors(config), form.copies(config)
    held = _open(folder)
    # Base models are saved without the root: `h.0...` instead of `transformer.h.0...`.
    root = "" if any(name.startswith(form.root) for name in held) else form.root
    wanted = {name.removeprefix(root): name for name in expected}
    spare = {name: held.pop(name) for name in [n.removeprefix(root) for n in (*copies, *form.zeros)] if name in held}
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in held.items()}
    faults = _misfit({name: expected[full] for name, full in wanted.items()}, shapes)
    if faults:
        raise UserError(f"the weights do not fit the configuration. {faults}.", str(folder))
    weights = form.read({full: held[name].get_tensor(name) for name, full in wanted.items()}, config)
    for name, file in spare.items():
        if name in form.zeros and file.get_tensor(name).any():
            raise UserError(f"{name} is not zero, and the model has none.", str(folder))
        if name not in form.zeros and not torch.equal(file.get_tensor(name), weights["embed.weight"]):
            fix = "Set `tie_word_embeddings` to false in config.json, if the head shall be kept."
            raise UserError(f"{name} differs from the embedding, to which config.json ties it.", str(folder), fix)
    return weights


def loaded(folder: str | Path) -> nn.Module:
    """A folder's model with its weights, in float32, for use outside a run."""
    config = component("models", read_kind(folder), "model")(**read_config(folder))
    model = config.build()
    weights = read_weights(folder, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model


def write(
    folder: str | Path,
    config: Any,
    named: Mapping[str, Tensor],
    tokenizer: Any = None,
    family: str = "",
    shard_bytes: int = 5_000_000_000,
) -> str:
    """Write a folder that `transformers` loads; returns its family. An earlier export is replaced once all is written.

    transformers 5 gives Qwen2 folders Qwen's own way of splitting text, whatever tokenizer they hold: load another
    tokenizer there by `PreTrainedTokenizerFast`, not by `AutoTokenizer`.

    Args:
        named: weights under our names; a tied head may be absent.
        tokenizer: with `save(folder)`, and with `end` and `decode` for the special tokens; or None.
        family: which one, where several can hold the model; chosen from the options when empty.
        shard_bytes: largest file, unless a single tensor is larger.
    Raises:
        UserError: if no family can hold the model, the weights are not the model's, the folder holds something else,
            or it cannot be written.
    """
    folder = Path(folder).resolve()
    family = choose(component_name("models", config), config, family)
    form = format_of(family)
    raw = form.options_to(config)
    theirs = form.write(_checked(config, named, folder), config)
    _refuse_foreign(folder)
    partial = folder.parent / f".partial-{folder.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _save(partial, theirs, shard_bytes)
        raw = raw | _special(partial, raw, config, tokenizer, form)
        dtype = str(next(iter(theirs.values())).dtype).removeprefix("torch.")
        files = sorted([*(p.name for p in partial.iterdir()), "config.json"])
        # Before 4.56, transformers called the type torch_dtype.
        _write_json(partial / "config.json", raw | {"dtype": dtype, "torch_dtype": dtype, MARK: files})
        _replace(folder, partial)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        fix = "Free some space or choose another folder."
        raise UserError(f"cannot be written: {error}.", str(folder), fix) from error
    return family


def _config(folder: Path) -> tuple[str, dict[str, Any]]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError("there is no config.json.", str(folder), "Give a Hugging Face model folder.")
    raw = _read_json(path)
    family = str(raw.get("model_type"))
    if family not in known():
        raise UserError(f"models of type `{family}` cannot be read.", str(path), did_you_mean(family, known()))
    return family, raw


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"is not valid JSON: {error}.", str(path)) from None
    if not isinstance(raw, dict):
        raise UserError("is not a JSON object.", str(path))
    return raw


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _open(folder: Path) -> dict[str, Any]:
    """name -> the open file that holds it, over all shards; buffers are left out."""
    files = ["model.safetensors"]
    if (folder / INDEX).is_file():
        files = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
    held: dict[str, Any] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            fix = "Convert it to safetensors first." if list(folder.glob("*.bin")) else "Fetch the whole folder."
            raise UserError(f"{name} is missing.", str(folder), fix)
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"is not a safetensors file: {error}.", str(path), "Fetch it again.") from None
        held |= {key: file for key in file.keys() if not key.endswith(BUFFERS)}  # noqa: SIM118
    return held


def _misfit(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], listed: int = 20) -> str:
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


def _checked(config: Any, named: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights, if they are exactly the model's; a tied head that equals the embedding is dropped."""
    ours = {name: tensor.detach() for name, tensor in named.items()}
    head = ours.get("head.weight") if getattr(config, "tied", False) else None
    if head is not None and torch.equal(head, ours["embed.weight"]):
        del ours["head.weight"]
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in config.build().named_parameters()}
    faults = _misfit(wanted, {name: tuple(tensor.shape) for name, tensor in ours.items()})
    if faults:
        fix = "A technique may have changed the architecture in a way that the format cannot say."
        raise UserError(f"the weights are not those of the model. {faults}.", str(folder), fix)
    return ours


def _refuse_foreign(folder: Path) -> None:
    """Only an empty folder, or one whose every file we wrote, may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError("is a file.", str(folder), "Choose a folder.")
    config = folder / "config.json"
    mark = _read_json(config).get(MARK) if config.is_file() else None
    ours = mark if isinstance(mark, list) else []
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in ours)
    if foreign:
        what = f"is not empty and holds what scrimp did not write: {', '.join(foreign[:6])}."
        raise UserError(what, str(folder), "Choose another folder.")


def _special(folder: Path, raw: dict[str, Any], config: Any, tokenizer: Any, form: Format) -> dict[str, Any]:
    """Write the tokenizer, and how to load and generate with it; returns what config.json says of special ids.

    The padding id is a matter of generation only: in config.json it would make transformers freeze the embedding of
    the end of text.
    """
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is None:
        return ids
    tokenizer.save(folder)
    end = getattr(tokenizer, "end", None)
    if end is None:
        return ids
    ids |= {"bos_token_id": end, "eos_token_id": end} | dict.fromkeys(form.special.get("", ()), end)
    _write_json(folder / "generation_config.json", ids | {"pad_token_id": end})
    sections = {name: raw[name] | dict.fromkeys(keys, end) for name, keys in form.special.items() if name}
    file, path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if file.is_file():
        frame_texts(file, end, after=form.ends)
    if file.is_file() and not path.exists():
        # Without a class, transformers takes the family's own and with it another way of splitting text.
        token = tokenizer.decode([end])
        inputs = ["input_ids", "attention_mask"]
        padding = {"pad_token": token} if form.ends else {}
        _write_json(path, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": token, "eos_token": token,
                           "model_max_length": config.context, "model_input_names": inputs,
                           "clean_up_tokenization_spaces": False, **padding})  # fmt: skip
    return ids | sections


def _save(folder: Path, named: Mapping[str, Tensor], shard_bytes: int) -> None:
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
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _replace(folder: Path, partial: Path) -> None:
    """Put a finished folder into place; the one before is deleted last."""
    before = folder.parent / f".before-{folder.name}"
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    partial.rename(folder)
    shutil.rmtree(before, ignore_errors=True)
