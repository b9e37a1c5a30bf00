"""Hugging Face folders in and out: config.json and safetensors, sharded too, without importing transformers.

`hub_formats.py` says which families there are, which model each holds, and which file says how it calls its options and
tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from scrimp.errors import UserError, did_you_mean
from scrimp.models.hub_files import (
    INDEX,
    MARK,
    Held,
    misfit,
    open_weights,
    read_json,
    refuse_foreign,
    replace_folder,
    save_weights,
    write_json,
)
from scrimp.models.hub_formats import Format, choose, format_of, kind_of, known
from scrimp.registry import component, component_name

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "INDEX",
    "loaded",
    "own_config",
    "read_config",
    "read_kind",
    "read_labels",
    "read_type",
    "read_weights",
    "write",
]


def read_config(folder: str | Path) -> dict[str, Any]:
    """The options of a folder's model; of an encoder without the head, which a task chooses.

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


def own_config(folder: str | Path, config: Any) -> Any:
    """The options of a folder's own model, where it may differ from the one that takes its weights; else the latter's.

    An image model may get another head, another size of images, or be the encoder of a masked autoencoder.
    """
    return _own(Path(folder)) if format_of(_config(Path(folder))[0]).reshaped else config


def read_type(folder: str | Path) -> str:
    """The `model_type` of a folder.

    Raises:
        UserError: if there is no config.json, or of a type that cannot be read.
    """
    return _config(Path(folder))[0]


def read_labels(folder: str | Path) -> tuple[str, ...]:
    """The names of a classifier's classes, in their order; those that transformers makes up where a file is silent."""
    raw = _config(Path(folder))[1]
    table = raw.get("id2label")
    if isinstance(table, Mapping) and table:
        return tuple(str(name) for _, name in sorted(table.items(), key=lambda pair: int(pair[0])))
    return tuple(f"LABEL_{i}" for i in range(int(raw.get("num_labels") or 2)))


def read_weights(folder: str | Path, config: Any) -> dict[str, Tensor]:
    """A folder's weights under our names, in the types of its files and memory-mapped until they are used.

    Only what is fused here, such as q, k and v, is copied. Copies of a tied embedding are left out, and so is an
    encoder's head that the folder does not have, or has in another shape.

    Raises:
        UserError: with every missing, unexpected and misshapen tensor, by the folder's names.
    """
    folder = Path(folder)
    form, held = format_of(_config(folder)[0]), open_weights(folder)
    expected = form.tensors(config)
    # Base models are saved without the root: `h.0...` instead of `transformer.h.0...`.
    root = "" if any(name.startswith(form.root) for name in held) else form.root
    full = {form.spelled(name.removeprefix(root), held): name for name in expected}
    wanted = {short: expected[name] for short, name in full.items()}
    spare = {name: held.pop(name) for name in [n.removeprefix(root) for n in (*form.copies(config), *form.zeros)]
             if name in held}  # fmt: skip
    shapes = {name: found.shape for name, found in held.items()}
    if form.heads:
        wanted, others = _settled(wanted, shapes, form.heads)
        shapes = {name: shape for name, shape in shapes.items() if name not in others}
    faults = misfit(wanted, shapes)
    if faults:
        raise UserError(f"the weights do not fit the configuration. {faults}.", str(folder))
    weights = form.read({full[name]: held[name].tensor() for name in wanted}, config)
    if getattr(config, "head", "") not in ("classes", "none"):
        _check_spare(spare, weights, form, folder)
    return weights


def _settled(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], heads: tuple[str, ...]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """What is read of a folder: everything of the trunk, and of the head the layers that are there and fit.

    Returns:
        The tensors to read, and the names of the folder's that are left out, as they belong to another head.
    """
    layers: dict[str, bool] = {}
    for name, shape in wanted.items():
        stem = name.rpartition(".")[0]
        layers[stem] = layers.get(stem, True) and (not name.startswith(heads) or given.get(name) == shape)
    kept = {name: shape for name, shape in wanted.items() if layers[name.rpartition(".")[0]]}
    return kept, [name for name in given if name not in kept and name.startswith(heads)]


