"""Plan and measure every recipe of the grid, and print how far apart they are.

python benchmarks/plan/run.py                    # all; about half an hour, on an idle machine
python benchmarks/plan/run.py --only 4m+         # cases whose name holds this
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


def child(what: str, case: Case) -> dict[str, Any]:
    """The figures of one process."""
    done = subprocess.run([sys.executable, str(HERE / "child.py"), what, json.dumps(case)], capture_output=True,
                          text=True, cwd=HERE, env=os.environ, timeout=900)  # fmt: skip
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


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Planned and measured."""
    planned, live = child("plan", case), child("live", case)
    runs = [child("run", case) for _ in range(repeats)]
    best = max(runs, key=lambda r: (min(r["clean"], 3), -r["step"]))
    return {"planned": planned, "live": live["live"], "resident": statistics.median(r["resident"] for r in runs),
            "step": best["step"], "clean": best["clean"], "steps": best["steps"],
            "others": estimators(case, planned["parameters"])}  # fmt: skip


def errors(rows: dict[str, Any], planned: str, measured: str) -> list[float]:
    """Relative errors, in percent."""
    return [100 * abs(row["planned"][planned] / row[measured] - 1) for row in rows.values()]


def main() -> None:
    """Measure, print, and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    options = parser.parse_args()
    names, settings = examples()
    rows: dict[str, Any] = {}
    for name, case in grid(names, settings.__getitem__).items():
        if options.only not in name:
            continue
        rows[name] = row = measure(case, options.repeats)
        p = row["planned"]
        print(f"{name:36} live {p['live'] / 1e6:8.1f} {100 * (p['live'] / row['live'] - 1):+6.2f} %   "
              f"resident {p['resident'] / 1e6:7.0f} {100 * (p['resident'] / row['resident'] - 1):+6.1f} %   "
              f"step {p['step'] * 1e3:7.1f} ms {100 * (p['step'] / row['step'] - 1):+6.1f} % "
              f"({row['clean']}/{row['steps']} clean)", flush=True)  # fmt: skip
    for what in ("live", "resident", "step"):
        off = errors(rows, what, what)
        p90 = statistics.quantiles(off, n=10)[-1] if len(off) > 1 else off[0]
        print(f"{what:9} median {statistics.median(off):.2f} %, 90th percentile {p90:.2f} %, most {max(off):.2f} %")
    evidence = {"command": "python benchmarks/plan/run.py", "date": time.strftime("%Y-%m-%d"),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores", "rows": rows}  # fmt: skip
    options.out.write_text(json.dumps(evidence, indent=1) + "\n")


if __name__ == "__main__":
    main()
