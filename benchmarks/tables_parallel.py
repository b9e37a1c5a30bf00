"""Tables of the guide to many devices, from `evidence/parallel.json`."""

from __future__ import annotations

from typing import Any

from tables_computation import evidence, table


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
