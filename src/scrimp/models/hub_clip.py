"""CLIP's folders: `CLIPModel`, with both towers and their projections.

The patches are a convolution there and one product here: the same numbers in another shape. q, k and v are apart there.
A text is read at its first end token, whose id `text_config` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from scrimp.errors import UserError
from scrimp.models.hub_formats import Format, Weights
from scrimp.models.hub_shared import activation_from, activation_to, refuse, required
from scrimp.models.hub_tokenizer import for_whole_texts

if TYPE_CHECKING:
    from scrimp.models.two_towers import TwoTowersConfig

# What transformers takes where a file is silent; older files say only what differs.
COMMON: Final = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
TEXT: Final = {**COMMON, "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
               "max_position_embeddings": 77}  # fmt: skip
VISION: Final = {**COMMON, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_channels": 3,
                 "image_size": 224, "patch_size": 32}  # fmt: skip
WANTS: Final = {"norm": "layernorm", "norm_at": "pre", "bias": True, "qk_norm": False}

LAYER: Final = {
    "self_attn.out_proj": "attention.proj", "layer_norm1": "attention_norm", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down",
    "layer_norm2": "mlp_norm",
}  # fmt: skip
OUTER: Final = {
    "logit_scale": "logit_scale",
    "text_projection.weight": "text_projection.weight",
    "visual_projection.weight": "image_projection.weight",
    "text_model.embeddings.token_embedding.weight": "text.embed.weight",
    "text_model.embeddings.position_embedding.weight": "text.positions.weight",
    "text_model.final_layer_norm.weight": "text.norm.weight",
    "text_model.final_layer_norm.bias": "text.norm.bias",
    "vision_model.embeddings.class_embedding": "image.class_token",
    "vision_model.embeddings.patch_embedding.weight": "image.patches.weight",
    "vision_model.embeddings.position_embedding.weight": "image.positions.weight",
    "vision_model.pre_layrnorm.weight": "image.pre_norm.weight",
    "vision_model.pre_layrnorm.bias": "image.pre_norm.bias",
    "vision_model.post_layernorm.weight": "image.norm.weight",
    "vision_model.post_layernorm.bias": "image.norm.bias",
}
PATCHES: Final = "vision_model.embeddings.patch_embedding.weight"
TOWERS: Final = {"text_model.encoder.layers": "text.blocks", "vision_model.encoder.layers": "image.blocks"}


def options_from(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json -> our options.

    Raises:
        UserError: for what the two towers do not do, and for what a file does not say.
    """
    required(raw, ("text_config", "vision_config"), where)
    # The oldest files have the values in force under another name.
    text = {**TEXT, **raw["text_config"], **(raw.get("text_config_dict") or {})}
    vision = {**VISION, **raw["vision_config"], **(raw.get("vision_config_dict") or {})}
    for key in ("hidden_act", "layer_norm_eps"):
        if text[key] != vision[key]:
            refuse(f"`{key}` is {text[key]} in one tower and {vision[key]} in the other", where)
    for key in ("image_size", "patch_size"):
        if not isinstance(vision[key], int):
            refuse(f"`{key}` is {vision[key]}", where)
    return {
        **WANTS, "vocab": text["vocab_size"], "context": text["max_position_embeddings"], "width": text["hidden_size"],
        "layers": text["num_hidden_layers"], "heads": text["num_attention_heads"], "hidden": text["intermediate_size"],
        "image": vision["image_size"], "patch": vision["patch_size"], "channels": vision["num_channels"],
        "image_width": vision["hidden_size"], "image_layers": vision["num_hidden_layers"],
        "image_heads": vision["num_attention_heads"], "image_hidden": vision["intermediate_size"],
        "projection": raw.get("projection_dim", 512), "norm_eps": text["layer_norm_eps"],
        "activation": activation_from(text["hidden_act"], where),
    }  # fmt: skip


