"""Hugging Face folders in and out: config.json and safetensors, sharded too, without importing transformers.

Families: GPT-2, Llama, Mistral, Qwen2, Qwen3, for which `hub_config.py` says how each calls its options and
`hub_names.py` how it calls its tensors; BERT, RoBERTa and XLM-RoBERTa, for which `hub_bert.py` says both; ViT and
ViTMAE likewise in `hub_vit.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scrimp.checkpoint import save_tensors
from scrimp.errors import UserError, did_you_mean
from scrimp.models import hub_bert, hub_vit
from scrimp.models.hub_config import family_of, options_from, options_to
from scrimp.models.hub_names import FAMILIES as DECODERS
from scrimp.models.hub_names import Family, tensors
from scrimp.models.hub_tokenizer import check_padding, special, write_json
from scrimp.models.patches import PatchConfig

MARK: Final = "scrimp"
"""Key of config.json that lists the files of a folder that we wrote, so that it may be written again."""
VISION: Final = {name: Family("vit.", hub_vit.read, hub_vit.write) for name in hub_vit.KINDS}
FAMILIES: Final[dict[str, Family]] = DECODERS | hub_bert.FAMILIES | VISION
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


def read_config(folder: str | Path) -> dict[str, Any]:
    """The options of a folder's model; of an encoder without the head, which a task chooses.

    Raises:
        UserError: if there is no config.json, or it asks for something the Transformer does not do.
    """
    family, raw = _family(Path(folder))
    read = hub_bert.options_from if family in hub_bert.FAMILIES else options_from
    return (hub_vit.options_from if family in VISION else read)(family, raw, f"{folder}/config.json")


def read_kind(folder: str | Path) -> str:
    """The name of the model that a folder holds, as recipes call it.

    Raises:
        UserError: if there is no config.json, or of a type that cannot be read.
    """
    return hub_vit.KINDS.get(_family(Path(folder))[0], "transformer")


def own_config(folder: str | Path, config: Any) -> Any:
    """The options of a folder's own model, where it may differ from the one that takes its weights; else the latter's.

    An image model may get another head, another size of images, or be the encoder of a masked autoencoder.
    """
    family, _ = _family(Path(folder))
    return hub_vit.own(family, read_config(folder), _open(Path(folder))) if family in VISION else config


def read_labels(folder: str | Path) -> tuple[str, ...]:
    """The names of a classifier's classes, in their order."""
    return hub_bert.labels_from(_family(Path(folder))[1])


def read_weights(folder: str | Path, config: Any) -> dict[str, Tensor]:
    """A folder's weights under our names, in the types of its files and memory-mapped until they are used.

    Only the fused q, k and v are copied. A tied head is left out, and so is an encoder's head that the folder does
    not have, or has in another shape.

    Raises:
        UserError: with every missing, unexpected and misshapen tensor, by the folder's names.
    """
    folder = Path(folder)
    model_type, _ = _family(folder)
    family, held = FAMILIES[model_type], _open(folder)
    encoder = model_type in hub_bert.FAMILIES
    named = hub_bert.tensors if encoder else hub_vit.tensors if model_type in VISION else tensors
    expected = named(model_type, config)
    # Base models are saved without the root: `h.0...` instead of `transformer.h.0...`.
    root = "" if any(name.startswith(family.root) for name in held) else family.root
    full = {hub_vit.spelled(name.removeprefix(root), held): name for name in expected}
    wanted = {short: expected[name] for short, name in full.items()}
    head = held.pop(family.head, None) if getattr(config, "tied", False) else None
    shapes = {name: found.shape for name, found in held.items()}
    if encoder:
        wanted, others = hub_bert.settled(wanted, shapes)
        shapes = {name: shape for name, shape in shapes.items() if name not in others}
    faults = _misfit(wanted, shapes)
    if faults:
        raise UserError(f"the weights do not fit the configuration. {faults}.", str(folder))
    weights = family.read({full[name]: held[name].tensor() for name in wanted}, config)
    read = getattr(config, "head", "") not in ("classes", "none")
    if read and head is not None and not torch.equal(head.tensor(), weights["embed.weight"]):
        fix = "Set `tie_word_embeddings` to false in config.json, if the head shall be kept."
        raise UserError(f"{family.head} differs from the embedding, to which config.json ties it.", str(folder), fix)
    return weights


def loaded(folder: str | Path) -> Any:
    """A folder's model with its weights and its own head, in float32, for use outside a run."""
    from scrimp.models.transformer import TransformerConfig

    config = own_config(folder, None) or TransformerConfig(**read_config(folder))
    family, raw = _family(Path(folder))
    if family in hub_bert.FAMILIES:
        config = replace(config, **hub_bert.head_from(raw, list(_open(Path(folder)))))
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
    family = _fitting(config, tokenizer, family)
    theirs = FAMILIES[family].write(_checked(config, named, folder), config)
    _refuse_foreign(folder)
    partial = folder.parent / f".partial-{folder.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _save(partial, theirs, shard_bytes)
        raw = _described(partial, family, config, tokenizer, labels)
        dtype = str(next(iter(theirs.values())).dtype).removeprefix("torch.")
        files = sorted([*(p.name for p in partial.iterdir()), "config.json"])
        # Before 4.56, transformers called the type torch_dtype.
        write_json(partial / "config.json", raw | {"dtype": dtype, "torch_dtype": dtype, MARK: files})
        _replace(folder, partial)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        fix = "Free some space or choose another folder."
        raise UserError(f"cannot be written: {error}.", str(folder), fix) from error
    return family


def _family(folder: Path) -> tuple[str, dict[str, Any]]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError("there is no config.json.", str(folder), "Give a Hugging Face model folder.")
    raw = _read_json(path)
    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        raise UserError(f"models of type `{family}` cannot be read.", str(path), did_you_mean(family, FAMILIES))
    return family, raw


def _fitting(config: Any, tokenizer: Any, family: str) -> str:
    """The family that can hold a model and its tokenizer."""
    if isinstance(config, PatchConfig):
        return hub_vit.family_of(config, family)
    check_padding(config, tokenizer)
    return (hub_bert.family_of if hub_bert.holds(config) else family_of)(config, family)


def _described(folder: Path, family: str, config: Any, tokenizer: Any, labels: Sequence[str]) -> dict[str, Any]:
    """Write what turns texts or images into inputs; returns what config.json says of the model."""
    if family in VISION:
        if tokenizer is not None:
            tokenizer.save(folder)
        return hub_vit.options_to(family, config, tokenizer)
    raw = hub_bert.options_to(family, config, labels) if family in hub_bert.FAMILIES else options_to(family, config)
    return raw | special(folder, config, tokenizer)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"is not valid JSON: {error}.", str(path)) from None
    if not isinstance(raw, dict):
        raise UserError("is not a JSON object.", str(path))
    return raw


def _newer(name: str) -> str:
    return next((name.removesuffix(old) + new for old, new in OLD_NAMES.items() if name.endswith(old)), name)


def _open(folder: Path) -> dict[str, Held]:
    """name -> where it is, over all shards; buffers are left out."""
    files = ["model.safetensors"]
    if (folder / INDEX).is_file():
        files = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
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
    tied = getattr(config, "tied", False) and "head.weight" in ours
    if tied and torch.equal(ours["head.weight"], ours["embed.weight"]):
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
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _replace(folder: Path, partial: Path) -> None:
    """Put a finished folder into place; the one before is deleted last."""
    before = folder.parent / f".before-{folder.name}"
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    partial.rename(folder)
    shutil.rmtree(before, ignore_errors=True)
