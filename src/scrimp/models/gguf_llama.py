"""A Llama in a GGUF file as a Hugging Face folder, from which recipes start and which `transformers` loads.

Numbers become floats again, and the rows of q and k their old order: llama.cpp turns the two coordinates of each plane
of the rotary positions into neighbors, Hugging Face keeps them half a head apart. What quantization rounded away does
not come back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from scrimp.errors import UserError
from scrimp.models.gguf import Gguf
from scrimp.models.gguf_tokenizer import tokenizer
from scrimp.models.hub import write
from scrimp.models.hub_names import FAMILIES, tensors
from scrimp.models.transformer import TransformerConfig

OUTER: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER: Final = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
DTYPES: Final = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Imported:
    """What was written."""

    folder: Path
    weights: int
    types: Counter[str]
    """How many tensors were of each type."""


def import_gguf(path: str | Path, out: str | Path, dtype: str = "float32") -> Imported:
    """Write a GGUF file as a Hugging Face folder.

    Args:
        dtype: of the weights that are written. float32 holds every type exactly; bfloat16 takes half the disk.
    Raises:
        UserError: if the file is damaged, or holds something other than a Llama with a byte-level BPE.
    """
    if dtype not in DTYPES:
        raise UserError(f"`{dtype}` is not one of {', '.join(DTYPES)}.", "--dtype")
    file = Gguf.open(path)
    config = TransformerConfig(**options(file))
    named = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights(file, config).items()}
    write(out, config, named, tokenizer(file))
    return Imported(Path(out), sum(tensor.numel() for tensor in named.values()), file.types())


def options(file: Gguf) -> dict[str, Any]:
    """Our options of a file's model.

    Raises:
        UserError: if it is not a Llama, or one with parts that the Transformer does not have.
    """
    family = file.get("general.architecture")
    if family != "llama":
        fix = "Import a Llama-like file, or take the model's own folder."
        raise UserError(f"models of architecture `{family}` are not read from GGUF.", str(file.path), fix)
    heads, width = number(file, "llama.attention.head_count"), number(file, "llama.embedding_length")
    head_width = number(file, "llama.attention.key_length", width // max(heads, 1))
    turned = number(file, "llama.rope.dimension_count", head_width)
    stretched = file.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in file.entries
    for bad, what in (
        (stretched, "stretched rotary positions"),
        (turned != head_width, f"rotary positions on {turned} of {head_width} numbers of a head"),
        (number(file, "llama.expert_count", 0) > 0, "experts"),
        (number(file, "split.count", 0) > 1, "several files"),
    ):
        if bad:
            fix = "Merge its files first." if what == "several files" else "Take the model's own folder."
            raise UserError(f"the model has {what}, which is not read from GGUF.", str(file.path), fix)
    if "token_embd.weight" not in file.entries:
        raise UserError("has no `token_embd.weight`.", str(file.path), "Fetch the file again.")
    return {
        "vocab": file.entries["token_embd.weight"].shape[0], "context": number(file, "llama.context_length"),
        "layers": number(file, "llama.block_count"), "width": width, "heads": heads,
        "kv_heads": number(file, "llama.attention.head_count_kv", heads), "head_width": head_width,
        "hidden": number(file, "llama.feed_forward_length"), "norm": "rmsnorm",
        "norm_eps": rounded(file.get("llama.attention.layer_norm_rms_epsilon")), "positions": "rotary",
        "rope_base": float(file.get("llama.rope.freq_base", 10000.0)), "activation": "swiglu", "bias": False,
        "tied": "output.weight" not in file.entries,
    }  # fmt: skip


def number(file: Gguf, key: str, default: int | None = None) -> int:
    """A whole number of the metadata.

    Raises:
        UserError: if it is something else, such as a list with a number for each block.
    """
    found = file.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int):
        fix = "Take the model's own folder."
        raise UserError(f"`{key}` is not a number, but {str(found)[:40]}.", str(file.path), fix)
    return found


def rounded(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, where the file has 9.99999975e-06."""
    return float(str(np.float32(value)))


def weights(file: Gguf, config: TransformerConfig) -> dict[str, Tensor]:
    """A file's weights under our names, float32.

    Raises:
        UserError: with every tensor that is missing, left over or misshapen.
    """
    wanted = tensors("llama", config)
    names = {theirs(name): name for name in file.entries}
    faults = [f"{name} is missing" for name in wanted if name not in names]
    faults += [f"{names[name]} is not known" for name in names if name not in wanted]
    faults += [
        f"{names[name]} is {list(file.entries[names[name]].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in names and file.entries[names[name]].shape != shape
    ]
    if faults:
        more = f" and {len(faults) - 6} more" if faults[6:] else ""
        raise UserError(f"is not a whole Llama: {', '.join(faults[:6])}{more}.", str(file.path), "Fetch it again.")
    found: dict[str, Tensor] = {}
    for name in wanted:
        tensor = file.tensor(names[name])
        if ".q_proj." in name or ".k_proj." in name:
            tensor = unpermuted(tensor, config.head_dim)
        found[name] = torch.from_numpy(np.ascontiguousarray(tensor))
    return FAMILIES["llama"].read(found, config)


def theirs(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; the same where it is not known."""
    stem, _, part = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{part}"
    block, _, rest = stem.removeprefix("blk.").partition(".")
    return f"model.layers.{block}.{INNER[rest]}.{part}" if stem.startswith("blk.") and rest in INNER else name


def unpermuted(rows: np.ndarray, width: int) -> np.ndarray:
    """Rows of each head from neighbors a0, b0, a1, b1, ... to halves a0, a1, ..., b0, b1, ...: [heads * width, C]."""
    pairs = rows.reshape(-1, width // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
