"""Prompts and prefixes between our models and peft's.

    PROMPT_TUNING, P_TUNING  prompt_embeddings [P, C]                ours: prompts.weight
    PREFIX_TUNING            prompt_embeddings [P, L * 2 * K * D]    ours: blocks.i.attention.prefix.weight [2, K, P, D]

There, as with `shift: true`, tokens stand P places further right. Vectors that were trained without a shift are turned
into such ones where positions are rotary: a key of a prefix is rotated by P places, and prompts need nothing. Learned
positions know no such turn. An encoder is dropped: what it gave is written.

Legend of shapes: P vectors, C width, L blocks, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from scrimp.errors import UserError
from scrimp.models.hub_peft import VECTORS, Folder, Trained
from scrimp.models.layers import rotary, rotate
from scrimp.models.seams import matching
from scrimp.models.transformer import TransformerConfig

HEADS: Final = {"prompt": ("", "lm"), "prefix": ("", "lm", "classes")}
"""Technique -> heads with which peft computes the same: it pools a prompt where the first token stands for all."""


@torch.no_grad()
def write(trained: Trained) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What adapter_config.json says, and their tensor.

    Raises:
        UserError: if peft has no such vectors for the model, or their places cannot be said there.
    """
    name, net, c = trained.techniques[0].name, trained.model, trained.names.config
    _same_there(name, c, "--to")
    prefixes = [block.attention.prefix for block in net.blocks]
    if name == "prefix" and None in prefixes:
        raise UserError("peft holds a prefix of all blocks, and some have none.", "--to", "Leave `targets` as it is.")
    shapes = {net.prepended} if name == "prompt" else {prefix().shape[2] for prefix in prefixes}
    if len(shapes) > 1:
        raise UserError("peft has one length of prefixes for all blocks.", "--to", "Train them alike.")
    count = shapes.pop()
    if net.shift != count and c.positions == "learned":
        what = "with learned positions, peft's tokens stand further right than these do."
        raise UserError(what, "--to", "Train with `shift: true`.")
    raw = {"num_virtual_tokens": count, "num_layers": c.layers, "num_transformer_submodules": 1}
    if name == "prompt":
        return raw | {"token_dim": c.width, "num_attention_heads": c.heads}, {VECTORS: net.prompts().detach()}
    heads = c.kv_heads or c.heads
    raw |= {"token_dim": heads * c.head_dim, "num_attention_heads": heads, "prefix_projection": False}
    layers = [_turned(prefix().detach(), c, count - net.shift) for prefix in prefixes]
    return raw, {VECTORS: torch.cat([layer.permute(2, 0, 1, 3).flatten(1) for layer in layers], 1)}


def read(folder: Folder) -> dict[str, Tensor]:
    """Our tensors of what is held.

    Raises:
        UserError: if the recipe's settings are others than the folder's, with what to write; or they do not fit it.
    """
    name, c = folder.techniques[0].name, folder.names.config
    _same_there(name, c, "--from")
    if VECTORS not in folder.held or folder.raw.get("num_transformer_submodules") not in (None, 1):
        raise UserError(f"holds no `{VECTORS}` of a single Transformer.", "adapter_model.safetensors")
    rows = folder.held.pop(VECTORS)
    heads = c.kv_heads or c.heads
    columns = c.width if name == "prompt" else c.layers * 2 * heads * c.head_dim
    if rows.shape[1] != columns:
        what = f"`{VECTORS}` has {rows.shape[1]} columns, and the model needs {columns}."
        raise UserError(what, "adapter_model.safetensors", "Use the weights that they were trained on.")
    _check(folder.techniques, len(rows), c)
    if name == "prompt":
        return {"prompts.weight": rows}
    layers = rows.view(len(rows), c.layers, 2, heads, c.head_dim).permute(1, 2, 3, 0, 4)
    return {f"blocks.{i}.attention.prefix.weight": layer for i, layer in enumerate(layers)}


def _same_there(name: str, c: Any, where: str) -> None:
    """Refuse models for which peft computes something else, or nothing."""
    if not isinstance(c, TransformerConfig) or c.head not in HEADS[name]:
        heads = " or ".join(f"`{head}`" for head in HEADS[name] if head)
        what = f"peft's kind of `{name}` computes the same only with a `transformer` whose head is {heads}."
        raise UserError(what, where, "Use `lora` or `ia3`.")


def _check(techniques: Sequence[Any], length: int, c: Any) -> None:
    """Compare the recipe's settings with the folder's."""
    first = techniques[0]
    layers = [f"blocks.{i}.attention" for i in range(c.layers)]
    whole = first.name == "prompt" or matching(first.targets, layers, "attention") == layers
    if len(techniques) > 1 or not whole or (first.length, first.shift, first.encoder) != (length, True, "none"):
        raise UserError("the folder's vectors are of other settings than the recipe's.", f"techniques.{first.name}",
                        f"Write `{first.name}: {{length: {length}, shift: true}}`.")  # fmt: skip


def _turned(pair: Tensor, c: Any, places: int) -> Tensor:
    """Keys and values [2, K, P, D], the keys rotated by some places where positions are rotary."""
    if not places or c.positions != "rotary":
        return pair
    cos, sin = rotary(torch.full((pair.shape[2],), places, device=pair.device), c, pair.dtype)
    return torch.stack([rotate(pair[0], cos, sin), pair[1]])
