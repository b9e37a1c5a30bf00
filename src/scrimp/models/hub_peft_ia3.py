"""(IA)^3 between our layers and peft's.

Keys' and values' factors are rows of one layer here; where q, k and v are one layer there too, as in GPT-2, peft scales
the queries as well, which `queries` does here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from scrimp.errors import UserError
from scrimp.models.hub_peft import Folder, Names, Trained
from scrimp.models.seams import matching

PARTS: Final = {"qkv": "qkv", "kv": "kv", "q": "q"}
"""Last part of a layer's name -> which projections it holds, in order."""


def write(trained: Trained) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What adapter_config.json says, and their tensors."""
    named, names, technique = trained.weights(), trained.names, trained.techniques[0]
    tensors: dict[str, Tensor] = {}
    outputs, inputs = _layers(technique, names)
    for layer in outputs:
        factors, moved = _whole(named, layer, names)
        for theirs, rows in names.places(layer).items():
            if moved[rows].any():
                tensors[f"{theirs}.ia3_l"] = factors[rows][:, None]
    ahead: list[str] = []
    for layer in inputs:
        for theirs in names.places(layer):
            tensors[f"{theirs}.ia3_l"] = named[f"{layer}.ia3.hidden"][None]
            ahead.append(theirs)
    chosen = names.short([name.removesuffix(".ia3_l") for name in tensors])
    return {
        "target_modules": chosen, "feedforward_modules": names.short(ahead),
        "fan_in_fan_out": names.model_type == "gpt2",
    }, tensors  # fmt: skip


def read(folder: Folder) -> dict[str, Tensor]:
    """Our tensors of what is held.

    Raises:
        UserError: if the queries have factors of their own, and the recipe gives them none.
    """
    held, names, technique, ours = folder.held, folder.names, folder.techniques[0], dict[str, Tensor]()
    outputs, inputs = _layers(technique, names)
    for layer in outputs:
        places = {theirs: rows for theirs, rows in names.places(layer).items() if f"{theirs}.ia3_l" in held}
        factors = torch.ones(names.layers[layer][0], dtype=folder.base[f"{layer}.weight"].dtype)
        for theirs, rows in places.items():
            factors[rows] = held.pop(f"{theirs}.ia3_l").flatten().to(factors.dtype)
        for part, rows in _rows(layer, names).items():
            if part != "q" or technique.queries:
                ours[f"{layer}.ia3.{part}"] = factors[rows]
            elif not (factors[rows] == 1).all():
                fix = "Set `queries: true`."
                raise UserError(f"the folder scales the queries of `{layer}`.", "techniques.ia3.queries", fix)
    for layer in inputs:
        for theirs in names.places(layer):
            if f"{theirs}.ia3_l" in held:
                ours[f"{layer}.ia3.hidden"] = held.pop(f"{theirs}.ia3_l").flatten()
    return ours


def _layers(technique: Any, names: Names) -> tuple[list[str], list[str]]:
    """Our layers whose outputs are scaled, and those whose inputs are."""
    every = list(names.layers)
    found = (matching(pattern, every, "linear layer") if pattern else []
             for pattern in (technique.keys_values, technique.hidden))  # fmt: skip
    outputs, inputs = found
    return outputs, inputs


def _rows(layer: str, names: Names) -> dict[str, slice]:
    """Which outputs of a layer are q, k and v; `all` where it holds none of them."""
    c, outputs = names.config, names.layers[layer][0]
    kv = (c.kv_heads or c.heads) * c.head_dim
    held = PARTS.get(layer.rpartition(".")[2], "")
    sizes = {"q": outputs - kv * (len(held) - 1), "k": kv, "v": kv}
    if not held:
        return {"all": slice(0, outputs)}
    rows: dict[str, slice] = {}
    at = 0
    for part in held:
        rows[part] = slice(at, at + sizes[part])
        at += sizes[part]
    return rows


def _whole(named: Mapping[str, Tensor], layer: str, names: Names) -> tuple[Tensor, Tensor]:
    """All factors of a layer, and which of them are trained: [outputs] each."""
    parts = {part: rows for part, rows in _rows(layer, names).items() if f"{layer}.ia3.{part}" in named}
    like = named[f"{layer}.ia3.{next(iter(parts))}"]
    factors, trained = like.new_ones(names.layers[layer][0]), torch.zeros(names.layers[layer][0], dtype=torch.bool)
    for part, rows in parts.items():
        factors[rows], trained[rows] = named[f"{layer}.ia3.{part}"], True
    return factors, trained
