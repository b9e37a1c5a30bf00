"""BART's folders: `BartForConditionalGeneration`, and the base model without a head.

The embedding is kept once, as `shared`; folders may repeat it. `final_logits_bias` is a buffer of zeros, in every
folder: it is written, and refused when it is anything else. q, k and v are apart there and one tensor here; of the
attention to the encoder's states, k and v are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from scrimp.errors import UserError
from scrimp.models.hub_formats import Format, Weights
from scrimp.models.hub_shared import activation_from, activation_to, refuse, required
from scrimp.models.hub_tokenizer import for_whole_texts

if TYPE_CHECKING:
    from scrimp.models.encoder_decoder import EncoderDecoderConfig

BIAS: Final = "final_logits_bias"
NEEDED: Final = ("vocab_size", "max_position_embeddings", "d_model", "encoder_layers", "decoder_layers",
                 "encoder_attention_heads", "encoder_ffn_dim")  # fmt: skip
SAME: Final = {"decoder_attention_heads": "encoder_attention_heads", "decoder_ffn_dim": "encoder_ffn_dim"}
"""What must be alike on both sides."""
USUAL: Final = {
    "scale_embedding": False, "tie_word_embeddings": True, "normalize_before": False, "normalize_embedding": True,
    "static_position_embeddings": False, "add_final_layer_norm": False, "add_bias_logits": False,
}  # fmt: skip
"""Keys of config.json that older versions had choices for, and the choice that the model is."""
WANTS: Final = {"norm": "layernorm", "norm_at": "post", "positions": "learned", "position_offset": 2, "bias": True,
                "embed_norm": True, "tied": True, "qk_norm": False, "norm_eps": 1e-5}  # fmt: skip
"""Options without which a folder cannot hold a model."""

SIDES: Final = ("encoder", "decoder")
OUTER: Final = {"layernorm_embedding": "embed_norm", "embed_positions": "positions"}
INNER: Final = {
    "self_attn.out_proj": "attention.proj", "self_attn_layer_norm": "attention_norm",
    "encoder_attn.q_proj": "cross.q", "encoder_attn.out_proj": "cross.proj", "encoder_attn_layer_norm": "cross_norm",
    "fc1": "mlp.up", "fc2": "mlp.down", "final_layer_norm": "mlp_norm",
}  # fmt: skip
"""Their modules of a layer that are ours one to one."""
JOINED: Final = {"attention.qkv": ("self_attn", "qkv"), "cross.kv": ("encoder_attn", "kv")}
"""Our modules of a block that are several of theirs."""


def options_from(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json -> our options. Dropout is a setting of training: it is not taken over.

    Raises:
        UserError: for what the encoder-decoder does not do, and for what a file does not say.
    """
    required(raw, NEEDED, where)
    for key, usual in USUAL.items():
        if raw.get(key, usual) != usual:
            refuse(f"`{key}` is {raw[key]}", where)
    for key, other in SAME.items():
        if raw.get(key, raw[other]) != raw[other]:
            refuse(f"`{key}` is {raw[key]} and `{other}` {raw[other]}", where)
    return {
        **WANTS, "vocab": raw["vocab_size"], "context": raw["max_position_embeddings"], "width": raw["d_model"],
        "layers": raw["encoder_layers"], "decoder_layers": raw["decoder_layers"],
        "heads": raw["encoder_attention_heads"], "hidden": raw["encoder_ffn_dim"],
        "activation": activation_from(raw.get("activation_function", "gelu"), where),
        "init_std": raw.get("init_std", 0.02),
    }  # fmt: skip


