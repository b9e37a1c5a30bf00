"""LoRA between our layers and peft's: rank-stabilized and with magnitudes (DoRA) too.

Where one layer of ours is three of theirs, ours has one A for q, k and v, and each of theirs gets it whole:

    ours -> theirs    A_q = A_k = A_v = A,   B = [B_q; B_k; B_v]
    theirs -> ours    A = [A_q; A_k; A_v] where they differ,   B = diag(B_q, B_k, B_v), of as many times the rank
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scrimp.errors import UserError
from scrimp.models.hub_peft import Folder, Names, Trained, agreed
from scrimp.models.seams import matching

MAGNITUDE = "lora_magnitude_vector"


def write(trained: Trained) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What adapter_config.json says, and their tensors."""
    named, names, techniques = trained.weights(), trained.names, trained.techniques
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for technique in techniques:
        for layer in matching(technique.targets, list(names.layers), "linear layer"):
            a, b = named[f"{layer}.lora.a"], named[f"{layer}.lora.b"]
            for theirs, rows in names.places(layer).items():
                tensors |= {f"{theirs}.lora_A.weight": a.clone(), f"{theirs}.lora_B.weight": b[rows]}
                if technique.magnitude:
                    tensors[f"{theirs}.{MAGNITUDE}"] = named[f"{layer}.lora.m"][rows]
                sizes[theirs] = (technique.rank, technique.alpha)
    first = techniques[0]
    others = {theirs: size for theirs, size in sizes.items() if size != (first.rank, first.alpha)}
    return {
        "r": first.rank, "lora_alpha": first.alpha, "bias": "none",
        "fan_in_fan_out": names.model_type == "gpt2",
        "target_modules": names.short(list(sizes)),
        "rank_pattern": {theirs: rank for theirs, (rank, _) in others.items()},
        "alpha_pattern": {theirs: alpha for theirs, (_, alpha) in others.items()},
        "use_rslora": agreed({t.targets: t.rank_stabilized for t in techniques}, "rank_stabilized"),
        "lora_dropout": agreed({t.targets: t.dropout for t in techniques}, "dropout"),
        "use_dora": agreed({t.targets: t.magnitude for t in techniques}, "magnitude"),
    }, tensors  # fmt: skip


def read(folder: Folder) -> dict[str, Tensor]:
    """Our tensors of what is held.

    Raises:
        UserError: if the recipe's ranks, scales or layers are others than the folder's; with what to write.
    """
    raw, held, names = folder.raw, folder.held, folder.names
    ours: dict[str, Tensor] = {}
    wanted: dict[str, tuple[int, float]] = {}
    for layer in names.layers:
        places = {theirs: rows for theirs, rows in names.places(layer).items() if f"{theirs}.lora_A.weight" in held}
        if not places:
            continue
        parts = {
            theirs: (held.pop(f"{theirs}.lora_A.weight"), held.pop(f"{theirs}.lora_B.weight")) for theirs in places
        }
        a, b = _fused(parts, places, names.layers[layer][0])
        scales = {theirs: _scale(raw, theirs, len(parts[theirs][0])) for theirs in places}
        scale = agreed(scales, "scale of q, k and v")
        wanted[layer] = (len(a), scale * (math.sqrt(len(a)) if raw.get("use_rslora") else len(a)))
        ours |= {f"{layer}.lora.a": a, f"{layer}.lora.b": b}
        if raw.get("use_dora"):
            # Rows that they did not adapt keep their lengths.
            lengths = torch.linalg.vector_norm(folder.base[f"{layer}.weight"], dim=1)
            for theirs, rows in places.items():
                lengths[rows] = held.pop(f"{theirs}.{MAGNITUDE}").to(lengths.dtype)
            ours[f"{layer}.lora.m"] = lengths
    _check(raw, folder.techniques, wanted, names)
    return ours


def _fused(
    parts: Mapping[str, tuple[Tensor, Tensor]], places: Mapping[str, Tensor], outputs: int
) -> tuple[Tensor, Tensor]:
    """A and B of one layer from those of its parts: one A if they are equal, else all of them one after another."""
    first = next(iter(parts.values()))[0]
    if all(torch.equal(a, first) for a, _ in parts.values()):
        parts = {theirs: (first if i == 0 else first[:0], b) for i, (theirs, (_, b)) in enumerate(parts.items())}
        whole = first.new_zeros(outputs, len(first))
        for theirs, (_, b) in parts.items():
            whole[places[theirs]] = b
        return first, whole
    whole = first.new_zeros(outputs, sum(len(a) for a, _ in parts.values()))
    at = 0
    for theirs, (a, b) in parts.items():
        whole[places[theirs], at : at + len(a)] = b
        at += len(a)
    return torch.cat([a for a, _ in parts.values()]), whole


def _scale(raw: Mapping[str, Any], theirs: str, rank: int) -> float:
    alphas = [v for key, v in (raw.get("alpha_pattern") or {}).items() if theirs == key or theirs.endswith(f".{key}")]
    alpha = float(alphas[0] if alphas else raw["lora_alpha"])
    return alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)


def _check(
    raw: Mapping[str, Any], techniques: Sequence[Any], wanted: Mapping[str, tuple[int, float]], names: Names
) -> None:
    """Compare the recipe's settings with the folder's."""
    stabilized, magnitude = bool(raw.get("use_rslora")), bool(raw.get("use_dora"))
    # With magnitudes, inputs are not dropped here.
    dropout = 0.0 if magnitude else float(raw.get("lora_dropout") or 0.0)
    given = {
        layer: (t.rank, t.alpha)
        for t in techniques
        for layer in matching(t.targets, list(names.layers), "linear layer")
        if (t.rank_stabilized, t.magnitude, t.dropout) == (stabilized, magnitude, dropout)
    }
    same = given.keys() == wanted.keys() and all(
        given[n][0] == wanted[n][0] and math.isclose(given[n][1], wanted[n][1], rel_tol=1e-9) for n in wanted
    )
    if same:
        return
    layers: dict[tuple[int, float], list[str]] = {}
    for layer, size in wanted.items():
        ending = ".".join(layer.split(".")[-2:])
        if ending not in layers.setdefault(size, []):
            layers[size].append(ending)
    more = (", rank_stabilized: true" if stabilized else "") + (", magnitude: true" if magnitude else "")
    more += f", dropout: {dropout:g}" if dropout else ""
    lines = [f"{{rank: {rank}, alpha: {alpha:g}, targets: {'|'.join(found)}{more}}}"
             for (rank, alpha), found in layers.items()]  # fmt: skip
    text = lines[0] if len(lines) == 1 else f"[{', '.join(lines)}]"
    raise UserError("the folder's adapters are of other settings than the recipe's.", "techniques.lora",
                    f"Write `lora: {text}`.")  # fmt: skip
