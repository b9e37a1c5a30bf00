"""Tables of the guide to accelerators, from `evidence/` and from the descriptions."""

from __future__ import annotations

from typing import Any

from tables_computation import evidence, table

from scrimp.machines.accelerators.views import figure

CLASSES = {
    "L0": "Closed forms without a free parameter",
    "L1": "Ratios and times within one machine",
    "L2": "One machine against another",
    "L3": "Against CPUs and GPUs, whose efficiency is fitted",
}


def machines() -> str:
    """What was published, and what the simulator gives; one table a class."""
    rows: list[dict[str, Any]] = evidence("machines")["rows"]
    parts: list[str] = []
    for kind, title in CLASSES.items():
        lines = [_line(row) for row in rows if row["class"] == kind]
        head = ["machine", "what", "value", "simulated", "error", "allowed", "verdict"]
        parts += [f"{title} ({kind}):", table(head, lines)]
    return "\n\n".join(parts)


def _line(row: dict[str, Any]) -> list[str]:
    value = f"{figure(row['value'])} {row['unit']}".rstrip() + f" ({row['status']}; {row['source']})"
    figures = ["", "", ""]
    if row["error"] is not None and not row["fit"]:
        error = f"{100 * float(row['error']):+.1f} %".replace("-0.0", "+0.0")
        figures = [figure(row["model_value"]), error, f"{100 * row['tolerance']:.2g} %"]
    words = [row["verdict"], row["fitted_on"] and f"fitted on {row['fitted_on']}", row["note"]]
    return [f"`{row['machine']}`", row["quantity"], value, *figures, "; ".join(filter(None, words))]


def accelerators() -> str:
    """Every description that comes with Scrimp."""
    from scrimp.machines.accelerators.architecture import accelerator, known

    lines: list[list[str]] = []
    for name in known():
        found = accelerator(name)
        tags = list(found.tags().values())
        lines.append([f"`{name}`", found.about, *(str(tags.count(tag)) for tag in "VSCR")])
    return table(["machine", "is", "numbers read", "second-hand", "computed or assumed", "recalled"], lines)
