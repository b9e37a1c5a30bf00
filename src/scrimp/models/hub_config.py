"""How the config.json of Hugging Face's families says the Transformer's options.

Rotary settings have two homes: transformers 5 writes `rope_parameters`, earlier versions `rope_theta` beside
`rope_scaling`. Both are read, and both are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from scrimp.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from scrimp.models.transformer import TransformerConfig

# What transformers takes where a file is silent and the families differ.
DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "gpt2": {},
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}
CLASSES: Final = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
NEEDED: Final = {
    "gpt2": ("vocab_size", "n_positions", "n_layer", "n_embd", "n_head"),
    "llama": ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads",
              "intermediate_size"),
}  # fmt: skip
GPT2_ACTIVATIONS: Final = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}

# Options without which a family cannot hold a model.
GPT2_WANTS: Final = {
    "norm": "layernorm", "positions": "learned", "norm_at": "pre", "causal": True, "bias": True, "qk_norm": False,
    "embed_width": 0,
}  # fmt: skip
LLAMA_WANTS: Final = {
    "norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "norm_at": "pre", "causal": True, "bias": False,
    "embed_width": 0,
}  # fmt: skip


def options_from(family: str, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json -> our options.

    Dropout is a setting of training, not of the architecture: it is not taken over.

    Raises:
        UserError: for what the Transformer does not do, and for what a file does not say.
    """
    raw = {**DEFAULTS[family], **raw}
    absent = [key for key in NEEDED["gpt2" if family == "gpt2" else "llama"] if raw.get(key) is None]
    if absent:
        raise UserError(f"does not say {', '.join(absent)}.", where, "Fetch the file that belongs to the weights.")
    if raw.get("quantization_config"):
        raise UserError("the weights are quantized.", where, "Use the folder of the model before quantization.")
    return _gpt2_from(raw, where) if family == "gpt2" else _llama_from(family, raw, where)


def _gpt2_from(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    activation = raw.get("activation_function", "gelu_new")
    if activation not in GPT2_ACTIVATIONS:
        known = did_you_mean(str(activation), GPT2_ACTIVATIONS)
        raise UserError(f"the activation `{activation}` is not known.", where, known)
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                       ("add_cross_attention", False)):  # fmt: skip
        if raw.get(key, usual) != usual:
            raise UserError(f"`{key}` is {raw[key]}, which the Transformer does not do.", where)
    return {
        "vocab": raw["vocab_size"], "context": raw["n_positions"], "layers": raw["n_layer"], "width": raw["n_embd"],
        "heads": raw["n_head"], "hidden": raw.get("n_inner") or 0, "norm": "layernorm",
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5), "positions": "learned",
        "activation": GPT2_ACTIVATIONS[activation], "bias": True, "tied": bool(raw.get("tie_word_embeddings", True)),
        "init_std": raw.get("initializer_range", 0.02),
    }  # fmt: skip


def _llama_from(family: str, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    heads, context = int(raw["num_attention_heads"]), int(raw["max_position_embeddings"])
    rope = _rope(raw)
    partial = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    window = _window(family, raw)
    for bad, what in (
        (raw.get("hidden_act", "silu") not in ("silu", "swish"), f"the activation `{raw.get('hidden_act')}`"),
        (family == "llama" and bool(raw.get("mlp_bias")), "biases in the MLP"),
        (family in ("llama", "qwen3") and bool(raw.get("attention_bias")), "biases in the attention's output"),
        (window is not None and window < context, f"a sliding window of {window} tokens"),
        (partial != 1.0, f"rotary positions on a part of {partial} of the heads"),
    ):
        if bad:
            raise UserError(f"the model needs {what}, which the Transformer does not have.", where)
    return {
        "vocab": raw["vocab_size"], "context": context, "layers": raw["num_hidden_layers"], "width": raw["hidden_size"],
        "heads": heads, "kv_heads": raw.get("num_key_value_heads") or heads, "head_width": raw.get("head_dim") or 0,
        "hidden": raw["intermediate_size"], "norm": "rmsnorm", "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "positions": "rotary", "activation": "swiglu", "bias": False, "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3", "tied": bool(raw.get("tie_word_embeddings", False)),
        "rope_base": float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        "rope_scaling": _scaling(rope, context, where), "init_std": raw.get("initializer_range", 0.02),
    }  # fmt: skip


def _window(family: str, raw: Mapping[str, Any]) -> int | None:
    """The sliding window, if some layer has one. Mistral has no switch for it; Qwen has, and a first layer."""
    window = raw.get("sliding_window")
    if family == "llama" or window is None:
        return None
    if family != "mistral":
        first, layers = raw["max_window_layers"], raw["num_hidden_layers"]
        types = raw.get("layer_types") or (["sliding_attention"] if first < layers else [])
        if not raw.get("use_sliding_window") or "sliding_attention" not in types:
            return None
    return int(window)


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return raw.get("rope_scaling") or raw.get("rope_parameters") or {}


def _scaling(rope: Mapping[str, Any], context: int, where: str) -> dict[str, float] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"rotary positions of type `{kind}` are not known.", where, "Known: default, llama3.")
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    absent = [key for key in keys if rope.get(key) is None]
    if absent:
        raise UserError(f"rotary positions of type `llama3` do not say {', '.join(absent)}.", where)
    original = rope.get("original_max_position_embeddings") or context
    return {key: float(rope[key]) for key in keys} | {"original_context": float(original)}


