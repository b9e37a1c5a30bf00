"""Tables of the guides to less memory, from `evidence/`."""

from __future__ import annotations

from typing import Any

from tables_computation import evidence, table


def memory() -> str:
    """Every technique on one model: planned and measured bytes, seconds, loss."""
    found = evidence("memory")
    rows: dict[str, Any] = found["rows"]
    if not rows:
        return "Not measured yet."
    lines: list[list[str]] = []
    for name, row in rows.items():
        base = rows[_base(name, rows)]
        if name == "pretrained":
            continue
        if "error" in row:
            lines.append([name, *[""] * 7])
            continue
        live, resident, time = (row[key] / base[key] for key in ("live", "resident", "seconds"))
        bytes_ = [f"{row['planned'] / 1e6:.1f}", f"{row['live'] / 1e6:.1f}", f"{live:.2f}"]
        lines.append([name, *bytes_, f"{row['resident'] / 1e6:.0f}", f"{resident:.2f}", f"{time:.2f}",
                      f"{row['loss']:.3f}"])  # fmt: skip
    head = ["", "planned, MB", "live, MB", "ratio", "resident, MB", "ratio", "seconds, ratio", "loss"]
    idle = f"an idle process with torch and one optimizer holds {found['idle'] / 1e6:.0f} MB"
    about = f"{found['steps']} steps, one seed; {idle}."
    return f"{table(head, lines)}\n\n{about}"


def _base(name: str, rows: dict[str, Any]) -> str:
    """The row that a row is compared with: the plain one of its model, or full tuning of the same weights."""
    from memory import LARGE, TUNED

    return next(iter(LARGE if name in LARGE else TUNED if name in TUNED else ["plain"]))


def largest() -> str:
    """The largest models that were trained in a control group."""
    lines: list[list[str]] = []
    for row in evidence("largest"):
        steps, disk = row["steps"], row["disk"]
        sizes = (row["state_bytes"], row["limit"], row["group_peak"], row["resident_peak"], steps[-1]["read"],
                 steps[-1]["written"], disk["read"], disk["write"])  # fmt: skip
        lines.append([f"{row['parameters'] / 1e6:,.0f} million", *(f"{size / 1e9:.2f}" for size in sizes),
                      ", ".join(f"{step['seconds']:.0f}" for step in steps),
                      ", ".join(f"{step['loss']:.2f}" for step in steps)])  # fmt: skip
    head = ["weights", "training state, GB", "limit, GB", "group's peak", "process' peak", "read a step, GB",
            "written a step, GB", "disk reads GB/s", "disk writes GB/s", "seconds of steps", "losses"]  # fmt: skip
    return table(head, lines)


def offloading() -> str:
    """Activations on disk against keeping them."""
    found = evidence("offloading")["activations"]
    lines = [[row["arm"], f"{row['planned'] / 1e6:.0f}", f"{row['live'] / 1e6:.0f}",
              f"{(row['resident'] - row['base']) / 1e6:.0f}", f"{row['disk'] / 1e6:.0f}", f"{row['processor']:.1f}"]
             for row in found["rows"]]  # fmt: skip
    head = ["arm", "planned, MB", "live, MB", "resident on top, MB", "on disk, MB", "processor's seconds a step"]
    return table(head, lines)
