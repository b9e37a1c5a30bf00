# pyright: strict
"""A comparison as a table for a terminal."""

from __future__ import annotations

from typing import Any

from scrimp.errors import plural


def text(found: dict[str, Any]) -> str:
    """One row an arm: claimed, planned, measured."""
    base = found["arms"][0]
    seeds, budget = plural(len(found["seeds"]), "seed"), found["mode"].replace("-", " ")
    rows = [f"{'arm':28}{'planned':>16}{'measured':>34}", f"{'':28}{'memory':>8}{'time':>8}{'memory':>9}{'time':>8}"
            f"{'loss':>17}  to baseline's loss   verdict"]  # fmt: skip
    rows += [row(arm, base) for arm in found["arms"]]
    rows += [f"{name:28}left out: {reason}" for name, reason in found["left_out"].items()]
    rows += [
        "",
        f"Baseline: {', '.join(base['techniques'])}; loss {base['summary']['loss']:.4f}. {seeds}, {budget}; "
        "memory and time are ratios to the baseline's,",
        "loss is the difference to it with half its 95 % interval. A verdict needs p < 0.05 over the seeds.",
    ]
    claims = [f"  {arm['name']}: {arm['claim']}" for arm in found["arms"] if arm["claim"]]
    return "\n".join(rows + (["", "Claimed by the papers", *claims] if claims else []))


def row(arm: dict[str, Any], base: dict[str, Any]) -> str:
    """One arm."""
    planned, measured = arm["planned"], arm["summary"]
    half = (measured["interval"][1] - measured["interval"][0]) / 2 if measured["interval"] else None
    width = f" ± {half:.4f}" if half is not None else ""
    aim = base["summary"]["seconds_to_baseline"]
    reached = measured["seconds_to_baseline"]
    ratio = f" ({reached / aim:.2f} x)" if reached is not None and aim else ""
    speed = f"{reached:.0f} s{ratio}" if reached is not None else "not reached"
    rate = f", lr x{arm['lr']:g}" if arm["lr"] != 1.0 else ""
    return (
        f"{arm['name'][:27]:28}{planned['memory'] / base['planned']['memory']:8.2f}"
        f"{planned['seconds'] / base['planned']['seconds']:8.2f}{measured['memory']:9.2f}{measured['time']:8.2f}"
        f"{measured['difference']:+10.4f}{width:>9}  {speed:18}   {measured['verdict']}{rate}"
    )
