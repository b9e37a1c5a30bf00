"""Hugging Face's ViT and ViTMAE: how they say the options and call the tensors.

ViT is read as `vision` from ViTForImageClassification and ViTModel, ViTMAE as `masked_autoencoder` from
ViTMAEForPreTraining. Files call tensors as the published ones do, which all versions of transformers load; the version
that keeps q, k and v apart in memory still writes them so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from scrimp.errors import UserError
from scrimp.models.hub_formats import Format
from scrimp.models.hub_shared import activation_from, activation_to
from scrimp.models.hub_tokenizer import for_images
from scrimp.models.masked_autoencoder import MaskedAutoencoderConfig
from scrimp.models.patches import PatchConfig
from scrimp.models.vision import VisionConfig

HEADS: Final = {"ViTForImageClassification": "classes", "ViTModel": "", "ViTMAEForPreTraining": ""}
"""Classes that are read -> the head of what they are here."""
DEFAULTS: Final[dict[str, Any]] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3,
    "qkv_bias": True, "initializer_range": 0.02, "decoder_num_attention_heads": 16, "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8, "decoder_intermediate_size": 2048,
}  # fmt: skip
"""What transformers takes where a file is silent."""
WANTS: Final = {"norm": "layernorm", "norm_at": "pre", "bias": True, "qk_norm": False, "class_token": True}
"""Options without which neither can hold a model."""
OUTER: Final = {
    "class_token.weight": "vit.embeddings.cls_token", "positions.weight": "vit.embeddings.position_embeddings",
    "patches": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm", "pooler": "vit.pooler.dense",
    "head": "classifier", "decoder.embed": "decoder.decoder_embed", "decoder.mask_token.weight": "decoder.mask_token",
    "decoder.positions.weight": "decoder.decoder_pos_embed", "decoder.norm": "decoder.decoder_norm",
    "decoder.predict": "decoder.decoder_pred",
}  # fmt: skip
"""Our name, of a tensor or of a layer -> theirs."""
INNER: Final = {
    "attention.proj": "attention.output.dense", "attention_norm": "layernorm_before", "mlp_norm": "layernorm_after",
    "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
}  # fmt: skip
QKV: Final = ("query", "key", "value")
LISTS: Final = {"blocks": "vit.encoder.layer", "decoder.blocks": "decoder.decoder_layers"}
MISSPELLED: Final = "decoder.decoder_encoder.layer."
"""How transformers 5 saves the decoder's blocks."""


