"""Planned memory and computation of ways to tune one model: `PYTHONPATH=tests python benchmarks/tuning_memory.py`.

A decoder of 12 blocks of width 768 with a vocabulary of 32, so that the head does not hide the blocks; four sequences
of 512 tokens, AdamW, float32. The table in docs/guides/prompts.md is its output.
"""

from __future__ import annotations

from typing import Any, Final

from scrimp.planning import plan
from scrimp.registry import technique_class
from tiny import TinyData, recipe

MODEL: Final = {"layers": 12, "width": 768, "heads": 12, "dropout": 0.0}
LORA: Final = ("lora", {"rank": 8, "targets": "attention.qkv"})
PACKED: Final = ("quantized_base", {})
ROWS: Final[dict[str, list[tuple[str, dict[str, Any]]]]] = {
    "all weights": [],
    "`lora` of rank 8 on attention.qkv": [LORA],
    "`prompt` of 20": [("prompt", {})],
    "`prefix` of 20": [("prefix", {})],
    "`ladder`": [("ladder", {})],
    "`lora`, `quantized_base`": [LORA, PACKED],
    "`ladder`, `quantized_base`": [("ladder", {}), PACKED],
    "`share` with `distinct: 1`": [("share", {"distinct": 1})],
}


def main() -> None:
    """Print the table."""
    print(
        "| trained | numbers trained | peak, MiB | forward, GFLOP | backward, GFLOP |\n| --- | --- | --- | --- | --- |"
    )
    for name, chosen in ROWS.items():
        techniques = [technique_class(key)(**settings) for key, settings in (("adamw", {}), *chosen)]
        made = recipe(*techniques, model=MODEL, data=TinyData(context=512), duration="2 step")
        found = plan(made)
        (stage,) = found.stages
        flops = [round(stage.flops()[phase] / 1e9) for phase in ("forward", "backward")]
        print(f"| {name} | {stage.trained:,} | {found.live / 2**20:,.0f} | {flops[0]} | {flops[1]} |", flush=True)


if __name__ == "__main__":
    main()
