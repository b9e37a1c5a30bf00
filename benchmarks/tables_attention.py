"""Tables and charts of the guide to attention, from `evidence/attention.json`."""

from __future__ import annotations

import statistics
from typing import Any

from tables_computation import evidence, table

from scrimp.charts import BYTES, Axis, Line, legend, line_chart

WAYS = ("as it is", "tuned")
Rows = list[dict[str, Any]]


def rows_by_arm() -> dict[tuple[str, str], dict[str, Rows]]:
    """(model, core with its settings) -> way -> a row of each seed."""
    found: dict[tuple[str, str], dict[str, Rows]] = {}
    for key, row in evidence("attention")["rows"].items():
        model, *rest = key.split("/")
        if model != "memory":
            found.setdefault((model, rest[0]), {}).setdefault(rest[1], []).append(row)
    return found


def metric(model: str) -> tuple[str, float, int]:
    """What a model is judged by, its factor, and its digits."""
    return ("accuracy", 100.0, 1) if model == "images" else ("loss", 1.0, 3)


def mean(rows: Rows, name: str) -> float:
    """Of the seeds."""
    return statistics.mean(row[name] for row in rows)


def attention() -> str:
    """What each core reached at each share of the pairs, as it is and tuned."""
    lines: list[list[str]] = []
    for (model, arm), ways in rows_by_arm().items():
        name, scale, digits = metric(model)
        line = [f"{model}: {arm}"]
        for rows in (ways.get(way, []) for way in WAYS):
            line += [f"{100 * mean(rows, 'kept'):.1f}", f"{scale * mean(rows, name):.{digits}f}"] if rows else ["", ""]
        lines.append(line)
    head = ["model: core", "pairs kept, %", "accuracy, % or loss", "pairs kept, tuned, %", "accuracy, % or loss, tuned"]
    return table(head, lines)


def attention_chart() -> str:
    """Accuracy, and loss, against the share of the pairs that is left out; a line for each core and way."""
    arms = rows_by_arm()
    if not arms:
        return "Not measured yet."
    names = sorted({(arm.split(",")[0], way) for _, arm in arms if arm != "all pairs" for way in WAYS})
    drawn: list[str] = []
    for model, title in (("images", "Images"), ("text", "Text")):
        name, scale, _ = metric(model)
        lines: list[Line] = []
        for style, (core, way) in enumerate(names):
            found = [ways[way] for (kind, arm), ways in arms.items()
                     if kind == model and arm.split(",")[0] == core and way in ways]  # fmt: skip
            points = sorted((100 - 100 * mean(rows, "kept"), scale * mean(rows, name)) for rows in found)
            lines.append(Line(f"{core}, {way}", style, points, dots=True))
        label = "accuracy, %" if model == "images" else "loss"
        drawn.append(line_chart(title, lines, Axis("pairs left out, %"), Axis(label)))
    return "".join(drawn) + legend([Line(f"{core}, {way}", i, ()) for i, (core, way) in enumerate(names)])


def attention_machines() -> str:
    """How much sooner, and with how much less energy, each machine is done with each core's masks."""
    arms = rows_by_arm()
    lines: list[list[str]] = []
    for (model, arm), ways in arms.items():
        rows, whole = ways.get("tuned", []), arms.get((model, "all pairs"), {}).get("tuned", [])
        if arm == "all pairs" or not rows or not whole:
            continue
        line = [f"{model}: {arm}", f"{100 * mean(rows, 'kept'):.1f}"]
        for machine in whole[0]["machines"]:
            ratios = [
                statistics.mean(row["machines"][machine][name] for row in whole)
                / statistics.mean(row["machines"][machine][name] for row in rows)
                for name in ("seconds", "joules")
            ]
            line.append(" / ".join(f"{ratio:.2f}" for ratio in ratios))
        lines.append(line)
    machines = [f"`{name}`" for name in machine_names(arms)]
    return table(["model: masks of", "pairs kept, %", *machines], lines)


def machine_names(arms: dict[tuple[str, str], dict[str, Rows]]) -> list[str]:
    """In the order of the rows."""
    return list(next((row["machines"] for ways in arms.values() for rows in ways.values() for row in rows), {}))


def attention_memory() -> str:
    """Live bytes of one head at the peak of both passes, by length: a table and a chart."""
    rows = {
        int(key.split("/")[1]): row for key, row in evidence("attention")["rows"].items() if key.startswith("memory/")
    }
    kinds = {"tiled": "tiled", "scores": "with the matrix of scores"}
    lines = [[str(n), *(f"{row[kind] / 1e6:.1f}" for kind in kinds)] for n, row in sorted(rows.items())]
    drawn = [
        Line(name, style, [(n, row[kind]) for n, row in sorted(rows.items())], dots=True)
        for style, (kind, name) in enumerate(kinds.items())
    ]
    chart = line_chart("Memory of one head", drawn, Axis("tokens", zero=True), Axis("{}", BYTES, zero=True))
    return table(["tokens", *(f"{name}, MB" for name in kinds.values())], lines) + "\n\n" + chart + legend(drawn)