def options_from(family: str, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json -> our options. Dropout is a setting of training: it is not taken over.

    Raises:
        UserError: for what the models here do not do.
    """
    raw = {**DEFAULTS, **raw}
    usual = "ViTModel" if family == "vit" else "ViTMAEForPreTraining"
    name = str((raw.get("architectures") or [usual])[0])
    if name not in HEADS or name.startswith("ViTMAE") != (family == "vit_mae"):
        raise UserError(f"models of class `{name}` cannot be read.", where, f"Known: {', '.join(HEADS)}.")
    options = {
        "image": _side(raw, "image_size", where), "patch": _side(raw, "patch_size", where),
        "channels": raw["num_channels"], "layers": raw["num_hidden_layers"], "width": raw["hidden_size"],
        "heads": raw["num_attention_heads"], "hidden": raw["intermediate_size"], "norm_eps": raw["layer_norm_eps"],
        "activation": activation_from(raw["hidden_act"], where), "qkv_bias": bool(raw["qkv_bias"]),
        "init_std": raw["initializer_range"],
    }  # fmt: skip
    if family == "vit_mae":
        return options | {
            "positions": "sincos", "decoder_layers": raw["decoder_num_hidden_layers"],
            "decoder_width": raw["decoder_hidden_size"], "decoder_heads": raw["decoder_num_attention_heads"],
            "decoder_hidden": raw["decoder_intermediate_size"],
        }  # fmt: skip
    if HEADS[name] == "classes":
        labels = raw.get("id2label")
        return options | {"head": "classes", "classes": len(labels) if labels else int(raw.get("num_labels", 2))}
    return options | {"pooler": True}


def _side(raw: Mapping[str, Any], key: str, where: str) -> int:
    given = raw[key]
    sides = {given} if isinstance(given, int) else set(given)
    if len(sides) != 1:
        raise UserError(f"`{key}` is {given}, and only squares are known.", where)
    return int(sides.pop())


def head_from(raw: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Only its tensors say whether a base model was saved with its pooler.

    Args:
        names: of the folder's tensors.
    """
    return (
        {} if raw.get("model_type") == "vit_mae" else {"pooler": any(n.endswith("pooler.dense.weight") for n in names)}
    )


def options_to(family: str, c: PatchConfig, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Our options -> config.json. Whether targets are normalized is a matter of the task, and not said.

    Args:
        labels: names of the classes, if they have any.
    Raises:
        UserError: naming the options that the family lacks.
    """
    _check(family, c)
    raw: dict[str, Any] = {
        "model_type": family, "image_size": c.image, "patch_size": c.patch, "num_channels": c.channels,
        "num_hidden_layers": c.layers, "hidden_size": c.width, "num_attention_heads": c.heads,
        "intermediate_size": c.mlp, "layer_norm_eps": c.norm_eps, "hidden_act": activation_to(c.activation),
        "qkv_bias": c.qkv_bias is not False, "initializer_range": c.init_std, "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    if isinstance(c, MaskedAutoencoderConfig):
        return raw | {
            "architectures": ["ViTMAEForPreTraining"], "decoder_num_hidden_layers": c.decoder_layers,
            "decoder_hidden_size": c.decoder_width, "decoder_num_attention_heads": c.decoder_heads,
            "decoder_intermediate_size": c.decoder().mlp,
        }  # fmt: skip
    assert isinstance(c, VisionConfig)
    if c.head == "classes":
        names = labels if len(labels) == c.classes else [f"LABEL_{i}" for i in range(c.classes)]
        more = {"id2label": {str(i): name for i, name in enumerate(names)},
                "label2id": {name: i for i, name in enumerate(names)}}  # fmt: skip
        return raw | {"architectures": ["ViTForImageClassification"], **more}
    return raw | {"architectures": ["ViTModel"]}


def _check(family: str, c: PatchConfig) -> None:
    off = {key: getattr(c, key) for key, value in WANTS.items() if getattr(c, key) != value}
    for key, bad in (("activation", c.activation == "swiglu"), ("kv_heads", c.kv_heads not in (0, c.heads)),
                     ("head_width", c.head_dim * c.heads != c.width)):  # fmt: skip
        if bad:
            off[key] = getattr(c, key)
    if isinstance(c, MaskedAutoencoderConfig):
        off |= {} if c.drop else {"drop": False}
        off |= {} if c.positions == "sincos" else {"positions": c.positions}
    elif isinstance(c, VisionConfig):
        off |= {} if c.pooling == "first" else {"pooling": c.pooling}
        off |= {"pooler": "true beside a head"} if c.pooler and c.head == "classes" else {}
    if off:
        said = ", ".join(f"`{key}: {value}`" for key, value in off.items())
        raise UserError(f"a {family} folder cannot hold a model with {said}.", f"model.{next(iter(off))}")


def tensors(c: PatchConfig) -> dict[str, tuple[int, ...]]:
    """Their names and shapes."""
    with torch.device("meta"):
        ours: dict[str, Tensor] = {name: p.detach() for name, p in c.build().named_parameters()}  # type: ignore[attr-defined]
    return {name: tuple(t.shape) for name, t in write(ours, c).items()}


def write(ours: Mapping[str, Tensor], c: Any) -> dict[str, Tensor]:
    """Our tensors -> theirs."""
    out: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        stem, _, part = name.rpartition(".")
        if name in OUTER:  # a token or positions
            out[OUTER[name]] = tensor[None]
        elif name == "patches.weight":
            out[f"{OUTER[stem]}.{part}"] = tensor.reshape(len(tensor), c.channels, c.patch, c.patch)
        elif stem == "decoder.predict":
            out[f"{OUTER[stem]}.{part}"] = _channels_last(tensor, c)
        elif stem in OUTER:
            out[f"{OUTER[stem]}.{part}"] = tensor
        else:
            place, rest = _block(stem, LISTS)
            if rest == "attention.qkv":
                out |= {f"{place}.attention.attention.{which}.{part}": piece
                        for which, piece in zip(QKV, tensor.chunk(3), strict=True)}  # fmt: skip
            else:
                out[f"{place}.{INNER[rest]}.{part}"] = tensor
    return out


def read(theirs: Mapping[str, Tensor], c: Any) -> dict[str, Tensor]:
    """Their tensors -> ours."""
    outer, inner = ({b: a for a, b in table.items()} for table in (OUTER, INNER))
    lists = {b: a for a, b in LISTS.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        stem, _, part = name.rpartition(".")
        if name in outer:
            out[outer[name]] = tensor[0]
        elif stem in outer:
            ours = outer[stem]
            last = ours == "decoder.predict"
            new = _channels_first(tensor, c) if last else tensor.flatten(1) if tensor.ndim == 4 else tensor
            out[f"{ours}.{part}"] = new
        else:
            place, rest = _block(stem, lists)
            if rest == "attention.attention.query":
                pieces = [theirs[name.replace("query", which)] for which in QKV]
                out[f"{place}.attention.qkv.{part}"] = torch.cat(pieces)
            elif rest in inner:
                out[f"{place}.{inner[rest]}.{part}"] = tensor
    return out


def spelled(name: str, held: Iterable[str]) -> str:
    """A tensor's name as a folder has it that holds the tensors `held`: as published files, or as transformers 5."""
    if any(given.startswith(MISSPELLED) for given in held):
        return name.replace(f"{LISTS['decoder.blocks']}.", MISSPELLED)
    return name


def _block(stem: str, lists: Mapping[str, str]) -> tuple[str, str]:
    """A layer's name -> its block in the other house, and its name within the block."""
    found = re.fullmatch(rf"({'|'.join(map(re.escape, lists))})\.(\d+)\.(.+)", stem)
    assert found is not None, stem
    return f"{lists[found[1]]}.{found[2]}", found[3]


def _channels_last(tensor: Tensor, c: PatchConfig) -> Tensor:
    """Rows that are channels, rows, columns of a patch -> rows, columns, channels."""
    rest = tensor.shape[1:]
    return tensor.reshape(c.channels, c.patch, c.patch, *rest).movedim(0, 2).reshape(-1, *rest)


def _channels_first(tensor: Tensor, c: PatchConfig) -> Tensor:
    rest = tensor.shape[1:]
    return tensor.reshape(c.patch, c.patch, c.channels, *rest).movedim(2, 0).reshape(-1, *rest)


def _format(family: str) -> Format:
    return Format(
        root="vit.",
        options_from=partial(options_from, family),
        options_to=partial(options_to, family),
        head_from=head_from,
        tensors=tensors,
        spelled=spelled,
        read=read,
        write=write,
        reshaped=True,
        inputs=for_images,
    )


FORMATS: Final = {family: _format(family) for family in ("vit", "vit_mae")}
