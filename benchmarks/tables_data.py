"""Tables of the guide to less data, from `evidence/`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from tables_computation import table

ROOT = Path(__file__).parents[1]


def rows() -> dict[str, Any]:
    """What `benchmarks/pruning.py` measured."""
    return json.loads((ROOT / "evidence" / "pruning.json").read_text())["rows"]


def pruning() -> str:
    """A curve for each data set and method, with the number of seeds of each cell."""
    found = {name: row for name, row in rows().items() if "errors" in row}
    shares = sorted({row["kept"] for row in found.values() if row["kept"] < 1}, reverse=True)
    lines = ["| data | items kept | " + " | ".join(f"{share:.0%} kept" for share in shares) + " |",
             "|---|---|" + "---|" * len(shares)]  # fmt: skip
    sets = dict.fromkeys(name.split(", ")[0] for name in found)
    for data in sets:
        own = {name: row for name, row in found.items() if name.startswith(f"{data}, ")}
        for label in dict.fromkeys(name.split(", ")[1] for name in own if ", all" not in name):
            curve = [own.get(f"{data}, {label}, {share}") for share in shares]
            cells = [_cell(row) for row in curve]
            lines.append(f"| {data} | {label} | " + " | ".join(cells) + " |")
    whole = ", ".join(f"{data} {100 * found[f'{data}, all']['mean']:.1f}" for data in sets if f"{data}, all" in found)
    cost = [f"{name.split(', ')[0]} {name.rpartition(' ')[2]} {row['seconds']:.0f} s"
            for name, row in rows().items() if ", scoring by " in name]  # fmt: skip
    return "\n".join([*lines, "", f"With all items: {whole}. Scoring took: {', '.join(cost)}."])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    seeds = len(row["errors"])
    spread = f" ± {100 * row['std']:.1f}" if seeds > 1 else ""
    return f"{100 * row['mean']:.1f}{spread} ({seeds})"


def crossing() -> str:
    """Error of a student by items a dimension."""
    found = {name.rpartition(" ")[2]: row for name, row in rows().items() if name.startswith("crossing, ")}
    if not found:
        return "Not measured yet."
    lines = ["| items a dimension | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for which in ("hard", "easy", "random"):
        lines.append(f"| {which} | " + " | ".join(f"{row[which]:.3f}" for row in found.values()) + " |")
    return "\n".join(lines)


def importance() -> str:
    """Importance sampling against uniform batches."""
    found = json.loads((ROOT / "evidence" / "importance.json").read_text())["rows"].values()
    head = ["arm", "steps", "test error %", "held-out loss", "seconds", "tau", "steps that sampled"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in ("uniform", "importance", "importance, always", "uniform, same seconds"):
        rows = [seed[arm] for seed in found]
        error, loss, seconds, steps = ([row[key] for row in rows] for key in ("error", "loss", "seconds", "steps"))
        tau = [row["tau"] for row in rows if "tau" in row]
        cells = [
            arm, f"{statistics.mean(steps):.0f}",
            f"{100 * statistics.mean(error):.1f} ± {100 * statistics.stdev(error):.1f}",
            f"{statistics.mean(loss):.3f} ± {statistics.stdev(loss):.3f}", f"{statistics.mean(seconds):.1f}",
            f"{statistics.mean(tau):.2f}" if tau else "",
            f"{statistics.mean(row['sampling'] for row in rows):.0%}" if tau else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    by = {name: statistics.mean(seed["variance"][name] for seed in found) for name in ("uniform", "bound", "exact")}
    about = (
        "Variance of one item's gradient at the end of `uniform`, as a share of that of a uniform draw: by the bound "
        f"{by['bound'] / by['uniform']:.2f}, by exact norms {by['exact'] / by['uniform']:.2f}. {len(found)} seeds."
    )
    return "\n".join([*lines, "", about])


def flip() -> str:
    """Images and texts with a part of the patches left out."""
    lines: list[list[str]] = []
    for arm, rows in _arms("flip").items():
        reached = ", ".join(f"{row['reached']:.0f} s" if row.get("reached") else "never" for row in rows)
        fast = _mean(rows, "times_as_fast", 2)
        lines.append([arm, _mean(rows, "steps", 0), _mean(rows, "images_per_second", 0), fast,
                      _mean(rows, "zero_shot", 1, 100), _mean(rows, "loss", 2), _mean(rows, "seconds", 0),
                      "" if arm == "none" else reached, str(len(rows))])  # fmt: skip
    head = ["patches left out", "steps", "images a second", "times as fast", "zero-shot accuracy %", "held-out loss",
            "seconds", "as good as `none` after", "seeds"]  # fmt: skip
    return table(head, lines)


def mae() -> str:
    """Pre-training and fine-tuning against training from scratch."""
    lines: list[list[str]] = []
    for arm, rows in _arms("mae").items():
        if arm != "pre-training":
            total = [{"seconds": row.get("total_seconds", row["seconds"])} for row in rows]
            lines.append([arm, _mean(rows, "accuracy", 1, 100), _mean(rows, "loss", 3), _mean(rows, "steps", 0),
                          _mean(total, "seconds", 0), str(len(rows))])  # fmt: skip
    head = ["arm", "accuracy %", "held-out loss", "steps", "seconds, pre-training included", "seeds"]
    return table(head, lines)


def _arms(name: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of a benchmark by arm, those of its seeds together."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for key, row in json.loads((ROOT / "evidence" / f"{name}.json").read_text())["rows"].items():
        arms.setdefault(key.split("/")[0], []).append(row)
    return arms


def _mean(rows: list[dict[str, Any]], key: str, digits: int, scale: float = 1.0) -> str:
    found = [scale * row[key] for row in rows if row.get(key) is not None]
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 and digits else ""
    return f"{statistics.mean(found):.{digits}f}{spread}" if found else ""
