"""Tables of the guide to sparse products, from `evidence/`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

from tables_computation import evidence, spread, table

OURS: Final = ("inner", "gustavson", "outer")


def spgemm() -> str:
    """Seconds of the dataflows beside scipy and torch.sparse, and where the fastest one changes."""
    found = evidence("spgemm")
    lines: list[list[str]] = []
    for key, row in found["rows"].items():
        kind, size, density = key.split("/")
        seconds: dict[str, float] = row["seconds"]
        cells = [f"{seconds[name] * 1e3:,.1f}" if name in seconds else "" for name in (*OURS, "scipy", "torch.sparse")]
        moved = [f"{row['bytes'][name] / row['bytes']['least']:.1f}" for name in ("inner", "gustavson", "outer")]
        products, compression = row["products"], row["products"] / row["entries"][2]
        lines.append([kind, f"{int(size):,}", density, f"{products:,}", f"{compression:.1f}", *cells,
                      fastest(seconds), " / ".join(moved)])  # fmt: skip
    if not lines:
        return "Not measured yet."
    head = ["entries", "N", "density", "products P", "P / nnz(C)", *(f"{name}, ms" for name in OURS), "scipy, ms",
            "torch.sparse, ms", "fastest of the three", "times the least bytes"]  # fmt: skip
    machine = found["environment"]
    about = f"Milliseconds of one core ({machine['processor']}, torch {machine['torch']}, scipy {machine['scipy']})."
    return f"{table(head, lines)}\n\n{about} {crossings(found['rows'])}"


def fastest(seconds: dict[str, float]) -> str:
    """The fastest of the three that were measured."""
    return min((name for name in OURS if name in seconds), key=lambda name: seconds[name])


def crossings(rows: dict[str, Any]) -> str:
    """A sentence: between which densities the fastest of the three changes."""
    lines: dict[str, list[tuple[float, str]]] = {}
    for key, row in rows.items():
        kind, size, density = key.split("/")
        lines.setdefault(f"{kind} {int(size):,}", []).append((float(density), fastest(row["seconds"])))
    said: list[str] = []
    for line, points in lines.items():
        ordered = sorted(points)
        said += [f"{line} from {a} to {b} between {low:g} and {high:g}"
                 for (low, a), (high, b) in pairwise(ordered) if a != b]  # fmt: skip
    return f"The fastest changes: {'; '.join(said)}." if said else "The fastest of the three never changes."


def two_four() -> str:
    """Loss and restlessness of masks, dense and by each rule."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for key, row in evidence("two_four")["rows"].items():
        arms.setdefault(key.rpartition("/")[0], []).append(row)
    lines = [[arm, spread([r["loss"] for r in rows]),
              spread([r["sad"] / r["weights"] for r in rows], 2) if rows[0]["weights"] else "",
              str(rows[0]["steps"]), str(len(rows))] for arm, rows in arms.items()]  # fmt: skip
    return table(["arm", "held-out loss", "changes of a mask's entry, on average", "steps", "seeds"], lines)
