"""The recipes that are planned and measured: sizes, lengths, batches, each technique, pairs, stages, frozen, untied."""

from __future__ import annotations

from typing import Any, Final

Case = dict[str, Any]

SIZES: Final[dict[str, Case]] = {
    "tiny": {"layers": 4, "width": 128, "heads": 4, "context": 64, "batch": 32, "vocab": 512},
    "4m": {"layers": 4, "width": 256, "heads": 4, "context": 256, "batch": 8, "vocab": 8192},
    "10m": {"layers": 6, "width": 384, "heads": 6, "context": 256, "batch": 8, "vocab": 16384},
    "30m": {"layers": 8, "width": 512, "heads": 8, "context": 256, "batch": 8, "vocab": 8192},
    "gpt2": {"layers": 12, "width": 768, "heads": 12, "context": 256, "batch": 2, "vocab": 50257},
    "deep": {"layers": 16, "width": 256, "heads": 8, "context": 128, "batch": 16, "vocab": 4096},
    "wide": {"layers": 2, "width": 1024, "heads": 16, "context": 128, "batch": 16, "vocab": 8192},
    "long": {"layers": 4, "width": 256, "heads": 4, "context": 1024, "batch": 2, "vocab": 8192},
}
LLAMA: Final[Case] = {"norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "bias": False}
RULES: Final = ("sgd", "adam", "adamw", "lion", "muon")
"""Update rules, which take AdamW's place."""
TUNED: Final = ({"lora": {"rank": 8}}, {"lora": {"rank": 8}, "recompute": {}},
                {"lora": {"rank": 8}, "recompute": {}, "fused_loss": {}})  # fmt: skip
PAIRS: Final = (
    ("fused_loss", "recompute"), ("fused_loss", "accumulate"), ("recompute", "accumulate"), ("sam", "fused_loss"),
    ("ema", "fused_loss"), ("clip", "accumulate"), ("lora", "accumulate"), ("stack", "fused_loss"),
    ("length_warmup", "recompute"), ("stack", "length_warmup"), ("ema", "recompute"), ("autocast", "fused_loss"),
    ("autocast", "recompute"), ("sam", "recompute"), ("t_fixup", "fused_loss"),
)  # fmt: skip


def case(size: str, techniques: dict[str, Any] | None = None, changes: Case | None = None) -> Case:
    """A recipe of the grid, as a mapping."""
    values = {**SIZES[size], **(changes or {})}
    model = {k: v for k, v in values.items() if k not in ("context", "batch", "vocab", "dtype", "unit")}
    return {
        "model": model,
        "context": values["context"],
        "vocab": values["vocab"],
        "batch": values["batch"],
        "dtype": values.get("dtype", "float32"),
        "techniques": techniques if techniques is not None else {"adamw": {}},
    }


def grid(names: list[str], example: Any) -> dict[str, Case]:
    """Every case by name.

    Args:
        names: all techniques.
        example: name -> settings to try it with.
    """
    cases: dict[str, Case] = {size: case(size) for size in SIZES}
    for size in SIZES:
        cases[f"{size}/fused"] = case(size, {"adamw": {}, "fused_loss": {}})
    models: dict[str, Case] = {
        "half": {"batch": 4}, "double": {"batch": 16}, "short": {"context": 64}, "double-length": {"context": 512},
        "untied": {"tied": False}, "llama": LLAMA, "llama-grouped": {**LLAMA, "kv_heads": 2},
        "post": {"norm_at": "post"},
        "dropout": {"dropout": 0.1}, "relu": {"activation": "relu"}, "tanh": {"activation": "gelu_tanh"},
        "bfloat16": {"dtype": "bfloat16"}, "no-positions": {"positions": "none"}, "qk-norm": {"qk_norm": True},
    }  # fmt: skip
    for name, changes in models.items():
        cases[f"4m/{name}"] = case("4m", changes=changes)
    for name in ("llama", "untied"):
        cases[f"10m/{name}"] = case("10m", changes=LLAMA if name == "llama" else {"tied": False})
    for name in names:
        if name != "compile":
            rule = name in RULES
            cases[f"4m+{name}"] = case("4m", {name: example(name)} | ({} if rule else {"adamw": {}}))
    for pair in PAIRS:
        cases[f"10m+{'+'.join(pair)}"] = case("10m", {"adamw": {}} | {name: example(name) for name in pair})
    for size in ("10m", "gpt2"):
        for tuned in TUNED:
            cases[f"{size}+{'+'.join(tuned)}"] = case(size, {"adamw": {}} | tuned)
        cases[f"{size}+recompute"] = case(size, {"adamw": {}, "recompute": {}})
        cases[f"{size}+sgd+fused_loss"] = case(size, {"sgd": {}, "fused_loss": {}})
    for size, name in (("deep", "recompute"), ("wide", "lora"), ("long", "recompute"), ("long", "fused_loss"),
                       ("tiny", "lion"), ("30m", "recompute")):  # fmt: skip
        cases[f"{size}+{name}"] = case(size, ({} if name == "lion" else {"adamw": {}}) | {name: example(name)})
    return cases