def family_of(c: TransformerConfig, family: str = "") -> str:
    """The family that can hold a model.

    Args:
        family: the one that is wished, or empty.
    Raises:
        UserError: naming the options that it, or every family, lacks.
    """
    if family and family not in DEFAULTS:
        raise UserError(f"there is no family `{family}`.", "family", did_you_mean(family, DEFAULTS))
    gpt2 = family == "gpt2" if family else c.norm == "layernorm"
    off = _beyond(c, GPT2_WANTS if gpt2 else LLAMA_WANTS, gpt2)
    if off:
        name, options = "GPT-2" if gpt2 else "Llama-like", ", ".join(f"`{k}: {v}`" for k, v in off.items())
        raise UserError(f"a {name} folder cannot hold a model with {options}.", f"model.{next(iter(off))}")
    if gpt2:
        return "gpt2"
    own = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    # transformers refuses a Llama whose width is no multiple of heads, though head_dim is given; Mistral is the same.
    if own == "llama" and (family == "mistral" or c.width % c.heads):
        own = "mistral"
    if family not in ("", own):
        raise UserError(f"the model's options are those of {own}, not of {family}.", "family", f"Use {own}.")
    return own


def _beyond(c: TransformerConfig, wants: Mapping[str, Any], gpt2: bool) -> dict[str, Any]:
    """Options that a family cannot say, with their values."""
    off = {key: getattr(c, key) for key, value in wants.items() if getattr(c, key) != value}
    if not gpt2:
        return off | ({"qkv_bias": "true beside qk_norm"} if c.qk_norm and c.qkv_bias else {})
    for key, bad in (("activation", c.activation == "swiglu"), ("kv_heads", c.kv_heads not in (0, c.heads)),
                     ("head_width", c.head_dim * c.heads != c.width), ("qkv_bias", c.qkv_bias is False)):  # fmt: skip
        if bad:
            off[key] = getattr(c, key)
    return off


def options_to(family: str, c: TransformerConfig) -> dict[str, Any]:
    """Our options -> config.json."""
    raw = {
        "architectures": [f"{CLASSES[family]}{'LMHeadModel' if family == 'gpt2' else 'ForCausalLM'}"],
        "model_type": family, "vocab_size": c.vocab, "tie_word_embeddings": c.tied, "initializer_range": c.init_std,
        "use_cache": True,
    }  # fmt: skip
    return raw | (_gpt2_to(c) if family == "gpt2" else _llama_to(c))


def _gpt2_to(c: TransformerConfig) -> dict[str, Any]:
    names = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
    return {
        "n_positions": c.context, "n_ctx": c.context, "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads,
        "n_inner": c.mlp, "activation_function": names[c.activation], "layer_norm_epsilon": c.norm_eps,
        "attn_pdrop": 0.0, "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
    }  # fmt: skip


def _llama_to(c: TransformerConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if c.rope_scaling:
        scaling = {"rope_type": "llama3", **c.rope_scaling}
        scaling["original_max_position_embeddings"] = int(scaling.pop("original_context"))
    return {
        "max_position_embeddings": c.context, "hidden_size": c.width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads or c.heads, "head_dim": c.head_dim,
        "intermediate_size": c.mlp, "hidden_act": "silu", "rms_norm_eps": c.norm_eps, "attention_bias": False,
        "mlp_bias": False, "attention_dropout": 0.0, "sliding_window": None, "use_sliding_window": False,
        "rope_theta": c.rope_base, "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": c.rope_base},
    }  # fmt: skip
