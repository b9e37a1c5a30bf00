"""How Hugging Face's families call the Transformer's options and tensors.

GPT-2 keeps its matrices transposed (inputs first); the others keep q, k and v apart, which are one tensor here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from scrimp.errors import UserError

if TYPE_CHECKING:
    from scrimp.models.transformer import TransformerConfig

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A way of naming.

    Attributes:
        root: prefix of everything but the head.
        read: their tensors -> ours. write: ours -> theirs.
    """

    root: str
    read: Callable[[Weights, TransformerConfig], Weights]
    write: Callable[[Weights, TransformerConfig], Weights]


def options_from(family: str, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json -> our options.

    Raises:
        UserError: for what the Transformer does not do.
    """
    if family == "gpt2":
        return _gpt2_from(raw, where)
    heads = int(raw["num_attention_heads"])
    rope = raw.get("rope_parameters") or {}
    context = int(raw["max_position_embeddings"])
    window = raw.get("sliding_window") if raw.get("use_sliding_window", family == "mistral") else None
    for bad, what in (
        (raw.get("hidden_act", "silu") not in ("silu", "swish"), f"the activation `{raw.get('hidden_act')}`"),
        (bool(raw.get("mlp_bias")), "biases in the MLP"),
        (family == "llama" and bool(raw.get("attention_bias")), "biases in the attention's output"),
        (family == "qwen3" and bool(raw.get("attention_bias")), "biases in the attention"),
        (bool(window) and int(window or 0) < context, f"a sliding window of {window} tokens"),
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
        "rope_scaling": _scaling(raw, where), "init_std": raw.get("initializer_range", 0.02),
    }  # fmt: skip


def _scaling(raw: Mapping[str, Any], where: str) -> dict[str, float] | None:
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"rotary positions of type `{kind}` are not known.", where, "Known: default, llama3.")
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    original = scaling["original_max_position_embeddings"]
    return {key: float(scaling[key]) for key in keys} | {"original_context": float(original)}


def _gpt2_from(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    activations = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
    activation = raw.get("activation_function", "gelu_new")
    if activation not in activations:
        raise UserError(f"the activation `{activation}` is not known.", where, f"Known: {', '.join(activations)}.")
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                       ("add_cross_attention", False)):  # fmt: skip
        if raw.get(key, usual) != usual:
            raise UserError(f"`{key}` is {raw[key]}, which the Transformer does not do.", where)
    return {
        "vocab": raw["vocab_size"], "context": raw["n_positions"], "layers": raw["n_layer"], "width": raw["n_embd"],
        "heads": raw["n_head"], "hidden": raw.get("n_inner") or 0, "norm": "layernorm",
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5), "positions": "learned", "activation": activations[activation],
        "bias": True, "tied": bool(raw.get("tie_word_embeddings", True)),
        "init_std": raw.get("initializer_range", 0.02),
    }  # fmt: skip


def family_of(c: TransformerConfig) -> str:
    """The family that can hold a model.

    Raises:
        UserError: naming the option that none has.
    """
    qkv_bias = c.bias if c.qkv_bias is None else c.qkv_bias
    common = {"norm_at": "pre", "causal": True}
    gpt2 = common | {"norm": "layernorm", "positions": "learned", "bias": True, "qk_norm": False}
    llama = common | {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False}
    wanted = llama if c.norm == "rmsnorm" else gpt2
    off = [key for key, value in wanted.items() if getattr(c, key) != value]
    if wanted is gpt2 and c.activation == "swiglu":
        off.append("activation")
    if wanted is gpt2 and ((c.kv_heads or c.heads) != c.heads or c.head * c.heads != c.width):
        off.append("kv_heads or head_width")
    if wanted is gpt2 and not qkv_bias:
        off.append("qkv_bias")
    if c.qk_norm and qkv_bias:
        off.append("qkv_bias together with qk_norm")
    if off:
        name = "GPT-2" if wanted is gpt2 else "Llama-like"
        raise UserError(f"no {name} folder can hold a model with this `{off[0]}`.", f"model.{off[0]}")
    if wanted is gpt2:
        return "gpt2"
    return "qwen3" if c.qk_norm else "qwen2" if qkv_bias else "llama"


def options_to(family: str, c: TransformerConfig) -> dict[str, Any]:
    """Our options -> config.json."""
    if family == "gpt2":
        names = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
        return {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": c.vocab, "n_positions": c.context,
            "n_ctx": c.context, "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads, "n_inner": c.mlp,
            "activation_function": names[c.activation], "layer_norm_epsilon": c.norm_eps, "attn_pdrop": 0.0,
            "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "tie_word_embeddings": c.tied,
            "initializer_range": c.init_std,
        }  # fmt: skip
    classes = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    scaling: dict[str, Any] | None = None
    if c.rope_scaling:
        scaling = {k: v for k, v in c.rope_scaling.items() if k != "original_context"}
        scaling |= {"rope_type": "llama3", "original_max_position_embeddings": int(c.rope_scaling["original_context"])}
    raw = {
        "architectures": [f"{classes[family]}ForCausalLM"], "model_type": family, "vocab_size": c.vocab,
        "max_position_embeddings": c.context, "hidden_size": c.width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads or c.heads, "head_dim": c.head,
        "intermediate_size": c.mlp, "hidden_act": "silu", "rms_norm_eps": c.norm_eps, "attention_bias": False,
        "mlp_bias": False, "attention_dropout": 0.0, "rope_theta": c.rope_base, "tie_word_embeddings": c.tied,
        "initializer_range": c.init_std, "sliding_window": None, "use_sliding_window": False,
        # transformers 5 reads rope_parameters, earlier versions rope_theta and rope_scaling.
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base} | (scaling or {}),
    }  # fmt: skip
    return raw | ({"rope_scaling": scaling} if scaling else {})


def tensors(family: str, c: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Their names and shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    kv, q = (c.kv_heads or c.heads) * c.head, c.heads * c.head
    if family == "gpt2":
        shapes |= {"transformer.wte.weight": (c.vocab, c.width), "transformer.wpe.weight": (c.context, c.width)}
        for i in range(c.layers):
            h = f"transformer.h.{i}"
            for name, rows, columns in (("attn.c_attn", c.width, 3 * c.width), ("attn.c_proj", c.width, c.width),
                                        ("mlp.c_fc", c.width, c.mlp), ("mlp.c_proj", c.mlp, c.width)):  # fmt: skip
                shapes |= {f"{h}.{name}.weight": (rows, columns), f"{h}.{name}.bias": (columns,)}
            shapes |= {f"{h}.{ln}.{part}": (c.width,) for ln in ("ln_1", "ln_2") for part in ("weight", "bias")}
        shapes |= {f"transformer.ln_f.{part}": (c.width,) for part in ("weight", "bias")}
    else:
        shapes |= {"model.embed_tokens.weight": (c.vocab, c.width), "model.norm.weight": (c.width,)}
        for i in range(c.layers):
            h = f"model.layers.{i}"
            for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                shapes[f"{h}.self_attn.{name}.weight"] = (rows, c.width)
                if family == "qwen2":
                    shapes[f"{h}.self_attn.{name}.bias"] = (rows,)
            shapes |= {f"{h}.self_attn.o_proj.weight": (c.width, q), f"{h}.mlp.gate_proj.weight": (c.mlp, c.width),
                       f"{h}.mlp.up_proj.weight": (c.mlp, c.width), f"{h}.mlp.down_proj.weight": (c.width, c.mlp),
                       f"{h}.input_layernorm.weight": (c.width,),
                       f"{h}.post_attention_layernorm.weight": (c.width,)}  # fmt: skip
            if family == "qwen3":
                shapes |= {f"{h}.self_attn.q_norm.weight": (c.head,), f"{h}.self_attn.k_norm.weight": (c.head,)}
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocab, c.width)
    return shapes


GPT2: Final = {
    "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.proj", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down",
    "ln_1": "attention_norm", "ln_2": "mlp_norm",
}  # fmt: skip
LLAMA: Final = {
    "self_attn.o_proj": "attention.proj", "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm",
}  # fmt: skip
GPT2_OUTER: Final = {
    "transformer.wte": "embed",
    "transformer.wpe": "positions",
    "transformer.ln_f": "norm",
    "lm_head": "head",
}
LLAMA_OUTER: Final = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"}


def _rename(name: str, outer: Mapping[str, str], inner: Mapping[str, str], root: str, ours: str) -> str:
    """A tensor's name from one house to the other; `root` and `ours` are the lists of blocks."""
    stem, _, part = name.rpartition(".")
    if stem in outer:
        return f"{outer[stem]}.{part}"
    layer, _, rest = stem.removeprefix(f"{root}.").partition(".")
    return f"{ours}.{layer}.{inner.get(rest, rest)}.{part}"


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


def _gpt2_read(theirs: Weights, c: TransformerConfig) -> Weights:
    return {
        _rename(n, GPT2_OUTER, GPT2, "transformer.h", "blocks"): t.t() if ".c_" in n and t.ndim == 2 else t
        for n, t in theirs.items()
    }


def _gpt2_write(ours: Weights, c: TransformerConfig) -> Weights:
    out: Weights = {}
    for name, tensor in ours.items():
        new = _rename(name, _inverse(GPT2_OUTER), _inverse(GPT2), "blocks", "transformer.h")
        out[new] = tensor.t() if ".c_" in new and tensor.ndim == 2 else tensor
    return out


def _llama_read(theirs: Weights, c: TransformerConfig) -> Weights:
    out: Weights = {}
    for name, tensor in theirs.items():
        if ".self_attn.q_proj." in name:
            parts = [tensor, *(theirs[name.replace("q_proj", f"{x}_proj")] for x in "kv")]
            fused = name.replace("self_attn.q_proj", "attention.qkv")
            out[fused.replace("model.layers", "blocks")] = torch.cat(parts)
        elif not any(f".self_attn.{x}_proj." in name for x in "kv"):
            out[_rename(name, LLAMA_OUTER, LLAMA, "model.layers", "blocks")] = tensor
    return out


def _llama_write(ours: Weights, c: TransformerConfig) -> Weights:
    out: Weights = {}
    kv = (c.kv_heads or c.heads) * c.head
    for name, tensor in ours.items():
        if ".attention.qkv." in name:
            stem = name.replace("blocks", "model.layers")
            for part, piece in zip("qkv", tensor.split([c.heads * c.head, kv, kv]), strict=True):
                out[stem.replace("attention.qkv", f"self_attn.{part}_proj")] = piece
        else:
            out[_rename(name, _inverse(LLAMA_OUTER), _inverse(LLAMA), "blocks", "model.layers")] = tensor
    return out


FAMILIES: Final[dict[str, Family]] = {
    "gpt2": Family("transformer.", _gpt2_read, _gpt2_write),
    **{name: Family("model.", _llama_read, _llama_write) for name in ("llama", "mistral", "qwen2", "qwen3")},
}
