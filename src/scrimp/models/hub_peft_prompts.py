"""Prompts and prefixes as the library peft keeps them, in and out, without importing peft.

    PROMPT_TUNING    prompt_embeddings [P, C]                       ours: prompts.weight
    PREFIX_TUNING    prompt_embeddings [P, L * 2 * K * D]           ours: blocks.i.attention.prefix.weight [2, K, P, D]

There, as with `shift: true`, tokens stand P places further right. Vectors that were trained without a shift are turned
into such ones where positions are rotary: a key of a prefix is rotated by P places, and prompts need nothing. Learned
positions know no such turn. An encoder is dropped: what it gave is written.

Legend of shapes: P vectors, C width, L blocks, K key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.models.layers import rotary, rotate

NAME: Final = "prompt_embeddings"
"""Of their only tensor."""
KINDS: Final = {"PROMPT_TUNING": "prompt", "P_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
"""`peft_type` -> technique."""


@torch.no_grad()
def to_peft(model: nn.Module, base: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What adapter_config.json and adapter_model.safetensors hold.

    Args:
        model: a `Transformer` with prompts or a prefix.
        base: folder or name of the model that they were trained on.
    Raises:
        UserError: if it has neither or both, or their places cannot be said there.
    """
    net: Any = model
    c = net.config
    prefixes = [block.attention.prefix for block in net.blocks]
    given = [prefix is not None for prefix in prefixes]
    if bool(net.prepended) == any(given) or any(given) != all(given):
        what = "the model has no prompts, or a prefix in some blocks only, or both."
        raise UserError(what, "export", "peft holds either prompts or a prefix of all blocks.")
    count = net.prepended or prefixes[0]().shape[2]
    if net.shift != count and net.positions is not None:
        what = "with learned positions, peft's tokens stand further right than these do."
        raise UserError(what, "export", "Train with `shift: true`.")
    kv_heads = c.kv_heads or c.heads
    raw = {
        "base_model_name_or_path": base, "task_type": "CAUSAL_LM" if c.head in ("", "lm") else None,
        "num_virtual_tokens": count, "num_layers": c.layers, "num_transformer_submodules": 1, "inference_mode": True,
    }  # fmt: skip
    if net.prepended:
        raw |= {"peft_type": "PROMPT_TUNING", "token_dim": c.width, "num_attention_heads": c.heads}
        return raw, {NAME: net.prompts().detach().clone()}
    raw |= {"peft_type": "PREFIX_TUNING", "token_dim": kv_heads * c.head_dim, "num_attention_heads": kv_heads}
    raw |= {"prefix_projection": False, "encoder_hidden_size": c.width}
    turn = count if c.positions == "rotary" and net.shift != count else 0
    layers = [_turned(prefix().detach(), c, turn) for prefix in prefixes]
    return raw, {NAME: torch.cat([layer.permute(2, 0, 1, 3).flatten(1) for layer in layers], 1)}


def settings(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`{technique: settings}` with which a recipe takes such an adapter.

    Raises:
        UserError: if it is of another kind.
    """
    name = KINDS.get(str(raw.get("peft_type")))
    if name is None or raw.get("num_transformer_submodules") not in (None, 1):
        what = f"adapters of type `{raw.get('peft_type')}` are no prompts of a single Transformer."
        raise UserError(what, "adapter_config.json", f"Known: {', '.join(KINDS)}.")
    return {
        name: {"length": int(raw["num_virtual_tokens"]), "shift": True}
        | ({"start": "random"} if name == "prompt" else {})
    }


def from_peft(raw: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Their tensors under our names, for a model that `settings` was applied to.

    Raises:
        UserError: if they do not fit it.
    """
    net: Any = model
    name = next(iter(settings(raw)))
    rows = tensors[NAME]
    if name == "prompt":
        found = {"prompts.weight": rows}
    else:
        c = net.config
        parts = rows.chunk(c.layers, 1)
        shape = (len(rows), 2, c.kv_heads or c.heads, c.head_dim)
        wanted = c.layers * math.prod(shape[1:])
        if rows.shape[1] != wanted:
            what = f"{NAME} has {rows.shape[1]} columns, and the model's keys and values {wanted}."
            raise UserError(what, "adapter_model.safetensors")
        found = {
            f"blocks.{i}.attention.prefix.weight": part.view(shape).permute(1, 2, 0, 3) for i, part in enumerate(parts)
        }
    own = dict(model.named_parameters())
    wrong = [n for n, t in found.items() if n not in own or own[n].shape != t.shape]
    if wrong:
        raise UserError(f"{', '.join(wrong[:3])} do not fit the model.", "adapter_model.safetensors")
    return found


def _turned(pair: Tensor, c: Any, places: int) -> Tensor:
    """Keys and values [2, K, P, D], the keys rotated by some places."""
    if not places:
        return pair
    cos, sin = rotary(torch.full((pair.shape[2],), places, device=pair.device), c, pair.dtype)
    return torch.stack([rotate(pair[0], cos, sin), pair[1]])