def options_to(c: EncoderDecoderConfig, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Our options -> config.json.

    Raises:
        UserError: naming the options that a BART folder cannot say.
    """
    off = {key: getattr(c, key) for key, value in WANTS.items() if getattr(c, key) != value}
    for key, bad in (("kv_heads", c.kv_heads not in (0, c.heads)), ("qkv_bias", c.qkv_bias is False),
                     ("head_width", c.head_dim * c.heads != c.width)):  # fmt: skip
        if bad:
            off[key] = getattr(c, key)
    if off:
        options = ", ".join(f"`{k}: {v}`" for k, v in off.items())
        raise UserError(f"a BART folder cannot hold a model with {options}.", f"model.{next(iter(off))}")
    return {
        "architectures": ["BartForConditionalGeneration"], "model_type": "bart", "is_encoder_decoder": True,
        "vocab_size": c.vocab, "max_position_embeddings": c.context, "d_model": c.width, "encoder_layers": c.layers,
        "decoder_layers": c.depth, "encoder_attention_heads": c.heads, "decoder_attention_heads": c.heads,
        "encoder_ffn_dim": c.mlp, "decoder_ffn_dim": c.mlp, "activation_function": activation_to(c.activation),
        "dropout": c.dropout, "attention_dropout": 0.0, "activation_dropout": 0.0, "init_std": c.init_std,
        "scale_embedding": False, "tie_word_embeddings": True, "use_cache": True, "forced_eos_token_id": None,
        "decoder_start_token_id": None,
    }  # fmt: skip


def tensors(c: EncoderDecoderConfig) -> dict[str, tuple[int, ...]]:
    """Their names and shapes, without what may repeat others."""
    shapes: dict[str, tuple[int, ...]] = {"model.shared.weight": (c.vocab, c.width)}
    norm = {"weight": (c.width,), "bias": (c.width,)}
    for side, layers in zip(SIDES, (c.layers, c.depth), strict=True):
        shapes[f"model.{side}.embed_positions.weight"] = (c.context + c.position_offset, c.width)
        modules = {"layernorm_embedding": norm}
        for i in range(layers):
            square = {"weight": (c.width, c.width), "bias": (c.width,)}
            for attention in ("self_attn", "encoder_attn")[: 1 + (side == "decoder")]:
                modules |= {f"layers.{i}.{attention}.{x}_proj": square for x in ("q", "k", "v", "out")}
                modules[f"layers.{i}.{attention}_layer_norm"] = norm
            modules |= {f"layers.{i}.fc1": {"weight": (c.mlp, c.width), "bias": (c.mlp,)},
                        f"layers.{i}.fc2": {"weight": (c.width, c.mlp), "bias": (c.width,)},
                        f"layers.{i}.final_layer_norm": norm}  # fmt: skip
        shapes |= {f"model.{side}.{m}.{part}": s for m, parts in modules.items() for part, s in parts.items()}
    return shapes


def read(theirs: Weights, c: EncoderDecoderConfig) -> Weights:
    """Their tensors -> ours."""
    ours: Weights = {"embed.weight": theirs["model.shared.weight"]}
    for name in (n for n in theirs if n != "model.shared.weight"):
        _, side, rest = name.split(".", 2)
        if not rest.startswith("layers."):
            module, _, part = rest.rpartition(".")
            ours[f"{side}.{OUTER[module]}.{part}"] = theirs[name]
            continue
        _, layer, inner = rest.split(".", 2)
        module, _, part = inner.rpartition(".")
        block = f"{side}.blocks.{layer}"
        if module in INNER:
            ours[f"{block}.{INNER[module]}.{part}"] = theirs[name]
        for joined, (attention, letters) in JOINED.items():
            if module == f"{attention}.{letters[0]}_proj":
                stem = name.removesuffix(f"{letters[0]}_proj.{part}")
                ours[f"{block}.{joined}.{part}"] = torch.cat([theirs[f"{stem}{x}_proj.{part}"] for x in letters])
    return ours


def write(ours: Weights, c: EncoderDecoderConfig) -> Weights:
    """Our tensors -> theirs."""
    theirs: Weights = {"model.shared.weight": ours["embed.weight"]}
    outer, inner = ({v: k for k, v in table.items()} for table in (OUTER, INNER))
    for name in (n for n in ours if n != "embed.weight"):
        side, rest = name.split(".", 1)
        if not rest.startswith("blocks."):
            module, _, part = rest.rpartition(".")
            theirs[f"model.{side}.{outer[module]}.{part}"] = ours[name]
            continue
        _, layer, within = rest.split(".", 2)
        module, _, part = within.rpartition(".")
        stem = f"model.{side}.layers.{layer}"
        if module in inner:
            theirs[f"{stem}.{inner[module]}.{part}"] = ours[name]
        else:
            attention, letters = JOINED[module]
            for letter, piece in zip(letters, ours[name].chunk(len(letters)), strict=True):
                theirs[f"{stem}.{attention}.{letter}_proj.{part}"] = piece
    embedding = ours["embed.weight"]
    return theirs | {BIAS: torch.zeros(1, len(embedding), dtype=embedding.dtype)}


BART: Final = Format(
    root="model.",
    options_from=options_from,
    options_to=options_to,
    tensors=tensors,
    read=read,
    write=write,
    copies=lambda c: ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    zeros=(BIAS,),
    inputs=partial(for_whole_texts, {"": ("decoder_start_token_id",)}),
)
FORMATS: Final = {"bart": BART}
