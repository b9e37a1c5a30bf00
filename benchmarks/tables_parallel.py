"""Tables and pictures of the guides to many devices, from `evidence/parallel.json` and `evidence/pipeline.json`."""

from __future__ import annotations

from typing import Any, Final

from tables_computation import evidence, table

from scrimp.charts import COLORS, WIDTH, figure
from scrimp.timetable import Action, actions, timed

DRAWN: Final = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1, "zbv": 2}
"""Orders whose timetables are drawn, of four ranks and eight micro-batches -> stages a rank."""
LINE: Final = 17
"""Height of a rank's line in a picture."""


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of one table; none where it was not measured."""
    return evidence("parallel").get(name, [])


def parallel() -> str:
    """Difference of each layout from one process."""
    lines = [[row["layout"], str(row["ranks"]), f"{row['difference']:.1e}" if "difference" in row else "failed"]
             for row in rows("parity")]  # fmt: skip
    return table(["layout", "ranks", "difference"], lines) if lines else "Not measured yet."


def parallel_memory() -> str:
    """Planned and counted bytes of a rank."""
    lines = [[row["layout"], str(row["ranks"]), f"{row['planned']:,}", f"{row['live']:,}",
              f"{100 * (row['planned'] / row['live'] - 1):+.2f} %"]
             for row in rows("memory") if "live" in row]  # fmt: skip
    return table(["layout", "ranks", "planned", "counted", "error"], lines) if lines else "Not measured yet."


def parallel_clusters() -> str:
    """Plans for groups that are not here. Stage 2 of ZeRO holds whole weights beside its part of them."""
    lines: list[list[str]] = []
    for row in rows("clusters"):
        kinds, formula = row["kinds"], sum(row["formula"].values())
        held = sum(kinds[kind] for kind in ("weights", "gradients", "states"))
        held += kinds["gathered"] if row["stage"] == 2 else 0
        lines.append([
            row["model"], f"{row['ranks']:,}", str(row["stage"]), *(f"{size / 1e9:.3f}" for size in (formula, held)),
            f"{100 * (held / formula - 1):+.1f} %", f"{row['planned'] / 1e9:.2f}",
        ])  # fmt: skip
    head = ["weights", "ranks", "stage", "paper: weights, gradients, states, GB", "planned: the same, GB", "gap",
            "planned: highest of all, GB"]  # fmt: skip
    return table(head, lines) if lines else "Not measured yet."


def parallel_killed() -> str:
    """Ranks that were killed."""
    found = rows("killed")
    if not found:
        return "Not measured yet."
    seconds = [row["seconds_until_gone"] for row in found]
    same = sum(row["bitwise"] for row in found)
    return (f"{len(found)} times at steps {min(row['step'] for row in found)} to {max(row['step'] for row in found)}: "
            f"no hang; all ranks gone after {min(seconds):.1f} to {max(seconds):.1f} s; "
            f"{same} of {len(found)} resumed runs end with the same bits as a run that was left alone.")  # fmt: skip


def pipeline() -> str:
    """Idle shares: by the formula, by the timetable, and of processes that send."""
    lines: list[list[str]] = []
    for row in evidence("pipeline").get("rows", []):
        ranks, parts, each = row["ranks"], row["micro_batches"], row["stages_per_rank"]
        formula = (ranks - 1) / (each * parts + ranks - 1) if row["order"] in ("gpipe", "1f1b", "interleaved") else None
        lines.append([f"`{row['order']}`", str(ranks), str(parts), f"{formula:.3f}" if formula else "",
                      f"{row['idle']:.3f}", f"{row['measured']:.3f}"])  # fmt: skip
    return table(["order", "ranks", "micro-batches", "formula", "timetable", "measured"], lines)


def pipeline_charts() -> str:
    """What four ranks compute when."""
    return "".join(timetable(order, timed(actions(order, 4, 8, each))) for order, each in DRAWN.items())


def timetable(order: str, rows: list[list[Action]]) -> str:
    """A line a rank, a number a micro-batch: forward passes empty, backward ones blue, those of weights alone green."""
    left, end = 40, max(a.end for row in rows for a in row)
    scale = (WIDTH - left - 4) / end
    drawn: list[str] = []
    for rank, row in enumerate(rows):
        top = 4 + rank * LINE
        drawn.append(f'<text x="0" y="{top + 12}">rank {rank}</text>')
        for a in row:
            x, wide = left + a.start * scale, (a.end - a.start) * scale
            fill = {"F": "none", "B": COLORS[1], "I": COLORS[1], "W": COLORS[3]}[a.kind]
            drawn.append(f'<rect x="{x:.1f}" y="{top}" width="{wide:.1f}" height="{LINE - 3}" fill="{fill}" '
                         f'fill-opacity="0.45" stroke="currentColor" stroke-width="0.5"/>'
                         f'<text x="{x + wide / 2:.1f}" y="{top + 11}" text-anchor="middle" font-size="8">'
                         f"{a.part}</text>")  # fmt: skip
    return figure(order, 8 + LINE * len(rows), "".join(drawn))
