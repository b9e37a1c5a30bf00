"""Named sizes. A preset is a set of options; a recipe may override any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from scrimp.errors import UserError, did_you_mean

LLAMA: Final[dict[str, Any]] = {
    "norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False, "tied": False,
}  # fmt: skip

BART: Final[dict[str, Any]] = {"norm_at": "post", "embed_norm": True, "position_offset": 2}

CLIP: Final[dict[str, Any]] = {"activation": "quick_gelu"}

GPT2: Final[dict[str, Any]] = {"vocab": 50257, "context": 1024, "activation": "gelu_tanh"}

VIT: Final[dict[str, Any]] = {"patch": 16, "norm_eps": 1e-6}
SMALL_VIT: Final[dict[str, Any]] = {"layers": 6, "width": 128, "heads": 4, "patch": 4, "init_std": 0.1}
"""For images of 28 or 32 pixels. First weights are about 1 / sqrt(width), as ViT draws them; 0.02 suits wide models."""
TINY: Final[dict[str, Any]] = {"layers": 12, "width": 192, "heads": 3, **VIT}
SMALL: Final[dict[str, Any]] = {"layers": 12, "width": 384, "heads": 6, **VIT}
BASE: Final[dict[str, Any]] = {"layers": 12, "width": 768, "heads": 12, **VIT}

PRESETS: Final[dict[str, dict[str, Any]]] = {
    "gpt-1m": {"layers": 4, "width": 128, "heads": 4},
    "gpt-4m": {"layers": 4, "width": 256, "heads": 4},
    "gpt-10m": {"layers": 6, "width": 384, "heads": 6},
    "gpt-30m": {"layers": 8, "width": 512, "heads": 8},
    "gpt2-small": {"layers": 12, "width": 768, "heads": 12, **GPT2},
    "gpt2-medium": {"layers": 24, "width": 1024, "heads": 16, **GPT2},
    "gpt2-large": {"layers": 36, "width": 1280, "heads": 20, **GPT2},
    "gpt-1.3b": {"layers": 24, "width": 2048, "heads": 16, "vocab": 50257, "context": 2048},
    "llama-1m": {"layers": 4, "width": 128, "heads": 4, **LLAMA},
    "llama-10m": {"layers": 6, "width": 384, "heads": 6, "kv_heads": 2, **LLAMA},
    "llama-160m": {"layers": 12, "width": 768, "heads": 12, "kv_heads": 4, "context": 2048, **LLAMA},
    "llama-1.1b": {"layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "hidden": 5632, "vocab": 32000,
                   "context": 2048, **LLAMA},
    "llama3-8b": {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "hidden": 14336, "vocab": 128256,
                  "context": 8192, "rope_base": 500000.0, **LLAMA},
    "vit-1m": SMALL_VIT,
    "vit-tiny": TINY,
    "vit-small": SMALL,
    "vit-base": BASE,
    "deit-tiny": TINY,
    "mae-1m": {**SMALL_VIT, "positions": "sincos", "decoder_layers": 2, "decoder_width": 64, "decoder_heads": 4},
    "mae-base": {**BASE, "positions": "sincos", "decoder_layers": 8, "decoder_width": 512, "decoder_heads": 16},
    "bart-1m": {"layers": 2, "width": 128, "heads": 4, **BART},
    "bart-base": {"layers": 6, "width": 768, "heads": 12, "vocab": 50265, "context": 1024, **BART},
    "bart-large": {"layers": 12, "width": 1024, "heads": 16, "vocab": 50265, "context": 1024, **BART},
    "clip-1m": {"layers": 2, "width": 128, "heads": 4, "image_layers": 3, "patch": 8, "projection": 128, **CLIP},
    "clip-base-32": {"layers": 12, "width": 512, "heads": 8, "vocab": 49408, "context": 77, "image": 224,
                     "channels": 3, "patch": 32, "image_width": 768, "image_heads": 12, "projection": 512, **CLIP},
    "clip-large-14": {"layers": 12, "width": 768, "heads": 12, "vocab": 49408, "context": 77, "image": 224,
                      "channels": 3, "patch": 14, "image_layers": 24, "image_width": 1024, "image_heads": 16,
                      "projection": 768, **CLIP},
}  # fmt: skip

KINDS: Final[dict[str, str]] = {
    **dict.fromkeys(("vit-1m", "vit-tiny", "vit-small", "vit-base", "deit-tiny"), "vision"),
    **dict.fromkeys(("mae-1m", "mae-base"), "masked_autoencoder"),
    **dict.fromkeys(("bart-1m", "bart-base", "bart-large"), "encoder_decoder"),
    **dict.fromkeys(("clip-1m", "clip-base-32", "clip-large-14"), "two_towers"),
}
"""preset -> the name of its model, where that is not `transformer`."""


def kind_of(settings: Mapping[str, Any], where: str = "model") -> str:
    """The name of the model that `{name, preset, from, ...}` asks for: a preset's or a folder's own, if it has none.

    Raises:
        UserError: if the folder cannot be read.
    """
    if "name" in settings:
        return str(settings["name"])
    if settings.get("from") is not None:
        from scrimp.models.hub import read_kind

        return read_kind(str(settings["from"]))
    return KINDS.get(str(settings.get("preset")), "transformer")


def expand(settings: Mapping[str, Any], where: str = "model") -> dict[str, Any]:
    """`{preset, from, ...options}` -> options.

    Args:
        settings: `preset` is a name of `PRESETS`; `from` is a Hugging Face folder, whose architecture is then fixed.
    Raises:
        UserError: for an unknown preset, or for `preset` and `from` together.
    """
    options = dict(settings)
    preset, folder = options.pop("preset", None), options.pop("from", None)
    if preset is not None and folder is not None:
        raise UserError("`preset` and `from` are both given.", where, "Keep one of them.")
    if folder is not None:
        from scrimp.models.hub import read_config

        return {**read_config(str(folder)), **options, "source": str(folder)}
    if preset is None:
        return options
    if preset not in PRESETS:
        raise UserError(f"there is no preset `{preset}`.", f"{where}.preset", did_you_mean(str(preset), PRESETS))
    return {**PRESETS[preset], **options}
