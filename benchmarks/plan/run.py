"""Plan and measure every recipe of the grid, and print how far apart they are.

python benchmarks/plan/run.py                    # all; about forty minutes, on an idle machine
python benchmarks/plan/run.py --only 4m+         # cases whose name holds this; writes nothing
python benchmarks/plan/run.py --again            # plan anew, and run again what others disturbed
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from estimators import estimators
from grid import Case, grid

HERE: Final = Path(__file__).resolve().parent
EVIDENCE: Final = HERE.parent.parent / "evidence" / "plan.json"
CLEAN: Final = 2
"""Undisturbed steps from which a row's time counts."""


def child(what: str, case: Case) -> dict[str, Any]:
    """The figures of one process."""
    done = subprocess.run(
        [sys.executable, str(HERE / "child.py"), what, json.dumps(case)],
        capture_output=True, text=True, cwd=HERE, env=os.environ, timeout=900,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def examples() -> tuple[list[str], dict[str, dict[str, Any]]]:
    """All techniques, and settings to try each with: those of a user, where the card's are for a tiny model."""
    from scrimp.registry import catalogue

    own: dict[str, dict[str, Any]] = {
        "fused_loss": {}, "recompute": {}, "lora": {"rank": 8}, "accumulate": {"parts": 4}, "stack": {"at": [0.5]},
        "length_warmup": {"until": 0.5, "levels": 2},
    }  # fmt: skip
    return sorted(catalogue()), {name: own.get(name, dict(e.card.example)) for name, e in catalogue().items()}


def measure(case: Case, known: dict[str, Any] | None) -> dict[str, Any]:
    """Planned and measured.

    Args:
        known: what was measured before; its run is repeated only if others disturbed most of its steps.
    """
    planned = child("plan", case)
    live = known["live"] if known else child("live", case)["live"]
    found = known if known and known["clean"] >= CLEAN else child("run", case)
    if found["clean"] < CLEAN:
        found = child("run", case)
    measured = {key: found[key] for key in ("resident", "step", "clean", "steps")}
    return {"planned": planned, "live": live, "others": estimators(case, planned["parameters"]), **measured}


def show(name: str, row: dict[str, Any]) -> str:
    """A row in one line."""
    p = row["planned"]
    return (
        f"{name:36} live {p['live'] / 1e6:8.1f} {100 * (p['live'] / row['live'] - 1):+6.2f} %   "
        f"resident {p['resident'] / 1e6:7.0f} {100 * (p['resident'] / row['resident'] - 1):+6.1f} %   "
        f"step {p['step'] * 1e3:7.1f} ms {100 * (p['step'] / row['step'] - 1):+6.1f} % "
        f"({row['clean']}/{row['steps']} clean)"
    )


def totals(rows: dict[str, Any]) -> list[str]:
    """Median, 90th percentile and largest of the relative errors."""
    lines: list[str] = []
    for what in ("live", "resident", "step"):
        sound = [row for row in rows.values() if what != "step" or row["clean"] >= CLEAN]
        off = sorted(100 * abs(row["planned"][what] / row[what] - 1) for row in sound)
        if len(off) > 1:
            p90 = statistics.quantiles(off, n=10)[-1]
            lines.append(f"{what:9} of {len(off)}: median {statistics.median(off):.2f} %, "
                         f"90th percentile {p90:.2f} %, most {off[-1]:.2f} %")  # fmt: skip
    return lines


def main() -> None:
    """Measure, print, and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    options = parser.parse_args()
    names, settings = examples()
    before = json.loads(options.out.read_text())["rows"] if options.again else {}
    rows: dict[str, Any] = {}
    for name, case in grid(names, settings.__getitem__).items():
        if options.only in name:
            rows[name] = measure(case, before.get(name))
            print(show(name, rows[name]), flush=True)
    print("\n".join(totals(rows)))
    if not options.only:
        evidence = {"command": "python benchmarks/plan/run.py", "date": time.strftime("%Y-%m-%d"),
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores", "rows": rows}  # fmt: skip
        options.out.write_text(json.dumps(evidence, indent=1) + "\n")


if __name__ == "__main__":
    main()
