"""How Hugging Face's families call the Transformer's tensors.

GPT-2 keeps its matrices transposed (inputs first); the others keep q, k and v apart, which are one tensor here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scrimp.models.transformer import TransformerConfig

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A way of naming.

    Attributes:
        root: prefix of everything but the head.
        read: their tensors -> ours. write: ours -> theirs.
        head: the tensor that is the embedding's when tied.
    """

    root: str
    read: Callable[[Weights, TransformerConfig], Weights]
    write: Callable[[Weights, TransformerConfig], Weights]
    head: str = "lm_head.weight"


def tensors(family: str, c: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Their names and shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    kv, q = (c.kv_heads or c.heads) * c.head_dim, c.heads * c.head_dim
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
                shapes |= {f"{h}.self_attn.q_norm.weight": (c.head_dim,), f"{h}.self_attn.k_norm.weight": (c.head_dim,)}
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
    kv = (c.kv_heads or c.heads) * c.head_dim
    for name, tensor in ours.items():
        if ".attention.qkv." in name:
            stem = name.replace("blocks", "model.layers")
            for part, piece in zip("qkv", tensor.split([c.heads * c.head_dim, kv, kv]), strict=True):
                out[stem.replace("attention.qkv", f"self_attn.{part}_proj")] = piece
        else:
            out[_rename(name, _inverse(LLAMA_OUTER), _inverse(LLAMA), "blocks", "model.layers")] = tensor
    return out


FAMILIES: Final[dict[str, Family]] = {
    "gpt2": Family("transformer.", _gpt2_read, _gpt2_write),
    **{name: Family("model.", _llama_read, _llama_write) for name in ("llama", "mistral", "qwen2", "qwen3")},
}