def _check_spare(spare: Mapping[str, Held], weights: Mapping[str, Tensor], form: Format, folder: Path) -> None:
    """Whether what is left out says nothing of its own."""
    for name, found in spare.items():
        tensor = found.tensor()
        if name in form.zeros and tensor.any():
            raise UserError(f"{name} is not zero, and the model has none.", str(folder))
        if name not in form.zeros and not torch.equal(tensor, weights["embed.weight"]):
            fix = "Set `tie_word_embeddings` to false in config.json, if the head shall be kept."
            raise UserError(f"{name} differs from the embedding, to which config.json ties it.", str(folder), fix)


def loaded(folder: str | Path) -> nn.Module:
    """A folder's model with its weights and its own head, in float32, for use outside a run."""
    config = _own(Path(folder))
    model = config.build()
    weights = read_weights(folder, config)
    own = dict(model.named_parameters())
    if absent := [name for name in own if name not in weights]:
        raise UserError(f"the folder lacks what its architecture has: {', '.join(absent)}.", str(folder))
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name])
    return model


def write(
    folder: str | Path,
    config: Any,
    named: Mapping[str, Tensor],
    tokenizer: Any = None,
    family: str = "",
    shard_bytes: int = 5_000_000_000,
    labels: Sequence[str] = (),
) -> str:
    """Write a folder that `transformers` loads; returns its family. An earlier export is replaced once all is written.

    transformers 5 gives Qwen2 folders Qwen's own way of splitting text, whatever tokenizer they hold: load another
    tokenizer there by `PreTrainedTokenizerFast`, not by `AutoTokenizer`.

    Args:
        named: weights under our names; a tied head may be absent.
        tokenizer: with `save(folder)`, and with `end` and `decode` for the special tokens; or None. Of an image model,
            what prepares its images, with the names of its `classes`.
        family: which one, where several can hold the model; chosen from the options when empty.
        shard_bytes: largest file, unless a single tensor is larger.
        labels: names of a classifier's classes, in their order.
    Raises:
        UserError: if no family can hold the model, the weights are not the model's, the folder holds something else,
            or it cannot be written.
    """
    folder = Path(folder).resolve()
    family = choose(component_name("models", config), config, family)
    form = format_of(family)
    raw = form.options_to(config, labels or getattr(tokenizer, "classes", ()))
    theirs = form.write(_checked(config, named, folder), config)
    refuse_foreign(folder)
    partial = folder.parent / f".partial-{folder.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_weights(partial, theirs, shard_bytes)
        raw |= form.inputs(partial, config, tokenizer, raw)
        dtype = str(next(iter(theirs.values())).dtype).removeprefix("torch.")
        files = sorted([*(p.name for p in partial.iterdir()), "config.json"])
        # Before 4.56, transformers called the type torch_dtype.
        write_json(partial / "config.json", raw | {"dtype": dtype, "torch_dtype": dtype, MARK: files})
        replace_folder(folder, partial)
    except (OSError, SafetensorError) as error:
        fix = "Free some space or choose another folder."
        raise UserError(f"cannot be written: {error}.", str(folder), fix) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return family


def _config(folder: Path) -> tuple[str, dict[str, Any]]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError("there is no config.json.", str(folder), "Give a Hugging Face model folder.")
    raw = read_json(path)
    family = str(raw.get("model_type"))
    if family not in known():
        raise UserError(f"models of type `{family}` cannot be read.", str(path), did_you_mean(family, known()))
    return family, raw


def _own(folder: Path) -> Any:
    """The options of a folder's model, with the head that its files say."""
    model_type, raw = _config(folder)
    form = format_of(model_type)
    options = form.options_from(raw, f"{folder}/config.json")
    options |= form.head_from(raw, list(open_weights(folder)))
    return component("models", kind_of(model_type), "model")(**options)


def _checked(config: Any, named: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights, if they are exactly the model's; a tied head that equals the embedding is dropped."""
    ours = {name: tensor.detach() for name, tensor in named.items()}
    head = ours.get("head.weight") if getattr(config, "tied", False) else None
    if head is not None and torch.equal(head, ours["embed.weight"]):
        del ours["head.weight"]
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in config.build().named_parameters()}
    faults = misfit(wanted, {name: tuple(tensor.shape) for name, tensor in ours.items()})
    if faults:
        fix = "A technique may have changed the architecture in a way that the format cannot say."
        raise UserError(f"the weights are not those of the model. {faults}.", str(folder), fix)
    return ours
