"""Every technique of the catalogue on every task, on tiny data in memory: two steps train, or the refusal's reason.

    python benchmarks/tasks_table.py        # a minute or two on one core; writes evidence/tasks.json
    python benchmarks/tables.py             # writes the table into docs/tasks.md

A technique that raises anything but a user's error on a task fails the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from scrimp.folder import environment  # noqa: E402
from scrimp.registry import modules  # noqa: E402
from tiny_tasks import TINY, entries, tried  # noqa: E402


def main() -> None:
    """Print the table, write the evidence, and fail if a technique does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a technique or a task: only its rows, and no evidence is written")
    parser.add_argument("--out", type=Path, default=ROOT / "evidence/tasks.json", help="JSON to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for entry in entries():
        for name in sorted(modules()):
            if args.only in ("", entry, name):
                rows.append({"task": entry, "technique": name, **tried(entry, name, steps=2)})
                print(line(rows[-1]), flush=True)
    verdicts = [row["verdict"] for row in rows]
    print(f"\n{len(rows)} rows: " + ", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts))))
    if not args.only:
        args.out.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n")
    raise SystemExit(1 if "fails" in verdicts else 0)


def line(row: dict[str, Any]) -> str:
    """A row for reading."""
    return f"{row['task']:20} {row['technique']:16} {row['verdict']:8} {row.get('reason', '')}".rstrip()


def about() -> dict[str, Any]:
    """Where and on what this was made."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(),
        "environment": {key: value for key, value in environment().items() if key != "command"},
        "models": {entry: TINY[entry].model for entry in entries()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