def options_to(c: TwoTowersConfig, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Our options -> config.json.

    Raises:
        UserError: naming the options that a CLIP folder cannot say.
    """
    trunk = c.image_trunk()
    off = {key: getattr(c, key) for key, value in WANTS.items() if getattr(c, key) != value}
    for key, bad in (("kv_heads", c.kv_heads not in (0, c.heads)), ("qkv_bias", c.qkv_bias is False),
                     ("head_width", c.head_dim * c.heads != c.width)):  # fmt: skip
        if bad:
            off[key] = getattr(c, key)
    if off:
        options = ", ".join(f"`{k}: {v}`" for k, v in off.items())
        raise UserError(f"a CLIP folder cannot hold a model with {options}.", f"model.{next(iter(off))}")
    shared = {"hidden_act": activation_to(c.activation), "layer_norm_eps": c.norm_eps, "attention_dropout": 0.0,
              "projection_dim": c.projection, "initializer_range": c.init_std}  # fmt: skip
    text = {"model_type": "clip_text_model", "vocab_size": c.vocab, "max_position_embeddings": c.context,
            "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
            "intermediate_size": c.mlp, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
    vision = {"model_type": "clip_vision_model", "image_size": c.image, "patch_size": c.patch,
              "num_channels": c.channels, "hidden_size": trunk.width, "num_hidden_layers": trunk.layers,
              "num_attention_heads": trunk.heads, "intermediate_size": trunk.mlp}  # fmt: skip
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": c.projection,
            "text_config": shared | text, "vision_config": shared | vision}  # fmt: skip


def tensors(c: TwoTowersConfig) -> dict[str, tuple[int, ...]]:
    """Their names and shapes."""
    trunk = c.image_trunk()
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "text_projection.weight": (c.projection, c.width),
        "visual_projection.weight": (c.projection, trunk.width),
        "text_model.embeddings.token_embedding.weight": (c.vocab, c.width),
        "text_model.embeddings.position_embedding.weight": (c.context, c.width),
        "vision_model.embeddings.class_embedding": (trunk.width,),
        PATCHES: (trunk.width, c.channels, c.patch, c.patch),
        "vision_model.embeddings.position_embedding.weight": (1 + (c.image // c.patch) ** 2, trunk.width),
    }
    for part in ("weight", "bias"):
        shapes[f"text_model.final_layer_norm.{part}"] = (c.width,)
        shapes |= {f"vision_model.{norm}.{part}": (trunk.width,) for norm in ("pre_layrnorm", "post_layernorm")}
    for tower, own in zip(TOWERS, (c, trunk), strict=True):
        for i in range(own.layers):
            sizes = {f"self_attn.{x}_proj": (own.width, own.width) for x in ("q", "k", "v", "out")}
            sizes |= {"mlp.fc1": (own.mlp, own.width), "mlp.fc2": (own.width, own.mlp)}
            for module, shape in sizes.items():
                shapes |= {f"{tower}.{i}.{module}.weight": shape, f"{tower}.{i}.{module}.bias": shape[:1]}
            for norm in ("layer_norm1", "layer_norm2"):
                shapes |= {f"{tower}.{i}.{norm}.{part}": (own.width,) for part in ("weight", "bias")}
    return shapes


def read(theirs: Weights, c: TwoTowersConfig) -> Weights:
    """Their tensors -> ours."""
    ours: Weights = {}
    for name, tensor in theirs.items():
        if name in OUTER:
            ours[OUTER[name]] = tensor.flatten(1) if name == PATCHES else tensor
            continue
        path, layer, module, part = _split(name)
        if module in LAYER:
            ours[f"{TOWERS[path]}.{layer}.{LAYER[module]}.{part}"] = tensor
        elif module == "self_attn.q_proj":
            parts = [theirs[f"{path}.{layer}.self_attn.{x}_proj.{part}"] for x in "qkv"]
            ours[f"{TOWERS[path]}.{layer}.attention.qkv.{part}"] = torch.cat(parts)
    return ours


def write(ours: Weights, c: TwoTowersConfig) -> Weights:
    """Our tensors -> theirs."""
    theirs: Weights = {}
    outer, inner, towers = ({v: k for k, v in table.items()} for table in (OUTER, LAYER, TOWERS))
    for name, tensor in ours.items():
        if name in outer:
            square = (-1, c.channels, c.patch, c.patch)
            theirs[outer[name]] = tensor.reshape(square) if outer[name] == PATCHES else tensor
            continue
        path, layer, module, part = _split(name)
        if module in inner:
            theirs[f"{towers[path]}.{layer}.{inner[module]}.{part}"] = tensor
        else:
            pieces: tuple[Tensor, ...] = tensor.chunk(3)
            for letter, piece in zip("qkv", pieces, strict=True):
                theirs[f"{towers[path]}.{layer}.self_attn.{letter}_proj.{part}"] = piece
    return theirs


def _split(name: str) -> tuple[str, str, str, str]:
    """A name within a tower: (the list of its blocks, number, module, weight or bias)."""
    stem, _, part = name.rpartition(".")
    words = stem.split(".")
    at = next(i for i, word in enumerate(words) if word.isdigit())
    return ".".join(words[:at]), words[at], ".".join(words[at + 1 :]), part


CLIP: Final = Format(
    options_from=options_from,
    options_to=options_to,
    tensors=tensors,
    read=read,
    write=write,
    inputs=partial(for_whole_texts, {"text_config": ("eos_token_id",)}),
)
FORMATS: Final = {"clip": CLIP}
