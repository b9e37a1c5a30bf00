"""Tables of the guide to attention, from `evidence/attention.json`."""

from __future__ import annotations

import statistics
from typing import Any

from tables_computation import evidence, table


def attention() -> str:
    """What each core reached at each share of the pairs, as it is and tuned."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for key, row in evidence("attention")["rows"].items():
        model, *rest = key.split("/")
        if model != "memory":
            found.setdefault(f"{model}: {rest[0]}", {}).setdefault(rest[1], []).append(row)
    lines: list[list[str]] = []
    for arm, ways in found.items():
        metric, digits = ("accuracy", 1) if arm.startswith("images") else ("loss", 3)
        scale = 100 if metric == "accuracy" else 1
        line = [arm]
        for way in ("as it is", "tuned"):
            rows = ways.get(way, [])
            kept, score = ([row[name] for row in rows] for name in ("kept", metric))
            if rows:
                line += [f"{100 * statistics.mean(kept):.1f}", f"{scale * statistics.mean(score):.{digits}f}"]
            else:
                line += ["", ""]
        lines.append(line)
    head = ["model: core", "pairs kept, %", "accuracy, % or loss", "pairs kept, tuned, %", "accuracy, % or loss, tuned"]
    return table(head, lines)


def attention_memory() -> str:
    """Live bytes of one head at the peak of both passes, by length."""
    rows = {
        int(key.split("/")[1]): row for key, row in evidence("attention")["rows"].items() if key.startswith("memory/")
    }
    lines = [[str(n), *(f"{row[kind] / 1e6:.1f}" for kind in ("tiled", "scores"))] for n, row in sorted(rows.items())]
    return table(["tokens", "tiled, MB", "with the matrix of scores, MB"], lines)
